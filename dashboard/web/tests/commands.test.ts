import { describe, expect, test } from "vitest";
import { judgeLr, refusal, tellCommand } from "../src/commands";
import type { CommandState } from "../src/model";
import type { CommandName, RunState } from "../src/protocol";
import { after, hello, link, run, status, watching } from "./messages";

const COMMANDS: CommandName[] = ["pause", "stop", "set_lr", "checkpoint", "validate"];

describe("a command may be given", () => {
  test("to a run that trains", () => {
    expect(COMMANDS.map((name) => refusal(name, watching(), link()))).toEqual(COMMANDS.map(() => null));
  });

  test("and not when there is a reason, which comes in the order of what the viewer can do about it", () => {
    const reader = after(hello({ role: "read_only" }), run(), status({ state: "completed" }));
    expect(refusal("stop", after(hello({ run: null })), link())).toMatch(/no run/);
    expect(refusal("stop", reader, link({ phase: "gone" }))).toMatch(/read-only/);
    expect(refusal("stop", watching(status({ state: "completed" })), link({ phase: "gone" }))).toMatch(/has ended/);
    expect(refusal("stop", watching(), link({ phase: "gone" }))).toMatch(/no connection/);
  });

  test("and not when the run refuses it, in the run's words", () => {
    const model = after(hello(), run({ refused: { validate: "there is no val_loader" } }), status());
    expect(refusal("validate", model, link())).toBe("There is no val_loader.");
    expect(refusal("pause", model, link())).toBeNull();
  });

  test.each<[CommandName, RunState, boolean]>([
    ["pause", "paused", false],
    ["resume", "paused", true],
    ["resume", "running", false],
    ["validate", "validating", false],
    ["stop", "validating", true],
    ["stop", "paused", true],
    ["checkpoint", "stopping", false],
    ["pause", "starting", false],
    ["stop", "closing", false],
  ])("%s while it is %s: %s", (name, state, may) => {
    expect(refusal(name, watching(status({ state })), link()) === null).toBe(may);
  });

  test("and not twice at the same time", () => {
    const request = { type: "command" as const, id: "1", name: "checkpoint" as const, run: "a" };
    const model = watching({ type: "given", request, at: 0 });
    expect(refusal("checkpoint", model, link())).toMatch(/on its way/);
    expect(refusal("validate", model, link())).toBeNull();
  });
});

describe("a learning rate", () => {
  test.each(["", " ", "abc", "0", "-1", "NaN", "Infinity", "1e999", "0,1"])("%j is none", (text) => {
    expect(judgeLr(text, 0.1)).toMatchObject({ lr: null });
  });

  test.each([
    ["0.001", 0.01],
    [" 1e-3 ", 1e-4],
    ["0.003", 0.0003],
    ["0.1", null],
    ["3", 0],
  ])("%j after %s needs no question", (text, present) => {
    expect(judgeLr(text, present)).toEqual({ lr: Number(text), question: null });
  });

  test("beyond ten times, up or down, is asked about", () => {
    expect(judgeLr("2", 0.1)).toEqual({ lr: 2, question: "That is 20.0 times the present 0.1." });
    expect(judgeLr("0.001", 0.1)).toEqual({ lr: 0.001, question: "That is 1/100 of the present 0.1." });
  });
});

test.each<[CommandState, string]>([
  ["sent", "Learning rate 0.01 for adam: sent"],
  ["accepted", "Learning rate 0.01 for adam: accepted, waiting for the run"],
  ["applied", "Learning rate 0.01 for adam: applied at step 7"],
  ["rejected", "Learning rate 0.01 for adam: rejected: no"],
  ["expired", "Learning rate 0.01 for adam: expired: no"],
  ["lost", "Learning rate 0.01 for adam: lost: no"],
])("a command that is %s is told", (state, text) => {
  const request = { type: "command", id: "1", name: "set_lr", run: "a", lr: 0.01, optimizer: "adam" } as const;
  expect(tellCommand({ request, state, step: 7, why: "no", at: 0 }).text).toBe(text);
});
