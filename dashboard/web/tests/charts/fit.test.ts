import { expect, test } from "vitest";

import { Scale } from "../../src/charts/axes";
import { type Drawn, fit, isSquashed } from "../../src/charts/fit";
import { Curve } from "../../src/charts/series_store";

const SCENE = { column: "step" as const, origin: 0, x: new Scale(0, 1_000) };

function drawn(...values: number[]): Drawn {
  const curve = new Curve();
  values.forEach((value, step) => curve.push(step, step, step, step, value));
  return { curve, values: curve.value, scene: SCENE };
}

const view = (log = false) => ({ logY: log });
const WAVE = Array.from({ length: 200 }, (_, index) => 1 + 0.2 * Math.sin(index));
const SPIKED = WAVE.map((value, index) => (index === 100 ? 300 : value));

test("all values are in the scale, unless the viewer wants the usual ones", () => {
  expect(fit([drawn(...SPIKED)], view(), false)).toMatchObject({ above: 0, below: 0 });
  expect(fit([drawn(...SPIKED)], view(), false).scale.max).toBeGreaterThanOrEqual(300);
  const { scale, above, below } = fit([drawn(...SPIKED)], view(), true);
  expect([above, below]).toEqual([1, 0]);
  expect(scale.max).toBeLessThan(2);
});

test("ends that are set are the axis, and what is beyond them is counted", () => {
  const { scale, above, below } = fit([drawn(...SPIKED)], view(), false, { min: 0.9, max: 2 });
  expect([scale.min, scale.max, above]).toEqual([0.9, 2, 1]);
  expect(below).toBe(SPIKED.filter((value) => value < 0.9).length);
  // One end; the other one is by the values, or gives way
  expect(fit([drawn(1, 2, 3)], view(), false, { min: null, max: 2 }).scale).toMatchObject({ max: 2 });
  const beyond = fit([drawn(1, 2, 3)], view(), false, { min: 10, max: null }).scale;
  expect(beyond.min).toBe(10);
  expect(beyond.max).toBeGreaterThan(10);
  // A logarithmic axis has no 0.
  expect(fit([drawn(1, 2, 3)], view(true), false, { min: 0, max: 100 }).scale).toMatchObject({ max: 100, log: true });
  expect(fit([drawn(1, 2, 3)], view(true), false, { min: 1e-300, max: null }).scale.min).toBe(1e-300);
});

test("values far below are outside, too", () => {
  expect(fit([drawn(...WAVE, -50, -60)], view(), true)).toMatchObject({ above: 0, below: 2 });
});

test("each curve has its own usual values: a few points far from many others stay", () => {
  const { scale, above } = fit([drawn(...SPIKED), drawn(20, 21, 22, 20)], view(), true);
  expect(scale.max).toBeGreaterThanOrEqual(22);
  expect(above).toBe(1);
});

test("without outliers the scale is the same, and a constant is in its middle", () => {
  expect(fit([drawn(...WAVE)], view(), true).scale).toEqual(fit([drawn(...WAVE)], view(), false).scale);
  const { scale, above } = fit([drawn(...new Array<number>(50).fill(3), 300)], view(), true);
  expect([above, scale.toUnit(3)]).toEqual([1, expect.closeTo(0.5, 1)]);
});

test("on a logarithmic axis what is usual is so by its logarithm", () => {
  const decades = Array.from({ length: 100 }, (_, index) => 10 ** (index / 25));
  expect(fit([drawn(...decades)], view(true), true)).toMatchObject({ above: 0, below: 0 });
  expect(fit([drawn(...decades, 1e30, 0)], view(true), true)).toMatchObject({ above: 1, belowZero: 1 });
});

test("of merged points there may be more outside", () => {
  const one = drawn(...SPIKED);
  expect(fit([one], view(), true).isAtLeast).toBe(false);
  one.curve.reducedTo = 150;
  expect(fit([one], view(), true).isAtLeast).toBe(true);
});

test("one spike leaves little room for the rest, a decline does not", () => {
  expect(isSquashed([drawn(...SPIKED)], view())).toBe(true);
  expect(isSquashed([drawn(...WAVE)], view())).toBe(false);
  expect(isSquashed([drawn(...Array.from({ length: 200 }, (_, index) => 200 - index))], view())).toBe(false);
  expect(isSquashed([drawn()], view())).toBe(false);
});
