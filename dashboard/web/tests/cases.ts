// The cases of tests/support/run_filters.json, which the tests of the command line read, too.

import json from "../../../tests/support/run_filters.json";
import { Filter } from "../src/runs/filter";
import type { RunRow } from "../src/protocol";
import { row } from "./messages";

interface Run {
  [field: string]: unknown;
  key: string;
  id: string;
  started?: number;
  epoch?: number;
  epochs?: number;
  labels?: { name?: string; tags?: string[]; note?: string; archived?: boolean };
  metrics?: Record<string, { last: number | "NaN" | "Infinity"; best?: number }>;
}

interface Cases {
  now: number;
  fields: string[];
  states: string[];
  runs: Run[];
  filters: [string, string][];
  errors: [string, string][];
  orders: [string, string][];
  patterns: [string, string, boolean][];
  broken: [string, string][];
}

export const CASES = json as unknown as Cases;

/** The row that the server makes of a run. */
function rowOf({ key, id, started, epochs, labels = {}, metrics = {}, ...fields }: Run): RunRow {
  return row(key, {
    host: "", heard: 0, seconds: 0, step: 0, epoch: 0, monitor: "",
    ...fields,
    id,
    name: labels.name ?? id,
    started: started ?? 0,
    progress: epochs ? (fields.epoch ?? 0) / epochs : null,
    figures: Object.fromEntries(Object.entries(metrics).map(([name, { last, best }]) => [name, [last, best ?? null]])),
    tags: labels.tags ?? [],
    note: labels.note ?? "",
    archived: labels.archived ?? false,
  });
}

export const RUNS = CASES.runs.map(rowOf);

/** The keys of the runs that a filter finds, or its error. */
export function foundBy(text: string): string {
  const filter = new Filter(text, CASES.now);
  const problem = filter.problemWith(RUNS);
  return problem === "" ? RUNS.filter((run) => filter.test(run)).map(({ key }) => key).join(" ") : `error: ${problem}`;
}
