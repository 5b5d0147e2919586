import { expect, test } from "vitest";

import { slotsOf } from "../../src/charts/legend";
import { trend } from "../../src/charts/reading";
import { Curve } from "../../src/charts/series_store";
import { type Tabled, tableRows } from "../../src/charts/table";
import { dash, HUES, hue, lookOfRun } from "../../src/charts/theme";
import { positionOf, smoothingOf } from "../../src/charts/toolbar";

function curve(values: number[], every = 1): Curve {
  const made = new Curve();
  values.forEach((value, index) => made.push(every * index, 0, 0, 0, value));
  return made;
}

test("the smoothing slider reaches from off to 0.999 and comes back to where it was", () => {
  expect([smoothingOf(0), smoothingOf(100)]).toEqual([0, 0.999]);
  for (let position = 0; position <= 100; position++) {
    expect(smoothingOf(positionOf(smoothingOf(position)))).toBe(smoothingOf(position));
    if (position > 0) expect(smoothingOf(position)).toBeGreaterThanOrEqual(smoothingOf(position - 1));
  }
});

test("train and val look the same in every panel", () => {
  const slots = (...labels: string[]): number[] => {
    const curves = labels.map((label, id) => ({ id, key: label, panel: "p", group: "", label, tab: "metrics" as const, better: null }));
    const slots = slotsOf(curves);
    return labels.map((label) => slots.get(label) as number);
  };
  expect(slots("train", "val")).toEqual([0, 1]);
  expect(slots("val", "train")).toEqual([1, 0]);
  expect(slots("val")).toEqual([1]);
  expect(slots("val", "train", "step")).toEqual([1, 2, 0]);
  expect(slots("a", "b", "c")).toEqual([0, 1, 2]);
  expect(slots("a", "val", "b")).toEqual([0, 1, 2]);
});

test("no two of the first curves of a panel have both colour and dash in common", () => {
  const looks = Array.from({ length: 4 * HUES }, (_, slot) => `${hue(slot)} ${dash(slot).join()}`);
  expect(new Set(looks).size).toBe(looks.length);
  // Nor do the first five have the same dash: they can be told apart without colours.
  expect(new Set(Array.from({ length: 5 }, (_, slot) => dash(slot).join())).size).toBe(5);
});

test("the trend is told in a word", () => {
  const noise = Array.from({ length: 400 }, (_, index) => Math.sin(index * 12.9898) * 0.1);
  expect(trend(curve(noise.map((value, index) => value + index)))).toBe("rising");
  expect(trend(curve(noise.map((value, index) => value - index)))).toBe("falling");
  expect(trend(curve(new Array<number>(400).fill(3)))).toBe("level");
  expect(trend(curve([1, 2, 3]))).toBe("too short for a trend");
});

/** As it stands in a table. */
const tabled = (values: number[], every = 1, origin = 0): Tabled => ({ curve: curve(values, every), origin });

test("a table puts runs side by side by their own origins", () => {
  const { rows } = tableRows([tabled([1, 2, 3]), tabled([10, 20, 30], 1, 1)], { column: "step", from: 0, to: 1, limit: 100 });
  expect(rows).toEqual([{ x: 0, values: [1, 20] }, { x: 1, values: [2, 30] }]);
});

test("ten runs have ten colours, and none of them the baseline's", () => {
  const hues = Array.from({ length: 10 }, (_, run) => lookOfRun(run, 0).hue);
  expect(new Set(hues).size).toBe(10);
  expect(hues).not.toContain(null);
  expect(hues).not.toContain(6); // grey as well
  expect([lookOfRun(3, 0).hue, lookOfRun(3, 0).dash]).not.toEqual([lookOfRun(3, 1).hue, lookOfRun(3, 1).dash]);
});

test("a table has a row for each place and a cell for each curve", () => {
  const { rows, all } = tableRows([tabled([1, 2, 3, 4]), tabled([10, 20], 2)], { column: "step", from: 1, to: 3, limit: 100 });
  expect(rows).toEqual([{ x: 1, values: [2, null] }, { x: 2, values: [3, 20] }, { x: 3, values: [4, null] }]);
  expect(all).toBe(3);
});

test("a long table shows every n-th row, and the newest", () => {
  const { rows, all } = tableRows([tabled(Array.from({ length: 1_000 }, (_, index) => index))], { column: "step", from: 0, to: 1e9, limit: 200 });
  expect(all).toBe(1_000);
  expect(rows.length).toBeLessThanOrEqual(200);
  expect(rows.at(-1)).toEqual({ x: 999, values: [999] });
});

test("a long table leaves no point of a curve out that has few", () => {
  const train = tabled(Array.from({ length: 1_000 }, (_, index) => index));
  const { rows } = tableRows([train, tabled([1, 2, 3], 333)], { column: "step", from: 0, to: 1e9, limit: 200 });
  expect(rows.filter(({ values }) => values[1] !== null).map(({ x }) => x)).toEqual([0, 333, 666]);
});
