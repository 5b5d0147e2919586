// What all panels draw alike.

import type { Gap } from "../protocol";
import type { Axis, MarkKind, PanelScale } from "../view";
import type { Scale } from "./axes";
import type { RunCurves } from "./run_curves";
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

/** Runs that are drawn as one: their mean, and a band from the least to the greatest. */
export interface RunGroup {
  name: string;
  slot: number;
  runs: readonly RunCurves[];
}

export interface Scene {
  /** The watched run, and those that are laid over it. */
  runs: readonly RunCurves[];
  /** Groups of them; null for none. */
  groups: readonly RunGroup[] | null;
  /** Whether the runs of groups are drawn, too. */
  members: boolean;
  /** The run that is drawn behind the others; null for none. */
  baseline: RunCurves | null;
  axis: Axis;
  column: Column;
  /** What is subtracted from the column: the start of the run where x is the time since then. */
  origin: number;
  x: Scale;
  /** Of panels that have no scale of their own. */
  logY: boolean;
  /** The y axes of panels that are others, by name. */
  scaleIn(panel: string): PanelScale | null;
  smoothing: number;
  /** Keys of curves that are switched off. */
  hidden: ReadonlySet<string>;
  /** Keys of runs that are switched off. */
  hiddenRuns: ReadonlySet<string>;
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
  /** The scene as one run has it: its own origin, gaps and places of steps; those here are the watched run's. */
  of(run: RunCurves): Scene;
}
