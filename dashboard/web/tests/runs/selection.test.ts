import { expect, test } from "vitest";
import { MAX_OVERLAID } from "../../src/protocol";
import { chosen, drawn, focus, lastFinished, tick } from "../../src/runs/selection";
import { row } from "../messages";

test("a tick lays a run over the one in focus, another takes it away", () => {
  const one = tick({ run: "a", overlaid: [] }, "b");
  expect(one).toEqual({ run: "a", overlaid: ["b"] });
  expect(tick(one!, "b")).toEqual({ run: "a", overlaid: [] });
});

test("the run in focus hands it over when its tick goes, unless it is alone", () => {
  expect(tick({ run: "a", overlaid: ["b", "c"] }, "a")).toEqual({ run: "b", overlaid: ["c"] });
  expect(tick({ run: "a", overlaid: [] }, "a")).toEqual({ run: "a", overlaid: [] });
});

test("a baseline is drawn, ticked or not", () => {
  expect(drawn({ run: "a", overlaid: ["b"] }, "b")).toEqual(["a", "b"]);
  expect(drawn({ run: "a", overlaid: [] }, "b")).toEqual(["a", "b"]);
  expect(drawn({ run: "a", overlaid: [] }, null)).toEqual(["a"]);
});

test("there is no eleventh", () => {
  const full = { run: "a", overlaid: Array.from({ length: MAX_OVERLAID }, (_, index) => `${index}`) };
  expect(chosen(full)).toHaveLength(10);
  expect(tick(full, "z")).toBeNull();
});

test("a ticked run that comes into focus changes places, another replaces", () => {
  expect(focus({ run: "a", overlaid: ["b", "c"] }, "c")).toEqual({ run: "c", overlaid: ["b", "a"] });
  expect(focus({ run: "a", overlaid: ["b"] }, "z")).toEqual({ run: "z", overlaid: ["b"] });
  expect(focus({ run: null, overlaid: ["b"] }, "b")).toEqual({ run: "b", overlaid: [] });
});

const LOGGED = { val_loss: [0.1, 0.1] as [number, number] };

test.each([
  ["the last that ended", row("live", { state: "running", figures: LOGGED }), "new"],
  ["none without the metric", row("live", { state: "running" }), null],
  ["none of another metric", row("live", { state: "running", monitor: "loss", figures: { loss: [1, 1] } }), null],
  ["none beside a run that has ended", row("live", { state: "failed", figures: LOGGED }), null],
])("beside a live run: %s", (_, live, found) => {
  const others = [
    row("old", { heard: 5, figures: LOGGED }),
    row("new", { heard: 9, figures: LOGGED, state: "stopped" }),
    row("archived", { heard: 10, figures: LOGGED, archived: true }),
    row("lost", { heard: 11, figures: LOGGED, state: "lost" }),
    row("empty", { heard: 12 }),
  ];
  expect(lastFinished([...others, live], "live")).toBe(found);
  expect(lastFinished([...others, live], null)).toBeNull();
});
