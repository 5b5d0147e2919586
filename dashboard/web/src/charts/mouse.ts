// The mouse on a chart, beside what the plot does: Shift and a drag pan, Ctrl (or Cmd) and the wheel zoom.

import type { Panel, PanelHost } from "./panel";

/** How much a pixel of the wheel zooms: a notch of 100 is about a fifth. */
const PER_PIXEL = 0.0025;

export function listenToMouse(panel: Panel, host: PanelHost): void {
  const { plot } = panel;
  const box = (): DOMRect | undefined => plot.querySelector(".plot-over")?.getBoundingClientRect();

  // It is captured, so that the plot does not see it: a drag without Shift selects.
  plot.addEventListener(
    "mousedown",
    (event) => {
      const over = box();
      if (!event.shiftKey || event.button !== 0 || !over) return;
      event.preventDefault();
      event.stopPropagation();
      const { x } = host.scene();
      const begin = event.clientX;
      host.moveCursor(null, false);
      plot.classList.add("panning");
      const moved = ({ clientX }: MouseEvent): void => {
        const by = (begin - clientX) / over.width;
        host.pan(x.fromUnit(by), x.fromUnit(1 + by));
      };
      const ended = (): void => {
        plot.classList.remove("panning");
        window.removeEventListener("mousemove", moved);
        window.removeEventListener("mouseup", ended);
      };
      window.addEventListener("mousemove", moved);
      window.addEventListener("mouseup", ended);
    },
    { capture: true },
  );

  plot.addEventListener(
    "wheel",
    (event) => {
      const over = box();
      if (!(event.ctrlKey || event.metaKey) || !over) return;
      event.preventDefault(); // the browser would zoom the page
      const pixels = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 33 : 1);
      const factor = Math.exp(Math.max(-1, Math.min(1, pixels * PER_PIXEL)));
      const { x } = host.scene();
      const at = Math.max(0, Math.min(1, (event.clientX - over.left) / over.width));
      host.zoom(x.fromUnit(at - at * factor), x.fromUnit(at + (1 - at) * factor));
    },
    { passive: false },
  );
}
