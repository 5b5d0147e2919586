// The x axis that all panels share: its scale, and what zooming and following do to it.

import type { Axis, View } from "../view";
import { Scale } from "./axes";
import { COLUMNS } from "./run_curves";
import type { ChartRuns } from "./runs";

export class XAxis {
  readonly #view: View;
  readonly #runs: ChartRuns;

  constructor(view: View, runs: ChartRuns) {
    this.#view = view;
    this.#runs = runs;
  }

  get #log(): boolean {
    const { axis, logX } = this.#view.get();
    return logX && axis !== "wall";
  }

  #reach(log: boolean): [number, number] | null {
    const { axis, hiddenRuns } = this.#view.get();
    return this.#runs.reach(axis, log, new Set(hiddenRuns));
  }

  scale(): Scale {
    const { axis, zoom, follow } = this.#view.get();
    const log = this.#log;
    const reach = this.#reach(log);
    if (zoom && (!log || zoom.max > 0)) {
      const width = zoom.max - zoom.min;
      const [min, max] = follow && reach ? [reach[1] - width, reach[1]] : [zoom.min, zoom.max];
      return new Scale(log && !(min > 0) ? Math.min(reach?.[0] ?? 1, max / 10) : min, max, log);
    }
    if (!reach) {
      const start = axis === "wall" ? this.#runs.focus.start() : log ? 1 : 0;
      return new Scale(start, axis === "wall" ? start + 60 : 10, log);
    }
    const [min, max] = reach;
    if (min < max) return new Scale(min, max, log);
    // One point: in the middle
    if (log) return new Scale(min / 10, max * 10, true);
    const air = axis === "epoch" ? 0.5 : axis === "step" || axis === "samples" ? Math.max(1, 0.1 * Math.abs(min)) : 30;
    return new Scale(min - air, max + air);
  }

  /** Show another x axis; a zoom stays where it is in the watched run. */
  setAxis(axis: Axis): void {
    const { axis: before, zoom } = this.#view.get();
    if (axis === before) return;
    const run = this.#runs.focus;
    const move = (value: number): number | null => {
      const place = run.translate(value + (before === "time" ? run.start() : 0), COLUMNS[before], COLUMNS[axis]);
      return place === null ? null : place - (axis === "time" ? run.start() : 0);
    };
    const [min, max] = zoom ? [move(zoom.min), move(zoom.max)] : [null, null];
    this.#view.set({ axis, zoom: min !== null && max !== null && min < max ? { min, max } : null });
  }

  setFollow(follow: boolean): void {
    const { zoom } = this.#view.get();
    const reach = this.#reach(false);
    // Without a zoom there is nothing to move along: then the last quarter of what there is
    if (follow && !zoom && reach && reach[0] < reach[1]) {
      this.#view.set({ follow, zoom: { min: reach[1] - (reach[1] - reach[0]) / 4, max: reach[1] } });
    } else {
      const { min, max } = this.scale();
      // Where it is when it stops, it stays.
      this.#view.set(follow || !zoom ? { follow } : { follow, zoom: { min, max } });
    }
  }

  /** Show another part of the run, of the same length, as far as there is one. */
  pan(min: number, max: number): void {
    const log = this.#log;
    const reach = this.#reach(log);
    if (!reach || !this.#view.get().zoom || reach[0] >= reach[1]) return;
    const whole = new Scale(...reach, log);
    const [from, to] = [whole.toUnit(min), whole.toUnit(max)];
    const back = from < 0 ? -from : to > 1 ? 1 - to : 0;
    this.#view.set({ zoom: { min: whole.fromUnit(from + back), max: whole.fromUnit(to + back) }, follow: false });
  }

  zoom(min: number, max: number): void {
    const reach = this.#reach(this.#log);
    if (!reach) return;
    [min, max] = [Math.max(min, reach[0]), Math.min(max, reach[1])];
    if (min <= reach[0] && max >= reach[1]) return this.#view.set({ zoom: null, follow: false });
    // Not into what a double cannot tell apart
    const least = Math.max(this.#view.get().axis === "step" ? 1 : 1e-6, 1e-12 * Math.abs(max));
    if (max - min < least) return;
    this.#view.set({ zoom: { min, max }, follow: false });
  }
}
