// One panel: a figure with a name, a legend that shows values, and a plot.
//
// The plot (`plot.ts`) gives it a canvas, a cursor and a selection, and holds no data: curves are drawn from the
// store's columns as they are, each with points of its own.

import { h, iconButton, setAttribute, setIcon, setText } from "../dom";
import type { SeriesInfo } from "../protocol";
import { formatX, Scale, xTicks, xTitle, yTicks } from "./axes";
import { axisWidth, paintAxes, paintTitles } from "./axes_paint";
import { type Dot, Dots } from "./dots";
import { type Drawn, type Ends, type Fit, fit, isSquashed } from "./fit";
import { Legend, slotsOf } from "./legend";
import { legendOf, lookOf, type PanelLine, linesOf, shownCurves } from "./lines";
import { type Mark, marksOf, textOf } from "./marks";
import { type Brush, paintBackground, paintLines, paintOutside, paintText } from "./paint";
import { listenToKeys } from "./panel_keys";
import type { Picture } from "./picture";
import { Plot, type Selection } from "./plot";
import { indexAt } from "./reading";
import type { RunCurves } from "./run_curves";
import type { Scene } from "./scene";
import { colourOf, cssColour, type Look } from "./theme";
import { Tip } from "./tip";
import { type PanelCurve, type Said, type Source, Values } from "./values";

/** What a panel asks of the page it is on. */
export interface PanelHost extends Source {
  scene(): Scene;
  moveCursor(x: number | null, pinned: boolean): void;
  zoom(min: number, max: number): void;
  /** Show another part of x, of the same length. */
  pan(min: number, max: number): void;
  resetZoom(): void;
  toggleUsual(panel: Panel): void;
  toggleCurve(metric: string): void;
  toggleRuns(runs: readonly string[]): void;
  toggleMembers(): void;
  toggleMaximised(panel: Panel): void;
  toggleTable(panel: Panel): void;
  /** Show or hide the options of a panel. */
  toggleOptions(panel: Panel): void;
  /** Set the ends of its y axis; null for by the values in view. */
  setRange(panel: Panel, ends: Ends): void;
  announce(text: string): void;
  /** A panel has got another size and must be drawn again. */
  resized(panel: Panel): void;
}

/** A curve that has had one value for so many points is a constant. */
const CONSTANT_AFTER = 20;
/** Points of a group's line that is not drawn. */
const CONSTANT_WIDTH = 100;
/** Room for the title of an axis, in CSS pixels. */
const TITLE = 18;

let panels = 0;

export class Panel {
  readonly figure: HTMLElement;
  readonly plot: HTMLElement;
  readonly curves: PanelCurve[] = [];
  readonly maximiseButton: HTMLButtonElement;
  readonly tableButton: HTMLButtonElement;
  readonly optionsButton: HTMLButtonElement;
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
  readonly #dots = new Dots();
  readonly #tip = new Tip();
  #chart: Plot | null = null;
  #fitted: Fit = { scale: new Scale(0, 1), belowZero: 0, above: 0, below: 0, isAtLeast: false };
  /** Which look each metric has. */
  #slots: ReadonlyMap<string, number> = new Map();
  /** What was drawn last. */
  #lines: PanelLine[] = [];
  #marks: Mark[] = [];
  #summarised = 0;

  constructor(
    readonly name: string,
    readonly group: string,
    /** Tab of the page that it is on. */
    readonly tab: SeriesInfo["tab"],
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
    this.optionsButton = iconButton("dots", `Options of ${name}`, () => host.toggleOptions(this));
    this.optionsButton.setAttribute("aria-expanded", "false");
    const buttons = h(
      "div",
      { class: "chart-buttons" },
      this.#usualButton,
      this.tableButton,
      this.optionsButton,
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
      const plot = new Plot(this.plot, {
        draw: () => this.#paint(plot),
        hovered: (left) => this.#hovered(left),
        selected: (selection) => this.#selected(selection),
        doubleClicked: () => {
          this.#host.setRange(this, { min: null, max: null });
          this.#host.resetZoom();
        },
      });
      plot.over.append(this.#dots.element, this.#tip.element);
      this.#chart = plot;
      this.#resize.observe(this.plot);
    } else {
      this.#resize.disconnect();
      this.#chart?.destroy();
      this.#chart = null;
    }
  }

  /** Whether its curves have had one value only, for long enough to say so; as it was while they are not here. */
  isConstant(): boolean {
    if (this.#isMaximised()) return false;
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
    if (this.#isMaximised() === maximised) return;
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
    const scene = this.#host.scene();
    if (!chart) {
      // A constant has no plot, but the values of groups are those of their lines.
      this.#lines = scene.groups === null ? [] : linesOf(this.#panelled, scene, CONSTANT_WIDTH);
      return;
    }
    const distances = this.curves.map((curve) => this.#host.curve(curve)?.cadence ?? Infinity);
    const unit = Math.min(...distances);
    this.#values.unit = Number.isFinite(unit) ? unit : 1;
    const { width } = chart.size;
    this.#lines = linesOf(this.#panelled, scene, width);
    const scale = scene.scaleIn(this.name);
    const ends = scale !== null && (scale.min !== null || scale.max !== null) ? scale : null;
    this.#fitted = fit(this.#drawn, this.#viewOf(scene), scene.usual.has(this.name), ends);
    this.#marks = marksOf(scene, this.#ownKeys(scene), width);
    chart.draw();
  }

  /** Show the cursor where it is, and the values there; or the last ones. */
  showCursor(): void {
    const scene = this.#host.scene();
    const chart = this.#chart;
    const cursor = scene.cursor;
    if (chart) {
      const unit = cursor === null ? NaN : scene.x.toUnit(cursor);
      chart.setCursor(unit >= 0 && unit <= 1 ? unit * chart.size.width : null);
    }
    setAttribute(this.#usualButton, "aria-pressed", String(scene.usual.has(this.name)));
    this.#showValues(scene);
    this.#showDots(scene);
    const now = performance.now();
    if (now - this.#summarised > 2_000) {
      this.#summarised = now;
      setText(this.#summary, this.summary());
      this.#usualButton.classList.toggle("suggested", isSquashed(this.#drawn, this.#viewOf(scene)));
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

  #fit(): boolean {
    const { clientWidth: width, clientHeight: height } = this.plot;
    return this.#chart !== null && width >= 1 && height >= 1 && this.#chart.setSize(width, height);
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

  /** What it shows now, to be drawn elsewhere. */
  picture(runs: readonly string[]): Picture {
    const scene = this.#host.scene();
    const { items } = legendOf(this.#panelled, this.#lines, scene, this.#host, this.#say(scene));
    const legend = items
      .filter(({ isHidden }) => !isHidden)
      .map(({ label, value, look }) => ({ label, value, colour: colourOf(look, scene.theme), dash: look.dash }));
    return {
      ...{ name: this.name, runs, legend, lines: this.#lines, fitted: this.#fitted, unit: this.#unitOfAll(), scene },
      ...{ xTitle: xTitle(scene.axis), yTitle: this.#yTitle() },
      marks: (width) => marksOf(scene, this.#ownKeys(scene), width),
    };
  }

  #paint(chart: Plot): void {
    const scene = this.#host.scene();
    const xLabels = xTicks(scene.axis, scene.x, Math.max(2, Math.floor(chart.width / 75)));
    const yLabels = yTicks(this.#fitted.scale, Math.max(2, Math.floor(chart.height / 36)), this.#unitOfAll());
    const titled = this.#isMaximised();
    chart.setRoom(axisWidth(yLabels) + 6 + (titled ? TITLE : 0), 22 + (titled ? TITLE : 0));
    const { ctx, box, ratio } = chart;
    const brush: Brush = { ctx, ground: ctx.canvas, box, ratio, scene, y: this.#fitted.scale };
    paintBackground(brush);
    paintAxes(brush, xLabels, yLabels);
    if (titled) paintTitles(brush, [xTitle(scene.axis), this.#yTitle()], 4 * ratio, ctx.canvas.height - 2 * ratio);
    const lines = this.#lines;
    paintLines(brush, lines, this.#marks);
    const isHidden = this.shown(scene).length === 0;
    if (lines.length === 0) paintText(brush, isHidden ? "all curves are hidden" : "no values yet", "middle");
    else if (this.#fitted.belowZero > 0) paintText(brush, `${this.#fitted.belowZero} of 0 or less not shown`, "foot");
    paintOutside(brush, lines, this.#fitted);
  }

  /** The kind of y axis that this panel has. */
  #viewOf(scene: Scene): Pick<Scene, "logY"> {
    return { logY: scene.scaleIn(this.name)?.log ?? scene.logY };
  }

  /** Keys of its metrics that the watched run has: events are those of that run. */
  #ownKeys(scene: Scene): ReadonlySet<string> {
    return new Set(this.curves.filter(({ run }) => run === scene.runs[0]).map(({ info }) => info.key));
  }

  /** Name of the y axis. */
  #yTitle(): string {
    const unit = this.#unitOfAll();
    const keys = new Set(this.curves.map(({ info }) => info.key));
    const name = keys.size === 1 ? ([...keys][0] as string) : this.name;
    return unit === "" || unit === "share" ? name : `${name} (${unit})`;
  }

  #isMaximised(): boolean {
    return this.figure.classList.contains("maximised");
  }

  // The cursor ----------------------------------------------------------------------------------------

  #hovered(left: number | null): void {
    const { width } = this.#chart?.size ?? { width: 1 };
    this.#host.moveCursor(left === null ? null : this.#host.scene().x.fromUnit(left / width), false);
  }

  #selected({ left, top, width, height }: Selection): void {
    const all = this.#chart?.size;
    if (!all) return;
    const { x } = this.#host.scene();
    const { scale } = this.#fitted;
    // What goes along one axis only takes all of the other one.
    if (width < all.width) this.#host.zoom(x.fromUnit(left / all.width), x.fromUnit((left + width) / all.width));
    if (height < all.height) {
      const digits = (value: number): number => Number(value.toPrecision(4));
      const [min, max] = [scale.fromUnit(1 - (top + height) / all.height), scale.fromUnit(1 - top / all.height)];
      this.#host.setRange(this, { min: digits(min), max: digits(max) });
    }
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
    const [events, cursor] = [this.#eventsAt(scene), scene.cursor];
    // Beside the mark where one looks, above the other panels
    const isLookedAt = this.#chart !== null && cursor !== null && this.figure.matches(":hover, :focus-within");
    setText(this.#place, cursor === null ? "" : [formatX(scene.axis, cursor), ...(isLookedAt ? [] : events)].join(" · "));
    const { width } = this.#chart?.size ?? { width: 0 };
    this.#tip.say(isLookedAt ? events : [], scene.x.toUnit(cursor ?? 0) * width, width);
    const { items, head } = legendOf(this.#panelled, this.#lines, scene, this.#host, this.#say(scene));
    // A line draws nothing, so there are no runs of groups to add.
    this.#legend.show(this.isLine ? items.filter(({ key }) => key !== "members") : items, head);
  }

  #say(scene: Scene): (curve: PanelCurve) => Said {
    const { cursor } = scene;
    if (cursor === null) return (curve) => this.#values.last(curve, scene, this.visible);
    return (curve) => this.#values.at(curve, scene, cursor);
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
    const { cursor } = scene;
    if (!this.#chart) return;
    const dots = (cursor === null ? [] : this.#lines).flatMap((line): Dot[] => {
      const index = indexAt(line.curve, line.scene, cursor as number);
      if (index < 0) return [];
      const { curve, values, look } = line;
      const x = scene.x.toUnit((curve[scene.column][index] as number) - line.scene.origin);
      return [{ x, y: this.#fitted.scale.toUnit(values[index] as number), colour: cssColour(look) }];
    });
    this.#dots.show(dots, this.#chart.size);
  }
}
