// Metrics that share a panel because the viewer wants it: those that a search finds, by their names or their panels'.

import type { SeriesInfo } from "../protocol";
import { finder } from "../search";

/** Return a curve as it is placed: in the panel of the first search that finds it, under its whole name. */
export function placedBy(joined: readonly string[], info: SeriesInfo): SeriesInfo {
  const search = joined.find((each) => finder(each).finds(info.key, info.panel));
  return search === undefined ? info : { ...info, panel: search, group: "", label: info.key };
}
