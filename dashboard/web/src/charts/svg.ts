// A picture as SVG: what is drawn with the calls of a canvas becomes elements of a file.

/** The part of a canvas' context that charts draw with. */
export type Ink = Pick<
  CanvasRenderingContext2D,
  | "fillStyle" | "strokeStyle" | "globalAlpha" | "lineWidth" | "lineJoin" | "font" | "textAlign" | "textBaseline"
  | "save" | "restore" | "beginPath" | "moveTo" | "lineTo" | "arc" | "rect" | "clip" | "stroke" | "fill" | "fillRect"
  | "fillText" | "setLineDash" | "translate" | "rotate"
> & { measureText(text: string): { width: number } };

const ANCHORS: Record<string, string> = { left: "start", start: "start", center: "middle", right: "end", end: "end" };
const BASELINES: Record<string, string> = { top: "text-before-edge", middle: "central", bottom: "text-after-edge" };

interface State {
  fillStyle: string;
  strokeStyle: string;
  globalAlpha: number;
  lineWidth: number;
  lineJoin: CanvasLineJoin;
  font: string;
  textAlign: CanvasTextAlign;
  textBaseline: CanvasTextBaseline;
  dash: readonly number[];
  clip: number;
  transform: string;
}

export class SvgInk implements Ink {
  #state: State = {
    fillStyle: "#000", strokeStyle: "#000", globalAlpha: 1, lineWidth: 1, lineJoin: "miter", font: "10px sans-serif",
    textAlign: "start", textBaseline: "alphabetic", dash: [], clip: 0, transform: "",
  };
  readonly #saved: State[] = [];
  readonly #parts: string[] = [];
  readonly #clips: string[] = [];
  #path: string[] = [];

  /** `measure` says how wide a text is in a font. */
  constructor(
    readonly width: number,
    readonly height: number,
    readonly measure: (text: string, font: string) => number,
  ) {}

  get fillStyle(): string { return this.#state.fillStyle; }
  set fillStyle(value: string | CanvasGradient | CanvasPattern) { this.#state.fillStyle = String(value); }
  get strokeStyle(): string { return this.#state.strokeStyle; }
  set strokeStyle(value: string | CanvasGradient | CanvasPattern) { this.#state.strokeStyle = String(value); }
  get globalAlpha(): number { return this.#state.globalAlpha; }
  set globalAlpha(value: number) { this.#state.globalAlpha = value; }
  get lineWidth(): number { return this.#state.lineWidth; }
  set lineWidth(value: number) { this.#state.lineWidth = value; }
  get lineJoin(): CanvasLineJoin { return this.#state.lineJoin; }
  set lineJoin(value: CanvasLineJoin) { this.#state.lineJoin = value; }
  get font(): string { return this.#state.font; }
  set font(value: string) { this.#state.font = value; }
  get textAlign(): CanvasTextAlign { return this.#state.textAlign; }
  set textAlign(value: CanvasTextAlign) { this.#state.textAlign = value; }
  get textBaseline(): CanvasTextBaseline { return this.#state.textBaseline; }
  set textBaseline(value: CanvasTextBaseline) { this.#state.textBaseline = value; }

  save(): void {
    this.#saved.push({ ...this.#state });
  }

  restore(): void {
    this.#state = this.#saved.pop() ?? this.#state;
  }

  translate(x: number, y: number): void {
    this.#state.transform += ` translate(${round(x)} ${round(y)})`;
  }

  rotate(angle: number): void {
    this.#state.transform += ` rotate(${round((angle * 180) / Math.PI)})`;
  }

  setLineDash(dash: Iterable<number>): void {
    this.#state.dash = [...dash];
  }

  beginPath(): void {
    this.#path = [];
  }

  moveTo(x: number, y: number): void {
    this.#path.push(`M${round(x)} ${round(y)}`);
  }

  lineTo(x: number, y: number): void {
    // As on a canvas, a path may begin with a line.
    this.#path.push(`${this.#path.length === 0 ? "M" : "L"}${round(x)} ${round(y)}`);
  }

  rect(x: number, y: number, width: number, height: number): void {
    this.#path.push(`M${round(x)} ${round(y)}h${round(width)}v${round(height)}h${round(-width)}z`);
  }

  /** Whole circles only. */
  arc(x: number, y: number, radius: number): void {
    const [left, across, size] = [round(x - radius), round(2 * radius), round(radius)];
    this.#path.push(`M${left} ${round(y)}a${size} ${size} 0 1 0 ${across} 0a${size} ${size} 0 1 0 ${round(-2 * radius)} 0z`);
  }

  clip(): void {
    this.#clips.push(this.#path.join(""));
    this.#state.clip = this.#clips.length;
  }

  stroke(): void {
    if (this.#path.length === 0) return;
    const { strokeStyle, lineWidth, lineJoin, dash } = this.#state;
    const dashes = dash.length > 0 ? ` stroke-dasharray="${dash.map(round).join(" ")}"` : "";
    const look = `fill="none" stroke="${escaped(strokeStyle)}" stroke-width="${round(lineWidth)}" stroke-linejoin="${lineJoin}"${dashes}`;
    this.#add(`<path d="${this.#path.join("")}" ${look}`);
  }

  fill(): void {
    if (this.#path.length > 0) this.#add(`<path d="${this.#path.join("")}" fill="${escaped(this.#state.fillStyle)}"`);
  }

  fillRect(x: number, y: number, width: number, height: number): void {
    const [left, right] = [Math.min(x, x + width), Math.abs(width)];
    const [top, down] = [Math.min(y, y + height), Math.abs(height)];
    const box = `x="${round(left)}" y="${round(top)}" width="${round(right)}" height="${round(down)}"`;
    this.#add(`<rect ${box} fill="${escaped(this.#state.fillStyle)}"`);
  }

  fillText(text: string, x: number, y: number): void {
    const { font, textAlign, textBaseline, fillStyle } = this.#state;
    const look = `text-anchor="${ANCHORS[textAlign]}" dominant-baseline="${BASELINES[textBaseline] ?? "auto"}"`;
    const place = `x="${round(x)}" y="${round(y)}" fill="${escaped(fillStyle)}" style="font:${escaped(font)};white-space:pre"`;
    this.#add(`<text ${place} ${look}`, `>${escaped(text)}</text>`);
  }

  measureText(text: string): { width: number } {
    return { width: this.measure(text, this.#state.font) };
  }

  #add(element: string, end = "/>"): void {
    const { globalAlpha, clip, transform } = this.#state;
    const alpha = globalAlpha < 1 ? ` opacity="${round(globalAlpha)}"` : "";
    const clipped = clip > 0 ? ` clip-path="url(#clip${clip})"` : "";
    const moved = transform === "" ? "" : ` transform="${transform.trim()}"`;
    this.#parts.push(`${element}${alpha}${clipped}${moved}${end}`);
  }

  /** All of it as a file. */
  toString(): string {
    const { width, height } = this;
    const clips = this.#clips.map((path, index) => `<clipPath id="clip${index + 1}"><path d="${path}"/></clipPath>`);
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">` +
      `<defs>${clips.join("")}</defs>${this.#parts.join("\n")}</svg>\n`
    );
  }
}

function round(value: number): number {
  return Math.round(100 * value) / 100;
}

/** Text as XML has it, without the characters that it has none for. */
function escaped(text: string): string {
  return text
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd")
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
}
