// The rows of the list of runs, as the server has sent them.

import type { RunRow, Rows } from "../protocol";

export class RunStore {
  readonly rows = new Map<string, RunRow>();
  /** Whether the server's first answer of this connection is here as a whole. */
  complete = false;
  /** How many runs the server has. */
  total = 0;
  /** Grows with each message. */
  version = 0;
  /** Keys of the connection before that this one has not confirmed. */
  #old = new Set<string>();

  /** The list is asked for anew: what was known stays in sight until the answer is complete. */
  begin(): void {
    this.complete = false;
    this.#old = new Set(this.rows.keys());
  }

  apply(message: Rows): void {
    for (const row of message.rows) {
      this.rows.set(row.key, row);
      this.#old.delete(row.key);
    }
    for (const key of message.removed) this.rows.delete(key);
    if (!this.complete && !message.more) {
      for (const key of this.#old) this.rows.delete(key);
      this.#old.clear();
      this.complete = true;
    }
    this.total = Math.max(message.total, this.rows.size);
    this.version += 1;
  }

  /** Names that several runs have. */
  shared(): Set<string> {
    const seen = new Set<string>();
    const shared = new Set<string>();
    for (const { name } of this.rows.values()) (seen.has(name) ? shared : seen).add(name);
    return shared;
  }
}
