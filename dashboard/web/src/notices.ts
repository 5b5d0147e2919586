// Notices above the content: what a viewer should know and may not see otherwise.

import { h, iconButton, setText } from "./dom";
import type { Action, Notice } from "./states";

export class Notices {
  readonly element = h("div", { class: "notices" });
  readonly #act: (action: Action["id"]) => void;
  /** Ids of notices that the viewer has closed. */
  readonly #closed = new Set<string>();
  readonly #items = new Map<string, HTMLElement>();
  #shown = "";

  constructor(act: (action: Action["id"]) => void) {
    this.#act = act;
  }

  update(all: Notice[]): void {
    const notices = all.filter(({ id }) => !this.#closed.has(id));
    const shown = JSON.stringify(notices);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const items = notices.map((notice) => this.#item(notice));
    // A notice that stays is not touched: its traceback may be unfolded, its button may have the focus.
    for (const [key, item] of this.#items) {
      if (items.includes(item)) continue;
      item.remove();
      this.#items.delete(key);
    }
    items.forEach((item, index) => {
      const there = this.element.children[index] ?? null;
      if (there !== item) this.element.insertBefore(item, there);
    });
  }

  /** Return the element of a notice, the same one as long as only its words change. */
  #item(notice: Notice): HTMLElement {
    const key = JSON.stringify([notice.id, notice.actions, notice.details]);
    const item = this.#items.get(key) ?? this.#build(notice);
    this.#items.set(key, item);
    for (const [place, text] of [[".notice-title", notice.title], [".notice-text", notice.text]] as const) {
      const element = item.querySelector(place);
      if (element !== null) setText(element, text);
    }
    return item;
  }

  #build(notice: Notice): HTMLElement {
    const details = notice.details && [
      h("summary", {}, notice.details.summary),
      h("pre", { tabindex: 0, "aria-label": notice.details.summary }, notice.details.text),
    ];
    const close = (): void => {
      this.#closed.add(notice.id);
      item.remove();
    };
    const item = h(
      "div",
      { class: "notice", "data-tone": notice.tone },
      h("i", { class: "dot", "aria-hidden": "true" }),
      h(
        "div",
        { class: "notice-body" },
        h("strong", { class: "notice-title" }),
        " ",
        h("span", { class: "notice-text" }),
        details && h("details", { class: "traceback" }, ...details),
      ),
      ...notice.actions.map(({ id, label }) =>
        h("button", { type: "button", class: "button small", onclick: () => this.#act(id) }, label),
      ),
      notice.closable && iconButton("close", `Close: ${notice.title}`, close),
    );
    return item;
  }
}
