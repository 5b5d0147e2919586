import { expect, test } from "vitest";

import { Scale } from "../../src/charts/axes";
import { marksOf, textOf } from "../../src/charts/marks";
import type { ChartEvent, Scene } from "../../src/charts/scene";

const alert = (step: number, metric: string | null = "loss"): ChartEvent => ({
  step, time: 0, kind: "alert", text: `alert ${step}`, metric,
});

/** A plot of 100 pixels for 100 steps. */
function marks(events: ChartEvent[], keys = ["loss"], unmarked: string[] = []): ReturnType<typeof marksOf> {
  const scene = { x: new Scale(0, 100), unmarked: new Set(unmarked), events: events.map((one) => ({ ...one, x: one.step })) };
  return marksOf(scene as unknown as Scene, new Set(keys), 100);
}

test("an alert is marked where its metric is drawn, and nowhere else", () => {
  expect(marks([alert(5)], ["loss", "val_loss"])).toMatchObject([{ isOwn: true, from: 0.05 }]);
  expect(marks([alert(5)], ["lr"])).toEqual([]);
});

test("what is about no metric is marked in all panels, but not as their own", () => {
  expect(marks([alert(5, null)], ["lr"])).toMatchObject([{ isOwn: false }]);
});

test("neighbours closer than eight pixels are one mark with a count", () => {
  const found = marks([10, 17, 24, 32, 60].map((step) => alert(step)));
  expect(found.map(({ from, to, events }) => [from, to, events.length])).toEqual([
    [0.1, 0.24, 3],
    [0.32, 0.32, 1],
    [0.6, 0.6, 1],
  ]);
  expect(found.map(textOf)).toEqual(["3 times, steps 10 to 24: alert 24", "alert 32", "alert 60"]);
});

test("kinds are counted apart, also where they come at the same time", () => {
  const saved: ChartEvent = { ...alert(11, null), kind: "checkpoint" };
  expect(marks([alert(10), saved, alert(12)]).map(({ kind, events }) => [kind, events.length])).toEqual([
    ["alert", 2],
    ["checkpoint", 1],
  ]);
});

test("a kind that is switched off and what is out of view are not marked", () => {
  expect(marks([alert(5)], ["loss"], ["alert"])).toEqual([]);
  expect(marks([alert(-1), alert(101)])).toEqual([]);
});
