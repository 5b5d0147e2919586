// Searching, the same everywhere on the page: a text is found that has all of the words, in upper or lower case, or
// that a regular expression between slashes finds.

import { h } from "./dom";

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

export function wordsOf(search: string): string[] {
  return search.toLowerCase().split(/\s+/).filter(Boolean);
}

/** Compile a regular expression; null if it is none. */
export function expression(pattern: string, flags = ""): RegExp | null {
  try {
    return new RegExp(pattern, flags);
  } catch {
    return null;
  }
}

/** Read a regular expression between slashes, such as `/loss$/i`, the last one of which may be missing; null if it is none. */
export function patternOf(search: string): RegExp | null {
  const found = /^\/(.+)\/(i?)$/.exec(search.trim()) ?? /^\/(.+)$/.exec(search.trim());
  return found ? expression(found[1] as string, found[2]) : null;
}

/** Return whether a text, or one of several, has what is searched for. */
export function finder(search: string): (...texts: string[]) => boolean {
  const pattern = patternOf(search);
  if (pattern) return (...texts) => texts.some((text) => pattern.test(text));
  const words = wordsOf(search);
  return (...texts) => words.every((word) => texts.some((text) => text.toLowerCase().includes(word)));
}
