// The legend of a panel: its lines by name, each with its look, its value, and a switch.

import { h, replaceChildren, setAttribute, setText, show } from "../dom";
import type { SeriesInfo } from "../protocol";
import { swatch } from "./dom";
import { cssColour, type Look } from "./theme";

/** A line of the legend; empty texts take no room. */
export interface Item {
  key: string;
  label: string;
  title: string;
  /** Null for what has no colour of its own: then only its dash is shown. */
  look: Look;
  isPlain?: boolean;
  isHidden: boolean;
  /** The value that is drawn. */
  value: string;
  /** What it is an average of. */
  raw: string;
  best: string;
  toggle(): void;
}

export interface LegendHead {
  /** Whether there is only what the title says already. */
  only: boolean;
  /** Whether there are several runs, or groups of them. */
  runs: boolean;
  /** What some runs lack. */
  note: string;
}

interface Shown {
  button: HTMLButtonElement;
  value: HTMLElement;
  raw: HTMLElement;
  best: HTMLElement;
}

export class Legend {
  readonly root: HTMLElement;
  readonly #note = h("span", { class: "chart-lacks", hidden: true });
  #items: Shown[] = [];
  #toggles: (() => void)[] = [];
  #made = "";

  constructor(panel: string) {
    this.root = h("div", { class: "chart-legend", role: "group", "aria-label": `Curves of ${panel}` });
  }

  show(items: readonly Item[], { only, runs, note }: LegendHead): void {
    const made = JSON.stringify(items.map(({ key, label, look, isPlain }) => [key, label, look, isPlain]));
    this.#toggles = items.map(({ toggle }) => toggle);
    if (made !== this.#made) {
      this.#made = made;
      this.#items = items.map((item, index) => this.#make(item, index));
      replaceChildren(this.root, ...this.#items.map(({ button }) => button), this.#note);
    }
    items.forEach(({ isHidden, value, raw, best }, index) => {
      const item = this.#items[index] as Shown;
      setAttribute(item.button, "aria-pressed", String(!isHidden));
      setText(item.value, value);
      setText(item.raw, raw === "" ? "" : `raw ${raw}`);
      setText(item.best, best === "" ? "" : `best ${best}`);
    });
    this.root.classList.toggle("only", only);
    this.root.classList.toggle("several", items.length > 2);
    this.root.classList.toggle("runs", runs);
    setText(this.#note, note);
    show(this.#note, note !== "");
  }

  #make({ label, title, look, isPlain }: Item, index: number): Shown {
    const value = h("span", { class: "curve-value" });
    const raw = h("span", { class: "curve-raw" });
    const best = h("span", { class: "curve-best" });
    const onclick = (): void => this.#toggles[index]?.();
    const button = h(
      "button",
      { type: "button", class: "curve", "aria-pressed": "true", title, onclick },
      h("span", { class: "curve-label" }, label),
      value,
      raw,
      best,
    );
    button.prepend(swatch(isPlain === true ? "currentColor" : cssColour(look), look.dash));
    return { button, value, raw, best };
  }
}

/** Which of the looks each curve of a panel has: one of its own, and those that are in many panels the same in all. */
export function slotsOf(curves: readonly SeriesInfo[]): Map<string, number> {
  const labels = curves.map(({ label }) => label);
  const main = ["step", "train"].find((label) => labels.includes(label));
  const slots = new Map<string, number>();
  const take = ({ key }: SeriesInfo, wanted: number): void => {
    const used = new Set(slots.values());
    while (used.has(wanted)) wanted++;
    slots.set(key, wanted);
  };
  const fixed: Record<string, number> = { val: 1, ...(main === undefined ? {} : { [main]: 0 }) };
  for (const info of curves) if (info.label in fixed) take(info, fixed[info.label] as number);
  for (const info of curves) if (!(info.label in fixed)) take(info, 0);
  return slots;
}
