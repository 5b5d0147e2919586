// Dots on the curves of a plot, where its cursor is.

import { h, show } from "../dom";

/** A place from 0 to 1 along both axes, from the lower left; and a colour of the style sheet. */
export interface Dot {
  x: number;
  y: number;
  colour: string;
}

export class Dots {
  readonly element = h("div", { class: "chart-dots" });
  readonly #dots: HTMLElement[] = [];

  /** Show these, those of them that are inside of a plot of some size in CSS pixels. */
  show(dots: readonly Dot[], { width, height }: { width: number; height: number }): void {
    while (this.#dots.length < dots.length) {
      const made = h("div", { class: "chart-dot" });
      this.element.append(made);
      this.#dots.push(made);
    }
    this.#dots.forEach((element, position) => {
      const { x, y, colour } = dots[position] ?? { x: NaN, y: NaN, colour: "" };
      const inside = x >= 0 && x <= 1 && y >= 0 && y <= 1;
      show(element, inside);
      if (!inside) return;
      element.style.background = colour;
      element.style.transform = `translate(${x * width}px, ${(1 - y) * height}px)`;
    });
  }
}
