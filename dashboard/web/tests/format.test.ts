import { expect, test } from "vitest";
import * as format from "../src/format";

test.each([
  [0, "0"],
  [0.123456, "0.1235"],
  [1, "1.000"],
  [-12.3456, "−12.35"],
  [12345.6, "12346"],
  [1.5e9, "1.50e9"],
  [-2.5e-7, "−2.50e−7"],
  [NaN, "NaN"],
  [-Infinity, "−∞"],
  [null, "–"],
])("a value %s", (value, text) => {
  expect(format.number(value)).toBe(text);
});

test.each([
  [0.001, "0.001"],
  [0.00003, "3e−5"],
  [0.1 + 0.2, "0.3"],
  [-1e-7, "−1e−7"],
  [2e21, "2e21"],
  [NaN, "NaN"],
  [undefined, "–"],
])("a value in running text %s", (value, text) => {
  expect(format.compact(value)).toBe(text);
});

test.each([
  [0.004, "<0.1 s"],
  [0, "0.0 s"],
  [9.94, "9.9 s"],
  [9.97, "10 s"],
  [59.7, "1 m 00 s"],
  [252, "4 m 12 s"],
  [3_599.6, "1 h 00 m"],
  [11_100, "3 h 05 m"],
  [187_200, "2 d 4 h"],
  [92_103_200, "1\u202f066 d"],
  [Infinity, "–"],
])("a duration %s", (seconds, text) => {
  expect(format.duration(seconds)).toBe(text);
});

test("counts, sizes and shares", () => {
  expect(format.count(1_234_567).replaceAll("\u202f", " ")).toBe("1 234 567");
  expect(format.shortCount(25_557_032).replaceAll("\u202f", " ")).toBe("25.6 M");
  expect([999, 1_000, 204_812_331, 5e15].map(format.bytes)).toEqual(["999 B", "1.0 KB", "205 MB", "5000 TB"]);
  expect([0, 0.001, 0.5, 1.2, -1].map(format.percent)).toEqual(["0 %", "<1 %", "50 %", "100 %", "0 %"]);
  expect([0, 0.5, 16.41, 250.4, 4_201].map(format.perSecond).map((text) => text.replace("\u202f", " "))).toEqual([
    "–", "0.500", "16.4", "250", "4 201",
  ]);
});
