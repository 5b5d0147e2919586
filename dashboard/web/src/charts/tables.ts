// The tables below panels that are open, and when they are made anew.

import type { Panel, PanelHost } from "./panel";
import { showTable } from "./table";

/** Milliseconds between two of them. */
const INTERVAL = 1_000;

export class Tables {
  readonly #host: () => PanelHost;
  readonly #open = new Map<Panel, HTMLElement>();
  #refreshed = 0;

  constructor(host: () => PanelHost) {
    this.#host = host;
  }

  toggle(panel: Panel): void {
    const open = this.#open.get(panel);
    panel.tableButton.setAttribute("aria-expanded", String(!open));
    if (open) {
      this.#open.delete(panel);
      open.remove();
      return;
    }
    const table = showTable(panel, this.#host());
    this.#open.set(panel, table);
    panel.figure.append(table);
  }

  /** Once a second, and not while somebody reads: what is focused or under the mouse stays as it is. */
  refresh(): void {
    if (this.#open.size === 0 || performance.now() - this.#refreshed < INTERVAL) return;
    this.#refreshed = performance.now();
    for (const [panel, table] of this.#open) {
      if (!panel.visible || table.matches(":hover, :focus-within")) continue;
      const fresh = showTable(panel, this.#host());
      fresh.scrollTop = table.scrollTop;
      table.replaceWith(fresh);
      this.#open.set(panel, fresh);
    }
  }

  /** A panel goes. */
  forget(panel: Panel): void {
    this.#open.delete(panel);
  }
}
