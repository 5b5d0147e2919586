import { beforeAll, expect, test } from "vitest";
import { RunNames } from "../../src/runs/fields";
import { Filter, writeCondition } from "../../src/runs/filter";
import { CASES, foundBy, RUNS } from "../cases";

beforeAll(() => {
  process.env.TZ = "UTC"; // dates of filters are local: have them mean the same everywhere
});

test.each(CASES.filters)("%j finds %j", (text, keys) => {
  expect(foundBy(text)).toBe(keys);
});

test.each(CASES.errors)("%j is refused: %s", (text, why) => {
  expect(foundBy(text)).toBe(`error: ${why}`);
  expect(RUNS.filter((run) => new Filter(text, CASES.now).problem !== "" && new Filter(text, CASES.now).test(run))).toEqual([]);
});

test("a filter has a greatest length", () => {
  expect(foundBy("x".repeat(1_000))).toBe("");
  expect(foundBy("x".repeat(1_001))).toBe("error: a filter has at most 1,000 characters");
});

test("nothing is unknown where there are no runs", () => {
  expect(new Filter("val_loss<0.5", 0).problemWith([])).toBe("");
});

test.each([
  ["val_loss", "<", "0.5", "val_loss<0.5", "sweep/a"],
  ["my metric", ">", "4", '"my metric">"4"', "sweep/a"],
  ["tag", "=", "long run", 'tag="long run"', "sweep/a"],
  ["note", ":", "", 'note:""', "sweep/b c d10 d9"],
  ["id", ":", '"it\'s"', 'id:"\\"it\'s\\""', "c"],
  ["data", "=", "/data/imagenet", 'data="/data/imagenet"', "sweep/a"],
])("a condition is written as it is read: %s %s %s", (name, operator, value, text, keys) => {
  const written = writeCondition(name, operator, value);
  expect(written.replace('"4"', "4")).toBe(text.replace('"4"', "4"));
  expect(foundBy(written)).toBe(keys);
});

test("names of fields are those of the runs", () => {
  const names = new RunNames(RUNS);
  expect(names.problem("-val_loss")).toBe("no run has '-val_loss'; did you mean 'val_loss'?");
  expect(names.problem("best.val_loss")).toBe("");
});
