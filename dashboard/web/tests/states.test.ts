import { describe as group, expect, test } from "vitest";
import type { Link } from "../src/connection";
import { NOTHING, type Model } from "../src/model";
import type { RunState, Status } from "../src/protocol";
import { describe, title, type Seen } from "../src/states";
import { after, hello, link, run, status, summary, watching } from "./messages";

function seen(fields: Partial<Omit<Seen, "link">> & { link?: Partial<Link> } = {}): Seen {
  return {
    model: watching(), now: 1_000, time: 5_000, page: "p1", behind: 0, newer: null, missing: [],
    ...fields,
    link: link(fields.link),
  };
}

const word = (fields: Parameters<typeof seen>[0]): string => describe(seen(fields)).word;
const withStatus = (fields: Partial<Status>): Model => watching(status(fields));
const notices = (fields: Parameters<typeof seen>[0]): string[] => describe(seen(fields)).notices.map(({ title }) => title);

group("the state of a run", () => {
  test.each<[Partial<Status>, string, string]>([
    [{ state: "starting" }, "starting", ""],
    [{ state: "waiting" }, "waiting for the first step", ""],
    [{ state: "running" }, "live", ""],
    [{ state: "validating" }, "validating", ""],
    [{ state: "running", reason: "reading the log: 40%" }, "live", "reading the log: 40%"],
    [{ state: "lost", reason: "last heard 14:32:05" }, "lost", "last heard 14:32:05"],
    [{ validating: true }, "validating", ""],
    [{ state: "paused", by: "viewer 10.0.0.7" }, "paused", "by viewer 10.0.0.7"],
    [{ state: "stopping", by: "user", reason: "enough" }, "stopping", "by user: enough"],
    [{ state: "closing" }, "finishing", "last checkpoints and callbacks"],
    [{ state: "completed", reason: "3 epochs" }, "completed", "3 epochs"],
    [{ state: "stopped", by: "EarlyStopping" }, "stopped", "by EarlyStopping"],
    [{ state: "cancelled" }, "cancelled", ""],
    [{ state: "failed", error: "ValueError: no" }, "failed", ""],
    [{ stalled: 42, waiting_for: "loader.py:7" }, "stalled", ""],
  ])("%j is called %j", (fields, expected, detail) => {
    const described = describe(seen({ model: withStatus(fields) }));
    expect([described.word, described.detail]).toEqual([expected, detail]);
  });

  test.each<[Partial<Status>, string]>([
    [{ state: "failed", error: "ValueError: no" }, "ValueError: no"],
    [{ state: "waiting", stalled: 42 }, "no step for 42 s"],
    [{ stalled: 42, waiting_for: "loader.py:7" }, "no step for 42 s, in loader.py:7"],
  ])("%j: a notice has the reason, and screen readers hear it", (fields, cause) => {
    const described = describe(seen({ model: withStatus(fields) }));
    expect([described.detail, described.cause]).toEqual(["", cause]);
    expect(described.notices).toHaveLength(1);
  });

  test.each<[Status["loss"], string, string]>([
    [0.5, "good", "3 epochs"],
    [null, "good", "3 epochs"],
    ["NaN", "warn", "the last loss is NaN"],
    ["Infinity", "warn", "the last loss is ∞"],
  ])("completed with a loss of %j is %s", (loss, tone, detail) => {
    const described = describe(seen({ model: withStatus({ state: "completed", reason: "3 epochs", loss }) }));
    expect([described.tone, described.sign, described.detail]).toEqual([tone, tone, detail]);
  });

  test("runs of a link that are not here are told in one notice", () => {
    const [notice] = describe(seen({ missing: ["old", "older"] })).notices;
    expect([notice?.title, notice?.text, notice?.closable]).toEqual([
      "2 runs of this view are not here:", "old, older. The server does not have them, or no longer.", true,
    ]);
  });

  test("a checkpoint that is being written stands beside it", () => {
    expect(describe(seen({ model: withStatus({ saving: true }) })).aside).toBe("writing a checkpoint");
    expect(describe(seen({ model: withStatus({}) })).aside).toBe("");
  });

  test("a word that a newer server has for it is shown as it is", () => {
    expect(word({ model: withStatus({ state: "warming" as RunState }) })).toBe("warming");
  });
});

group("the connection", () => {
  test.each<[Link["phase"], string]>([
    ["connecting", "connecting"],
    ["reconnecting", "reconnecting"],
    ["gone", "server gone"],
    ["unauthorised", "not authorised"],
    ["full", "too many viewers"],
    ["blocked", "connection blocked"],
    ["refused", "protocol differs"],
  ])("%s counts more than what was last known of the run", (phase, expected) => {
    expect(word({ link: { phase } })).toBe(expected);
  });

  test("a run that has ended stays so when its server goes", () => {
    const described = describe(seen({ model: withStatus({ state: "completed" }), link: { phase: "gone" } }));
    expect(described.word).toBe("completed");
    expect(described.notices.map(({ title }) => title)).toEqual(["The server closed with its run."]);
  });

  test("lost for a moment is told by the pill alone", () => {
    expect(notices({ link: { phase: "reconnecting", since: 0 }, now: 1_000 })).toEqual([]);
    expect(notices({ link: { phase: "reconnecting", since: 0 }, now: 2_000 })).toEqual(["Reconnecting."]);
    const over = withStatus({ state: "stopped" });
    expect(notices({ model: over, link: { phase: "reconnecting", since: 0 }, now: 9_000 })).toEqual([]);
  });

  test("what a server has said before it went is told", () => {
    const model = watching({ type: "bye", reason: "the server was interrupted" });
    const [notice] = describe(seen({ model, link: { phase: "gone" } })).notices;
    expect(notice?.text).toMatch(/^Its last message: the server was interrupted\. No server answers/);
  });

  test("when it was lost stands there", () => {
    expect(describe(seen({ link: { phase: "gone", heard: 0 } })).detail).toMatch(/^last heard at \d/);
  });

  test.each([
    ["a ping without an answer", { link: { waiting: 1_000 }, now: 5_000 }, /the server answers late/],
    ["late answers", { link: { latency: 4_000 } }, /the server answers late/],
    ["a frame that is not drawn", { behind: 9_000 }, /this page draws too slowly/],
  ])("%s: the page lags", (_, fields, detail) => {
    const described = describe(seen(fields));
    expect(described.word).toBe("lagging");
    expect(described.detail).toMatch(detail);
  });
});

group("in place of a run", () => {
  test.each<[Link["phase"], string]>([
    ["connecting", "Connecting"],
    ["open", "No run yet"],
    ["gone", "Server gone"],
    ["unauthorised", "Not authorised"],
    ["full", "Too many viewers"],
  ])("%s: it says %j", (phase, expected) => {
    const model = phase === "open" ? after(hello({ run: null, runs: [] })) : NOTHING;
    expect(describe(seen({ model, link: { phase } })).stage?.title).toBe(expected);
  });

  test("before its first step the run says what it waits for, then shows its curves", () => {
    const model = withStatus({ state: "waiting" });
    expect(describe(seen({ model })).stage?.title).toBe("Waiting for the first step");
    expect(describe(seen({ model: { ...model, curves: 1 } })).stage).toBeNull();
    expect(describe(seen({})).stage).toBeNull();
  });
});

group("notices", () => {
  test("there are none when all is well", () => {
    expect(notices({})).toEqual([]);
  });

  test("of a failure have the traceback, or say who may see it", () => {
    const failed = status({ state: "failed", error: "ValueError: no", traceback: "Traceback ..." });
    const [notice] = describe(seen({ model: watching(failed) })).notices;
    expect([notice?.text, notice?.details?.text]).toEqual(["ValueError: no", "Traceback ..."]);
    const reader = after(hello({ role: "read_only" }), run(), { ...failed, traceback: null });
    const [forReader] = describe(seen({ model: reader })).notices;
    expect([forReader?.text, forReader?.details]).toEqual([
      "ValueError: no The traceback is for viewers with the control role.",
      null,
    ]);
  });

  test("tell of another page, of samples that were dropped and of history that was trimmed", () => {
    const model = withStatus({ dropped: 1_200, trimmed: 400 });
    expect(notices({ model, page: "p0" })).toEqual([
      "This page is older than its server.",
      "1\u202f200 samples were dropped.",
      "The history is trimmed.",
    ]);
    expect(notices({ page: null })).toEqual([]);
  });

  test("a newer run is offered, or announced with the time that is left", () => {
    const newer = summary({ key: "b", name: "b" });
    const offered = describe(seen({ newer: { run: newer, seconds: null } })).notices[0];
    expect(offered?.actions.map(({ id }) => id)).toEqual(["show-newer"]);
    const announced = describe(seen({ newer: { run: newer, seconds: 2.4 } })).notices[0];
    expect([announced?.text, announced?.actions.map(({ id }) => id)]).toEqual([
      "Showing it in 3 s.",
      ["show-newer", "stay"],
    ]);
  });
});

test("the title has state, loss and run", () => {
  const titles = [
    [{ loss: 0.123456 }, "▶ 0.1235 · a"],
    [{ loss: "NaN" as const }, "▶ NaN · a"],
    [{ state: "paused" as const }, "⏸ 0.5000 · a · paused"],
    [{ state: "waiting" as const, loss: null }, "… waiting for the first step · a"],
    [{ state: "failed" as const }, "✕ 0.5000 · a · failed"],
  ] as const;
  for (const [fields, expected] of titles) {
    const now = seen({ model: withStatus(fields) });
    expect(title(now, describe(now))).toBe(expected);
  }
  const nothing = seen({ model: NOTHING, link: { phase: "connecting" } });
  expect(title(nothing, describe(nothing))).toBe("Connecting · offloop");
});
