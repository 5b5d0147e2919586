// Which texts, pictures and tables the runs have published: their index, without the contents. No DOM.

import type { SampleEntry, SampleIndex } from "../protocol";

export interface Entry {
  run: string;
  seq: number;
  kind: "text" | "picture" | "table";
  step: number;
  epoch: number;
  time: number;
}

/** Samples of one key that a run has published at one step. */
export interface Moment {
  step: number;
  entries: readonly Entry[];
}

export class SampleStore {
  /** By run and key, in the order of their steps. */
  readonly #runs = new Map<string, Map<string, Moment[]>>();

  /** The server tells about a run from the beginning. */
  begin(run: string): void {
    this.#runs.delete(run);
  }

  add({ run, samples }: SampleIndex): void {
    let keys = this.#runs.get(run);
    if (keys === undefined) this.#runs.set(run, (keys = new Map()));
    for (const sample of samples) put(keys, run, sample);
  }

  has(runs: readonly string[]): boolean {
    return runs.some((run) => this.#runs.has(run));
  }

  /** Keys of some runs, in the order of the alphabet. */
  keys(runs: readonly string[]): string[] {
    return [...new Set(runs.flatMap((run) => [...(this.#runs.get(run)?.keys() ?? [])]))].sort();
  }

  /** The steps at which some runs have published a key, in their order. */
  steps(runs: readonly string[], key: string): number[] {
    const each = runs.map((run) => this.#moments(run, key).map(({ step }) => step));
    return each.length === 1 ? (each[0] as number[]) : [...new Set(each.flat())].sort((a, b) => a - b);
  }

  /** What a run has at a step, or at the last one before it; null for nothing. */
  at(run: string, key: string, step: number): Moment | null {
    const moments = this.#moments(run, key);
    return moments[after(moments, step) - 1] ?? null;
  }

  #moments(run: string, key: string): readonly Moment[] {
    return this.#runs.get(run)?.get(key) ?? [];
  }
}

function put(keys: Map<string, Moment[]>, run: string, [seq, key, kind, step, epoch, time]: SampleEntry): void {
  let moments = keys.get(key);
  if (moments === undefined) keys.set(key, (moments = []));
  const entry: Entry = { run, seq, kind, step, epoch, time };
  const place = after(moments, step);
  const last = moments[place - 1];
  if (last?.step === step) moments[place - 1] = { step, entries: [...last.entries, entry] };
  else moments.splice(place, 0, { step, entries: [entry] });
}

/** How many moments are not after a step. */
function after(moments: readonly Moment[], step: number): number {
  let [low, high] = [0, moments.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((moments[middle] as Moment).step <= step) low = middle + 1;
    else high = middle;
  }
  return low;
}
