// The charts of the page: panels in groups, one bar above them, and what passes between them and the server.
//
//     chart frames, marks, status ──> RunCurves ──┐
//     view ──> Layout, Toolbar ───────────────────┴─> one animation frame ─> every visible panel is drawn ─> drawn()
//
// A run's curves and what happened in it are in `run_curves.ts`, finer points for a zoom in `details.ts`, the places
// of panels in `layout.ts`; here is the frame loop, and what the curves on the screen are to the server.
// A panel that is not on the screen holds no canvas, and its curves are not sent.

import type { ChartFrame, Latest, RangeQuery, RunInfo, SeriesInfo, Show, Status } from "../protocol";
import { MAX_SERIES_SHOWN } from "../protocol";
import type { Axis, View, ViewState } from "../view";
import { Scale } from "./axes";
import { fileName, save } from "./dom";
import { readCsv, readPng } from "./export";
import { Layout } from "./layout";
import { Panel, type PanelHost } from "./panel";
import { NoAnswer, Ranges } from "./ranges";
import { COLUMNS, RunCurves } from "./run_curves";
import type { ChartEvent, Scene } from "./scene";
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
/** Curves that are kept though their panels are not on the screen. */
const MAX_UNSEEN = 200;
/** Milliseconds between two updates of the values beside the curves' names: text costs more than lines. */
const VALUES_INTERVAL = 300;
/** Milliseconds between two looks at what is constant. */
const SORT_INTERVAL = 1_000;

export class Charts {
  readonly #root: HTMLElement;
  readonly #host: ChartsHost;
  readonly #toolbar: Toolbar;
  readonly #layout: Layout;
  readonly #ranges: Ranges;
  readonly #observer: IntersectionObserver;

  #run: RunCurves;
  #panels = new Map<string, Panel>();
  #byFigure = new Map<Element, Panel>();
  #tables = new Map<Panel, HTMLElement>();
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
  #tableTime = 0;
  #sorted = -Infinity;
  #sortTimer: ReturnType<typeof setTimeout> | undefined;
  #valuesShown = -Infinity;
  #valuesTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(root: HTMLElement, host: ChartsHost) {
    this.#root = root;
    this.#host = host;
    this.#ranges = new Ranges((query) => host.send({ ...query, run: this.#run.info?.key }));
    this.#run = this.#curvesOf(null);
    this.#toolbar = new Toolbar({
      view: host.view,
      setAxis: (axis) => this.#setAxis(axis),
      setFollow: (follow) => this.#setFollow(follow),
      jump: (group) => this.#layout.jump(group),
      foldAll: (folded) => this.#layout.foldAll(folded),
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
    this.#ranges.abandon("the connection was lost");
    this.#shown = [];
    if (run !== null && run.key === this.#run.info?.key) {
      this.#run.reconnected(run);
    } else {
      this.#run.details.clear();
      this.#run = this.#curvesOf(run);
      this.#cursor = null;
      for (const panel of this.#panels.values()) this.#removePanel(panel);
      this.#layout.clear();
      this.#showMarks();
    }
    this.#filter();
    this.#redraw();
  }

  #curvesOf(run: RunInfo | null): RunCurves {
    return new RunCurves(run, this.#ranges, {
      isZoomed: () => this.#host.view.get().zoom !== null,
      answered: () => this.#redraw(),
    });
  }

  addSeries(series: SeriesInfo[]): void {
    for (const info of series) {
      if (this.#run.series.has(info.id)) continue;
      this.#run.series.set(info.id, info);
      const panel = this.#panels.get(info.panel) ?? this.#addPanel(info.panel, info.group);
      const known = panel.curves.find((curve) => curve.info.key === info.key);
      if (known && known.info.id !== info.id) {
        for (const id of [known.info.id, info.id]) this.#run.forget(id);
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
    if (this.#run.info === null || frame.header.run === this.#run.info.key) {
      if (frame.header.kind === "range") this.#ranges.take(frame);
      else this.#run.apply(frame);
    }
    this.#redraw();
  }

  applyLatest(latest: Latest): void {
    Object.assign(this.#run.latest, latest.values);
    this.#showValues();
  }

  applyStatus(status: Status): void {
    const before = this.#run.status;
    this.#run.status = status;
    if (status.trimmed !== before?.trimmed) this.#redraw();
  }

  addMark(event: ChartEvent): void {
    if (!this.#run.addEvent(event)) return;
    this.#showMarks();
    this.#redraw();
  }

  #showMarks(): void {
    this.#toolbar.setMarks(new Set(this.#run.events.map(({ kind }) => kind)));
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
      curve: (id) => this.#run.details.curve(id, this.#scene),
      latest: (id) => this.#run.latest[String(id)] ?? null,
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
    this.#toolbar.setGroups(this.#layout.groups);
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
      .filter((id) => this.#run.series.has(id));
    const series = wanted.slice(0, MAX_SERIES_SHOWN).sort((one, other) => one - other);
    const points = this.#points(visible);
    // Curves of a panel that has grown, as when it is maximised, come anew with as many points as it can show.
    const grown =
      points > 1.5 * this.#shownPoints && series.some((id) => (this.#run.store.curves.get(id)?.reducedTo ?? -1) >= 0);
    if (this.#run.info === null || (series.join() === this.#shown.join() && !grown)) return;
    const run = this.#run.info.key;
    if (grown && this.#shown.length > 0) this.#host.send({ type: "show", run, series: [] });
    this.#shown = series;
    this.#shownPoints = points;
    // A snapshot will bring them back.
    const unseen = [...this.#run.store.curves.keys()].filter((id) => !series.includes(id));
    for (const id of unseen.slice(0, Math.max(0, unseen.length - MAX_UNSEEN))) this.#run.forget(id);
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
    const origin = axis === "time" ? this.#run.start() : 0;
    const x = this.#xScale(axis, logX && axis !== "wall");
    // The cursor of a mouse stays under the mouse, that of a key at its step.
    if (this.#cursor !== null && this.#mouse !== null) this.#cursor = x.fromUnit(this.#mouse);
    return {
      axis,
      column,
      origin,
      x,
      logY,
      smoothing,
      hidden: new Set(hidden),
      usual: new Set(usual),
      unmarked: new Set(unmarked),
      gaps: this.#run.store.gaps,
      trimmed: this.#run.trimmed,
      events: this.#run.placed(column, origin),
      theme: this.#theme,
      cursor: this.#cursor,
      placeOf: (step) => this.#run.placeOf(step, column, origin),
    };
  }

  #xScale(axis: Axis, log: boolean): Scale {
    const { zoom, follow } = this.#host.view.get();
    const reach = this.#run.reach(axis, log);
    if (zoom && (!log || zoom.max > 0)) {
      const width = zoom.max - zoom.min;
      const [min, max] = follow && reach ? [reach[1] - width, reach[1]] : [zoom.min, zoom.max];
      return new Scale(log && !(min > 0) ? Math.min(reach?.[0] ?? 1, max / 10) : min, max, log);
    }
    if (!reach) return axis === "wall" ? new Scale(this.#run.start(), this.#run.start() + 60) : new Scale(log ? 1 : 0, 10, log);
    const [min, max] = reach;
    if (min < max) return new Scale(min, max, log);
    // One point: in the middle
    if (log) return new Scale(min / 10, max * 10, true);
    const air = axis === "epoch" ? 0.5 : axis === "step" ? Math.max(1, 0.1 * Math.abs(min)) : 30;
    return new Scale(min - air, max + air);
  }

  // The view ------------------------------------------------------------------------------------------

  #viewChanged(state: ViewState, previous: ViewState): void {
    this.#toolbar.show(state);
    const arranged = ["search", "panel", "folded", "columns", "height"] as const;
    if (arranged.some((name) => state[name] !== previous[name])) this.#filter();
    if (state.panel !== previous.panel) this.#sorted = -Infinity; // a constant that is maximised is a panel
    this.#valuesShown = -Infinity;
    if (state.zoom !== previous.zoom && state.zoom === null) this.#run.details.clear();
    if (state.axis !== previous.axis) this.#cursor = this.#mouse = null;
    this.#redraw();
  }

  /** Show another x axis; a zoom stays where it is in the run. */
  #setAxis(axis: Axis): void {
    const { axis: before, zoom } = this.#host.view.get();
    if (axis === before) return;
    const move = (value: number): number | null => {
      const place = this.#run.translate(value + (before === "time" ? this.#run.start() : 0), COLUMNS[before], COLUMNS[axis]);
      return place === null ? null : place - (axis === "time" ? this.#run.start() : 0);
    };
    const [min, max] = zoom ? [move(zoom.min), move(zoom.max)] : [null, null];
    this.#host.view.set({ axis, zoom: min !== null && max !== null && min < max ? { min, max } : null });
  }

  #setFollow(follow: boolean): void {
    const { zoom, axis } = this.#host.view.get();
    const reach = this.#run.reach(axis, false);
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
    const reach = this.#run.reach(axis, log);
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

  /** If what is zoomed to holds reduced points, ask for finer ones. */
  #askForDetail(): void {
    const { zoom, follow } = this.#host.view.get();
    if (!zoom || !this.#connected) return;
    const visible = [...this.#panels.values()].filter((panel) => panel.visible && !panel.figure.hidden);
    const ids = visible
      .flatMap((panel) => panel.curves.map(({ info }) => info.id))
      .filter((id) => this.#shown.includes(id));
    this.#run.details.ask(ids, this.#getScene(), { follows: follow, points: this.#points(visible) });
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
    if (blob) save(blob, `${fileName(this.#run.info?.name ?? "", panel.name)}.png`);
  }

  async #saveCsv(panel: Panel): Promise<void> {
    const series = panel.curves.map(({ info }) => info);
    const name = `${fileName(this.#run.info?.name ?? "", panel.name)}.csv`;
    const lastStep = this.#run.lastStep(series.map(({ id }) => id));
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
