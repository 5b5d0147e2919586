// Contents of samples: asked for when they are to be seen, kept for a while, and let go of again.

import { decodeSample, type RunEvent, type ViewerMessage } from "../protocol";
import type { Entry } from "./store";

export interface Content {
  /** The sample; null with an error. */
  event: RunEvent | null;
  /** Why there is nothing, in the server's words. */
  error: string;
  /** The text, or the encoded picture. */
  blob: Blob;
  /** Address of the picture within this page; it works while the content is kept. */
  url: string;
}

export interface Question {
  entry: Entry;
  /** Number of a picture in a table; null for the sample itself. */
  picture: number | null;
  /** Whether anybody still waits for it. */
  wanted: () => boolean;
  answer: (content: Content) => void;
}

/** Questions that the server has at a time: while one moves through steps, those that nobody waits for are not sent. */
const AT_ONCE = 8;
/** Bytes of contents that are kept. */
const KEPT_BYTES = 64 * 1024 * 1024;
const PICTURE = /^image\/(png|jpeg|webp)$/;

export class Contents {
  readonly #send: (message: ViewerMessage) => boolean;
  /** The newest last. */
  #waiting: Question[] = [];
  readonly #open = new Map<number, { question: Question; parts: ArrayBuffer[]; event: RunEvent | null }>();
  #query = 0;
  /** In the order in which they were last seen. */
  readonly #kept = new Map<string, Content>();
  #bytes = 0;

  constructor(send: (message: ViewerMessage) => boolean) {
    this.#send = send;
  }

  ask(question: Question): void {
    const name = nameOf(question);
    const known = this.#kept.get(name);
    if (known !== undefined) {
      this.#kept.delete(name);
      this.#kept.set(name, known);
      question.answer(known);
      return;
    }
    this.#waiting.push(question);
    this.#ask();
  }

  /** The server has begun to tell about a run: it may not answer what was asked about it before. */
  begin(run: string): void {
    for (const [query, { question }] of this.#open) {
      if (question.entry.run !== run) continue;
      this.#open.delete(query);
      this.#waiting.unshift(question);
    }
    this.#ask();
  }

  /** Wait for no answers about other runs. */
  keep(runs: readonly string[]): void {
    for (const [query, { question }] of this.#open) if (!runs.includes(question.entry.run)) this.#open.delete(query);
  }

  /** A connection is there: what was asked before is lost. */
  connected(): void {
    for (const { question } of this.#open.values()) this.begin(question.entry.run);
    this.#ask();
  }

  /** A frame of the server. */
  take(data: ArrayBuffer): void {
    const { header, content } = decodeSample(data);
    const open = this.#open.get(header.query);
    if (open === undefined) return;
    open.parts.push(content);
    open.event ??= header.event ?? null;
    if (header.more === true) return;
    this.#open.delete(header.query);
    const type = header.media_type ?? "";
    const blob = new Blob(open.parts, { type: PICTURE.test(type) ? type : "text/plain" });
    const url = PICTURE.test(type) ? URL.createObjectURL(blob) : "";
    const answer: Content = { event: open.event, error: header.error ?? "", blob, url };
    if (answer.error === "") this.#keep(nameOf(open.question), answer);
    open.question.answer(answer);
    this.#ask();
  }

  #ask(): void {
    while (this.#open.size < AT_ONCE) {
      const question = this.#waiting.pop();
      if (question === undefined) return;
      if (!question.wanted()) continue;
      const { entry: { run, seq }, picture } = question;
      this.#query += 1;
      // Without a connection it waits for the next one.
      if (!this.#send({ type: "sample", query: this.#query, run, seq, picture })) {
        this.#waiting.push(question);
        return;
      }
      this.#open.set(this.#query, { question, parts: [], event: null });
    }
  }

  #keep(name: string, content: Content): void {
    this.#kept.set(name, content);
    this.#bytes += content.blob.size;
    for (const [oldest, each] of this.#kept) {
      if (this.#bytes <= KEPT_BYTES || oldest === name) break;
      this.#drop(oldest, each);
    }
  }

  #drop(name: string, content: Content): void {
    this.#kept.delete(name);
    this.#bytes -= content.blob.size;
    // A picture that is on the screen stays there.
    if (content.url !== "") URL.revokeObjectURL(content.url);
  }
}

function nameOf({ entry: { run, seq, time }, picture }: Question): string {
  // With the time: a run that was cut back numbers its samples again.
  return `${run}\n${seq}\n${time}\n${picture ?? ""}`;
}
