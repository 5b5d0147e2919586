// The server of a saved page: it stands in the page's own file, in the place of a websocket, and says what was
// recorded. dashboard/saved/saved_page.py writes the file.
//
//     connection.ts ── hi, watch, show ──> SavedServer ── block("saved-3") ──> text in the file, unpacked when asked for

import type { Socket } from "../connection";
import { CLOSE_DAMAGED, type Hello, type Rows, type ServerMessage, type ViewerMessage } from "../protocol";
import { SavedRun } from "./run";
import { SavedSamples } from "./samples";

interface Saved {
  hello: Hello;
  rows: Rows;
}

/** Returns a block of the file; rejects where it is not whole. */
export type ReadBlock = (name: string) => Promise<Uint8Array>;

export class SavedServer implements Socket {
  binaryType = "";
  onopen: (() => void) | null = null;
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onclose: ((event: { code: number; reason: string }) => void) | null = null;
  readonly #read: ReadBlock;
  readonly #runs = new Map<string, Promise<SavedRun>>();
  readonly #samples = new Map<string, Promise<SavedSamples>>();
  #saved: Saved | null = null;
  #watched: string | null = null;
  /** By run, watched or laid over: the curves on the screen, and those of them that are to be sent. */
  readonly #shown = new Map<string, { shown: number[]; due: number[] }>();
  readonly #answers: (() => ArrayBuffer)[] = [];
  #credit = true;
  /** What came before is answered. */
  #turn: Promise<void>;

  constructor(read: ReadBlock) {
    this.#read = read;
    this.#turn = Promise.resolve().then(() => this.onopen?.());
  }

  send(text: string): void {
    const message = JSON.parse(text) as ViewerMessage;
    this.#turn = this.#turn
      .then(() => this.#answer(message))
      .catch((error: unknown) => this.onclose?.({ code: CLOSE_DAMAGED, reason: String(error) }));
  }

  close(): void {
    this.onopen = this.onmessage = this.onclose = null;
  }

  async #answer(message: ViewerMessage): Promise<void> {
    switch (message.type) {
      case "hi":
        await this.#greet(message.run, message.only);
        break;
      case "watch":
        await this.#watch(message.run);
        break;
      case "overlay":
        await this.#overlay(message.runs);
        break;
      case "list":
        if (message.on !== false && this.#saved) this.#say(this.#saved.rows);
        break;
      case "show": {
        const known = this.#shown.get(message.run ?? this.#watched ?? "");
        if (!known) break;
        known.due = message.series.filter((id) => !known.shown.includes(id) || known.due.includes(id));
        known.shown = message.series;
        break;
      }
      case "range": {
        const key = message.run ?? this.#watched ?? "";
        if (!this.#shown.has(key)) break;
        const run = await this.#run(key);
        this.#answers.push(() => run.frame(message.series, { axis: "step", ...message }));
        break;
      }
      case "sample": {
        if (!this.#shown.has(message.run)) break;
        const answer = (await this.#samplesOf(message.run)).answer(message);
        this.#answers.push(() => answer);
        break;
      }
      case "drawn":
        this.#credit = true;
        break;
      case "ping":
        this.#say({ type: "pong", sent: message.sent, time: Date.now() / 1000 });
        break;
      case "checkpoints": {
        const answer = this.#has(message.run) ? (await this.#run(message.run)).answer(message.type) : null;
        if (answer) this.#say(answer);
        break;
      }
      default: // Nobody gives commands here, and who does not look costs nothing
    }
    await this.#sendFrame();
  }

  async #greet(wanted: string | null, only: boolean): Promise<void> {
    const text = new TextDecoder().decode(await this.#read("saved"));
    this.#saved = JSON.parse(text) as Saved;
    const { hello } = this.#saved;
    const has = hello.runs.some(({ key }) => key === wanted);
    const run = has ? wanted : wanted !== null && only ? null : hello.run;
    // Of what is recorded the time is `saved`; the clock is the viewer's.
    this.#say({ ...hello, run, time: Date.now() / 1000 });
    if (run !== null) await this.#watch(run);
  }

  async #watch(key: string): Promise<void> {
    if (!this.#has(key)) {
      this.#say({ type: "runs", runs: this.#saved?.hello.runs ?? [] });
      return;
    }
    if (this.#watched !== null) this.#shown.delete(this.#watched);
    this.#watched = key;
    this.#shown.set(key, { shown: [], due: [] });
    for (const text of (await this.#run(key)).texts) this.#say(text);
  }

  async #overlay(keys: readonly string[]): Promise<void> {
    for (const key of [...this.#shown.keys()]) if (key !== this.#watched && !keys.includes(key)) this.#shown.delete(key);
    for (const key of keys) {
      if (this.#shown.has(key) || !this.#has(key)) continue;
      this.#shown.set(key, { shown: [], due: [] });
      for (const text of (await this.#run(key)).texts) {
        if (text.type === "run") this.#say({ ...text, overlaid: true });
        else if (text.type !== "milestone" && text.type !== "missed") this.#say(text);
      }
    }
  }

  /** One frame at a time, answers first, as long as the page draws them. */
  async #sendFrame(): Promise<void> {
    if (!this.#credit) return;
    let frame = this.#answers.shift()?.();
    for (const [key, known] of frame ? [] : this.#shown) {
      if (known.due.length === 0) continue;
      frame = (await this.#run(key)).frame(known.due);
      known.due = [];
      break;
    }
    if (!frame) return;
    this.#credit = false;
    this.onmessage?.({ data: frame });
  }

  #has(key: string): boolean {
    return this.#numberOf(key) >= 0;
  }

  /** A run is unpacked when it is asked for first. */
  #run(key: string): Promise<SavedRun> {
    let run = this.#runs.get(key);
    if (!run) {
      run = this.#read(`saved-${this.#numberOf(key)}`).then((data) => new SavedRun(key, data));
      this.#runs.set(key, run);
    }
    return run;
  }

  /** Those of a run, unpacked when one of them is asked for first. */
  #samplesOf(key: string): Promise<SavedSamples> {
    let samples = this.#samples.get(key);
    if (!samples) {
      samples = this.#read(`saved-${this.#numberOf(key)}-samples`).then((data) => new SavedSamples(data));
      this.#samples.set(key, samples);
    }
    return samples;
  }

  #numberOf(key: string): number {
    return this.#saved?.hello.runs.findIndex((run) => run.key === key) ?? -1;
  }

  #say(message: ServerMessage): void {
    this.onmessage?.({ data: JSON.stringify(message) });
  }
}

/** Whether this page is in a file with what it shows. */
export function isSaved(): boolean {
  return document.documentElement.hasAttribute("data-saved");
}

/** Read a block of the file that this page is in. */
export async function readBlock(name: string): Promise<Uint8Array> {
  const text = document.getElementById(name)?.textContent;
  if (!text) throw new Error(`there is no ${name}`);
  return inflate(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)));
}

export async function inflate(compressed: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
