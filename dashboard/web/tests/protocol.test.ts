import { describe, expect, test } from "vitest";
import { decodeChart, decodeText, toNumber } from "../src/protocol";

/** What `encode_chart` of dashboard/curves/chart_frame.py makes of three rows, a dense curve with a NaN and a sparse one. */
const FRAME =
  "BAEAAHsidHlwZSI6ImNoYXJ0IiwicnVuIjoiciIsImtpbmQiOiJkZWx0YSIsInF1ZXJ5IjpudWxsLCJtb3JlIjpmYWxzZSwicm93" +
  "cyI6Mywic2VyaWVzIjpbeyJpZCI6NCwicG9pbnRzIjozLCJkZW5zZSI6dHJ1ZSwicmVkdWNlZCI6ZmFsc2UsIm1hcmtzIjpbWzIu" +
  "MCwyLjAsIm5hbiIsMV1dfSx7ImlkIjo5LCJwb2ludHMiOjEsImRlbnNlIjpmYWxzZSwicmVkdWNlZCI6dHJ1ZSwibWFya3MiOltd" +
  "fV0sImdhcHMiOltbMy4wLDcuMCwzXV0sInRyaW1tZWQiOjEuMH0gAAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAJUAAAAAA" +
  "AAAmQAAAAAAAAChAAAAAAAAAAAAAAAAAAADgPwAAAAAAAPA/AAAAAAAA0D8AAAAAAAD4fwAAAAAAAMA/AAAAAAAAIEACAAAA";

/** As above, with the samples seen. */
const WITH_SAMPLES =
  "vAAAAHsidHlwZSI6ImNoYXJ0IiwicnVuIjoiciIsImtpbmQiOiJkZWx0YSIsInF1ZXJ5IjpudWxsLCJtb3JlIjpmYWxzZSwicm93cyI6" +
  "Miwic2FtcGxlcyI6dHJ1ZSwic2VyaWVzIjpbeyJpZCI6MCwicG9pbnRzIjoxLCJkZW5zZSI6ZmFsc2UsInJlZHVjZWQiOmZhbHNlLCJt" +
  "YXJrcyI6W119XSwiZ2FwcyI6W10sInRyaW1tZWQiOm51bGx9AAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEAAAAAAAAAAAAAA" +
  "AAAAAOA/AAAAAAAAIEAAAAAAAAAwQAAAAAAAAOA/AQAAAA==";

function bytes(base64: string): ArrayBuffer {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer;
}

describe("a chart frame", () => {
  test("is taken apart as the server has put it together", () => {
    const frame = decodeChart(bytes(FRAME));
    expect(frame.header).toEqual({
      type: "chart", run: "r", kind: "delta", query: null, more: false, rows: 3, trimmed: 1,
      series: [
        { id: 4, points: 3, dense: true, reduced: false, marks: [[2, 2, "nan", 1]] },
        { id: 9, points: 1, dense: false, reduced: true, marks: [] },
      ],
      gaps: [[3, 7, 3]],
    });
    expect([...frame.step]).toEqual([1, 2, 3]);
    expect([...frame.time]).toEqual([10.5, 11, 12]);
    expect([...frame.epoch]).toEqual([0, 0.5, 1]);
    expect(frame.values.map((column) => [...column])).toEqual([[0.25, NaN, 0.125], [8]]);
    expect(frame.indices.map((column) => [...column])).toEqual([[0, 1, 2], [2]]);
  });

  test("has the samples seen where they were asked for", () => {
    const frame = decodeChart(bytes(WITH_SAMPLES));
    expect([[...frame.epoch], [...frame.samples], [...(frame.values[0] ?? [])]]).toEqual([[0, 0.5], [8, 16], [0.5]]);
    expect([...decodeChart(bytes(FRAME)).samples]).toEqual([0, 0, 0]);
  });

  test.each([
    ["nothing", 0],
    ["a cut header", 20],
    ["a missing column", -4],
  ])("with %s is refused", (_, end) => {
    expect(() => decodeChart(bytes(FRAME).slice(0, end))).toThrow(/chart frame/);
  });
});

test("a text message of a kind that is not known is left alone, what is no message is an error", () => {
  expect(decodeText('{"type":"bye","reason":"over"}')).toEqual({ type: "bye", reason: "over" });
  expect(decodeText('{"type":"weather","reason":"rain"}')).toBeNull();
  expect(decodeText('{"type":"toString"}')).toBeNull();
  expect(() => decodeText("[1]")).toThrow(/no message/);
});

test("numbers that JSON has no word for come back", () => {
  expect([toNumber("NaN"), toNumber("Infinity"), toNumber("-Infinity"), toNumber(0.5), toNumber(null)]).toEqual([
    NaN, Infinity, -Infinity, 0.5, null,
  ]);
});
