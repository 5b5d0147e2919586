// All points of curves as CSV.

import { type Gap, MAX_SERIES_SHOWN, type SeriesInfo } from "../protocol";
import type { Question } from "./details";
import type { Answer, Part } from "./ranges";
import { withStretches } from "./series_store";

/** Steps that are asked for at a time: the browser never holds more of a long run. */
export const CSV_STEPS = 20_000;

/** The curves of one run, and whom to ask for their points. */
export interface CsvRun {
  name: string;
  series: readonly SeriesInfo[];
  lastStep: number;
  ask(question: Question): Promise<Answer>;
}

/**
 * Fetch all points of some curves, piece by piece, and write them as CSV.
 *
 * Columns are step, epoch, time (Unix time in seconds), the curves, and `note`; and before them the run's name, if there
 * are several. One row for each place at which a curve of a run has a point. Where samples were dropped there is a row
 * that says so.
 *
 * Rejects with NoAnswer when the connection goes.
 */
export async function readCsv(runs: readonly CsvRun[]): Promise<Blob> {
  const keys = [...new Set(runs.flatMap(({ series }) => series.map(({ key }) => key)))];
  const several = runs.length > 1;
  const head = [...(several ? ["run"] : []), "step", "epoch", "time", ...keys, "note"];
  const pieces: BlobPart[] = [csvLine(head)];
  for (const { name, series, lastStep, ask } of runs) {
    const told = new Set<number>();
    const ids = series.map(({ id }) => id);
    // In the columns of their keys; this run may lack some.
    const columns = keys.map((key) => series.find((info) => info.key === key)?.id ?? null);
    // The first question begins before all steps and the last one ends after them: whatever there is is asked for.
    const questions = Math.max(1, Math.ceil((lastStep + 1) / CSV_STEPS));
    for (let index = 0; index < questions; index++) {
      const start = index === 0 ? -1e15 : index * CSV_STEPS;
      const end = index === questions - 1 ? 1e15 : (index + 1) * CSV_STEPS - 0.5;
      const whole: Answer = { parts: new Map(), gaps: [] };
      for (let first = 0; first < ids.length; first += MAX_SERIES_SHOWN) {
        const some = ids.slice(first, first + MAX_SERIES_SHOWN);
        const { parts, gaps } = await ask({ series: some, start, end, axis: "step", points: 0 });
        for (const [id, part] of parts) whole.parts.set(id, part);
        whole.gaps = withStretches(whole.gaps, gaps);
      }
      pieces.push(csvRows(whole, columns, told, several ? [name] : []));
    }
  }
  return new Blob(pieces, { type: "text/csv;charset=utf-8" });
}

/** The rows of an answer, each behind `before`; gaps that begin at a step in `told` have been told. */
export function csvRows(
  answer: Answer,
  ids: readonly (number | null)[],
  told: Set<number> = new Set(),
  before: readonly string[] = [],
): string {
  interface Line {
    step: number;
    time: number;
    cells: string[];
  }
  const lines: Line[] = [];
  const byPlace = new Map<string, Line[]>();
  ids.forEach((id, position) => {
    const part = id === null ? undefined : answer.parts.get(id);
    if (!part) return;
    for (let index = 0; index < part.step.length; index++) {
      const [step, epoch, time] = [part.step[index], part.epoch[index], part.time[index]] as [number, number, number];
      const place = `${step} ${epoch} ${time}`;
      // Two points of a curve at one place are two rows.
      let line = byPlace.get(place)?.find(({ cells }) => cells[3 + position] === "");
      if (!line) {
        line = { step, time, cells: [String(step), String(epoch), String(time), ...ids.map(() => ""), ""] };
        lines.push(line);
        byPlace.set(place, [...(byPlace.get(place) ?? []), line]);
      }
      line.cells[3 + position] = csvValue(part, index);
    }
  });
  for (const gap of answer.gaps) {
    if (told.has(gap[0])) continue;
    told.add(gap[0]);
    lines.push({ step: gap[0] + 0.5, time: Infinity, cells: ["", "", "", ...ids.map(() => ""), gapNote(gap)] });
  }
  lines.sort((one, other) => one.step - other.step || one.time - other.time);
  return lines.map(({ cells }) => csvLine([...before, ...cells])).join("");
}

function gapNote([after, before, count]: Gap): string {
  return `gap: ${count} samples dropped after step ${after} and before step ${before}`;
}

/** A value as other programs read it. Which kind of not finite it was, its mark says. */
function csvValue(part: Part, index: number): string {
  const value = part.value[index] as number;
  if (!Number.isNaN(value)) return Number.isFinite(value) ? String(value) : value > 0 ? "inf" : "-inf";
  const step = part.step[index] as number;
  const kind = part.marks.find(([start, end]) => step >= start && step <= end)?.[2] ?? "nan";
  return kind === "mixed" ? "nan" : kind;
}

/**
 * One line of CSV (RFC 4180).
 *
 * Spreadsheets take text that starts with = + - @ for a formula: it gets an apostrophe in front, numbers do not.
 */
export function csvLine(cells: readonly string[]): string {
  const written = cells.map((cell) => {
    const safe = /^[=+\-@\t\r]/.test(cell) && !isNumber(cell) ? `'${cell}` : cell;
    return /[",\r\n]/.test(safe) || safe !== cell ? `"${safe.replaceAll('"', '""')}"` : safe;
  });
  return `${written.join(",")}\r\n`;
}

function isNumber(cell: string): boolean {
  return cell === "-inf" || (cell.trim() === cell && Number.isFinite(Number(cell)));
}
