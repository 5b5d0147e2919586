// Finer points for a zoom: asked for once the zoom rests, kept beside the curves of a run, and extended as it goes on.

import type { ChartFrame, RangeQuery } from "../protocol";
import { type Answer, NoAnswer } from "./ranges";
import type { Scene } from "./scene";
import { type Column, Curve, type SeriesStore } from "./series_store";

/** How long a zoom must rest before finer points are asked for, in milliseconds. */
const ZOOM_REST = 120;
/** Milliseconds between two questions for the same moving window. */
const ZOOM_AGAIN = 5_000;
/** Points before a zoom that are kept with it, so that smoothing begins where it did. */
const WARM_UP = 1_500;

/** Finer points of a curve. */
interface Detail {
  curve: Curve;
  column: Column;
  /** The part of the column that they were asked for; Infinity where it went to the newest point. */
  from: number;
  to: number;
}

/** A question about a run's curves. */
export type Question = Omit<RangeQuery, "type" | "query" | "run">;

export interface DetailsHost {
  /** Whether there is still a zoom when an answer comes. */
  isZoomed(): boolean;
  /** An answer has come, or none will. */
  answered(): void;
}

export class Details {
  readonly #store: SeriesStore;
  readonly #question: (question: Question) => Promise<Answer>;
  readonly #host: DetailsHost;
  readonly #details = new Map<number, Detail>();
  #asked = { key: "", at: -Infinity };
  #asking = false;
  #timer: { key: string; timer: ReturnType<typeof setTimeout> } | null = null;

  constructor(store: SeriesStore, question: (question: Question) => Promise<Answer>, host: DetailsHost) {
    this.#store = store;
    this.#question = question;
    this.#host = host;
  }

  /** The curve as it is to be drawn in a scene: its finer copy where that has all of it. */
  curve(id: number, scene: Scene | null): Curve | null {
    const detail = this.#details.get(id);
    if (detail && scene) {
      const { column, x, origin } = scene;
      if (detail.column === column && x.min + origin >= detail.from && x.max + origin <= detail.to) return detail.curve;
    }
    return this.#store.curves.get(id) ?? null;
  }

  forget(id: number): void {
    this.#details.delete(id);
  }

  /** The zoom is over, or the run is another one. */
  clear(): void {
    this.#details.clear();
    if (this.#timer !== null) clearTimeout(this.#timer.timer);
    this.#timer = null;
  }

  /** What was asked will not be answered: ask again. */
  askAgain(): void {
    this.#asked = { key: "", at: -Infinity };
  }

  /** If what is zoomed to holds reduced points, ask for about `points` finer ones of each curve. */
  ask(ids: readonly number[], scene: Scene, { follows, points }: { follows: boolean; points: number }): void {
    if (this.#asking) return;
    const { x, origin, column } = scene;
    const [from, to] = [x.min + origin, x.max + origin];
    const coarse = ids.filter((id) => this.#isCoarse(id, scene, from));
    // A window that moves is asked for now and then, one that rests once.
    const key = follows ? `${column} ${to - from}` : `${column} ${from} ${to} ${coarse.join()}`;
    const again = follows && performance.now() - this.#asked.at > ZOOM_AGAIN;
    if (coarse.length === 0 || (key === this.#asked.key && !again)) return;
    // While fingers or the wheel still move the zoom, the wait begins anew with each change.
    if (this.#timer?.key === key) return;
    if (this.#timer !== null) clearTimeout(this.#timer.timer);
    const ask = (): void => {
      this.#timer = null;
      this.#asked = { key, at: performance.now() };
      void this.#fetch(coarse, column, from, to, points);
    };
    this.#timer = { key, timer: setTimeout(ask, ZOOM_REST) };
  }

  #isCoarse(id: number, scene: Scene, from: number): boolean {
    const curve = this.curve(id, scene);
    if (!curve || curve.length === 0) return false;
    const first = curve.search(scene.column, from);
    return first < curve.length && curve.reducedTo >= (curve.step[first] as number);
  }

  async #fetch(ids: number[], column: Column, from: number, to: number, points: number): Promise<void> {
    this.#asking = true;
    try {
      const answer = await this.#question({ series: ids, start: from, end: to, axis: column, points });
      if (!this.#host.isZoomed()) return;
      for (const id of ids) this.#take(id, answer, column, from, to);
      this.#store.addGaps(answer.gaps);
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
    } finally {
      this.#asking = false;
      this.#host.answered();
    }
  }

  /** Put finer points in the place of those that a curve has there. */
  #take(id: number, answer: Answer, column: Column, from: number, to: number): void {
    const [curve, part] = [this.#store.curves.get(id), answer.parts.get(id)];
    if (!curve || !part) return;
    const fine = new Curve();
    const first = curve.search(column, from);
    fine.copy(curve, Math.max(first - WARM_UP, 0), first);
    // The answer begins with the neighbour before the zoom, which may be there already.
    const begin = (part.step[0] as number) <= (fine.last?.step ?? -Infinity) ? 1 : 0;
    fine.copy(part, begin, part.step.length);
    const last = fine.last?.step ?? -Infinity;
    const next = curve.after("step", last);
    fine.copy(curve, next, curve.length);
    fine.addMarks(curve.marks);
    const newest = next >= curve.length;
    [fine.least, fine.greatest] = [curve.least, curve.greatest];
    fine.copyCadence(curve);
    fine.reducedTo = part.reduced ? last : -Infinity;
    this.#details.set(id, { curve: fine, column, from, to: newest ? Infinity : to });
  }

  /** New points belong to a curve's finer copy, too. */
  extend(frame: ChartFrame): void {
    for (const { id, marks } of frame.header.series) {
      const detail = this.#details.get(id);
      const curve = this.#store.curves.get(id);
      if (!detail || !curve) continue;
      if (frame.header.kind === "snapshot") {
        this.#details.delete(id);
        this.#asked.key = "";
        continue;
      }
      detail.curve.copy(curve, curve.after("step", detail.curve.last?.step ?? -Infinity), curve.length);
      detail.curve.addMarks(marks);
      [detail.curve.least, detail.curve.greatest] = [curve.least, curve.greatest];
    }
  }
}
