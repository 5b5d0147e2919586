import { expect, test } from "vitest";
import { beginningOf } from "../src/events";
import { markOf, repetitionOf, tell, wholeOf } from "../src/milestones";
import type { RunEvent } from "../src/protocol";

const EVENTS: [RunEvent, string, string, string][] = [
  [{ type: "TrainStart", device: "cuda:0" }, "state", "Training begins on cuda:0", ""],
  [
    { type: "ValidationEnd", metrics: { val_loss: 0.25, val_acc: "NaN" }, seconds: 2 },
    "validation", "Validated in 2.0 s: val_loss 0.25, val_acc NaN", "",
  ],
  [
    { type: "EpochEnd", epoch: 1, metrics: { a: 1, b: 2, c: 3, d: 4, e: 5 }, complete: false },
    "epoch", "Epoch 2 ends early: a 1, b 2, c 3, d 4, 1 more", "",
  ],
  [
    { type: "LearningRateChanged", lr: 0.00001, previous: 0.1, source: "schedule" },
    "lr", "Learning rate 0.1 → 1e−5", "schedule",
  ],
  [
    { type: "CommandApplied", command: "set_lr", by: "viewer 10.0.0.7", arguments: { lr: 0.1, group: null } },
    "command", "Command set_lr (lr 0.1) took effect", "viewer 10.0.0.7",
  ],
  [
    { type: "CommandApplied", command: "validate", error: "ConfigError: no" },
    "command", "Command validate failed: ConfigError: no", "",
  ],
  [
    { type: "CheckpointSaved", path: "/r/c", saved_step: 1234, reason: "best", bytes: 2_500_000, seconds: 0.01 },
    "checkpoint", "Checkpoint of step 1\u202f234 saved (best), 2.5 MB in <0.1 s", "",
  ],
  [{ type: "StateChanged", state: "paused", by: "user", reason: "lunch" }, "state", "Now paused: lunch", "user"],
  [{ type: "TrainEnd", status: "failed", error: "ValueError: no", seconds: 75 }, "state", "Training failed after 1 m 15 s: ValueError: no", ""],
  [{ type: "Alert", rule: "NotFinite()", message: "loss is NaN" }, "alert", "loss is NaN", "NotFinite()"],
  [{ type: "mine.Shuffled", seed: 7, path: "x", run_id: "r", seq: 3 }, "own Shuffled", "seed 7 · path x", ""],
  [{ type: "__main__.f.<locals>.Note", text: "def f(x):\n    return x\n" }, "own Note", "def f(x):\n    return x", ""],
  [{ type: "__main__.Note", text: "a line" }, "own Note", "a line", ""],
  [{ type: "__main__.Sample", text: "a\n  b", prompt: "p" }, "own Sample", "prompt p\ntext:\na\n  b", ""],
  [{ type: "__main__.Tick" }, "own Tick", "Tick", ""],
  [{ type: "OfLater", a: 1 }, "own OfLater", "a 1", ""],
];

test.each(EVENTS)("%j", (event, kind, text, by) => {
  expect(tell(event)).toMatchObject({ kind, text, by });
});

test.each(["TrainStart", "EpochEnd", "LearningRateChanged", "CommandApplied", "CheckpointSaved", "Alert", "toString"])(
  "%s without any of its fields is still told",
  (type) => {
    expect(tell({ type }).text).not.toMatch(/undefined|\[object|NaN/);
  },
);

test("alerts, checkpoints, learning rates and validations mark the curves, at the step they are about", () => {
  const at = { time: 9, step: 20 };
  expect(markOf({ type: "Alert", message: "loss is NaN", metric: "loss", ...at })).toEqual({
    kind: "alert", text: "loss is NaN", metric: "loss", ...at,
  });
  expect(markOf({ type: "Alert", message: "no step for 9 s", ...at })?.metric).toBeNull();
  expect(markOf({ type: "CheckpointSaved", saved_step: 15, ...at })).toMatchObject({ kind: "checkpoint", step: 15 });
  expect(markOf({ type: "LearningRateChanged", ...at })?.kind).toBe("lr");
  expect(markOf({ type: "ValidationEnd", ...at })?.kind).toBe("validation");
  expect(markOf({ type: "EpochEnd", ...at })).toBeNull();
  expect(markOf({ type: "Alert", message: "before it began" })).toBeNull();
});

test("the whole of an event keeps the lines of a traceback", () => {
  const event = { type: "CallbackFailed", error: "ValueError: no", traceback: "Traceback:\n  in f\n", failures: 2 };
  expect(wholeOf(event).split("\n")).toEqual([
    "type: CallbackFailed", "error: ValueError: no", "traceback:", "  Traceback:", "    in f", "failures: 2",
  ]);
  expect(wholeOf({ type: "X", metrics: { loss: "NaN" } })).toBe('type: X\nmetrics:\n  {\n    "loss": "NaN"\n  }');
});

test("alerts by one rule are repetitions, whatever their values; validations are not", () => {
  const alert = (rule: string, message: string) => repetitionOf({ type: "Alert", rule, message });
  expect(alert("Spike('loss')", "loss is 5")).toBe(alert("Spike('loss')", "loss is 6"));
  expect(alert("Spike('loss')", "loss is 5")).not.toBe(alert("NonFinite('loss')", "loss is 5"));
  expect(repetitionOf({ type: "ValidationEnd" })).toBeNull();
});

test("what the text of an event has whole need not be told again", () => {
  const event = { type: "a.Note", text: "a\nb", step: 3 };
  expect(wholeOf(event, tell(event).whole)).toBe("type: a.Note\nstep: 3");
});

test("long texts are cut after some lines or characters, never for a little", () => {
  const lines = (count: number): string => Array.from({ length: count }, (_, index) => `line ${index}`).join("\n");
  expect(beginningOf(lines(9))).toBe(lines(9));
  expect(beginningOf(lines(10))).toBe(`${lines(8)}\n…`);
  expect(beginningOf("x".repeat(650))).toHaveLength(650);
  expect(beginningOf("x".repeat(9_999))).toHaveLength(601);
});
