// The charts of the page: panels in groups, one bar above them, and what passes between them and the server.
//
//     chart frames, marks, status ──> RunCurves of each run ──┐
//     view ──> Layout, Toolbar, XAxis ────────────────────────┴─> one animation frame ─> every visible panel ─> drawn()
//
// A run's curves and what happened in it are in `run_curves.ts`, which runs there are in `runs.ts`, finer points for a
// zoom in `details.ts`, the places of panels in `layout.ts`; here is the frame loop, and what the curves on the screen
// are to the server.
// A panel that is not on the screen holds no canvas, and its curves are not sent.

import type { ChartFrame, Latest, RangeQuery, RunInfo, RunRow, SeriesInfo, Show, Status } from "../protocol";
import { MAX_SERIES_SHOWN } from "../protocol";
import { scaleIn, type View, type ViewState } from "../view";
import { Files } from "./files";
import { placedBy } from "./joined";
import { Layout } from "./layout";
import { listenToMouse } from "./mouse";
import { Options } from "./options";
import { Panel, type PanelHost } from "./panel";
import { Ranges } from "./ranges";
import { COLUMNS, RunCurves } from "./run_curves";
import { ChartRuns, slotOf } from "./runs";
import type { ChartEvent, Scene } from "./scene";
import { Tables } from "./tables";
import { cssColour, lookOfRun, readTheme, type Theme, watchTheme } from "./theme";
import { Toolbar } from "./toolbar";
import { listenToTouch } from "./touch";
import { XAxis } from "./x_axis";

export interface ChartsHost {
  send(message: Show | RangeQuery): void;
  /** Credit for the next chart frame. */
  credit(): void;
  /** What was applied is on the screen. */
  drawn(): void;
  view: View;
  /** A run as it stands in the list of runs; null if it does not. */
  row(key: string): RunRow | null;
  announce(text: string): void;
  /** As `announce`, and show it for a moment. */
  tell(text: string): void;
}

/** A panel that has left the screen keeps its curves coming for so long, in milliseconds: it may come back. */
const LINGER = 1_500;
/** Panels so near to the screen count as visible. */
const MARGIN = "160px";
/** Curves that are kept though their panels are not on the screen. */
const MAX_UNSEEN = 200;
/** Milliseconds between two updates of the values beside the curves' names: text costs more than lines. */
const VALUES_INTERVAL = 300;
/** With several runs, milliseconds between two drawings that nobody has asked for: each shows all that came. */
const DRAW_INTERVAL = 100;
/** Milliseconds between two looks at what is constant. */
const SORT_INTERVAL = 1_000;

export class Charts {
  readonly #root: HTMLElement;
  readonly #host: ChartsHost;
  readonly #toolbar: Toolbar;
  readonly #layout: Layout;
  readonly #files: Files;
  readonly #options: Options;
  readonly #ranges: Ranges;
  readonly #tables = new Tables(() => this.#panelHost());
  readonly #observer: IntersectionObserver;

  readonly #runs: ChartRuns;
  readonly #x: XAxis;
  /** By tab and name. */
  #panels = new Map<string, Panel>();
  #byFigure = new Map<Element, Panel>();
  #connected = true;

  #theme: Theme;
  #cursor: number | null = null;
  #pinned = false;
  /** Where the mouse is, from 0 to 1 along the x axis; null if the cursor is not its. */
  #mouse: number | null = null;
  #scene: Scene | null = null;

  #frame: number | null = null;
  #credits = 0;
  /** Keys of runs of which a frame has come since the last drawing. */
  #came = new Set<string>();
  #drawnAt = -Infinity;
  #drawTimer: ReturnType<typeof setTimeout> | undefined;
  #leaving = new Map<Panel, ReturnType<typeof setTimeout>>();
  #sorted = -Infinity;
  #sortTimer: ReturnType<typeof setTimeout> | undefined;
  #valuesShown = -Infinity;
  #valuesTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(root: HTMLElement, host: ChartsHost) {
    this.#root = root;
    this.#host = host;
    this.#ranges = new Ranges((query) => host.send(query));
    this.#runs = new ChartRuns((run, slot) => this.#curvesOf(run, slot));
    this.#x = new XAxis(host.view, this.#runs);
    this.#toolbar = new Toolbar({
      view: host.view,
      setAxis: (axis) => this.#x.setAxis(axis),
      setFollow: (follow) => this.#x.setFollow(follow),
      jump: (group) => this.#layout.jump(group),
      foldAll: (folded) => this.#layout.foldAll(folded),
      saveAll: () => this.#saveAll(),
    });
    this.#files = new Files({ runs: () => this.#runs.all, tell: (text) => host.tell(text) });
    this.#options = new Options({ view: host.view, files: this.#files, scene: () => this.#getScene(), connected: () => this.#connected });
    root.classList.add("charts");
    this.#layout = new Layout(root, host.view);
    root.append(this.#toolbar.root, this.#layout.empty, this.#layout.body, this.#options.element);
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

  /** Watch another run, or the same one after a new connection: its curves start anew; zoom and switches stay. */
  reset(run: RunInfo | null): void {
    this.#ranges.abandon("the connection was lost", this.#runs.focus.key);
    const before = this.#runs.focus;
    const gone = this.#runs.watch(run);
    if (gone) this.#removeRun(gone);
    if (this.#runs.focus !== before) {
      this.#cursor = null;
      if (this.#panels.size === 0) this.#layout.clear();
      this.#showMarks();
    }
    this.#filter();
    this.#redraw();
  }

  /** Lay a run over the watched one, or have it start anew after a new connection. */
  overlay(run: RunInfo): void {
    this.#ranges.abandon("the connection was lost", run.key);
    if (this.#runs.overlay(run)) this.#redraw();
  }

  /** Lay only these runs over the watched one. */
  keep(runs: readonly string[]): void {
    const gone = this.#runs.keep(runs);
    for (const run of gone) this.#removeRun(run);
    if (gone.length === 0) return;
    this.#filter();
    this.#redraw();
  }

  /** Whether a run is shown. */
  has(key: string): boolean {
    return this.#runs.get(key) !== null;
  }

  /** Whether there is anything for the tab about the machine. */
  get hasSystem(): boolean {
    return [...this.#panels.values()].some(({ tab }) => tab === "system");
  }

  /** Names or tags in the list of runs may be others. */
  listed(): void {
    if (this.#runs.all.length > 1) this.#redraw();
  }

  /** The colour of a run in all panels, for the style sheet; null if it is not shown. */
  colourOf(key: string): string | null {
    const run = this.#runs.get(key);
    if (!run) return null;
    const { groupBy, baseline } = this.#host.view.get();
    const slot = slotOf(run, this.#runs.all, this.#runs.groups(groupBy));
    return cssColour({ hue: key === baseline ? null : lookOfRun(slot, 0).hue });
  }

  #curvesOf(run: RunInfo | null, slot: number): RunCurves {
    return new RunCurves(run, slot, this.#ranges, {
      isZoomed: () => this.#host.view.get().zoom !== null,
      answered: () => this.#redraw(),
      row: (key) => this.#host.row(key),
    });
  }

  #removeRun(run: RunCurves): void {
    for (const panel of [...this.#panels.values()]) {
      if (panel.removeRun(run)) continue;
      this.#layout.remove(panel);
      this.#removePanel(panel);
    }
  }

  addSeries(key: string, series: readonly SeriesInfo[]): void {
    const run = this.#runs.get(key);
    if (!run) return;
    const { joined } = this.#host.view.get();
    for (const one of series) {
      if (run.series.has(one.id)) continue;
      run.series.set(one.id, one);
      const info = placedBy(joined, one);
      const panel = this.#panels.get(keyOf(info.tab, info.panel)) ?? this.#addPanel(info);
      const known = panel.curves.find((curve) => curve.run === run && curve.info.key === info.key);
      if (known && known.info.id !== info.id) {
        for (const id of [known.info.id, info.id]) run.forget(id);
      }
      panel.addCurve(run, info);
    }
    this.#layout.order();
    this.#filter();
    this.#subscribe();
    this.#redraw();
  }

  /** Others share a panel than before: all panels are made anew, the curves stay. */
  #rebuild(): void {
    for (const panel of this.#panels.values()) this.#removePanel(panel);
    this.#layout.clear();
    for (const run of this.#runs.all) {
      const series = [...run.series.values()];
      run.series.clear();
      this.addSeries(run.key, series);
    }
  }

  applyChart(frame: ChartFrame): void {
    const run = this.#runs.get(frame.header.run);
    if (frame.header.kind === "range") this.#ranges.take(frame);
    else run?.apply(frame);
    const several = this.#runs.all.length > 1;
    // The frames of several runs are drawn together: the next run's may come before that, a second one of this may not.
    if (several && run && !this.#came.has(run.key)) {
      this.#came.add(run.key);
      this.#host.credit();
    } else {
      this.#credits++;
    }
    const wait = several ? this.#drawnAt + DRAW_INTERVAL - performance.now() : 0;
    if (wait <= 0) this.#redraw();
    else this.#drawTimer ??= setTimeout(() => this.#redraw(), wait);
  }

  applyLatest({ run: key, values }: Latest): void {
    const run = this.#runs.get(key);
    if (!run) return;
    Object.assign(run.latest, values);
    this.#showValues();
  }

  applyStatus(status: Status): void {
    const run = this.#runs.get(status.run);
    if (!run) return;
    const before = run.status;
    run.status = status;
    if (status.trimmed !== before?.trimmed) this.#redraw();
  }

  addMark(event: ChartEvent): void {
    if (!this.#runs.focus.addEvent(event)) return;
    this.#showMarks();
    this.#redraw();
  }

  #showMarks(): void {
    this.#toolbar.setMarks(new Set(this.#runs.focus.events.map(({ kind }) => kind)));
  }

  setConnected(connected: boolean): void {
    this.#connected = connected;
    if (!connected) {
      this.#ranges.abandon("the connection was lost");
      this.#came.clear();
      this.#credits = 0; // what is owed is owed to the server that is gone
    }
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

  #addPanel({ tab, panel: name, group }: SeriesInfo): Panel {
    const panel = new Panel(name, group, tab, this.#panelHost());
    this.#panels.set(keyOf(tab, name), panel);
    this.#byFigure.set(panel.figure, panel);
    panel.setMaximised(this.#host.view.get().panel === name);
    for (const listen of [listenToTouch, listenToMouse]) listen(panel, this.#panelHost());
    this.#layout.add(panel);
    this.#observer.observe(panel.figure);
    return panel;
  }

  #removePanel(panel: Panel): void {
    this.#observer.unobserve(panel.figure);
    clearTimeout(this.#leaving.get(panel));
    this.#leaving.delete(panel);
    this.#tables.forget(panel);
    this.#panels.delete(keyOf(panel.tab, panel.name));
    this.#byFigure.delete(panel.figure);
    panel.destroy();
  }

  #panelHost(): PanelHost {
    return {
      scene: () => this.#getScene(),
      curve: ({ run, info }) => run.details.curve(info.id, this.#scene?.of(run) ?? null),
      latest: ({ run, info }) => run.latest[String(info.id)] ?? null,
      moveCursor: (x, pinned) => this.#moveCursor(x, pinned),
      zoom: (min, max) => this.#x.zoom(min, max),
      pan: (min, max) => this.#x.pan(min, max),
      resetZoom: () => this.#host.view.set({ zoom: null, follow: false }),
      toggleUsual: (panel) => this.#host.view.toggle("usual", panel.name),
      toggleCurve: (metric) => this.#host.view.toggle("hidden", metric),
      toggleRuns: (runs) => this.#toggleRuns(runs),
      toggleMembers: () => this.#host.view.set({ members: !this.#host.view.get().members }),
      toggleMaximised: (panel) => {
        this.#host.view.set({ panel: this.#host.view.get().panel === panel.name ? null : panel.name });
        panel.maximiseButton.focus();
      },
      toggleTable: (panel) => this.#tables.toggle(panel),
      toggleOptions: (panel) => this.#options.toggle(panel),
      setRange: (panel, ends) => this.#host.view.setScale(panel.name, ends),
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
    const points = this.#points(visible);
    for (const run of this.#runs.all) if (run.info !== null) this.#subscribeTo(run, visible, points);
  }

  #subscribeTo(run: RunCurves, visible: Panel[], points: number): void {
    const wanted = idsOf(visible, run).filter((id) => run.series.has(id));
    const series = wanted.slice(0, MAX_SERIES_SHOWN).sort((one, other) => one - other);
    // Curves of a panel that has grown, as when it is maximised, come anew with as many points as it can show.
    const grown =
      points > 1.5 * run.shownPoints && series.some((id) => (run.store.curves.get(id)?.reducedTo ?? -1) >= 0);
    if (series.join() === run.shown.join() && !grown) return;
    if (grown && run.shown.length > 0) this.#host.send({ type: "show", run: run.key, series: [] });
    run.shown = series;
    run.shownPoints = points;
    // A snapshot will bring them back.
    const unseen = [...run.store.curves.keys()].filter((id) => !series.includes(id));
    for (const id of unseen.slice(0, Math.max(0, unseen.length - MAX_UNSEEN))) run.forget(id);
    this.#host.send({ type: "show", run: run.key, series, points, samples: true });
  }

  #toggleRuns(keys: readonly string[]): void {
    const { hiddenRuns } = this.#host.view.get();
    const others = hiddenRuns.filter((key) => !keys.includes(key));
    this.#host.view.set({ hiddenRuns: keys.every((key) => hiddenRuns.includes(key)) ? others : [...others, ...keys] });
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
    clearTimeout(this.#drawTimer);
    this.#drawTimer = undefined;
    this.#drawnAt = performance.now();
    const visible = [...this.#panels.values()].filter((panel) => panel.visible);
    try {
      for (const panel of visible) panel.draw();
      this.#showValues();
      this.#sort();
      this.#tables.refresh();
      this.#askForDetail();
    } finally {
      // Also after a mistake of ours: else no frame would come any more.
      for (; this.#credits > 0; this.#credits--) this.#host.credit();
      this.#came.clear();
      this.#host.drawn();
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
    const { axis, logY, smoothing, hidden, hiddenRuns, usual, unmarked, groupBy, members, baseline } =
      this.#host.view.get();
    // A root that was not in the document yet had no colours.
    if (this.#theme.text === "") this.#theme = readTheme(this.#root);
    const { focus, all } = this.#runs;
    const column = COLUMNS[axis];
    const originOf = (run: RunCurves): number => (axis === "time" ? run.start() : 0);
    const x = this.#x.scale();
    // The cursor of a mouse stays under the mouse, that of a key at its step.
    if (this.#cursor !== null && this.#mouse !== null) this.#cursor = x.fromUnit(this.#mouse);
    const own = (run: RunCurves): Pick<Scene, "origin" | "gaps" | "trimmed" | "placeOf"> => {
      const origin = originOf(run);
      return {
        origin,
        gaps: run.store.gaps,
        trimmed: run.trimmed,
        placeOf: (step) => run.placeOf(step, column, origin),
      };
    };
    const scenes = new Map<RunCurves, Scene>();
    const scene: Scene = {
      runs: all,
      groups: this.#runs.groups(groupBy),
      members,
      baseline: baseline === null ? null : this.#runs.get(baseline),
      axis,
      column,
      x,
      logY,
      scaleIn: (panel) => scaleIn(this.#host.view.get(), panel),
      smoothing,
      hidden: new Set(hidden),
      hiddenRuns: new Set(hiddenRuns),
      usual: new Set(usual),
      unmarked: new Set(unmarked),
      events: focus.placed(column, originOf(focus)),
      theme: this.#theme,
      cursor: this.#cursor,
      ...own(focus),
      of: (run) => {
        let made = run === focus ? scene : scenes.get(run);
        // What changes later, as the cursor, all of them have.
        if (!made) scenes.set(run, (made = Object.assign(Object.create(scene) as Scene, own(run))));
        return made;
      },
    };
    return scene;
  }

  // The view ------------------------------------------------------------------------------------------

  #viewChanged(state: ViewState, previous: ViewState): void {
    this.#toolbar.show(state);
    const arranged = ["tab", "search", "panel", "folded", "columns", "height"] as const;
    if (state.joined.join("\n") !== previous.joined.join("\n")) this.#rebuild();
    if (state.pinned.join("\n") !== previous.pinned.join("\n")) {
      this.#layout.regroup();
      this.#filter();
    }
    if (arranged.some((name) => state[name] !== previous[name])) this.#filter();
    if (state.panel !== previous.panel) this.#sorted = -Infinity; // a constant that is maximised is a panel
    this.#valuesShown = -Infinity;
    if (state.zoom !== previous.zoom && state.zoom === null) {
      for (const run of this.#runs.all) run.details.clear();
    }
    if (state.axis !== previous.axis) this.#cursor = this.#mouse = null;
    this.#redraw();
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
    const scene = this.#getScene();
    const points = this.#points(visible);
    for (const run of this.#runs.all) {
      const ids = idsOf(visible, run).filter((id) => run.shown.includes(id));
      run.details.ask(ids, scene.of(run), { follows: follow, points });
    }
  }

  // Files -----------------------------------------------------------------------------------------------

  /** All points of the curves that the search and the switches leave. */
  #saveAll(): void {
    const scene = this.#getScene();
    const shown = [...this.#panels.values()].filter((panel) => !panel.figure.hidden);
    void this.#files.saveCsv("metrics", shown.flatMap((panel) => panel.shown(scene)));
  }
}

function keyOf(tab: string, panel: string): string {
  return `${tab}\n${panel}`;
}

/** Ids of the curves that a run has in some panels. */
function idsOf(panels: readonly Panel[], run: RunCurves): number[] {
  return panels.flatMap(({ curves }) => curves.filter((curve) => curve.run === run).map(({ info }) => info.id));
}
