// The bar above the charts: search, x axis, logarithms, smoothing, following, and the legend of marks. On a phone most
// of it is behind one button.

import { type Axis, MAX_COLUMNS, type MarkKind, type View, type ViewState } from "../view";
import { button, h, icon, iconButton, replaceChildren, setAttribute, setText, show } from "../dom";
import { searchField } from "../search";
import { menu, select } from "./menu";

const AXES: readonly [Axis, string, string][] = [
  ["step", "Step", "Optimizer steps"],
  ["epoch", "Epoch", "Epochs done"],
  ["samples", "Samples", "Samples seen"],
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
  ["alert", "M5 2v12M5 2.5l8 3-8 3z", "Alerts"],
  ["validation", "M8 5v6", "Validations"],
  ["checkpoint", "M5.5 5.5h5v5h-5z", "Checkpoints"],
  ["lr", "M8 4.5l4 6.5H4z", "Learning rate"],
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
  /** Bring a group of panels into view. */
  jump(group: string): void;
  /** Fold all groups, or unfold them. */
  foldAll(folded: boolean): void;
  /** Save all points of everything that is shown. */
  saveAll(): void;
}

export class Toolbar {
  readonly root: HTMLElement;
  readonly #search: HTMLInputElement;
  readonly #count: HTMLElement;
  readonly #join: HTMLButtonElement;
  readonly #axes: Map<Axis, HTMLButtonElement>;
  readonly #logX: HTMLButtonElement;
  readonly #logY: HTMLButtonElement;
  readonly #follow: HTMLButtonElement;
  readonly #reset: HTMLButtonElement;
  readonly #slider: HTMLInputElement;
  readonly #amount: HTMLElement;
  readonly #marks: Map<MarkKind, HTMLButtonElement>;
  readonly #columns: HTMLSelectElement;
  readonly #height: HTMLSelectElement;
  readonly #groups = h("div", { class: "menu-list" });
  readonly #groupsMenu: HTMLDetailsElement;
  readonly #host: ToolbarHost;

  constructor(host: ToolbarHost) {
    const { view } = host;
    this.#host = host;
    this.#search = searchField("Search metrics", () => view.set({ search: this.#search.value }));
    this.#count = h("span", { class: "charts-count" });
    this.#join = button("One panel", { class: "button small", title: "Show what is found in one panel", onclick: () => this.#joinFound() });
    this.#axes = new Map(AXES.map(([axis, name, title]) => [axis, choice(name, title, () => host.setAxis(axis))]));
    this.#logX = choice("log x", "Logarithmic x axis", () => view.set({ logX: !view.get().logX }));
    this.#logY = choice("log y", "Logarithmic y axis", () => view.set({ logY: !view.get().logY }));
    this.#follow = choice("Follow", "Keep the newest steps in view", () => host.setFollow(!view.get().follow));
    this.#reset = choice("Reset", "Reset the zoom: show all steps (double-click a chart)", () =>
      view.set({ zoom: null, follow: false }),
    );
    this.#slider = h("input", { type: "range", min: "0", max: "100", step: "1", class: "charts-slider" });
    this.#slider.addEventListener("input", () => view.set({ smoothing: smoothingOf(Number(this.#slider.value)) }));
    this.#amount = h("output", { class: "charts-amount" });
    const mark = (kind: MarkKind, sign: string, name: string): HTMLButtonElement => {
      const onclick = (): void => view.toggle("unmarked", kind);
      const title = "Marks in the charts: click to hide or show";
      return h("button", { type: "button", class: `mark mark-${kind}`, hidden: true, title, onclick }, icon(sign), name);
    };
    this.#marks = new Map(MARKS.map(([kind, sign, name]) => [kind, mark(kind, sign, name)]));
    const columns = Array.from({ length: MAX_COLUMNS }, (_, index) => index + 1);
    this.#columns = select([[0, "as many as fit"], ...columns.map((count): [number, string] => [count, String(count)])], (columns) =>
      view.set({ columns }),
    );
    this.#height = select(HEIGHTS, (height) => view.set({ height }));
    const layout = [h("label", {}, "Columns", this.#columns), h("label", {}, "Height", this.#height)];
    this.#groupsMenu = menu(h("summary", { class: "button" }, "Groups"), "Groups of charts", [
      this.#groups,
      h("div", { class: "menu-row" }, button("Fold all", { class: "button small", onclick: () => host.foldAll(true) }),
        button("Unfold all", { class: "button small", onclick: () => host.foldAll(false) })),
    ]);
    const options = h(
      "div",
      { class: "charts-options", id: "charts-options" },
      h("div", { class: "charts-segments", role: "group", "aria-label": "X axis" }, ...this.#axes.values()),
      h("div", { class: "charts-segments", role: "group", "aria-label": "Logarithmic axes" }, this.#logX, this.#logY),
      h("div", { class: "charts-tail" }, this.#follow, this.#reset),
      menu(h("summary", { class: "button" }, "Layout"), "Layout of the charts", layout),
      iconButton("download", "Save everything shown as CSV", () => host.saveAll()),
      h("label", { class: "charts-smoothing" }, "Smoothing", this.#slider, this.#amount),
      h("div", { class: "charts-marks", role: "group", "aria-label": "Marks" }, ...this.#marks.values()),
    );
    const more = button("View", { class: "button charts-more", icon: "options", onclick: () => {
      const open = options.classList.toggle("open");
      setAttribute(more, "aria-expanded", String(open));
    } });
    setAttribute(more, "aria-expanded", "false");
    setAttribute(more, "aria-controls", options.id);
    this.root = h(
      "div",
      { class: "toolbar", role: "group", "aria-label": "Charts" },
      h("div", { class: "charts-find" }, this.#search, this.#count, this.#join),
      this.#groupsMenu,
      more,
      options,
    );
    show(this.#groupsMenu, false);
    this.show(view.get());
  }

  show(state: ViewState): void {
    if (this.#search.value !== state.search) this.#search.value = state.search;
    for (const [axis, button] of this.#axes) press(button, axis === state.axis);
    press(this.#logX, state.logX && state.axis !== "wall");
    this.#logX.disabled = state.axis === "wall";
    press(this.#logY, state.logY);
    for (const [kind, button] of this.#marks) press(button, !state.unmarked.includes(kind));
    this.#columns.value = String(state.columns);
    this.#height.value = [...this.#height.options].some(({ value }) => value === String(state.height))
      ? String(state.height)
      : "0";
    press(this.#follow, state.follow);
    this.#reset.disabled = state.zoom === null;
    const position = positionOf(state.smoothing);
    if (smoothingOf(Number(this.#slider.value)) !== state.smoothing) this.#slider.value = String(position);
    setText(this.#amount, state.smoothing === 0 ? "off" : state.smoothing.toFixed(state.smoothing > 0.99 ? 3 : 2));
    this.#slider.setAttribute("aria-valuetext", this.#amount.textContent ?? "");
  }

  /** The groups of panels that can be jumped to, and how many panels each has. */
  setGroups(groups: readonly (readonly [string, number])[]): void {
    show(this.#groupsMenu, groups.length > 1);
    const text = JSON.stringify(groups);
    if (this.#groups.dataset.shown === text) return;
    this.#groups.dataset.shown = text;
    const item = (group: string, count: number): HTMLElement => {
      const onclick = (): void => {
        this.#groupsMenu.open = false;
        this.#host.jump(group);
      };
      return h("button", { type: "button", class: "menu-item", onclick }, group || "Metrics", h("span", { class: "hint" }, String(count)));
    };
    replaceChildren(this.#groups, ...groups.map(([group, count]) => item(group, count)));
  }

  /** Kinds of which there are marks. */
  setMarks(kinds: ReadonlySet<MarkKind>): void {
    for (const [kind, button] of this.#marks) show(button, kinds.has(kind));
  }

  /** How many of all panels a search has found. */
  setCount(found: number, all: number): void {
    setText(this.#count, found === all ? "" : `${found} of ${all}`);
    show(this.#join, found > 1 && this.#host.view.get().search.trim() !== "");
  }

  /** Have what the search finds share a panel, at the top. */
  #joinFound(): void {
    const { view } = this.#host;
    const { search, joined, pinned } = view.get();
    const name = search.trim();
    if (name !== "") view.set({ search: "", joined: [...joined, name], pinned: [...pinned, name] });
  }
}

function choice(name: string, title: string, onclick: () => void): HTMLButtonElement {
  return h("button", { type: "button", class: "button choice", title, onclick }, name);
}

function press(button: HTMLButtonElement, pressed: boolean): void {
  setAttribute(button, "aria-pressed", String(pressed));
}
