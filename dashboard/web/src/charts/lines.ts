// What a panel draws and what its legend says: a line for each curve of each run; or, where runs are grouped, for the
// mean of each group.

import { formatWithUnit } from "./axes";
import { groupCurve } from "./group_curves";
import type { Item, LegendHead } from "./legend";
import type { Line } from "./paint";
import { bestOf, indexAt } from "./reading";
import type { RunCurves } from "./run_curves";
import { slotOf } from "./runs";
import type { RunGroup, Scene } from "./scene";
import { colourOf, type Look, lookOfCurve, lookOfRun } from "./theme";
import type { PanelCurve, Said, Source, Values } from "./values";

/** A line of a panel, and what it is of. */
export interface PanelLine extends Line {
  look: Look;
  of: PanelCurve | null;
  group: RunGroup | null;
  /** Key of the metric. */
  metric: string;
}

/** What lines are made of. */
export interface Panelled {
  curves: readonly PanelCurve[];
  slots: ReadonlyMap<string, number>;
  source: Source;
  values: Values;
}

export interface Toggles {
  toggleCurve(metric: string): void;
  toggleRuns(runs: readonly string[]): void;
  toggleMembers(): void;
}

function isShown({ run, info }: PanelCurve, scene: Scene): boolean {
  return !scene.hidden.has(info.key) && !scene.hiddenRuns.has(run.key);
}

export function shownCurves(curves: readonly PanelCurve[], scene: Scene): PanelCurve[] {
  return curves.filter((curve) => isShown(curve, scene));
}

/** The look of a curve: its own where there is one run, else that of its run. */
export function lookOf({ run, info }: PanelCurve, scene: Scene, slots: ReadonlyMap<string, number>): Look {
  const slot = slots.get(info.key) ?? 0;
  if (scene.runs.length === 1) return lookOfCurve(slot);
  const look = lookOfRun(slotOf(run, scene.runs, scene.groups), slot);
  return run === scene.baseline ? { ...look, hue: null } : look;
}

function groupOf(run: RunCurves, scene: Scene): RunGroup | null {
  return scene.groups?.find(({ runs }) => runs.includes(run)) ?? null;
}

/** The lines of a panel whose plot is `width` CSS pixels wide. */
export function linesOf(panel: Panelled, scene: Scene, width: number): PanelLine[] {
  const { curves, slots, source, values } = panel;
  const lines: PanelLine[] = [];
  for (const of of shownCurves(curves, scene)) {
    const curve = source.curve(of);
    if (!curve || (curve.length === 0 && curve.marks.length === 0)) continue;
    const isGrouped = of.run !== scene.baseline && groupOf(of.run, scene) !== null;
    if (isGrouped && !scene.members) continue;
    const look = lookOf(of, scene, slots);
    const own = scene.of(of.run);
    const kind = isGrouped ? "member" : of.run === scene.baseline && scene.runs.length > 1 ? "behind" : "line";
    lines.push({
      of, group: null, metric: of.info.key, look, curve, values: values.drawn(curve, own), scene: own,
      colour: colourOf(look, scene.theme), dash: look.dash, best: kind === "line" ? bestOf(curve, of.info) : null,
      kind, band: null,
    });
  }
  for (const group of scene.groups ?? []) lines.push(...linesOfGroup(panel, group, scene, width));
  return lines;
}

function linesOfGroup({ curves, slots, source, values }: Panelled, group: RunGroup, scene: Scene, width: number): PanelLine[] {
  const lines: PanelLine[] = [];
  for (const [metric, slot] of slots) {
    const members = shownCurves(curves, scene).flatMap((of) => {
      if (of.info.key !== metric || of.run === scene.baseline || !group.runs.includes(of.run)) return [];
      const curve = source.curve(of);
      const own = scene.of(of.run);
      return curve && curve.length > 0 ? [{ curve, values: values.drawn(curve, own), origin: own.origin }] : [];
    });
    if (members.length === 0) continue;
    const { curve, low, high } = groupCurve(members, scene.column, scene.x, Math.max(1, Math.round(width)));
    if (curve.length === 0) continue;
    const look = lookOfRun(group.slot, slot);
    // Its places are those of the x axis already, and it has no gaps.
    const own = Object.assign(Object.create(scene) as Scene, { origin: 0, gaps: [] });
    lines.push({
      of: null, group, metric, look, curve, values: curve.value, scene: own, colour: colourOf(look, scene.theme),
      dash: look.dash, best: null, kind: "line", band: [low, high],
    });
  }
  return lines;
}

// The legend ------------------------------------------------------------------------------------------

/** How many of the runs have no curve in a panel. */
export function lacking(curves: readonly PanelCurve[], scene: Scene): string {
  const having = new Set(curves.map(({ run }) => run));
  const lack = scene.runs.filter((run) => !having.has(run)).length;
  return lack === 0 ? "" : `not in ${lack} of ${scene.runs.length} runs`;
}

/** The legend: what it says of each line is what `say` says of a curve. */
export function legendOf(
  panel: Panelled,
  lines: readonly PanelLine[],
  scene: Scene,
  toggles: Toggles,
  say: (of: PanelCurve) => Said,
): { items: Item[]; head: LegendHead } {
  const { curves, slots, values } = panel;
  const infos = [...new Map(curves.map(({ info }) => [info.key, info])).values()];
  infos.sort((one, other) => (slots.get(one.key) ?? 0) - (slots.get(other.key) ?? 0));
  if (scene.runs.length === 1) {
    const items = infos.flatMap((info): Item[] => {
      const of = curves.find((curve) => curve.info.key === info.key);
      if (!of) return [];
      const [value, raw] = say(of);
      return [{
        key: info.key, label: info.label, title: `${info.key}: click to hide or show`, look: lookOf(of, scene, slots),
        isHidden: scene.hidden.has(info.key), value, raw, best: values.best(of),
        toggle: () => toggles.toggleCurve(info.key),
      }];
    });
    // What the title says already, the legend need not.
    const only = items.length === 1 && !["train", "val"].includes(items[0]?.label ?? "");
    return { items, head: { only, runs: false, note: lacking(curves, scene) } };
  }
  const several = infos.length > 1;
  const metrics: Item[] = (several ? infos : []).map((info) => ({
    key: info.key, label: info.label, title: `${info.key}: click to hide or show`, isPlain: true,
    look: { hue: null, dash: lookOfRun(0, slots.get(info.key) ?? 0).dash },
    isHidden: scene.hidden.has(info.key), value: "", raw: "", best: "", toggle: () => toggles.toggleCurve(info.key),
  }));
  const shownInfos = infos.filter(({ key }) => !scene.hidden.has(key));
  const items: Item[] = [];
  for (const group of scene.groups ?? []) {
    const runs = group.runs.filter((run) => run !== scene.baseline);
    if (!curves.some(({ run }) => runs.includes(run))) continue;
    const parts = lines.filter((line) => line.group === group).map((line) => {
      const info = infos.find(({ key }) => key === line.metric);
      const text = groupValue(line, scene, info?.unit);
      return several && text !== "" ? `${info?.label ?? ""} ${text}` : text;
    });
    items.push({
      key: `group ${group.name}`, label: `${group.name} (${runs.length})`,
      title: `${runs.map(({ name }) => name).join(", ")}: mean, least and greatest; click to hide or show`,
      look: lookOfRun(group.slot, 0), isHidden: runs.every(({ key }) => scene.hiddenRuns.has(key)),
      value: parts.filter(Boolean).join(" · "), raw: "", best: "",
      toggle: () => toggles.toggleRuns(runs.map(({ key }) => key)),
    });
  }
  for (const run of scene.runs) {
    if (run !== scene.baseline && groupOf(run, scene) !== null) continue;
    const own = curves.filter((curve) => curve.run === run);
    const first = own[0];
    if (!first) continue;
    const said = shownInfos.flatMap((info): [string, Said][] => {
      const of = own.find((curve) => curve.info.key === info.key);
      return of ? [[info.label, say(of)]] : [];
    });
    const join = (part: 0 | 1): string =>
      said.map(([label, text]) => (several && text[part] !== "" ? `${label} ${text[part]}` : text[part])).filter(Boolean).join(" · ");
    items.push({
      key: `run ${run.key}`, label: run === scene.baseline ? `${run.name} (baseline)` : run.name,
      title: `${run.key}: click to hide or show`, look: { ...lookOf(first, scene, slots), dash: [] },
      isHidden: scene.hiddenRuns.has(run.key), value: join(0), raw: join(1),
      best: said.length === 1 && shownInfos[0] ? values.best(own.find(({ info }) => info.key === shownInfos[0]?.key) ?? first) : "",
      toggle: () => toggles.toggleRuns([run.key]),
    });
  }
  if (scene.groups !== null) {
    metrics.push({
      key: "members", label: "runs of groups", title: "Draw the runs of groups beside their mean", isPlain: true,
      look: { hue: null, dash: [] }, isHidden: !scene.members, value: "", raw: "", best: "",
      toggle: () => toggles.toggleMembers(),
    });
  }
  return { items: [...metrics, ...items], head: { only: false, runs: true, note: lacking(curves, scene) } };
}

/** The mean of a group at the cursor, or the last one, with the least and the greatest. */
function groupValue({ curve, scene, band }: PanelLine, { cursor }: Scene, unit: string | undefined): string {
  const index = cursor === null ? curve.length - 1 : indexAt(curve, scene, cursor);
  if (index < 0 || band === null) return "";
  const [low, high] = [band[0][index] as number, band[1][index] as number];
  const mean = formatWithUnit(curve.value[index] as number, unit);
  return low === high ? mean : `${mean} (${formatWithUnit(low, unit)} to ${formatWithUnit(high, unit)})`;
}
