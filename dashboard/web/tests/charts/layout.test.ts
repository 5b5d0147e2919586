import { expect, test } from "vitest";

import { columnsOf } from "../../src/charts/layout";

test.each([
  [6, 5, 3],
  [5, 5, 5],
  [7, 5, 4],
  [11, 5, 4],
  [2, 5, 2],
  [3, 1, 1],
  [0, 5, 1],
])("%i panels where %i fit have %i columns", (count, most, columns) => {
  expect(columnsOf(count, most)).toBe(columns);
});
