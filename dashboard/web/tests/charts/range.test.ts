import { expect, test } from "vitest";

import { readRange } from "../../src/charts/range";

test.each([
  ["", "", false, { min: null, max: null }],
  [" 1e-3 ", "", true, { min: 0.001, max: null }],
  ["-1", "1", false, { min: -1, max: 1 }],
  ["10", "1", false, "10 to 1 is no range: the first number must be less than the second."],
  ["1", "1.0", false, "1 to 1.0 is no range: the first number must be less than the second."],
  ["-1", "", true, "-1 has no place on a logarithmic axis: give a number above 0, or none."],
  ["", "0", true, "0 has no place on a logarithmic axis: give a number above 0, or none."],
  ["", "ten", false, "ten is no number: give one such as 0.1 or 1e-3, or none."],
])("%j to %j, logarithmic: %j", (min, max, isLog, expected) => {
  expect(readRange(min, max, isLog)).toEqual(expected);
});
