// What only charts need of the document, beside the page's own (../dom.ts).

import { h, shape } from "../dom";

/** A piece of a line as a curve is drawn. */
export function swatch(colour: string, dash: readonly number[]): SVGElement {
  const line = shape("line", { x1: "0", y1: "4", x2: "18", y2: "4" });
  line.style.stroke = colour;
  if (dash.length > 0) line.setAttribute("stroke-dasharray", dash.join(" "));
  return shape("svg", { viewBox: "0 0 18 8", "aria-hidden": "true", class: "swatch" }, line);
}

/** Let the browser save a file. */
export function save(blob: Blob, name: string): void {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  // Not at once: some browsers read it only after the click was handled.
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A name for a file, of whatever a run or a metric is called. */
export function fileName(...parts: string[]): string {
  return parts
    .filter(Boolean)
    .join("-")
    .replace(/[^\p{L}\p{N}._-]+/gu, "_")
    .slice(0, 120);
}
