// The bar above the charts: search, x axis, logarithms, smoothing, following.

import { type Axis, MAX_COLUMNS, type MarkKind, type View, type ViewState } from "../view";
import { h, icon, setAttribute, setText } from "../dom";
import { searchField } from "../search";

const AXES: readonly [Axis, string, string][] = [
  ["step", "Step", "Optimizer steps"],
  ["epoch", "Epoch", "Epochs done"],
  ["time", "Time", "Time since the start"],
  ["wall", "Clock", "Time of day"],
];

/** Heights of a plot in CSS pixels, and what they are called. */
const HEIGHTS = [
  [0, "as suits the width"],
  [140, "low"],
  [200, "medium"],
  [300, "high"],
  [420, "very high"],
] as const;

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
  readonly #columns: HTMLSelectElement;
  readonly #height: HTMLSelectElement;
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
    const columns = Array.from({ length: MAX_COLUMNS }, (_, index) => index + 1);
    this.#columns = select([[0, "as many as fit"], ...columns.map((count): [number, string] => [count, String(count)])], (columns) =>
      view.set({ columns }),
    );
    this.#height = select(HEIGHTS, (height) => view.set({ height }));
    const layout = [h("label", {}, "Columns", this.#columns), h("label", {}, "Height", this.#height)];
    this.root = h(
      "div",
      { class: "toolbar", role: "group", "aria-label": "Charts" },
      h("div", { class: "charts-find" }, this.#search, this.#count),
      h("div", { class: "charts-segments", role: "group", "aria-label": "X axis" }, ...this.#axes.values()),
      h("div", { class: "charts-segments", role: "group", "aria-label": "Logarithmic axes" }, this.#logX, this.#logY),
      h("div", { class: "charts-tail" }, this.#follow, this.#reset),
      menu(h("summary", { class: "button" }, "Layout"), "Layout of the charts", layout),
      menu(this.#marksButton, "Marks in the charts", marks),
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
    this.#columns.value = String(state.columns);
    this.#height.value = [...this.#height.options].some(({ value }) => value === String(state.height))
      ? String(state.height)
      : "0";
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

function select(options: readonly (readonly [number, string])[], chosen: (value: number) => void): HTMLSelectElement {
  const onchange = (): void => chosen(Number(made.value));
  const made: HTMLSelectElement = h(
    "select",
    { onchange },
    ...options.map(([value, name]) => h("option", { value }, name)),
  );
  return made;
}

/** A button that opens a list of settings; a click beside it or Escape closes it. */
function menu(button: HTMLElement, label: string, items: HTMLElement[]): HTMLElement {
  const list = h("div", { class: "menu-items", role: "group", "aria-label": label }, ...items);
  const details = h("details", { class: "menu" }, button, list);
  document.addEventListener("click", (event) => {
    if (!details.contains(event.target as Node)) details.open = false;
  });
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    event.preventDefault(); // it closes the menu and nothing else
    details.open = false;
    button.focus();
  });
  return details;
}

function choice(name: string, title: string, onclick: () => void): HTMLButtonElement {
  return h("button", { type: "button", class: "button choice", title, onclick }, name);
}

function press(button: HTMLButtonElement, pressed: boolean): void {
  setAttribute(button, "aria-pressed", String(pressed));
}
