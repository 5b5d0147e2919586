import { expect, test } from "vitest";
import { Pattern } from "../src/pattern";
import { CASES } from "./cases";

test.each(CASES.patterns)("/%s/ in %j: %s", (source, text, isFound) => {
  expect(new Pattern(source).isIn(text)).toBe(isFound);
});

test.each(CASES.broken)("/%s/ is refused: %s", (source, why) => {
  expect(() => new Pattern(source)).toThrow(new Error(why));
});

test.each(["^(a+)+$", "^(a|a)*$", "^a*a*a*a*a*a*a*a*$", "^(a|aa)+$", "(\\w+\\w+)+!", "(.*)(.*)(.*)x$"])("/%s/ comes to an end", (source) => {
  const pattern = new Pattern(source);
  for (const end of "b-") expect(pattern.isIn("a".repeat(10_000) + end)).toBe(false);
});
