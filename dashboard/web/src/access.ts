// The page's half of the right to connect. The cookie is the other one, and the browser sends it to every port of a
// host; localStorage belongs to one port. The server hands a key over in the address after `#`, once.

import type { PageStorage } from "./storage";

const STORAGE_KEY = "offloop.keys";
/** Servers that one address may lead to, one after the other, such as those of several machines behind `ssh -L`. */
const MOST_KEYS = 8;
const KEY = /^[0-9a-f]{32}$/;

export class Access {
  readonly #storage: PageStorage;
  /** Keys of this visit, where the browser stores nothing. */
  #taken: string[] = [];

  /** The key of a frame in a notebook is for that frame: stored, each kernel's would crowd out those of tabs. */
  readonly #isFramed: boolean;

  constructor(storage: PageStorage, isFramed = false) {
    this.#storage = storage;
    this.#isFramed = isFramed;
  }

  /** Take the key out of what stands after `#`, and return the rest. */
  take(hash: string): string {
    const fields = hash.replace(/^#/, "").split("&");
    const rest = fields.filter((field) => !field.startsWith("key="));
    if (rest.length === fields.length) return hash;
    const found = fields.filter((field) => field.startsWith("key=")).map((field) => field.slice("key=".length));
    const keys = [...found.filter((key) => KEY.test(key)), ...this.keys()];
    this.#taken = [...new Set(keys)].slice(0, MOST_KEYS);
    if (!this.#isFramed) this.#storage.setItem(STORAGE_KEY, this.#taken.join(","));
    return rest.length === 0 ? "" : `#${rest.join("&")}`;
  }

  /** The keys that the page has, newest first. Read anew each time: another tab may have been given one. */
  keys(): string[] {
    const stored = (this.#storage.getItem(STORAGE_KEY) ?? "").split(",").filter((key) => KEY.test(key));
    return [...new Set([...stored, ...this.#taken])].slice(0, MOST_KEYS);
  }
}
