import { describe, expect, test } from "vitest";

import { placedBy } from "../../src/charts/joined";
import type { SeriesInfo } from "../../src/protocol";
import { finder } from "../../src/search";

const info = (key: string, panel = key): SeriesInfo => ({ id: 1, key, panel, group: "g", label: "step", tab: "metrics", better: null, unit: "" });

describe("a search", () => {
  test.each([
    ["loss", ["loss", "val_loss", "Loss"]],
    ["val loss", ["val_loss"]],
    ["/^loss$/", ["loss", "Loss"]],
    ["/^LOSS$/i", ["loss", "Loss"]],
    ["/^loss|acc", ["loss", "Loss", "acc"]],
    ["/", []],
  ])("%j finds %j", (search, found) => {
    const { finds, problem } = finder(search);
    expect(["loss", "val_loss", "Loss", "acc"].filter((name) => finds(name))).toEqual(found);
    expect(problem).toBe("");
  });

  test("finds words in any of several texts", () => {
    expect(finder("loss val").finds("val", "train_loss")).toBe(true);
    expect(finder("loss val").finds("train_loss")).toBe(false);
  });

  test("that means nothing finds nothing, and says why", () => {
    const { finds, problem } = finder(" /(?=loss)/ ");
    expect(finds("loss")).toBe(false);
    expect(problem).toBe(
      "/(?=loss)/ cannot be searched for: '(?=' is not known here, only (...) and (?:...). Words without a slash find names that have them.",
    );
  });

  test("comes to an end, whatever it is", () => {
    expect(finder("/^(a+)+$/").finds("a".repeat(1_000) + "b")).toBe(false);
  });
});

describe("metrics that share a panel", () => {
  test("are those that a search finds, by their names or their panels'", () => {
    expect(placedBy(["/loss/.*/"], info("loss/head"))).toMatchObject({ key: "loss/head", panel: "/loss/.*/", group: "", label: "loss/head" });
    expect(placedBy(["/loss/.*/"], info("val_x", "loss/x")).panel).toBe("/loss/.*/");
    expect(placedBy(["/loss/.*/"], info("loss"))).toEqual(info("loss"));
    expect(placedBy(["/^a/", "b"], info("ab")).panel).toBe("/^a/");
    expect(placedBy(["loss val"], info("val_loss")).panel).toBe("loss val");
    expect(placedBy([], info("loss"))).toEqual(info("loss"));
  });
});
