import { describe, expect, test } from "vitest";

import { Curve, extremes, MAX_CURVE_POINTS, SeriesStore } from "../../src/charts/series_store";
import type { ChartFrame, ChartHeader, Gap, NonFinite } from "../../src/protocol";

/** A reproducible source of numbers from 0 to 1 (mulberry32). */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

type Column = { id: number; rows?: number[]; values: number[]; marks?: NonFinite[]; reduced?: boolean };

function frame(kind: ChartHeader["kind"], steps: number[], columns: Column[], rest: Partial<ChartHeader> = {}): ChartFrame {
  return {
    header: {
      ...{ type: "chart", run: "r", kind, query: null, more: false, rows: steps.length, gaps: [], trimmed: null },
      series: columns.map(({ id, values, rows, marks = [], reduced = false }) => ({
        ...{ id, points: values.length, dense: rows === undefined, reduced, marks },
      })),
      ...rest,
    },
    step: Float64Array.from(steps),
    time: Float64Array.from(steps, (step) => 1e9 + step),
    epoch: Float64Array.from(steps, (step) => step / 100),
    samples: Float64Array.from(steps, (step) => 8 * step),
    values: columns.map(({ values }) => Float64Array.from(values)),
    indices: columns.map(({ rows }) => Uint32Array.from(rows ?? steps.keys())),
  };
}

function points(curve: Curve | undefined): [number, number][] {
  if (!curve) return [];
  return Array.from({ length: curve.length }, (_, index) => [curve.step[index] as number, curve.value[index] as number]);
}

describe("chart frames", () => {
  test("a snapshot replaces a curve, a delta is appended", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [1, 2], [{ id: 7, values: [10, 20] }]));
    store.apply(frame("delta", [3], [{ id: 7, values: [30] }]));
    expect(points(store.curves.get(7))).toEqual([[1, 10], [2, 20], [3, 30]]);
    store.apply(frame("snapshot", [5], [{ id: 7, values: [50] }]));
    expect(points(store.curves.get(7))).toEqual([[5, 50]]);
  });

  test("each point is in the row that its index names", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [1, 2, 3, 4], [{ id: 1, values: [1, 2, 3, 4] }, { id: 2, rows: [1, 3], values: [0.2, 0.4] }]));
    expect(points(store.curves.get(2))).toEqual([[2, 0.2], [4, 0.4]]);
    expect(store.curves.get(2)?.at(1)).toEqual({ step: 4, time: 1e9 + 4, epoch: 0.04, samples: 32, value: 0.4 });
  });

  test("a snapshot in parts goes on where its curves were, and replaces those that come in later parts", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [1], [{ id: 1, values: [1] }, { id: 2, values: [1] }]));
    store.apply(frame("snapshot", [1, 2], [{ id: 1, values: [10, 20] }], { more: true }));
    store.apply(frame("snapshot", [3], [{ id: 1, values: [30] }, { id: 2, values: [3] }]));
    expect(points(store.curves.get(1))).toEqual([[1, 10], [2, 20], [3, 30]]);
    expect(points(store.curves.get(2))).toEqual([[3, 3]]);
    store.apply(frame("snapshot", [4], [{ id: 1, values: [4] }]));
    expect(points(store.curves.get(1))).toEqual([[4, 4]]);
  });

  test("a snapshot of one curve leaves the others alone", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [1], [{ id: 1, values: [1] }]));
    store.apply(frame("snapshot", [1], [{ id: 2, values: [2] }]));
    expect(points(store.curves.get(1))).toEqual([[1, 1]]);
  });

  test("a point that comes late takes its place by step", () => {
    const store = new SeriesStore();
    store.apply(frame("delta", [1, 5], [{ id: 1, values: [1, 5] }]));
    const before = store.curves.get(1)?.generation;
    store.apply(frame("delta", [3], [{ id: 1, values: [3] }]));
    expect(points(store.curves.get(1))).toEqual([[1, 1], [3, 3], [5, 5]]);
    expect(store.curves.get(1)?.generation).not.toBe(before);
  });

  test("a gap is told once, as long as it has grown", () => {
    const store = new SeriesStore();
    store.apply(frame("delta", [1], [], { gaps: [[10, 12, 1]] }));
    store.apply(frame("delta", [1], [], { gaps: [[10, 20, 9], [2, 4, 1]] }));
    const { gaps } = store;
    store.apply(frame("delta", [1], [], { gaps: [[10, 12, 1]] }));
    expect(store.gaps).toEqual([[2, 4, 1], [10, 20, 9]]);
    expect(store.gaps).toBe(gaps);
  });

  test("a snapshot that a lost connection cut off begins anew, and the old curve is there until then", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [1, 2], [{ id: 1, values: [1, 2] }], { more: true }));
    store.interrupted();
    expect(points(store.curves.get(1))).toEqual([[1, 1], [2, 2]]);
    store.apply(frame("snapshot", [1, 2], [{ id: 1, values: [1, 2] }]));
    expect(points(store.curves.get(1))).toEqual([[1, 1], [2, 2]]);
  });

  test("what was trimmed stays trimmed", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [], [], { trimmed: 500 }));
    store.apply(frame("delta", [], [], { trimmed: null }));
    expect(store.trimmed).toBe(500);
  });

  test("reduced points are known up to the last of them", () => {
    const store = new SeriesStore();
    store.apply(frame("snapshot", [1, 9], [{ id: 1, values: [1, 2], reduced: true }]));
    store.apply(frame("delta", [10, 11], [{ id: 1, values: [1, 2] }]));
    expect(store.curves.get(1)?.reducedTo).toBe(9);
  });
});

describe("what is not finite", () => {
  test("is a mark and no point", () => {
    const store = new SeriesStore();
    store.apply(frame("delta", [1, 2, 3], [{ id: 1, values: [1, NaN, 3], marks: [[2, 2, "inf", 1]] }]));
    expect(points(store.curves.get(1))).toEqual([[1, 1], [3, 3]]);
    expect(store.curves.get(1)?.marks).toEqual([[2, 2, "inf", 1]]);
  });

  test("a stretch that goes on comes again with the next frame, and is one", () => {
    const curve = new Curve();
    curve.addMarks([[2, 3, "nan", 2]]);
    curve.addMarks([[2, 6, "nan", 5]]);
    curve.addMarks([[2, 3, "nan", 2], [8, 8, "inf", 1]]);
    expect(curve.marks).toEqual([[2, 6, "nan", 5], [8, 8, "inf", 1]]);
    const { marks } = curve;
    curve.addMarks([[8, 8, "inf", 1]]);
    expect(curve.marks).toBe(marks);
  });
});

describe("breaks", () => {
  const gaps: Gap[] = [[10, 20, 9]];

  test("are ordered and do not overlap", () => {
    const curve = new Curve();
    for (const step of [4, 7, 35]) curve.push(step, 0, 0, 0, 1);
    curve.addMarks([[5, 5, "nan", 1], [15, 30, "nan", 4], [40, 40, "inf", 1]]);
    expect([...curve.breaks(gaps)]).toEqual([5, 5, 10, 30, 40, 40]);
  });

  test("are computed again only when something has come", () => {
    const curve = new Curve();
    const before = curve.breaks(gaps);
    expect(curve.breaks(gaps)).toBe(before);
    curve.addMarks([[5, 5, "nan", 1]]);
    expect(curve.breaks(gaps)).not.toBe(before);
  });
});

describe("thinning", () => {
  test.each([1, 2, 3])("a long curve stays small, keeps every spike and moves no point (seed %i)", (seed) => {
    const next = random(seed);
    const curve = new Curve();
    const sent = new Map<number, number>();
    let [step, longest] = [0, 0];
    let [least, greatest] = [Infinity, -Infinity];
    for (let count = 0; count < 60_000; count++) {
      step += 1 + Math.floor(3 * next());
      const value = next() < 1e-4 ? 1_000 * (next() - 0.5) : next();
      sent.set(step, value);
      [least, greatest] = [Math.min(least, value), Math.max(greatest, value)];
      curve.push(step, step, step, step, value);
      longest = Math.max(longest, curve.length);
    }
    expect(longest).toBe(MAX_CURVE_POINTS);
    expect(curve.length).toBeGreaterThan(MAX_CURVE_POINTS / 8);
    let [before, wrong] = [-Infinity, 0];
    const shown = new Set<number>();
    for (const [at, value] of points(curve)) {
      wrong += Number(sent.get(at) !== value || at <= before);
      before = at;
      shown.add(value);
    }
    expect(wrong).toBe(0);
    expect(shown.has(least) && shown.has(greatest)).toBe(true);
    for (const value of sent.values()) if (Math.abs(value) > 1) expect(shown.has(value)).toBe(true);
    expect(curve.last).toMatchObject({ step, value: sent.get(step) });
    expect([curve.least?.value, curve.greatest?.value]).toEqual([least, greatest]);
    expect(curve.reducedTo).toBeGreaterThan(0);
  });

  test.each([1, 2, 3])("of a thinned curve gives what thinning all points gives (seed %i)", (seed) => {
    const next = random(seed);
    const length = 5_000;
    const step = Float64Array.from({ length }, (_, index) => 3 * index + Math.floor(3 * next()));
    const value = Float64Array.from({ length }, () => Math.round(20 * next()));
    for (let level = 1; level < 10; level++) {
      const finer = extremes(step, value, length, level - 1);
      const steps = Float64Array.from(finer, (index) => step[index] as number);
      const values = Float64Array.from(finer, (index) => value[index] as number);
      const twice = extremes(steps, values, finer.length, level).map((index) => steps[index]);
      expect(twice).toEqual(extremes(step, value, length, level).map((index) => step[index]));
    }
  });

  test("a point that is gone does not come back, and no other takes its place", () => {
    const curve = new Curve(64);
    const next = random(9);
    let shown = new Set<string>();
    for (let step = 0; step < 5_000; step++) {
      curve.push(step, step, step, step, next());
      const now = new Set(points(curve).map(String));
      for (const point of now) if (!shown.has(point)) expect(point.startsWith(`${step},`)).toBe(true);
      shown = now;
    }
  });

  test("works where all points are of one step", () => {
    const curve = new Curve(64);
    for (let index = 0; index < 1_000; index++) curve.push(5, index, 0, 0, index % 10);
    expect(curve.length).toBeLessThanOrEqual(64);
    expect([curve.least?.value, curve.greatest?.value]).toEqual([0, 9]);
  });
});

test("search and nearest agree with a walk over all points", () => {
  const next = random(3);
  const curve = new Curve();
  expect(curve.nearest("step", 5)).toBe(-1);
  for (let step = 0, index = 0; index < 200; index++) curve.push((step += 1 + Math.floor(5 * next())), 0, 0, 0, 0);
  const steps = points(curve).map(([step]) => step);
  for (let count = 0; count < 500; count++) {
    const wanted = 700 * next() - 20;
    expect(curve.search("step", wanted)).toBe(steps.filter((step) => step < wanted).length);
    const distance = Math.min(...steps.map((step) => Math.abs(step - wanted)));
    expect(Math.abs((curve.step[curve.nearest("step", wanted)] as number) - wanted)).toBe(distance);
  }
});
