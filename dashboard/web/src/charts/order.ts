// The order of groups and panels: the loss first, then what training and validation measure, such as accuracy, the
// learning rate, other metrics, and groups by name. What the machine uses has an order of its own. Neither depends on
// what came first.

import type { SeriesInfo } from "../protocol";

/** A panel, as far as its place depends on it. */
export interface Placed {
  readonly name: string;
  readonly curves: readonly { readonly info: SeriesInfo }[];
}

/** Groups of the System tab, as dashboard/curves/panels.py names them, in their order. */
const SYSTEM = ["Machine", "GPU", "Training", "Callbacks"];

/** Compare two groups: the one without a name, others by name. */
export function compareGroups(one: string, other: string): number {
  return rankOfGroup(one) - rankOfGroup(other) || one.localeCompare(other, "en", { numeric: true });
}

/** Compare two panels of a group; those of one rank stay as they came. */
export function comparePanels(one: Placed, other: Placed): number {
  return rankOf(one) - rankOf(other);
}

function rankOfGroup(group: string): number {
  return group === "" ? -1 : SYSTEM.indexOf(group) + 1 || SYSTEM.length + 1;
}

function rankOf({ name, curves }: Placed): number {
  if (name.includes("/")) return 3;
  if (/(^|_)loss$/i.test(name)) return 0;
  if (curves.some(({ info }) => info.better !== null || info.label === "train" || info.label === "val")) return 1;
  return name === "lr" ? 2 : 3;
}
