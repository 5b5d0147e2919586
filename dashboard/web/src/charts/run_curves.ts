// What the charts know of one run: its curves with their names and last values, what happened in it, and where a
// step lies on each x axis. Nothing here draws.

import type { ChartFrame, Latest, RunInfo, RunRow, SeriesInfo, Status } from "../protocol";
import type { Axis } from "../view";
import { Details, type DetailsHost, type Question } from "./details";
import type { Answer, Ranges } from "./ranges";
import type { ChartEvent, Scene } from "./scene";
import { type Column, type Curve, SeriesStore } from "./series_store";

/** Events of a kind that are kept; older ones are let go. */
const MAX_EVENTS = 500;
export const COLUMNS: Readonly<Record<Axis, Column>> = { step: "step", epoch: "epoch", time: "time", wall: "time", samples: "samples" };

export interface CurvesHost extends DetailsHost {
  /** The run as it stands in the list of runs; null if it does not. */
  row(key: string): RunRow | null;
}

export class RunCurves {
  readonly store = new SeriesStore();
  readonly details: Details;
  readonly #ranges: Ranges;
  readonly #host: CurvesHost;
  /** By the ids of this connection. */
  readonly series = new Map<number, SeriesInfo>();
  latest: Latest["values"] = {};
  status: Status | null = null;
  /** Ids of the curves that the server was asked for, and with how many points. */
  shown: number[] = [];
  shownPoints = 0;
  events: ChartEvent[] = [];

  /** `info` is null before there is a run; `slot` is its colour. */
  constructor(
    public info: RunInfo | null,
    readonly slot: number,
    ranges: Ranges,
    host: CurvesHost,
  ) {
    this.#ranges = ranges;
    this.#host = host;
    this.details = new Details(this.store, (question) => this.ask(question), host);
  }

  get key(): string {
    return this.info?.key ?? "";
  }

  /** What people call it. */
  get name(): string {
    const { name = "", attempt = 0 } = this.info ?? {};
    return this.#host.row(this.key)?.name ?? (attempt > 0 ? `${name} #${attempt}` : name);
  }

  get tags(): readonly string[] {
    return this.#host.row(this.key)?.tags ?? [];
  }

  /** Ask the server about its curves. */
  ask(question: Question): Promise<Answer> {
    return this.#ranges.ask({ ...question, ...(this.info === null ? {} : { run: this.info.key }) });
  }

  /** Nothing will come of it any more. */
  leave(): void {
    this.details.clear();
    this.#ranges.abandon("the run is no longer shown", this.key);
  }

  /** The same run after a new connection: curves stay until their snapshots come, so that the page does not flicker. */
  reconnected(info: RunInfo): void {
    this.info = info;
    this.store.interrupted();
    this.details.askAgain();
    this.series.clear();
    this.shown = [];
  }

  /** Take a snapshot or a delta. */
  apply(frame: ChartFrame): void {
    this.store.apply(frame);
    this.details.extend(frame);
  }

  forget(id: number): void {
    this.store.curves.delete(id);
    this.details.forget(id);
  }

  /** Keep an event to mark; false if it is known: after a new connection events may come again. */
  addEvent(event: ChartEvent): boolean {
    const isSame = ({ step, kind, text }: ChartEvent): boolean =>
      step === event.step && kind === event.kind && text === event.text;
    if (this.events.some(isSame)) return false;
    this.events.push(event);
    const alike = this.events.filter(({ kind }) => kind === event.kind);
    if (alike.length > MAX_EVENTS) this.events.splice(this.events.indexOf(alike[0] as ChartEvent), 1);
    return true;
  }

  /** Events with their place on the x axis, in its order: they know their time themselves; where its epoch is, the curves know. */
  placed(column: Column, origin: number): Scene["events"] {
    const placed = this.events.flatMap((event) => {
      const x = column === "time" ? event.time - origin : this.placeOf(event.step, column, origin);
      return x === null ? [] : [{ ...event, x }];
    });
    return placed.sort((one, other) => one.x - other.x);
  }

  /** Step before which not every point is kept, or null. */
  get trimmed(): number | null {
    return this.store.trimmed ?? this.status?.trimmed ?? null;
  }

  /** The last step that these curves may have. */
  lastStep(ids: readonly number[]): number {
    return Math.max(this.status?.step ?? 0, ...ids.map((id) => this.store.curves.get(id)?.last?.step ?? 0));
  }

  /** Unix time at which the run started. */
  start(): number {
    if (this.info?.started) return this.info.started;
    let start = Infinity;
    for (const curve of this.store.curves.values())
      if (curve.length > 0) start = Math.min(start, curve.time[0] as number);
    return Number.isFinite(start) ? start : 0;
  }

  /** First and last place on the x axis that any curve has. */
  reach(axis: Axis, positive: boolean): [number, number] | null {
    const column = COLUMNS[axis];
    const origin = axis === "time" ? this.start() : 0;
    let [min, max] = [Infinity, -Infinity];
    for (const curve of this.store.curves.values()) {
      const first = positive ? curve.search(column, origin + Number.MIN_VALUE) : 0;
      const skipped = positive && first < curve.length && (curve[column][first] as number) - origin <= 0 ? 1 : 0;
      if (first + skipped >= curve.length) continue;
      min = Math.min(min, (curve[column][first + skipped] as number) - origin);
      max = Math.max(max, (curve[column][curve.length - 1] as number) - origin);
    }
    // What is not finite has a step only.
    for (const curve of column === "step" ? this.store.curves.values() : []) {
      const [begin, end] = [curve.marks[0]?.[0] ?? Infinity, curve.marks.at(-1)?.[1] ?? -Infinity];
      if (!positive || begin > 0) min = Math.min(min, begin);
      max = Math.max(max, end);
    }
    return min <= max ? [min, max] : null;
  }

  /** Where a step lies on the axis, by the curve that is known best; between two points in proportion. */
  placeOf(step: number, column: Column, origin: number): number | null {
    return column === "step" ? step : this.translate(step, "step", column, origin);
  }

  /** From a place in one column to the same one in another; null without curves. */
  translate(value: number, from: Column, to: Column, origin = 0): number | null {
    let longest: Curve | null = null;
    for (const curve of this.store.curves.values()) if (curve.length > (longest?.length ?? 0)) longest = curve;
    if (!longest) return null;
    const after = Math.min(longest.search(from, value), longest.length - 1);
    const before = Math.max(after - 1, 0);
    const [x0, x1] = [longest[from][before] as number, longest[from][after] as number];
    const [y0, y1] = [longest[to][before] as number, longest[to][after] as number];
    const share = x1 > x0 ? Math.max(0, Math.min(1, (value - x0) / (x1 - x0))) : 1;
    return y0 + share * (y1 - y0) - origin;
  }
}
