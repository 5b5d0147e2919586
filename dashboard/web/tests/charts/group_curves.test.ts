import { describe, expect, test } from "vitest";

import { Scale } from "../../src/charts/axes";
import { groupCurve, type Member, places } from "../../src/charts/group_curves";
import { Curve } from "../../src/charts/series_store";

function member(points: [number, number][], origin = 0): Member {
  const curve = new Curve();
  for (const [step, value] of points) curve.push(step, step, step, step, value);
  return { curve, values: curve.value, origin };
}

const X = new Scale(0, 10);

function group(members: Member[], x = X, pixels = 100): [number, number, number, number][] {
  const { curve, low, high } = groupCurve(members, "step", x, pixels);
  return Array.from({ length: curve.length }, (_, index) => [
    curve.step[index] as number, low[index] as number, curve.value[index] as number, high[index] as number,
  ]);
}

describe("a group", () => {
  test("is the mean with the least and the greatest of its members", () => {
    expect(group([member([[0, 1], [5, 3]]), member([[0, 3], [5, 4]]), member([[0, 2], [5, 8]])])).toEqual([
      [0, 1, 2, 3],
      [5, 3, 5, 8],
    ]);
  });

  test("counts a member in proportion between its points, and not before the first and after the last", () => {
    expect(group([member([[0, 0], [10, 10]]), member([[2, 0], [4, 0]])])).toEqual([
      [0, 0, 0, 0],
      [2, 0, 1, 2],
      [4, 0, 2, 4],
      [10, 10, 10, 10],
    ]);
  });

  test("aligns its members by their own origins", () => {
    expect(group([member([[0, 1], [1, 2]]), member([[100, 3], [101, 4]], 100)])).toEqual([
      [0, 1, 2, 3],
      [1, 2, 3, 4],
    ]);
  });

  test("has one place in each pixel, and one at either side of a zoom", () => {
    const many = member(Array.from({ length: 1_001 }, (_, step) => [step, step]));
    const at = [...places([many], "step", new Scale(100, 200), 10)];
    expect(at).toEqual([99, 100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 201]);
    expect(group([many], new Scale(100, 200), 10).map(([, , mean]) => mean)).toEqual(at);
  });

  test("of one is itself, and of none nothing", () => {
    expect(group([member([[0, 1], [3, 2]])])).toEqual([[0, 1, 1, 1], [3, 2, 2, 2]]);
    expect(group([])).toEqual([]);
    expect(group([member([])])).toEqual([]);
  });
});
