// One panel: a figure with a name, a legend that shows values, and a plot.
//
// uPlot gives the plot its canvas, axes, cursor and selection. Its scales run from 0 to 1 and it holds no data:
// curves are drawn from the store's columns as they are, each with points of its own (uPlot wants all curves
// of a plot over one column of x), and an axis can turn logarithmic without a new plot.

import uPlot from "uplot";

import { h, iconButton, setAttribute, setIcon, setText } from "../dom";
import type { Latest, SeriesInfo } from "../protocol";
import { toNumber } from "../protocol";
import { formatWithUnit, formatX, Scale, type Ticks, xTicks, yTicks } from "./axes";
import { type Drawn, type Fit, fit, isSquashed } from "./fit";
import { assignSlots, Legend, type PanelCurve } from "./legend";
import { type Mark, marksOf, textOf } from "./marks";
import { type Brush, FONT_SIZE, type Line, paintBackground, paintLines, paintOutside, paintText } from "./paint";
import { bestOf, indexAt, markText, trend } from "./reading";
import type { Scene } from "./scene";
import type { Curve } from "./series_store";
import { Smoothed } from "./smoothing";
import { dash, hue } from "./theme";

/** What a panel asks of the page it is on. */
export interface PanelHost {
  scene(): Scene;
  /** The curve as it is to be drawn now. */
  curve(id: number): Curve | null;
  latest(id: number): Latest["values"][string] | null;
  moveCursor(x: number | null, pinned: boolean): void;
  zoom(min: number, max: number): void;
  resetZoom(): void;
  toggleUsual(panel: Panel): void;
  toggleCurve(key: string): void;
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
  readonly #smoothed = new WeakMap<Curve, Smoothed>();
  readonly #resize: ResizeObserver;
  #dots: HTMLElement[] = [];
  #chart: uPlot | null = null;
  #fitted: Fit = { scale: new Scale(0, 1), belowZero: 0, above: 0, below: 0, isAtLeast: false };
  #xTicks: Ticks = { values: [], labels: [] };
  #yTicks: Ticks = { values: [], labels: [] };
  /** Steps that the weight of smoothing is for: how far the points of the densest curve are apart. */
  #unit = 1;
  #marks: Mark[] = [];
  #summarised = 0;
  #moving = false;

  constructor(
    readonly name: string,
    readonly group: string,
    host: PanelHost,
  ) {
    this.#host = host;
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
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    this.plot.addEventListener("blur", () => host.moveCursor(null, true));
    this.#resize = new ResizeObserver(() => {
      if (this.#fit()) host.resized(this);
    });
  }

  addCurve(info: SeriesInfo): void {
    this.curves.push({ info, slot: 0 });
    assignSlots(this.curves);
    this.#legend.add(info, () => this.#host.toggleCurve(info.key), this.curves);
  }

  /** The part of its curves that is switched on. */
  shown(scene: Scene): PanelCurve[] {
    return this.curves.filter(({ info }) => !scene.hidden.has(info.key));
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
    const curves = this.curves.map(({ info }) => this.#host.curve(info.id));
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
    const distances = this.curves.map(({ info }) => this.#host.curve(info.id)?.cadence ?? Infinity);
    const unit = Math.min(...distances);
    this.#unit = Number.isFinite(unit) ? unit : 1;
    this.#fitted = fit(this.#drawnCurves(scene), scene, scene.usual.has(this.name));
    this.#marks = marksOf(scene, new Set(this.curves.map(({ info }) => info.key)), plotSize(chart).width);
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
      this.#usualButton.classList.toggle("suggested", isSquashed(this.#drawnCurves(scene), scene));
    }
  }

  /** Last value, best value and trend of each curve, as a sentence. */
  summary(): string {
    const scene = this.#host.scene();
    const parts = this.shown(scene).map(({ info }) => {
      const curve = this.#host.curve(info.id);
      const last = curve?.last;
      if (!curve || !last) return `${info.label}: no values yet`;
      const best = bestOf(curve, info);
      const bestText = best ? `, best ${formatWithUnit(best.value, info.unit)} at step ${best.step}` : "";
      const marks = curve.marks.reduce((total, mark) => total + mark[3], 0);
      const notFinite = marks > 0 ? `, ${marks} values not finite` : "";
      return `${info.label}: last ${formatWithUnit(last.value, info.unit)} at step ${last.step}${bestText}, ${trend(curve)}${notFinite}`;
    });
    return parts.length > 0 ? `${parts.join("; ")}.` : "All curves are hidden.";
  }

  /** What the cursor shows, as a sentence. */
  readOut(): string {
    const scene = this.#host.scene();
    if (scene.cursor === null) return this.summary();
    const values = this.shown(scene).map(({ info }) => {
      const [value, raw] = this.#valueAt(info, scene, scene.cursor as number);
      return raw === "" ? `${info.label} ${value || "none"}` : `${info.label} ${value}, raw ${raw}`;
    });
    return [formatX(scene.axis, scene.cursor), ...values, ...this.#eventsAt(scene)].join(", ");
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

  #drawnCurves(scene: Scene): Drawn[] {
    return this.shown(scene).flatMap(({ info }) => {
      const curve = this.#host.curve(info.id);
      return curve ? [{ curve, values: this.#values(curve, scene) }] : [];
    });
  }

  #values(curve: Curve, scene: Scene): Float64Array {
    if (scene.smoothing === 0) return curve.value;
    let smoothed = this.#smoothed.get(curve);
    if (smoothed?.weight !== scene.smoothing || smoothed.unit !== this.#unit) {
      smoothed = new Smoothed(scene.smoothing, this.#unit);
      this.#smoothed.set(curve, smoothed);
    }
    return smoothed.update(curve);
  }

  #brush({ ctx, bbox }: uPlot): Brush {
    return { ctx, box: bbox, ratio: devicePixelRatio, scene: this.#host.scene(), y: this.#fitted.scale };
  }

  #paint(chart: uPlot): void {
    const brush = this.#brush(chart);
    const { scene } = brush;
    const shown = this.shown(scene);
    const lines = shown.flatMap(({ info, slot }): Line[] => {
      const curve = this.#host.curve(info.id);
      if (!curve || (curve.length === 0 && curve.marks.length === 0)) return [];
      const [colour, values] = [scene.theme.hues[hue(slot)] as string, this.#values(curve, scene)];
      return [{ curve, values, colour, dash: dash(slot), best: bestOf(curve, info) }];
    });
    paintLines(brush, lines, this.#marks);
    if (lines.length === 0) paintText(brush, shown.length === 0 ? "all curves are hidden" : "no values yet", "middle");
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

  /** The curve whose points the arrow keys go along: the one with the most. */
  #longest(scene: Scene): Curve | null {
    let longest: Curve | null = null;
    for (const { info } of this.shown(scene)) {
      const curve = this.#host.curve(info.id);
      if (curve && curve.length > (longest?.length ?? 0)) longest = curve;
    }
    return longest;
  }

  #key(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const scene = this.#host.scene();
    const curve = this.#longest(scene);
    const { min, max } = scene.x;
    const centre = scene.cursor ?? (min + max) / 2;
    const move = (by: number): void => {
      if (!curve) return;
      const places = curve[scene.column];
      const [first, last] = [
        curve.search(scene.column, min + scene.origin),
        curve.search(scene.column, max + scene.origin),
      ];
      const here =
        scene.cursor === null ? (by < 0 ? last : first - 1) : curve.nearest(scene.column, scene.cursor + scene.origin);
      const index = Math.max(first, Math.min(here + by, Math.min(last, curve.length - 1)));
      this.#host.moveCursor((places[index] as number) - scene.origin, true);
      this.#describeCursor();
    };
    const page = curve ? Math.max(1, Math.round(curve.length / 20)) : 1;
    const scale = (factor: number): void => {
      this.#host.zoom(centre - (centre - min) * factor, centre + (max - centre) * factor);
    };
    const keys: Record<string, () => void> = {
      ArrowLeft: () => move(event.shiftKey ? -10 : -1),
      ArrowRight: () => move(event.shiftKey ? 10 : 1),
      PageUp: () => move(page),
      PageDown: () => move(-page),
      Home: () => move(-Infinity),
      End: () => move(Infinity),
      Enter: () => this.#host.announce(this.readOut()),
      " ": () => this.#host.announce(this.readOut()),
      "+": () => scale(0.5),
      "-": () => scale(2),
      "0": () => this.#host.resetZoom(),
      Escape: () => this.#host.moveCursor(null, true),
    };
    const action = keys[event.key];
    if (!action || (event.key === "Escape" && scene.cursor === null)) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  #describeCursor(): void {
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
    for (const { info } of this.curves) {
      const [value, raw] =
        scene.cursor === null ? this.#lastValue(info, scene) : this.#valueAt(info, scene, scene.cursor);
      const best = this.#bestValue(info);
      this.#legend.say(info.key, {
        isHidden: scene.hidden.has(info.key),
        value,
        raw,
        best: best === null ? "" : formatWithUnit(best, info.unit),
      });
    }
  }

  /** The last value as it is drawn, and its raw one where that is another; also of a curve whose points are not here. */
  #lastValue(info: SeriesInfo, scene: Scene): [string, string] {
    const latest = this.#host.latest(info.id)?.[0] ?? null;
    const curve = this.#host.curve(info.id);
    if (!curve || !this.visible) return [latest === null ? "" : formatWithUnit(toNumber(latest), info.unit), ""];
    const mark = curve.marks.at(-1);
    const last = curve.last;
    if (mark && (last === null || mark[1] > last.step)) return [markText(mark[2]), ""];
    return last ? this.#drawn(info, curve, curve.length - 1, scene) : ["", ""];
  }

  /** The value of a point as it is drawn; and its raw one, where that is another. */
  #drawn(info: SeriesInfo, curve: Curve, index: number, scene: Scene): [string, string] {
    const raw = formatWithUnit(curve.value[index] as number, info.unit);
    if (scene.smoothing === 0) return [raw, ""];
    return [formatWithUnit(this.#values(curve, scene)[index] as number, info.unit), raw];
  }

  #bestValue(info: SeriesInfo): number | null {
    if (info.better === null) return null;
    const curve = this.#host.curve(info.id);
    const latest = this.#host.latest(info.id);
    const known = [curve ? bestOf(curve, info)?.value : null, latest?.[info.better === "min" ? 1 : 3]];
    const values = known.filter((value) => typeof value === "number");
    return values.length > 0 ? (info.better === "min" ? Math.min : Math.max)(...values) : null;
  }

  /** The value of a curve at x, as it is drawn; and its raw one, where that is another. */
  #valueAt(info: SeriesInfo, scene: Scene, x: number): [string, string] {
    const curve = this.#host.curve(info.id);
    if (!curve) return ["", ""];
    const index = indexAt(curve, scene, x);
    const mark = curve.marks.find(([start, end]) => {
      const [first, last] = [scene.placeOf(start), scene.placeOf(end)];
      if (first === null || last === null) return false;
      if (x >= first && x <= last) return true;
      const distance = Math.min(Math.abs(x - first), Math.abs(x - last));
      return index < 0 || distance < Math.abs((curve[scene.column][index] as number) - scene.origin - x);
    });
    if (mark) return [markText(mark[2]), ""];
    if (index < 0) return ["", ""];
    return this.#drawn(info, curve, index, scene);
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
    const shown = scene.cursor === null ? [] : this.shown(scene);
    while (this.#dots.length < shown.length) {
      const made = h("div", { class: "chart-dot" });
      chart.over.append(made);
      this.#dots.push(made);
    }
    const { width, height } = plotSize(chart);
    this.#dots.forEach((made, position) => {
      const one = shown[position];
      const curve = one && this.#host.curve(one.info.id);
      const index = curve ? indexAt(curve, scene, scene.cursor as number) : -1;
      const x = curve && index >= 0 ? scene.x.toUnit((curve[scene.column][index] as number) - scene.origin) : NaN;
      const y = curve && index >= 0 ? this.#fitted.scale.toUnit(this.#values(curve, scene)[index] as number) : NaN;
      const inside = x >= 0 && x <= 1 && y >= 0 && y <= 1;
      made.hidden = !inside;
      if (!inside) return;
      made.style.background = `var(--chart-${hue((one as PanelCurve).slot) + 1})`;
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
