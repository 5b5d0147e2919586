// Which runs are looked at: the one in focus, and those that are laid over it. Pure functions of the view.

import { hasEnded } from "../model";
import { MAX_OVERLAID, type RunRow } from "../protocol";

/** The runs on the screen: the one in focus, and the others. */
export interface Chosen {
  run: string | null;
  overlaid: readonly string[];
}

/** Most runs at a time. */
export const MOST = MAX_OVERLAID + 1;

export function chosen({ run, overlaid }: Chosen): string[] {
  return run === null ? [...overlaid] : [run, ...overlaid.filter((key) => key !== run)];
}

/** The runs that are drawn: those that were chosen, and the baseline. */
export function drawn(now: Chosen, baseline: string | null): string[] {
  return [...new Set([...chosen(now), ...(baseline === null ? [] : [baseline])])];
}

/** Tick a run, or take its tick away; null if there are too many. The one in focus hands that over to the next. */
export function tick(now: Chosen, key: string): Chosen | null {
  if (key === now.run) {
    const [next, ...rest] = now.overlaid;
    return next === undefined ? now : { run: next, overlaid: rest };
  }
  if (now.overlaid.includes(key)) return { ...now, overlaid: now.overlaid.filter((each) => each !== key) };
  if (now.run === null) return { run: key, overlaid: now.overlaid };
  return now.overlaid.length >= MAX_OVERLAID ? null : { ...now, overlaid: [...now.overlaid, key] };
}

/** Put a run into focus. One that was ticked changes places with the one before; another takes its place. */
export function focus(now: Chosen, key: string): Chosen {
  if (!now.overlaid.includes(key)) return { ...now, run: key };
  const overlaid = now.overlaid.flatMap((each) => (each !== key ? [each] : now.run === null ? [] : [now.run]));
  return { run: key, overlaid };
}

/** The run to lay over a live one that is watched: the last that has ended, if both logged the monitored metric. */
export function lastFinished(rows: Iterable<RunRow>, watched: string | null): string | null {
  const all = [...rows];
  const live = all.find(({ key }) => key === watched);
  if (live === undefined || hasEnded(live.state)) return null;
  const has = (row: RunRow): boolean => row.figures[live.monitor]?.[0] != null;
  if (!has(live)) return null;
  const finished = (row: RunRow): boolean => hasEnded(row.state) && row.state !== "lost" && !row.archived;
  const ended = all.filter((row) => finished(row) && row.monitor === live.monitor && has(row));
  return ended.sort((one, other) => other.heard - one.heard)[0]?.key ?? null;
}
