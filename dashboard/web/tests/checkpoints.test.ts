import { expect, test } from "vitest";

import { linesOf, stateIn, toldBy } from "../src/checkpoints";
import type { CheckpointRow } from "../src/protocol";

const ROW: CheckpointRow = {
  name: "step-000000004-a1", path: '/runs/a "b"/checkpoints/step-000000004-a1', step: 4, epoch: 0, attempt: 1, reason: "best",
  created: 1, bytes: 1, metrics: {}, is_best: false, is_last: false, tags: [], verified: null, damaged: "",
};

test("events tell how long writing took, where a checkpoint was uploaded, and that the list has changed", () => {
  const told = toldBy([
    { type: "TrainStart" },
    { type: "CheckpointSaved", path: "/runs/a/checkpoints/step-000000004-a1", saved_step: 4, seconds: 0.25 },
    { type: "CheckpointUploaded", url: "s3://bucket/a/step-000000004-a1", uploaded_step: 4 },
    { type: "CommandApplied", command: "tag" },
    { type: "CommandApplied", command: "pause" },
  ]);
  expect(told.seconds.get(ROW.name)).toBe(0.25);
  expect(told.uploaded.get(4)).toBe("s3://bucket/a/step-000000004-a1");
  expect(told.changes).toBe(2);
});

test("a path is written as a string of Python", () => {
  expect(linesOf(ROW).load).toBe('load_model("/runs/a \\"b\\"/checkpoints/step-000000004-a1", into=model)');
});

test("what is known of a checkpoint's bytes, the newest first", () => {
  expect(stateIn(ROW, []).text).toBe("not verified");
  expect(stateIn({ ...ROW, verified: 1 }, [])).toMatchObject({ tone: "good" });
  expect(stateIn({ ...ROW, verified: 1, damaged: "state.json" }, [])).toEqual({ text: "damaged: state.json", tone: "bad" });
  expect(stateIn({ ...ROW, damaged: "state.json" }, [ROW.name]).text).toBe("is being read");
});
