import { describe, expect, test } from "vitest";
import { reduce, NOTHING, type Happening, type Model } from "../src/model";
import type { ServerMessage } from "../src/protocol";
import { View } from "../src/view";
import { Watching } from "../src/watching";
import { hello, link, run, status, summary } from "./messages";

/** A page's address, history and model, as far as they are about runs. */
class Place {
  model: Model = NOTHING;
  sent: unknown[] = [];
  now = 0;
  kept: readonly string[] = [];
  /** Runs that the charts have, beside the watched one. */
  overlaid: string[] = [];
  entries: { url: string; state: unknown }[];
  at = 0;
  readonly view: View;
  readonly watching: Watching;

  constructor(hash = "", state: unknown = null) {
    this.entries = [{ url: hash, state }];
    this.view = new View(hash);
    const place = this;
    this.watching = new Watching({
      view: this.view,
      history: {
        get state() {
          return place.entries[place.at]?.state;
        },
        pushState: (state, _, url) => {
          this.entries.splice(this.at + 1, Infinity, { url, state });
          this.at++;
        },
        replaceState: (state, _, url) => {
          this.entries[this.at] = { url, state };
        },
      },
      base: "/",
      hash: () => (this.hash() === "/" ? "" : this.hash()),
      now: () => this.now,
      model: () => this.model,
      link: () => link(),
      send: (message) => this.sent.push(message),
      happened: (happening: Happening) => {
        this.model = reduce(this.model, happening);
      },
      keep: (runs) => {
        this.kept = runs;
        this.overlaid = this.overlaid.filter((key) => runs.includes(key));
      },
      has: (key) => key === this.shown || this.overlaid.includes(key),
    });
    this.view.subscribe((now, before) => this.watching.viewed(now, before));
  }

  hash(): string {
    return this.entries[this.at]?.url ?? "";
  }

  hears(...messages: ServerMessage[]): void {
    for (const message of messages) {
      if (message.type === "run" && !this.watching.run(message)) continue;
      this.model = reduce(this.model, message);
      if (message.type === "hello") this.watching.hello(message);
      if (message.type === "runs") this.watching.runs(message);
    }
  }

  back(): void {
    this.at--;
    this.watching.traversed();
  }

  get shown(): string | null {
    return this.model.run?.key ?? null;
  }
}

const TWO = [summary(), summary({ key: "b", name: "b", started: 200 })];

describe("an address without a run", () => {
  test("asks for the newest, names it without a further step, and goes to the next one once that is over", () => {
    const place = new Place();
    expect(place.watching.greeting()).toEqual({ run: null, only: false, after: -1 });
    place.hears(hello(), run(), status());
    expect([place.hash(), place.entries.length, place.shown]).toEqual(["#v=1&run=a", 1, "a"]);
    place.hears(status({ state: "completed" }), { type: "runs", runs: TWO });
    place.watching.tick();
    expect(place.watching.newer()).toMatchObject({ run: { key: "b" }, seconds: 4 });
    place.now = 4_000;
    place.watching.tick();
    expect(place.sent).toEqual([{ type: "watch", run: "b" }]);
    place.hears(run({ key: "b" }));
    expect([place.hash(), place.entries.length, place.shown]).toEqual(["#v=1&run=b", 1, "b"]);
  });

  test("goes on to follow after a reload, and shows the newest should its run be gone", () => {
    const place = new Place("#v=1&run=a", { follows: true });
    expect(place.watching.greeting()).toMatchObject({ run: "a", only: false });
    place.hears(hello({ run: "b", runs: TWO }), run({ key: "b" }));
    expect([place.hash(), place.shown]).toEqual(["#v=1&run=b", "b"]);
  });
});

describe("an address with a run", () => {
  test("shows it and no other, however long it is over", () => {
    const place = new Place("#v=1&run=a");
    expect(place.watching.greeting()).toMatchObject({ run: "a", only: true });
    place.hears(hello({ runs: TWO }), run(), status({ state: "completed" }));
    place.watching.tick();
    place.now = 10_000;
    place.watching.tick();
    expect(place.watching.newer()).toMatchObject({ run: { key: "b" }, seconds: null });
    expect([place.sent, place.shown]).toEqual([[], "a"]);
  });

  test("that the server does not have says so, and shows it should it begin", () => {
    const place = new Place("#v=1&run=x");
    place.hears(hello({ run: null, runs: TWO }));
    expect([place.shown, place.model.gone]).toEqual([null, "x"]);
    place.hears(run({ key: "x" }));
    expect([place.shown, place.model.gone]).toEqual(["x", null]);
  });

  test("that the server lets go of is gone, and no other takes its place", () => {
    const place = new Place("#v=1&run=a");
    place.hears(hello(), run(), run({ key: "b" }));
    expect([place.shown, place.model.gone, place.hash()]).toEqual([null, "a", "#v=1&run=a"]);
  });
});

describe("a run that is picked", () => {
  test("is watched, a step back goes to the one before, and the page follows no longer", () => {
    const place = new Place();
    place.hears(hello({ runs: TWO }), run());
    place.view.set({ run: "b" });
    expect(place.sent).toEqual([{ type: "watch", run: "b" }]);
    place.hears(run({ key: "b" }), status({ run: "b", state: "completed" }));
    expect([place.hash(), place.entries.length, place.shown]).toEqual(["#v=1&run=b", 2, "b"]);
    expect(place.watching.greeting()).toMatchObject({ run: "b", only: true });
    place.back();
    expect(place.sent.at(-1)).toEqual({ type: "watch", run: "a" });
    place.hears(run());
    expect([place.hash(), place.shown]).toEqual(["#v=1&run=a", "a"]);
  });

  test("and that is gone meanwhile is not shown, nor is the one before any more", () => {
    const place = new Place();
    place.hears(hello({ runs: TWO }), run());
    place.view.set({ run: "b" });
    place.hears({ type: "runs", runs: [summary()] });
    expect([place.shown, place.model.gone]).toEqual([null, "b"]);
    place.view.set({ run: "a" });
    expect(place.sent.at(-1)).toEqual({ type: "watch", run: "a" });
  });

  test("twice in a row ends with the second", () => {
    const place = new Place();
    place.hears(hello({ runs: TWO }), run());
    place.view.set({ run: "b" });
    place.view.set({ run: "a" });
    place.hears(run({ key: "b" }), run());
    expect([place.hash(), place.shown]).toEqual(["#v=1&run=a", "a"]);
  });

  test("while there is no connection is asked for with the next one", () => {
    const place = new Place();
    place.hears(hello({ runs: TWO }), run());
    place.view.set({ run: "b" });
    expect(place.watching.greeting()).toMatchObject({ run: "b", only: true });
  });
});

describe("runs that are laid over", () => {
  const THREE = [...TWO, summary({ key: "c", name: "c", started: 50 })];

  test("are asked for with each connection, and when they change", () => {
    const place = new Place("#v=1&run=a&with=b&baseline=c");
    place.hears(hello({ runs: THREE }), run());
    expect(place.sent).toEqual([{ type: "overlay", runs: ["b", "c"] }]);
    place.view.set({ overlaid: [] });
    expect(place.sent.at(-1)).toEqual({ type: "overlay", runs: ["c"] });
    expect(place.kept).toEqual(["c", "a"]);
    place.hears(hello({ runs: THREE, server: "s2" }), run());
    expect(place.sent).toHaveLength(3);
  });

  test("are asked for again once they are there", () => {
    const place = new Place("#v=1&run=a&with=b");
    place.hears(hello(), run(), { type: "runs", runs: [summary()] });
    expect(place.sent).toHaveLength(1);
    place.hears({ type: "runs", runs: TWO });
    expect(place.sent).toHaveLength(2);
    place.overlaid = ["b"];
    place.hears({ type: "runs", runs: TWO });
    expect(place.sent).toHaveLength(2);
  });

  test("and are picked then take the place of the one before, and stay where they are until they come", () => {
    const place = new Place("#v=1&run=a&with=b");
    place.hears(hello({ runs: TWO }), run());
    place.view.set({ run: "b", overlaid: ["a"] });
    expect(place.sent.slice(1)).toEqual([{ type: "watch", run: "b" }, { type: "overlay", runs: ["a"] }]);
    expect(place.kept).toEqual(["a", "b"]);
  });
});

test("tabs and maximised panels are steps too, other changes are not", () => {
  const place = new Place();
  place.hears(hello(), run());
  place.view.set({ tab: "events" });
  place.view.set({ logY: true });
  place.view.set({ panel: "loss" });
  expect(place.entries.map(({ url }) => url)).toEqual([
    "#v=1&run=a",
    "#v=1&tab=events&run=a&logy=1",
    "#v=1&tab=events&run=a&logy=1&panel=loss",
  ]);
  place.back();
  expect(place.view.get()).toMatchObject({ tab: "events", panel: null });
  expect(place.sent).toEqual([]);
});

test("an address that was typed stands, also if the server speaks before the browser tells of it", () => {
  const place = new Place();
  place.hears(hello({ runs: TWO }));
  place.entries.push({ url: "#v=1&tab=events&run=b", state: null });
  place.at++;
  place.hears(run(), status());
  expect(place.hash()).toBe("#v=1&tab=events&run=b");
  place.watching.traversed();
  expect(place.view.get()).toMatchObject({ tab: "events", run: "b" });
  expect(place.sent.at(-1)).toEqual({ type: "watch", run: "b" });
});
