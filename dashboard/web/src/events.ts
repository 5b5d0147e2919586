// The log of the run: its milestones, the newest first, with who caused them.

import { h, replaceChildren, setText, show } from "./dom";
import * as format from "./format";
import { tell, wholeOf, type EventKind, type Told } from "./milestones";
import type { Model } from "./model";
import type { RunEvent } from "./protocol";

const KINDS: Record<EventKind, string> = {
  alert: "Alerts",
  command: "Commands",
  state: "State",
  lr: "Learning rate",
  checkpoint: "Checkpoints",
  validation: "Validation",
  epoch: "Epochs",
  other: "Other",
};
/** Rows that are made at a time; a log of thousands would make the page slow. */
const ROWS_AT_A_TIME = 200;

interface Row {
  event: RunEvent;
  told: Told;
  /** What the filter looks through. */
  text: string;
}

export class Events {
  readonly element: HTMLElement;
  readonly search: HTMLInputElement;
  readonly #goTo: (step: number) => void;
  readonly #chips = h("div", { class: "chips", role: "group", "aria-label": "Kinds of events" });
  readonly #list = h("ol", { class: "log", reversed: true, "aria-label": "Events, the newest first" });
  readonly #note = h("p", { class: "empty" });
  readonly #more: HTMLButtonElement;
  readonly #off = new Set<EventKind>();
  readonly #items = new WeakMap<Row, HTMLElement>();
  #rows: Row[] = [];
  #shown: Row[] = [];
  #limit = ROWS_AT_A_TIME;
  #milestones: readonly RunEvent[] = [];
  #missed = 0;
  #active = false;

  constructor(goTo: (step: number) => void) {
    this.#goTo = goTo;
    this.search = h("input", {
      class: "input search", type: "search", placeholder: "Filter events", "aria-label": "Filter events",
      oninput: () => this.#filter(),
    });
    this.#more = h(
      "button",
      {
        type: "button",
        class: "button more",
        onclick: () => {
          this.#limit += ROWS_AT_A_TIME;
          this.#draw();
        },
      },
      "Show older ones",
    );
    this.element = h(
      "div",
      { class: "events" },
      h("div", { class: "toolbar" }, this.search, this.#chips),
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
    const previous = this.#milestones;
    this.#milestones = model.milestones;
    this.#missed = model.missed;
    const goesOn = previous.length > 0 && previous.length <= model.milestones.length && previous[0] === model.milestones[0];
    if (goesOn) this.#rows.push(...model.milestones.slice(previous.length).map(row));
    else this.#rows = model.milestones.map(row);
    if (!goesOn) this.#limit = ROWS_AT_A_TIME;
    if (this.#active) this.#filter();
  }

  #filter(): void {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.#rows.filter(({ text }) => words.every((word) => text.includes(word)));
    this.#drawChips(found);
    this.#shown = found.filter(({ told }) => !this.#off.has(told.kind));
    this.#draw();
  }

  #drawChips(found: Row[]): void {
    const counts = new Map<EventKind, number>();
    for (const { told } of this.#rows) counts.set(told.kind, 0);
    for (const { told } of found) counts.set(told.kind, (counts.get(told.kind) ?? 0) + 1);
    const kinds = (Object.keys(KINDS) as EventKind[]).filter((kind) => counts.has(kind));
    const chips = new Map([...this.#chips.children].map((chip) => [(chip as HTMLElement).dataset.kind, chip]));
    for (const kind of kinds) {
      const text = `${KINDS[kind]} ${counts.get(kind) ?? 0}`;
      const chip = chips.get(kind) ?? this.#chip(kind);
      setText(chip, text);
      chip.setAttribute("aria-pressed", String(!this.#off.has(kind)));
      if (!chips.has(kind)) {
        const after = kinds.slice(kinds.indexOf(kind) + 1).find((other) => chips.has(other));
        this.#chips.insertBefore(chip, (after && chips.get(after)) ?? null);
        chips.set(kind, chip);
      }
    }
    for (const [kind, chip] of chips) if (!kinds.includes(kind as EventKind)) chip.remove();
  }

  #chip(kind: EventKind): HTMLElement {
    return h("button", {
      type: "button", class: "filter-chip", "data-kind": kind,
      onclick: () => {
        if (!this.#off.delete(kind)) this.#off.add(kind);
        this.#filter();
      },
    });
  }

  #draw(): void {
    const newest = this.#shown.slice(-this.#limit).reverse();
    const old = new Set<Element>(this.#list.children);
    const items = newest.map((row) => this.#item(row));
    // Only what differs is touched, so that a row that is unfolded or selected stays as it is.
    let place: ChildNode | null = this.#list.firstChild;
    for (const item of items) {
      if (item === place) place = place.nextSibling;
      else this.#list.insertBefore(item, place);
      old.delete(item);
    }
    for (const item of old) item.remove();
    show(this.#more, this.#shown.length > newest.length);
    const hidden = this.#rows.length - this.#shown.length;
    const notes = [
      this.#rows.length === 0 ? "No events yet." : this.#shown.length === 0 ? "No event matches." : "",
      hidden > 0 ? `${format.count(hidden)} not shown by the filter.` : "",
      this.#missed > 0 ? `${format.count(this.#missed)} older ones are in events.jsonl only.` : "",
    ];
    setText(this.#note, notes.filter(Boolean).join(" "));
    show(this.#note, this.#note.textContent !== "");
  }

  #item(row: Row): HTMLElement {
    let item = this.#items.get(row);
    if (item === undefined) {
      item = this.#build(row);
      this.#items.set(row, item);
    }
    return item;
  }

  #build({ event, told }: Row): HTMLElement {
    const step = event.step ?? -1;
    const time = event.time ?? 0;
    const raw = h("pre", { class: "raw" });
    const details = h(
      "details",
      { class: "what", ontoggle: () => setText(raw, details.open ? wholeOf(event) : "") },
      h("summary", {}, h("span", { class: "text" }, told.text), told.by ? h("span", { class: "by" }, told.by) : null),
      raw,
    );
    const place =
      step < 0
        ? h("span", { class: "step" })
        : h(
            "button",
            { type: "button", class: "step", title: "Show it in the charts", onclick: () => this.#goTo(step) },
            h("span", { class: "sr-only" }, "step "),
            format.count(step),
          );
    return h(
      "li",
      { class: "row", "data-kind": told.kind, "data-tone": told.tone },
      h("time", { datetime: new Date(time * 1000).toISOString(), title: format.dateTime(time) }, format.clock(time)),
      place,
      h("span", { class: "kind" }, KINDS[told.kind]),
      details,
    );
  }
}

function row(event: RunEvent): Row {
  const told = tell(event);
  return { event, told, text: `${event.type} ${told.kind} ${told.text} ${told.by}`.toLowerCase() };
}
