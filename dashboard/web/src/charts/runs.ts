// The runs of the charts: the watched one, and those that are laid over it, each with its curves and its colour.

import type { RunInfo } from "../protocol";
import type { Axis } from "../view";
import type { RunCurves } from "./run_curves";
import type { RunGroup } from "./scene";

/** The colour of a run: that of its group. Runs without one have the colours after those of the groups. */
export function slotOf(run: RunCurves, all: readonly RunCurves[], groups: readonly RunGroup[] | null): number {
  if (groups === null) return run.slot;
  const isIn = (one: RunCurves): RunGroup | undefined => groups.find(({ runs }) => runs.includes(one));
  return isIn(run)?.slot ?? groups.length + all.filter((one) => isIn(one) === undefined).indexOf(run);
}

export class ChartRuns {
  /** The watched run. */
  focus: RunCurves;
  readonly #make: (info: RunInfo | null, slot: number) => RunCurves;
  readonly #overlaid = new Map<string, RunCurves>();
  #wanted: ReadonlySet<string> = new Set();

  constructor(make: (info: RunInfo | null, slot: number) => RunCurves) {
    this.#make = make;
    this.focus = make(null, 0);
  }

  /** The watched one first. */
  get all(): RunCurves[] {
    return [this.focus, ...this.#overlaid.values()];
  }

  get(key: string): RunCurves | null {
    return key === this.focus.key ? this.focus : (this.#overlaid.get(key) ?? null);
  }

  /** Watch another run, or the same one after a new connection; returns the run that is shown no longer. */
  watch(info: RunInfo | null): RunCurves | null {
    const before = this.focus;
    if (info !== null && info.key === before.info?.key) {
      before.reconnected(info);
      return null;
    }
    const stays = this.#wanted.has(before.key);
    if (stays) this.#overlaid.set(before.key, before);
    const known = info === null ? undefined : this.#overlaid.get(info.key);
    if (known && info) {
      this.#overlaid.delete(info.key);
      known.reconnected(info);
      this.focus = known;
    } else {
      this.focus = this.#make(info, this.#freeSlot(stays ? null : before));
    }
    if (stays) return null;
    before.leave();
    return before;
  }

  /** Lay a run over the watched one, or begin anew with one that is there; null if it is not wanted any more. */
  overlay(info: RunInfo): RunCurves | null {
    if (!this.#wanted.has(info.key) || info.key === this.focus.key) return null;
    const known = this.#overlaid.get(info.key);
    if (known) known.reconnected(info);
    else this.#overlaid.set(info.key, this.#make(info, this.#freeSlot(null)));
    return this.#overlaid.get(info.key) ?? null;
  }

  /** Lay only these runs over the watched one; returns those that are shown no longer. */
  keep(keys: readonly string[]): RunCurves[] {
    this.#wanted = new Set(keys);
    const gone = [...this.#overlaid.values()].filter(({ key }) => !this.#wanted.has(key));
    for (const run of gone) {
      this.#overlaid.delete(run.key);
      run.leave();
    }
    return gone;
  }

  /** The first colour that none of the runs has; that of `leaving` is free, too. */
  #freeSlot(leaving: RunCurves | null): number {
    const used = new Set(this.all.filter((run) => run !== leaving).map(({ slot }) => slot));
    let slot = 0;
    while (used.has(slot)) slot++;
    return slot;
  }

  /** First and last place on the x axis that any run has that is not hidden. */
  reach(axis: Axis, positive: boolean, hidden: ReadonlySet<string>): [number, number] | null {
    let [min, max] = [Infinity, -Infinity];
    for (const run of this.all) {
      const reach = hidden.has(run.key) && run !== this.focus ? null : run.reach(axis, positive);
      if (reach) [min, max] = [Math.min(min, reach[0]), Math.max(max, reach[1])];
    }
    return min <= max ? [min, max] : null;
  }

  /** The runs by a hyperparameter or "tag"; null without one, or with one run. */
  groups(by: string | null): RunGroup[] | null {
    if (by === null || this.all.length < 2) return null;
    const groups = new Map<string, RunCurves[]>();
    for (const run of this.all) {
      for (const value of this.#valuesOf(run, by)) groups.set(value, [...(groups.get(value) ?? []), run]);
    }
    return [...groups]
      .sort(([one], [other]) => one.localeCompare(other, undefined, { numeric: true }))
      .map(([value, runs], slot) => ({ name: by === "tag" ? value : `${by} ${value}`, slot, runs }));
  }

  #valuesOf(run: RunCurves, by: string): readonly string[] {
    if (by === "tag") return run.tags;
    const value = run.info?.hyperparameters?.[by];
    return value === undefined ? [] : [typeof value === "string" ? value : JSON.stringify(value)];
  }
}
