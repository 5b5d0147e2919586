// Keys on a chart that has the focus: they move the cursor along its curves, read it out, and zoom.

import type { Panel, PanelHost } from "./panel";

export function listenToKeys(panel: Panel, host: PanelHost): void {
  const pressed = (event: KeyboardEvent): void => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const shared = host.scene();
    const longest = panel.longest();
    const curve = longest?.curve ?? null;
    const scene = longest?.scene ?? shared;
    const { min, max } = scene.x;
    const centre = scene.cursor ?? (min + max) / 2;
    const move = (by: number): void => {
      if (!curve) return;
      const places = curve[scene.column];
      const [first, last] = [
        curve.search(scene.column, min + scene.origin),
        curve.search(scene.column, max + scene.origin),
      ];
      const here =
        scene.cursor === null ? (by < 0 ? last : first - 1) : curve.nearest(scene.column, scene.cursor + scene.origin);
      const index = Math.max(first, Math.min(here + by, Math.min(last, curve.length - 1)));
      host.moveCursor((places[index] as number) - scene.origin, true);
      panel.describeCursor();
    };
    const page = curve ? Math.max(1, Math.round(curve.length / 20)) : 1;
    const scale = (factor: number): void => {
      host.zoom(centre - (centre - min) * factor, centre + (max - centre) * factor);
    };
    const keys: Record<string, () => void> = {
      ArrowLeft: () => move(event.shiftKey ? -10 : -1),
      ArrowRight: () => move(event.shiftKey ? 10 : 1),
      PageUp: () => move(page),
      PageDown: () => move(-page),
      Home: () => move(-Infinity),
      End: () => move(Infinity),
      Enter: () => host.announce(panel.readOut()),
      " ": () => host.announce(panel.readOut()),
      "+": () => scale(0.5),
      "-": () => scale(2),
      "0": () => host.resetZoom(),
      Escape: () => host.moveCursor(null, true),
    };
    const action = keys[event.key];
    if (!action || (event.key === "Escape" && scene.cursor === null)) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  };
  panel.plot.addEventListener("keydown", pressed);
}
