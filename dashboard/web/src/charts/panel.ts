// One panel: a figure with a name, a legend that shows values, and a plot.
//
// uPlot gives the plot its canvas, axes, cursor and selection. Its scales run from 0 to 1 and it holds no data:
// curves are drawn from the store's columns as they are, each with points of its own (uPlot wants all curves
// of a plot over one column of x), and an axis can turn logarithmic without a new plot.

import uPlot from "uplot";

import { h, iconButton, setAttribute, setIcon, setText } from "../dom";
import type { SeriesInfo } from "../protocol";
import { formatX, Scale, type Ticks, xTicks, yTicks } from "./axes";
import { type Drawn, type Fit, fit, isSquashed } from "./fit";
import { Legend, slotsOf } from "./legend";
import { legendOf, lookOf, type PanelLine, linesOf, shownCurves } from "./lines";
import { type Mark, marksOf, textOf } from "./marks";
import { type Brush, FONT_SIZE, paintBackground, paintLines, paintOutside, paintText } from "./paint";
import { listenToKeys } from "./panel_keys";
import { indexAt } from "./reading";
import type { RunCurves } from "./run_curves";
import type { Scene } from "./scene";
import { cssColour, type Look } from "./theme";
import { type PanelCurve, type Said, type Source, Values } from "./values";

/** What a panel asks of the page it is on. */
export interface PanelHost extends Source {
  scene(): Scene;
  moveCursor(x: number | null, pinned: boolean): void;
  zoom(min: number, max: number): void;
  resetZoom(): void;
  toggleUsual(panel: Panel): void;
  toggleCurve(metric: string): void;
  toggleRuns(runs: readonly string[]): void;
  toggleMembers(): void;
  toggleMaximised(panel: Panel): void;
  toggleTable(panel: Panel): void;
  savePicture(panel: Panel): void;
  saveCsv(panel: Panel): void;
  announce(text: string): void;
  /** A panel has got another size and must be drawn again. */
  resized(panel: Panel): void;
}

/** A curve that has had one value for so many points is a constant. */
const CONSTANT_AFTER = 20;

let panels = 0;

export class Panel {
  readonly figure: HTMLElement;
  readonly plot: HTMLElement;
  readonly curves: PanelCurve[] = [];
  readonly maximiseButton: HTMLButtonElement;
  readonly tableButton: HTMLButtonElement;
  readonly csvButton: HTMLButtonElement;
  readonly #usualButton: HTMLButtonElement;
  /** Whether it is on the screen, or nearly. */
  visible = false;

  /** Whether it takes a line, without a plot. */
  isLine = false;

  readonly #host: PanelHost;
  readonly #prefix: HTMLElement;
  readonly #place: HTMLElement;
  readonly #legend: Legend;
  readonly #summary: HTMLElement;
  readonly #values: Values;
  readonly #resize: ResizeObserver;
  #dots: HTMLElement[] = [];
  #chart: uPlot | null = null;
  #fitted: Fit = { scale: new Scale(0, 1), belowZero: 0, above: 0, below: 0, isAtLeast: false };
  #xTicks: Ticks = { values: [], labels: [] };
  #yTicks: Ticks = { values: [], labels: [] };
  /** Which look each metric has. */
  #slots: ReadonlyMap<string, number> = new Map();
  /** What was drawn last. */
  #lines: PanelLine[] = [];
  #marks: Mark[] = [];
  #summarised = 0;
  #moving = false;

  constructor(
    readonly name: string,
    readonly group: string,
    host: PanelHost,
  ) {
    this.#host = host;
    this.#values = new Values(host);
    const id = `chart-${++panels}`;
    // The heading above the panels says their group, unless there is only this one.
    this.#prefix = h("span", { class: "sr-only" }, group !== "" && name.startsWith(`${group}/`) ? `${group}/` : "");
    const leaf = name.slice(this.#prefix.textContent?.length);
    const title = h("h3", { id: `${id}-title`, class: "chart-title", title: name }, this.#prefix, leaf);
    this.#place = h("span", { class: "chart-place", "aria-hidden": "true" });
    this.maximiseButton = iconButton("maximise", `Maximise ${name}`, () => host.toggleMaximised(this));
    this.#usualButton = iconButton("usual", `Scale ${name} to its usual values`, () => host.toggleUsual(this));
    this.tableButton = iconButton("table", `Table of ${name}`, () => host.toggleTable(this));
    this.tableButton.setAttribute("aria-expanded", "false");
    this.csvButton = iconButton("download", `Save ${name} as CSV`, () => host.saveCsv(this));
    const picture = iconButton("picture", `Save ${name} as PNG`, () => host.savePicture(this));
    const buttons = h(
      "div",
      { class: "chart-buttons" },
      this.#usualButton,
      this.tableButton,
      picture,
      this.csvButton,
      this.maximiseButton,
    );
    this.#legend = new Legend(name);
    this.#summary = h("p", { id: `${id}-summary`, class: "sr-only" }, "No values yet.");
    this.plot = h("div", {
      class: "chart-plot",
      tabindex: "0",
      role: "slider",
      "aria-label": `${name}: cursor. Arrow keys move it, Enter reads it out, plus and minus zoom, 0 shows all.`,
      "aria-valuemin": "0",
      "aria-valuemax": "0",
      "aria-valuenow": "0",
      "aria-valuetext": "no cursor",
    });
    this.figure = h(
      "figure",
      { class: "chart", "aria-labelledby": `${id}-title`, "aria-describedby": `${id}-summary` },
      h("div", { class: "chart-head" }, title, this.#place, buttons),
      this.#legend.root,
      this.plot,
      this.#summary,
    );
    listenToKeys(this, host);
    this.plot.addEventListener("blur", () => host.moveCursor(null, true));
    this.#resize = new ResizeObserver(() => {
      if (this.#fit()) host.resized(this);
    });
  }

  /** Add a curve of a run, or say anew what one that is here is. */
  addCurve(run: RunCurves, info: SeriesInfo): void {
    const known = this.curves.find((curve) => curve.run === run && curve.info.key === info.key);
    if (known) known.info = info;
    else this.curves.push({ run, info });
    this.#name();
  }

  /** Take a run's curves away; returns whether others are left. */
  removeRun(run: RunCurves): boolean {
    this.curves.splice(0, Infinity, ...this.curves.filter((curve) => curve.run !== run));
    this.#lines = [];
    this.#name();
    return this.curves.length > 0;
  }

  #name(): void {
    this.#slots = slotsOf([...new Map(this.curves.map(({ info }) => [info.key, info])).values()]);
  }

  /** Those of its curves that are switched on. */
  shown(scene: Scene): PanelCurve[] {
    return shownCurves(this.curves, scene);
  }

  lookOf(curve: PanelCurve, scene: Scene): Look {
    return lookOf(curve, scene, this.#slots);
  }

  /** Width of the plot in CSS pixels, as far as it is known. */
  get width(): number {
    return this.#chart?.width ?? this.plot.clientWidth;
  }

  get canvas(): HTMLCanvasElement | null {
    return this.#chart?.ctx.canvas ?? null;
  }

  /** Begin or end to hold a canvas. */
  setVisible(shown: boolean): void {
    if (shown === this.visible) return;
    this.visible = shown;
    this.#plot();
  }

  /** Make the plot, or let it go. */
  #plot(): void {
    const wanted = this.visible && !this.isLine;
    if (wanted === (this.#chart !== null)) return;
    if (wanted) {
      this.#create();
      this.#resize.observe(this.plot);
    } else {
      this.#resize.disconnect();
      this.#chart?.destroy();
      this.#chart = null;
      this.#dots = [];
    }
  }

  /** Whether its curves have had one value only, for long enough to say so; as it was while they are not here. */
  isConstant(): boolean {
    if (this.figure.classList.contains("maximised")) return false;
    const curves = this.curves.map((curve) => this.#host.curve(curve));
    if (!this.visible || curves.includes(null)) return this.isLine;
    return curves.every((curve) => {
      if (!curve || curve.length < CONSTANT_AFTER || curve.marks.length > 0) return false;
      return curve.least?.value === curve.greatest?.value;
    });
  }

  setLine(isLine: boolean): void {
    this.isLine = isLine;
    this.figure.classList.toggle("line", isLine);
    if (this.visible) this.#plot();
  }

  setMaximised(maximised: boolean): void {
    if (this.figure.classList.contains("maximised") === maximised) return;
    this.figure.classList.toggle("maximised", maximised);
    this.#prefix.classList.toggle("sr-only", !maximised);
    setIcon(
      this.maximiseButton,
      maximised ? "restore" : "maximise",
      `${maximised ? "Restore" : "Maximise"} ${this.name}`,
    );
  }

  /**
   * Draw the curves. The caller lets `showCursor` follow once all panels are drawn: it changes the document, and
   * text on a canvas after that makes the browser lay the page out again.
   */
  draw(): void {
    const chart = this.#chart;
    if (!chart) return;
    const scene = this.#host.scene();
    const distances = this.curves.map((curve) => this.#host.curve(curve)?.cadence ?? Infinity);
    const unit = Math.min(...distances);
    this.#values.unit = Number.isFinite(unit) ? unit : 1;
    const { width } = plotSize(chart);
    this.#lines = linesOf(this.#panelled, scene, width);
    this.#fitted = fit(this.#drawn, scene, scene.usual.has(this.name));
    // Events are those of the watched run.
    const own = this.curves.filter(({ run }) => run === scene.runs[0]);
    this.#marks = marksOf(scene, new Set(own.map(({ info }) => info.key)), width);
    this.#xTicks = xTicks(scene.axis, scene.x, Math.max(2, Math.floor(chart.width / 75)));
    this.#yTicks = yTicks(this.#fitted.scale, Math.max(2, Math.floor(chart.height / 36)), this.#unitOfAll());
    chart.batch(() => chart.redraw(false, true));
  }

  /** Show the cursor where it is, and the values there; or the last ones. */
  showCursor(): void {
    const scene = this.#host.scene();
    const chart = this.#chart;
    const cursor = scene.cursor;
    if (chart) {
      const unit = cursor === null ? NaN : scene.x.toUnit(cursor);
      const { width } = plotSize(chart);
      const left = unit >= 0 && unit <= 1 ? unit * width : -10;
      if (Math.abs((chart.cursor.left ?? -10) - left) > 0.5) {
        this.#moving = true;
        chart.setCursor({ left, top: left < 0 ? -10 : 0 }, false);
        this.#moving = false;
      }
    }
    setAttribute(this.#usualButton, "aria-pressed", String(scene.usual.has(this.name)));
    this.#showValues(scene);
    this.#showDots(scene);
    const now = performance.now();
    if (now - this.#summarised > 2_000) {
      this.#summarised = now;
      setText(this.#summary, this.summary());
      this.#usualButton.classList.toggle("suggested", isSquashed(this.#drawn, scene));
    }
  }

  /** Last value, best value and trend of each curve, as a sentence. */
  summary(): string {
    const scene = this.#host.scene();
    const parts = this.shown(scene).map((curve) => `${this.#nameOf(curve, scene)}: ${this.#values.summary(curve)}`);
    return parts.length > 0 ? `${parts.join("; ")}.` : "All curves are hidden.";
  }

  /** What the cursor shows, as a sentence. */
  readOut(): string {
    const scene = this.#host.scene();
    if (scene.cursor === null) return this.summary();
    const values = this.shown(scene).map((curve) => {
      const [value, raw] = this.#values.at(curve, scene, scene.cursor as number);
      const name = this.#nameOf(curve, scene);
      return raw === "" ? `${name} ${value || "none"}` : `${name} ${value}, raw ${raw}`;
    });
    return [formatX(scene.axis, scene.cursor), ...values, ...this.#eventsAt(scene)].join(", ");
  }

  #nameOf({ run, info }: PanelCurve, scene: Scene): string {
    return scene.runs.length === 1 ? info.label : `${run.name}, ${info.label}`;
  }

  /** From a place on the screen (clientX) to x; null without a plot. */
  xAt(clientX: number): number | null {
    if (!this.#chart) return null;
    const { left, width } = this.#chart.over.getBoundingClientRect();
    return this.#host.scene().x.fromUnit(Math.max(0, Math.min(1, (clientX - left) / width)));
  }

  destroy(): void {
    this.setVisible(false);
    this.figure.remove();
  }

  // The plot ----------------------------------------------------------------------------------------

  #create(): void {
    const axis = (ticks: () => Ticks, toUnit: (value: number) => number): uPlot.Axis => ({
      stroke: () => this.#host.scene().theme.faint,
      font: `${FONT_SIZE}px ${this.#host.scene().theme.font}`,
      ticks: { show: false },
      incrs: [1],
      space: 1,
      splits: () => ticks().values.map(toUnit),
      values: () => ticks().labels,
      filter: (_, splits) => splits,
      grid: { stroke: () => this.#host.scene().theme.grid, width: 1 },
    });
    const chart = new uPlot(
      {
        width: Math.max(this.plot.clientWidth, 60),
        height: Math.max(this.plot.clientHeight, 60),
        padding: [8, 16, 0, 0],
        legend: { show: false },
        scales: { x: { time: false, range: [0, 1] }, y: { auto: false, range: [0, 1] } },
        series: [{}],
        axes: [
          {
            ...axis(
              () => this.#xTicks,
              (value) => this.#host.scene().x.toUnit(value),
            ),
            size: 22,
            gap: 5,
          },
          {
            ...axis(
              () => this.#yTicks,
              (value) => this.#fitted.scale.toUnit(value),
            ),
            scale: "y",
            side: 3,
            gap: 6,
            size: (_, labels) => axisWidth(labels),
          },
        ],
        cursor: {
          y: false,
          points: { show: false },
          drag: { x: true, y: false, setScale: false, dist: 4 },
          bind: {
            dblclick: () => () => {
              this.#host.resetZoom();
              return null;
            },
          },
        },
        hooks: {
          drawClear: [(plot) => paintBackground(this.#brush(plot))],
          draw: [(plot) => this.#paint(plot)],
          setCursor: [(plot) => this.#cursorMoved(plot)],
          setSelect: [(plot) => this.#selected(plot)],
        },
      },
      [[0]],
      this.plot,
    );
    this.#chart = chart;
  }

  #fit(): boolean {
    const chart = this.#chart;
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!chart || width < 1 || height < 1 || (chart.width === width && chart.height === height)) return false;
    chart.setSize({ width, height });
    return true;
  }

  /** The unit of the y axis: that of all curves, if it is the same. */
  #unitOfAll(): string {
    const units = new Set(this.curves.map(({ info }) => info.unit ?? ""));
    return units.size === 1 ? ([...units][0] as string) : "";
  }

  get #panelled(): Parameters<typeof linesOf>[0] {
    return { curves: this.curves, slots: this.#slots, source: this.#host, values: this.#values };
  }

  get #drawn(): Drawn[] {
    return this.#lines.map(({ curve, values, scene, band }) => ({ curve, values, scene, bounds: band ?? [] }));
  }

  #brush({ ctx, bbox }: uPlot): Brush {
    return { ctx, box: bbox, ratio: devicePixelRatio, scene: this.#host.scene(), y: this.#fitted.scale };
  }

  #paint(chart: uPlot): void {
    const brush = this.#brush(chart);
    const { scene } = brush;
    const lines = this.#lines;
    paintLines(brush, lines, this.#marks);
    const isHidden = this.shown(scene).length === 0;
    if (lines.length === 0) paintText(brush, isHidden ? "all curves are hidden" : "no values yet", "middle");
    else if (this.#fitted.belowZero > 0) paintText(brush, `${this.#fitted.belowZero} of 0 or less not shown`, "foot");
    paintOutside(brush, lines, this.#fitted);
  }

  // The cursor ----------------------------------------------------------------------------------------

  #cursorMoved(chart: uPlot): void {
    // Where we have put it, or where a redraw found it again
    if (this.#moving || !chart.cursor.event) return;
    const left = chart.cursor.left ?? -10;
    const x = left < 0 ? null : this.#host.scene().x.fromUnit(left / plotSize(chart).width);
    chart.cursor.event = null as unknown as MouseEvent;
    this.#host.moveCursor(x, false);
  }

  #selected(chart: uPlot): void {
    const { left, width } = chart.select;
    if (width < 4) return;
    const { x } = this.#host.scene();
    const total = plotSize(chart).width;
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.#host.zoom(x.fromUnit(left / total), x.fromUnit((left + width) / total));
  }

  /** The line whose points the arrow keys go along: the one with the most. */
  longest(): PanelLine | null {
    return this.#lines.reduce<PanelLine | null>(
      (longest, line) => (line.curve.length > (longest?.curve.length ?? 0) ? line : longest),
      null,
    );
  }

  /** Say to screen readers where the cursor is. */
  describeCursor(): void {
    const { x, cursor } = this.#host.scene();
    if (cursor === null) return;
    this.plot.setAttribute("aria-valuemin", String(x.min));
    this.plot.setAttribute("aria-valuemax", String(x.max));
    this.plot.setAttribute("aria-valuenow", String(cursor));
    this.plot.setAttribute("aria-valuetext", this.readOut());
  }

  #showValues(scene: Scene): void {
    const place =
      scene.cursor === null ? "" : [formatX(scene.axis, scene.cursor), ...this.#eventsAt(scene)].join(" · ");
    setText(this.#place, place);
    const say = (curve: PanelCurve): Said =>
      scene.cursor === null
        ? this.#values.last(curve, scene, this.visible)
        : this.#values.at(curve, scene, scene.cursor);
    const { items, head } = legendOf(this.#panelled, this.#lines, scene, this.#host, say);
    this.#legend.show(items, head);
  }

  /** Texts of the events under the cursor, and of a gap. */
  #eventsAt(scene: Scene): string[] {
    const { cursor } = scene;
    if (cursor === null) return [];
    const unit = scene.x.toUnit(cursor);
    const reach = 5 / Math.max(this.width, 1);
    const marks = this.#marks.filter(({ from, to }) => unit > from - reach && unit < to + reach);
    const gap = scene.gaps.find(([after, before]) => {
      const [from, to] = [scene.placeOf(after), scene.placeOf(before)];
      return from !== null && to !== null && cursor > from && cursor < to;
    });
    return [...(gap ? [`${gap[2]} dropped`] : []), ...marks.slice(-2).map(textOf)];
  }

  /** Dots on the curves at the cursor. */
  #showDots(scene: Scene): void {
    const chart = this.#chart;
    if (!chart) return;
    const lines = scene.cursor === null ? [] : this.#lines;
    while (this.#dots.length < lines.length) {
      const made = h("div", { class: "chart-dot" });
      chart.over.append(made);
      this.#dots.push(made);
    }
    const { width, height } = plotSize(chart);
    this.#dots.forEach((made, position) => {
      const line = lines[position];
      const index = line ? indexAt(line.curve, line.scene, scene.cursor as number) : -1;
      if (!line || index < 0) {
        made.hidden = true;
        return;
      }
      const { curve, values, look } = line;
      const x = scene.x.toUnit((curve[scene.column][index] as number) - line.scene.origin);
      const y = this.#fitted.scale.toUnit(values[index] as number);
      made.hidden = !(x >= 0 && x <= 1 && y >= 0 && y <= 1);
      if (made.hidden) return;
      made.style.background = cssColour(look);
      made.style.transform = `translate(${x * width}px, ${(1 - y) * height}px)`;
    });
  }
}

/** Size of the part with the curves, in CSS pixels; known without asking the browser to lay anything out. */
function plotSize({ bbox }: uPlot): { width: number; height: number } {
  return { width: bbox.width / devicePixelRatio, height: bbox.height / devicePixelRatio };
}

function axisWidth(labels: string[] | null): number {
  const longest = Math.max(0, ...(labels ?? []).map((label) => label.length));
  // In coarse steps, so that a plot does not move when a label gets one digit more
  return Math.max(44, 8 * Math.ceil((6.5 * longest + 14) / 8));
}
