import { expect, test } from "vitest";

import { Smoothed, type SmoothedColumn } from "../../src/charts/smoothing";

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

function curve(values: number[], length = values.length, rest: Partial<SmoothedColumn> = {}): SmoothedColumn {
  const step = Float64Array.from(values.keys());
  return { length, step, value: Float64Array.from(values), reducedTo: -Infinity, generation: 0, ...rest };
}

const VALUES = Array.from({ length: 300 }, (_, index) => Math.sin(index / 7) + (index % 5) / 3 + 2);

test.each([0.1, 0.6, 0.9, 0.99, 0.999])("the debiased average with weight %f", (weight) => {
  const smoothed = new Smoothed(weight, 1).update(curve(VALUES));
  reference(VALUES, weight).forEach((value, index) => expect(smoothed[index]).toBeCloseTo(value, 9));
});

test("starts at the first value, not at zero", () => {
  expect(new Smoothed(0.999, 1).update(curve([5, 6]))[0]).toBe(5);
});

test("leaves a constant as it is, to the last bit", () => {
  const smoothed = new Smoothed(0.9, 1).update(curve(new Array<number>(1_000).fill(0.1)));
  expect(new Set(smoothed)).toEqual(new Set([0.1]));
});

test("a weight of 0 is the curve itself", () => {
  expect([...new Smoothed(0, 1).update(curve([3, 1, 2]))]).toEqual([3, 1, 2]);
});

test("goes on from where it was, as if all points had been there at once", () => {
  const [all, some] = [new Smoothed(0.9, 1), new Smoothed(0.9, 1)];
  const whole = Array.from(all.update(curve(VALUES)));
  for (const count of [0, 1, 2, 100, 101, 300]) some.update(curve(VALUES, count));
  expect(Array.from(some.update(curve(VALUES)))).toEqual(whole);
});

test("begins anew when earlier points have changed", () => {
  const smoothed = new Smoothed(0.5, 1);
  smoothed.update(curve([100, 100]));
  expect(smoothed.update(curve([1, 3], 2, { generation: 1 }))[1]).toBeCloseTo(reference([1, 3], 0.5)[1] as number, 12);
});

test("merged points count as many as they stand for: a thinned ramp is averaged as the whole one", () => {
  const step = Float64Array.from({ length: 200 }, (_, index) => 10 * Math.floor(index / 2) + (index % 2 === 0 ? 0 : 9));
  const thinned = { length: 200, step, value: step, reducedTo: 999, generation: 0 };
  const whole = curve(Array.from({ length: 1_000 }, (_, index) => index));
  const last = (smoothed: Float64Array, length: number): number => smoothed[length - 1] as number;
  const expected = last(new Smoothed(0.99, 1).update(whole), 1_000);
  expect(Math.abs(last(new Smoothed(0.99, 1).update(thinned), 200) - expected)).toBeLessThan(10);
});

test("of merged points, those with many steps before them count no more than the others", () => {
  // Up and down at each step, of which each fourth and the one after it are left
  const step = Float64Array.from({ length: 400 }, (_, index) => 4 * Math.floor(index / 2) + (index % 2));
  const value = step.map((one) => one % 2);
  const shown = new Smoothed(0.98, 1).update({ length: 400, step, value, reducedTo: 1_000, generation: 0 });
  expect(shown[399]).toBeCloseTo(0.5, 1);
});

test("few points beside many are averaged over as many steps, and so hardly at all", () => {
  const step = Float64Array.of(200, 400, 600, 800);
  const sparse = { length: 4, step, value: Float64Array.of(2.3, 0.5, 0.3, 0.17), reducedTo: -Infinity, generation: 0 };
  const shown = new Smoothed(0.98, 1).update(sparse);
  for (const index of [0, 1, 2, 3]) {
    expect(Math.abs((shown[index] as number) / (sparse.value[index] as number) - 1)).toBeLessThan(0.1);
  }
  // In a panel of its own, the same curve is smooth.
  expect(new Smoothed(0.98, 200).update(sparse)[3]).toBeGreaterThan(0.5);
});

test("several points at one step each count", () => {
  const [step, value] = [Float64Array.of(5, 5, 5), Float64Array.of(1, 2, 3)];
  const shown = new Smoothed(0.5, 1).update({ length: 3, step, value, reducedTo: -Infinity, generation: 0 });
  expect(shown[2]).toBeCloseTo(reference([1, 2, 3], 0.5)[2] as number, 12);
});
