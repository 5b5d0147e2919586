// A plot: a canvas in its element, with a cursor, and what the mouse does on it. It knows places in pixels only; what
// is drawn, and what a place means, is its host's business.

import { h } from "../dom";
import type { Box } from "./trace";

/** Part of a plot in CSS pixels from its upper left corner. */
export interface Selection {
  left: number;
  top: number;
  width: number;
  height: number;
}

export interface PlotHost {
  draw(): void;
  /** The mouse is so far from the left, in CSS pixels; null: it has left. */
  hovered(left: number | null): void;
  selected(selection: Selection): void;
  doubleClicked(): void;
}

/** Room around the plot, in CSS pixels. */
const TOP = 8;
const RIGHT = 16;
/** A mouse that has moved less while it was down has clicked, in CSS pixels. */
const CLICK = 4;
/** A drag selects along both axes only where it is that long along both, in CSS pixels. */
const BOTH = 60;

export class Plot {
  readonly root: HTMLElement;
  /** The part with the curves. */
  readonly over = h("div", { class: "plot-over" });
  readonly ctx: CanvasRenderingContext2D;
  /** Size of all of it, in CSS pixels. */
  width = 0;
  height = 0;
  readonly #canvas = h("canvas");
  readonly #cursor = h("div", { class: "plot-cursor", hidden: true });
  readonly #select = h("div", { class: "plot-select", hidden: true });
  readonly #host: PlotHost;
  #room = { left: 44, bottom: 22 };
  #ratio = 1;
  #end: (() => void) | null = null;

  constructor(parent: HTMLElement, host: PlotHost) {
    this.#host = host;
    // Opaque: browsers draw that faster.
    this.ctx = this.#canvas.getContext("2d", { alpha: false }) as CanvasRenderingContext2D;
    this.over.append(this.#select, this.#cursor);
    this.root = h("div", { class: "plot" }, this.#canvas, this.over);
    parent.append(this.root);
    this.over.addEventListener("mousemove", (event) => host.hovered(this.#placeOf(event).x));
    this.over.addEventListener("mouseleave", () => host.hovered(null));
    this.over.addEventListener("dblclick", () => host.doubleClicked());
    this.over.addEventListener("mousedown", (event) => this.#pressed(event));
    this.setSize(Math.max(parent.clientWidth, 60), Math.max(parent.clientHeight, 60));
  }

  /** Where curves are drawn, in device pixels. */
  get box(): Box {
    const { width, height } = this.size;
    const ratio = this.#ratio;
    return { left: this.#room.left * ratio, top: TOP * ratio, width: width * ratio, height: height * ratio };
  }

  get ratio(): number {
    return this.#ratio;
  }

  /** Size of the part with the curves, in CSS pixels; known without asking the browser to lay anything out. */
  get size(): { width: number; height: number } {
    return {
      width: Math.max(10, this.width - this.#room.left - RIGHT),
      height: Math.max(10, this.height - this.#room.bottom - TOP),
    };
  }

  /** Returns whether it had another size; then its canvas is empty until it is drawn. */
  setSize(width: number, height: number): boolean {
    if (width === this.width && height === this.height && this.#ratio === devicePixelRatio) return false;
    [this.width, this.height, this.#ratio] = [width, height, devicePixelRatio];
    this.#canvas.width = Math.round(width * this.#ratio);
    this.#canvas.height = Math.round(height * this.#ratio);
    this.#canvas.style.width = `${width}px`;
    this.#canvas.style.height = `${height}px`;
    this.#place();
    return true;
  }

  /** Leave so much room for the axes, in CSS pixels. */
  setRoom(left: number, bottom: number): void {
    if (left === this.#room.left && bottom === this.#room.bottom) return;
    this.#room = { left, bottom };
    this.#place();
  }

  /** Show the cursor at a place, in CSS pixels from the left; null for nowhere. */
  setCursor(left: number | null): void {
    if (this.#cursor.hidden !== (left === null)) this.#cursor.hidden = left === null;
    if (left !== null) this.#cursor.style.transform = `translateX(${Math.round(left)}px)`;
  }

  draw(): void {
    if (this.#ratio !== devicePixelRatio) this.setSize(this.width, this.height);
    this.#host.draw();
  }

  destroy(): void {
    this.#end?.();
    this.root.remove();
  }

  #place(): void {
    const { width, height } = this.size;
    Object.assign(this.over.style, {
      left: `${this.#room.left}px`, top: `${TOP}px`, width: `${width}px`, height: `${height}px`,
    });
  }

  #placeOf({ clientX, clientY }: MouseEvent): { x: number; y: number } {
    const { left, top } = this.over.getBoundingClientRect();
    const { width, height } = this.size;
    return { x: Math.max(0, Math.min(width, clientX - left)), y: Math.max(0, Math.min(height, clientY - top)) };
  }

  /** The mouse is down: until it is up, it selects. */
  #pressed(event: MouseEvent): void {
    if (event.button !== 0 || event.detail > 1) return;
    event.preventDefault(); // no text is selected
    const begin = this.#placeOf(event);
    let selection: Selection | null = null;
    const moved = (now: MouseEvent): void => {
      selection = this.#selection(begin, this.#placeOf(now));
      this.#select.hidden = selection === null;
      const { left = 0, top = 0, width = 0, height = 0 } = selection ?? {};
      Object.assign(this.#select.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
    };
    const up = (): void => {
      this.#end?.();
      if (selection !== null) this.#host.selected(selection);
    };
    this.#end = () => {
      this.#select.hidden = true;
      window.removeEventListener("mousemove", moved);
      window.removeEventListener("mouseup", up);
      this.#end = null;
    };
    window.addEventListener("mousemove", moved);
    window.addEventListener("mouseup", up);
  }

  #selection(from: { x: number; y: number }, to: { x: number; y: number }): Selection | null {
    const { width, height } = this.size;
    const [across, down] = [Math.abs(to.x - from.x), Math.abs(to.y - from.y)];
    if (Math.max(across, down) < CLICK) return null;
    const both = across >= BOTH && down >= BOTH;
    const alongX = both || across >= down;
    const alongY = both || down > across;
    return {
      left: alongX ? Math.min(from.x, to.x) : 0,
      width: alongX ? across : width,
      top: alongY ? Math.min(from.y, to.y) : 0,
      height: alongY ? down : height,
    };
  }
}
