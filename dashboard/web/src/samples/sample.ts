// One sample on the screen: a text, a picture or a table. What runs say is text, never HTML.

import { h, replaceChildren, setText } from "../dom";
import { fileName, save } from "../charts/dom";
import { bytes, compact, count } from "../format";
import { toNumber, type RunEvent, type WireNumber } from "../protocol";
import type { Content, Contents } from "./contents";
import type { Entry } from "./store";

/** Characters of a text that are shown. */
const CHARACTERS_SHOWN = 200_000;
/** Rows of a table that are shown at first. */
const ROWS_SHOWN = 100;
/** Pixels up to which a small picture is enlarged, by a whole number, without smoothing. */
const SMALL = 224;

type Cell = string | number | boolean | null | Picture;

interface Picture {
  sha256: string;
  media_type: string;
  size: number;
  width: number;
  height: number;
}

export interface SampleHost {
  contents: Contents;
  /** Show a picture in its full size. */
  enlarge(picture: HTMLImageElement): void;
}

/** Show a sample: a place that is filled once its content is here. */
export function showSample(entry: Entry, name: string, host: SampleHost): HTMLElement {
  const place = h("div", { class: "sample", "aria-busy": "true" }, h("p", { class: "hint" }, "Loading…"));
  ask(host, entry, null, place, (content) => {
    const event = content.event as RunEvent;
    const caption = typeof event.caption === "string" ? event.caption : "";
    replaceChildren(
      place,
      caption === "" ? null : h("p", { class: "sample-caption" }, caption),
      event.type === "TextSample" ? textOf(content, name) : null,
      event.type === "PictureSample" ? figureOf(event.picture as Picture, content, name, host) : null,
      event.type === "TableSample" ? new Table(event, entry, name, host).element : null,
    );
  });
  return place;
}

/** Ask for a content, for a place on the screen, and say there why it does not come. */
function ask(host: SampleHost, entry: Entry, picture: number | null, place: HTMLElement, fill: (content: Content) => void): void {
  const since = performance.now();
  host.contents.ask({
    entry,
    picture,
    // Places are asked for just before they come onto the page.
    wanted: () => place.isConnected || performance.now() - since < 50,
    answer: (content) => {
      place.removeAttribute("aria-busy");
      if (content.error === "") fill(content);
      else replaceChildren(place, problem(`It cannot be shown: ${content.error}`));
    },
  });
}

function problem(text: string): HTMLElement {
  return h("p", { class: "sample-problem" }, text);
}

function textOf({ blob }: Content, name: string): HTMLElement {
  const text = h("pre", { class: "sample-text", tabindex: 0, role: "region", "aria-label": name });
  const note = h("p", { class: "hint" });
  void blob.text().then((whole) => {
    setText(text, whole.slice(0, CHARACTERS_SHOWN));
    if (whole.length <= CHARACTERS_SHOWN) return;
    const download = h("button", { type: "button", class: "button small", onclick: () => save(blob, fileName(name, "", "txt")) }, "Download");
    replaceChildren(note, `The first ${count(CHARACTERS_SHOWN)} of ${count(whole.length)} characters. `, download);
  });
  return h("div", {}, text, note);
}

function figureOf(picture: Picture, content: Content, name: string, host: SampleHost): HTMLElement {
  const kind = picture.media_type.replace("image/", "").toUpperCase();
  const words = `${picture.width} × ${picture.height}, ${kind}, ${bytes(picture.size)}`;
  return h("figure", {}, pictureOf(picture, content, name, host), h("figcaption", { class: "hint" }, words));
}

function pictureOf(picture: Picture, { url }: Content, name: string, host: SampleHost): HTMLElement {
  const { width, height } = picture;
  const times = Math.max(1, Math.floor(SMALL / Math.max(width, height)));
  const image = h("img", { src: url, alt: name, width: width * times, height: height * times });
  // Others stay smooth when a narrow page makes them smaller.
  image.classList.toggle("pixels", times > 1);
  const button = h("button", { type: "button", class: "sample-picture", title: "Enlarge", onclick: () => host.enlarge(image) }, image);
  image.addEventListener("error", () => button.replaceWith(problem("It cannot be shown: the picture is damaged")));
  return button;
}

/** A table whose columns sort it. */
class Table {
  readonly element: HTMLElement;
  readonly #columns: readonly string[];
  readonly #rows: readonly { cells: readonly Cell[]; first: number }[];
  readonly #entry: Entry;
  readonly #name: string;
  readonly #host: SampleHost;
  readonly #body = h("tbody");
  readonly #heads: HTMLElement[];
  readonly #more: HTMLButtonElement;
  #sorted = { column: -1, descending: false };
  #shown = ROWS_SHOWN;

  constructor(event: RunEvent, entry: Entry, name: string, host: SampleHost) {
    [this.#entry, this.#name, this.#host] = [entry, name, host];
    this.#columns = event.columns as string[];
    let pictures = 0;
    this.#rows = (event.rows as Cell[][]).map((cells) => {
      const first = pictures;
      pictures += cells.filter(isPicture).length;
      return { cells, first };
    });
    this.#heads = this.#columns.map((title, column) =>
      h("th", { scope: "col" }, h("button", { type: "button", class: "sample-sort", onclick: () => this.#sort(column) }, title || "(no name)")),
    );
    this.#more = h("button", { type: "button", class: "button small", onclick: () => this.#showAll() });
    this.element = h(
      "div",
      {},
      h(
        "div",
        { class: "sample-rows", tabindex: 0, role: "region", "aria-label": name },
        h("table", {}, h("thead", {}, h("tr", {}, ...this.#heads)), this.#body),
      ),
      this.#more,
    );
    this.#draw();
  }

  /** Sort by a column: up, down, as it was. */
  #sort(column: number): void {
    const { column: before, descending } = this.#sorted;
    this.#sorted = column !== before ? { column, descending: false } : descending ? { column: -1, descending: false } : { column, descending: true };
    this.#draw();
  }

  #showAll(): void {
    this.#shown = Infinity;
    this.#draw();
  }

  #draw(): void {
    const { column, descending } = this.#sorted;
    const rows = column < 0 ? this.#rows : [...this.#rows].sort((a, b) => compare(a.cells[column], b.cells[column], descending ? -1 : 1));
    this.#heads.forEach((head, place) => {
      if (place === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    replaceChildren(this.#body, ...rows.slice(0, this.#shown).map(({ cells, first }) => this.#row(cells, first)));
    this.#more.hidden = rows.length <= this.#shown;
    setText(this.#more, `Show all ${count(rows.length)} rows`);
  }

  #row(cells: readonly Cell[], first: number): HTMLElement {
    let picture = first;
    return h("tr", {}, ...cells.map((cell, place) => this.#cell(cell, place, isPicture(cell) ? picture++ : -1)));
  }

  #cell(cell: Cell, place: number, number: number): HTMLElement {
    if (!isPicture(cell)) return h("td", { class: typeof cell === "number" ? "number" : null }, typeof cell === "number" ? compact(cell) : cell === null ? "" : String(cell));
    const element = h("td", {}, "…");
    ask(this.#host, this.#entry, number, element, (content) => {
      replaceChildren(element, pictureOf(cell, content, `${this.#columns[place] ?? ""}, ${this.#name}`, this.#host));
    });
    return element;
  }
}

export function isPicture(cell: unknown): cell is Picture {
  return typeof cell === "object" && cell !== null;
}

/** Numbers by value, other things by their words; nothing and pictures stand at the end in either direction. */
export function compare(a: Cell | undefined, b: Cell | undefined, sign = 1): number {
  const [left, right] = [rank(a), rank(b)];
  if (left !== right) return left === 2 || right === 2 ? left - right : sign * (left - right);
  if (left === 0) return sign * (toNumber(a as WireNumber) - toNumber(b as WireNumber));
  return left === 1 ? sign * String(a).localeCompare(String(b)) : 0;
}

function rank(cell: Cell | undefined): number {
  if (typeof cell === "number") return 0;
  return cell === null || cell === undefined || isPicture(cell) ? 2 : 1;
}
