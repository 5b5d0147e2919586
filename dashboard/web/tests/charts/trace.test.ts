import { describe, expect, test } from "vitest";

import { Scale } from "../../src/charts/axes";
import { Curve } from "../../src/charts/series_store";
import { edges, extent, inside, trace, type View, visible } from "../../src/charts/trace";

const BOX = { left: 0, top: 0, width: 100, height: 100 };
const NOTHING = new Float64Array(0);

function curve(points: [number, number][]): Curve {
  const made = new Curve();
  for (const [step, value] of points) made.push(step, 1_000 + step, step / 10, 4 * step, value);
  return made;
}

function view(rest: Partial<View> = {}): View {
  return { box: BOX, x: new Scale(0, 100), y: new Scale(0, 100), column: "step", origin: 0, ...rest };
}

/** The lines that are drawn, each as its points. */
function lines(drawn: Curve, seen = view(), breaks = NOTHING): { paths: [number, number][][]; lonely: number[] } {
  const paths: [number, number][][] = [];
  const pen = {
    moveTo: (x: number, y: number) => void paths.push([[x, y]]),
    lineTo: (x: number, y: number) => void paths.at(-1)?.push([x, y]),
  };
  const { lonely } = trace(pen, drawn, drawn.value, visible(drawn, seen), breaks, seen);
  return { paths, lonely };
}

test("a line goes through its points, upwards for more", () => {
  expect(lines(curve([[0, 0], [50, 25], [100, 100]])).paths).toEqual([[[0, 100], [50, 75], [100, 0]]]);
});

test("of many points in one column of pixels the first, least, greatest and last are drawn", () => {
  const points: [number, number][] = [[10, 50], [20.1, 40], [20.2, 90], [20.3, 60], [20.4, 5], [20.5, 30], [30, 50]];
  const [path] = lines(curve(points)).paths;
  expect(path?.map(([, y]) => 100 - y)).toEqual([50, 40, 90, 5, 30, 50]);
});

test("no spike is lost, wherever it is", () => {
  for (let spike = 0; spike < 5_000; spike += 7) {
    const drawn = curve(Array.from({ length: 5_000 }, (_, index) => [index / 50, index === spike ? 99 : 1]));
    expect(Math.min(...lines(drawn).paths.flat().map(([, y]) => y))).toBeCloseTo(1);
    spike += 600;
  }
});

describe("a line ends", () => {
  test("at a break, and goes on behind it", () => {
    const { paths } = lines(curve([[10, 1], [20, 1], [30, 1], [40, 1]]), view(), Float64Array.of(20, 30));
    expect(paths.map((path) => path.map(([x]) => x))).toEqual([[10, 20], [30, 40]]);
  });

  test("at a break of a single step between two points", () => {
    const { paths } = lines(curve([[10, 1], [12, 1]]), view(), Float64Array.of(11, 11));
    expect(paths).toHaveLength(2);
  });

  test("also where the break is inside one column of pixels", () => {
    const { paths } = lines(curve([[10.1, 1], [10.2, 2], [10.6, 3], [10.8, 4]]), view(), Float64Array.of(10.3, 10.5));
    expect(paths).toHaveLength(2);
  });

  test("but not at breaks elsewhere", () => {
    const { paths } = lines(curve([[10, 1], [20, 1], [30, 1]]), view(), Float64Array.of(0, 10, 30, 50));
    expect(paths).toHaveLength(1);
  });

  test("where a logarithmic axis has no place for a value", () => {
    const { paths } = lines(curve([[1, 1], [2, 1], [3, 0], [4, 1], [5, 1]]), view({ y: new Scale(0.1, 10, true) }));
    expect(paths.map((path) => path.length)).toEqual([2, 2]);
  });
});

test("a point without a line is lonely", () => {
  expect(lines(curve([[50, 50]])).lonely).toEqual([50, 50]);
  expect(lines(curve([[10, 1], [20, 50], [30, 1]]), view(), Float64Array.of(10, 20, 20, 30)).lonely).toEqual([10, 99, 20, 50, 30, 99]);
  expect(lines(curve([[10, 1], [20, 1]])).lonely).toEqual([]);
});

test("x may be epochs, or the time since the start", () => {
  expect(lines(curve([[100, 0], [200, 0]]), view({ column: "epoch" })).paths).toEqual([[[10, 100], [20, 100]]]);
  expect(lines(curve([[10, 0], [20, 0]]), view({ column: "time", origin: 1_000 })).paths).toEqual([[[10, 100], [20, 100]]]);
});

test("one point at either side of the view is drawn, for the line that leaves it", () => {
  const drawn = curve(Array.from({ length: 11 }, (_, index) => [10 * index, 0]));
  expect(visible(drawn, view({ x: new Scale(25, 55) }))).toEqual([2, 7]);
  expect(visible(drawn, view({ x: new Scale(-50, 500) }))).toEqual([0, 11]);
  expect(visible(drawn, view({ x: new Scale(200, 300) }))).toEqual([10, 11]);
  expect(visible(curve([]), view())).toEqual([0, 0]);
});

test("what is in view, and where the line crosses its edges", () => {
  const drawn = curve([[0, 0], [10, 100], [20, 0], [30, 50]]);
  const seen = view({ x: new Scale(5, 25) });
  expect(inside(drawn, seen)).toEqual([1, 3]);
  expect(edges(drawn, seen)).toEqual([50, 25]);
  expect(edges(drawn, view({ x: new Scale(2, 4) }))).toEqual([20, 40]);
  expect(edges(drawn, view({ x: new Scale(-5, 50) }))).toEqual([]);
  expect(edges(curve([]), view())).toEqual([]);
});

test("very large values are drawn towards where they are, within what a canvas can hold", () => {
  const [path] = lines(curve([[0, 0], [1, 1e300]])).paths;
  expect(path?.every(([x, y]) => Math.abs(x) <= 2e5 && Math.abs(y) <= 2e5)).toBe(true);
});

test("the extent of values, with and without those that a logarithm has no place for", () => {
  const values = Float64Array.of(5, -1, 3, 0, 9);
  expect(extent(values, [0, 4], false, [Infinity, -Infinity])).toEqual([-1, 5]);
  expect(extent(values, [0, 4], true, [Infinity, -Infinity])).toEqual([3, 5]);
  expect(extent(values, [4, 5], true, [1, 2])).toEqual([1, 9]);
});
