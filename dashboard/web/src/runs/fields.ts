// Fields of runs: what the list is filtered and sorted by, and shows in columns. Besides those of every run there are
// `val_loss` or `last.val_loss` and `best.val_loss` for each metric, and `optimizer.lr` or `hparams.optimizer.lr` for
// each hyperparameter.
//
// What they are and how they are ordered is what `engine/catalog/run_fields.py` says, which the command line uses;
// `tests/support/run_filters.json` is tried with both.

import * as format from "../format";
import { hasEnded } from "../model";
import { toNumber, type RunRow } from "../protocol";

export type Field = string;
export type Kind = "text" | "tag" | "state" | "flag" | "number" | "duration" | "date";

/** Fields that every run has: what kind of values they have, and how their columns are headed. */
export const FIELDS: Readonly<Record<string, { kind: Kind; title: string }>> = {
  name: { kind: "text", title: "Name" },
  id: { kind: "text", title: "Id" },
  key: { kind: "text", title: "Key" },
  state: { kind: "state", title: "State" },
  tag: { kind: "tag", title: "Tags" },
  note: { kind: "text", title: "Note" },
  host: { kind: "text", title: "Host" },
  device: { kind: "text", title: "Device" },
  why: { kind: "text", title: "Why" },
  archived: { kind: "flag", title: "Archived" },
  step: { kind: "number", title: "Steps" },
  epoch: { kind: "number", title: "Epochs" },
  progress: { kind: "number", title: "Progress" },
  attempt: { kind: "number", title: "Attempt" },
  metric: { kind: "text", title: "Metric" },
  last: { kind: "number", title: "Last" },
  best: { kind: "number", title: "Best" },
  duration: { kind: "duration", title: "Duration" },
  age: { kind: "duration", title: "Age" },
  started: { kind: "date", title: "Started" },
  heard: { kind: "date", title: "Heard" },
};
/** A column that only shows: the curve of the monitored metric. */
export const SPARK = "spark";
export const STATES: readonly string[] = [
  "live", "starting", "waiting", "running", "validating", "paused", "stopping", "closing",
  "completed", "stopped", "cancelled", "failed", "lost",
];
export const LAST = "last.";
export const BEST = "best.";
export const HPARAMS = "hparams.";
/** What other tools call fields and states. */
const MEANT: Readonly<Record<string, string>> = {
  status: "state", is: "state", tags: "tag", label: "tag", labels: "tag", notes: "note", description: "note",
  seconds: "duration", runtime: "duration", elapsed: "duration", date: "started", created: "started", time: "started",
  directory: "key", path: "key", dir: "key", folder: "key", hostname: "host", machine: "host", node: "host",
  reason: "why", error: "why", finished: "completed", success: "completed", succeeded: "completed", done: "completed",
  crashed: "failed", errored: "failed", killed: "lost", dead: "lost", active: "live", alive: "live", unfinished: "live",
};

export type Value = number | string | null;

// Values

/** The values of a run in a field: none, one, or several; a metric may have a hyperparameter's name. */
export function valuesOf(row: RunRow, field: Field, now: number): (number | string)[] {
  const name = field.toLowerCase();
  if (Object.hasOwn(FIELDS, name)) {
    if (name === "tag") return row.tags;
    const value = ofRun(row, name, now);
    return value === null || value === "" ? [] : [value];
  }
  for (const [start, which] of [[LAST, 0], [BEST, 1]] as const) {
    const metric = field.slice(start.length);
    if (!field.startsWith(start) || !Object.hasOwn(row.figures, metric)) continue;
    const value = figure(row, metric, which);
    return value === null ? [] : [value];
  }
  const settings = field.startsWith(HPARAMS) ? [field, field.slice(HPARAMS.length)] : [field];
  return [figure(row, field, 0), ...settings.map((name) => settingOf(row, name))].filter((value) => value !== null);
}

function ofRun(row: RunRow, name: string, now: number): Value {
  switch (name) {
    case "archived":
      return row.archived ? "yes" : "no";
    case "metric":
      return row.monitor;
    case "last":
      return figure(row, row.monitor, 0);
    case "best":
      return figure(row, row.monitor, 1);
    case "duration":
      return row.seconds || null;
    case "age":
      return row.started > 0 ? ageOf(row.started, now) : null;
    case "started":
    case "heard":
      return row[name] || null;
    default:
      return row[name as "name"] ?? null;
  }
}

/** What stands in a field of a run, and what it is sorted by; null if nothing does. */
export function valueOf(row: RunRow, field: Field, now: number): Value {
  const values = valuesOf(row, field, now);
  return field === "tag" ? values.join(", ") || null : (values[0] ?? null);
}

function figure(row: RunRow, metric: string, which: 0 | 1): number | null {
  return Object.hasOwn(row.figures, metric) ? toNumber(row.figures[metric]?.[which] ?? null) : null;
}

/** A hyperparameter as a number or in words; null if the run has none of this name. */
export function settingOf({ hyperparameters }: RunRow, name: string): Value {
  if (!Object.hasOwn(hyperparameters, name)) return null;
  const value = hyperparameters[name];
  if (value === undefined || value === null) return null;
  return typeof value === "number" || typeof value === "string" ? value : JSON.stringify(value);
}

/** Seconds since a time of a server whose clock may be ahead of the one that is looked at: never negative. */
export function ageOf(time: number, now: number): number {
  return Math.max(0, now - time);
}

export function isLive(row: RunRow): boolean {
  return !hasEnded(row.state);
}

// Names

/** Names of the metrics and hyperparameters that some of the runs have. */
export class RunNames {
  readonly #rows: readonly RunRow[];

  constructor(rows: Iterable<RunRow>) {
    this.#rows = [...rows];
  }

  get isEmpty(): boolean {
    return this.#rows.length === 0;
  }

  // Mostly a name is known, and one of the first runs has it.

  has(name: string): boolean {
    if (Object.hasOwn(FIELDS, name.toLowerCase()) || this.#isMetric(name) || this.isHyperparameter(name)) return true;
    return (name.startsWith(LAST) || name.startsWith(BEST)) && this.#isMetric(name.slice(LAST.length));
  }

  #isMetric(name: string): boolean {
    return this.#rows.some(({ figures }) => Object.hasOwn(figures, name));
  }

  isHyperparameter(name: string): boolean {
    const names = name.startsWith(HPARAMS) ? [name, name.slice(HPARAMS.length)] : [name];
    return this.#rows.some(({ hyperparameters }) => names.some((each) => Object.hasOwn(hyperparameters, each)));
  }

  /** That no run has a field, and which was meant; empty if one has it, or if there are no runs. */
  problem(name: string): string {
    if (this.isEmpty || this.has(name)) return "";
    const metrics = new Set(this.#rows.flatMap(({ figures }) => Object.keys(figures)));
    const settings = new Set(this.#rows.flatMap(({ hyperparameters }) => Object.keys(hyperparameters)));
    let meant: string | null = null;
    for (const [start, names] of [[LAST, metrics], [BEST, metrics], [HPARAMS, settings]] as const) {
      const near = name.startsWith(start) ? nearest(name.slice(start.length), names) : null;
      if (near !== null) meant = start + near;
    }
    meant ??= nearest(name, new Set([...Object.keys(FIELDS), ...metrics, ...settings]));
    return `no run has '${name}'${meant === null ? "" : `; did you mean '${meant}'?`}`;
  }
}

/** The one of several names that was probably meant: another tool's word for it, or nearly its spelling. */
export function nearest(name: string, names: Iterable<string>): string | null {
  const known = [...names].sort((one, other) => (one < other ? -1 : 1));
  const lower = name.toLowerCase();
  const other = Object.hasOwn(MEANT, lower) ? (MEANT[lower] as string) : "";
  if (known.includes(other)) return other;
  // `lr` for `optimizer.lr`, `metrics.val_loss` for `val_loss`, and both at once
  const dot = lower.indexOf(".");
  for (const part of new Set([lower, (dot < 0 ? "" : lower.slice(dot + 1)) || lower])) {
    for (const each of known) if (part === each.toLowerCase() || each.toLowerCase().endsWith(`.${part}`)) return each;
  }
  const letters = [...lower];
  if (letters.length > 2) {
    const longer = known.find((each) => each.toLowerCase().startsWith(lower));
    if (longer !== undefined) return longer;
  }
  let best = Math.max(1, Math.floor(letters.length / 3)) + 1;
  let found: string | null = null;
  for (const each of known) {
    const others = [...each.toLowerCase()];
    if (Math.abs([...each].length - letters.length) >= best) continue;
    const between = distance(letters, others);
    if (between < best) [best, found] = [between, each];
  }
  return found;
}

/** How many letters to add, remove, replace or swap with their neighbours make one text the other. */
function distance(one: string[], other: string[]): number {
  let before: number[] = [];
  let last = Array.from({ length: other.length + 1 }, (_, index) => index);
  one.forEach((letter, row) => {
    const line = [row + 1];
    other.forEach((another, column) => {
      let cost = Math.min((line[column] as number) + 1, (last[column + 1] as number) + 1, (last[column] as number) + Number(letter !== another));
      if (row > 0 && column > 0 && letter === other[column - 1] && one[row - 1] === another) {
        cost = Math.min(cost, (before[column - 1] as number) + 1);
      }
      line.push(cost);
    });
    [before, last] = [last, line];
  });
  return last[other.length] as number;
}

/** How a field is headed. */
export function titleOf(field: Field): string {
  if (field === SPARK) return "Curve";
  if (Object.hasOwn(FIELDS, field)) return FIELDS[field]?.title as string;
  if (field.startsWith(LAST)) return field.slice(LAST.length);
  if (field.startsWith(BEST)) return `best ${field.slice(BEST.length)}`;
  return field.startsWith(HPARAMS) ? field.slice(HPARAMS.length) : field;
}

/** A value as it stands in a column. */
export function textOf(row: RunRow, field: Field, now: number): string {
  const value = valueOf(row, field, now);
  if (value === null) return "";
  if (typeof value !== "number") return value;
  switch (FIELDS[field]?.kind) {
    case "date":
      return format.dateTime(value);
    case "duration":
      return field === "age" ? format.shortDuration(value) : format.duration(value);
  }
  if (field === "progress") return format.percent(value);
  if (field === "step" || field === "epoch" || field === "attempt") return format.count(value);
  // Hyperparameters are chosen and short, figures are measured.
  return field.startsWith(HPARAMS) ? format.compact(value) : format.number(value, 3);
}

/** All fields that some run has, those of every run first. */
export function allFields(rows: Iterable<RunRow>): Field[] {
  const metrics = new Map<string, boolean>();
  const settings = new Set<string>();
  for (const row of rows) {
    for (const name in row.figures) {
      metrics.set(name, metrics.get(name) === true || row.figures[name]?.[1] != null);
    }
    for (const name in row.hyperparameters) settings.add(name);
  }
  const figures = [...metrics].sort(([a], [b]) => compareText(a, b));
  return [
    ...Object.keys(FIELDS),
    ...[...settings].sort(compareText).map((name) => HPARAMS + name),
    ...figures.flatMap(([name, hasBest]) => (hasBest ? [BEST + name, LAST + name] : [LAST + name])),
  ];
}

// Order

/** A text in parts whose order is that of its numbers, 9 before 10: texts, and in between the digits of numbers. */
function natural(text: string): string[] {
  const parts = text.toLowerCase().split(/([0-9]+)/);
  return parts.map((part, place) => (place % 2 === 0 ? part : part.replace(/^0+/, "")));
}

function compareParts(one: readonly string[], other: readonly string[]): number {
  for (let place = 0; place < one.length && place < other.length; place++) {
    const [a, b] = [one[place] as string, other[place] as string];
    if (place % 2 === 1 && a.length !== b.length) return a.length - b.length;
    if (a !== b) return a < b ? -1 : 1;
  }
  return one.length - other.length;
}

export function compareText(one: string, other: string): number {
  return compareParts(natural(one), natural(other));
}

/** Sort runs by a field: numbers, then texts. Those that lack it come last, either way; of equals, the newer one comes first. */
export function sortRows(rows: readonly RunRow[], field: Field, descending: boolean, now: number): RunRow[] {
  const turn = descending ? -1 : 1;
  const keyed = rows.map((row) => {
    const value = valueOf(row, field, now);
    return { row, value: typeof value === "string" ? natural(value) : Number.isNaN(value) ? null : value };
  });
  keyed.sort((one, other) => {
    const [a, b] = [one.value, other.value];
    if (a === null || b === null) {
      if (a !== b) return a === null ? 1 : -1;
    } else if (a !== b) {
      const order =
        typeof a === "number"
          ? typeof b === "number" ? a - b : -1
          : typeof b === "number" ? 1 : compareParts(a, b);
      if (order !== 0) return order * turn;
    }
    return other.row.started - one.row.started || (one.row.key < other.row.key ? -1 : 1);
  });
  return keyed.map(({ row }) => row);
}

const TONES: Record<string, string> = { completed: "good", failed: "bad", lost: "warn", stopped: "off", cancelled: "off" };

export function toneOf(row: RunRow): string {
  const ends = [row.figures[row.monitor]?.[0], row.figures.loss?.[0]];
  if (row.state === "completed" && ends.some((value) => typeof value === "string")) return "warn";
  return TONES[row.state] ?? (row.state === "paused" || row.state === "waiting" ? "busy" : "live");
}
