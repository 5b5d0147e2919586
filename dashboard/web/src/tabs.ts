// The tabs of the page: views of one run, or of several. A view that has nothing to show has no tab, unless it is the
// one that is looked at.

import { h, setText, show } from "./dom";
import type { Tab } from "./view";

/** A view behind a tab. */
export interface TabView {
  readonly element: HTMLElement;
  /** What the key for searching gives the focus. */
  readonly search?: () => HTMLElement | null;
  /** Whether there is anything to show; always, if it is left out. */
  readonly has?: () => boolean;
  /** What stands behind the tab's name: how many there are. */
  readonly count?: () => string;
  /** The view can be seen from now on, or no longer. */
  readonly setActive?: (active: boolean) => void;
}

interface Entry {
  title: string;
  view: TabView;
  tab: HTMLButtonElement;
  panel: HTMLElement;
}

export class Tabs {
  readonly element: HTMLElement;
  readonly panels: HTMLElement[];
  readonly #entries: Map<Tab, Entry>;
  readonly #choose: (tab: Tab) => void;
  #current: Entry | null = null;

  /** Two tabs may have the same element: it then stands where it is looked at. */
  constructor(views: readonly [Tab, string, TabView][], choose: (tab: Tab) => void) {
    this.#choose = choose;
    this.#entries = new Map(views.map(([name, title, view]) => [name, this.#entry(name, title, view)]));
    const entries = [...this.#entries.values()];
    this.panels = entries.map(({ panel }) => panel);
    this.element = h("div", { class: "tabs", role: "tablist", "aria-label": "Views" }, ...entries.map(({ tab }) => tab));
    this.element.addEventListener("keydown", (event) => this.#key(event));
  }

  #entry(name: Tab, title: string, view: TabView): Entry {
    const [id, controls] = [`tab-${name}`, `panel-${name}`];
    const onclick = (): void => this.#choose(name);
    const tab = h("button", { type: "button", role: "tab", id, "aria-controls": controls, onclick }, title);
    const panel = h("section", { class: "panel", role: "tabpanel", id: controls, "aria-labelledby": id });
    return { title, view, tab, panel };
  }

  /** Look at a view. */
  select(name: Tab): void {
    const current = this.#entries.get(name) as Entry;
    if (current === this.#current) return;
    this.#current = current;
    if (current.view.element.parentNode !== current.panel) current.panel.append(current.view.element);
    for (const entry of this.#entries.values()) {
      const isCurrent = entry === current;
      entry.tab.setAttribute("aria-selected", String(isCurrent));
      entry.tab.tabIndex = isCurrent ? 0 : -1;
      entry.view.setActive?.(isCurrent);
    }
    this.#reveal();
  }

  /** Have the tab in view, where there is not room for all. */
  #reveal(): void {
    const tab = this.#current?.tab;
    if (tab && !tab.hidden) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Show the tabs that have something, and the view unless something stands in its place. */
  update(staged: boolean): void {
    const wasHidden = this.#current?.tab.hidden === true;
    for (const entry of this.#entries.values()) {
      const { title, view, tab, panel } = entry;
      const isCurrent = entry === this.#current;
      show(panel, isCurrent && !staged);
      show(tab, isCurrent || (view.has?.() ?? true));
      const count = view.count?.() ?? "";
      setText(tab, count === "" ? title : `${title} ${count}`);
    }
    if (wasHidden) this.#reveal();
  }

  /** Give the focus to the search of the view. */
  search(): void {
    this.#current?.view.search?.()?.focus();
  }

  #key(event: KeyboardEvent): void {
    const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (turn === undefined) return;
    event.preventDefault();
    const shown = [...this.#entries].filter(([, { tab }]) => !tab.hidden);
    const place = shown.findIndex(([, entry]) => entry === this.#current);
    const [next, { tab }] = shown[(place + turn + shown.length) % shown.length] as [Tab, Entry];
    this.#choose(next);
    tab.focus();
  }
}
