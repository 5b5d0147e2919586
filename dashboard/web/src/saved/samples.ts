// Texts, pictures and tables of a run in a saved page: dashboard/saved/recorded_samples.py records them.

import type { RunEvent, SampleHeader, SampleQuery } from "../protocol";

interface Answer {
  seq: number;
  picture?: number;
  media_type?: string;
  error?: string;
  event?: RunEvent;
  /** Where the content begins, and its bytes. */
  at: number;
  size: number;
}

export class SavedSamples {
  readonly #answers: Answer[];
  readonly #contents: Uint8Array;

  constructor(data: Uint8Array) {
    const length = new DataView(data.buffer, data.byteOffset).getUint32(0, true);
    this.#answers = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length))) as Answer[];
    this.#contents = data.subarray(4 + length);
  }

  /** The frame that answers a question. */
  answer({ run, query, seq, picture }: SampleQuery): ArrayBuffer {
    const answer = this.#answers.find((one) => one.seq === seq && (one.picture ?? null) === picture);
    const { at, size, media_type, event, error } = answer ?? { at: 0, size: 0, error: "this file does not have it" };
    const header: SampleHeader = { type: "sample", run, query, media_type, event, error };
    const head = new TextEncoder().encode(JSON.stringify(header));
    const frame = new Uint8Array(4 + head.length + size);
    new DataView(frame.buffer).setUint32(0, head.length, true);
    frame.set(head, 4);
    frame.set(this.#contents.subarray(at, at + size), 4 + head.length);
    return frame.buffer;
  }
}
