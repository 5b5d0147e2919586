// Samples: which of them are shown at a step, and which contents are asked for.

import { expect, test, vi } from "vitest";
import { decodeSample, isFrame, type SampleEntry, type SampleQuery } from "../src/protocol";
import { Contents, type Content } from "../src/samples/contents";
import { compare } from "../src/samples/sample";
import { SampleStore, type Entry } from "../src/samples/store";

function entry(seq: number, step: number, key = "code"): SampleEntry {
  return [seq, key, "text", step, 0, 1_000 + seq];
}

function store(runs: Record<string, SampleEntry[]>): SampleStore {
  const made = new SampleStore();
  for (const [run, samples] of Object.entries(runs)) made.add({ type: "samples", run, samples });
  return made;
}

function frame(header: Record<string, unknown>, content = ""): ArrayBuffer {
  const [head, body] = [header, content].map((part) => new TextEncoder().encode(typeof part === "string" ? part : JSON.stringify({ type: "sample", ...part })));
  const data = new Uint8Array(4 + (head as Uint8Array).length + (body as Uint8Array).length);
  new DataView(data.buffer).setUint32(0, (head as Uint8Array).length, true);
  data.set(head as Uint8Array, 4);
  data.set(body as Uint8Array, 4 + (head as Uint8Array).length);
  return data.buffer;
}

test("a run shows what it had at a step, or at the last one before it", () => {
  const samples = store({ a: [entry(1, 10), entry(2, 20), entry(3, 20)], b: [entry(7, 15)] });
  const seqs = (run: string, step: number): number[] | undefined => samples.at(run, "code", step)?.entries.map(({ seq }) => seq);
  expect(samples.steps(["a", "b"], "code")).toEqual([10, 15, 20]);
  expect(seqs("a", 9)).toBeUndefined();
  expect(seqs("a", 15)).toEqual([1]);
  expect(seqs("a", 25)).toEqual([2, 3]);
  expect(seqs("b", 20)).toEqual([7]);
  expect(seqs("c", 20)).toBeUndefined();
});

test("samples that come out of their order are put into it", () => {
  const samples = store({ a: [entry(1, 10), entry(2, 30), entry(3, 20), entry(4, 10)] });
  expect(samples.steps(["a"], "code")).toEqual([10, 20, 30]);
  expect(samples.at("a", "code", 10)?.entries.map(({ seq }) => seq)).toEqual([1, 4]);
});

test("keys are those of the runs on the screen, and a run that begins anew has none", () => {
  const samples = store({ a: [entry(1, 1, "z"), entry(2, 1, "__proto__")], b: [entry(1, 1, "c")] });
  expect(samples.keys(["a", "b"])).toEqual(["__proto__", "c", "z"]);
  expect(samples.keys(["b"])).toEqual(["c"]);
  samples.begin("b");
  expect(samples.has(["b"])).toBe(false);
});

test("a frame is taken apart, and a chart is none", () => {
  const { header, content } = decodeSample(frame({ run: "a", query: 3 }, "text"));
  expect([header.query, new TextDecoder().decode(content)]).toEqual([3, "text"]);
  expect(isFrame("sample", frame({ run: "a", query: 3 }))).toBe(true);
  expect(isFrame("sample", new ArrayBuffer(3))).toBe(false);
  expect(isFrame("sample", new TextEncoder().encode('\0\0\0\0{"type":"chart","run":"a"}').buffer)).toBe(false);
  expect(() => decodeSample(new Uint8Array([255, 0, 0, 0, 1]).buffer)).toThrow("cut off");
});

class Asked {
  readonly sent: SampleQuery[] = [];
  readonly answers: Content[] = [];
  isOpen = true;
  readonly contents = new Contents((message) => {
    if (this.isOpen) this.sent.push(message as SampleQuery);
    return this.isOpen;
  });

  ask(seq: number, wanted = true, run = "a"): void {
    const entry: Entry = { run, seq, kind: "text", step: 1, epoch: 0, time: 1 };
    this.contents.ask({ entry, picture: null, wanted: () => wanted, answer: (content) => this.answers.push(content) });
  }

  get seqs(): number[] {
    return this.sent.map(({ seq }) => seq);
  }
}

test("parts of an answer are put together, and it is kept", async () => {
  const asked = new Asked();
  asked.ask(1);
  asked.contents.take(frame({ run: "a", query: 1, more: true, media_type: "text/plain", event: { type: "TextSample" } }, "ab"));
  expect(asked.answers).toEqual([]);
  asked.contents.take(frame({ run: "a", query: 1, media_type: "text/plain" }, "cd"));
  expect(await asked.answers[0]?.blob.text()).toBe("abcd");
  expect(asked.answers[0]?.event?.type).toBe("TextSample");
  asked.ask(1);
  expect([asked.sent.length, asked.answers.length]).toEqual([1, 2]);
});

test("an error is told and not kept", () => {
  const asked = new Asked();
  asked.ask(1);
  asked.contents.take(frame({ run: "a", query: 1, error: "gone" }));
  expect(asked.answers[0]?.error).toBe("gone");
  asked.ask(1);
  expect(asked.seqs).toEqual([1, 1]);
});

test("few questions are open at a time, the newest first, and none that nobody waits for", () => {
  const asked = new Asked();
  for (let seq = 1; seq <= 8; seq++) asked.ask(seq);
  asked.ask(9);
  asked.ask(10, false);
  asked.ask(11);
  expect(asked.seqs).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
  for (const query of [1, 2, 3]) asked.contents.take(frame({ run: "a", query }));
  expect(asked.seqs.slice(8)).toEqual([11, 9]);
});

test("what a lost connection has not answered is asked again", () => {
  const asked = new Asked();
  asked.ask(1);
  asked.isOpen = false;
  asked.contents.connected();
  asked.ask(2);
  asked.isOpen = true;
  asked.contents.connected();
  expect(asked.seqs.sort()).toEqual([1, 1, 2]);
});

test("a run that leaves the screen takes no places", () => {
  const asked = new Asked();
  for (let seq = 1; seq <= 8; seq++) asked.ask(seq, true, "b");
  asked.ask(1);
  expect(asked.sent.at(-1)?.run).toBe("b");
  asked.contents.keep(["a"]);
  asked.ask(2);
  expect(asked.sent.slice(8).map(({ run }) => run)).toEqual(["a", "a"]);
});

test("only pictures get an address, whatever the server calls a content", () => {
  const made = vi.spyOn(URL, "createObjectURL").mockReturnValue("blob:x");
  const asked = new Asked();
  for (const [query, media_type] of [[1, "image/svg+xml"], [2, "text/html"], [3, "image/png"]] as const) {
    asked.ask(query);
    asked.contents.take(frame({ run: "a", query, media_type }, "<svg>"));
  }
  expect(asked.answers.map(({ url, blob }) => [url, blob.type])).toEqual([["", "text/plain"], ["", "text/plain"], ["blob:x", "image/png"]]);
  expect(made).toHaveBeenCalledTimes(1);
});

test("contents that take too much are let go of, the oldest first", () => {
  vi.spyOn(URL, "createObjectURL").mockReturnValue("blob:x");
  const revoked = vi.spyOn(URL, "revokeObjectURL").mockReturnValue(undefined);
  const asked = new Asked();
  const large = "x".repeat(30 * 1024 * 1024);
  for (const query of [1, 2, 3]) {
    asked.ask(query);
    asked.contents.take(frame({ run: "a", query, media_type: "image/png" }, large));
  }
  expect(revoked).toHaveBeenCalledTimes(1);
  asked.ask(2);
  asked.ask(1);
  expect(asked.seqs).toEqual([1, 2, 3, 1]);
});

test("cells sort by value, by words, and nothing at the end", () => {
  const cells = ["b", null, 10, 9, "a", true, -1];
  expect([...cells].sort((a, b) => compare(a, b))).toEqual([-1, 9, 10, "a", "b", true, null]);
  expect([...cells].sort((a, b) => compare(a, b, -1))).toEqual([true, "b", "a", 10, 9, -1, null]);
});
