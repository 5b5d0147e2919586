// Layer frames taken apart, and put together again to what the server's tables have: dashboard/curves/layer_frame.py is
// the contract. No DOM.

import { decodeHead } from "../protocol";

/** Statistics of one layer, in the order of the frames. */
export const STATISTICS = ["norm", "update_ratio", "dead", "mean", "std", "minimum", "maximum", "elements"] as const;
export type Statistic = (typeof STATISTICS)[number];
/** What is told of every layer, in the order of the frames. */
export const SUMMARY = ["norm", "update_ratio", "dead", "change"] as const;
export type Summary = (typeof SUMMARY)[number];
const LEAST_SHARE = 1e-9;

export interface LayersQuery {
  type: "layers";
  run?: string;
  kind?: string;
  statistic?: string;
  layer?: string | null;
  on?: boolean;
}

export interface LayerHeader {
  type: "layers";
  run: string;
  kind: string;
  kinds: string[];
  /** Empty in a frame about one layer. */
  statistic: string;
  layer: string | null;
  statistics: string[];
  names: string[];
  layers: number;
  /** This row and all after it take the place of those from before. */
  first: number;
  rows: number;
  bins: number;
  spacing: number;
  more: boolean;
}

export interface LayerFrame {
  header: LayerHeader;
  steps: Float64Array;
  /** Of all layers: row by row. Of one: statistic by statistic. */
  values: Float32Array;
  summary: Float32Array;
  bins: Uint16Array;
  histogram: Uint16Array;
}

/** Take a layer frame apart without copying it. Throws an Error where its length is another than its header says. */
export function decodeLayers(data: ArrayBuffer): LayerFrame {
  const { header, length } = decodeHead<LayerHeader>(data, "layers");
  const { rows, layers, bins } = header;
  const ofOne = header.statistic === "";
  let offset = length;
  const part = <T>(make: new (data: ArrayBuffer, offset: number, count: number) => T, size: number, count: number): T => {
    const column = new make(data, offset, count);
    offset += size * count;
    return column;
  };
  const frame = {
    header,
    steps: part(Float64Array, 8, rows),
    values: part(Float32Array, 4, rows * (ofOne ? STATISTICS.length : layers)),
    summary: part(Float32Array, 4, ofOne ? 0 : SUMMARY.length * layers),
    bins: part(Uint16Array, 2, ofOne ? rows : 0),
    histogram: part(Uint16Array, 2, rows * bins),
  };
  if (offset !== data.byteLength) throw new Error(`the layer frame has ${data.byteLength} bytes, its header speaks of ${offset}`);
  return frame;
}

/** The share of the elements that a level of a histogram stands for. */
export function shareOf(level: number): number {
  return level === 0 ? 0 : LEAST_SHARE ** (1 - (level - 1) / 65_534);
}

/** One measurement of all layers. */
export interface AllRow {
  step: number;
  values: Float32Array;
}

/** One measurement of one layer. */
export interface OneRow {
  step: number;
  /** In the order of `STATISTICS`; NaN: not measured; infinite: not finite. */
  values: number[];
  /** Levels; empty without a histogram. */
  histogram: Uint16Array;
}

/** What has come of one kind of tensors. */
export class LayerStore {
  kind = "";
  kinds: string[] = [];
  names: string[] = [];
  statistics: string[] = [];
  spacing = 0;
  summary: Float32Array = new Float32Array();
  all: AllRow[] = [];
  one: OneRow[] = [];

  clear(): void {
    Object.assign(this, new LayerStore());
  }

  /** Take a frame; false if rows before it are not here: it answers an earlier question. */
  apply(frame: LayerFrame): boolean {
    const { header, steps, values, bins, histogram } = frame;
    const { first, layers, rows } = header;
    const ofAll = header.statistic !== "";
    const kept: unknown[] = ofAll ? this.all : this.one;
    if (first > kept.length) return false;
    kept.length = first;
    this.spacing = header.spacing;
    if (ofAll) {
      if (first === 0) this.names = header.names;
      this.kind = header.kind;
      this.kinds = header.kinds;
      this.statistics = header.statistics;
      this.summary = frame.summary;
      steps.forEach((step, row) => this.all.push({ step, values: values.subarray(row * layers, (row + 1) * layers) }));
    } else {
      steps.forEach((step, row) => {
        const level = histogram.subarray(row * header.bins, row * header.bins + (bins[row] as number));
        const has = level.some((each) => each > 0);
        this.one.push({
          step,
          values: STATISTICS.map((_, statistic) => values[statistic * rows + row] as number),
          histogram: has ? level : new Uint16Array(),
        });
      });
    }
    return true;
  }

  /** What is told of a layer now. */
  told(place: number, what: Summary): number {
    return this.summary[SUMMARY.indexOf(what) * this.names.length + place] ?? NaN;
  }
}

export function of(row: OneRow, statistic: Statistic): number {
  return row.values[STATISTICS.indexOf(statistic)] as number;
}
