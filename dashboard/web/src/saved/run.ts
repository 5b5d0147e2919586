// A run of a saved page: the messages that a viewer gets of it, and its curves as chart frames.

import type { ChartColumn, ChartHeader, Gap, NonFinite, RangeQuery, ServerMessage } from "../protocol";
import { Columns, type Layout } from "./columns";

interface SavedCurve {
  id: number;
  points: number;
  reduced: boolean;
  marks: NonFinite[];
  /** Number of the column with its rows; the next one says how far its steps are above them. */
  rows: number;
  values: number;
}

interface Head {
  texts: ServerMessage[];
  answers: Record<string, ServerMessage>;
  curves: SavedCurve[];
  gaps: Gap[];
  trimmed: number | null;
  columns: Layout[];
}

type Axis = NonNullable<RangeQuery["axis"]>;
/** Rows that are there, and where they are on each axis. */
type Place = Record<Axis, Float64Array>;
type Part = Pick<RangeQuery, "query" | "start" | "end" | "points"> & { axis: Axis };

export class SavedRun {
  readonly texts: readonly ServerMessage[];
  readonly #head: Head;
  readonly #columns: Columns;
  readonly #places = new Map<number, Place>();

  /** Throws where the bytes are not what was saved. */
  constructor(
    readonly key: string,
    data: Uint8Array,
  ) {
    const length = new DataView(data.buffer, data.byteOffset).getUint32(0, true);
    this.#head = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length))) as Head;
    this.#columns = new Columns(data, 4 + length, this.#head.columns);
    this.texts = this.#head.texts;
  }

  /** The answer to a question that has one answer; null if it was not recorded. */
  answer(question: string): ServerMessage | null {
    return this.#head.answers[question] ?? null;
  }

  /** The frame with all that is known of some curves, or of a part of them. */
  frame(ids: readonly number[], part?: Part): ArrayBuffer {
    const curves = this.#head.curves.filter(({ id }) => ids.includes(id));
    // Curves whose points are in the same rows share them. Those of others follow: no curve needs all to be in order.
    const starts = new Map<number, number>();
    const places: Place[] = [];
    let rows = 0;
    const [columns, values, indices]: [ChartColumn[], Float64Array[], Uint32Array[]] = [[], [], []];
    for (const { id, reduced, marks, rows: own, values: number } of curves) {
      const place = this.#placeOf(own);
      const [from, to] = part ? bounds(place[part.axis], part) : [0, place.step.length];
      let start = starts.get(own);
      if (start === undefined) {
        starts.set(own, (start = rows));
        const cut = (axis: Axis): Float64Array => place[axis].subarray(from, to);
        places.push({ step: cut("step"), time: cut("time"), epoch: cut("epoch"), samples: cut("samples") });
        rows += to - from;
      }
      const first = start;
      columns.push({ id, points: to - from, dense: false, reduced, marks });
      values.push(this.#columns.get(number).subarray(from, to));
      indices.push(Uint32Array.from({ length: to - from }, (_, index) => first + index));
    }
    const { gaps, trimmed } = this.#head;
    const kind = part ? "range" : "snapshot";
    const header: ChartHeader = {
      type: "chart", run: this.key, kind, query: part?.query ?? null, more: false, rows, samples: true, series: columns, gaps, trimmed,
    };
    const axes = (["step", "time", "epoch", "samples"] as const).flatMap((axis) => places.map((place) => place[axis]));
    return encode(header, [...axes, ...values], indices);
  }

  #placeOf(column: number): Place {
    let place = this.#places.get(column);
    if (!place) {
      const rows = this.#columns.get(column);
      const above = this.#columns.get(column + 1);
      place = {
        step: rows.map((row, index) => row + (above[index] as number)),
        time: this.#at(rows, 1),
        epoch: this.#at(rows, 2),
        samples: this.#at(rows, 3),
      };
      this.#places.set(column, place);
    }
    return place;
  }

  /** A column of the axis at some rows; in proportion where only rows before and after are known. */
  #at(rows: Float64Array, column: number): Float64Array {
    const [known, values] = [this.#columns.get(0), this.#columns.get(column)];
    let next = 0;
    return rows.map((row) => {
      while (next < known.length - 1 && (known[next] as number) < row) next++;
      const [after, end] = [known[next] as number, values[next] as number];
      if (after === row || next === 0) return end;
      const [before, start] = [known[next - 1] as number, values[next - 1] as number];
      return start + ((row - before) / (after - before)) * (end - start);
    });
  }
}

/** First index of a part and the index behind it; unless all points are wanted, with the next ones on either side. */
function bounds(axis: Float64Array, { start, end, points }: Part): [number, number] {
  let from = axis.findIndex((value) => value >= start);
  if (from < 0) from = axis.length;
  let to = axis.findIndex((value) => value > end);
  if (to < 0) to = axis.length;
  const margin = points === 0 ? 0 : 1;
  return [Math.max(0, from - margin), Math.min(axis.length, to + margin)];
}

/** As `encode_chart` of dashboard/curves/chart_frame.py. */
function encode(header: ChartHeader, floats: Float64Array[], indices: Uint32Array[]): ArrayBuffer {
  let text = JSON.stringify(header);
  const bytes = new TextEncoder().encode(text).length;
  text += " ".repeat((8 - ((4 + bytes) % 8)) % 8);
  const head = new TextEncoder().encode(text);
  const count = (columns: ArrayLike<number>[]): number => columns.reduce((sum, { length }) => sum + length, 0);
  const data = new ArrayBuffer(4 + head.length + 8 * count(floats) + 4 * count(indices));
  new DataView(data).setUint32(0, head.length, true);
  new Uint8Array(data).set(head, 4);
  let offset = 4 + head.length;
  for (const column of floats) {
    new Float64Array(data, offset, column.length).set(column);
    offset += 8 * column.length;
  }
  for (const column of indices) {
    new Uint32Array(data, offset, column.length).set(column);
    offset += 4 * column.length;
  }
  return data;
}
