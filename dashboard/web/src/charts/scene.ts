// What all panels draw alike.

import type { Gap } from "../protocol";
import type { Axis, MarkKind } from "../view";
import type { Scale } from "./axes";
import type { Column } from "./series_store";
import type { Theme } from "./theme";

/** Something that happened in the run, for the charts to mark. */
export interface ChartEvent {
  step: number;
  /** Unix time in seconds. */
  time: number;
  kind: MarkKind;
  text: string;
  /** The metric that it is about, and whose panel it is marked in; null: in all panels. */
  metric: string | null;
}

export interface Scene {
  axis: Axis;
  column: Column;
  /** What is subtracted from the column: the start of the run where x is the time since then. */
  origin: number;
  x: Scale;
  logY: boolean;
  smoothing: number;
  /** Keys of curves that are switched off. */
  hidden: ReadonlySet<string>;
  /** Names of panels whose y axis is scaled to the usual values. */
  usual: ReadonlySet<string>;
  /** Kinds of events that are not marked. */
  unmarked: ReadonlySet<string>;
  gaps: readonly Gap[];
  trimmed: number | null;
  /** In the order of x. */
  events: readonly (ChartEvent & { x: number })[];
  theme: Theme;
  /** Where the cursor is, in units of x; null if nowhere. */
  cursor: number | null;
  /** Where a step lies on the x axis; null if nobody knows. */
  placeOf(step: number): number | null;
}
