// The server of a saved page answers as a live one does: compare dashboard/viewers/viewer.py.

import { beforeEach, describe, expect, test } from "vitest";

import { CLOSE_DAMAGED, decodeChart, decodeSample, isFrame, type ChartFrame, type RangeQuery, type ViewerMessage } from "../../src/protocol";
import { inflate, SavedServer } from "../../src/saved/server";
import { listBlock, runBlock, samplesBlock } from "./blocks";

const STEPS = [1, 2, 3, 4, 5, 6];
let blocks: Record<string, Uint8Array>;
let asked: string[];
let server: SavedServer;
let texts: { type: string; [field: string]: unknown }[];
let frames: ChartFrame[];
let samples: ReturnType<typeof decodeSample>[];
let closed: { code: number; reason: string }[];

beforeEach(() => {
  blocks = { saved: listBlock(["old", "mid", "new"]) };
  ["old", "mid", "new"].forEach((key, number) => (blocks[`saved-${number}`] = runBlock(key, STEPS)));
  [asked, texts, frames, samples, closed] = [[], [], [], [], []];
  server = new SavedServer((name) => {
    asked.push(name);
    const block = blocks[name];
    return block ? Promise.resolve(block) : Promise.reject(new Error(`there is no ${name}`));
  });
  server.onmessage = ({ data }) => {
    if (data instanceof ArrayBuffer && isFrame("sample", data)) samples.push(decodeSample(data));
    else if (data instanceof ArrayBuffer) frames.push(decodeChart(data));
    else texts.push(JSON.parse(String(data)));
  };
  server.onclose = (event) => closed.push(event);
});

/** Send messages, and return the kinds of the answers. */
async function said(...messages: ViewerMessage[]): Promise<string[]> {
  texts = [];
  for (const message of messages) server.send(JSON.stringify(message));
  // Answers come in turn, so nothing comes behind this one.
  await new Promise<void>((resolve) => {
    const { onmessage } = server;
    server.onmessage = (event) => {
      if (String(event.data).includes('"pong"')) resolve();
      else onmessage?.(event);
    };
    server.send(JSON.stringify({ type: "ping", sent: 1 }));
    const { onclose } = server;
    server.onclose = (event) => {
      onclose?.(event);
      resolve();
    };
  });
  return texts.map(({ type }) => type);
}

function hi(run: string | null = null, only = false): ViewerMessage {
  return { type: "hi", protocol: 1, run, only, server: null, after: -1, keys: [] };
}

const RUN = ["run", "status", "series", "missed", "milestone", "latest"];
const show = (run: string, series: number[]): ViewerMessage => ({ type: "show", run, series, points: 400, samples: true });

describe("the server of a saved page", () => {
  test("opens by itself", async () => {
    const opened = new SavedServer(() => Promise.reject(new Error("nothing is read yet")));
    await new Promise<void>((resolve) => (opened.onopen = resolve));
  });

  test("greets with the newest run, by the clock of the viewer", async () => {
    expect(await said(hi())).toEqual(["hello", ...RUN]);
    expect(texts[0]).toMatchObject({ run: "new", saved: 5, role: "read_only" });
    expect(texts[0]?.time).toBeGreaterThan(1.7e9);
    expect(texts[1]).toMatchObject({ key: "new" });
    // What nobody looks at is not unpacked.
    expect(asked).toEqual(["saved", "saved-2"]);
  });

  test("greets with the run that is asked for", async () => {
    await said(hi("old", true));
    expect(texts[1]).toMatchObject({ type: "run", key: "old" });
  });

  test("a run that the file does not have", async () => {
    expect(await said(hi("gone", true))).toEqual(["hello"]);
    expect(texts[0]).toMatchObject({ run: null });
    expect(await said({ type: "watch", run: "gone" })).toEqual(["runs"]);
    // Any will do
    expect(await said(hi("gone", false))).toEqual(["hello", ...RUN]);
  });

  test("lists its runs", async () => {
    await said(hi());
    expect(await said({ type: "list", on: true })).toEqual(["rows"]);
    expect((texts[0]?.rows as { key: string }[]).map(({ key }) => key)).toEqual(["old", "mid", "new"]);
    expect(await said({ type: "list", on: false })).toEqual([]);
  });

  test("lists the checkpoints of a run", async () => {
    await said(hi());
    expect(await said({ type: "checkpoints", run: "old" })).toEqual(["checkpoints"]);
    expect(texts[0]).toMatchObject({ run: "old", rows: [] });
    expect(await said({ type: "checkpoints", run: "gone" })).toEqual([]);
  });

  test("changes to another run", async () => {
    await said(hi());
    expect(await said({ type: "watch", run: "old" })).toEqual(RUN);
    await said(show("new", [0]), show("old", [0]));
    expect(frames.map(({ header }) => header.run)).toEqual(["old"]);
  });

  test("runs laid over the watched one come once, and without events", async () => {
    await said(hi());
    expect(await said({ type: "overlay", runs: ["old", "new", "gone"] })).toEqual(["run", "status", "series", "latest"]);
    expect(texts[0]).toMatchObject({ key: "old", overlaid: true });
    expect(await said({ type: "overlay", runs: ["old", "mid"] })).toEqual(["run", "status", "series", "latest"]);
    expect(texts[0]).toMatchObject({ key: "mid" });
    await said({ type: "overlay", runs: ["mid"] }, show("old", [0]), show("mid", [0]));
    expect(frames.map(({ header }) => header.run)).toEqual(["mid"]);
  });

  test("a frame has the points of the curves that are shown", async () => {
    await said(hi(), show("new", [0, 1]));
    const [frame] = frames as [ChartFrame];
    expect(frame.header).toMatchObject({ kind: "snapshot", run: "new", samples: true, more: false, gaps: [[1, 3, 1]] });
    const points = frame.header.series.map(({ id }, position) => [
      id,
      [...(frame.indices[position] as Uint32Array)].map((place, index) => [
        frame.step[place], frame.time[place], frame.samples[place], frame.values[position]?.[index],
      ]),
    ]);
    expect(points).toEqual([
      [0, STEPS.map((step) => [step, 10 * step, 4 * step, step])],
      [1, [2, 4, 6].map((step) => [step, 10 * step, 4 * step, step])],
    ]);
    expect(frame.header.series.map(({ reduced, marks }) => [reduced, marks.length])).toEqual([[false, 0], [true, 1]]);
  });

  test("frames come one at a time, when the one before is drawn", async () => {
    await said(hi(), { type: "overlay", runs: ["old"] }, show("new", [0]), show("old", [0]));
    expect(frames.length).toBe(1);
    await said({ type: "drawn" });
    expect(frames.map(({ header }) => header.run)).toEqual(["new", "old"]);
    await said({ type: "drawn" }, { type: "drawn" });
    expect(frames.length).toBe(2);
  });

  test("a curve comes again when it was not shown in between", async () => {
    await said(hi(), show("new", [0]), { type: "drawn" }, show("new", [0, 1]), { type: "drawn" });
    expect(frames.map(({ header }) => header.series.map(({ id }) => id))).toEqual([[0], [1]]);
    await said(show("new", []), show("new", [0]));
    expect(frames.at(-1)?.header.series.map(({ id }) => id)).toEqual([0]);
  });

  test("a part has its neighbours on either side, unless all points are asked for", async () => {
    await said(hi());
    const part: RangeQuery = { type: "range", query: 7, series: [0], start: 3, end: 4, axis: "step", run: "new" };
    await said({ ...part, points: 400 }, { type: "drawn" }, { ...part, points: 0 }, { type: "drawn" });
    await said({ ...part, axis: "time", start: 25, end: 35, points: 0 });
    expect(frames.map(({ header, step }) => [header.kind, header.query, [...step]])).toEqual([
      ["range", 7, [2, 3, 4, 5]],
      ["range", 7, [3, 4]],
      ["range", 7, [3]],
    ]);
  });

  test("a part without points is an answer, too", async () => {
    await said(hi(), { type: "range", query: 1, series: [0], start: 90, end: 99, points: 0 });
    expect(frames.map(({ header, step }) => [header.query, step.length])).toEqual([[1, 0]]);
  });

  test("samples take turns with chart frames", async () => {
    blocks["saved-2-samples"] = samplesBlock();
    const ask = (seq: number, picture: number | null = null): ViewerMessage => ({ type: "sample", query: 10 * seq, run: "new", seq, picture });
    await said(hi(), ask(4), ask(5), show("new", [0]));
    expect([samples.length, frames.length]).toEqual([1, 0]);
    await said({ type: "drawn" }, { type: "drawn" }, { type: "drawn" }, ask(5, 0), { type: "drawn" }, ask(6));
    expect(frames.length).toBe(1);
    expect(samples.map(({ header: { query, media_type, event, error } }) => [query, media_type, event?.type, error])).toEqual([
      [40, "image/png", "PictureSample", undefined],
      [50, undefined, "TableSample", undefined],
      [50, "image/webp", undefined, undefined],
      [60, undefined, undefined, "this file does not have it"],
    ]);
    expect(samples.map(({ content }) => [...new Uint8Array(content)])).toEqual([[1, 2, 3], [], [4, 5], []]);
  });

  test("a file that is not whole closes the connection for good", async () => {
    blocks = {};
    await said(hi());
    expect(closed).toEqual([{ code: CLOSE_DAMAGED, reason: "Error: there is no saved" }]);
  });
});

test("blocks are inflated", async () => {
  const packed = Uint8Array.from(atob("eJzLSM3JyQcABiwCFQ=="), (character) => character.charCodeAt(0));
  expect(new TextDecoder().decode(await inflate(packed))).toBe("hello");
  await expect(inflate(packed.slice(0, 8))).rejects.toThrow();
});
