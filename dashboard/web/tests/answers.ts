// What the page makes of many filters and regular expressions: tests/dashboard/test_run_filters.py compares it with what
// the command line makes of them.

import { readFileSync } from "node:fs";
import { Pattern } from "../src/pattern";
import { sortRows } from "../src/runs/fields";
import { foundBy } from "./cases";
import { row } from "./messages";

interface Questions {
  filters: string[];
  patterns: [string, string][];
  /** Names of runs to sort. */
  names: string[][];
}

function isIn([source, text]: [string, string]): boolean | string {
  try {
    return new Pattern(source).isIn(text);
  } catch (error) {
    return (error as Error).message;
  }
}

function inOrder(names: string[]): string[] {
  return sortRows(names.map((name) => row(name)), "id", false, 0).map(({ id }) => id);
}

const { filters, patterns, names } = JSON.parse(readFileSync(0, "utf8")) as Questions;
process.stdout.write(JSON.stringify({ filters: filters.map(foundBy), patterns: patterns.map(isIn), names: names.map(inOrder) }));
