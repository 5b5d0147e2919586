// The page's icon: a square in the colour of the state, in it the loss of the last steps or a sign, and around it
// how much of the run is done.

import type { Sign } from "./states";

const SIZE = 32;
const COLOURS: Record<Sign, string> = {
  none: "#71717a", live: "#2563eb", paused: "#b45309", good: "#15803d", stopped: "#52525b", bad: "#dc2626", warn: "#b45309",
};

export class Favicon {
  readonly #link: HTMLLinkElement;
  readonly #canvas = document.createElement("canvas");
  #shown = "";
  #address: string | null = null;

  constructor() {
    this.#canvas.width = this.#canvas.height = SIZE;
    const link = document.querySelector<HTMLLinkElement>("link[rel=icon]");
    this.#link = link ?? document.head.appendChild(document.createElement("link"));
    this.#link.rel = "icon";
  }

  update(sign: Sign, losses: readonly number[], progress: number | null): void {
    const turned = progress === null ? 0 : Math.round(progress * 32) / 32;
    const shown = JSON.stringify([sign, turned, sign === "live" ? losses : null]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const context = this.#canvas.getContext("2d");
    if (context === null) return;
    draw(context, sign, losses, turned);
    this.#canvas.toBlob((blob) => {
      if (blob === null || shown !== this.#shown) return;
      const old = this.#address;
      this.#address = URL.createObjectURL(blob);
      this.#link.type = "image/png";
      this.#link.href = this.#address;
      if (old !== null) URL.revokeObjectURL(old);
    });
  }
}

function draw(context: CanvasRenderingContext2D, sign: Sign, losses: readonly number[], progress: number): void {
  context.clearRect(0, 0, SIZE, SIZE);
  context.fillStyle = COLOURS[sign];
  context.beginPath();
  context.roundRect(0, 0, SIZE, SIZE, 8);
  context.fill();
  context.strokeStyle = context.fillStyle = "#fff";
  context.lineWidth = 3.5;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  if (sign === "live" && losses.length > 1) curve(context, losses);
  else SIGNS[sign](context);
  context.stroke();
  if (progress > 0 && progress < 1) {
    context.globalAlpha = 0.9;
    context.fillRect(0, SIZE - 4, SIZE * progress, 4);
    context.globalAlpha = 1;
  }
}

const SIGNS: Record<Sign, (context: CanvasRenderingContext2D) => void> = {
  none: (context) => path(context, [9, 16], [9, 16], null, [16, 16], [16, 16], null, [23, 16], [23, 16]),
  live: (context) => path(context, [6, 9], [13, 19], [26, 22]),
  paused: (context) => path(context, [12, 10], [12, 22], null, [20, 10], [20, 22]),
  good: (context) => path(context, [8, 17], [14, 23], [24, 10]),
  stopped: (context) => context.fillRect(10, 10, 12, 12),
  bad: (context) => path(context, [10, 10], [22, 22], null, [22, 10], [10, 22]),
  warn: (context) => path(context, [16, 8], [16, 17], null, [16, 24], [16, 24]),
};

function path(context: CanvasRenderingContext2D, ...points: ([number, number] | null)[]): void {
  let begins = true;
  for (const point of points) {
    if (point !== null && begins) context.moveTo(...point);
    else if (point !== null) context.lineTo(...point);
    begins = point === null;
  }
}

function curve(context: CanvasRenderingContext2D, losses: readonly number[]): void {
  const least = Math.min(...losses);
  const span = Math.max(...losses) - least || 1;
  const points = losses.map((loss, index): [number, number] => [
    4 + (index * (SIZE - 8)) / (losses.length - 1),
    24 - ((loss - least) / span) * 17,
  ]);
  path(context, ...points);
}
