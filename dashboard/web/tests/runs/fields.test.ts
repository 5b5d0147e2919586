import { expect, test } from "vitest";
import { ageOf, allFields, FIELDS, sortRows, STATES, textOf, titleOf, toneOf, valueOf } from "../../src/runs/fields";
import { CASES, RUNS as ROWS } from "../cases";
import { row } from "../messages";

const RUNS = [
  row("a", { figures: { val_loss: [0.3, 0.2] }, hyperparameters: { "optimizer.lr": 0.1, model: "net 10" } }),
  row("b", { figures: { val_loss: ["NaN", 0.1] }, hyperparameters: { "optimizer.lr": 0.01 } }),
  row("c", { figures: { loss: [1, null] }, hyperparameters: { "optimizer.lr": "auto" } }),
];

test("the command line has the same fields and states", () => {
  expect(Object.keys(FIELDS)).toEqual(CASES.fields);
  expect(STATES).toEqual(CASES.states);
});

test.each(CASES.orders)("sorted by %s: %s", (by, keys) => {
  for (const rows of [ROWS, [...ROWS].reverse()]) {
    const sorted = sortRows(rows, by.replace(/^-/, ""), by.startsWith("-"), CASES.now);
    expect(sorted.map(({ key }) => key).join(" ")).toBe(keys);
  }
});

test("a metric that is called like a part of every object is not taken for one", () => {
  expect(valueOf(row("a"), "last.constructor", 0)).toBeNull();
  expect(valueOf(row("a"), "hparams.toString", 0)).toBeNull();
});

test("fields are what some run has", () => {
  const fields = allFields(RUNS);
  expect(fields.slice(0, 2)).toEqual(["name", "id"]);
  expect(fields.slice(-5)).toEqual(["hparams.model", "hparams.optimizer.lr", "last.loss", "best.val_loss", "last.val_loss"]);
  expect(titleOf("best.val_loss")).toBe("best val_loss");
  expect(textOf(RUNS[0]!, "hparams.optimizer.lr", 0)).toBe("0.1");
  expect(textOf(RUNS[1]!, "last.val_loss", 0)).toBe("NaN");
  expect(textOf(RUNS[1]!, "age", 400)).toBe("5 m");
});

test("an age is not negative where the clock of a host is ahead", () => {
  expect(ageOf(10_000, 100)).toBe(0);
  expect(ageOf(100, 160)).toBe(60);
});

test("each state has a tone", () => {
  expect(["running", "validating", "paused", "completed", "failed", "lost", "stopped"].map((state) => toneOf(row("a", { state: state as "lost" })))).toEqual([
    "live", "live", "busy", "good", "bad", "warn", "off",
  ]);
});

test("ten thousand runs of one name keep their order by date", () => {
  const many = Array.from({ length: 10_000 }, (_, index) => row(String(index), { name: "same", started: index }));
  expect(sortRows(many, "name", false, 0)[0]?.key).toBe("9999");
});
