// The runs of the server: the side bar that lists them, the tab that compares them, and the dialog that edits one.

import { hasEnded } from "../model";
import type { Ack, Hello, Rows, RunRow, SeriesInfo, ViewerMessage } from "../protocol";
import type { PageStorage } from "../storage";
import { encodeView, type View } from "../view";
import type { Better } from "./compare";
import { Editor } from "./editor";
import { RunBar, type RunsLook } from "./list";
import { chosen, drawn, focus, lastFinished, MOST, tick, type Chosen } from "./selection";
import { CompareTable } from "./table";

export interface RunsHost {
  view: View;
  storage: PageStorage;
  send(message: ViewerMessage): boolean;
  /** Key of the run that is watched; null for none. */
  watched(): string | null;
  /** Whether nobody has picked the run that is watched. */
  isFree(): boolean;
  /** Go back to the newest run, and to the next one once that is over. */
  followNewest(): void;
  colourOf(key: string): string | null;
  announce(text: string): void;
  /** Show a line for a moment. */
  flash(text: string): void;
  newId(): string;
  changed(): void;
}

export class Runs {
  readonly bar: RunBar;
  readonly table: CompareTable;
  readonly editor: Editor;
  readonly #host: RunsHost;
  /** The server's clock, and when it said so by the page's. */
  #clock = { time: 0, at: 0 };
  #control = false;
  /** The page is in a file with a few runs that somebody has chosen. */
  #saved = false;
  readonly #better = new Map<string, Better>();
  /** The view names runs, or the page has looked for one to lay over: what is ticked is the viewer's from here on. */
  #settled: boolean;
  /** Whether the server sends the list in this connection. */
  #asked = false;

  constructor(host: RunsHost) {
    this.#host = host;
    this.#settled = !host.isFree() || host.view.get().overlaid.length > 0;
    const colourOf = (key: string): string | null => host.colourOf(key);
    const show = (key: string): void => this.#choose(focus(this.chosen, key));
    this.bar = new RunBar(
      {
        focus: show,
        tick: (key) => this.#tick(key),
        pin: (key) => this.#pin(key),
        edit: (key) => this.edit(key),
        addressOf: (key) => encodeView({ ...host.view.get(), run: key, overlaid: [], baseline: null, groupBy: null }),
        latestOnly: () => this.latestOnly(),
        compare: () => host.view.set({ tab: "compare" }),
        group: (by) => host.view.set({ groupBy: by }),
        colourOf,
        preferred: () => host.changed(),
      },
      host.storage,
    );
    this.table = new CompareTable({ focus: show, colourOf, baseline: () => host.view.get().baseline });
    this.editor = new Editor({
      send: (edit) => host.send(edit),
      rowOf: (key) => this.bar.store.rows.get(key),
      announce: (text) => host.announce(text),
      newId: () => host.newId(),
    });
  }

  row(key: string): RunRow | null {
    return this.bar.store.rows.get(key) ?? null;
  }

  // What the server says

  greeted(hello: Hello): void {
    this.#clock = { time: hello.time, at: performance.now() };
    this.#control = hello.role === "control";
    this.#saved = Boolean(hello.saved);
    this.#asked = false;
    this.#ask();
  }

  /** Ask for the list of runs while it is of use: reading directories costs the server time. */
  #ask(): void {
    const { bar } = this;
    const asks = bar.isOpen || bar.mayOpen || !this.#settled || this.drawn.length > 1;
    if (asks === this.#asked || !this.#host.send({ type: "list", on: asks })) return;
    this.#asked = asks;
    if (asks) bar.store.begin();
  }

  listed(message: Rows): void {
    this.bar.update(this.#look());
    this.bar.apply(message);
    this.editor.changed();
    this.#preselect();
    this.#host.changed();
  }

  /** Curves of a run tell which way their metrics are better. */
  learned(series: readonly SeriesInfo[]): void {
    for (const { key, better } of series) if (better !== null) this.#better.set(key, better);
  }

  answered(ack: Ack): void {
    this.editor.answered(ack);
  }

  // What the viewer does

  /** The runs on the screen: the one that is watched, and those that are laid over it. */
  get chosen(): Chosen {
    return { run: this.#host.watched(), overlaid: this.#host.view.get().overlaid };
  }

  /** Keys of the runs that are drawn, with the baseline. */
  get drawn(): string[] {
    return drawn(this.chosen, this.#host.view.get().baseline);
  }

  /** Rows of the runs that are drawn, as far as they are known. */
  get rows(): RunRow[] {
    return this.drawn.flatMap((key) => this.bar.store.rows.get(key) ?? []);
  }

  /** Keys of runs that the view names and the server does not have, once the whole list is here. */
  get missing(): string[] {
    const { rows, complete } = this.bar.store;
    return complete ? this.drawn.slice(1).filter((key) => !rows.has(key)) : [];
  }

  /** What the list of runs has of a run; null if it is not known. */
  rowOf(key: string | undefined): RunRow | null {
    return this.bar.store.rows.get(key ?? "") ?? null;
  }

  edit(key: string): void {
    const row = this.bar.store.rows.get(key);
    if (row !== undefined && this.#control) this.editor.open(row);
  }

  /** Show the newest run and no other, now and at the next visit. */
  latestOnly(): void {
    this.#settled = true;
    this.#host.view.set({ overlaid: [], baseline: null, groupBy: null });
    this.bar.prefer({ latestOnly: true });
    this.#host.followNewest();
  }

  #tick(key: string): void {
    const next = tick(this.chosen, key);
    if (next === null) {
      this.#host.flash(`At most ${MOST} runs are shown at a time.`);
      this.bar.update(this.#look());
      return;
    }
    if (next.overlaid.length > 0) this.bar.prefer({ latestOnly: false });
    this.#choose(next);
  }

  /** A baseline is one of the runs on the screen. */
  #pin(key: string): void {
    const { view } = this.#host;
    if (view.get().baseline === key) {
      view.set({ baseline: null });
      return;
    }
    if (!chosen(this.chosen).includes(key)) this.#tick(key);
    if (chosen(this.chosen).includes(key)) view.set({ baseline: key });
  }

  #choose({ run, overlaid }: Chosen): void {
    this.#settled = true;
    const changed = run !== null && run !== this.#host.watched();
    this.#host.view.set({ ...(changed ? { run } : {}), overlaid: [...overlaid] });
  }

  /** Lay the last finished run over a live one, once, unless the viewer has chosen runs; in a file all over each other. */
  #preselect(): void {
    const { store, preferences } = this.bar;
    const watched = this.#host.watched();
    if (this.#settled || !store.complete || watched === null) return;
    if (this.#saved) {
      const others = [...store.rows.keys()].filter((key) => key !== watched);
      this.#settled = true;
      this.#host.view.set({ overlaid: others.slice(0, MOST - 1) });
      return;
    }
    const row = store.rows.get(watched);
    // Wait until the live run has logged its metric; one that has ended will not have a finished one laid over it.
    if (row === undefined || (row.figures[row.monitor] === undefined && !hasEnded(row.state))) return;
    this.#settled = true;
    const last = preferences.latestOnly ? null : lastFinished(store.rows.values(), watched);
    if (last !== null) this.#host.view.set({ overlaid: [last] });
  }

  // What is drawn

  update(): void {
    this.#ask();
    const look = this.#look();
    this.bar.update(look);
    if (this.#host.view.get().tab === "compare") this.table.update(this.rows, this.#better);
  }

  #look(): RunsLook {
    const { baseline, groupBy } = this.#host.view.get();
    const now = this.#clock.time + (performance.now() - this.#clock.at) / 1000;
    return { ...this.chosen, baseline, groupBy, control: this.#control, now };
  }
}
