import { describe, expect, test } from "vitest";

import { patternFor, placedBy } from "../../src/charts/joined";
import type { SeriesInfo } from "../../src/protocol";
import { finder, searchProblem } from "../../src/search";

const info = (key: string, panel = key): SeriesInfo => ({ id: 1, key, panel, group: "g", label: "step", better: null, unit: "" });

test("what is no regular expression is said, with the reason", () => {
  expect(searchProblem("/(/")).toMatch(/^\/\(\/ is no regular expression: [A-Z].*\. Words without a slash/);
  expect(["", "loss (", "/loss$/", "/a/b"].map(searchProblem)).toEqual(["", "", "", ""]);
});

describe("a search", () => {
  test.each([
    ["loss", ["loss", "val_loss", "Loss"]],
    ["val loss", ["val_loss"]],
    ["/^loss$/", ["loss"]],
    ["/^LOSS$/i", ["loss", "Loss"]],
    ["/loss|acc", ["loss", "val_loss", "acc"]],
    ["/(", []],
  ])("%j finds %j", (search, found) => {
    const finds = finder(search);
    expect(["loss", "val_loss", "Loss", "acc"].filter((name) => finds(name))).toEqual(found);
  });

  test("finds words in any of several texts", () => {
    expect(finder("loss val")("val", "train_loss")).toBe(true);
    expect(finder("loss val")("train_loss")).toBe(false);
  });
});

describe("metrics that share a panel", () => {
  test("are those that the pattern finds, by their names or their panels'", () => {
    expect(placedBy(["loss/.*"], info("loss/head"))).toMatchObject({ key: "loss/head", panel: "loss/.*", group: "", label: "loss/head" });
    expect(placedBy(["loss/.*"], info("val_x", "loss/x")).panel).toBe("loss/.*");
    expect(placedBy(["loss/.*"], info("loss"))).toEqual(info("loss"));
    expect(placedBy(["^a", "b"], info("ab")).panel).toBe("^a");
    expect(placedBy([], info("loss"))).toEqual(info("loss"));
  });

  test.each(["loss", "val loss", "/loss\\/.*/", "/^a|b$/", "a.b", "x[0]"])("are those that the search %j finds", (search) => {
    const pattern = patternFor(search) as string;
    const finds = finder(search);
    for (const name of ["loss", "val_loss", "loss/a", "a", "b", "ab", "a.b", "axb", "x[0]", "x0", "c"]) {
      expect([name, placedBy([pattern], info(name)).panel === pattern && name !== pattern], search).toEqual([name, finds(name) && name !== pattern]);
    }
  });

  test("are none for an empty search", () => {
    expect(patternFor(" ")).toBeNull();
  });
});
