// The values of a panel's curves as they are drawn: smoothed, the last ones, those under the cursor, the best; and in
// words.

import { formatWithUnit } from "./axes";
import type { Latest, SeriesInfo } from "../protocol";
import { toNumber } from "../protocol";
import { bestOf, indexAt, markText, trend } from "./reading";
import type { RunCurves } from "./run_curves";
import type { Scene } from "./scene";
import type { Curve } from "./series_store";
import { Smoothed } from "./smoothing";

/** A curve of a panel: one metric of one run. */
export interface PanelCurve {
  run: RunCurves;
  info: SeriesInfo;
}

/** Where curves come from. */
export interface Source {
  /** The curve as it is to be drawn now. */
  curve(of: PanelCurve): Curve | null;
  latest(of: PanelCurve): Latest["values"][string] | null;
}

/** A value in words, and what it is an average of where that is another one. */
export type Said = readonly [value: string, raw: string];

const NOTHING: Said = ["", ""];

export class Values {
  /** Steps that the weight of smoothing is for: how far the points of the densest curve are apart. */
  unit = 1;
  readonly #source: Source;
  readonly #smoothed = new WeakMap<Curve, Smoothed>();

  constructor(source: Source) {
    this.#source = source;
  }

  /** What is drawn at the points of a curve. */
  drawn(curve: Curve, scene: Scene): Float64Array {
    if (scene.smoothing === 0) return curve.value;
    let smoothed = this.#smoothed.get(curve);
    if (smoothed?.weight !== scene.smoothing || smoothed.unit !== this.unit) {
      smoothed = new Smoothed(scene.smoothing, this.unit);
      this.#smoothed.set(curve, smoothed);
    }
    return smoothed.update(curve);
  }

  /** The last value, also of a curve whose points are not here. */
  last(of: PanelCurve, scene: Scene, isVisible: boolean): Said {
    const { info } = of;
    const latest = this.#source.latest(of)?.[0] ?? null;
    const curve = this.#source.curve(of);
    if (!curve || !isVisible) return [latest === null ? "" : formatWithUnit(toNumber(latest), info.unit), ""];
    const mark = curve.marks.at(-1);
    const last = curve.last;
    if (mark && (last === null || mark[1] > last.step)) return [markText(mark[2]), ""];
    // Of merged points the last one may be an extreme before it.
    const reducedTo = of.run.store.curves.get(info.id)?.reducedTo ?? -Infinity;
    const isMerged = last !== null && reducedTo >= last.step;
    if (isMerged && latest !== null && scene.smoothing === 0) return [formatWithUnit(toNumber(latest), info.unit), ""];
    return last ? this.#point(info, curve, curve.length - 1, scene) : NOTHING;
  }

  /** The value at the cursor. */
  at(of: PanelCurve, shared: Scene, x: number): Said {
    const curve = this.#source.curve(of);
    if (!curve) return NOTHING;
    const scene = shared.of(of.run);
    const index = indexAt(curve, scene, x);
    const mark = curve.marks.find(([start, end]) => {
      const [first, last] = [scene.placeOf(start), scene.placeOf(end)];
      if (first === null || last === null) return false;
      if (x >= first && x <= last) return true;
      const distance = Math.min(Math.abs(x - first), Math.abs(x - last));
      return index < 0 || distance < Math.abs((curve[scene.column][index] as number) - scene.origin - x);
    });
    if (mark) return [markText(mark[2]), ""];
    return index < 0 ? NOTHING : this.#point(of.info, curve, index, scene);
  }

  /** The best value there was. */
  best(of: PanelCurve): string {
    const { info } = of;
    if (info.better === null) return "";
    const curve = this.#source.curve(of);
    const latest = this.#source.latest(of);
    const known = [curve ? bestOf(curve, info)?.value : null, latest?.[info.better === "min" ? 1 : 3]];
    const values = known.filter((value) => typeof value === "number");
    return values.length > 0 ? formatWithUnit((info.better === "min" ? Math.min : Math.max)(...values), info.unit) : "";
  }

  /** Last value, best value and trend, in words. */
  summary(of: PanelCurve): string {
    const { info } = of;
    const curve = this.#source.curve(of);
    const last = curve?.last;
    if (!curve || !last) return "no values yet";
    const best = bestOf(curve, info);
    const bestText = best ? `, best ${formatWithUnit(best.value, info.unit)} at step ${best.step}` : "";
    const marks = curve.marks.reduce((total, mark) => total + mark[3], 0);
    const notFinite = marks > 0 ? `, ${marks} values not finite` : "";
    return `last ${formatWithUnit(last.value, info.unit)} at step ${last.step}${bestText}, ${trend(curve)}${notFinite}`;
  }

  #point(info: SeriesInfo, curve: Curve, index: number, scene: Scene): Said {
    const raw = formatWithUnit(curve.value[index] as number, info.unit);
    if (scene.smoothing === 0) return [raw, ""];
    return [formatWithUnit(this.drawn(curve, scene)[index] as number, info.unit), raw];
  }
}
