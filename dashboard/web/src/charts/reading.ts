// What can be read off a curve: its best value, its trend, the point that a cursor means.

import type { NonFinite, SeriesInfo } from "../protocol";
import type { Scene } from "./scene";
import type { Curve, Point } from "./series_store";

export function bestOf(curve: Curve, info: SeriesInfo): Point | null {
  if (info.better === null || curve.length < 2) return null;
  return info.better === "min" ? curve.least : curve.greatest;
}

/** Index of the point that a cursor at x means: the nearest, but none before the curve has begun; -1 for none. */
export function indexAt(curve: Curve, { column, origin, x: { min, max } }: Scene, x: number): number {
  const index = curve.nearest(column, x + origin);
  if (index !== 0) return index;
  return (curve[column][0] as number) - origin - x > 0.02 * (max - min) ? -1 : 0;
}

export function markText(kind: NonFinite[2]): string {
  return { nan: "NaN", inf: "∞", "-inf": "−∞", mixed: "not finite" }[kind];
}

/** Whether the last tenth of a curve is above or below the tenth before, by more than it spreads. */
export function trend(curve: Curve): string {
  const size = Math.floor(curve.length / 10);
  if (size < 2) return "too short for a trend";
  const mean = (from: number): number => {
    let sum = 0;
    for (let index = from; index < from + size; index++) sum += (curve.value[index] as number) / size;
    return sum;
  };
  const [before, now] = [mean(curve.length - 2 * size), mean(curve.length - size)];
  let spread = 0;
  for (let index = curve.length - size; index < curve.length; index++)
    spread += Math.abs((curve.value[index] as number) - now) / size;
  if (Math.abs(now - before) <= Math.max(spread / Math.sqrt(size), 1e-9 * Math.abs(now))) return "level";
  return now < before ? "falling" : "rising";
}
