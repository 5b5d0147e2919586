import { expect, test } from "vitest";
import { readFilter, writeCondition } from "../../src/runs/filter";
import { row } from "../messages";

const NOW = 1_000_000;
const RUNS = [
  row("sweep/a", {
    name: "Wide net", state: "running", started: NOW - 60, seconds: 60, tags: ["good one", "paper"],
    figures: { val_loss: [0.3, 0.2], "my metric": [5, null] }, hyperparameters: { "optimizer.lr": 0.1, model: "Net" },
  }),
  row("sweep/b", {
    name: "narrow", state: "failed", started: NOW + 7_200, seconds: 7_200,
    figures: { val_loss: ["NaN", 0.4] }, hyperparameters: { "optimizer.lr": 0.001, model: "Other" },
  }),
  row("c", { name: "<b>c</b>", state: "lost", started: NOW - 5 * 86_400, archived: true }),
];

test.each([
  ["", "sweep/a sweep/b c"],
  ["NET", "sweep/a"],
  ["sweep", "sweep/a sweep/b"],
  ["wide net", "sweep/a"],
  ["paper", "sweep/a"],
  ["/^n.*w$/", "sweep/b"],
  ["/sweep\\/[ab]/ narrow", "sweep/b"],
  ["<b>", "c"],
  ["state=failed", "sweep/b"],
  ["state=live", "sweep/a"],
  ["state!=live", "sweep/b c"],
  ["val_loss<0.5", "sweep/a"],
  ["val_loss < 0.5", "sweep/a"],
  ["best:val_loss>=0.3", "sweep/b"],
  ["optimizer.lr<=0.01", "sweep/b"],
  ["model=net", "sweep/a"],
  ["model!=net", "sweep/b c"],
  ['"my metric">4', "sweep/a"],
  ['tag="good one"', "sweep/a"],
  ["tag!=paper", "sweep/b c"],
  ["age>1d", "c"],
  ["age<1m", "sweep/b"],
  ["duration>1h", "sweep/b"],
  ["archived=yes", "c"],
  ["date<1970-01-10", "c"],
  ['model=""', "c"],
  ["constructor=1", ""],
])("%s finds %s", (text, found) => {
  const filter = readFilter(text, NOW);
  expect(filter.problem).toBe("");
  expect(RUNS.filter(filter.test).map(({ key }) => key).join(" ")).toBe(found);
});

test("a pattern that is none is told and left out", () => {
  const filter = readFilter("/(/ state=failed", NOW);
  expect(filter.problem).toContain("no pattern");
  expect(RUNS.filter(filter.test).map(({ key }) => key)).toEqual(["sweep/b"]);
});

test.each([
  ["val_loss", "<", "0.4", "val_loss<0.4"],
  ["my metric", ">", "4", '"my metric">4'],
  ["tag", "=", "good one", 'tag="good one"'],
])("a condition is written as it is read: %s %s %s", (name, operator, value, text) => {
  expect(writeCondition(name, operator, value)).toBe(text);
  expect(RUNS.filter(readFilter(text, NOW).test).map(({ key }) => key)).toEqual(["sweep/a"]);
});
