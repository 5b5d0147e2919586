// In place of a run: why there is none to show, and what to do.

import { copyText } from "./clipboard";
import { button, h, setText, show } from "./dom";
import type { Action, Described } from "./states";

export class Stage {
  readonly element: HTMLElement;
  readonly #title = h("h2");
  readonly #text = h("p");
  readonly #line = h("code", { class: "stage-line" });
  readonly #copy = button("Copy", { class: "button small", onclick: () => void this.#copied() });
  readonly #lineRow = h("div", { class: "stage-copy" }, this.#line, this.#copy);
  readonly #action = h("button", { type: "button", class: "button", onclick: () => this.#actionId && this.#act(this.#actionId) });
  readonly #act: (action: Action["id"]) => void;
  #actionId: Action["id"] | null = null;

  constructor(act: (action: Action["id"]) => void) {
    this.#act = act;
    this.element = h("section", { class: "stage", hidden: true }, this.#title, this.#text, this.#lineRow, this.#action);
  }

  update(stage: Described["stage"], isShown: boolean): void {
    show(this.element, isShown);
    setText(this.#title, stage?.title ?? "");
    setText(this.#text, stage?.text ?? "");
    if (this.#line.textContent !== (stage?.line ?? "")) setText(this.#copy, "Copy");
    setText(this.#line, stage?.line ?? "");
    show(this.#lineRow, stage?.line !== undefined);
    const [action] = stage?.actions ?? [];
    this.#actionId = action?.id ?? null;
    setText(this.#action, action?.label ?? "");
    show(this.#action, action !== undefined);
  }

  async #copied(): Promise<void> {
    if (await copyText(this.#line.textContent ?? "")) setText(this.#copy, "Copied");
    else getSelection()?.selectAllChildren(this.#line); // then one key copies it
  }
}
