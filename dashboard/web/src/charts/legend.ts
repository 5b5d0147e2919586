// The curves of a panel by name, each with its look, its value, and a switch.

import { h, setAttribute, setText } from "../dom";
import type { SeriesInfo } from "../protocol";
import { swatch } from "./dom";
import { dash, hue } from "./theme";

/** A curve of a panel. */
export interface PanelCurve {
  info: SeriesInfo;
  /** Which colour and dash. */
  slot: number;
}

/** What the legend says about a curve; empty texts take no room. */
export interface Said {
  isHidden: boolean;
  /** The value that is drawn. */
  value: string;
  /** What it is an average of. */
  raw: string;
  best: string;
}

interface Item {
  button: HTMLButtonElement;
  value: HTMLElement;
  raw: HTMLElement;
  best: HTMLElement;
}

export class Legend {
  readonly root: HTMLElement;
  readonly #items = new Map<string, Item>();

  constructor(panel: string) {
    this.root = h("div", { class: "chart-legend", role: "group", "aria-label": `Curves of ${panel}` });
  }

  /** Add a curve; `curves` are all of the panel with their looks, which may have changed. */
  add(info: SeriesInfo, toggle: () => void, curves: readonly PanelCurve[]): void {
    const value = h("span", { class: "curve-value" });
    const raw = h("span", { class: "curve-raw" });
    const best = h("span", { class: "curve-best" });
    const button = h(
      "button",
      {
        type: "button",
        class: "curve",
        "aria-pressed": "true",
        title: `${info.key}: click to hide or show`,
        onclick: toggle,
      },
      h("span", { class: "curve-label" }, info.label),
      value,
      raw,
      best,
    );
    this.#items.set(info.key, { button, value, raw, best });
    for (const { info: one, slot } of [...curves].sort((left, right) => left.slot - right.slot)) {
      const item = this.#items.get(one.key)?.button;
      if (!item) continue;
      item.querySelector(".swatch")?.remove();
      item.prepend(swatch(hue(slot), dash(slot)));
      this.root.append(item);
    }
    // What the title says already, the legend need not.
    this.root.classList.toggle("only", curves.length === 1 && !["train", "val"].includes(info.label));
    this.root.classList.toggle("several", curves.length > 2);
  }

  say(key: string, { isHidden, value, raw, best }: Said): void {
    const item = this.#items.get(key);
    if (!item) return;
    setAttribute(item.button, "aria-pressed", String(!isHidden));
    setText(item.value, value);
    setText(item.raw, raw === "" ? "" : `raw ${raw}`);
    setText(item.best, best === "" ? "" : `best ${best}`);
  }
}

/** Give each curve a look of its own; those that are in many panels look the same in all of them. */
export function assignSlots(curves: PanelCurve[]): void {
  const labels = curves.map(({ info }) => info.label);
  const main = ["step", "train"].find((label) => labels.includes(label));
  const used = new Set<number>();
  const take = (curve: PanelCurve, wanted: number): void => {
    curve.slot = wanted;
    while (used.has(curve.slot)) curve.slot++;
    used.add(curve.slot);
  };
  const fixed: Record<string, number> = { val: 1, ...(main === undefined ? {} : { [main]: 0 }) };
  const [known, others] = [
    curves.filter(({ info }) => info.label in fixed),
    curves.filter(({ info }) => !(info.label in fixed)),
  ];
  for (const curve of known) take(curve, fixed[curve.info.label] as number);
  for (const curve of others) take(curve, 0);
}
