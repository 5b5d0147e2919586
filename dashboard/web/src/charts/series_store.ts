// The curves as the page holds them: what chart frames bring, put together, and kept small.
//
// A curve holds finite points only; where it was not finite stands in its `marks`. Beyond `MAX_CURVE_POINTS` it
// is thinned: steps are divided into buckets of 2**level, and of each bucket the least and the greatest point
// stay. Buckets start at multiples of their length and those of the next level are two of this one's. So a
// point that stays is where it was, a spike stays at every level, and thinning twice gives what thinning once
// would have given.

import type { ChartFrame, Gap, NonFinite } from "../protocol";

/** Points of a curve that the page holds at most. */
export const MAX_CURVE_POINTS = 8_000;

export type Column = "step" | "time" | "epoch" | "samples";

export interface Point {
  step: number;
  /** Unix time in seconds. */
  time: number;
  epoch: number;
  /** Samples that the model was trained on until then. */
  samples: number;
  value: number;
}

/** Points side by side. */
export type Columns = Record<keyof Point, ArrayLike<number>>;

/** One curve. Its columns are longer than it: only the first `length` entries count. */
export class Curve {
  length = 0;
  step = new Float64Array(64);
  time = new Float64Array(64);
  epoch = new Float64Array(64);
  samples = new Float64Array(64);
  value = new Float64Array(64);
  /** Stretches without a finite value, ordered; another array when one has come or grown. */
  marks: readonly NonFinite[] = [];
  /** Up to this step, neighbouring points may have been merged into the least and greatest of them. */
  reducedTo = -Infinity;
  least: Point | null = null;
  greatest: Point | null = null;
  /** Changes when points other than new ones at the end have come, gone or moved to another index. */
  generation = 0;

  /** Buckets are 2**level steps long. */
  #level = 0;
  /** The two smallest distances between the steps of neighbours so far; twice the same one is two. */
  #distances: [number, number] = [Infinity, Infinity];
  #breaks: { gaps: readonly Gap[]; marks: readonly NonFinite[]; spans: Float64Array } | null = null;

  constructor(readonly limit = MAX_CURVE_POINTS) {}

  /** Last point, or null. */
  get last(): Point | null {
    return this.length === 0 ? null : this.at(this.length - 1);
  }

  /**
   * Steps from one point to the next: the second smallest distance there was, for one point may come out of turn.
   * Infinity before there are two points.
   */
  get cadence(): number {
    const [least, next] = this.#distances;
    return Number.isFinite(next) ? next : least;
  }

  at(index: number): Point {
    return {
      step: this.step[index] as number,
      time: this.time[index] as number,
      epoch: this.epoch[index] as number,
      samples: this.samples[index] as number,
      value: this.value[index] as number,
    };
  }

  /** Add a point; what is not finite is left out. */
  push(step: number, time: number, epoch: number, samples: number, value: number): void {
    if (!Number.isFinite(value)) return;
    if (this.length === this.step.length) this.#grow();
    let index = this.length++;
    if (index > 0) {
      const distance = step - (this.step[index - 1] as number);
      if (distance < 0) index = this.#insert(index, step);
      else if (distance > 0) this.#measure(distance);
    }
    this.step[index] = step;
    this.time[index] = time;
    this.epoch[index] = epoch;
    this.samples[index] = samples;
    this.value[index] = value;
    if (this.least === null || value < this.least.value) this.least = { step, time, epoch, samples, value };
    if (this.greatest === null || value > this.greatest.value) this.greatest = { step, time, epoch, samples, value };
    if (this.length > this.limit) this.#thin();
  }

  #measure(distance: number): void {
    const [least, next] = this.#distances;
    if (distance < least) this.#distances = [distance, least];
    else if (distance < next) this.#distances = [least, distance];
  }

  addMarks(marks: readonly NonFinite[]): void {
    this.marks = withStretches(this.marks, marks);
  }

  /** Take over points from index `from` to before `to`. */
  copy({ step, time, epoch, samples, value }: Columns, from: number, to: number): void {
    for (let index = from; index < to; index++) {
      this.push(
        step[index] as number, time[index] as number, epoch[index] as number, samples[index] as number, value[index] as number,
      );
    }
  }

  /** Index of the first point whose `column` is at least `value`; `length` if none is. */
  search(column: Column, value: number): number {
    const values = this[column];
    let [low, high] = [0, this.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((values[middle] as number) < value) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Index of the first point whose `column` is above `value`; `length` if none is. */
  after(column: Column, value: number): number {
    let index = this.search(column, value);
    while (index < this.length && this[column][index] === value) index++;
    return index;
  }

  /** Index of the point whose `column` is nearest to `value`; -1 without points. */
  nearest(column: Column, value: number): number {
    const after = this.search(column, value);
    if (after === 0) return this.length > 0 ? 0 : -1;
    if (after === this.length) return after - 1;
    const values = this[column];
    return value - (values[after - 1] as number) <= (values[after] as number) - value ? after - 1 : after;
  }

  /**
   * Stretches of steps that no line may cross, as start, end, start, end, ...: ordered, not overlapping.
   *
   * A line from step a to a later step b crosses one if it ends after a and starts before b.
   */
  breaks(gaps: readonly Gap[]): Float64Array {
    if (this.#breaks?.gaps !== gaps || this.#breaks.marks !== this.marks) {
      const spans = [
        ...gaps.map(([after, before]) => [after, before]),
        ...this.marks.map(([start, end]) => [start, end]),
      ];
      spans.sort((one, other) => (one[0] as number) - (other[0] as number));
      const merged: number[] = [];
      for (const [start, end] of spans as [number, number][]) {
        const last = merged.length - 1;
        if (last > 0 && start < (merged[last] as number)) merged[last] = Math.max(merged[last] as number, end);
        else merged.push(start, end);
      }
      this.#breaks = { gaps, marks: this.marks, spans: Float64Array.from(merged) };
    }
    return this.#breaks.spans;
  }

  /** Take over how far the points of a curve are apart, of which this one holds a part. */
  copyCadence(whole: Curve): void {
    this.#distances = whole.#distances;
  }

  #columns(): Float64Array[] {
    return [this.step, this.time, this.epoch, this.samples, this.value];
  }

  #grow(): void {
    const capacity = Math.min(2 * this.step.length, Math.max(this.limit + 1, this.step.length + 1));
    const longer = (column: Float64Array): Float64Array<ArrayBuffer> => {
      const copied = new Float64Array(capacity);
      copied.set(column);
      return copied;
    };
    for (const name of ["step", "time", "epoch", "samples", "value"] as const) this[name] = longer(this[name]);
  }

  /** Make room for a point that comes late; returns its index. `last` is that of the free place at the end. */
  #insert(last: number, step: number): number {
    let index = last;
    while (index > 0 && (this.step[index - 1] as number) > step) index--;
    for (const column of this.#columns()) column.copyWithin(index + 1, index, last);
    this.generation++;
    return index;
  }

  #thin(): void {
    let kept = extremes(this.step, this.value, this.length, this.#level);
    // Down to half, so that it is rare; each level at least keeps what the next one needs.
    while (kept.length > this.limit / 2 && this.#level < 60) {
      this.#level++;
      kept = extremes(this.step, this.value, this.length, this.#level);
    }
    this.reducedTo = Math.max(this.reducedTo, this.step[this.length - 1] as number);
    for (const column of this.#columns()) {
      for (let index = 0; index < kept.length; index++) column[index] = column[kept[index] as number] as number;
    }
    this.length = kept.length;
    this.generation++;
  }
}

/**
 * Indices of the first point, the last one, and of each bucket of 2**level steps the least and the greatest (of
 * equal ones the first).
 */
export function extremes(step: Float64Array, value: Float64Array, length: number, level: number): number[] {
  const kept: number[] = [];
  const size = 2 ** level;
  let index = 0;
  while (index < length) {
    const bucket = Math.floor((step[index] as number) / size);
    const first = index;
    let [least, greatest] = [index, index];
    for (index++; index < length && Math.floor((step[index] as number) / size) === bucket; index++) {
      if ((value[index] as number) < (value[least] as number)) least = index;
      if ((value[index] as number) > (value[greatest] as number)) greatest = index;
    }
    const wanted = [least, greatest];
    if (first === 0) wanted.push(0);
    if (index === length) wanted.push(length - 1);
    wanted.sort((one, other) => one - other);
    for (const one of wanted) if (one !== kept.at(-1)) kept.push(one);
  }
  return kept;
}

/** All curves of a run. */
export class SeriesStore {
  readonly curves = new Map<number, Curve>();
  /** Where samples of the run were dropped, ordered; another array when one has come. */
  gaps: readonly Gap[] = [];
  /** Step before which only least and greatest values are left; null if nothing was trimmed. */
  trimmed: number | null = null;

  /** Curves of the snapshot that goes on in the next frame; null: none does. */
  #open: Set<number> | null = null;

  /** Take a snapshot or a delta. */
  apply(frame: ChartFrame): void {
    const { header } = frame;
    const snapshot = header.kind === "snapshot";
    const begun = (snapshot && this.#open) || new Set<number>();
    header.series.forEach((column, position) => {
      let curve = this.curves.get(column.id);
      if (!curve || (snapshot && !begun.has(column.id))) {
        curve = new Curve();
        this.curves.set(column.id, curve);
      }
      begun.add(column.id);
      appendColumn(curve, frame, position);
    });
    if (snapshot) this.#open = header.more ? begun : null;
    this.addGaps(header.gaps);
    if (header.trimmed !== null) this.trimmed = Math.max(header.trimmed, this.trimmed ?? -Infinity);
  }

  addGaps(gaps: readonly Gap[]): void {
    this.gaps = withStretches(this.gaps, gaps);
  }

  /** The connection was lost: a snapshot that was under way begins anew. Curves stay until theirs has come. */
  interrupted(): void {
    this.#open = null;
  }
}

/** Append what a chart frame has of the curve at `position` in its header. */
export function appendColumn(curve: Curve, frame: ChartFrame, position: number): void {
  const column = frame.header.series[position];
  const [values, rows] = [frame.values[position], frame.indices[position]];
  if (!column || !values || !rows) return;
  for (let index = 0; index < column.points; index++) {
    const row = rows[index] as number;
    curve.push(
      frame.step[row] as number,
      frame.time[row] as number,
      frame.epoch[row] as number,
      frame.samples[row] as number,
      values[index] as number,
    );
  }
  curve.addMarks(column.marks);
  if (column.reduced && column.points > 0) {
    curve.reducedTo = Math.max(curve.reducedTo, frame.step[rows[column.points - 1] as number] as number);
  }
}

/**
 * Put stretches together. One that goes on comes again, whole, with the next frame: it begins where it began,
 * and the one that reaches furthest counts.
 */
export function withStretches<T extends Gap | NonFinite>(known: readonly T[], stretches: readonly T[]): readonly T[] {
  if (stretches.length === 0) return known;
  const byStart = new Map(known.map((one) => [one[0], one]));
  let changed = false;
  for (const one of stretches) {
    const old = byStart.get(one[0]);
    if (old && old[1] >= one[1]) continue;
    byStart.set(one[0], one);
    changed = true;
  }
  return changed ? [...byStart.values()].sort((one, other) => one[0] - other[0]) : known;
}
