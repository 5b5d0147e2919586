import { expect, test } from "vitest";
import { compare, directionOf, toCsv, toMarkdown } from "../../src/runs/compare";
import { sparkPath } from "../../src/runs/spark";
import { row } from "../messages";

const RUNS = [
  row("a", { name: "a|b", hyperparameters: { lr: 0.1, model: "net", seed: 1 }, figures: { val_loss: [0.3, 0.2], acc: [0.8, 0.9] } }),
  row("b", { name: "=1+1", hyperparameters: { lr: 0.01, model: "net" }, figures: { val_loss: ["NaN", 0.1], acc: [0.7, 0.7] } }),
];

test("settings that differ and metrics, with the best values", () => {
  const { lines, same } = compare(RUNS);
  expect(lines.map(({ name, values, best }) => [name, ...values, best.join()])).toEqual([
    ["lr", 0.1, 0.01, ""],
    ["seed", 1, null, ""],
    ["best val_loss", 0.2, 0.1, "1"],
    ["last val_loss", 0.3, NaN, ""],
    ["best acc", 0.9, 0.7, "0"],
    ["last acc", 0.8, 0.7, "0"],
  ]);
  expect(same).toBe(1);
});

test("where values do not tell which way is better, nothing is marked, unless it is known", () => {
  const runs = [row("a", { figures: { m: [1, 1] } }), row("b", { figures: { m: [2, 2] } })];
  expect(directionOf(runs, "m")).toBeNull();
  expect(compare(runs).lines.map(({ best }) => best)).toEqual([[], []]);
  expect(compare(runs, new Map([["m", "max"]])).lines.map(({ best }) => best)).toEqual([[1], [1]]);
});

test("ten runs that share no metric have a table with gaps", () => {
  const runs = Array.from({ length: 10 }, (_, index) => row(`${index}`, { figures: { [`m${index}`]: [index, null] } }));
  const { lines } = compare(runs);
  expect(lines).toHaveLength(10);
  expect(lines[3]?.values.filter((value) => value !== null)).toEqual([3]);
});

test("metrics that most runs have come before the others", () => {
  const runs = [row("a", { figures: { acc: [1, null], z: [1, null] } }), row("b", { figures: { z: [2, null], val_loss: [1, null] } })];
  expect(compare(runs).lines.map(({ name }) => name)).toEqual(["last val_loss", "last z", "last acc"]);
});

test("as Markdown", () => {
  expect(toMarkdown(compare(RUNS)).split("\n").slice(0, 5)).toEqual([
    "|  | a\\|b | =1+1 |",
    "| --- | --- | --- |",
    "| lr | 0.1 | 0.01 |",
    "| seed | 1 |  |",
    "| best val\\_loss | 0.2 | **0.1** |",
  ]);
});

test("as CSV, without formulas", () => {
  expect(toCsv(compare(RUNS)).split("\r\n").slice(0, 2)).toEqual([`,a|b,"'=1+1"`, "lr,0.1,0.01"]);
});

test.each([
  [[], ""],
  [[1], ""],
  [[0, 10], "M1.0 19.0L59.0 1.0"],
  [[5, 5, 5], "M1.0 10.0L30.0 10.0L59.0 10.0"],
  [[0, NaN, 10], "M1.0 19.0L59.0 1.0"],
])("the curve of %j", (values, path) => {
  expect(sparkPath(values, 60, 20)).toBe(path);
});
