// The bar above the charts: search, x axis, logarithms, smoothing, following.

import type { Axis, MarkKind, View, ViewState } from "../view";
import { h, icon, setAttribute, setText } from "../dom";
import { searchField } from "../search";

const AXES: readonly [Axis, string, string][] = [
  ["step", "Step", "Optimizer steps"],
  ["epoch", "Epoch", "Epochs done"],
  ["time", "Time", "Time since the start"],
  ["wall", "Clock", "Time of day"],
];

/** Kinds of marks, how they look in a chart, and what they are called. */
const MARKS: readonly [MarkKind, string, string][] = [
  ["alert", "M4 2v13M4 2.5l8 3-8 3z", "Alerts"],
  ["validation", "M8 10v5", "Validations"],
  ["checkpoint", "M8 8v7M6 8h4v4H6z", "Checkpoints"],
  ["lr", "M8 6v9", "Learning rate"],
];

/** The slider goes from 0 to 100; most of it is where it matters, near 1. */
export function smoothingOf(position: number): number {
  return position <= 0 ? 0 : Math.min(0.999, Math.round(1_000 * (1 - 10 ** (-3 * (position / 100)))) / 1_000);
}

export function positionOf(smoothing: number): number {
  return smoothing <= 0 ? 0 : Math.round((-100 / 3) * Math.log10(1 - smoothing));
}

export interface ToolbarHost {
  view: View;
  setAxis(axis: Axis): void;
  setFollow(follow: boolean): void;
}

export class Toolbar {
  readonly root: HTMLElement;
  readonly #search: HTMLInputElement;
  readonly #count: HTMLElement;
  readonly #axes: Map<Axis, HTMLButtonElement>;
  readonly #logX: HTMLButtonElement;
  readonly #logY: HTMLButtonElement;
  readonly #follow: HTMLButtonElement;
  readonly #reset: HTMLButtonElement;
  readonly #slider: HTMLInputElement;
  readonly #amount: HTMLElement;
  readonly #marks: Map<MarkKind, HTMLInputElement>;
  readonly #marksButton = h("summary", { class: "button" });

  constructor(host: ToolbarHost) {
    const { view } = host;
    this.#search = searchField("Search metrics", () => view.set({ search: this.#search.value }));
    this.#count = h("span", { class: "charts-count" });
    this.#axes = new Map(AXES.map(([axis, name, title]) => [axis, choice(name, title, () => host.setAxis(axis))]));
    this.#logX = choice("log x", "Logarithmic x axis", () => view.set({ logX: !view.get().logX }));
    this.#logY = choice("log y", "Logarithmic y axis", () => view.set({ logY: !view.get().logY }));
    this.#follow = choice("Follow", "Keep the newest steps in view", () => host.setFollow(!view.get().follow));
    this.#reset = choice("Reset zoom", "Show all steps (double-click a chart)", () =>
      view.set({ zoom: null, follow: false }),
    );
    this.#slider = h("input", { type: "range", min: "0", max: "100", step: "1", class: "charts-slider" });
    this.#slider.addEventListener("input", () => view.set({ smoothing: smoothingOf(Number(this.#slider.value)) }));
    this.#amount = h("output", { class: "charts-amount" });
    this.#marks = new Map(MARKS.map(([kind]) => {
      const onchange = (): void => view.toggle("unmarked", kind);
      return [kind, h("input", { type: "checkbox", onchange })];
    }));
    const marks = MARKS.map(([kind, sign, name]) => h("label", {}, this.#marks.get(kind), icon(sign), name));
    const menu = h(
      "details",
      { class: "menu" },
      this.#marksButton,
      h("div", { class: "menu-items", role: "group", "aria-label": "Marks in the charts" }, ...marks),
    );
    document.addEventListener("click", (event) => {
      if (!menu.contains(event.target as Node)) menu.open = false;
    });
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.preventDefault(); // it closes the menu and nothing else
      menu.open = false;
      this.#marksButton.focus();
    });
    this.root = h(
      "div",
      { class: "toolbar", role: "group", "aria-label": "Charts" },
      h("div", { class: "charts-find" }, this.#search, this.#count),
      h("div", { class: "charts-segments", role: "group", "aria-label": "X axis" }, ...this.#axes.values()),
      h("div", { class: "charts-segments", role: "group", "aria-label": "Logarithmic axes" }, this.#logX, this.#logY),
      h("div", { class: "charts-tail" }, this.#follow, this.#reset),
      menu,
      h("label", { class: "charts-smoothing" }, "Smoothing", this.#slider, this.#amount),
    );
    this.show(view.get());
  }

  show(state: ViewState): void {
    if (this.#search.value !== state.search) this.#search.value = state.search;
    for (const [axis, button] of this.#axes) press(button, axis === state.axis);
    press(this.#logX, state.logX && state.axis !== "wall");
    this.#logX.disabled = state.axis === "wall";
    press(this.#logY, state.logY);
    for (const [kind, box] of this.#marks) box.checked = !state.unmarked.includes(kind);
    const off = [...this.#marks.values()].filter((box) => !box.checked).length;
    setText(this.#marksButton, off === 0 ? "Marks" : `Marks: ${off} off`);
    press(this.#follow, state.follow);
    this.#reset.disabled = state.zoom === null;
    const position = positionOf(state.smoothing);
    if (smoothingOf(Number(this.#slider.value)) !== state.smoothing) this.#slider.value = String(position);
    setText(this.#amount, state.smoothing === 0 ? "off" : state.smoothing.toFixed(state.smoothing > 0.99 ? 3 : 2));
    this.#slider.setAttribute("aria-valuetext", this.#amount.textContent ?? "");
  }

  /** How many of all panels a search has found. */
  setCount(found: number, all: number): void {
    setText(this.#count, found === all ? "" : `${found} of ${all}`);
  }
}

function choice(name: string, title: string, onclick: () => void): HTMLButtonElement {
  return h("button", { type: "button", class: "button choice", title, onclick }, name);
}

function press(button: HTMLButtonElement, pressed: boolean): void {
  setAttribute(button, "aria-pressed", String(pressed));
}
