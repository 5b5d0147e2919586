// Questions to the server for parts of curves, and their answers put together from several chart frames.

import type { ChartFrame, Gap, NonFinite, RangeQuery } from "../protocol";
import { withStretches } from "./series_store";

/** All that an answer has of one curve; NaN where it was not finite. */
export interface Part {
  step: number[];
  time: number[];
  epoch: number[];
  samples: number[];
  value: number[];
  marks: readonly NonFinite[];
  reduced: boolean;
}

export interface Answer {
  parts: Map<number, Part>;
  gaps: readonly Gap[];
}

export class NoAnswer extends Error {}

interface Waiting {
  run: string | undefined;
  answer: Answer;
  resolve(answer: Answer): void;
  reject(error: NoAnswer): void;
}

export class Ranges {
  readonly #send: (query: RangeQuery) => void;
  readonly #waiting = new Map<number, Waiting>();
  #number = 0;

  constructor(send: (query: RangeQuery) => void) {
    this.#send = send;
  }

  /** Ask; rejects with NoAnswer if the connection or the run goes before the answer is whole. */
  ask(query: Omit<RangeQuery, "type" | "query">): Promise<Answer> {
    const number = ++this.#number;
    const answer = new Promise<Answer>((resolve, reject) => {
      this.#waiting.set(number, { run: query.run, answer: { parts: new Map(), gaps: [] }, resolve, reject });
    });
    this.#send({ type: "range", query: number, samples: true, ...query });
    return answer;
  }

  /** Take a frame of kind `range`; one that nobody waits for any more is let go. */
  take(frame: ChartFrame): void {
    const { header } = frame;
    const waiting = this.#waiting.get(header.query ?? -1);
    if (!waiting) return;
    const { answer } = waiting;
    header.series.forEach((column, position) => {
      let part = answer.parts.get(column.id);
      if (!part)
        answer.parts.set(column.id, (part = { step: [], time: [], epoch: [], samples: [], value: [], marks: [], reduced: false }));
      const [values, rows] = [frame.values[position] ?? [], frame.indices[position] ?? []];
      for (let index = 0; index < column.points; index++) {
        const row = rows[index] as number;
        part.step.push(frame.step[row] as number);
        part.time.push(frame.time[row] as number);
        part.epoch.push(frame.epoch[row] as number);
        part.samples.push(frame.samples[row] as number);
        part.value.push(values[index] as number);
      }
      part.marks = withStretches(part.marks, column.marks);
      part.reduced ||= column.reduced;
    });
    answer.gaps = withStretches(answer.gaps, header.gaps);
    if (header.more) return;
    this.#waiting.delete(header.query as number);
    waiting.resolve(answer);
  }

  /** Nothing that was asked, of any run or of one, will be answered. */
  abandon(why: string, run?: string): void {
    for (const [number, waiting] of this.#waiting) {
      if (run !== undefined && waiting.run !== run) continue;
      this.#waiting.delete(number);
      waiting.reject(new NoAnswer(why));
    }
  }
}
