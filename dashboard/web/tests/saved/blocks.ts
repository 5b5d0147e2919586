// Blocks of a saved page, made as dashboard/saved makes them.

import type { Layout } from "../../src/saved/columns";
import { hello, row, rows, run, status, summary } from "../messages";

/** The bytes of numbers as planes: all lowest bytes, then the next ones. */
export function planes(numbers: number[], bytes: number): number[] {
  return Array.from({ length: bytes }, (_, plane) => numbers.map((number) => Math.floor(number / 256 ** plane) % 256)).flat();
}

/** A column of small whole numbers from 0. */
export function whole(numbers: number[]): [Layout, number[]] {
  return [["whole", numbers.length, 2, false, 0, 1], planes(numbers.map((number) => 2 * number), 2)];
}

/** A run with a curve at every one of `steps`, which is its number, and one at every second one. */
export function runBlock(key: string, steps: number[]): Uint8Array {
  const every = steps.filter((_, index) => index % 2 === 1);
  const columns = [
    whole(steps), whole(steps.map((step) => 10 * step)), whole(steps.map(() => 0)), whole(steps.map((step) => 4 * step)),
    whole(steps), whole(steps.map(() => 0)), whole(steps),
    whole(every), whole(every.map(() => 0)), whole(every),
  ];
  const info = { better: null, group: "", label: "step", tab: "metrics" };
  const head = {
    texts: [
      run({ key, name: key }),
      status({ run: key, state: "completed" }),
      { type: "series", run: key, series: [{ id: 0, key: "a", panel: "a", ...info }, { id: 1, key: "b", panel: "b", ...info }] },
      { type: "missed", run: key, count: 3 },
      { type: "milestone", run: key, event: { type: "TrainEnd", seq: 9, time: 1, step: 1 } },
      { type: "latest", run: key, values: {} },
    ],
    answers: { checkpoints: { type: "checkpoints", run: key, rows: [], verifying: [], error: "" } },
    curves: [
      { id: 0, points: steps.length, reduced: false, marks: [], rows: 4, values: 6 },
      { id: 1, points: every.length, reduced: true, marks: [[2, 2, "nan", 1]], rows: 7, values: 9 },
    ],
    gaps: [[1, 3, 1]],
    trimmed: null,
    columns: columns.map(([layout]) => layout),
  };
  const text = new TextEncoder().encode(JSON.stringify(head));
  const bytes = columns.flatMap(([, numbers]) => numbers);
  const block = new Uint8Array(4 + text.length + bytes.length);
  new DataView(block.buffer).setUint32(0, text.length, true);
  block.set(text, 4);
  block.set(bytes, 4 + text.length);
  return block;
}

/** What the file says about its runs, of which the last one is the newest. */
export function listBlock(keys: string[]): Uint8Array {
  const saved = {
    hello: hello({ role: "read_only", runs: keys.map((key) => summary({ key, name: key })), run: keys.at(-1) ?? null, saved: 5 }),
    rows: rows(keys.map((key) => row(key))),
  };
  return new TextEncoder().encode(JSON.stringify(saved));
}

/** A picture at `seq` 4, and a table at `seq` 5 with one picture. */
export function samplesBlock(): Uint8Array {
  const answers = [
    { seq: 4, at: 0, size: 3, media_type: "image/png", event: { type: "PictureSample", key: "p", seq: 4 } },
    { seq: 5, at: 3, size: 0, event: { type: "TableSample", key: "t", seq: 5 } },
    { seq: 5, at: 3, size: 2, picture: 0, media_type: "image/webp" },
  ];
  const head = new TextEncoder().encode(JSON.stringify(answers));
  const block = new Uint8Array(4 + head.length + 5);
  new DataView(block.buffer).setUint32(0, head.length, true);
  block.set(head, 4);
  block.set([1, 2, 3, 4, 5], 4 + head.length);
  return block;
}
