// How the viewer wants the list of runs, remembered between visits.

import type { PageStorage } from "../storage";
import type { Field } from "./fields";

export interface Preferences {
  /** Whether the side bar is open; null: if there are several runs. */
  open: boolean | null;
  /** Its width in CSS pixels; 0 for as usual. */
  width: number;
  sort: Field;
  descending: boolean;
  /** Fields beside the name. */
  columns: Field[];
  /** Whether archived runs are listed. */
  archived: boolean;
  /** Whether the page lays no other run over the one it shows by itself. */
  latestOnly: boolean;
}

export const USUAL: Readonly<Preferences> = Object.freeze({
  open: null,
  width: 0,
  sort: "started",
  descending: true,
  columns: ["spark", "last", "best"],
  archived: false,
  latestOnly: false,
});
const STORAGE_KEY = "offloop.runs.2";
export const LEAST_WIDTH = 220;
const MOST_COLUMNS = 40;

/** Make preferences of whatever was stored. */
export function sanePreferences(raw: unknown): Preferences {
  const stored = (typeof raw === "object" && raw !== null ? raw : {}) as Partial<Record<keyof Preferences, unknown>>;
  const columns = Array.isArray(stored.columns) ? stored.columns.filter((each): each is string => typeof each === "string") : null;
  const width = Number(stored.width);
  return {
    open: typeof stored.open === "boolean" ? stored.open : null,
    width: width >= LEAST_WIDTH ? Math.min(width, 4_000) : 0,
    sort: typeof stored.sort === "string" ? stored.sort : USUAL.sort,
    descending: typeof stored.descending === "boolean" ? stored.descending : USUAL.descending,
    columns: columns === null ? [...USUAL.columns] : [...new Set(columns)].slice(0, MOST_COLUMNS),
    archived: stored.archived === true,
    latestOnly: stored.latestOnly === true,
  };
}

export function readPreferences(storage: PageStorage): Preferences {
  try {
    return sanePreferences(JSON.parse(storage.getItem(STORAGE_KEY) ?? "{}"));
  } catch {
    return sanePreferences({}); // damaged: as usual then
  }
}

export function writePreferences(storage: PageStorage, preferences: Preferences): void {
  storage.setItem(STORAGE_KEY, JSON.stringify(preferences));
}
