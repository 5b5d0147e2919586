import { describe, expect, test } from "vitest";

import { CSV_STEPS, csvLine, csvRows, type CsvRun, readCsv } from "../../src/charts/export";
import { type Answer, NoAnswer, type Part, Ranges } from "../../src/charts/ranges";
import type { ChartFrame, Gap, NonFinite, RangeQuery, SeriesInfo } from "../../src/protocol";

function part(points: [number, number][], marks: NonFinite[] = []): Part {
  return {
    step: points.map(([step]) => step),
    time: points.map(([step]) => 1_000 + step),
    epoch: points.map(([step]) => step / 10),
    samples: points.map(([step]) => 8 * step),
    value: points.map(([, value]) => value),
    ...{ marks, reduced: false },
  };
}

function answer(parts: Part[], gaps: Gap[] = []): Answer {
  return { parts: new Map(parts.map((one, id) => [id, one])), gaps };
}

describe("a line of CSV", () => {
  test.each(["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\tx", "=HYPERLINK(\"http://x\")"])("%j is no formula any more", (cell) => {
    expect(csvLine([cell])).toBe(`"'${cell.replaceAll('"', '""')}"\r\n`);
  });

  test("numbers stay numbers", () => {
    expect(csvLine(["-0.5", "1e-7", "-1e+30", "-inf"])).toBe("-0.5,1e-7,-1e+30,-inf\r\n");
  });

  test("commas, quotes and line ends are quoted", () => {
    expect(csvLine(["a,b", 'say "x"', "two\nlines"])).toBe('"a,b","say ""x""","two\nlines"\r\n');
  });
});

describe("rows", () => {
  test("points of several curves at one place share a row", () => {
    const rows = csvRows(answer([part([[1, 0.5], [2, 0.25]]), part([[2, 7]])]), [0, 1]);
    expect(rows).toBe("1,0.1,1001,0.5,,\r\n2,0.2,1002,0.25,7,\r\n");
  });

  test("two points of a curve at one place are two rows", () => {
    expect(csvRows(answer([part([[1, 5], [1, 6]])]), [0])).toBe("1,0.1,1001,5,\r\n1,0.1,1001,6,\r\n");
  });

  test("what is not finite says which kind it was", () => {
    const marks: NonFinite[] = [[2, 2, "-inf", 1], [3, 4, "mixed", 2]];
    const rows = csvRows(answer([part([[1, 1], [2, NaN], [3, NaN]], marks)]), [0]);
    expect(rows.split("\r\n").map((row) => row.split(",")[3])).toEqual(["1", "-inf", "nan", undefined]);
  });

  test("a gap is a row with its name, once", () => {
    const told = new Set<number>();
    const rows = csvRows(answer([part([[1, 1], [9, 2]])], [[1, 9, 7]]), [0], told);
    expect(rows.split("\r\n")[1]).toBe(",,,,gap: 7 samples dropped after step 1 and before step 9");
    expect(csvRows(answer([part([])], [[1, 9, 7]]), [0], told)).toBe("");
  });
});

/** A server that has a point at every step up to `last` and answers in frames of 1,000. */
function serve(last: number): { ranges: Ranges; asked: RangeQuery[] } {
  const asked: RangeQuery[] = [];
  const ranges: Ranges = new Ranges((query) => {
    asked.push(query);
    queueMicrotask(() => {
      const [first, end] = [Math.max(0, Math.ceil(query.start)), Math.min(last, Math.floor(query.end))];
      for (let from = first; from <= Math.max(first, end); from += 1_000) {
        const steps = Float64Array.from({ length: Math.max(0, Math.min(1_000, end - from + 1)) }, (_, index) => from + index);
        ranges.take(frame(query, steps, from + 1_000 <= end));
      }
    });
  });
  return { ranges, asked };
}

function frame(query: RangeQuery, steps: Float64Array, more: boolean): ChartFrame {
  const column = { id: 3, points: steps.length, dense: true, reduced: false, marks: [] };
  return {
    header: {
      ...{ type: "chart", run: "r", kind: "range", query: query.query, more, rows: steps.length },
      ...{ series: [column], gaps: [], trimmed: null },
    },
    ...{ step: steps, time: steps, epoch: steps, samples: steps, values: [steps.map((step) => 2 * step)] },
    indices: [Uint32Array.from(steps.keys())],
  };
}

const SERIES: SeriesInfo = { id: 3, key: "=loss", panel: "loss", group: "", label: "train", tab: "metrics", better: "min" };

const csvRun = (ranges: Ranges, lastStep: number, name = "r", series = [SERIES]): CsvRun => ({
  name, series, lastStep, ask: (question) => ranges.ask(question),
});

describe("a whole file", () => {
  test("has every point once and in order, asked for piece by piece", async () => {
    const last = 2 * CSV_STEPS + 123;
    const { ranges, asked } = serve(last);
    const text = await (await readCsv([csvRun(ranges, last)])).text();
    const [head, ...rows] = text.trimEnd().split("\r\n");
    expect(head).toBe(`step,epoch,time,"'=loss",note`);
    expect(rows.map((row) => Number(row.split(",")[0]))).toEqual(Array.from({ length: last + 1 }, (_, step) => step));
    expect(rows.every((row) => Number(row.split(",")[3]) === 2 * Number(row.split(",")[0]))).toBe(true);
    expect(asked.map(({ points, series }) => [points, ...series])).toEqual([[0, 3], [0, 3], [0, 3]]);
  });

  test("has also what came after the last step that was known", async () => {
    const { ranges } = serve(50);
    const text = await (await readCsv([csvRun(ranges, 10)])).text();
    expect(text.trimEnd().split("\r\n")).toHaveLength(52);
  });

  test("of several runs names them, and leaves empty what one of them lacks", async () => {
    const { ranges } = serve(1);
    const other = { ...SERIES, key: "other" };
    const text = await (await readCsv([csvRun(ranges, 1, "a"), csvRun(ranges, 1, "b", [other])])).text();
    expect(text).toBe(
      [`run,step,epoch,time,"'=loss",other,note`, "a,0,0,0,0,,", "a,1,1,1,2,,", "b,0,0,0,,0,", "b,1,1,1,,2,", ""].join("\r\n"),
    );
  });

  test("is given up when the connection goes", async () => {
    const ranges = new Ranges(() => {});
    const file = readCsv([csvRun(ranges, 10)]);
    ranges.abandon("the connection was lost");
    await expect(file).rejects.toThrow(NoAnswer);
  });
});

test("frames that nobody asked for, or no longer waits for, are let go", () => {
  const ranges = new Ranges(() => {});
  const query: RangeQuery = { type: "range", query: 99, series: [3], start: 0, end: 1 };
  expect(() => ranges.take(frame(query, Float64Array.of(1), false))).not.toThrow();
});
