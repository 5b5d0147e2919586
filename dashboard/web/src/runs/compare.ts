// What differs between runs: a table of settings and figures, and its text as Markdown and CSV.

import { csvLine } from "../charts/export";
import * as format from "../format";
import type { RunRow } from "../protocol";
import { BEST, compareText, LAST, settingOf, valueOf, type Value } from "./fields";

export type Better = "min" | "max";

export interface Line {
  /** Name of a setting, or of a metric with what of it: `best val_loss`. */
  name: string;
  kind: "setting" | "metric";
  /** One for each run; null where a run has none. */
  values: Value[];
  /** Runs with the best value of a metric, by their place. */
  best: number[];
}

export interface Comparison {
  runs: RunRow[];
  lines: Line[];
  /** Settings that are the same in all runs. */
  same: number;
}

/** Compare runs: settings that differ, then metrics: monitored ones first, then those that most of the runs have. */
export function compare(runs: RunRow[], better: ReadonlyMap<string, Better> = new Map()): Comparison {
  const names = [...new Set(runs.flatMap(({ hyperparameters }) => Object.keys(hyperparameters)))].sort(compareText);
  const settings: Line[] = names.map((name) => ({
    name,
    kind: "setting",
    values: runs.map((run) => settingOf(run, name)),
    best: [],
  }));
  const differing = settings.filter(({ values }) => new Set(values).size > 1);
  const monitored = new Set(runs.map(({ monitor }) => monitor));
  const having = new Map<string, number>();
  for (const name of runs.flatMap(({ figures }) => Object.keys(figures))) having.set(name, (having.get(name) ?? 0) + 1);
  const rank = (name: string): number => (monitored.has(name) ? Infinity : (having.get(name) as number));
  const metrics = [...having.keys()].sort((one, other) =>
    rank(one) === rank(other) ? compareText(one, other) : rank(other) - rank(one),
  );
  const lines = metrics.flatMap((metric) => {
    const direction = better.get(metric) ?? directionOf(runs, metric);
    const line = (kind: string, title: string): Line[] => {
      const values = runs.map((run) => valueOf(run, kind + metric, 0));
      return values.every((value) => value === null)
        ? []
        : [{ name: title, kind: "metric", values, best: bestOf(values, direction) }];
    };
    return [...line(BEST, `best ${metric}`), ...line(LAST, `last ${metric}`)];
  });
  return { runs, lines: [...differing, ...lines], same: settings.length - differing.length };
}

/** Which way a metric is better: a best value that is not the last one tells. */
export function directionOf(runs: readonly RunRow[], metric: string): Better | null {
  let sum = 0;
  for (const run of runs) {
    const [last, best] = [valueOf(run, LAST + metric, 0), valueOf(run, BEST + metric, 0)];
    if (typeof last === "number" && typeof best === "number") sum += Math.sign(last - best) || 0;
  }
  return sum > 0 ? "min" : sum < 0 ? "max" : null;
}

function bestOf(values: readonly Value[], better: Better | null): number[] {
  const numbers = values.filter((value): value is number => typeof value === "number" && Number.isFinite(value));
  if (better === null || numbers.length < 2) return [];
  const best = better === "min" ? Math.min(...numbers) : Math.max(...numbers);
  return values.flatMap((value, place) => (value === best ? [place] : []));
}

export function cellText(value: Value): string {
  return value === null ? format.NONE : typeof value === "number" ? format.compact(value) : value;
}

/** The table in Markdown, with the best values in bold. */
export function toMarkdown({ runs, lines }: Comparison): string {
  const cell = (text: string): string => text.replace(/[\\|`*_<>]/g, "\\$&").replace(/\s+/g, " ");
  const line = (cells: string[]): string => `| ${cells.join(" | ")} |`;
  return [
    line(["", ...runs.map(({ name }) => cell(name))]),
    line(["---", ...runs.map(() => "---")]),
    ...lines.map(({ name, values, best }) => {
      const texts = values.map((value, place) => {
        const text = cell(value === null ? "" : String(value));
        return best.includes(place) ? `**${text}**` : text;
      });
      return line([cell(name), ...texts]);
    }),
    "",
  ].join("\n");
}

/** The table as CSV, a column for each run. */
export function toCsv({ runs, lines }: Comparison): string {
  const rows = lines.map(({ name, values }) => [name, ...values.map((value) => (value === null ? "" : String(value)))]);
  return [["", ...runs.map(({ name }) => name)], ...rows].map(csvLine).join("");
}
