// Metrics that share a panel because the viewer wants it: those that a regular expression finds by their names, in
// upper or lower case, or by their panels'.

import type { SeriesInfo } from "../protocol";
import { expression, patternOf, wordsOf } from "../search";

/** Return a curve as it is placed: in the panel of the first pattern that finds it, under its whole name. */
export function placedBy(joined: readonly string[], info: SeriesInfo): SeriesInfo {
  const pattern = joined.find((source) => {
    const regex = expression(source, "i");
    return regex !== null && (regex.test(info.key) || regex.test(info.panel));
  });
  return pattern === undefined ? info : { ...info, panel: pattern, group: "", label: info.key };
}

/** The pattern that finds what a search finds; null for an empty search. */
export function patternFor(search: string): string | null {
  const regex = patternOf(search);
  if (regex) return regex.source.replaceAll("\\/", "/");
  const words = wordsOf(search).map((word) => word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  if (words.length <= 1) return words[0] ?? null;
  return `^${words.map((word) => `(?=.*${word})`).join("")}`;
}
