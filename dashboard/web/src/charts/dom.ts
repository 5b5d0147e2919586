// Small parts of the charts, beside the page's own (../dom.ts).

import { h, icon, shape } from "../dom";

const ICONS = {
  maximise: "M9.5 2.5h4v4M13.5 2.5l-4.5 4.5M6.5 13.5h-4v-4M2.5 13.5l4.5-4.5",
  restore: "M13.5 6.5h-4v-4M9.5 6.5l4.5-4.5M2.5 9.5h4v4M6.5 9.5l-4.5 4.5",
  table: "M2.5 3.5h11v9h-11zM2.5 6.5h11M2.5 9.5h11M6.5 6.5v6",
  picture: "M2.5 3.5h11v9h-11zM3 11l3-3.5 2.5 2.5 2-2 2.5 3M10.5 6.2v.1",
  download: "M8 2.5v7.5M4.8 7l3.2 3.2L11.2 7M2.5 13h11",
} as const;

export type Icon = keyof typeof ICONS;

/** A button that shows a picture and is called `label`. */
export function iconButton(name: Icon, label: string, pressed: () => void): HTMLButtonElement {
  const attributes = { type: "button", class: "icon-button", "aria-label": label, title: label, onclick: pressed };
  return h("button", attributes, icon(ICONS[name]));
}

export function setIcon(button: HTMLButtonElement, name: Icon, label: string): void {
  button.replaceChildren(icon(ICONS[name]));
  button.setAttribute("aria-label", label);
  button.title = label;
}

/** A piece of a line as a curve is drawn. */
export function swatch(hue: number, dash: readonly number[]): SVGElement {
  const line = shape("line", { x1: "0", y1: "4", x2: "18", y2: "4", class: `stroke-${hue + 1}` });
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
