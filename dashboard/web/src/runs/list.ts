// The side bar with all runs of the server; a drawer on phones. Only rows in sight are in the document.

import { h, iconButton, replaceChildren, setAttribute, setText, show } from "../dom";
import * as format from "../format";
import type { Rows, RunRow } from "../protocol";
import { searchField } from "../search";
import type { PageStorage } from "../storage";
import { compareText, sortRows, SPARK, titleOf, type Field } from "./fields";
import { Filter } from "./filter";
import { Options } from "./options";
import { LEAST_WIDTH, readPreferences, USUAL, writePreferences, type Preferences } from "./preferences";
import { ROW, RowView, type RowHost } from "./row";
import { chosen, MOST, type Chosen } from "./selection";
import { RunStore } from "./store";

export interface RunsHost extends Omit<RowHost, "activate"> {
  latestOnly(): void;
  compare(): void;
  group(by: string | null): void;
  /** CSS colour of a run's curves; null if it has none. */
  colourOf(key: string): string | null;
  preferred(): void;
}

/** What the page knows beside the list. */
export interface RunsLook extends Chosen {
  baseline: string | null;
  groupBy: string | null;
  control: boolean;
  /** The server's Unix time in seconds. */
  now: number;
}

/** Width of the bar, unless it is dragged, CSS pixels. */
const USUAL_WIDTH = 400;
/** Rows beside those in sight, above and below. */
const MARGIN = 6;
/** What counts time up in the rows is drawn this often, seconds. */
const AGE_EVERY = 10;
/** Narrower pages have a drawer. */
const DRAWER = "(max-width: 1240px)";
const WIDTHS: Record<string, string> = {
  spark: "52px", started: "150px", heard: "150px", tag: "130px", duration: "90px", state: "84px", host: "110px",
  id: "130px", key: "130px", note: "150px", why: "150px",
};
/** Least width of the first column, and that of columns of numbers, CSS pixels. */
const FIRST = 150;
const NUMBER = "56px";

export class RunBar {
  readonly element: HTMLElement;
  /** What is behind the drawer. */
  readonly backdrop = h("div", { class: "runs-backdrop", hidden: true, onclick: () => this.open(false) });
  /** Opens and closes it; stands in the head of the page. */
  readonly toggle: HTMLButtonElement;
  readonly store = new RunStore();
  readonly search = searchField("Filter: words, /regex/, val_loss<0.3", () => this.#sought());
  preferences: Preferences;
  readonly #host: RunsHost & RowHost;
  readonly #storage: PageStorage;
  readonly #options: Options;
  readonly #optionsButton: HTMLButtonElement;
  readonly #count = h("span", { class: "hint" });
  readonly #problem = h("p", { class: "runs-note runs-problem", id: "runs-problem", role: "status", hidden: true });
  readonly #empty = h("p", { class: "runs-note", hidden: true });
  readonly #header = h("div", { class: "runs-header", role: "row", "aria-rowindex": 1 });
  readonly #body = h("div", { class: "runs-body", role: "rowgroup" });
  readonly #grid: HTMLElement;
  readonly #ticked = h("div", { class: "runs-ticked", hidden: true });
  readonly #tickedCount = h("span", { class: "hint" });
  readonly #group = h("select", { class: "input", "aria-label": "Group by", onchange: () => this.#host.group(this.#group.value || null) });
  readonly #narrow = matchMedia(DRAWER);
  #drawerOpen = false;
  #look: RunsLook = { run: null, overlaid: [], baseline: null, groupBy: null, control: false, now: 0 };
  /** Runs in the order in which they are listed. */
  #listed: RunRow[] = [];
  #shared = new Set<string>();
  /** Key of the row that the keys act on. */
  #active: string | null = null;
  readonly #pool: RowView[] = [];
  #drawing = false;
  #agedAt = 0;
  #colours = "";
  #shownColumns: readonly Field[] = [];
  /** What the header and the options were made of. */
  #made = "";

  constructor(host: RunsHost, storage: PageStorage) {
    this.#host = {
      ...host,
      // What is pressed must not move away before it is let go.
      activate: (key) => this.#activate(key, false),
      focus: (key) => this.#leave(() => host.focus(key)),
      tick: (key) => this.#acted(key, host.tick),
      pin: (key) => this.#acted(key, host.pin),
      edit: (key) => this.#acted(key, host.edit),
    };
    this.#storage = storage;
    this.preferences = readPreferences(storage);
    this.#options = new Options({
      filter: (condition) => {
        this.search.value = `${this.search.value.trim()} ${condition}`.trim();
        this.#sought();
      },
      prefer: (patch) => this.prefer(patch),
    });
    this.toggle = iconButton("runs", "", () => this.open(!this.isOpen));
    this.toggle.classList.add("runs-toggle");
    setAttribute(this.toggle, "aria-controls", "runs");
    this.#optionsButton = iconButton("options", "Filter, order and columns", () => this.#toggleOptions());
    setAttribute(this.#optionsButton, "aria-expanded", "false");
    setAttribute(this.#optionsButton, "aria-controls", "runs-options");
    const small = (text: string, onclick: () => void): HTMLElement => h("button", { type: "button", class: "button small", onclick }, text);
    this.#ticked.append(
      this.#tickedCount,
      small("Latest only", () => this.#leave(host.latestOnly)),
      small("Compare", () => this.#leave(host.compare)),
      this.#group,
    );
    this.#grid = h(
      "div",
      {
        class: "runs-grid", role: "grid", tabindex: 0, "aria-label": "Runs", "aria-multiselectable": "true",
        onkeydown: (event: KeyboardEvent) => this.#key(event),
        onfocus: () => this.#activate(this.#active ?? this.#look.run ?? this.#listed[0]?.key ?? null),
      },
      this.#header,
      this.#body,
    );
    this.#grid.addEventListener("scroll", () => this.#draw(), { passive: true });
    new ResizeObserver(() => this.#draw()).observe(this.#grid);
    this.element = h(
      "aside",
      { class: "runbar", id: "runs", "aria-label": "List of runs", hidden: true },
      h(
        "div",
        { class: "runs-head" },
        h("h2", {}, "Runs"),
        this.#count,
        this.#optionsButton,
        iconButton("close", "Close the list of runs", () => this.open(false)),
      ),
      this.search,
      this.#problem,
      this.#options.element,
      this.#ticked,
      this.#grid,
      this.#empty,
      this.#edge(),
    );
    this.element.addEventListener("keydown", (event) => this.#escape(event));
    this.#narrow.addEventListener("change", () => this.#place());
    this.#place();
  }

  // What the page tells

  apply(message: Rows): void {
    this.store.apply(message);
    this.#shared = this.store.shared();
    this.#place();
    this.#sorted();
  }

  update(look: RunsLook): void {
    const before = this.#look;
    this.#look = look;
    // The charts have a colour for a run once its curves come.
    const colours = chosen(look).map((key) => this.#host.colourOf(key)).join();
    const changed =
      colours !== this.#colours ||
      look.run !== before.run || look.overlaid !== before.overlaid || look.baseline !== before.baseline ||
      look.groupBy !== before.groupBy || look.control !== before.control;
    if (!changed && look.now - this.#agedAt < AGE_EVERY) return;
    this.#agedAt = look.now;
    this.#colours = colours;
    if (changed) this.#drawTicked();
    this.#draw();
  }

  get isOpen(): boolean {
    if (this.#narrow.matches) return this.#drawerOpen;
    return this.preferences.open ?? this.store.rows.size > 1;
  }

  /** Whether it opens by itself once there is more than one run. */
  get mayOpen(): boolean {
    return !this.#narrow.matches && this.preferences.open === null;
  }

  open(open: boolean): void {
    if (this.#narrow.matches) this.#drawerOpen = open;
    else this.prefer({ open });
    this.#place();
    this.#host.preferred();
    if (open) (this.#narrow.matches ? this.search : this.#grid).focus();
    else this.toggle.focus();
  }

  prefer(patch: Partial<Preferences>): void {
    this.preferences = { ...this.preferences, ...patch };
    writePreferences(this.#storage, this.preferences);
    this.#place();
    if (patch.width === undefined) this.#sought();
    this.#host.preferred();
  }

  /** Go up or down in the list; the list gets the focus. */
  move(by: number): void {
    if (!this.isOpen) this.open(true);
    if (document.activeElement !== this.#grid) this.#grid.focus();
    const at = this.#listed.findIndex(({ key }) => key === this.#active);
    const next = at < 0 ? 0 : Math.max(0, Math.min(this.#listed.length - 1, at + by));
    this.#activate(this.#listed[next]?.key ?? null);
  }

  /** Do what shows something else: a drawer is in the way of it. */
  #leave(act: () => void): void {
    act();
    if (this.#narrow.matches) this.open(false);
  }

  #acted(key: string, act: (key: string) => void): void {
    this.#activate(key);
    act(key);
  }

  // Where it stands

  #place(): void {
    const open = this.isOpen;
    const drawer = this.#narrow.matches;
    show(this.element, open);
    show(this.backdrop, open && drawer);
    this.element.classList.toggle("drawer", drawer);
    const width = this.preferences.width || USUAL_WIDTH;
    document.documentElement.style.setProperty("--runs-width", `${width}px`);
    document.body.toggleAttribute("data-runs", open && !drawer);
    const count = this.store.total;
    setAttribute(this.toggle, "aria-expanded", String(open));
    const label = `List of runs${count > 1 ? ` (${format.count(count)})` : ""}`;
    setAttribute(this.toggle, "aria-label", label);
    setAttribute(this.toggle, "title", label);
    if (open) this.#draw();
  }

  #escape(event: KeyboardEvent): void {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    if (!this.#options.element.hidden) this.#toggleOptions();
    else if (this.#narrow.matches) this.open(false);
    else return;
    event.preventDefault();
  }

  #toggleOptions(): void {
    const open = this.#options.element.hidden !== false;
    show(this.#options.element, open);
    setAttribute(this.#optionsButton, "aria-expanded", String(open));
    this.#made = "";
    this.#makeHeader();
    if (!open) this.#optionsButton.focus();
  }

  /** The edge by which the bar is made wider. */
  #edge(): HTMLElement {
    const set = (width: number): void => this.prefer({ width: Math.max(LEAST_WIDTH, Math.min(Math.round(width), innerWidth - 320)) });
    const edge = h("div", {
      class: "runs-edge", role: "separator", tabindex: 0, "aria-label": "Width of the list", "aria-orientation": "vertical",
      "aria-valuenow": this.preferences.width || USUAL_WIDTH, "aria-valuemin": LEAST_WIDTH, "aria-valuemax": 4_000,
      onpointerdown: (event: PointerEvent) => edge.setPointerCapture(event.pointerId),
      onpointermove: (event: PointerEvent) => {
        if (edge.hasPointerCapture(event.pointerId)) set(event.clientX);
      },
      ondblclick: () => this.prefer({ width: USUAL.width }),
      onkeydown: (event: KeyboardEvent) => {
        const turn = { ArrowRight: 20, ArrowLeft: -20 }[event.key];
        if (turn === undefined) return;
        event.preventDefault();
        set((this.preferences.width || USUAL_WIDTH) + turn);
        setAttribute(edge, "aria-valuenow", this.preferences.width);
      },
    });
    return edge;
  }

  // What it lists

  /** The viewer wants other runs, or another order. */
  #sought(): void {
    this.#grid.scrollTop = 0;
    this.#sorted();
  }

  /** Filter and sort anew. */
  #sorted(): void {
    const { sort, descending, archived } = this.preferences;
    const { now } = this.#look;
    const rows = this.store.rows;
    const filter = new Filter(this.search.value, now);
    // Before all runs are here, a metric may be in one that is still to come.
    const problem = this.store.complete ? filter.problemWith(rows.values()) : filter.problem;
    const asksForArchived = archived || filter.fields.has("archived");
    // In the order of before: what is sorted already is sorted quickly.
    const keys = new Set(this.#listed.map(({ key }) => key));
    for (const key of rows.keys()) keys.add(key);
    const found: RunRow[] = [];
    for (const key of keys) {
      const row = rows.get(key);
      if (row !== undefined && problem === "" && (asksForArchived || !row.archived) && filter.test(row)) found.push(row);
    }
    this.#listed = sortRows(found, sort, descending, now);
    setText(this.#problem, problem);
    show(this.#problem, problem !== "");
    setAttribute(this.search, "aria-invalid", problem === "" ? null : "true");
    setAttribute(this.search, "aria-describedby", problem === "" ? null : this.#problem.id);
    const all = this.store.total;
    setText(this.#count, found.length === all ? format.count(all) : `${format.count(found.length)} of ${format.count(all)}`);
    const empty = found.length > 0 || problem !== "" ? "" : rows.size === 0 ? (this.store.complete ? "No runs yet." : "Asking for the runs …") : "No run matches.";
    setText(this.#empty, empty);
    show(this.#empty, empty !== "");
    this.#makeHeader();
    this.#drawTicked();
    this.#draw();
  }

  #makeHeader(): void {
    const { sort, descending } = this.preferences;
    const columns = this.#columns();
    const optionsOpen = !this.#options.element.hidden;
    const made = JSON.stringify([columns, sort, descending, this.preferences.archived, optionsOpen && this.store.version]);
    if (made === this.#made) return;
    this.#made = made;
    const widths = columns.map((field) => WIDTHS[field] ?? NUMBER);
    this.#grid.style.setProperty("--runs-columns", ["minmax(0, 1fr)", ...widths].join(" "));
    const least = FIRST + widths.reduce((sum, width) => sum + parseInt(width), 0);
    this.#grid.style.setProperty("--runs-least", `${least}px`);
    replaceChildren(this.#header, ...["name", ...columns].map((field) => this.#heading(field, sort === field, descending)));
    if (optionsOpen) this.#options.update([...this.store.rows.values()], this.preferences);
  }

  /** A phone has no room for the curve. */
  #columns(): readonly Field[] {
    const { columns } = this.preferences;
    const without = innerWidth < 480 ? columns.filter((field) => field !== SPARK) : columns;
    if (without.join() !== this.#shownColumns.join()) this.#shownColumns = without;
    return this.#shownColumns;
  }

  #heading(field: Field, sorted: boolean, descending: boolean): HTMLElement {
    const name = titleOf(field);
    const classes = field === "name" ? "runs-cell runs-first" : "runs-cell";
    if (field === SPARK) return h("div", { class: classes, role: "columnheader" }, name);
    // Best and newest are what is looked for first in numbers, and the alphabet in names.
    const turn = (): void => this.prefer({ sort: field, descending: sorted ? !descending : field === "started" || field === "heard" });
    return h(
      "div",
      { class: classes, role: "columnheader", "aria-sort": sorted ? (descending ? "descending" : "ascending") : null },
      h("button", { type: "button", class: "runs-turn", title: `Sort by ${name}`, onclick: turn }, h("span", {}, name), sorted ? (descending ? " ↓" : " ↑") : ""),
    );
  }

  #drawTicked(): void {
    const keys = chosen(this.#look);
    show(this.#ticked, keys.length > 1);
    if (keys.length < 2) return;
    setText(this.#tickedCount, keys.length >= MOST ? `${keys.length} runs, the most at a time` : `${keys.length} runs`);
    const rows = keys.flatMap((key) => this.store.rows.get(key) ?? []);
    const settings = new Map<string, Set<string>>();
    for (const { hyperparameters } of rows) {
      for (const [name, value] of Object.entries(hyperparameters)) {
        settings.set(name, (settings.get(name) ?? new Set()).add(JSON.stringify(value)));
      }
    }
    const differing = [...settings].filter(([, values]) => values.size > 1).map(([name]) => name).sort(compareText);
    const tagged = rows.some(({ tags }) => tags.length > 0) ? ["tag"] : [];
    const { groupBy } = this.#look;
    const choices = [...new Set([...tagged, ...differing, ...(groupBy === null ? [] : [groupBy])])];
    show(this.#group, choices.length > 0);
    replaceChildren(
      this.#group,
      h("option", { value: "", selected: groupBy === null }, "Not grouped"),
      ...choices.map((name) => h("option", { value: name, selected: name === groupBy }, `By ${name}`)),
    );
  }

  // Rows in sight

  #draw(): void {
    if (this.#drawing || this.element.hidden) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#drawRows();
    });
  }

  #drawRows(): void {
    const listed = this.#listed;
    this.#body.style.height = `${listed.length * ROW}px`;
    setAttribute(this.#grid, "aria-rowcount", listed.length + 1);
    show(this.#grid, listed.length > 0);
    const height = this.#grid.clientHeight;
    const first = Math.max(0, Math.floor(this.#grid.scrollTop / ROW) - MARGIN);
    const end = Math.min(listed.length, first + Math.ceil(height / ROW) + 2 * MARGIN);
    const size = Math.max(this.#pool.length, end - first);
    while (this.#pool.length < size) {
      const view = new RowView(`runs-row-${this.#pool.length}`, this.#host);
      this.#pool.push(view);
    }
    const { run, baseline, control, now } = this.#look;
    const ticked = new Set(chosen(this.#look));
    const columns = this.#columns();
    const used = new Set<RowView>();
    for (let index = first; index < end; index++) {
      const row = listed[index] as RunRow;
      // The same row of the document for the same place: scrolling changes only what comes into sight.
      const view = this.#pool[index % size] as RowView;
      used.add(view);
      view.update(row, {
        index,
        columns,
        ticked: ticked.has(row.key),
        focused: row.key === run,
        active: row.key === this.#active,
        pinned: row.key === baseline,
        shared: this.#shared.has(row.name),
        colour: ticked.has(row.key) ? this.#host.colourOf(row.key) : null,
        control,
        now,
      });
      if (view.element.parentNode === null) this.#body.append(view.element);
    }
    for (const view of this.#pool) if (!used.has(view)) view.element.remove();
    const at = listed.findIndex(({ key }) => key === this.#active);
    const seen = at >= first && at < end ? (this.#pool[at % size] as RowView).element.id : null;
    setAttribute(this.#grid, "aria-activedescendant", seen);
  }

  // Keys

  #activate(key: string | null, intoView = true): void {
    this.#active = key;
    const at = this.#listed.findIndex((row) => row.key === key);
    if (at >= 0 && intoView) {
      const head = this.#header.offsetHeight;
      const top = at * ROW;
      const { scrollTop, clientHeight } = this.#grid;
      if (top < scrollTop) this.#grid.scrollTop = top;
      else if (top + ROW > scrollTop + clientHeight - head) this.#grid.scrollTop = top + ROW - clientHeight + head;
    }
    this.#draw();
  }

  #key(event: KeyboardEvent): void {
    if (event.target !== this.#grid || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.#grid.clientHeight / ROW) - 2);
    const moves: Record<string, number> = {
      ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity,
    };
    const by = moves[event.key];
    const acts: Record<string, ((key: string) => void) | undefined> = {
      Enter: (key) => this.#host.focus(key),
      x: (key) => this.#host.tick(key),
      " ": (key) => this.#host.tick(key),
      b: (key) => this.#host.pin(key),
      e: (key) => this.#host.edit(key),
    };
    const act = acts[event.key];
    if (by !== undefined) this.move(by);
    else if (act !== undefined && this.#active !== null) act(this.#active);
    else return;
    event.preventDefault();
  }
}

