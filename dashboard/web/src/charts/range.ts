// The range of a panel's y axis as it is typed.

import type { Ends } from "./fit";

/** Read the ends of a range; empty ones are by the values. Returns what is wrong with them, and what is legal, as a text. */
export function readRange(min: string, max: string, isLog: boolean): Ends | string {
  const typed = [min.trim(), max.trim()];
  const ends = typed.map((text) => (text === "" ? null : Number(text)));
  for (const [index, end] of ends.entries()) {
    if (end === null) continue;
    if (!Number.isFinite(end)) return `${typed[index]} is no number: give one such as 0.1 or 1e-3, or none.`;
    if (isLog && end <= 0) return `${typed[index]} has no place on a logarithmic axis: give a number above 0, or none.`;
  }
  const [least, greatest] = ends as [number | null, number | null];
  if (least !== null && greatest !== null && least >= greatest) {
    return `${typed[0]} to ${typed[1]} is no range: the first number must be less than the second.`;
  }
  return { min: least, max: greatest };
}
