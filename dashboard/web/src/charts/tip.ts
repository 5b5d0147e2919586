// What a mark at the foot of a plot is, beside it.

import { h, replaceChildren, show } from "../dom";

export class Tip {
  readonly element = h("div", { class: "chart-tip", "aria-hidden": "true", hidden: true });
  #shown = "";

  /** Show texts at a place, in CSS pixels from the left of a plot of some width; without texts, nothing. */
  say(texts: readonly string[], left: number, width: number): void {
    show(this.element, texts.length > 0);
    const shown = texts.join("\n");
    if (texts.length > 0 && shown !== this.#shown) replaceChildren(this.element, ...texts.map((text) => h("div", {}, text)));
    this.#shown = shown;
    // On the side that has more room
    const isRight = left > width / 2;
    this.element.style.maxWidth = `${Math.max(100, (isRight ? left : width - left) - 12)}px`;
    this.element.style.left = isRight ? "auto" : `${left + 8}px`;
    this.element.style.right = isRight ? `${width - left + 8}px` : "auto";
  }
}
