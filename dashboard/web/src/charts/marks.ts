// What happened in the run, as marks of one panel: which of them it has, and those that are too close to be told
// apart as one with a count. Nothing here draws.

import type { MarkKind } from "../view";
import type { ChartEvent, Scene } from "./scene";

/** Marks of a kind that are closer to their neighbour than this are one, in CSS pixels. */
export const APART = 8;

/** One or more events of a kind, at places from 0 to 1 along the x axis. */
export interface Mark {
  kind: MarkKind;
  /** Whether it is about a metric of this panel, and so a line through it. */
  isOwn: boolean;
  from: number;
  to: number;
  events: ChartEvent[];
}

/** Marks in view of a panel that has the curves `keys` and a plot `width` CSS pixels wide, kind by kind. */
export function marksOf(scene: Scene, keys: ReadonlySet<string>, width: number): Mark[] {
  const marks: Mark[] = [];
  const last = new Map<string, Mark>();
  for (const event of scene.events) {
    const { kind, metric } = event;
    const at = scene.x.toUnit(event.x);
    if (!(at >= 0 && at <= 1) || scene.unmarked.has(kind)) continue;
    const isOwn = metric !== null && keys.has(metric);
    if (metric !== null && !isOwn) continue;
    const before = last.get(`${kind} ${isOwn}`);
    if (before && (at - before.to) * width < APART) {
      before.to = at;
      before.events.push(event);
      continue;
    }
    const mark: Mark = { kind, isOwn, from: at, to: at, events: [event] };
    marks.push(mark);
    last.set(`${kind} ${isOwn}`, mark);
  }
  return marks;
}

/** What a mark says under the mouse. */
export function textOf({ events }: Mark): string {
  const [first, last] = [events[0], events.at(-1)];
  if (!first || !last) return "";
  return events.length === 1
    ? last.text
    : `${events.length} times, steps ${first.step} to ${last.step}: ${last.text}`;
}
