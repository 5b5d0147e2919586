// Pictures of many numbers as colours: the values of one layer over the steps, and one statistic of all layers. Nothing
// here knows a browser.

import { of, shareOf, type OneRow } from "./frame";

/** Cells of the common axis onto which the bins of all steps are laid. */
export const CELLS = 96;

/** From few to many: each colour is lighter than the one before it and yellower, also for who sees no red or green. */
const DARK = [[27, 30, 66], [45, 72, 140], [38, 124, 148], [70, 174, 122], [168, 212, 84], [250, 236, 110]];
const LIGHT = [[232, 236, 214], [160, 208, 170], [74, 160, 160], [46, 108, 156], [48, 58, 128], [32, 16, 64]];

/** 256 colours from few to many as red, green, blue. */
export function colours(dark: boolean): Uint8Array {
  const stops = dark ? DARK : LIGHT;
  const table = new Uint8Array(256 * 3);
  for (let index = 0; index < 256; index++) {
    const at = (index / 255) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    for (let part = 0; part < 3; part++) {
      const [low, high] = [stops[from]?.[part] as number, stops[from + 1]?.[part] as number];
      table[3 * index + part] = Math.round(low + (at - from) * (high - low));
    }
  }
  return table;
}

/** The y axis of a layer: linear, or linear about 0 and logarithmic far from it. */
export class ValueAxis {
  readonly #knee: number;
  readonly #low: number;
  readonly #high: number;

  constructor(
    readonly min: number,
    readonly max: number,
    readonly log: boolean,
  ) {
    this.#knee = Math.max(Math.abs(min), Math.abs(max)) / 1_000 || 1;
    this.#low = this.#bend(min);
    this.#high = this.#bend(max);
  }

  #bend(value: number): number {
    return this.log ? Math.sign(value) * Math.log1p(Math.abs(value) / this.#knee) : value;
  }

  /** 0 at `min`, 1 at `max`. */
  toUnit(value: number): number {
    return (this.#bend(value) - this.#low) / (this.#high - this.#low);
  }

  fromUnit(unit: number): number {
    const bent = this.#low + unit * (this.#high - this.#low);
    return this.log ? Math.sign(bent) * Math.expm1(Math.abs(bent)) * this.#knee : bent;
  }
}

/** The axis that has all values of a layer; null if it has no histogram. */
export function axisOf(rows: readonly OneRow[], log: boolean): ValueAxis | null {
  let [min, max] = [Infinity, -Infinity];
  for (const row of rows) {
    if (row.histogram.length === 0) continue;
    min = Math.min(min, of(row, "minimum"));
    max = Math.max(max, of(row, "maximum"));
  }
  if (!Number.isFinite(min) || !Number.isFinite(max)) return null;
  if (min === max) {
    const air = Math.abs(min) / 10 || 1;
    return new ValueAxis(min - air, max + air, log);
  }
  return new ValueAxis(min, max, log);
}

/** Lay a histogram onto the cells of an axis, as if the elements of a bin were spread evenly in it; shares by cell. */
export function resample(row: OneRow, axis: ValueAxis, cells = CELLS): Float64Array {
  const found = new Float64Array(cells);
  const [minimum, maximum, bins] = [of(row, "minimum"), of(row, "maximum"), row.histogram.length];
  const width = (maximum - minimum) / bins;
  const last = cells - 1;
  const cellOf = (value: number): number => Math.min(last, Math.max(0, Math.floor(axis.toUnit(value) * cells)));
  row.histogram.forEach((level, bin) => {
    if (level === 0) return;
    const share = shareOf(level);
    const low = minimum + bin * width;
    const high = bin === bins - 1 ? maximum : low + width;
    const [from, to] = [cellOf(low), cellOf(high)];
    if (from === to || !(high > low)) {
      found[from] = (found[from] as number) + share;
      return;
    }
    for (let cell = from; cell <= to; cell++) {
      const begin = Math.max(low, axis.fromUnit(cell / cells));
      const end = cell === last ? high : Math.min(high, axis.fromUnit((cell + 1) / cells));
      found[cell] = (found[cell] as number) + (share * Math.max(0, end - begin)) / (high - low);
    }
  });
  return found;
}

/** The bin of a histogram that has a value; null if none has. */
export function binAt(row: OneRow, value: number): { low: number; high: number; share: number; bin: number } | null {
  const [minimum, maximum, bins] = [of(row, "minimum"), of(row, "maximum"), row.histogram.length];
  if (bins === 0 || !(value >= minimum && value <= maximum)) return null;
  const width = (maximum - minimum) / bins;
  const bin = width > 0 ? Math.min(bins - 1, Math.floor((value - minimum) / width)) : 0;
  const high = bin === bins - 1 ? maximum : minimum + (bin + 1) * width;
  return { low: minimum + bin * width, high, share: shareOf(row.histogram[bin] as number), bin };
}

/** From which number to which colours go, and whether by factors: where numbers are of very different sizes. */
export interface ColourScale {
  min: number;
  max: number;
  log: boolean;
}

/** Shares below this have the first colour. */
export const FEWEST = 1e-5;
export const SHARES: ColourScale = { min: FEWEST, max: 1, log: true };

export function scaleOf(rows: readonly { values: Float32Array }[], statistic: string): ColourScale {
  if (statistic === "dead") return { min: 0, max: 1, log: false };
  const log = statistic === "norm" || statistic === "update_ratio" || statistic === "std";
  let [min, max] = [Infinity, -Infinity];
  for (const { values } of rows) {
    for (const value of values) {
      if (!Number.isFinite(value) || (log && value <= 0)) continue;
      if (value < min) min = value;
      if (value > max) max = value;
    }
  }
  return min <= max ? { min, max, log } : { min: log ? 1 : 0, max: 1, log };
}

/** Tells the number of a value's colour, 0 to 255; 256 for what is not finite, -1 for what was not measured. */
export function colouring({ min, max, log }: ColourScale): (value: number) => number {
  const from = log ? Math.log(min) : min;
  const factor = 255 / ((log ? Math.log(max) : max) - from);
  return (value) => {
    if (value !== value) return -1;
    if (value === Infinity || value === -Infinity) return 256;
    if (factor === Infinity) return 128; // all are the same
    if (log && value <= 0) return 0;
    const colour = Math.round(((log ? Math.log(value) : value) - from) * factor);
    return colour < 0 ? 0 : colour > 255 ? 255 : colour;
  };
}

/** Which row each of `width` pixels shows: every row reaches half-way to its neighbours, also where few are there. */
export function rowsAt(steps: readonly number[], width: number): { rows: Int32Array; from: number; to: number } {
  const count = steps.length;
  const rows = new Int32Array(width);
  const usual = count > 1 ? ((steps[count - 1] as number) - (steps[0] as number)) / (count - 1) : 1;
  const from = (steps[0] ?? 0) - usual / 2;
  const to = (steps[count - 1] ?? 0) + usual / 2;
  let row = 0;
  for (let x = 0; x < width; x++) {
    const step = from + ((x + 0.5) / width) * (to - from);
    while (row + 1 < count && Math.abs((steps[row + 1] as number) - step) <= Math.abs((steps[row] as number) - step)) row++;
    rows[x] = row;
  }
  return { rows, from, to };
}
