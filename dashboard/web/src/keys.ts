// Keys of the page, and the list of them that `?` shows.

import { button, dialog, h } from "./dom";
import { storage } from "./storage";

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

const STORAGE_KEY = "offloop.shortcuts";

export class Keys {
  readonly dialog: HTMLDialogElement;
  readonly #keys: readonly Key[];
  #enabled = storage.getItem(STORAGE_KEY) !== "off";

  constructor(keys: readonly Key[], others: readonly ListedKey[] = []) {
    this.#keys = keys;
    // People who speak to their computer trigger single letters by accident: they can be switched off.
    const enabled = h("input", { type: "checkbox", onchange: () => this.#setEnabled(enabled.checked) });
    enabled.checked = this.#enabled;
    const listed = [{ keys: ["?"], does: "Show or hide this list" }, ...keys, ...others];
    this.dialog = dialog(
      "keys",
      h("h2", {}, "Keys"),
      h(
        "dl",
        { class: "keys-list" },
        ...listed.map(({ keys: names, does }) =>
          h("div", {}, h("dt", {}, ...names.map((name) => h("kbd", {}, shown(name)))), h("dd", {}, does)),
        ),
      ),
      h("label", { class: "check" }, enabled, h("span", {}, "Keys of a single character are on")),
      h("div", { class: "dialog-buttons" }, button("Close", { onclick: () => this.dialog.close() })),
    );
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
    storage.setItem(STORAGE_KEY, on ? "on" : "off");
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
