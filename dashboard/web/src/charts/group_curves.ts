// Several curves as one: their mean, and the least and the greatest of them, at each place where one of them has a
// point, or in each pixel where there are more. Between its points a curve counts in proportion; before its first and
// after its last one it does not count.

import type { Scale } from "./axes";
import { type Column, Curve } from "./series_store";
import { visible } from "./trace";

export interface Member {
  curve: Curve;
  /** What is drawn at its points. */
  values: Float64Array;
  /** What is subtracted from its column. */
  origin: number;
}

export interface GroupCurve {
  /** The mean; its columns are places on the x axis. */
  curve: Curve;
  low: Float64Array;
  high: Float64Array;
}

/** Places of the x axis at which any member has a point: one in each pixel, and one at either side of the view. */
export function places(members: readonly Member[], column: Column, x: Scale, pixels: number): Float64Array {
  const first = new Float64Array(pixels + 2).fill(NaN);
  for (const { curve, origin } of members) {
    const [from, to] = visible(curve, { column, x, origin });
    for (let index = from; index < to; index++) {
      const place = (curve[column][index] as number) - origin;
      const unit = x.toUnit(place);
      if (Number.isNaN(unit)) continue;
      const pixel = unit < 0 ? 0 : unit > 1 ? pixels + 1 : 1 + Math.min(pixels - 1, Math.floor(unit * pixels));
      const known = first[pixel] as number;
      // The nearest one on the left side, else the first one
      if (Number.isNaN(known) || (pixel === 0 ? place > known : place < known)) first[pixel] = place;
    }
  }
  return first.filter((place) => !Number.isNaN(place));
}

export function groupCurve(members: readonly Member[], column: Column, x: Scale, pixels: number): GroupCurve {
  const at = places(members, column, x, pixels);
  const [sum, count] = [new Float64Array(at.length), new Uint16Array(at.length)];
  const low = new Float64Array(at.length).fill(Infinity);
  const high = new Float64Array(at.length).fill(-Infinity);
  for (const { curve, values, origin } of members) {
    const column_ = curve[column];
    if (curve.length === 0) continue;
    let next = 0;
    for (let index = 0; index < at.length; index++) {
      const place = (at[index] as number) + origin;
      if (index === 0) next = curve.search(column, place);
      while (next < curve.length && (column_[next] as number) < place) next++;
      if (next === curve.length || (next === 0 && (column_[0] as number) > place)) continue;
      const [before, after] = [Math.max(next - 1, 0), next];
      const [x0, x1] = [column_[before] as number, column_[after] as number];
      const share = x1 > x0 ? (place - x0) / (x1 - x0) : 1;
      const value = (1 - share) * (values[before] as number) + share * (values[after] as number);
      sum[index] = (sum[index] as number) + value;
      count[index] = (count[index] as number) + 1;
      if (value < (low[index] as number)) low[index] = value;
      if (value > (high[index] as number)) high[index] = value;
    }
  }
  const curve = new Curve(Math.max(at.length, 1));
  let kept = 0;
  for (let index = 0; index < at.length; index++) {
    if (count[index] === 0) continue;
    const place = at[index] as number;
    curve.push(place, place, place, place, (sum[index] as number) / (count[index] as number));
    [low[kept], high[kept]] = [low[index] as number, high[index] as number];
    kept++;
  }
  return { curve, low, high };
}
