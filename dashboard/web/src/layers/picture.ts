// A picture over the steps: a canvas with axes, and a place in it that the mouse or the arrow keys choose and a line of
// text reads out.

import { xTicks, yTicks, Scale } from "../charts/axes";
import type { Theme } from "../charts/theme";
import { h, setAttribute, setText, show } from "../dom";
import { compact } from "../format";
import { colouring, rowsAt, type ColourScale } from "./heat";

/** Pixels of CSS around the plot. */
const [LEFT, RIGHT, TOP, BOTTOM] = [62, 10, 6, 22];

export interface Area {
  width: number;
  height: number;
}

/** What a picture shows. Columns are measurements; lines run from the top. */
export interface Subject {
  steps: readonly number[];
  lines: number;
  /** Labels of the y axis, by their place from 0 at the top to 1. */
  labels: readonly [number, string][];
  /** Paint the plot, whose corner is at the origin. */
  paint(context: CanvasRenderingContext2D, area: Area): void;
  read(column: number, line: number): string;
  pick?(line: number): void;
}

export class Picture {
  readonly element: HTMLElement;
  readonly canvas = h("canvas", { role: "img", tabindex: "0" });
  readonly reading = h("p", { class: "layer-reading", "aria-live": "polite" });
  readonly title = h("span");
  readonly #cursor = h("i", { class: "layer-cursor", hidden: true });
  readonly #theme: () => Theme;
  #subject: Subject | null = null;
  #at: [number, number] | null = null;
  #hint = "";

  constructor(theme: () => Theme, height: number, ...controls: HTMLElement[]) {
    this.#theme = theme;
    this.canvas.style.height = `${height}px`;
    const plot = h("div", { class: "layer-plot" }, this.canvas, this.#cursor);
    this.element = h("figure", { class: "layer-picture" }, h("figcaption", {}, this.title, ...controls), plot, this.reading);
    this.canvas.addEventListener("pointermove", (event) => this.#pointed(event));
    this.canvas.addEventListener("pointerleave", () => this.#move(null));
    this.canvas.addEventListener("click", (event) => {
      this.#pointed(event);
      if (this.#at !== null) this.#subject?.pick?.(this.#at[1]);
    });
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show something; null for nothing. `summary` is what it is to who does not see it. */
  show(subject: Subject | null, title: string, summary: string, hint = ""): void {
    this.#subject = subject;
    this.#hint = hint;
    show(this.element, subject !== null);
    setText(this.title, title);
    setAttribute(this.canvas, "aria-label", summary);
    if (subject === null) return;
    if (this.#at !== null && (this.#at[0] >= subject.steps.length || this.#at[1] >= subject.lines)) this.#at = null;
    this.draw();
    this.#move(this.#at);
  }

  draw(): void {
    const subject = this.#subject;
    const box = this.canvas.getBoundingClientRect();
    if (subject === null || box.width < LEFT + RIGHT + 20) return;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
    const context = this.canvas.getContext("2d") as CanvasRenderingContext2D;
    const theme = this.#theme();
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, box.width, box.height);
    const area = { width: box.width - LEFT - RIGHT, height: box.height - TOP - BOTTOM };
    context.font = `11px ${theme.font}`;
    context.fillStyle = theme.faint;
    const { from, to } = rowsAt(subject.steps, 1);
    context.textAlign = "center";
    const ticks = xTicks("step", new Scale(from, to), Math.max(2, area.width / 90));
    ticks.values.forEach((value, index) => {
      context.fillText(ticks.labels[index] as string, LEFT + ((value - from) / (to - from)) * area.width, box.height - 7);
    });
    context.textAlign = "right";
    for (const [place, label] of subject.labels) {
      context.fillText(label, LEFT - 6, TOP + Math.min(Math.max(place * area.height + 4, 8), area.height));
    }
    context.save();
    context.translate(LEFT, TOP);
    context.beginPath();
    context.rect(0, 0, area.width, area.height);
    context.clip();
    subject.paint(context, area);
    context.restore();
  }

  #pointed(event: MouseEvent): void {
    const subject = this.#subject;
    if (subject === null || subject.steps.length === 0) return;
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    const y = (event.clientY - box.top - TOP) / (box.height - TOP - BOTTOM);
    if (!(x >= 0 && x <= 1 && y >= 0 && y <= 1)) return this.#move(null);
    const columns = rowsAt(subject.steps, 1_000).rows;
    const line = Math.min(subject.lines - 1, Math.floor(y * subject.lines));
    this.#move([columns[Math.min(999, Math.floor(x * 1_000))] as number, line]);
  }

  #key(event: KeyboardEvent): void {
    const subject = this.#subject;
    if (subject === null) return;
    const moves: Record<string, [number, number]> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (move !== undefined) {
      const [column, line] = this.#at ?? [subject.steps.length - 1 - move[0], (subject.lines >> 1) - move[1]];
      const within = (value: number, count: number): number => Math.min(count - 1, Math.max(0, value));
      this.#move([within(column + move[0], subject.steps.length), within(line + move[1], subject.lines)]);
    } else if (event.key === "Enter" && this.#at !== null) {
      subject.pick?.(this.#at[1]);
    } else if (event.key === "Escape" && this.#at !== null) {
      this.#move(null);
    } else return;
    event.preventDefault();
  }

  #move(at: [number, number] | null): void {
    const subject = this.#subject;
    this.#at = at;
    show(this.#cursor, at !== null);
    setText(this.reading, at === null || subject === null ? this.#hint : subject.read(...at));
    if (at === null || subject === null) return;
    const { from, to } = rowsAt(subject.steps, 1);
    const x = ((subject.steps[at[0]] as number) - from) / (to - from);
    const y = (at[1] + 0.5) / subject.lines;
    this.#cursor.style.left = `calc(${LEFT}px + ${x} * (100% - ${LEFT + RIGHT}px))`;
    this.#cursor.style.top = `calc(${TOP}px + ${y} * (100% - ${TOP + BOTTOM}px))`;
  }
}

export interface HeatImage {
  steps: readonly number[];
  lines: number;
  /** The number at a column and a line from the top. */
  value(column: number, line: number): number;
  scale: ColourScale;
  table: Uint8Array;
  /** What is not finite, as `rgb(...)`. */
  alert: string;
}

/** Paint numbers as colours. */
export function paintHeat(context: CanvasRenderingContext2D, { width, height }: Area, image: HeatImage): void {
  const { lines, scale, table } = image;
  const [red, green, blue] = (image.alert.match(/[\d.]+/g) ?? []).map(Number);
  const columns = Math.max(1, Math.round(width * (window.devicePixelRatio || 1)));
  const { rows } = rowsAt(image.steps, columns);
  const pixels = new ImageData(columns, lines);
  const words = new Uint32Array(pixels.data.buffer);
  const word = (r: number, g: number, b: number): number => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const palette = Uint32Array.from({ length: 256 }, (_, index) =>
    word(table[3 * index] as number, table[3 * index + 1] as number, table[3 * index + 2] as number),
  );
  const bad = word(red ?? 255, green ?? 0, blue ?? 0);
  const column = new Uint32Array(lines);
  const colourOf = colouring(scale);
  let painted = -1;
  for (let x = 0; x < columns; x++) {
    const row = rows[x] as number;
    if (row !== painted) {
      for (let line = 0; line < lines; line++) {
        const colour = colourOf(image.value(row, line));
        column[line] = colour < 0 ? 0 : colour > 255 ? bad : (palette[colour] as number);
      }
      painted = row;
    }
    for (let line = 0; line < lines; line++) words[line * columns + x] = column[line] as number;
  }
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = lines;
  (canvas.getContext("2d") as CanvasRenderingContext2D).putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, width, height);
}

/** A strip with the colours and the numbers at its ends. */
export class Legend {
  readonly #strip = h("canvas", { width: "96", height: "1", "aria-hidden": "true" });
  readonly #low = h("span");
  readonly #high = h("span");
  readonly element = h("span", { class: "layer-legend" }, this.#low, this.#strip, this.#high);

  show(table: Uint8Array, low: string, high: string): void {
    const pixels = new ImageData(96, 1);
    for (let x = 0; x < 96; x++) {
      const index = 3 * Math.round((x / 95) * 255);
      pixels.data.set([table[index] as number, table[index + 1] as number, table[index + 2] as number, 255], 4 * x);
    }
    (this.#strip.getContext("2d") as CanvasRenderingContext2D).putImageData(pixels, 0, 0);
    setText(this.#low, low);
    setText(this.#high, high);
  }
}

/** A curve: a number for each step, NaN where there is none. */
export interface Curve {
  name: string;
  values: readonly number[];
  colour: string;
  dash?: number[];
}

/** Curves over the steps, with an optional band from the first to the second of `band`. */
export function curves(steps: readonly number[], lines: readonly Curve[], band?: readonly [number[], number[]]): Subject | null {
  const finite = [...lines.map(({ values }) => values), ...(band ?? [])].flat().filter(Number.isFinite);
  if (finite.length === 0) return null;
  let [low, high] = [Infinity, -Infinity];
  for (const value of finite) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (low === high) [low, high] = [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
  const scale = new Scale(low, high);
  const ticks = yTicks(scale, 3);
  const { from, to } = rowsAt(steps, 1);
  return {
    steps,
    lines: 1,
    labels: ticks.values.map((value, index) => [1 - scale.toUnit(value), ticks.labels[index] as string]),
    paint: (context, { width, height }) => {
      const x = (index: number): number => (((steps[index] as number) - from) / (to - from)) * width;
      const y = (value: number): number => 3 + (1 - scale.toUnit(value)) * (height - 6);
      if (band !== undefined) {
        context.beginPath();
        const [bottom, top] = band;
        const known = steps.map((_, index) => index).filter((index) => Number.isFinite(bottom[index]) && Number.isFinite(top[index]));
        for (const index of known) context.lineTo(x(index), y(top[index] as number));
        for (const index of known.reverse()) context.lineTo(x(index), y(bottom[index] as number));
        context.globalAlpha = 0.2;
        context.fillStyle = lines[0]?.colour ?? "";
        context.fill();
        context.globalAlpha = 1;
      }
      context.lineWidth = 1.5;
      for (const { values, colour, dash } of lines) {
        context.strokeStyle = colour;
        context.setLineDash(dash ?? []);
        context.beginPath();
        // Callbacks measure at their own pace: steps without a value are passed over.
        values.forEach((value, index) => {
          if (Number.isFinite(value)) context.lineTo(x(index), y(value));
        });
        context.stroke();
      }
    },
    read: (column) =>
      `Step ${compact(steps[column])}: ${lines.map(({ name, values }) => `${name} ${tell(values[column] as number)}`).join(", ")}`,
  };
}

/** A measured number in words. */
export function tell(value: number): string {
  return Number.isNaN(value) ? "not measured" : Number.isFinite(value) ? compact(value) : "not finite";
}
