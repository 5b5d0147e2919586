// The tab with the layers of the watched run: a tree to choose from, one statistic of all layers, and everything of the
// chosen one.
//
// Only while somebody looks does the server send anything: one statistic of all layers and all of one layer, and what
// is new of them once a second.

import { readTheme, watchTheme, type Theme } from "../charts/theme";
import { h, replaceChildren, setAttribute, setText, show } from "../dom";
import { compact, count, number, percent } from "../format";
import { finder, searchField } from "../search";
import { decodeLayers, LayerStore, of, type LayersQuery, type OneRow, type Statistic } from "./frame";
import { axisOf, binAt, CELLS, colours, FEWEST, resample, scaleOf, SHARES } from "./heat";
import { curves, Legend, paintHeat, Picture, tell, type Subject } from "./picture";
import { counterpart, list, tree, type Line } from "./tree";

export interface LayersHost {
  send(message: LayersQuery | { type: "drawn" }): boolean;
  /** Key of the watched run. */
  run(): string | null;
}

const KINDS = ["weights", "gradients", "activations"];
/** Words of the page for statistics. */
const NAMES: Readonly<Record<string, string>> = {
  norm: "norm", update_ratio: "update ratio", dead: "dead units", mean: "mean", std: "standard deviation", minimum: "minimum",
  maximum: "maximum", change: "change",
};
const ORDERS: readonly [string, string][] = [
  ["model", "Model"], ["change", "What changed most"], ["norm", "Norm"], ["update_ratio", "Update ratio"], ["dead", "Dead units"],
];
/** Rows of the table of values. */
const MOST_ROWS = 100;

export class Layers {
  readonly element: HTMLElement;
  readonly search = searchField("Filter layers", () => this.#draw());
  readonly #host: LayersHost;
  readonly #store = new LayerStore();
  readonly #kinds = h("div", { class: "charts-segments", role: "group", "aria-label": "Kind of tensor" });
  readonly #order = chooser("Order", ORDERS, () => this.#draw());
  readonly #statistic = chooser("Colour", [], () => this.#ask());
  readonly #log = h("input", { type: "checkbox", onchange: () => this.#draw() });
  readonly #note = h("p", { class: "empty" });
  readonly #body: HTMLElement;
  readonly #tree = h("div", { class: "layer-tree", role: "tree", "aria-label": "Layers" });
  readonly #all: Picture;
  readonly #allLegend = new Legend();
  readonly #one: Picture;
  readonly #oneLegend = new Legend();
  readonly #name = h("h2");
  readonly #curves: Picture[];
  readonly #table = h("div", { class: "layer-table" });
  readonly #details = h("details", { ontoggle: () => this.#showTable() }, h("summary", {}, "Values of this layer as a table"), this.#table);
  readonly #folded = new Set<string>();
  #lines: Line[] = [];
  /** The layers that the search leaves, in the order of the tree; those in folded groups, too. */
  #places: number[] = [];
  #theme: Theme | null = null;
  #active = false;
  #kind = "";
  #layer: string | null = null;
  /** What the server was asked last; what it sends must fit. */
  #asked: LayersQuery | null = null;
  #frame: number | null = null;
  /** Frames that are drawn with the next picture. */
  #credits = 0;

  constructor(host: LayersHost) {
    this.#host = host;
    const theme = (): Theme => (this.#theme ??= readTheme(this.element));
    this.#all = new Picture(theme, 300, this.#statistic.element, this.#allLegend.element);
    this.#one = new Picture(theme, 260, h("label", { class: "check" }, this.#log, h("span", {}, "log values")), this.#oneLegend.element);
    this.#curves = Array.from({ length: 4 }, () => new Picture(theme, 110));
    this.#body = h(
      "div",
      { class: "layer-body" },
      h("div", { class: "layer-side" }, h("div", { class: "layer-head", "aria-hidden": "true" }, ...["", "norm", "ratio", "dead", "change"].map((text) => h("span", {}, text))), this.#tree),
      h("div", { class: "layer-pictures" }, this.#all.element, this.#name, this.#one.element,
        h("div", { class: "layer-curves" }, ...this.#curves.map(({ element }) => element)), this.#details),
    );
    this.element = h(
      "div",
      { class: "layers" },
      h("div", { class: "toolbar" }, this.#kinds, this.search, this.#order.element),
      this.#note,
      this.#body,
    );
    this.#tree.addEventListener("click", (event) => this.#clicked(event));
    this.#tree.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#redraw()).observe(this.element);
    watchTheme(() => {
      this.#theme = null;
      this.#redraw();
    });
  }

  setActive(active: boolean): void {
    if (active === this.#active) return;
    this.#active = active;
    if (active) this.#ask(true);
    else {
      this.#host.send({ type: "layers", on: false });
      this.#asked = null;
      this.#creditBack();
    }
    this.#draw();
  }

  /** A run starts anew: what is known of its layers comes again. */
  began(): void {
    this.#store.clear();
    this.#credits = 0; // what is owed is owed to a connection that is gone, or was given back
    if (this.#active) this.#ask(true);
    this.#redraw();
  }

  #ask(again = false): void {
    const run = this.#host.run();
    if (!this.#active || run === null) return;
    const statistic = this.#statistic.value() || "norm";
    const query: LayersQuery = { type: "layers", run, kind: this.#kind, statistic, layer: this.#layer };
    const before = this.#asked;
    if (!again && JSON.stringify(before) === JSON.stringify(query)) return;
    if (again || before?.kind !== query.kind) this.#store.clear();
    if (before?.statistic !== query.statistic) this.#store.all = [];
    if (before?.layer !== query.layer) this.#store.one = [];
    this.#asked = query;
    this.#host.send(query);
  }

  /** Take a frame about layers. */
  take(data: ArrayBuffer): void {
    const frame = decodeLayers(data);
    const { header } = frame;
    const asked = this.#asked;
    const ofAll = header.statistic !== "";
    if (!ofAll && asked?.layer === null && header.run === asked.run) {
      // The first one, because none was chosen
      this.#layer = asked.layer = header.layer;
    }
    const fits = asked !== null && header.run === asked.run && (ofAll ? header.statistic === asked.statistic : header.layer === asked.layer) &&
      (asked.kind === "" || header.kind === asked.kind || (ofAll ? !header.kinds.includes(asked.kind ?? "") : header.kind === this.#store.kind));
    if (!fits || !this.#store.apply(frame) || header.more || document.hidden) {
      this.#host.send({ type: "drawn" });
      return;
    }
    this.#credits++;
    if (ofAll && this.#layer !== null && !this.#store.names.includes(this.#layer)) {
      this.#layer = counterpart(this.#store.names, this.#layer) ?? this.#store.names[0] ?? null;
      this.#ask();
    }
    this.#redraw();
  }

  #creditBack(): void {
    for (; this.#credits > 0; this.#credits--) this.#host.send({ type: "drawn" });
  }

  #choose(name: string): void {
    if (name === this.#layer) return;
    this.#layer = name;
    this.#ask();
    this.#redraw();
  }

  // Drawing

  #redraw(): void {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      try {
        this.#draw();
      } finally {
        this.#creditBack();
      }
    });
  }

  #draw(): void {
    if (!this.#active) return;
    const { names, kinds } = this.#store;
    const some = names.length > 0;
    show(this.#body, some);
    show(this.#note, !some);
    setText(this.#note, "No layers yet: LayerStatistics(every_n_steps=...) among the callbacks measures them.");
    this.#drawKinds([...KINDS.filter((kind) => kinds.includes(kind)), ...kinds.filter((kind) => !KINDS.includes(kind))]);
    if (!some) return;
    this.#statistic.set(this.#store.statistics.filter((name) => name !== "elements").map((name) => [name, NAMES[name] ?? name]));
    // A statistic that this kind does not have
    if (this.#asked !== null && this.#statistic.value() !== this.#asked.statistic) this.#ask();
    this.#drawTree();
    this.#drawAll();
    this.#drawOne();
  }

  #drawKinds(kinds: string[]): void {
    if (this.#kinds.childElementCount !== kinds.length) {
      replaceChildren(this.#kinds, ...kinds.map((kind) => h("button", { type: "button", class: "button choice", "data-kind": kind, onclick: () => {
        this.#kind = kind;
        this.#ask();
        this.#redraw();
      } }, kind)));
    }
    for (const each of this.#kinds.children) setAttribute(each, "aria-pressed", String((each as HTMLElement).dataset.kind === this.#store.kind));
  }

  #drawTree(): void {
    const store = this.#store;
    const { finds } = finder(this.search.value);
    const places = store.names.map((_, place) => place).filter((place) => finds(store.names[place] as string));
    const order = this.#order.value();
    const lines = order === "model" ? tree(store.names, places, this.search.value === "" ? this.#folded : new Set()) : list(store.names, places, (place) => store.told(place, order as "norm"));
    const same = lines.length === this.#lines.length && lines.every((line, index) => line.name === this.#lines[index]?.name && line.place === this.#lines[index]?.place && line.level === this.#lines[index]?.level);
    if (!same) {
      const focused = document.activeElement?.parentElement === this.#tree ? (document.activeElement as HTMLElement).dataset.name : null;
      this.#tree.replaceChildren(...lines.map(rowOf));
      const again = [...this.#tree.children].find((row) => focused != null && (row as HTMLElement).dataset.name === focused);
      (again as HTMLElement | undefined)?.focus();
    }
    this.#lines = lines;
    this.#places = order === "model" ? places : lines.map(({ place }) => place as number);
    let chosen = lines.findIndex(({ name, place }) => place !== null && name === this.#layer);
    lines.forEach(({ name, place }, index) => {
      const row = this.#tree.children[index] as HTMLElement;
      if (place === null) {
        setAttribute(row, "aria-expanded", String(!this.#folded.has(name) || this.search.value !== ""));
        return;
      }
      setAttribute(row, "aria-selected", String(index === chosen));
      const told = [store.told(place, "norm"), store.told(place, "update_ratio"), store.told(place, "dead"), store.told(place, "change")];
      const texts = told.map((value, column) => (Number.isNaN(value) ? "" : !Number.isFinite(value) ? "not finite" : column === 2 ? percent(value) : number(value, 3)));
      texts.forEach((text, column) => setText(row.children[column + 1] as Element, text));
    });
    if (chosen < 0) chosen = 0;
    const focus = document.activeElement?.parentElement === this.#tree ? [...this.#tree.children].indexOf(document.activeElement) : chosen;
    [...this.#tree.children].forEach((row, index) => setAttribute(row, "tabindex", index === focus ? "0" : "-1"));
  }

  #table256(): Uint8Array {
    const theme = (this.#theme ??= readTheme(this.element));
    const light = (theme.background.match(/[\d.]+/g) ?? []).slice(0, 3).map(Number);
    return colours(light.reduce((sum, part) => sum + part, 0) < 384);
  }

  #drawAll(): void {
    const store = this.#store;
    const statistic = this.#asked?.statistic ?? "norm";
    const word = NAMES[statistic] ?? statistic;
    const places = this.#places;
    const rows = store.all.filter(({ values }) => values.some((value) => !Number.isNaN(value)));
    if (rows.length === 0 || places.length === 0) return this.#all.show(null, "", "");
    const [table, scale] = [this.#table256(), scaleOf(rows, statistic)];
    const steps = rows.map(({ step }) => step);
    const alert = (this.#theme as Theme).alert;
    const subject: Subject = {
      steps,
      lines: places.length,
      labels: [[0, "1"], [1, count(places.length)]],
      paint: (context, area) => paintHeat(context, area, { steps, lines: places.length, value: (row, line) => (rows[row] as { values: Float32Array }).values[places[line] as number] as number, scale, table, alert }),
      read: (column, line) => `Step ${compact(steps[column])}, ${store.names[places[line] as number]}: ${word} ${tell(rows[column]?.values[places[line] as number] ?? NaN)}`,
      pick: (line) => this.#choose(store.names[places[line] as number] as string),
    };
    const spaced = store.spacing > 0 ? `, one in about ${count(Math.ceil(store.spacing))} steps kept` : "";
    this.#allLegend.show(table, compact(scale.min), compact(scale.max));
    this.#all.show(subject, `${count(places.length)} layers: ${word} of the ${store.kind}`,
      `Heatmap of the ${word} of the ${store.kind} of ${places.length} layers, steps ${steps[0]} to ${steps.at(-1)}. Arrow keys read it out, Enter chooses the layer.`,
      `${measurements(rows.length)}${spaced}. A click chooses the layer.`);
  }

  #drawOne(): void {
    const store = this.#store;
    setText(this.#name, this.#layer === "" ? "(the model)" : (this.#layer ?? ""));
    const rows = store.one.filter((row) => row.histogram.length > 0);
    const axis = axisOf(rows, this.#log.checked);
    const theme = (this.#theme ??= readTheme(this.element));
    if (axis === null) this.#one.show(null, "", "");
    else {
      const [steps, table] = [rows.map(({ step }) => step), this.#table256()];
      const grid = rows.map((row) => resample(row, axis));
      this.#oneLegend.show(table, `≤ ${compact(100 * FEWEST)} %`, "100 %");
      this.#one.show({
        steps,
        lines: CELLS,
        labels: [0, 0.25, 0.5, 0.75, 1].map((place) => [place, number(axis.fromUnit(1 - place), 3)]),
        paint: (context, area) => paintHeat(context, area, { steps, lines: CELLS, value: (row, line) => grid[row]?.[CELLS - 1 - line] || NaN, scale: SHARES, table, alert: theme.alert }),
        read: (column, line) => readBin(rows[column] as OneRow, axis.fromUnit(1 - (line + 0.5) / CELLS)),
      }, `Values of the ${store.kind}: share of the elements in each of ${CELLS} parts`,
        `Heatmap of ${rows.length} histograms of the ${store.kind} of ${this.#layer}, steps ${steps[0]} to ${steps.at(-1)}, values ${compact(axis.min)} to ${compact(axis.max)}. Arrow keys read it out.`,
        "Point at a place, or use the arrow keys.");
    }
    this.#drawCurves(theme);
    this.#showTable();
  }

  #drawCurves(theme: Theme): void {
    const rows = this.#store.one;
    const steps = rows.map(({ step }) => step);
    const values = (name: Statistic): number[] => rows.map((row) => of(row, name));
    const colour = (index: number): string => theme.hues[index] as string;
    const [mean, std] = [values("mean"), values("std")];
    const band: [number[], number[]] = [mean.map((value, row) => value - (std[row] as number)), mean.map((value, row) => value + (std[row] as number))];
    const lines = [
      { name: "mean", values: mean, colour: colour(0) },
      { name: "minimum", values: values("minimum"), colour: colour(1), dash: [3, 3] },
      { name: "maximum", values: values("maximum"), colour: colour(1), dash: [7, 3] },
    ];
    const subject = curves(steps, lines, band);
    if (subject !== null) {
      const read = subject.read;
      subject.read = (column, line) => `${read(column, line)}, standard deviation ${tell(std[column] as number)}`;
    }
    const subjects: [string, Subject | null][] = [
      ["Mean ± standard deviation, minimum, maximum", subject],
      ...(["norm", "update_ratio", "dead"] as const).map((name): [string, Subject | null] => {
        const title = NAMES[name] as string;
        return [title.charAt(0).toUpperCase() + title.slice(1), curves(steps, [{ name: title, values: values(name), colour: colour(2) }])];
      }),
    ];
    subjects.forEach(([title, each], index) => this.#curves[index]?.show(each, title, `${title} of ${this.#layer} over the steps. Arrow keys read it out.`));
  }

  #showTable(): void {
    const rows = this.#store.one;
    if (!this.#details.open) return this.#table.replaceChildren();
    const shown = (["norm", "update_ratio", "dead", "mean", "std", "minimum", "maximum"] as const).filter((name) => rows.some((row) => !Number.isNaN(of(row, name))));
    const cells = (row: OneRow): HTMLElement[] => shown.map((name) => h("td", {}, Number.isNaN(of(row, name)) ? "" : tell(of(row, name))));
    replaceChildren(this.#table, h("table", { class: "chart-table" },
      h("caption", {}, rows.length > MOST_ROWS ? `The newest ${MOST_ROWS} of ${measurements(rows.length)}` : measurements(rows.length)),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "step"), ...shown.map((name) => h("th", { scope: "col" }, NAMES[name] as string)))),
      h("tbody", {}, ...rows.slice(-MOST_ROWS).reverse().map((row) => h("tr", {}, h("th", { scope: "row" }, compact(row.step)), ...cells(row)))),
    ));
  }

  // The tree

  #lineOf(target: EventTarget | null): { line: Line; index: number } | null {
    const row = target instanceof Element ? target.closest("[role=treeitem]") : null;
    const index = row === null ? -1 : [...this.#tree.children].indexOf(row);
    const line = this.#lines[index];
    return line === undefined ? null : { line, index };
  }

  #clicked(event: MouseEvent): void {
    const found = this.#lineOf(event.target);
    if (found === null) return;
    (this.#tree.children[found.index] as HTMLElement).focus();
    if (found.line.place === null) this.#fold(found.line, !this.#folded.has(found.line.name));
    else this.#choose(found.line.name);
  }

  #fold(line: Line, folded: boolean): void {
    if (folded) this.#folded.add(line.name);
    else this.#folded.delete(line.name);
    this.#draw();
  }

  #key(event: KeyboardEvent): void {
    const found = this.#lineOf(event.target);
    if (found === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const { line, index } = found;
    const group = line.place === null;
    const last = this.#lines.length - 1;
    const above = this.#lines.slice(0, index).reverse().findIndex(({ level }) => level < line.level);
    const parent = above < 0 ? -1 : index - 1 - above;
    const goes: Record<string, number> = {
      ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: last,
      ...(group && this.#folded.has(line.name) ? {} : { ArrowRight: group ? index + 1 : index }),
      ...(group && !this.#folded.has(line.name) ? {} : { ArrowLeft: parent < 0 ? index : parent }),
    };
    const to = goes[event.key];
    if (to !== undefined) {
      const row = this.#tree.children[Math.min(last, Math.max(0, to))] as HTMLElement;
      this.#tree.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
      row.tabIndex = 0;
      row.focus();
    } else if (group && ["ArrowLeft", "ArrowRight", "Enter", " "].includes(event.key)) this.#fold(line, !this.#folded.has(line.name));
    else if (event.key === "Enter" || event.key === " ") this.#choose(line.name);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function rowOf({ label, name, level, place, count: layers }: Line): HTMLElement {
  const row = h("div", { role: "treeitem", "aria-level": level, tabindex: "-1", "data-name": name, title: name }, h("span", { class: "layer-label" }, label || "(the model)"));
  row.style.setProperty("--level", String(level));
  row.append(...(place === null ? [h("span", { class: "layer-count" }, `${layers} layers`)] : [h("span"), h("span"), h("span"), h("span")]));
  return row;
}

function readBin(row: OneRow, value: number): string {
  const bin = binAt(row, value);
  const step = `Step ${compact(row.step)}`;
  if (bin === null) return `${step}: no elements at ${compact(value)}`;
  const elements = of(row, "elements");
  return `${step}: ${compact(bin.low)} to ${compact(bin.high)} has ${compact(100 * bin.share)} %, ${count(bin.share * elements)} of ${count(elements)} elements`;
}

/** A labelled choice of one of some words. */
function chooser(label: string, options: readonly [string, string][], changed: () => void) {
  const select = h("select", { class: "input", onchange: changed });
  let shown = "";
  const set = (words: readonly [string, string][]): void => {
    const text = JSON.stringify(words);
    if (text === shown) return;
    shown = text;
    const before = select.value;
    select.replaceChildren(...words.map(([value, word]) => h("option", { value }, word)));
    if (words.some(([value]) => value === before)) select.value = before;
  };
  set(options);
  return { element: h("label", { class: "layer-choice" }, label, select), value: () => select.value, set };
}

function measurements(number: number): string {
  return number === 1 ? "1 measurement" : `${count(number)} measurements`;
}
