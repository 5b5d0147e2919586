// Searching, the same everywhere on the page: a text is found that has all of the words, or that a regular expression
// between slashes finds, in upper or lower case. The list of runs has conditions as well (`runs/filter.ts`).

import { h } from "./dom";
import { Pattern } from "./pattern";

export function searchField(label: string, searched: () => void): HTMLInputElement {
  return h("input", {
    type: "search",
    class: "input search",
    placeholder: label,
    "aria-label": label,
    autocomplete: "off",
    spellcheck: "false",
    oninput: searched,
  });
}

export interface Finder {
  /** Whether a text, or one of several, has what is searched for; none has what means nothing. */
  finds(...texts: string[]): boolean;
  /** Why the search means nothing; empty if it does. */
  problem: string;
}

/** What was searched for last: an expression learns the texts that it has seen. */
const finders = new Map<string, Finder>();
const FINDERS_KEPT = 50;

/** Read a search. The last slash of an expression may be missing. */
export function finder(search: string): Finder {
  const known = finders.get(search);
  if (known) return known;
  if (finders.size >= FINDERS_KEPT) finders.clear();
  const found = read(search.trim());
  finders.set(search, found);
  return found;
}

function read(search: string): Finder {
  const [, closed, open] = /^\/(?:(.+)\/i?|(.+))$/s.exec(search) ?? [];
  const source = closed ?? open;
  if (source === undefined) {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    return { finds: (...texts) => words.every((word) => texts.some((text) => text.toLowerCase().includes(word))), problem: "" };
  }
  try {
    const pattern = new Pattern(source);
    return { finds: (...texts) => texts.some((text) => pattern.isIn(text)), problem: "" };
  } catch (error) {
    return { finds: () => false, problem: `${search} cannot be searched for: ${(error as Error).message}. Words without a slash find names that have them.` };
  }
}
