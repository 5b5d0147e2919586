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

/** The part between slashes and the flags of `/loss$/i`, the last slash of which may be missing; null if it is no such text. */
function slashed(search: string): readonly [string, string] | null {
  const found = /^\/(.+)\/(i?)$/.exec(search.trim()) ?? /^\/(.+)$/.exec(search.trim());
  return found ? [found[1] as string, found[2] ?? ""] : null;
}

/** Read a regular expression between slashes; null if it is none. */
export function patternOf(search: string): RegExp | null {
  const found = slashed(search);
  return found && expression(...found);
}

/** Why nothing can be searched for; empty if it can. */
export function searchProblem(search: string): string {
  const found = slashed(search);
  if (found === null) return "";
  try {
    new RegExp(...found);
    return "";
  } catch (error) {
    const reason = (error as Error).message.split(": ").pop();
    return `${search.trim()} is no regular expression: ${reason}. Words without a slash find names that have them.`;
  }
}

/** Return whether a text, or one of several, has what is searched for. */
export function finder(search: string): (...texts: string[]) => boolean {
  if (searchProblem(search) !== "") return () => false;
  const pattern = patternOf(search);
  if (pattern) return (...texts) => texts.some((text) => pattern.test(text));
  const words = wordsOf(search);
  return (...texts) => words.every((word) => texts.some((text) => text.toLowerCase().includes(word)));
}
