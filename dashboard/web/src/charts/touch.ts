// Fingers on a chart: one that goes up or down scrolls the page (the browser's part: `touch-action: pan-y`), one
// that taps or goes sideways moves the cursor, two zoom.

import type { Panel, PanelHost } from "./panel";

export function listenToTouch(panel: Panel, host: PanelHost): void {
  const fingers = new Map<number, number>(); // clientX by pointer
  let pinch: { left: number; right: number } | null = null; // values under the two fingers, when they came down

  const ends = (): [number, number] => {
    const [one, other] = [...fingers.values()] as [number, number];
    return one < other ? [one, other] : [other, one];
  };

  panel.plot.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch") return;
    fingers.set(event.pointerId, event.clientX);
    panel.plot.setPointerCapture(event.pointerId);
    if (fingers.size === 1) {
      host.moveCursor(panel.xAt(event.clientX), true);
    } else if (fingers.size === 2) {
      const [left, right] = ends().map((clientX) => panel.xAt(clientX));
      pinch = left == null || right == null ? null : { left, right };
      host.moveCursor(null, true);
    }
  });
  panel.plot.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    fingers.set(event.pointerId, event.clientX);
    if (fingers.size === 1 && !pinch) {
      host.moveCursor(panel.xAt(event.clientX), true);
    } else if (fingers.size === 2 && pinch) {
      const zoomed = pinched(panel, host, pinch, ends());
      if (zoomed) host.zoom(...zoomed);
    }
  });
  const lifted = (event: PointerEvent): void => {
    fingers.delete(event.pointerId);
    if (fingers.size === 0) pinch = null;
  };
  panel.plot.addEventListener("pointerup", lifted);
  panel.plot.addEventListener("pointercancel", lifted);
}

/** The part of x in which the values that were under the two fingers are under them again. */
function pinched(
  panel: Panel,
  host: PanelHost,
  { left, right }: { left: number; right: number },
  [leftX, rightX]: [number, number],
): [number, number] | null {
  const box = panel.plot.querySelector(".plot-over")?.getBoundingClientRect();
  if (!box || rightX - leftX < 10) return null;
  const { x } = host.scene();
  // In units of the axis as it is now: the same for linear and logarithmic ones
  const [from, to] = [x.toUnit(left), x.toUnit(right)];
  const perPixel = (to - from) / (rightX - leftX);
  const start = from - (leftX - box.left) * perPixel;
  return [x.fromUnit(start), x.fromUnit(start + box.width * perPixel)];
}
