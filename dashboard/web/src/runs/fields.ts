// What a run can be listed, sorted and filtered by. A field is a text: `state`, `last:val_loss`, `with:optimizer.lr`.

import * as format from "../format";
import { hasEnded } from "../model";
import { toNumber, type RunRow } from "../protocol";

export type Field = string;

/** Fields that every run has, and what they are called. */
export const FIELDS: Readonly<Record<string, string>> = {
  name: "Name",
  state: "State",
  started: "Started",
  seconds: "Duration",
  last: "Last",
  best: "Best",
  spark: "Curve",
  step: "Steps",
  tags: "Tags",
  host: "Host",
};
export const LAST = "last:";
export const BEST = "best:";
export const WITH = "with:";

export type Value = number | string | null;

/** What stands in a field of a run; null if nothing does. */
export function valueOf(row: RunRow, field: Field): Value {
  if (field.startsWith(LAST)) return figure(row, field.slice(LAST.length), 0);
  if (field.startsWith(BEST)) return figure(row, field.slice(BEST.length), 1);
  if (field.startsWith(WITH)) return settingOf(row, field.slice(WITH.length));
  switch (field) {
    case "last":
      return figure(row, row.monitor, 0);
    case "best":
      return figure(row, row.monitor, 1);
    case "started":
    case "seconds":
      return row[field] || null;
    case "tags":
      return row.tags.join(", ") || null;
    case "name":
    case "state":
    case "step":
    case "host":
      return row[field];
    default:
      return null;
  }
}

function figure(row: RunRow, metric: string, which: 0 | 1): number | null {
  return Object.hasOwn(row.figures, metric) ? toNumber(row.figures[metric]?.[which] ?? null) : null;
}

/** A setting as a number or in words; null if the run has none of this name. */
export function settingOf({ hyperparameters }: RunRow, name: string): Value {
  if (!Object.hasOwn(hyperparameters, name)) return null;
  const value = hyperparameters[name];
  if (value === undefined || value === null) return null;
  return typeof value === "number" || typeof value === "string" ? value : JSON.stringify(value);
}

/** How a field is headed. */
export function titleOf(field: Field): string {
  if (field.startsWith(LAST)) return field.slice(LAST.length);
  if (field.startsWith(BEST)) return `best ${field.slice(BEST.length)}`;
  if (field.startsWith(WITH)) return field.slice(WITH.length);
  return FIELDS[field] ?? field;
}

/** A value as it stands in a column. */
export function textOf(row: RunRow, field: Field): string {
  const value = valueOf(row, field);
  if (value === null) return "";
  if (field === "started") return format.dateTime(value as number);
  if (field === "seconds") return format.duration(value as number);
  if (field === "step") return format.count(value as number);
  if (typeof value !== "number") return value;
  // Settings are chosen and short, figures are measured.
  return field.startsWith(WITH) ? format.compact(value) : format.number(value, 3);
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
    ...[...settings].sort(compareText).map((name) => WITH + name),
    ...figures.flatMap(([name, hasBest]) => (hasBest ? [BEST + name, LAST + name] : [LAST + name])),
  ];
}

const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
export const compareText = (one: string, other: string): number => collator.compare(one, other);

/** Sort runs by a field. Those that lack it come last, either way; of equals, the newer one comes first. */
export function sortRows(rows: RunRow[], field: Field, descending: boolean): RunRow[] {
  const turn = descending ? -1 : 1;
  const keyed = rows.map((row) => {
    const value = valueOf(row, field);
    return { row, value: typeof value === "number" && Number.isNaN(value) ? null : value };
  });
  keyed.sort((one, other) => {
    const [a, b] = [one.value, other.value];
    if (a === null || b === null) {
      if (a !== b) return a === null ? 1 : -1;
    } else if (a !== b) {
      const order =
        typeof a === "number"
          ? typeof b === "number" ? a - b : -1
          : typeof b === "number" ? 1 : compareText(a, b);
      if (order !== 0) return order * turn;
    }
    return other.row.started - one.row.started || (one.row.key < other.row.key ? -1 : 1);
  });
  return keyed.map(({ row }) => row);
}

/** Seconds since a time of a server whose clock may be ahead of the one that is looked at: never negative. */
export function ageOf(time: number, now: number): number {
  return Math.max(0, now - time);
}

export function isLive(row: RunRow): boolean {
  return !hasEnded(row.state);
}

const TONES: Record<string, string> = { completed: "good", failed: "bad", lost: "warn", stopped: "off", cancelled: "off" };

export function toneOf(row: RunRow): string {
  const ends = [row.figures[row.monitor]?.[0], row.figures.loss?.[0]];
  if (row.state === "completed" && ends.some((value) => typeof value === "string")) return "warn";
  return TONES[row.state] ?? (row.state === "paused" || row.state === "waiting" ? "busy" : "live");
}
