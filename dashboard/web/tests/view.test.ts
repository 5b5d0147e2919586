import { afterEach, describe, expect, test, vi } from "vitest";
import { storage } from "../src/storage";
import { DEFAULT_VIEW, View, decodeView, encodeView, sane, scaleIn, type ViewState } from "../src/view";

class Memory {
  readonly items = new Map<string, string>();
  getItem(key: string): string | null {
    return this.items.get(key) ?? null;
  }
  setItem(key: string, value: string): void {
    this.items.set(key, value);
  }
}

const EVERYTHING: ViewState = {
  tab: "events", run: "a&b#1", overlaid: ["c,d", "e=f"], baseline: "c,d", groupBy: "optimizer.lr", hiddenRuns: ["g"], members: true, search: "loss & <b>", axis: "wall", logX: true, logY: true, smoothing: 0.95,
  zoom: { min: -1.5, max: 2e9 }, follow: true, panel: "layer/0, mean", hidden: ["a,b", "c&d=e"], folded: ["", "#"], columns: 3, height: 300, usual: ["loss"], unmarked: ["alert"],
  scales: { "loss, mean": { log: true, min: null, max: 2.5 }, acc: { log: null, min: -1e-7, max: 1 }, b: { log: false, min: null, max: null } },
  pinned: ["loss"], joined: ["/loss/.*/", "a b"],
  theme: "auto",
};

afterEach(() => vi.unstubAllGlobals());

describe("the address", () => {
  test("carries a whole view", () => {
    expect(decodeView(encodeView(EVERYTHING))).toEqual(EVERYTHING);
  });

  test("is empty for the usual view", () => {
    expect(encodeView(DEFAULT_VIEW)).toBe("");
  });

  test.each(["", "#main", "#v=2&tab=events", "#tab=events"])("%j is no view", (hash) => {
    expect(decodeView(hash)).toBeNull();
  });

  test("what makes no sense in it is as usual", () => {
    expect(decodeView("#v=1&tab=x&x=y&smooth=-3&zoom=5,1&zoom2=1&logx=yes")).toEqual(DEFAULT_VIEW);
    expect(decodeView("#v=1&zoom=1,NaN&smooth=7")).toEqual({ ...DEFAULT_VIEW, smoothing: 0.999 });
    expect(decodeView("#v=1&y=&y=loss&y=log&y=,2,1,a&y=,x,,b&y=,,1e999,c&join=/(/&join=/[/")).toEqual(DEFAULT_VIEW);
  });

  test("is bounded", () => {
    const many = sane({
      hidden: Array.from({ length: 9_999 }, (_, index) => `m${index}`), joined: Array.from({ length: 99 }, (_, index) => `m${index}`),
      pinned: ["x".repeat(5_000)], search: "x".repeat(5_000),
      scales: Object.fromEntries(Array.from({ length: 9_999 }, (_, index) => [`m${index}`, { log: true }])),
    });
    expect([many.hidden.length, many.joined.length, many.pinned.length, many.search.length]).toEqual([500, 20, 0, 1_000]);
    expect(Object.keys(many.scales)).toHaveLength(500);
  });
});

test("a stored view of any shape becomes a view", () => {
  expect(sane({ hidden: "loss", zoom: 3, panel: 7, logY: "true", search: null })).toEqual(DEFAULT_VIEW);
});

describe("a view", () => {
  test("tells of changes, and only of changes", () => {
    const view = new View();
    const heard = vi.fn();
    const leave = view.subscribe(heard);
    view.set({ logY: false });
    expect(heard).not.toHaveBeenCalled();
    view.set({ logY: true });
    expect(heard).toHaveBeenCalledWith({ ...DEFAULT_VIEW, logY: true }, DEFAULT_VIEW);
    leave();
    view.set({ logY: false });
    expect(heard).toHaveBeenCalledTimes(1);
  });

  test("is remembered, without what belongs to one run", () => {
    const storage = new Memory();
    new View("", storage).set({ ...EVERYTHING, theme: "dark" });
    const again = new View("", storage).get();
    expect(again).toEqual({
      ...EVERYTHING,
      theme: "dark", zoom: null, follow: false, search: "", panel: null,
      run: null, overlaid: [], baseline: null, groupBy: null, hiddenRuns: [], members: false,
      scales: { "loss, mean": { log: true, min: null, max: null }, b: { log: false, min: null, max: null } },
    });
  });

  test("holds the y axis of a panel, also of one with a name that objects have", () => {
    const view = new View();
    view.setScale("__proto__", { log: true });
    view.setScale("__proto__", { max: 3 });
    expect(scaleIn(view.get(), "__proto__")).toEqual({ log: true, min: null, max: 3 });
    expect(scaleIn(decodeView(view.hash()) as ViewState, "__proto__")).toEqual({ log: true, min: null, max: 3 });
    expect(scaleIn(view.get(), "toString")).toBeNull();
    view.setScale("__proto__", { log: null, max: null });
    expect(view.hash()).toBe("");
  });

  test("of a link counts more than the remembered one, but for the theme", () => {
    const storage = new Memory();
    new View("", storage).set({ axis: "time", theme: "light" });
    expect(new View("#v=1&logy=1", storage).get()).toEqual({ ...DEFAULT_VIEW, logY: true, theme: "light" });
  });

  test("is as usual where storage is damaged or forbidden", () => {
    const forbidden = {
      getItem: () => {
        throw new Error("denied");
      },
      setItem: () => {
        throw new Error("denied");
      },
    };
    vi.stubGlobal("localStorage", forbidden);
    const view = new View("", storage);
    view.set({ logX: true });
    expect(view.get()).toEqual({ ...DEFAULT_VIEW, logX: true });
    vi.stubGlobal("localStorage", { ...forbidden, getItem: () => "{" });
    expect(new View("", storage).get()).toEqual(DEFAULT_VIEW);
  });
});
