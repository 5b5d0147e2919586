import { expect, test } from "vitest";

import { Smoothed } from "../../src/charts/smoothing";

/** What TensorBoard's scalar charts compute, from all points at once: a weighted mean with falling weights. */
function reference(values: number[], weight: number): number[] {
  return values.map((_, end) => {
    let [sum, total] = [0, 0];
    for (let index = 0; index <= end; index++) {
      const share = (1 - weight) * weight ** (end - index);
      sum += share * (values[index] as number);
      total += share;
    }
    return sum / total;
  });
}

const VALUES = Array.from({ length: 300 }, (_, index) => Math.sin(index / 7) + (index % 5) / 3 + 2);

test.each([0.1, 0.6, 0.9, 0.99, 0.999])("the debiased average with weight %f", (weight) => {
  const smoothed = new Smoothed(weight).update(Float64Array.from(VALUES), VALUES.length, 0);
  reference(VALUES, weight).forEach((value, index) => expect(smoothed[index]).toBeCloseTo(value, 9));
});

test("starts at the first value, not at zero", () => {
  expect(new Smoothed(0.999).update(Float64Array.from([5, 6]), 2, 0)[0]).toBe(5);
});

test("leaves a constant as it is, to the last bit", () => {
  const smoothed = new Smoothed(0.9).update(new Float64Array(1_000).fill(0.1), 1_000, 0);
  expect(new Set(smoothed)).toEqual(new Set([0.1]));
});

test("a weight of 0 is the curve itself", () => {
  expect([...new Smoothed(0).update(Float64Array.from([3, 1, 2]), 3, 0)]).toEqual([3, 1, 2]);
});

test("goes on from where it was, as if all points had been there at once", () => {
  const [all, some] = [new Smoothed(0.9), new Smoothed(0.9)];
  const values = Float64Array.from(VALUES);
  const whole = Array.from(all.update(values, 300, 0));
  for (const count of [0, 1, 2, 100, 101, 300]) some.update(values, count, 0);
  expect(Array.from(some.update(values, 300, 0))).toEqual(whole);
});

test("begins anew when earlier points have changed", () => {
  const smoothed = new Smoothed(0.5);
  smoothed.update(Float64Array.from([100, 100]), 2, 0);
  expect(smoothed.update(Float64Array.from([1, 3]), 2, 1)[1]).toBeCloseTo(reference([1, 3], 0.5)[1] as number, 12);
});
