import { expect, test } from "vitest";
import { ageOf, allFields, sortRows, textOf, titleOf, toneOf, valueOf } from "../../src/runs/fields";
import { row } from "../messages";

const RUNS = [
  row("a", { figures: { val_loss: [0.3, 0.2] }, hyperparameters: { "optimizer.lr": 0.1, model: "net 10" }, started: 1 }),
  row("b", { figures: { val_loss: ["NaN", 0.1] }, hyperparameters: { "optimizer.lr": 0.01, model: "net 9" }, started: 2 }),
  row("c", { figures: { loss: [1, null] }, hyperparameters: { "optimizer.lr": "auto" }, started: 3 }),
  row("d", { figures: { val_loss: ["-Infinity", null] }, started: 4 }),
];

const keys = (field: string, descending = false): string => sortRows([...RUNS], field, descending).map(({ key }) => key).join("");

test.each([
  ["name", false, "abcd"],
  ["name", true, "dcba"],
  ["started", true, "dcba"],
  ["last", false, "dacb"],
  ["last", true, "adcb"],
  ["best", false, "badc"],
  ["last:loss", false, "cdba"],
  ["with:optimizer.lr", false, "bacd"],
  ["with:optimizer.lr", true, "cabd"],
  ["with:model", false, "badc"],
  ["last:nothing", false, "dcba"],
])("sorted by %s, descending %s: %s", (field, descending, order) => {
  expect(keys(field, descending)).toBe(order);
});

test("a metric that is called like a part of every object is not taken for one", () => {
  expect(valueOf(row("a"), "last:constructor")).toBeNull();
  expect(valueOf(row("a"), "with:toString")).toBeNull();
});

test("fields are what some run has", () => {
  const fields = allFields(RUNS);
  expect(fields.slice(-5)).toEqual(["with:model", "with:optimizer.lr", "last:loss", "best:val_loss", "last:val_loss"]);
  expect(titleOf("best:val_loss")).toBe("best val_loss");
  expect(textOf(RUNS[0]!, "with:optimizer.lr")).toBe("0.1");
  expect(textOf(RUNS[1]!, "last:val_loss")).toBe("NaN");
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
  expect(sortRows(many, "name", false)[0]?.key).toBe("9999");
});
