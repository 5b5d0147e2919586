// The y axis of a panel: from the least to the greatest value in view, or, where the viewer wants that, to what is
// usual, so that one spike does not make a flat line of all else. What then is outside is counted and drawn at the
// edge. Nothing here knows a browser.

import { fitScale, Scale } from "./axes";
import type { Scene } from "./scene";
import type { Curve } from "./series_store";
import { edges, extent, inside } from "./trace";

/** A curve with what is drawn at its points: their values, or the average of these. */
export interface Drawn {
  curve: Curve;
  values: Float64Array;
  /** Its run's. */
  scene: Pick<Scene, "column" | "x" | "origin">;
  /** Further values at its points, which are drawn as well. */
  bounds?: readonly Float64Array[];
}

export interface Fit {
  scale: Scale;
  /** Points in view that a logarithmic axis has no place for. */
  belowZero: number;
  /** Points in view that are above and below the scale. */
  above: number;
  below: number;
  /** Whether there may be more of them: of merged points only the least and greatest are known. */
  isAtLeast: boolean;
}

type Range = [number, number];

/** So many values of a curve tell what is usual; more only take longer. */
const SAMPLED = 1_000;
/** Values that are so many quartile distances away from the quartiles are not usual: far out, as Tukey calls it. */
const FAR = 3;
/** What is usual is hard to see if it takes less of the whole scale than this. */
const SQUASHED = 0.2;

const NOTHING: Range = [Infinity, -Infinity];

/** Ends of the axis that the viewer has set; null for those that the values set. */
export interface Ends {
  min: number | null;
  max: number | null;
}

/** Fit an axis to all values in view of some curves, or to the usual ones of each, between the ends that are set. */
export function fit(drawn: readonly Drawn[], view: Pick<Scene, "logY">, toUsual: boolean, ends: Ends | null = null): Fit {
  let range: Range = NOTHING;
  for (const { curve, values, scene, bounds = [] } of drawn) {
    const inner = inside(curve, scene);
    for (const bound of bounds) range = extent(bound, inner, view.logY, range);
    if (toUsual) {
      range = usual(curve.value, inner, view.logY, range);
      continue;
    }
    range = extent(curve.value, inner, view.logY, range);
    if (values !== curve.value) range = extent(values, inner, view.logY, range);
    // Where a line enters and leaves the view
    for (const edge of edges(curve, scene)) range = extent(Float64Array.of(edge), [0, 1], view.logY, range);
  }
  const fitted = fitScale(range[0], range[1], view.logY);
  const scale = ends === null ? fitted : between(fitted, ends);
  const found: Fit = { scale, belowZero: 0, above: 0, below: 0, isAtLeast: false };
  for (const { curve, scene } of drawn) {
    const hasNone = view.logY && (curve.least?.value ?? 1) <= 0;
    if (hasNone || toUsual || ends !== null) count(curve, scene, view.logY, found);
  }
  return found;
}

/** A scale with other ends; where one is set beyond all values, the other one gives way. */
function between(fitted: Scale, ends: Ends): Scale {
  const { log } = fitted;
  // A logarithmic axis has no place for an end of 0 or less.
  const isPlace = (end: number | null): end is number => end !== null && (!log || end > 0);
  let min = isPlace(ends.min) ? ends.min : fitted.min;
  let max = isPlace(ends.max) ? ends.max : fitted.max;
  if (min >= max) {
    const size = log ? 10 : Math.max(fitted.max - fitted.min, 1e-9 * Math.abs(min));
    if (isPlace(ends.max)) min = log ? max / size : max - size;
    else max = log ? min * size : min + size;
  }
  return min < max && Number.isFinite(min) && Number.isFinite(max) ? new Scale(min, max, log) : fitted;
}

function count(curve: Curve, scene: Drawn["scene"], logY: boolean, found: Fit): void {
  const [from, to] = inside(curve, scene);
  const { min, max } = found.scale;
  const before = found.above + found.below;
  for (let index = from; index < to; index++) {
    const value = curve.value[index] as number;
    if (logY && value <= 0) found.belowZero++;
    else if (value > max) found.above++;
    else if (value < min) found.below++;
  }
  const hasSome = found.above + found.below > before;
  if (hasSome && curve.reducedTo >= (curve.step[from] as number)) found.isAtLeast = true;
}

/** Whether a few values far out leave little room for the usual ones. */
export function isSquashed(drawn: readonly Drawn[], view: Pick<Scene, "logY">): boolean {
  let [all, some]: [Range, Range] = [NOTHING, NOTHING];
  for (const { curve, scene } of drawn) {
    const inner = inside(curve, scene);
    all = extent(curve.value, inner, view.logY, all);
    some = usual(curve.value, inner, view.logY, some);
  }
  const length = ([low, high]: Range): number => (view.logY ? Math.log10(high / low) : high - low);
  return length(all) > 0 && length(some) < SQUASHED * length(all);
}

/** Least and greatest of the usual values, beside what is there already. */
function usual(values: Float64Array, [from, to]: Range, log: boolean, known: Range): Range {
  const every = Math.max(1, Math.floor((to - from) / SAMPLED));
  const sample: number[] = [];
  for (let index = from; index < to; index += every) {
    const value = values[index] as number;
    if (!log || value > 0) sample.push(log ? Math.log10(value) : value);
  }
  if (sample.length < 4) return extent(values, [from, to], log, known);
  const sorted = Float64Array.from(sample).sort();
  const [first, third] = [sorted[sorted.length >> 2] as number, sorted[(3 * sorted.length) >> 2] as number];
  const reach = FAR * (third - first);
  let [low, high] = known;
  for (let index = from; index < to; index++) {
    const value = values[index] as number;
    const place = log ? Math.log10(value) : value;
    if (!(place >= first - reach && place <= third + reach)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}
