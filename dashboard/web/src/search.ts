// Searching, the same everywhere on the page: a text is found that has all of the words, in upper or lower case.

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

/** Return whether a text has what is searched for. */
export function finder(search: string): (text: string) => boolean {
  const words = wordsOf(search);
  return (text) => words.every((word) => text.toLowerCase().includes(word));
}
