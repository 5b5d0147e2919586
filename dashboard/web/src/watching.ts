// Which runs the page shows: the one that its address names, or the newest; and those that are laid over it.
//
// A page that was opened without a run in its address follows: it shows the newest run, and the next one once that is
// over. Its address still names the run that it shows, so that a link to it and a reload show the same one; that it
// follows is in the history's state, which a reload keeps and a link does not. A page whose address names a run, or
// whose viewer has picked one, shows that run and no other.

import type { Link } from "./connection";
import { hasEnded, newerRun, stateOf, type Happening, type Model } from "./model";
import { MAX_OVERLAID, type Hello, type Overlay, type RunInfo, type Runs, type Watch } from "./protocol";
import { isStep, type View, type ViewState } from "./view";

/** How long a run that has ended stays before a newer one takes its place, milliseconds. */
const FOLLOW_AFTER = 4_000;

/** The part of the browser's history that is used. */
export interface PageHistory {
  readonly state: unknown;
  pushState(state: unknown, unused: string, url: string): void;
  replaceState(state: unknown, unused: string, url: string): void;
}

export interface WatchingHost {
  view: View;
  history: PageHistory;
  /** The page's address, without what stands after `#`. */
  base: string;
  /** What stands after `#` now. */
  hash(): string;
  now(): number;
  model(): Model;
  link(): Link;
  send(message: Watch | Overlay): void;
  happened(happening: Happening): void;
  /** Lay no other runs over the watched one. */
  keep(runs: readonly string[]): void;
  /** Whether the charts have a run. */
  has(run: string): boolean;
}

export class Watching {
  readonly #host: WatchingHost;
  /** Whether any run will do: the page changes to a newer one by itself. */
  #follows: boolean;
  /** The run that the server was asked for and has not answered about. */
  #asked: string | null = null;
  /** The run that the server says is watched. */
  #watched: string | null = null;
  /** Since when the newer run could be shown. */
  #newerSince: number | null = null;
  /** The runs that the server was asked to send beside the watched one. */
  #overlaid = "[]";
  /** What stood after `#` when the page last wrote or read it: another one was typed, and its event is on its way. */
  #known: string;
  /** What the next change of the view does with the address: by default it is a step if it is one. */
  #quiet = false;

  constructor(host: WatchingHost) {
    this.#host = host;
    this.#known = host.hash();
    this.#follows = host.view.get().run === null || followsIn(host.history.state);
  }

  /** Whether any run will do. */
  get follows(): boolean {
    return this.#follows;
  }

  /** What to ask the server for in a new connection. */
  greeting(): { run: string | null; only: boolean; after: number } {
    const model = this.#host.model();
    const { run } = this.#host.view.get();
    // Who follows and has seen the end asks for the newest run, whatever it is.
    const key = this.#follows && hasEnded(stateOf(model)) ? null : run;
    return { run: key, only: key !== null && !this.#follows, after: key !== null && key === model.run?.key ? model.last : -1 };
  }

  // What the server says

  hello(hello: Hello): void {
    this.#overlaid = "[]";
    this.#overlay();
    this.#newerSince = this.#asked = null;
    this.#watched = hello.run;
    const { run } = this.#host.view.get();
    if (run === null || this.#follows || hello.run === run) return;
    if (hello.run === null) this.#gone(run);
    else this.#watch(run); // picked while the connection was made
  }

  /** The server has another watched run; false if that is not the one that the page shows. */
  run({ key }: RunInfo): boolean {
    const wanted = this.#host.view.get().run;
    this.#watched = key;
    if (this.#asked !== null && key !== this.#asked) return false; // on its way before the question
    this.#asked = null;
    if (key === wanted) return true;
    if (!this.#follows) {
      // It let go of the one that is wanted.
      if (wanted !== null) this.#gone(wanted);
      return wanted === null;
    }
    this.#set(key, true);
    return true;
  }

  runs({ runs }: Runs): void {
    // One that is to be laid over, and has begun or been found since
    if (this.#beside().some((key) => !this.#host.has(key) && runs.some((run) => run.key === key))) {
      this.#overlaid = "[]";
      this.#overlay();
    }
    const asked = this.#asked;
    if (asked === null || runs.some(({ key }) => key === asked)) return;
    this.#gone(asked);
  }

  #gone(run: string): void {
    this.#asked = this.#watched = null;
    this.#host.happened({ type: "gone", key: run });
  }

  #watch(run: string): void {
    this.#asked = run;
    this.#host.send({ type: "watch", run });
  }

  /** The runs that are shown beside the watched one. */
  #beside(): string[] {
    const { run, overlaid, baseline } = this.#host.view.get();
    const keys = baseline === null ? overlaid : [...new Set([...overlaid, baseline])];
    return keys.filter((key) => key !== run).slice(0, MAX_OVERLAID);
  }

  /** Ask for the runs beside the watched one, if they are others than before. */
  #overlay(): void {
    const runs = this.#beside();
    const { run } = this.#host.view.get();
    // The one that will be watched stays until it is.
    this.#host.keep(run === null ? runs : [...runs, run]);
    const text = JSON.stringify(runs);
    if (text === this.#overlaid) return;
    this.#overlaid = text;
    this.#host.send({ type: "overlay", runs });
  }

  // What the viewer does

  /** The view has changed. */
  viewed(state: ViewState, previous: ViewState): void {
    const quiet = this.#quiet;
    this.#quiet = false;
    const { view } = this.#host;
    if (state.run !== previous.run) {
      if (!quiet) this.#follows = state.run === null;
      this.#newerSince = null;
      const shown = this.#host.model().run?.key ?? null;
      if (state.run === null) {
        // An address without a run: what is shown stays, or the newest comes.
        const newest = shown ?? newerRun(this.#host.model())?.key ?? null;
        if (newest !== null) return this.#set(newest, true);
      } else if (state.run !== this.#watched || this.#asked !== null) {
        this.#watch(state.run);
      }
    }
    this.#overlay();
    this.write(!quiet && isStep(state, previous) && view.hash() !== this.#host.hash());
  }

  /** The address was typed, or the back button has brought it. */
  traversed(): void {
    const { view, history } = this.#host;
    const follows = followsIn(history.state);
    this.#known = this.#host.hash();
    view.setHash(this.#known);
    if (follows) this.#follows = true;
    this.write(false);
  }

  /** Write the view into the address, as a step that can be taken back or in the place of what is there. */
  write(step: boolean): void {
    const { view, history, base } = this.#host;
    if (this.#host.hash() !== this.#known) return;
    const hash = view.hash();
    const state = { follows: this.#follows };
    if (step) history.pushState(state, "", hash || base);
    else if (hash !== this.#host.hash() || followsIn(history.state) !== this.#follows) {
      history.replaceState(state, "", hash || base);
    }
    this.#known = this.#host.hash();
  }

  /** Show a run, and the next one once that is over. */
  follow(run: string): void {
    this.#follows = true;
    this.#set(run, false);
  }

  stay(): void {
    this.#follows = false;
    this.write(false);
  }

  #set(run: string, quiet: boolean): void {
    const { view } = this.#host;
    if (view.get().run === run) return;
    const follows = this.#follows;
    this.#quiet = quiet;
    view.set({ run });
    this.#quiet = false;
    this.#follows = follows;
    this.write(false);
  }

  // Time goes by

  /** Change to a newer run once the one that is watched is over and could be seen to be. */
  tick(): void {
    const newer = newerRun(this.#host.model());
    if (newer === null || !this.#changesBySelf()) {
      this.#newerSince = null;
      return;
    }
    this.#newerSince ??= this.#host.now();
    if (this.#host.now() - this.#newerSince >= FOLLOW_AFTER) this.#set(newer.key, true);
  }

  /** A newer run, and seconds until the page changes to it; null for when asked. */
  newer(): { run: NonNullable<ReturnType<typeof newerRun>>; seconds: number | null } | null {
    const run = newerRun(this.#host.model());
    if (run === null) return null;
    const left = FOLLOW_AFTER - (this.#host.now() - (this.#newerSince ?? this.#host.now()));
    return { run, seconds: this.#changesBySelf() ? Math.max(0, left / 1000) : null };
  }

  /** A failure stays on the screen until somebody has seen it. */
  #changesBySelf(): boolean {
    const state = stateOf(this.#host.model());
    return this.#follows && this.#host.link().phase === "open" && hasEnded(state) && state !== "failed";
  }
}

function followsIn(state: unknown): boolean {
  return typeof state === "object" && state !== null && "follows" in state && state.follows === true;
}
