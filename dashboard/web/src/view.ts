// What the viewer has chosen to see. It lives in the address after `#`, so that a link shows the same view, and
// in localStorage, so that the next visit starts where the last one ended. Nothing in it changes the run.

import { MAX_OVERLAID } from "./protocol";
import { finder } from "./search";
import type { PageStorage } from "./storage";

export type Axis = "step" | "epoch" | "time" | "wall" | "samples";
export type Tab = "metrics" | "system" | "layers" | "samples" | "checkpoints" | "events" | "config" | "compare";
/** Kinds of events that are marked in the charts. */
export type MarkKind = "alert" | "checkpoint" | "lr" | "validation";
export type Theme = "auto" | "light" | "dark";

/** The y axis of a panel, where it is another than that of all. */
export interface PanelScale {
  /** null: as all panels. */
  log: boolean | null;
  /** null: by the values in view. */
  min: number | null;
  max: number | null;
}

export interface ViewState {
  tab: Tab;
  /** Key of the run that is watched; null for the newest. */
  run: string | null;
  /** Keys of the runs that are laid over it. */
  overlaid: string[];
  /** Key of the run that is drawn behind the others. */
  baseline: string | null;
  /** What runs are grouped by: a hyperparameter, or "tag". */
  groupBy: string | null;
  /** Keys of runs that are switched off in the charts. */
  hiddenRuns: string[];
  /** Whether the runs of groups are drawn beside their mean. */
  members: boolean;
  /** What the name of a panel or curve must have to be shown. */
  search: string;
  /** The x axis: optimizer steps, epochs, samples seen, seconds since the start, or time of day. */
  axis: Axis;
  logX: boolean;
  logY: boolean;
  /** Weight of the past in the exponential moving average: 0 (off) to 0.999. */
  smoothing: number;
  /** Part of the x axis that is shown, in its own units; null for all of it. */
  zoom: { min: number; max: number } | null;
  /** Whether a zoomed view moves along with the newest point. */
  follow: boolean;
  /** The one panel that fills the page. */
  panel: string | null;
  /** Keys of curves that are switched off. */
  hidden: string[];
  /** Names of groups of panels that are folded. */
  folded: string[];
  /** Columns of panels; 0 for as many as fit. */
  columns: number;
  /** Height of a plot in CSS pixels; 0 for what suits its width. */
  height: number;
  /** Names of panels whose y axis is scaled to the usual values, with outliers at its edge. */
  usual: string[];
  /** Kinds of events that are not marked in the charts. */
  unmarked: string[];
  /** The y axes of panels, by name. */
  scales: Readonly<Record<string, PanelScale>>;
  /** Names of panels that stand at the top. */
  pinned: string[];
  /** Searches: the metrics that one finds share a panel. */
  joined: string[];
  theme: Theme;
}

export const DEFAULT_VIEW: Readonly<ViewState> = Object.freeze({
  tab: "metrics",
  run: null,
  overlaid: [],
  baseline: null,
  groupBy: null,
  hiddenRuns: [],
  members: false,
  search: "",
  axis: "step",
  logX: false,
  logY: false,
  smoothing: 0,
  zoom: null,
  follow: false,
  panel: null,
  hidden: [],
  folded: [],
  columns: 0,
  height: 0,
  usual: [],
  unmarked: [],
  scales: {},
  pinned: [],
  joined: [],
  theme: "auto",
});

const VERSION = "1";
/** Grows when the meaning of a field changes: a view of another version is not read. */
const STORAGE_KEY = `offloop.view.${VERSION}`;
const TABS: readonly Tab[] = ["metrics", "system", "layers", "samples", "checkpoints", "events", "config", "compare"];
export const AXES: readonly Axis[] = ["step", "epoch", "samples", "time", "wall"];
export const MAX_COLUMNS = 8;
/** Bounds of what an address may hold: names in a list, panels that share metrics, characters of a text. */
const MOST_NAMES = 500;
const MOST_JOINED = 20;
const MOST_CHARACTERS = 1_000;
const THEMES: readonly Theme[] = ["auto", "light", "dark"];

/** Whether going from one view to another is a step that the back button takes back. */
export function isStep(state: ViewState, previous: ViewState): boolean {
  return state.tab !== previous.tab || state.run !== previous.run || state.panel !== previous.panel;
}

/** Write a view as a URL hash, without what is as usual; the theme is the viewer's own and stays out. */
export function encodeView(state: ViewState): string {
  const fields = new URLSearchParams();
  if (state.tab !== DEFAULT_VIEW.tab) fields.set("tab", state.tab);
  if (state.run !== null) fields.set("run", state.run);
  for (const run of state.overlaid) fields.append("with", run);
  if (state.baseline !== null) fields.set("baseline", state.baseline);
  if (state.groupBy !== null) fields.set("group", state.groupBy);
  for (const run of state.hiddenRuns) fields.append("hiderun", run);
  if (state.members) fields.set("members", "1");
  if (state.search !== "") fields.set("search", state.search);
  if (state.axis !== DEFAULT_VIEW.axis) fields.set("x", state.axis);
  if (state.logX) fields.set("logx", "1");
  if (state.logY) fields.set("logy", "1");
  if (state.smoothing > 0) fields.set("smooth", String(state.smoothing));
  if (state.zoom !== null) fields.set("zoom", `${state.zoom.min},${state.zoom.max}`);
  if (state.follow) fields.set("follow", "1");
  if (state.panel !== null) fields.set("panel", state.panel);
  for (const key of state.hidden) fields.append("hide", key);
  for (const name of state.folded) fields.append("fold", name);
  if (state.columns > 0) fields.set("columns", String(state.columns));
  if (state.height > 0) fields.set("height", String(state.height));
  for (const name of state.usual) fields.append("usual", name);
  for (const kind of state.unmarked) fields.append("unmarked", kind);
  for (const [name, { log, min, max }] of Object.entries(state.scales)) {
    fields.append("y", [log === null ? "" : log ? "log" : "linear", min ?? "", max ?? "", name].join(","));
  }
  for (const name of state.pinned) fields.append("pin", name);
  for (const search of state.joined) fields.append("join", search);
  const text = fields.toString();
  return text === "" ? "" : `#v=${VERSION}&${text}`;
}

/** Read a URL hash; fields that are missing or make no sense are as usual. null: there is no view in it. */
export function decodeView(hash: string): ViewState | null {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  if (fields.get("v") !== VERSION) return null;
  const zoom = (fields.get("zoom") ?? "").split(",").map(Number);
  return sane({
    tab: fields.get("tab"),
    run: fields.get("run"),
    overlaid: fields.getAll("with"),
    baseline: fields.get("baseline"),
    groupBy: fields.get("group"),
    hiddenRuns: fields.getAll("hiderun"),
    members: fields.get("members") === "1",
    search: fields.get("search"),
    axis: fields.get("x"),
    logX: fields.get("logx") === "1",
    logY: fields.get("logy") === "1",
    smoothing: Number(fields.get("smooth") ?? 0),
    zoom: zoom.length === 2 ? { min: zoom[0], max: zoom[1] } : null,
    follow: fields.get("follow") === "1",
    panel: fields.get("panel"),
    hidden: fields.getAll("hide"),
    folded: fields.getAll("fold"),
    columns: Number(fields.get("columns") ?? 0),
    height: Number(fields.get("height") ?? 0),
    usual: fields.getAll("usual"),
    unmarked: fields.getAll("unmarked"),
    scales: Object.fromEntries(fields.getAll("y").map(scaleOf)),
    pinned: fields.getAll("pin"),
    joined: fields.getAll("join"),
    theme: null,
  });
}

/** Read `log,0.1,,loss`. */
function scaleOf(text: string): [string, unknown] {
  const [log, min, max, ...name] = text.split(",");
  const number = (part: string | undefined): number | null => (part ? Number(part) : null);
  return [name.join(","), { log: log === "log" ? true : log === "linear" ? false : null, min: number(min), max: number(max) }];
}

/** Make a view of whatever was stored or typed. */
export function sane(raw: Partial<Record<keyof ViewState, unknown>>): ViewState {
  const strings = (value: unknown): string[] =>
    Array.isArray(value)
      ? [...new Set(value.filter((item) => typeof item === "string" && item.length <= MOST_CHARACTERS))].slice(0, MOST_NAMES)
      : [];
  const zoom = raw.zoom as ViewState["zoom"] | undefined;
  const smoothing = Number(raw.smoothing);
  return {
    tab: oneOf(TABS, raw.tab),
    run: text(raw.run),
    overlaid: strings(raw.overlaid).filter((run) => run !== raw.run).slice(0, MAX_OVERLAID),
    baseline: text(raw.baseline),
    groupBy: text(raw.groupBy),
    hiddenRuns: strings(raw.hiddenRuns),
    members: raw.members === true,
    search: typeof raw.search === "string" ? raw.search.slice(0, MOST_CHARACTERS) : "",
    axis: oneOf(AXES, raw.axis),
    logX: raw.logX === true,
    logY: raw.logY === true,
    smoothing: smoothing >= 0 ? Math.min(smoothing, 0.999) : 0,
    zoom:
      zoom && Number.isFinite(zoom.min) && Number.isFinite(zoom.max) && zoom.min < zoom.max
        ? { min: zoom.min, max: zoom.max }
        : null,
    follow: raw.follow === true,
    panel: text(raw.panel),
    hidden: strings(raw.hidden),
    folded: strings(raw.folded),
    columns: whole(raw.columns, 1, MAX_COLUMNS),
    height: whole(raw.height, 100, 1_000),
    usual: strings(raw.usual),
    unmarked: strings(raw.unmarked),
    scales: saneScales(raw.scales),
    pinned: strings(raw.pinned),
    joined: strings(raw.joined).filter((search) => search.trim() !== "" && finder(search).problem === "").slice(0, MOST_JOINED),
    theme: oneOf(THEMES, raw.theme),
  };
}

/** A text that is not empty, or null. */
function text(value: unknown): string | null {
  return typeof value === "string" && value !== "" ? value : null;
}

function saneScales(raw: unknown): ViewState["scales"] {
  const scales: Record<string, PanelScale> = {};
  if (typeof raw !== "object" || raw === null) return scales;
  for (const [name, scale] of Object.entries(raw).slice(0, MOST_NAMES)) {
    if (typeof scale !== "object" || scale === null || name === "" || name.length > MOST_CHARACTERS) continue;
    const { log, min, max } = scale as Partial<Record<keyof PanelScale, unknown>>;
    const number = (value: unknown): number | null => (typeof value === "number" && Number.isFinite(value) ? value : null);
    let [least, greatest] = [number(min), number(max)];
    if (least !== null && greatest !== null && least >= greatest) least = greatest = null;
    const isLog = typeof log === "boolean" ? log : null;
    if (isLog === null && least === null && greatest === null) continue;
    // Not an assignment: a metric may be called __proto__
    Object.defineProperty(scales, name, { value: { log: isLog, min: least, max: greatest }, enumerable: true, configurable: true, writable: true });
  }
  return scales;
}

/** A whole number in a range; 0, for as usual, if it is none. */
function whole(value: unknown, least: number, most: number): number {
  return Number.isInteger(value) && (value as number) >= least && (value as number) <= most ? (value as number) : 0;
}

/** Scales without their ranges, which belong to one run. */
function logsOf(scales: ViewState["scales"]): ViewState["scales"] {
  return saneScales(Object.fromEntries(Object.entries(scales).map(([name, { log }]) => [name, { log }])));
}

function oneOf<T extends string>(choices: readonly T[], value: unknown): T {
  return choices.find((choice) => choice === value) ?? (choices[0] as T);
}

export function scaleIn({ scales }: Pick<ViewState, "scales">, panel: string): PanelScale | null {
  return Object.hasOwn(scales, panel) ? (scales[panel] as PanelScale) : null;
}

type Listener = (state: ViewState, previous: ViewState) => void;

/** The view: who changes it says so, and everybody who shows it hears of it. */
export class View {
  #state: ViewState;
  readonly #listeners = new Set<Listener>();
  readonly #storage: PageStorage | null;

  constructor(hash = "", storage: PageStorage | null = null) {
    this.#storage = storage;
    const remembered = this.#read();
    const linked = decodeView(hash);
    this.#state = linked ? { ...linked, theme: remembered.theme } : remembered;
  }

  get(): ViewState {
    return this.#state;
  }

  /** Change some of it; listeners are called if that makes a difference. */
  set(patch: Partial<ViewState>): void {
    const previous = this.#state;
    const next = sane({ ...previous, ...patch });
    if (JSON.stringify(next) === JSON.stringify(previous)) return;
    this.#state = next;
    this.#write();
    for (const listener of [...this.#listeners]) listener(next, previous);
  }

  /** Take over a hash that was typed or came with the back button. */
  setHash(hash: string): void {
    const linked = decodeView(hash) ?? sane({});
    this.set({ ...linked, theme: this.#state.theme });
  }

  hash(): string {
    return encodeView(this.#state);
  }

  /** Change the y axis of a panel. */
  setScale(panel: string, patch: Partial<PanelScale>): void {
    const scale = { ...(scaleIn(this.#state, panel) ?? { log: null, min: null, max: null }), ...patch };
    this.set({ scales: { ...this.#state.scales, [panel]: scale } });
  }

  /** Put a name into a list, or take it out if it is there. */
  toggle(list: "hidden" | "hiddenRuns" | "folded" | "usual" | "unmarked" | "pinned" | "joined", name: string): void {
    const names = this.#state[list];
    this.set({ [list]: names.includes(name) ? names.filter((one) => one !== name) : [...names, name] });
  }

  /** Call `listener` after each change; returns what ends that. */
  subscribe(listener: Listener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #read(): ViewState {
    try {
      const stored: unknown = JSON.parse(this.#storage?.getItem(STORAGE_KEY) ?? "{}");
      return sane(typeof stored === "object" && stored !== null ? stored : {});
    } catch {
      return sane({}); // damaged: as usual then
    }
  }

  #write(): void {
    // Neither the runs nor zoom, ranges and search: they belong to these runs, and next ones would seem empty.
    const runs = { run: null, overlaid: [], baseline: null, groupBy: null, hiddenRuns: [], members: false };
    const zooms = { zoom: null, follow: false, search: "", panel: null, scales: logsOf(this.#state.scales) };
    const kept = { ...this.#state, ...runs, ...zooms };
    this.#storage?.setItem(STORAGE_KEY, JSON.stringify(kept));
  }
}
