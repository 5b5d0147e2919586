import { expect, test } from "vitest";

import { compareGroups, comparePanels, type Placed } from "../../src/charts/order";

function panel(name: string, ...labels: string[]): Placed {
  return { name, curves: labels.map((label, id) => ({ info: { id, key: `${label}_${name}`, panel: name, group: "", label, tab: "metrics", better: null } })) };
}

test("loss, what validation measures, the learning rate, and the rest as it came", () => {
  const panels = [
    panel("step_time", "step"), panel("lr", "step"), panel("grad_norm", "step"), panel("accuracy", "val"),
    panel("generator_loss", "step"), panel("gloss", "step"),
  ];
  const names = panels.sort(comparePanels).map(({ name }) => name);
  expect(names).toEqual(["generator_loss", "accuracy", "lr", "step_time", "grad_norm", "gloss"]);
});

test("metrics without a group come first, groups by name; what the machine uses has an order of its own", () => {
  const groups = ["layer_10", "zebra", "", "layer_2", "attention"];
  expect(groups.sort(compareGroups)).toEqual(["", "attention", "layer_2", "layer_10", "zebra"]);
  const system = ["Callbacks", "Training", "GPU", "Machine"];
  expect(system.sort(compareGroups)).toEqual(["Machine", "GPU", "Training", "Callbacks"]);
});
