// One row of the list of runs on the screen. Rows that scroll out of sight are used again for others.

import { h, iconButton, setAttribute, setText, shape, show } from "../dom";
import * as format from "../format";
import type { RunRow } from "../protocol";
import { ageOf, isLive, SPARK, textOf, titleOf, toneOf, type Field } from "./fields";
import { sparkPath } from "./spark";

/** Height of a row in CSS pixels. */
export const ROW = 46;
const CURVE = { width: 46, height: 22 };

export interface RowHost {
  /** The pointer is on it: keys act on it from here on. */
  activate(key: string): void;
  focus(key: string): void;
  tick(key: string): void;
  pin(key: string): void;
  edit(key: string): void;
  /** The address that shows this run. */
  addressOf(key: string): string;
}

/** What of a row is not the run's own. */
export interface RowLook {
  index: number;
  columns: readonly Field[];
  ticked: boolean;
  focused: boolean;
  active: boolean;
  pinned: boolean;
  /** Another run has its name. */
  shared: boolean;
  /** CSS colour of its curves; null if it is not shown. */
  colour: string | null;
  control: boolean;
  /** The server's Unix time in seconds. */
  now: number;
}

export class RowView {
  readonly element: HTMLElement;
  index = -1;
  #row: RunRow | null = null;
  #columns: readonly Field[] = [];
  readonly #tick: HTMLInputElement;
  readonly #dot = h("i", { class: "dot" });
  readonly #name: HTMLAnchorElement;
  readonly #about = h("span", { class: "runs-about" });
  readonly #pin: HTMLButtonElement;
  readonly #edit: HTMLButtonElement;
  #cells: HTMLElement[] = [];

  constructor(id: string, host: RowHost) {
    const act = (name: "focus" | "tick" | "pin" | "edit") => (event: Event): void => {
      event.preventDefault();
      if (this.#row !== null) host[name](this.#row.key);
    };
    this.#tick = h("input", { type: "checkbox", tabindex: -1, class: "runs-tick", onclick: (event: Event) => act("tick")(event) });
    this.#name = h("a", {
      class: "runs-name",
      tabindex: -1,
      dir: "auto",
      onclick: (event: MouseEvent) => {
        // With a key or another button it is a link like any other
        if (!event.ctrlKey && !event.metaKey && !event.shiftKey) act("focus")(event);
      },
      onpointerdown: () => {
        if (this.#row !== null) this.#name.href = host.addressOf(this.#row.key);
      },
    });
    this.#name.href = "#";
    this.#pin = iconButton("pin", "", () => this.#row && host.pin(this.#row.key));
    this.#edit = iconButton("edit", "", () => this.#row && host.edit(this.#row.key));
    this.#pin.tabIndex = this.#edit.tabIndex = -1;
    this.element = h(
      "div",
      { class: "runs-row", role: "row", id, onpointerdown: () => this.#row && host.activate(this.#row.key) },
      h(
        "div",
        { class: "runs-cell runs-first", role: "rowheader" },
        this.#tick,
        h("div", { class: "runs-text" }, h("div", { class: "runs-line" }, this.#dot, this.#name), this.#about),
        h("div", { class: "runs-actions" }, this.#pin, this.#edit),
      ),
    );
  }

  update(row: RunRow, look: RowLook): void {
    if (look.index !== this.index) {
      this.index = look.index;
      this.element.style.transform = `translateY(${look.index * ROW}px)`;
      setAttribute(this.element, "aria-rowindex", look.index + 2);
    }
    const changed = row !== this.#row;
    this.#row = row;
    if (changed || look.columns !== this.#columns || look.columns.includes("age")) this.#fill(row, look.columns, look.now);
    const { name } = row;
    setText(this.#name, name);
    setAttribute(this.#name, "title", [name, row.key !== name ? row.key : "", row.directory ?? "", lackingFigures(row), row.note].filter(Boolean).join("\n"));
    setAttribute(this.#dot, "data-tone", toneOf(row));
    setText(this.#about, aboutOf(row, look.shared, look.now));
    setAttribute(this.#about, "title", row.why || null);
    setAttribute(this.element, "aria-selected", String(look.ticked));
    setAttribute(this.element, "aria-current", look.focused ? "true" : null);
    this.element.classList.toggle("active", look.active);
    this.element.classList.toggle("archived", row.archived);
    this.element.classList.toggle("explained", row.state === "lost" && row.why !== "");
    this.element.style.setProperty("--run", look.colour ?? "var(--line-strong)");
    if (this.#tick.checked !== look.ticked) this.#tick.checked = look.ticked;
    setAttribute(this.#tick, "aria-label", `Show ${name}`);
    setAttribute(this.#pin, "aria-pressed", String(look.pinned));
    const pin = look.pinned ? `${name} is the baseline` : `Make ${name} the baseline`;
    setAttribute(this.#pin, "aria-label", pin);
    setAttribute(this.#pin, "title", pin);
    setAttribute(this.#edit, "aria-label", `Edit ${name}`);
    setAttribute(this.#edit, "title", "Name, tags, note (e)");
    show(this.#edit, look.control);
  }

  #fill(row: RunRow, columns: readonly Field[], now: number): void {
    if (columns !== this.#columns) {
      this.#columns = columns;
      for (const cell of this.#cells) cell.remove();
      this.#cells = columns.map((field) =>
        h("div", { class: `runs-cell${field === SPARK ? " runs-spark" : ""}`, role: "gridcell" }),
      );
      this.element.append(...this.#cells);
    }
    columns.forEach((field, index) => {
      const cell = this.#cells[index] as HTMLElement;
      if (field === SPARK) {
        drawCurve(cell, row.sparkline);
      } else {
        const text = textOf(row, field, now);
        setText(cell, text);
        setAttribute(cell, "title", text === "" ? null : `${titleOf(field)} ${text}`);
      }
    });
  }
}

function drawCurve(cell: HTMLElement, values: readonly number[]): void {
  const path = sparkPath(values, CURVE.width, CURVE.height);
  const drawn = cell.querySelector("path");
  if (drawn !== null) {
    drawn.setAttribute("d", path);
    return;
  }
  const size = { width: String(CURVE.width), height: String(CURVE.height), "aria-hidden": "true" };
  cell.append(shape("svg", size, shape("path", { d: path })));
}

/** What a run with very many metrics has no figures of; empty if it has all. */
export function lackingFigures({ figures, metrics = 0 }: RunRow): string {
  const known = Object.keys(figures).length;
  return metrics > known ? `figures of ${format.count(known)} of its ${format.count(metrics)} metrics` : "";
}

/** State, duration and age in a line; the place where the name is not enough. */
function aboutOf(row: RunRow, shared: boolean, now: number): string {
  const share = isLive(row) && row.progress !== null ? ` ${format.percent(row.progress)}` : "";
  const parts = [
    shared ? row.key : "",
    row.archived ? "archived" : "",
    row.state + share,
    // Of a lost run it says what is known, and since when.
    row.state === "lost" ? row.why : "",
    row.seconds > 0 ? format.shortDuration(row.seconds) : "",
    row.started > 0 ? `${format.shortDuration(ageOf(row.started, now))} ago` : "",
    ...row.tags.map((tag) => `#${tag}`),
    lackingFigures(row),
  ];
  return parts.filter(Boolean).join(" · ");
}
