import { describe, expect, test } from "vitest";

import { fitScale, formatDuration, formatTicks, formatValue, formatWithUnit, formatX, niceStep, Scale, xTicks, yTicks } from "../../src/charts/axes";

/** Ranges that a metric may have; each must give an axis that can be read. */
const RANGES: [number, number][] = [
  [0, 1], [0.2, 2.5], [-3, 7], [1e-30, 3e-30], [1e-9, 1], [0, 1e30], [1e30, 2e30], [-1e-30, 1e-30],
  [5, 5], [0, 0], [-2, -2], [1e-30, 1e-30], [1e30, 1e30], [123456789, 123456790], [1, 1 + 1e-9], [-1e307, 1e307],
]; // prettier-ignore

describe("the y axis", () => {
  test.each(RANGES)("shows values from %d to %d with a few ticks that differ", (low, high) => {
    const scale = fitScale(low, high, false);
    expect(scale.min <= low && scale.max >= high && scale.min < scale.max).toBe(true);
    for (const value of [low, high]) {
      const unit = scale.toUnit(value);
      expect(unit >= 0 && unit <= 1).toBe(true);
    }
    const { values, labels } = yTicks(scale, 4);
    expect(values.length).toBeGreaterThan(0);
    expect(values.length).toBeLessThanOrEqual(8);
    expect(new Set(labels).size).toBe(labels.length);
    for (const value of values) expect(scale.toUnit(value) > -1e-6 && scale.toUnit(value) < 1 + 1e-6).toBe(true);
  });

  test.each(RANGES.filter(([low]) => low > 0))("shows values from %d to %d on a logarithmic axis", (low, high) => {
    const scale = fitScale(low, high, true);
    expect(scale.toUnit(low) > 0 && scale.toUnit(high) < 1).toBe(true);
    const { values, labels } = yTicks(scale, 4);
    expect(values.length).toBeGreaterThan(0);
    expect(values.length).toBeLessThanOrEqual(12);
    expect(new Set(labels).size).toBe(labels.length);
  });

  test("has a place for one value, in the middle", () => {
    expect(fitScale(5, 5, false).toUnit(5)).toBeCloseTo(0.5);
    expect(fitScale(5, 5, true).toUnit(5)).toBeCloseTo(0.5);
  });

  test("is there before there are values", () => {
    expect(fitScale(Infinity, -Infinity, false)).toMatchObject({ min: 0, max: 1 });
    expect(fitScale(Infinity, -Infinity, true)).toMatchObject({ min: 0.1, max: 10, log: true });
  });

  test("rests while values move a little", () => {
    expect(fitScale(0.21, 2.4, false)).toEqual(fitScale(0.24, 2.35, false));
  });

  test("begins at zero where values do", () => {
    expect(fitScale(0, 0.97, false).min).toBe(0);
    expect(fitScale(0.0003, 0.8, false).min).toBe(0);
    expect(fitScale(-0.0003, 0.8, false).min).toBeLessThan(0);
  });

  test("has no place for zero and less on a logarithmic axis", () => {
    const scale = new Scale(0.1, 10, true);
    expect([scale.toUnit(0), scale.toUnit(-1)]).toEqual([NaN, NaN]);
    expect([scale.toUnit(0.1), scale.toUnit(1), scale.toUnit(10)]).toEqual([0, 0.5, 1]);
  });
});

test.each([false, true])("a place on a scale and back (logarithmic: %s)", (log) => {
  const scale = new Scale(0.01, 500, log);
  for (const value of [0.01, 0.5, 3, 499]) expect(scale.fromUnit(scale.toUnit(value))).toBeCloseTo(value, 9);
});

test("steps between ticks are 1, 2 or 5 times a power of ten", () => {
  expect([0.9, 1, 1.1, 2.1, 5.1, 0.03, 7e-30, 3e29].map(niceStep)).toEqual([1, 1, 2, 5, 10, 0.05, 1e-29, 5e29]);
});

describe("ticks", () => {
  test("are decimals to the last digit", () => {
    expect(yTicks(new Scale(0, 0.5), 5).values).toEqual([0, 0.1, 0.2, 0.3, 0.4, 0.5]);
  });

  test("are labelled with as few digits as tell them apart", () => {
    expect(formatTicks([0, 0.5, 1])).toEqual(["0", "0.5", "1.0"]);
    expect(formatTicks([0, 10_000, 20_000])).toEqual(["0", "10k", "20k"]);
    expect(formatTicks([1e6, 1.5e6, 2e6])).toEqual(["1.0M", "1.5M", "2.0M"]);
    expect(formatTicks([13.9e9, 14e9, 14.1e9])).toEqual(["13.9G", "14.0G", "14.1G"]);
    expect(formatTicks([0, 1e-4, 2e-4])).toEqual(["0", "1e−4", "2e−4"]);
    expect(formatTicks([-0.5, 0, 0.5])).toEqual(["−0.5", "0", "0.5"]);
  });

  test("of a logarithmic axis are powers of ten, each written as short as it can be", () => {
    expect(yTicks(new Scale(0.5, 2_000, true), 4).labels).toEqual(["1", "10", "100", "1000"]);
    expect(yTicks(new Scale(1e-6, 1e-3, true), 4).labels).toEqual(["1e−6", "1e−5", "1e−4", "1e−3"]);
    expect(yTicks(new Scale(0.1, 2, true), 5).labels).toEqual(["0.1", "0.2", "0.5", "1", "2"]);
    expect(yTicks(new Scale(1e-30, 1e30, true), 4).values.length).toBeLessThanOrEqual(5);
  });

  test("of steps are whole", () => {
    expect(xTicks("step", new Scale(1, 3), 10).values).toEqual([1, 2, 3]);
  });

  test("of the time since the start are times one would say", () => {
    expect(xTicks("time", new Scale(0, 400), 4).labels).toEqual(["0s", "2m", "4m", "6m"]);
    expect(xTicks("time", new Scale(0, 100), 4).labels).toEqual(["0s", "30s", "1m", "1m 30s"]);
    expect(xTicks("time", new Scale(0, 1), 2).labels).toEqual(["0s", "0.5s", "1.0s"]);
    expect(xTicks("time", new Scale(0, 30 * 86_400), 4).labels).toEqual(["0s", "14d", "28d"]);
  });

  test("of the time of day are whole hours of the viewer's clock", () => {
    const start = new Date(2026, 10, 22, 21, 10).getTime() / 1_000;
    expect(xTicks("wall", new Scale(start, start + 4 * 3_600), 5).labels).toEqual(["22:00", "23:00", "23 Nov", "01:00"]);
    expect(xTicks("wall", new Scale(start, start + 20), 3).labels).toEqual(["21:10:00", "21:10:10", "21:10:20"]);
  });
});

test.each([
  [0, "0"], [-0, "0"], [NaN, "NaN"], [Infinity, "∞"], [-Infinity, "−∞"], [0.123456, "0.1235"], [12.3456, "12.35"], [-0.5, "−0.5000"],
  [1234567, "1\u202f234\u202f567"], [54321.6, "54\u202f322"], [1e-30, "1.000e−30"], [2.5e30, "2.500e30"], [3e-4, "3.000e−4"],
])("the value %d reads as %s", (value, text) => {
  expect(formatValue(value)).toBe(text);
}); // prettier-ignore

test.each([[0, "0s"], [59.6, "1m"], [90, "1m 30s"], [3_600, "1h"], [90_061, "1d 1h"], [-5, "−5s"]])(
  "%d seconds read as %s",
  (seconds, text) => expect(formatDuration(seconds)).toBe(text),
);

test("places on the x axis say what they are", () => {
  expect(formatX("step", 12_345)).toBe("step 12\u202f345");
  expect(formatX("epoch", 1.234)).toBe("epoch 1.23");
  expect(formatX("time", 12.34)).toBe("12.3s");
  expect(formatX("wall", new Date(2026, 0, 5, 4, 3, 2).getTime() / 1_000)).toBe("5 Jan 04:03:02");
});

test.each<[number, string, string]>([
  [340_300_000, "bytes", "340.3 MB"],
  [999, "bytes", "999 B"],
  [1_500_000, "bytes/s", "1.500 MB/s"],
  [96.3, "percent", "96.30 %"],
  [0.0625, "share", "6.250 %"],
  [0.004, "seconds", "4.00 ms"],
  [12.5, "seconds", "12.50 s"],
  [90, "seconds", "1m 30s"],
  [12.5, "1/s", "12.50/s"],
  [71, "celsius", "71 °C"],
  [3, "apples", "3 apples"],
  [0, "bytes", "0 B"],
  [NaN, "bytes", "NaN"],
  [0.5, "", "0.5000"],
])("%d of %s is read as %s", (value, unit, text) => {
  expect(formatWithUnit(value, unit).replaceAll("\u202f", " ")).toBe(text);
});

test("ticks have the unit of their axis", () => {
  const labels = (scale: Scale, unit: string): string[] =>
    yTicks(scale, 4, unit).labels.map((label) => label.replaceAll("\u202f", " "));
  expect(labels(new Scale(0, 400e6), "bytes")).toEqual(["0 B", "100 MB", "200 MB", "300 MB", "400 MB"]);
  expect(labels(new Scale(0, 1), "share")).toEqual(["0 %", "50 %", "100 %"]);
  expect(labels(new Scale(0, 0.1), "seconds")).toEqual(["0 s", "0.05 s", "0.10 s"]);
});
