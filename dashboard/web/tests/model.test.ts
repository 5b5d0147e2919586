import { describe, expect, test } from "vitest";
import { MILESTONES_KEPT, newerRun, newestRun, reduce, stateOf, unanswered, type Given } from "../src/model";
import type { Ack, CommandName } from "../src/protocol";
import { after, hello, milestone, run, status, summary, watching } from "./messages";

function given(id: string, name: CommandName = "pause"): Given {
  return { type: "given", request: { type: "command", id, name, run: "a" }, at: 10 };
}

function ack(id: string, state: Ack["state"], fields: Partial<Ack> = {}): Ack {
  return { type: "ack", id, name: "pause", state, step: null, why: "", ...fields };
}

const seqs = (model: ReturnType<typeof after>): (number | undefined)[] => model.milestones.map(({ seq }) => seq);

describe("a run", () => {
  test("is known by what the server says about it", () => {
    const model = watching(milestone(0), milestone(3));
    expect([model.run?.key, model.status?.step, seqs(model), model.last]).toEqual(["a", 5, [0, 3], 3]);
  });

  test("is not mixed up with another one", () => {
    const model = watching();
    expect(reduce(model, status({ run: "b" }))).toBe(model);
    expect(reduce(model, milestone(1, {}, "b"))).toBe(model);
    expect(reduce(model, { type: "missed", run: "b", count: 3 })).toBe(model);
  });

  test("that is another one starts anew", () => {
    const model = reduce(watching(milestone(4)), run({ key: "b" }));
    expect([model.run?.key, model.status, seqs(model), model.last, model.losses]).toEqual(["b", null, [], -1, []]);
  });

  test("is forgotten when the server has none", () => {
    const model = reduce(watching(milestone(4)), hello({ run: null, runs: [] }));
    expect([model.run, model.status, model.milestones]).toEqual([null, null, []]);
  });

  test("keeps the losses of its last steps, finite ones, one a step", () => {
    const losses: [number, number | "NaN"][] = [[6, 0.4], [6, 0.4], [7, "NaN"], [8, 0.3]];
    const model = watching(...losses.map(([step, loss]) => status({ step, loss })));
    expect(model.losses).toEqual([0.5, 0.4, 0.3]);
  });
});

describe("coming back", () => {
  test("to the same server keeps what is known and takes what is new, once", () => {
    const before = watching(milestone(1), milestone(2));
    const model = [hello(), run(), milestone(2), milestone(5)].reduce((known, next) => reduce(known, next), before);
    expect(seqs(model)).toEqual([1, 2, 5]);
  });

  test("to another server starts the milestones anew, also of a run of the same name", () => {
    const before = watching(milestone(1), milestone(2));
    const model = [hello({ server: "s2" }), run(), milestone(0)].reduce((known, next) => reduce(known, next), before);
    expect(seqs(model)).toEqual([0]);
  });
});

test("a run of very many milestones keeps the newest and counts the rest", () => {
  let model = watching({ type: "missed", run: "a", count: 2 });
  for (let seq = 0; seq < MILESTONES_KEPT + 3; seq++) model = reduce(model, milestone(seq));
  expect([model.milestones.length, model.milestones[0]?.seq, model.missed]).toEqual([MILESTONES_KEPT, 3, 5]);
});

test("milestones that the server keeps no longer are not missed where the page has them", () => {
  const model = watching(milestone(0), milestone(1), { type: "missed", run: "a", count: 5 });
  expect(model.missed).toBe(3);
});

describe("a command", () => {
  test("goes from sent over accepted to applied", () => {
    const states = [given("1"), ack("1", "accepted"), ack("1", "applied", { step: 7 })].map((_, index, all) =>
      watching(...all.slice(0, index + 1)).commands.map(({ state, step }) => [state, step]),
    );
    expect(states).toEqual([[["sent", null]], [["accepted", null]], [["applied", 7]]]);
  });

  test("that is over is not changed by an answer that comes again", () => {
    const model = watching(given("1"), ack("1", "applied", { step: 7 }), ack("1", "expired"));
    expect(model.commands.map(({ state }) => state)).toEqual(["applied"]);
  });

  test("of somebody else is none of ours", () => {
    expect(watching(ack("x", "applied")).commands).toEqual([]);
  });

  test("without an answer goes to the same server again", () => {
    const model = reduce(watching(given("1"), given("2"), given("3"), ack("2", "applied"), ack("3", "accepted")), hello());
    expect(unanswered(model).map(({ id }) => id)).toEqual(["1", "3"]);
  });

  test("without an answer is lost with its server", () => {
    const model = reduce(watching(given("1"), given("2"), ack("2", "applied")), hello({ server: "s2" }), 50);
    expect(model.commands.map(({ state, why, at }) => [state, why, at])).toEqual([
      ["lost", "the server was restarted", 50],
      ["applied", "", 1_000],
    ]);
    expect(unanswered(model)).toEqual([]);
  });
});

describe("runs of one server", () => {
  const old = summary();
  const young = summary({ key: "b", started: 200 });

  test("a newer one is seen", () => {
    expect(newerRun(watching({ type: "runs", runs: [young, old] }))).toEqual(young);
    expect(newerRun(watching({ type: "runs", runs: [old] }))).toBeNull();
    expect(newestRun([])).toBeNull();
  });

  test("one that was over when the page came is no news, one that began since is", () => {
    const over = summary({ key: "b", started: 200, state: "completed" });
    const seen = (time: number) => newerRun(after(hello({ runs: [old, over], run: "a", time }), run()));
    expect(seen(300)).toBeNull();
    expect(seen(150)).toEqual(over);
  });

  test("an older one is not newer", () => {
    expect(newerRun(after(hello({ runs: [old, young], run: "b" }), run({ key: "b", started: 200 })))).toBeNull();
  });

  test("the state of the watched one is known from the list before its status has come", () => {
    expect(stateOf(after(hello({ runs: [summary({ state: "completed" })] }), run()))).toBe("completed");
  });
});
