// The shown part of a panel's curves as a table, for those who would rather read than look.

import { formatValue, formatX } from "./axes";
import { h } from "../dom";
import type { Panel, PanelHost } from "./panel";
import type { Column, Curve } from "./series_store";

/** More rows than this nobody reads: then every n-th of a stretch is shown, and the caption says so. */
export const MAX_ROWS = 200;

/** A curve, and what is subtracted from its column. */
export interface Tabled {
  curve: Curve;
  origin: number;
}

export interface Row {
  x: number;
  /** One for each curve; null where it has no point. */
  values: (number | null)[];
}

/**
 * Rows of several curves between two places of the x axis, about `limit` of them: the newest, all those at which
 * a curve with few points has one, and of the others every n-th.
 */
export function tableRows(
  curves: readonly Tabled[],
  { column, from, to, limit }: { column: Column; from: number; to: number; limit: number },
): { rows: Row[]; all: number } {
  const byPlace = new Map<number, Row>();
  const wanted = new Set<Row>();
  curves.forEach(({ curve, origin }, position) => {
    const places = curve[column];
    const first = curve.search(column, from + origin);
    const few = curve.search(column, to + origin) - first <= limit / 4;
    for (let index = first; index < curve.length && (places[index] as number) - origin <= to; index++) {
      const x = (places[index] as number) - origin;
      let row = byPlace.get(x);
      if (!row) byPlace.set(x, (row = { x, values: curves.map(() => null) }));
      row.values[position] = curve.value[index] as number;
      if (few) wanted.add(row);
    }
  });
  const rows = [...byPlace.values()].sort((one, other) => one.x - other.x);
  const every = Math.ceil(rows.length / limit);
  return {
    rows: rows.filter((row, index) => (rows.length - 1 - index) % every === 0 || wanted.has(row)),
    all: rows.length,
  };
}

export function showTable(panel: Panel, host: PanelHost): HTMLElement {
  const scene = host.scene();
  const present = panel.shown(scene).flatMap((of) => {
    const curve = host.curve(of);
    return curve ? [{ ...of, curve, origin: scene.of(of.run).origin }] : [];
  });
  const { column, x } = scene;
  const { rows, all } = tableRows(present, { column, from: x.min, to: x.max, limit: MAX_ROWS });
  const note =
    rows.length < all ? `${rows.length} of ${all} shown rows; the CSV file has every point.` : `${all} rows.`;
  const head = h("tr", {}, h("th", { scope: "col" }, scene.axis === "wall" ? "clock" : scene.axis));
  const labelOf = ({ run, info }: (typeof present)[number]): string =>
    scene.runs.length === 1 ? info.label : `${run.name} ${info.label}`;
  for (const one of present) head.append(h("th", { scope: "col" }, labelOf(one)));
  const body = h("tbody");
  for (const row of rows.reverse()) {
    const place = h("th", { scope: "row" }, formatX(scene.axis, row.x).replace(/^(step|epoch) /, ""));
    const cells = row.values.map((value) => h("td", {}, value === null ? "" : formatValue(value)));
    body.append(h("tr", {}, place, ...cells));
  }
  const table = h("table", {}, h("caption", {}, `${panel.name}, newest first. ${note}`), h("thead", {}, head), body);
  return h(
    "div",
    { class: "chart-table", tabindex: "0", role: "region", "aria-label": `Values of ${panel.name}` },
    table,
  );
}
