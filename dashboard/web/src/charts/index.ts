// The charts of the page: panels in groups, one bar above them, and what passes between them and the server.
//
//     chart frames ──> SeriesStore ──┐
//     status, marks, view ───────────┴─> one animation frame ─> every visible panel is drawn ─> drawn()
//
// A panel that is not on the screen holds no canvas, and its curves are not sent.

import type { ChartFrame, Latest, RangeQuery, RunInfo, SeriesInfo, Show, Status } from "../protocol";
import { MAX_SERIES_SHOWN } from "../protocol";
import type { Axis, View, ViewState } from "../view";
import { Scale } from "./axes";
import { fileName, save } from "./dom";
import { readCsv, readPng } from "./export";
import { Layout } from "./layout";
import { Panel, type PanelHost } from "./panel";
import { type Answer, NoAnswer, Ranges } from "./ranges";
import type { ChartEvent, Scene } from "./scene";
import { type Column, Curve, SeriesStore } from "./series_store";
import { showTable } from "./table";
import { readTheme, type Theme, watchTheme } from "./theme";
import { Toolbar } from "./toolbar";
import { listenToTouch } from "./touch";

export interface ChartsHost {
  send(message: Show | RangeQuery): void;
  /** Credit for the next chart frame: one call for each that was applied, after it is on the screen. */
  drawn(): void;
  view: View;
  announce(text: string): void;
}

/** A panel that has left the screen keeps its curves coming for so long, in milliseconds: it may come back. */
const LINGER = 1_500;
/** Panels so near to the screen count as visible. */
const MARGIN = "160px";
/** How long a zoom must rest before finer points are asked for, in milliseconds. */
const ZOOM_REST = 120;
/** Milliseconds between two questions for the same moving window. */
const ZOOM_AGAIN = 5_000;
/** Points before a zoom that are kept with it, so that smoothing begins where it did. */
const WARM_UP = 1_500;
/** Events of a kind that are kept; older ones are let go. */
const MAX_EVENTS = 500;
/** Curves that are kept though their panels are not on the screen. */
const MAX_UNSEEN = 200;
/** Milliseconds between two updates of the values beside the curves' names: text costs more than lines. */
const VALUES_INTERVAL = 300;
/** Milliseconds between two looks at what is constant. */
const SORT_INTERVAL = 1_000;
const COLUMNS: Readonly<Record<Axis, Column>> = { step: "step", epoch: "epoch", time: "time", wall: "time" };

/** Finer points of a curve, for a zoom. */
interface Detail {
  curve: Curve;
  column: Column;
  /** The part of the column that they were asked for; Infinity where it went to the newest point. */
  from: number;
  to: number;
}

export class Charts {
  readonly #root: HTMLElement;
  readonly #host: ChartsHost;
  readonly #toolbar: Toolbar;
  readonly #layout: Layout;
  readonly #ranges: Ranges;
  readonly #observer: IntersectionObserver;

  #store = new SeriesStore();
  #run: RunInfo | null = null;
  #series = new Map<number, SeriesInfo>();
  #panels = new Map<string, Panel>();
  #byFigure = new Map<Element, Panel>();
  #tables = new Map<Panel, HTMLElement>();
  #latest: Latest["values"] = {};
  #status: Status | null = null;
  #events: ChartEvent[] = [];
  #details = new Map<number, Detail>();
  #connected = true;

  #theme: Theme;
  #cursor: number | null = null;
  #pinned = false;
  /** Where the mouse is, from 0 to 1 along the x axis; null if the cursor is not its. */
  #mouse: number | null = null;
  #scene: Scene | null = null;

  #frame: number | null = null;
  #credits = 0;
  #shown: number[] = [];
  /** Points of each curve that were asked for. */
  #shownPoints = 0;
  #leaving = new Map<Panel, ReturnType<typeof setTimeout>>();
  #asked = { key: "", at: -Infinity };
  #asking = false;
  #zoomTimer: { key: string; timer: ReturnType<typeof setTimeout> } | null = null;
  #tableTime = 0;
  #sorted = -Infinity;
  #sortTimer: ReturnType<typeof setTimeout> | undefined;
  #valuesShown = -Infinity;
  #valuesTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(root: HTMLElement, host: ChartsHost) {
    this.#root = root;
    this.#host = host;
    this.#ranges = new Ranges((query) => host.send({ ...query, run: this.#run?.key }));
    this.#toolbar = new Toolbar({
      view: host.view,
      setAxis: (axis) => this.#setAxis(axis),
      setFollow: (follow) => this.#setFollow(follow),
    });
    root.classList.add("charts");
    this.#layout = new Layout(root, host.view);
    root.append(this.#toolbar.root, this.#layout.empty, this.#layout.body);
    this.#theme = readTheme(root);
    this.#observer = new IntersectionObserver((entries) => this.#intersected(entries), { rootMargin: MARGIN });
    host.view.subscribe((state, previous) => this.#viewChanged(state, previous));
    watchTheme(() => {
      this.#theme = readTheme(root);
      this.#redraw();
    });
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented) host.view.set({ panel: null });
    });
  }

  // What comes from the server ------------------------------------------------------------------------

  /** Another run, or the same one after a new connection: all curves start anew; zoom and switches stay. */
  reset(run: RunInfo | null): void {
    const same = run !== null && run.key === this.#run?.key;
    this.#run = run;
    this.#ranges.abandon("the connection was lost");
    this.#asked = { key: "", at: -Infinity };
    this.#shown = [];
    if (same) {
      // Curves and panels stay until their snapshots come: the page does not flicker.
      this.#store.interrupted();
      this.#series.clear();
    } else {
      this.#store = new SeriesStore();
      this.#details.clear();
      this.#latest = {};
      this.#status = null;
      this.#events = [];
      this.#cursor = null;
      for (const panel of this.#panels.values()) this.#removePanel(panel);
      this.#layout.clear();
      this.#series.clear();
    }
    this.#filter();
    this.#redraw();
  }

  addSeries(series: SeriesInfo[]): void {
    for (const info of series) {
      if (this.#series.has(info.id)) continue;
      this.#series.set(info.id, info);
      const panel = this.#panels.get(info.panel) ?? this.#addPanel(info.panel, info.group);
      const known = panel.curves.find((curve) => curve.info.key === info.key);
      if (known && known.info.id !== info.id) {
        for (const id of [known.info.id, info.id]) this.#forget(id);
      }
      if (known) known.info = info;
      else panel.addCurve(info);
    }
    this.#filter();
    this.#subscribe();
    this.#redraw();
  }

  applyChart(frame: ChartFrame): void {
    // Credit is owed for every frame, also for one that belongs to a run that is no longer shown.
    this.#credits++;
    if (this.#run === null || frame.header.run === this.#run.key) {
      if (frame.header.kind === "range") {
        this.#ranges.take(frame);
      } else {
        this.#store.apply(frame);
        this.#extendDetails(frame);
      }
    }
    this.#redraw();
  }

  #forget(id: number): void {
    this.#store.curves.delete(id);
    this.#details.delete(id);
  }

  applyLatest(latest: Latest): void {
    Object.assign(this.#latest, latest.values);
    this.#showValues();
  }

  applyStatus(status: Status): void {
    const before = this.#status;
    this.#status = status;
    if (status.trimmed !== before?.trimmed) this.#redraw();
  }

  addMark(mark: ChartEvent): void {
    // After a new connection events may come again.
    const known = ({ step, kind, text }: ChartEvent): boolean =>
      step === mark.step && kind === mark.kind && text === mark.text;
    if (this.#events.some(known)) return;
    this.#events.push(mark);
    const alike = this.#events.filter(({ kind }) => kind === mark.kind);
    if (alike.length > MAX_EVENTS) this.#events.splice(this.#events.indexOf(alike[0] as ChartEvent), 1);
    this.#redraw();
  }

  setConnected(connected: boolean): void {
    this.#connected = connected;
    if (!connected) {
      this.#ranges.abandon("the connection was lost");
      this.#credits = 0; // what is owed is owed to the server that is gone
    }
    for (const panel of this.#panels.values()) panel.csvButton.disabled = !connected;
  }

  /** Put the cursor of all panels at a step, into view. */
  goTo(step: number): void {
    const scene = this.#getScene();
    const x = scene.placeOf(step);
    if (x === null) return;
    const zoom = this.#host.view.get().zoom;
    if (zoom && (x < scene.x.min || x > scene.x.max)) {
      const half = (scene.x.max - scene.x.min) / 2;
      this.#host.view.set({ zoom: { min: x - half, max: x + half }, follow: false });
    }
    this.#moveCursor(x, true);
  }

  // Panels --------------------------------------------------------------------------------------------

  #addPanel(name: string, group: string): Panel {
    const panel = new Panel(name, group, this.#panelHost());
    this.#panels.set(name, panel);
    this.#byFigure.set(panel.figure, panel);
    panel.csvButton.disabled = !this.#connected;
    panel.setMaximised(this.#host.view.get().panel === name);
    listenToTouch(panel, this.#panelHost());
    this.#layout.add(panel);
    this.#observer.observe(panel.figure);
    return panel;
  }

  #removePanel(panel: Panel): void {
    this.#observer.unobserve(panel.figure);
    clearTimeout(this.#leaving.get(panel));
    this.#leaving.delete(panel);
    this.#tables.delete(panel);
    this.#panels.delete(panel.name);
    this.#byFigure.delete(panel.figure);
    panel.destroy();
  }

  #panelHost(): PanelHost {
    return {
      scene: () => this.#getScene(),
      curve: (id) => this.#curve(id),
      latest: (id) => this.#latest[String(id)] ?? null,
      moveCursor: (x, pinned) => this.#moveCursor(x, pinned),
      zoom: (min, max) => this.#zoom(min, max),
      resetZoom: () => this.#host.view.set({ zoom: null, follow: false }),
      toggleUsual: (panel) => this.#host.view.toggle("usual", panel.name),
      toggleCurve: (key) => this.#host.view.toggle("hidden", key),
      toggleMaximised: (panel) => {
        this.#host.view.set({ panel: this.#host.view.get().panel === panel.name ? null : panel.name });
        panel.maximiseButton.focus();
      },
      toggleTable: (panel) => this.#toggleTable(panel),
      savePicture: (panel) => void this.#savePicture(panel),
      saveCsv: (panel) => void this.#saveCsv(panel),
      announce: (text) => this.#host.announce(text),
      resized: () => {
        this.#subscribe();
        this.#redraw();
      },
    };
  }

  /** Once a second: what has become constant takes a line. */
  #sort(): void {
    const wait = this.#sorted + SORT_INTERVAL - performance.now();
    if (wait > 0) {
      this.#sortTimer ??= setTimeout(() => {
        this.#sortTimer = undefined; // first: a timer may be a little early, and then another one is needed
        this.#sort();
      }, wait);
      return;
    }
    clearTimeout(this.#sortTimer);
    this.#sortTimer = undefined;
    this.#sorted = performance.now();
    if (!this.#layout.sort()) return;
    this.#filter();
    this.#redraw();
  }

  #filter(): void {
    const { found, all } = this.#layout.filter();
    this.#toolbar.setCount(found, all);
  }

  #intersected(entries: IntersectionObserverEntry[]): void {
    for (const { target, isIntersecting } of entries) {
      const panel = this.#byFigure.get(target);
      if (!panel) continue;
      clearTimeout(this.#leaving.get(panel));
      this.#leaving.delete(panel);
      if (isIntersecting) {
        panel.setVisible(true);
      } else if (panel.visible) {
        const leave = (): void => {
          this.#leaving.delete(panel);
          panel.setVisible(false);
          this.#subscribe();
        };
        this.#leaving.set(panel, setTimeout(leave, LINGER));
      }
    }
    this.#subscribe();
    this.#redraw();
  }

  /** Tell the server which curves are on the screen, if they are others than before. */
  #subscribe(): void {
    const visible = [...this.#panels.values()].filter((panel) => panel.visible);
    const wanted = visible
      .flatMap((panel) => panel.curves.map(({ info }) => info.id))
      .filter((id) => this.#series.has(id));
    const series = wanted.slice(0, MAX_SERIES_SHOWN).sort((one, other) => one - other);
    const points = this.#points(visible);
    // Curves of a panel that has grown, as when it is maximised, come anew with as many points as it can show.
    const grown =
      points > 1.5 * this.#shownPoints && series.some((id) => (this.#store.curves.get(id)?.reducedTo ?? -1) >= 0);
    if (this.#run === null || (series.join() === this.#shown.join() && !grown)) return;
    const run = this.#run.key;
    if (grown && this.#shown.length > 0) this.#host.send({ type: "show", run, series: [] });
    this.#shown = series;
    this.#shownPoints = points;
    // A snapshot will bring them back.
    const unseen = [...this.#store.curves.keys()].filter((id) => !series.includes(id));
    for (const id of unseen.slice(0, Math.max(0, unseen.length - MAX_UNSEEN))) this.#forget(id);
    this.#host.send({ type: "show", run, series, points });
  }

  /** Twice the width of the widest panel: one least and one greatest point for each pixel. */
  #points(visible: Panel[]): number {
    return Math.max(400, Math.min(4_000, 2 * Math.ceil(Math.max(0, ...visible.map((panel) => panel.width)))));
  }

  // Drawing -------------------------------------------------------------------------------------------

  #redraw(): void {
    this.#scene = null;
    this.#frame ??= requestAnimationFrame(() => this.#draw());
  }

  #draw(): void {
    this.#frame = null;
    this.#scene = null;
    const visible = [...this.#panels.values()].filter((panel) => panel.visible);
    try {
      for (const panel of visible) panel.draw();
      this.#showValues();
      this.#sort();
      this.#refreshTables();
      this.#askForDetail();
    } finally {
      // Also after a mistake of ours: else no frame would come any more.
      for (; this.#credits > 0; this.#credits--) this.#host.drawn();
    }
  }

  /** Write the values into the legends: at once under a cursor, else as often as one can read them. */
  #showValues(): void {
    const now = performance.now();
    if (this.#cursor === null && now < this.#valuesShown + VALUES_INTERVAL) {
      // Late: while the charts are drawn, one of their frames comes before, and saves one for the values alone.
      this.#valuesTimer ??= setTimeout(() => this.#showValues(), 1.5 * VALUES_INTERVAL);
      return;
    }
    clearTimeout(this.#valuesTimer);
    this.#valuesTimer = undefined;
    this.#valuesShown = now;
    for (const panel of this.#panels.values()) if (panel.visible) panel.showCursor();
  }

  #getScene(): Scene {
    return (this.#scene ??= this.#makeScene());
  }

  #makeScene(): Scene {
    const { axis, logX, logY, smoothing, hidden, usual, unmarked } = this.#host.view.get();
    // A root that was not in the document yet had no colours.
    if (this.#theme.text === "") this.#theme = readTheme(this.#root);
    const column = COLUMNS[axis];
    const origin = axis === "time" ? this.#start() : 0;
    const x = this.#xScale(axis, logX && axis !== "wall");
    // The cursor of a mouse stays under the mouse, that of a key at its step.
    if (this.#cursor !== null && this.#mouse !== null) this.#cursor = x.fromUnit(this.#mouse);
    const scene: Scene = {
      axis,
      column,
      origin,
      x,
      logY,
      smoothing,
      hidden: new Set(hidden),
      usual: new Set(usual),
      unmarked: new Set(unmarked),
      gaps: this.#store.gaps,
      trimmed: this.#store.trimmed ?? this.#status?.trimmed ?? null,
      events: [],
      theme: this.#theme,
      cursor: this.#cursor,
      placeOf: (step) => this.#placeOf(step, column, origin),
    };
    scene.events = this.#events.flatMap((event) => {
      // An event knows its time itself; where its epoch is, the curves know.
      const x = column === "step" ? event.step : column === "time" ? event.time - origin : scene.placeOf(event.step);
      return x === null ? [] : [{ ...event, x }];
    });
    return scene;
  }

  /** Unix time at which the run started. */
  #start(): number {
    if (this.#run?.started) return this.#run.started;
    let start = Infinity;
    for (const curve of this.#store.curves.values())
      if (curve.length > 0) start = Math.min(start, curve.time[0] as number);
    return Number.isFinite(start) ? start : 0;
  }

  /** First and last place on the x axis that any curve has. */
  #reach(axis: Axis, positive: boolean): [number, number] | null {
    const column = COLUMNS[axis];
    const origin = axis === "time" ? this.#start() : 0;
    let [min, max] = [Infinity, -Infinity];
    for (const curve of this.#store.curves.values()) {
      const first = positive ? curve.search(column, origin + Number.MIN_VALUE) : 0;
      const skipped = positive && first < curve.length && (curve[column][first] as number) - origin <= 0 ? 1 : 0;
      if (first + skipped >= curve.length) continue;
      min = Math.min(min, (curve[column][first + skipped] as number) - origin);
      max = Math.max(max, (curve[column][curve.length - 1] as number) - origin);
    }
    // What is not finite has a step only.
    for (const curve of column === "step" ? this.#store.curves.values() : []) {
      const [begin, end] = [curve.marks[0]?.[0] ?? Infinity, curve.marks.at(-1)?.[1] ?? -Infinity];
      if (!positive || begin > 0) min = Math.min(min, begin);
      max = Math.max(max, end);
    }
    return min <= max ? [min, max] : null;
  }

  #xScale(axis: Axis, log: boolean): Scale {
    const { zoom, follow } = this.#host.view.get();
    const reach = this.#reach(axis, log);
    if (zoom && (!log || zoom.max > 0)) {
      const width = zoom.max - zoom.min;
      const [min, max] = follow && reach ? [reach[1] - width, reach[1]] : [zoom.min, zoom.max];
      return new Scale(log && !(min > 0) ? Math.min(reach?.[0] ?? 1, max / 10) : min, max, log);
    }
    if (!reach) return axis === "wall" ? new Scale(this.#start(), this.#start() + 60) : new Scale(log ? 1 : 0, 10, log);
    const [min, max] = reach;
    if (min < max) return new Scale(min, max, log);
    // One point: in the middle
    if (log) return new Scale(min / 10, max * 10, true);
    const air = axis === "epoch" ? 0.5 : axis === "step" ? Math.max(1, 0.1 * Math.abs(min)) : 30;
    return new Scale(min - air, max + air);
  }

  /** Where a step lies on the axis, by the curve that is known best; between two points in proportion. */
  #placeOf(step: number, column: Column, origin: number): number | null {
    if (column === "step") return step;
    return this.#translate(step, "step", column, origin);
  }

  #translate(value: number, from: Column, to: Column, origin = 0): number | null {
    let longest: Curve | null = null;
    for (const curve of this.#store.curves.values()) if (curve.length > (longest?.length ?? 0)) longest = curve;
    if (!longest) return null;
    const after = Math.min(longest.search(from, value), longest.length - 1);
    const before = Math.max(after - 1, 0);
    const [x0, x1] = [longest[from][before] as number, longest[from][after] as number];
    const [y0, y1] = [longest[to][before] as number, longest[to][after] as number];
    const share = x1 > x0 ? Math.max(0, Math.min(1, (value - x0) / (x1 - x0))) : 1;
    return y0 + share * (y1 - y0) - origin;
  }

  // The view ------------------------------------------------------------------------------------------

  #viewChanged(state: ViewState, previous: ViewState): void {
    this.#toolbar.show(state);
    const arranged = ["search", "panel", "folded", "columns", "height"] as const;
    if (arranged.some((name) => state[name] !== previous[name])) this.#filter();
    if (state.panel !== previous.panel) this.#sorted = -Infinity; // a constant that is maximised is a panel
    this.#valuesShown = -Infinity;
    if (state.zoom !== previous.zoom && state.zoom === null) this.#details.clear();
    if (state.axis !== previous.axis) this.#cursor = this.#mouse = null;
    this.#redraw();
  }

  /** Show another x axis; a zoom stays where it is in the run. */
  #setAxis(axis: Axis): void {
    const { axis: before, zoom } = this.#host.view.get();
    if (axis === before) return;
    const move = (value: number): number | null => {
      const place = this.#translate(value + (before === "time" ? this.#start() : 0), COLUMNS[before], COLUMNS[axis]);
      return place === null ? null : place - (axis === "time" ? this.#start() : 0);
    };
    const [min, max] = zoom ? [move(zoom.min), move(zoom.max)] : [null, null];
    this.#host.view.set({ axis, zoom: min !== null && max !== null && min < max ? { min, max } : null });
  }

  #setFollow(follow: boolean): void {
    const { zoom, axis } = this.#host.view.get();
    const reach = this.#reach(axis, false);
    // Without a zoom there is nothing to move along: then the last quarter of what there is
    if (follow && !zoom && reach && reach[0] < reach[1]) {
      this.#host.view.set({ follow, zoom: { min: reach[1] - (reach[1] - reach[0]) / 4, max: reach[1] } });
    } else {
      const { x } = this.#getScene();
      // Where it is when it stops, it stays.
      this.#host.view.set(follow || !zoom ? { follow } : { follow, zoom: { min: x.min, max: x.max } });
    }
  }

  #zoom(min: number, max: number): void {
    const { axis, logX } = this.#host.view.get();
    const log = logX && axis !== "wall";
    const reach = this.#reach(axis, log);
    if (!reach) return;
    [min, max] = [Math.max(min, reach[0]), Math.min(max, reach[1])];
    if (min <= reach[0] && max >= reach[1]) return this.#host.view.set({ zoom: null, follow: false });
    // Not into what a double cannot tell apart
    const least = Math.max(axis === "step" ? 1 : 1e-6, 1e-12 * Math.abs(max));
    if (max - min < least) return;
    this.#host.view.set({ zoom: { min, max }, follow: false });
  }

  #moveCursor(x: number | null, pinned: boolean): void {
    // The mouse that leaves does not take a cursor away that was put there
    if (x === null && !pinned && this.#pinned) return;
    this.#pinned = pinned && x !== null;
    this.#mouse = pinned || x === null ? null : this.#getScene().x.toUnit(x);
    if (x === this.#cursor) return;
    this.#cursor = x;
    this.#valuesShown = -Infinity;
    if (this.#scene) this.#scene.cursor = x;
    for (const panel of this.#panels.values()) if (panel.visible) panel.showCursor();
  }

  // Zoom ----------------------------------------------------------------------------------------------

  #curve(id: number): Curve | null {
    const detail = this.#details.get(id);
    if (detail && this.#scene) {
      const { column, x, origin } = this.#scene;
      if (detail.column === column && x.min + origin >= detail.from && x.max + origin <= detail.to) return detail.curve;
    }
    return this.#store.curves.get(id) ?? null;
  }

  /** If what is zoomed to holds reduced points, ask for finer ones. */
  #askForDetail(): void {
    const { zoom, axis, follow } = this.#host.view.get();
    if (!zoom || !this.#connected || this.#asking) return;
    const { x, origin, column } = this.#getScene();
    const [from, to] = [x.min + origin, x.max + origin];
    const visible = [...this.#panels.values()].filter((panel) => panel.visible && !panel.figure.hidden);
    const ids = visible
      .flatMap((panel) => panel.curves.map(({ info }) => info.id))
      .filter((id) => this.#shown.includes(id) && this.#isCoarse(id, column, from));
    // A window that moves is asked for now and then, one that rests once.
    const key = follow ? `${column} ${to - from}` : `${column} ${from} ${to} ${ids.join()}`;
    const now = performance.now();
    if (ids.length === 0 || (key === this.#asked.key && !(follow && now - this.#asked.at > ZOOM_AGAIN))) return;
    // While fingers or the wheel still move the zoom, the wait begins anew with each change.
    if (this.#zoomTimer?.key === key) return;
    if (this.#zoomTimer !== null) clearTimeout(this.#zoomTimer.timer);
    const ask = (): void => {
      this.#zoomTimer = null;
      this.#asked = { key, at: performance.now() };
      void this.#fetchDetail(ids, column, from, to, this.#points(visible));
    };
    this.#zoomTimer = { key, timer: setTimeout(ask, ZOOM_REST) };
  }

  #isCoarse(id: number, column: Column, from: number): boolean {
    const curve = this.#curve(id);
    if (!curve || curve.length === 0) return false;
    const first = curve.search(column, from);
    return first < curve.length && curve.reducedTo >= (curve.step[first] as number);
  }

  async #fetchDetail(ids: number[], column: Column, from: number, to: number, points: number): Promise<void> {
    this.#asking = true;
    try {
      const answer = await this.#ranges.ask({ series: ids, start: from, end: to, axis: column, points });
      if (this.#host.view.get().zoom === null) return;
      for (const id of ids) this.#showDetail(id, answer, column, from, to);
      this.#store.addGaps(answer.gaps);
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
    } finally {
      this.#asking = false;
      this.#redraw();
    }
  }

  /** Put finer points in the place of those that a curve has there. */
  #showDetail(id: number, answer: Answer, column: Column, from: number, to: number): void {
    const [curve, part] = [this.#store.curves.get(id), answer.parts.get(id)];
    if (!curve || !part) return;
    const fine = new Curve();
    const first = curve.search(column, from);
    fine.copy(curve, Math.max(first - WARM_UP, 0), first);
    // The answer begins with the neighbour before the zoom, which may be there already.
    const begin = (part.step[0] as number) <= (fine.last?.step ?? -Infinity) ? 1 : 0;
    fine.copy(part, begin, part.step.length);
    const last = fine.last?.step ?? -Infinity;
    const next = curve.after("step", last);
    fine.copy(curve, next, curve.length);
    fine.addMarks(curve.marks);
    const newest = next >= curve.length;
    [fine.least, fine.greatest] = [curve.least, curve.greatest];
    fine.copyCadence(curve);
    fine.reducedTo = part.reduced ? last : -Infinity;
    this.#details.set(id, { curve: fine, column, from, to: newest ? Infinity : to });
  }

  /** New points belong to a curve's finer copy, too. */
  #extendDetails(frame: ChartFrame): void {
    for (const { id, marks } of frame.header.series) {
      const detail = this.#details.get(id);
      const curve = this.#store.curves.get(id);
      if (!detail || !curve) continue;
      if (frame.header.kind === "snapshot") {
        this.#details.delete(id);
        this.#asked.key = "";
        continue;
      }
      detail.curve.copy(curve, curve.after("step", detail.curve.last?.step ?? -Infinity), curve.length);
      detail.curve.addMarks(marks);
      [detail.curve.least, detail.curve.greatest] = [curve.least, curve.greatest];
    }
  }

  // Tables and files ----------------------------------------------------------------------------------

  #toggleTable(panel: Panel): void {
    const open = this.#tables.get(panel);
    panel.tableButton.setAttribute("aria-expanded", String(!open));
    if (open) {
      this.#tables.delete(panel);
      open.remove();
      return;
    }
    const table = showTable(panel, this.#panelHost());
    this.#tables.set(panel, table);
    panel.figure.append(table);
  }

  /** Once a second, and not while somebody reads: what is focused or under the mouse stays as it is. */
  #refreshTables(): void {
    if (this.#tables.size === 0 || performance.now() - this.#tableTime < 1_000) return;
    this.#tableTime = performance.now();
    for (const [panel, table] of this.#tables) {
      if (!panel.visible || table.matches(":hover, :focus-within")) continue;
      const fresh = showTable(panel, this.#panelHost());
      fresh.scrollTop = table.scrollTop;
      table.replaceWith(fresh);
      this.#tables.set(panel, fresh);
    }
  }

  async #savePicture(panel: Panel): Promise<void> {
    const blob = panel.canvas && (await readPng(panel.canvas, panel.name, panel.shown(this.#getScene()), this.#theme));
    if (blob) save(blob, `${fileName(this.#run?.name ?? "", panel.name)}.png`);
  }

  async #saveCsv(panel: Panel): Promise<void> {
    const series = panel.curves.map(({ info }) => info);
    const name = `${fileName(this.#run?.name ?? "", panel.name)}.csv`;
    const steps = series.map(({ id }) => this.#store.curves.get(id)?.last?.step ?? 0);
    const lastStep = Math.max(this.#status?.step ?? 0, ...steps);
    panel.csvButton.disabled = true;
    panel.csvButton.classList.add("busy");
    try {
      save(await readCsv(this.#ranges, series, lastStep), name);
      this.#host.announce(`Saved ${name}.`);
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
      this.#host.announce(`${name} was not saved: ${error.message}.`);
    } finally {
      panel.csvButton.disabled = !this.#connected;
      panel.csvButton.classList.remove("busy");
    }
  }
}
