// The log of the run: its milestones, the newest first, with who caused them.

import { button, h, setAttribute, setText, show } from "./dom";
import * as format from "./format";
import { repetitionOf, tell, wholeOf, type EventKind, type Told } from "./milestones";
import type { Model } from "./model";
import type { RunEvent } from "./protocol";
import { finder, searchField } from "./search";

const KINDS: Partial<Record<EventKind, string>> = {
  alert: "Alerts",
  command: "Commands",
  automatic: "Commands of callbacks",
  state: "State",
  lr: "Learning rate",
  checkpoint: "Checkpoints",
  validation: "Validation",
  epoch: "Epochs",
  sample: "Samples",
  other: "Other",
};
/** Of a longer text, the list shows so much until it is unfolded. */
const LINES_SHOWN = 8;
const CHARACTERS_SHOWN = 600;
/** Rows that are made at a time; a log of thousands would make the page slow. */
const ROWS_AT_A_TIME = 200;

interface Row {
  event: RunEvent;
  told: Told;
  /** What the filter looks through. */
  text: string;
  /** Made when it is first seen. */
  item: HTMLElement | null;
}

/** What has happened several times: one row, at the place of the last time. */
class Repeated {
  item: HTMLElement | null = null;
  /** Oldest first. */
  rows: Row[] = [];
  /** How often it had happened when `item` was made. */
  told = 0;
}

export class Events {
  readonly element: HTMLElement;
  readonly search = searchField("Filter events", () => this.#filter());
  readonly #goTo: (event: RunEvent) => void;
  readonly #chips = new Map<EventKind, HTMLElement>();
  readonly #chipList = h("div", { class: "chips", role: "group", "aria-label": "Kinds of events" });
  readonly #list = h("ol", { class: "log", reversed: true, "aria-label": "Events, the newest first" });
  readonly #note = h("p", { class: "empty" });
  readonly #more: HTMLButtonElement;
  /** What callbacks ask for is their routine: `ModelCheckpoint` may do so thousands of times. */
  readonly #off = new Set<EventKind>(["automatic"]);
  #callbacks: readonly string[] = [];
  /** What was made of an event once, so that a row stays the same row. */
  readonly #known = new WeakMap<RunEvent, Row>();
  /** By what they have in common, so that a row stays the same row. */
  readonly #repeated = new Map<string, Repeated>();
  #rows: Row[] = [];
  #shown: Row[] = [];
  #limit = ROWS_AT_A_TIME;
  #milestones: readonly RunEvent[] = [];
  #missed = 0;
  #active = false;

  constructor(goTo: (event: RunEvent) => void) {
    this.#goTo = goTo;
    for (const kind of Object.keys(KINDS) as EventKind[]) this.#addChip(kind);
    this.#more = button("Show older ones", {
      class: "button more",
      onclick: () => {
        this.#limit += ROWS_AT_A_TIME;
        this.#draw();
      },
    });
    this.element = h(
      "div",
      { class: "events" },
      h(
        "div",
        { class: "toolbar" },
        this.search,
        this.#chipList,
      ),
      this.#list,
      this.#more,
      this.#note,
    );
  }

  /** Whether the log can be seen; it is drawn only then. */
  setActive(active: boolean): void {
    this.#active = active;
    if (active) this.#filter();
  }

  update(model: Model): void {
    if (model.milestones === this.#milestones && model.missed === this.#missed) return;
    this.#milestones = model.milestones;
    this.#missed = model.missed;
    this.#callbacks = model.run?.callbacks ?? [];
    this.#rows = model.milestones.map((event) => this.#row(event));
    if (this.#rows.length <= ROWS_AT_A_TIME) this.#limit = ROWS_AT_A_TIME;
    if (this.#active) this.#filter();
  }

  #filter(): void {
    const { finds } = finder(this.search.value);
    const found = this.#rows.filter(({ text }) => finds(text));
    this.#drawChips(found);
    this.#shown = found.filter(({ told }) => !this.#off.has(told.kind));
    this.#draw();
  }

  #addChip(kind: EventKind): void {
    const chip = h("button", { type: "button", class: "filter-chip", onclick: () => this.#toggle(kind) });
    this.#chips.set(kind, chip);
    this.#chipList.append(chip);
  }

  #drawChips(found: Row[]): void {
    for (const { told } of this.#rows) if (!this.#chips.has(told.kind)) this.#addChip(told.kind);
    for (const [kind, chip] of this.#chips) {
      show(chip, this.#rows.some(({ told }) => told.kind === kind));
      setText(chip, `${nameOf(kind)} ${found.filter(({ told }) => told.kind === kind).length}`);
      setAttribute(chip, "aria-pressed", String(!this.#off.has(kind)));
    }
  }

  #toggle(kind: EventKind): void {
    if (!this.#off.delete(kind)) this.#off.add(kind);
    this.#filter();
  }

  #draw(): void {
    const lines = this.#fold(this.#shown);
    const newest = lines.slice(0, this.#limit);
    const old = new Set<Element>(this.#list.children);
    const items = newest.map((line) => (line instanceof Repeated ? this.#itemOf(line) : (line.item ??= this.#build(line))));
    // Only what differs is touched, so that a row that is unfolded or selected stays as it is.
    let place: ChildNode | null = this.#list.firstChild;
    for (const item of items) {
      if (item === place) place = place.nextSibling;
      else this.#list.insertBefore(item, place);
      old.delete(item);
    }
    for (const item of old) item.remove();
    show(this.#more, lines.length > newest.length);
    const hidden = this.#rows.length - this.#shown.length;
    const notes = [
      this.#rows.length === 0 ? "No events yet." : this.#shown.length === 0 ? finder(this.search.value).problem || "No event matches." : "",
      hidden > 0 ? `${format.count(hidden)} not shown; choose them above.` : "",
      this.#missed > 0 ? `${format.count(this.#missed)} older ones are in events.jsonl only.` : "",
    ];
    setText(this.#note, notes.filter(Boolean).join(" "));
    show(this.#note, this.#note.textContent !== "");
  }

  #row(event: RunEvent): Row {
    let row = this.#known.get(event);
    if (row === undefined) {
      const told = tell(event);
      const isAutomatic = told.kind === "command" && !event.error && this.#callbacks.includes(told.by);
      if (isAutomatic) told.kind = "automatic";
      const text = `${event.type} ${told.kind} ${told.text} ${told.by}`;
      row = { event, told, text, item: null };
      this.#known.set(event, row);
    }
    return row;
  }

  /** Newest first, with repetitions as one at the place of the last one. */
  #fold(rows: Row[]): (Row | Repeated)[] {
    const lines: (Row | Repeated)[] = [];
    const found = new Map<string, Row[]>();
    for (const row of rows) {
      const key = repetitionOf(row.event);
      if (key === null) continue;
      const alike = found.get(key);
      if (alike) alike.push(row);
      else found.set(key, [row]);
    }
    for (const row of [...rows].reverse()) {
      const key = repetitionOf(row.event);
      const alike = (key !== null && found.get(key)) || [row];
      if (alike.at(-1) !== row) continue; // told with the last one
      if (key === null || alike.length === 1) {
        lines.push(row);
        continue;
      }
      let repeated = this.#repeated.get(key);
      if (!repeated) this.#repeated.set(key, (repeated = new Repeated()));
      repeated.rows = alike;
      lines.push(repeated);
    }
    return lines;
  }

  #itemOf(repeated: Repeated): HTMLElement {
    const { rows, item, told } = repeated;
    if (item !== null && rows.length === told) return item;
    repeated.told = rows.length;
    const steps = rows.map(({ event }) => event.step ?? -1);
    const [least, greatest] = [Math.min(...steps), Math.max(...steps)];
    const times = `${format.count(rows.length)} times${least < 0 ? "" : `, steps ${format.count(least)} to ${format.count(greatest)}`}`;
    const whole = (): string =>
      [...rows]
        .reverse()
        .map(({ event, told }) => `${format.clock(event.time ?? 0)}  step ${format.count(event.step)}  ${told.text}`)
        .join("\n");
    const fresh = this.#build(rows.at(-1) as Row, times, whole);
    const details = item?.querySelector("details");
    if (details?.open) (fresh.querySelector("details") as HTMLDetailsElement).open = true;
    return (repeated.item = fresh);
  }

  #build({ event, told }: Row, times = "", whole = () => wholeOf(event, told.whole)): HTMLElement {
    const step = event.step ?? -1;
    const time = event.time ?? 0;
    const raw = h("pre", { class: "raw" });
    const short = beginningOf(told.text);
    const text = h("span", { class: told.text.includes("\n") ? "text lines" : "text" }, short);
    const rest = short === told.text ? null : h("span", { class: "rest" }, "more");
    const ontoggle = (): void => {
      setText(raw, details.open ? whole() : "");
      setText(text, details.open ? told.text : short);
      if (rest) setText(rest, details.open ? "less" : "more");
    };
    const details = h(
      "details",
      { class: "what", ontoggle },
      h(
        "summary",
        {},
        text,
        rest,
        times ? h("span", { class: "times" }, times) : null,
        told.by ? h("span", { class: "by" }, told.by) : null,
      ),
      raw,
    );
    const place =
      step < 0
        ? h("span", { class: "step" })
        : h(
            "button",
            { type: "button", class: "step", title: `Show it ${told.kind === "sample" ? "among the samples" : "in the charts"}`, onclick: () => this.#goTo(event) },
            h("span", { class: "sr-only" }, "step "),
            format.count(step),
          );
    return h(
      "li",
      { class: "row", "data-kind": told.kind, "data-tone": told.tone },
      h("time", { datetime: new Date(time * 1000).toISOString(), title: format.dateTime(time) }, format.clock(time)),
      place,
      h("span", { class: "kind" }, nameOf(told.kind)),
      details,
    );
  }
}

function nameOf(kind: EventKind): string {
  return KINDS[kind] ?? kind.replace(/^own /, "");
}

/** The first lines of a text, if it has many. */
export function beginningOf(text: string): string {
  const lines = text.split("\n");
  const some = lines.length > LINES_SHOWN + 1 ? lines.slice(0, LINES_SHOWN).join("\n") : text;
  if (some.length > CHARACTERS_SHOWN + 100) return `${some.slice(0, CHARACTERS_SHOWN)}…`;
  return some === text ? text : `${some}\n…`;
}
