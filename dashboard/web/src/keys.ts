// Keys of the page, and the list of them that `?` shows.

import { h } from "./dom";

export interface Key {
  keys: readonly string[];
  does: string;
  run: () => void;
}

/** Keys that other parts handle, for the list. */
export interface ListedKey {
  keys: readonly string[];
  does: string;
}

const STORAGE_KEY = "offloop.keys";

export class Keys {
  readonly dialog: HTMLDialogElement;
  readonly #keys: readonly Key[];
  #enabled: boolean;

  constructor(keys: readonly Key[], others: readonly ListedKey[] = []) {
    this.#keys = keys;
    this.#enabled = readEnabled();
    // People who speak to their computer trigger single letters by accident: they can be switched off.
    const enabled = h("input", { type: "checkbox", onchange: () => this.#setEnabled(enabled.checked) });
    enabled.checked = this.#enabled;
    const listed = [{ keys: ["?"], does: "Show or hide this list" }, ...keys, ...others];
    this.dialog = h(
      "dialog",
      { class: "dialog keys", "aria-labelledby": "keys-heading" },
      h("h2", { id: "keys-heading" }, "Keys"),
      h(
        "dl",
        { class: "keys-list" },
        ...listed.map(({ keys: names, does }) =>
          h("div", {}, h("dt", {}, ...names.map((name) => h("kbd", {}, shown(name)))), h("dd", {}, does)),
        ),
      ),
      h("label", { class: "check" }, enabled, h("span", {}, "Keys of a single character are on")),
      h(
        "div",
        { class: "dialog-buttons" },
        h("button", { type: "button", class: "button", onclick: () => this.dialog.close() }, "Close"),
      ),
    );
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    document.addEventListener("keydown", (event) => this.#pressed(event));
  }

  toggle(): void {
    if (this.dialog.open) this.dialog.close();
    else this.dialog.showModal();
  }

  #pressed(event: KeyboardEvent): void {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
    if (!this.#enabled) return;
    if (event.key === "?") {
      event.preventDefault();
      this.toggle();
      return;
    }
    if (document.querySelector("dialog[open]") !== null) return;
    const key = this.#keys.find(({ keys }) => keys.includes(event.key));
    if (key === undefined) return;
    event.preventDefault();
    key.run();
  }

  #setEnabled(on: boolean): void {
    this.#enabled = on;
    try {
      localStorage.setItem(STORAGE_KEY, on ? "on" : "off");
    } catch {
      // The browser keeps storage from the page: it counts for this visit.
    }
  }
}

function readEnabled(): boolean {
  try {
    return localStorage.getItem(STORAGE_KEY) !== "off";
  } catch {
    return true;
  }
}

function isTyping(target: EventTarget | null): boolean {
  if (!(target instanceof HTMLElement)) return false;
  if (target instanceof HTMLInputElement) return !["checkbox", "radio", "button"].includes(target.type);
  return target.isContentEditable || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}

function shown(key: string): string {
  const names: Record<string, string> = { Escape: "Esc", ArrowLeft: "←", ArrowRight: "→" };
  return names[key] ?? key;
}
