import { expect, test } from "vitest";

import { decodeLayers, LayerStore, shareOf, type OneRow } from "../../src/layers/frame";
import { isFrame } from "../../src/protocol";
import { axisOf, binAt, colouring, colours, resample, rowsAt, scaleOf, ValueAxis } from "../../src/layers/heat";
import { counterpart, list, tree } from "../../src/layers/tree";

function level(share: number): number {
  return share === 0 ? 0 : 1 + Math.round((1 - Math.log(share) / Math.log(1e-9)) * 65_534);
}

function row(minimum: number, maximum: number, shares: number[]): OneRow {
  return { step: 1, values: [NaN, NaN, NaN, 0, 1, minimum, maximum, 100], histogram: Uint16Array.from(shares.map(level)) };
}

function frame(header: object, ...parts: ArrayBufferView[]): ArrayBuffer {
  let text = JSON.stringify({ type: "layers", run: "r", kind: "weights", kinds: ["weights"], statistic: "", layer: null,
    statistics: [], names: [], layers: 2, first: 0, rows: 2, bins: 0, spacing: 0, more: false, ...header });
  while ((4 + text.length) % 8 !== 0) text += " ";
  const bytes = [...new Uint8Array(Uint32Array.of(text.length).buffer), ...new TextEncoder().encode(text)];
  for (const part of parts) bytes.push(...new Uint8Array(part.buffer));
  return Uint8Array.from(bytes).buffer;
}

test("a frame about all layers gives their rows and what is told of each", () => {
  const store = new LayerStore();
  const data = frame({ statistic: "norm", names: ["a", "b"] }, Float64Array.of(1, 2), Float32Array.of(1, 2, 3, 4),
    Float32Array.of(3, 4, 0, 0, NaN, NaN, 0.5, 0.25));
  expect(isFrame("layers", data)).toBe(true);
  expect(store.apply(decodeLayers(data))).toBe(true);
  expect(store.all.map(({ step, values }) => [step, ...values])).toEqual([[1, 1, 2], [2, 3, 4]]);
  expect([store.told(1, "norm"), store.told(1, "change")]).toEqual([4, 0.25]);
});

test("later rows take the place of those from the first one on, and an answer to an earlier question is left out", () => {
  const store = new LayerStore();
  const rows = (first: number, ...steps: number[]): boolean =>
    store.apply(decodeLayers(frame({ statistic: "norm", layers: 1, first, rows: steps.length }, Float64Array.from(steps),
      Float32Array.from(steps), new Float32Array(4))));
  expect(rows(1, 5)).toBe(false);
  rows(0, 1, 2, 3);
  rows(2, 4, 5);
  expect(store.all.map(({ step }) => step)).toEqual([1, 2, 4, 5]);
});

test("a row of one layer without elements has no histogram", () => {
  const store = new LayerStore();
  store.apply(decodeLayers(frame({ layer: "a", bins: 2 }, Float64Array.of(1, 2), new Float32Array(16), Uint16Array.of(2, 2),
    Uint16Array.of(0, 0, 1, 65_535))));
  expect(store.one.map(({ histogram }) => [...histogram])).toEqual([[], [1, 65_535]]);
  expect(shareOf(65_535)).toBe(1);
});

test("a frame of another length than its header says is refused", () => {
  expect(() => decodeLayers(frame({ statistic: "norm", rows: 1 }, Float64Array.of(1), new Float32Array(11)))).toThrow("bytes");
});

test.each([false, true])("resampling keeps all elements, and each near its value (logarithmic: %s)", (log) => {
  const rows = [row(-2, 6, [0.5, 0.25, 0, 0.25]), row(-0.001, 0.001, [0.1, 0.9]), row(3, 3, [1, 0])];
  const axis = axisOf(rows, log) as ValueAxis;
  expect([axis.min, axis.max]).toEqual([-2, 6]);
  for (const each of rows) expect(resample(each, axis).reduce((sum, share) => sum + share)).toBeCloseTo(1, 3);
  const cells = resample(rows[0] as OneRow, axis, 8);
  const low = cells.reduce((sum, share, cell) => sum + (axis.fromUnit((cell + 1) / 8) <= 0 + 1e-9 ? share : 0), 0);
  if (!log) expect(low).toBeCloseTo(0.5, 3);
  const constant = resample(rows[2] as OneRow, axis);
  expect(constant[Math.floor(axis.toUnit(3) * 96)]).toBeCloseTo(1, 3);
});

test("an axis for one value only has air, and without a histogram there is none", () => {
  expect(axisOf([row(0, 0, [1])], false)).toMatchObject({ min: -1, max: 1 });
  expect(axisOf([row(0, 0, [])], true)).toBe(null);
});

test("a symmetric logarithmic axis maps values there and back", () => {
  const axis = new ValueAxis(-10, 4, true);
  for (const value of [-10, -1, -0.001, 0, 0.002, 4]) expect(axis.fromUnit(axis.toUnit(value))).toBeCloseTo(value, 9);
});

test("a value is in the bin that has it", () => {
  const histogram = row(-1, 1, [0.25, 0.5, 0.25, 0]);
  expect(binAt(histogram, -0.25)).toMatchObject({ low: -0.5, high: 0, bin: 1 });
  expect(binAt(histogram, -0.25)?.share).toBeCloseTo(0.5, 3);
  expect(binAt(histogram, 1)).toMatchObject({ high: 1, bin: 3, share: 0 });
  expect(binAt(histogram, 1.1)).toBe(null);
});

test("colours grow lighter or darker throughout, and tell what is not finite or was not measured", () => {
  for (const dark of [true, false]) {
    const table = colours(dark);
    const light = Array.from({ length: 256 }, (_, index) => 0.3 * table[3 * index]! + 0.59 * table[3 * index + 1]! + 0.11 * table[3 * index + 2]!);
    for (let index = 1; index < 256; index++) expect((light[index]! - light[index - 1]!) * (dark ? 1 : -1)).toBeGreaterThan(-0.5);
  }
  const scale = scaleOf([{ values: Float32Array.of(0.5, 0, NaN, Infinity, 200) }], "norm");
  expect(scale).toEqual({ min: 0.5, max: 200, log: true });
  expect([0.5, 10, 200, 0, Infinity, NaN].map(colouring(scale))).toEqual([0, 128, 255, 0, 256, -1]);
  expect(colouring({ min: 7, max: 7, log: false })(7)).toBe(128);
});

test("each measurement reaches half-way to its neighbours", () => {
  expect([...rowsAt([0, 10, 30], 9).rows]).toEqual([0, 0, 1, 1, 1, 2, 2, 2, 2]);
  expect([...rowsAt([5], 2).rows]).toEqual([0, 0]);
});

test("layers are a tree by the dots of their names; a group of one takes no line, and a folded one hides its layers", () => {
  const names = ["embed.weight", "blocks.0.mlp.weight", "blocks.0.mlp.bias", "blocks.1.mlp.weight", "head"];
  const lines = tree(names, [0, 1, 2, 3, 4], new Set());
  expect(lines.map(({ level, label, place, count }) => [level, label, place, count])).toEqual([
    [1, "embed.weight", 0, 0],
    [1, "blocks", null, 3],
    [2, "0.mlp", null, 2],
    [3, "weight", 1, 0],
    [3, "bias", 2, 0],
    [2, "1.mlp.weight", 3, 0],
    [1, "head", 4, 0],
  ]);
  expect(tree(names, [0, 1, 2, 3, 4], new Set(["blocks"])).map(({ label }) => label)).toEqual(["embed.weight", "blocks", "head"]);
});

test("a list has the greatest number first, what is not finite before and what was not measured behind", () => {
  const values = [1, NaN, 5, Infinity, -Infinity, 1];
  expect(list(["a", "b", "c", "d", "e", "f"], [0, 1, 2, 3, 4, 5], (place) => values[place]!).map(({ name }) => name).join("")).toBe("decafb");
});

test("the counterpart of a layer is of its name, within its module, or its module", () => {
  expect(counterpart(["0.weight", "1"], "0.weight")).toBe("0.weight");
  expect(counterpart(["0.weight", "1"], "0")).toBe("0.weight");
  expect(counterpart(["0", "1"], "1.bias")).toBe("1");
  expect(counterpart(["0", "1"], "2.bias")).toBe(null);
});
