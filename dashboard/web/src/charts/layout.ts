// Where panels stand: groups one after the other, each with its panels in columns, and what the search leaves of them.
//
// The width there is goes to the panels. A group has as few columns as its rows allow, so that they are equally long:
// six panels where five would fit are three and three. Small groups share a row, each as wide as its panels: the style
// sheet wraps them by `--columns`, and `--least` is the width that a panel has at least. What is constant takes a line
// under its group, not a panel.

import { h } from "../dom";
import { finder } from "../search";
import type { View } from "../view";
import { compareGroups, comparePanels } from "./order";
import type { Panel } from "./panel";

/** A panel has at least this width, if the page has, in CSS pixels. */
const LEAST = 350;
/** Between two panels, as in the style sheet, in CSS pixels. */
const GAP = 12;

/** The group of what is pinned; no metric's group has this name, for a name has no control characters. */
const PINNED = "\u0000pinned";

const NONE_YET = {
  metrics: "No metrics yet.",
  system: "Nothing of the machine is measured yet. The callback ResourceMonitor() does that.",
} as const;

interface Group {
  section: HTMLElement;
  grid: HTMLElement;
  /** Those that take a line. */
  constants: HTMLElement;
  fold: HTMLButtonElement;
  panels: Panel[];
  /** How many of them are shown as panels. */
  shown: number;
}

/** How many columns a group of `count` panels has where `most` fit side by side. */
export function columnsOf(count: number, most: number): number {
  const rows = Math.ceil(count / most);
  return Math.max(1, Math.ceil(count / Math.max(1, rows)));
}

export class Layout {
  readonly body = h("div", { class: "charts-body" });
  readonly empty = h("p", { class: "empty" }, "No metrics yet.");
  /** In the order in which they stand, once that was made. */
  #groups = new Map<string, Group>();
  /** In the order in which they came. */
  #panels: Panel[] = [];
  readonly #view: View;
  readonly #root: HTMLElement;
  #most = 1;

  constructor(root: HTMLElement, view: View) {
    this.#root = root;
    this.#view = view;
    new ResizeObserver(() => this.#arrange()).observe(this.body);
  }

  add(panel: Panel): void {
    this.#panels.push(panel);
    const name = this.#groupOf(panel);
    const group = this.#groups.get(name) ?? this.#addGroup(name);
    group.panels.push(panel);
    group.grid.append(panel.figure);
  }

  /** Forget a panel; its group goes with its last one. */
  remove(panel: Panel): void {
    this.#panels = this.#panels.filter((one) => one !== panel);
    for (const [name, group] of this.#groups) {
      if (!group.panels.includes(panel)) continue;
      group.panels = group.panels.filter((one) => one !== panel);
      if (group.panels.length > 0) continue;
      group.section.remove();
      this.#groups.delete(name);
    }
  }

  #groupOf(panel: Panel): string {
    return this.#view.get().pinned.includes(panel.name) ? PINNED : panel.group;
  }

  /** Others are pinned than before. */
  regroup(): void {
    for (const panel of this.#panels) {
      const name = this.#groupOf(panel);
      if (!this.#groups.has(name)) this.#addGroup(name);
    }
    for (const [name, group] of this.#groups) {
      group.panels = this.#panels.filter((panel) => this.#groupOf(panel) === name);
    }
    this.order();
  }

  /** Put groups and panels in order: there are others, or they have other curves. */
  order(): void {
    for (const [name, group] of this.#groups) {
      if (name !== PINNED) group.panels.sort(comparePanels);
      arrange(group);
    }
    const groups = [...this.#groups].sort(([one], [other]) =>
      one === PINNED ? -1 : other === PINNED ? 1 : compareGroups(one, other),
    );
    this.#groups = new Map(groups);
    placeIn(this.body, groups.map(([, { section }]) => section));
  }

  /** Have what is constant take a line, and what no longer is a panel; returns whether that changes anything. */
  sort(): boolean {
    let changed = false;
    for (const group of this.#groups.values()) {
      for (const panel of group.panels) {
        const isConstant = panel.isConstant();
        // Not what is being looked at or used
        if (isConstant === panel.isLine || (isConstant && panel.figure.matches(":hover, :focus-within"))) continue;
        panel.setLine(isConstant);
        changed = true;
      }
      if (changed) arrange(group);
    }
    return changed;
  }

  /** Names of the groups that are shown, with the number of their panels. */
  get groups(): [string, number][] {
    const shown = [...this.#groups].filter(([, { section }]) => !section.hidden);
    return shown.map(([name, { panels }]) => [name === PINNED ? "Pinned" : name, panels.filter(({ figure }) => !figure.hidden).length]);
  }

  /** Bring a group into view, unfolded. */
  jump(name: string): void {
    const { folded } = this.#view.get();
    if (folded.includes(name)) this.#view.toggle("folded", name);
    const group = this.#groups.get(name) ?? this.#groups.get(PINNED);
    group?.section.scrollIntoView();
    group?.fold.focus({ preventScroll: true });
  }

  foldAll(folded: boolean): void {
    this.#view.set({ folded: folded ? [...this.#groups.keys()].filter((name) => name !== PINNED) : [] });
  }

  clear(): void {
    for (const { section } of this.#groups.values()) section.remove();
    this.#groups.clear();
    this.#panels = [];
  }

  /**
   * Of the panels of the tab, show what the search finds, or the one that is maximised; returns how many were found,
   * and of how many.
   */
  filter(): { found: number; all: number } {
    const { tab, search, panel: maximised, folded } = this.#view.get();
    const { finds, problem } = finder(search);
    const wanted = tab === "system" ? "system" : "metrics";
    const panels = this.#panels.filter((panel) => panel.tab === wanted);
    const one = panels.some(({ name }) => name === maximised);
    this.#root.classList.toggle("one-panel", one);
    let found = 0;
    for (const [name, group] of this.#groups) {
      group.shown = 0;
      for (const panel of group.panels) {
        const matches = panel.tab === wanted && finds(panel.name, ...panel.curves.map(({ info }) => info.key));
        found += Number(matches);
        const shown = one ? panel.name === maximised : matches;
        panel.figure.hidden = !shown;
        panel.setMaximised(panel.name === maximised);
        group.shown += Number(shown && !panel.isLine);
      }
      const lines = group.panels.some((panel) => panel.isLine && !panel.figure.hidden);
      group.section.hidden = group.shown === 0 && !lines;
      const open = one || search.trim() !== "" || !folded.includes(name);
      group.grid.hidden = !open || group.shown === 0;
      group.constants.hidden = !open || !lines;
      group.fold.setAttribute("aria-expanded", String(open));
    }
    this.empty.textContent = problem || (panels.length === 0 ? NONE_YET[wanted] : "No metric has these words in its name.");
    this.empty.hidden = found > 0 || one;
    this.#arrange();
    return { found, all: panels.length };
  }

  #addGroup(name: string): Group {
    const grid = h("div", { class: "charts-grid" });
    const onclick = (): void => this.#view.toggle("folded", name);
    const fold = h(
      "button",
      { type: "button", class: "charts-fold", "aria-expanded": "true", onclick },
      name === PINNED ? "Pinned" : name || "Metrics",
    );
    const constants = h("div", { class: "charts-constants" });
    const heading = h("h2", { class: "charts-heading" }, fold);
    const section = h("section", { class: "charts-group" }, heading, grid, constants);
    const group = { section, grid, constants, fold, panels: [], shown: 0 };
    this.#groups.set(name, group);
    this.body.append(section);
    return group;
  }

  #arrange(): void {
    const { columns, height } = this.#view.get();
    const width = this.body.clientWidth;
    if (width === 0) return; // not on the screen
    const most = columns || Math.max(1, Math.floor((width + GAP) / (LEAST + GAP)));
    // A little less than its share, so that no row wraps because of a rounding
    const least = columns ? (width - (columns - 1) * GAP) / columns - 0.1 : Math.min(LEAST, width);
    this.body.style.setProperty("--least", `${least}px`);
    this.body.style.setProperty("--height", height ? `${height}px` : "");
    for (const { section, shown, grid } of this.#groups.values()) {
      const count = columnsOf(shown, most);
      section.style.setProperty("--columns", String(count));
      // What has several rows, or is folded, shares none.
      section.classList.toggle("whole", shown > most || Boolean(grid.hidden));
    }
  }
}

/** Have the panels of a group stand in their order, those that take a line under the others. */
function arrange({ panels, grid, constants }: Group): void {
  const figures = (areLines: boolean): HTMLElement[] => panels.filter(({ isLine }) => isLine === areLines).map(({ figure }) => figure);
  placeIn(constants, figures(true));
  placeIn(grid, figures(false));
}

/** Have elements be the first of a parent, in this order; those that are there are not touched. */
function placeIn(parent: HTMLElement, elements: readonly HTMLElement[]): void {
  elements.forEach((element, place) => {
    if (parent.children[place] !== element) parent.insertBefore(element, parent.children[place] ?? null);
  });
}
