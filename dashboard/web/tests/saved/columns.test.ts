import { describe, expect, test } from "vitest";

import { Columns, type Layout } from "../../src/saved/columns";
import { planes } from "./blocks";

function read(layout: Layout, bytes: number[]): number[] {
  return [...new Columns(Uint8Array.from([9, 9, ...bytes]), 2, [layout]).get(0)];
}

describe("columns", () => {
  test("whole numbers have their sign in the lowest bit", () => {
    expect(read(["whole", 5, 1, false, 0, 1], [0, 1, 2, 3, 255])).toEqual([0, -1, 1, -2, -128]);
  });

  test("numbers of several bytes lie in planes", () => {
    expect(read(["whole", 2, 3, false, 0, 1], planes([2 * 70_000, 2 * 5], 3))).toEqual([70_000, 5]);
  });

  test("differences add up from the first one, and are divided at the end", () => {
    const time = 1_790_000_000_123;
    expect(read(["whole", 3, 1, true, time, 1_000], [0, 2 * 100, 2 * 1])).toEqual([
      1_790_000_000.123, 1_790_000_000.223, 1_790_000_000.224,
    ]);
  });

  test("decimals are the numbers that their digits say", () => {
    // 3 * 10**-1, 1234 * 10**-7, -5 * 10**2, and no number
    const [digits, powers] = [planes([6, 2468, 9, 0], 2), [1, 13, 4, 255]];
    expect(read(["decimal", 4, 2, false, 0, 1], [...digits, ...powers])).toEqual([0.3, 0.0001234, -500, NaN]);
  });

  test("floats are kept bit by bit", () => {
    const numbers = Float64Array.of(0.1 + 0.2, -0, NaN, 5e-324);
    const raw = new Uint8Array(numbers.buffer);
    const bytes = Array.from({ length: 32 }, (_, index) => raw[8 * (index % 4) + Math.floor(index / 4)] as number);
    expect(read(["float", 4, 8, false, 0, 1], bytes)).toEqual([...numbers]);
  });

  test("missing bytes are an error", () => {
    expect(() => read(["whole", 3, 2, false, 0, 1], [1, 2, 3])).toThrow("columns need 8 bytes, there are 5");
  });
});
