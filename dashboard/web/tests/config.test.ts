import { expect, test } from "vitest";
import { flatten } from "../src/config";

test("nested settings are laid out flat, lists of plain values stay one line", () => {
  const settings = { optimizer: { lr: 0.1, betas: [0.9, 0.99] }, steps: [{ name: "crop" }, 3], empty: {}, none: null };
  expect(flatten(settings).map(({ key, value }) => `${key} = ${value}`)).toEqual([
    "optimizer.lr = 0.1", "optimizer.betas = [0.9,0.99]", "steps[0].name = crop", "steps[1] = 3",
    "empty = {}", "none = null",
  ]);
});
