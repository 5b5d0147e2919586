// Curves, marks, gaps and events on a panel's canvas. All positions are in device pixels.

import type { Scale } from "./axes";
import type { Fit } from "./fit";
import type { Mark } from "./marks";
import type { Scene } from "./scene";
import type { Curve, Point } from "./series_store";
import type { Ink } from "./svg";
import { type Box, inside, trace, type View, visible } from "./trace";

/** What is painted with, and where. */
export interface Brush {
  ctx: Ink;
  /** Size of what the ground is painted on: all of a canvas. */
  ground: { width: number; height: number };
  box: Box;
  /** Device pixels of a CSS pixel. */
  ratio: number;
  scene: Scene;
  y: Scale;
}

/** A curve as it is to be drawn. */
export interface Line {
  curve: Curve;
  /** What is drawn at its points: their values, or the average of these. */
  values: Float64Array;
  /** Its run's scene. */
  scene: Scene;
  colour: string;
  dash: readonly number[];
  best: Point | null;
  /** What it is: one among others, behind them, or a run of a group, faint before it. */
  kind: "line" | "behind" | "member";
  /** Least and greatest at its points, where it is the mean of several runs. */
  band: readonly [Float64Array, Float64Array] | null;
}

/** Of text on a canvas, in CSS pixels. */
export const FONT_SIZE = 11;
/** Points so far apart are drawn with dots, in CSS pixels. */
const DOT_SPACING = 9;
/** How far a line may go up and down, in widths of the plot, to be drawn wider and dashed. */
const MAX_CALM_CLIMB = 4;
/** How faint raw values are behind their average. */
const RAW_ALPHA = 0.25;
const BAND_ALPHA = 0.18;
/** Of the baseline and of the runs of groups; the baseline is wide, in CSS pixels. */
const BEHIND_ALPHA = 0.5;
const BEHIND_WIDTH = 4;

/** What lies behind the grid: the ground, for the canvas is opaque; stretches without samples; what was trimmed. */
export function paintBackground(brush: Brush): void {
  const { ctx, ground, box, scene } = brush;
  ctx.fillStyle = scene.theme.background;
  ctx.fillRect(0, 0, ground.width, ground.height);
  const at = (x: number): number => box.left + Math.max(-1, Math.min(2, scene.x.toUnit(x))) * box.width;
  ctx.save();
  clip(brush);
  for (const [after, before, count] of scene.gaps) {
    const [from, to] = [scene.placeOf(after), scene.placeOf(before)];
    if (from !== null && to !== null) shade(brush, at(from), at(to), `${count} dropped`);
  }
  const trimmed = scene.trimmed === null ? null : scene.placeOf(scene.trimmed);
  if (trimmed !== null && trimmed > scene.x.min) shade(brush, box.left, at(trimmed), "only least, greatest");
  ctx.restore();
}

/** Shade a stretch, with its name where there is room. */
function shade({ ctx, box, ratio, scene }: Brush, from: number, to: number, name: string): void {
  const right = box.left + box.width;
  if (to < box.left || from > right) return;
  ctx.fillStyle = scene.theme.shade;
  ctx.fillRect(from, box.top, Math.max(to - from, ratio), box.height);
  const start = Math.max(from, box.left) + 4 * ratio;
  const room = Math.min(to, right) - start;
  if (room < 40 * ratio) return;
  ctx.font = `${(FONT_SIZE - 1) * ratio}px ${scene.theme.font}`;
  ctx.textBaseline = "top";
  if (ctx.measureText(name).width > room) return;
  ctx.fillStyle = scene.theme.faint;
  ctx.fillText(name, start, box.top + 3 * ratio);
}

/** Marks of events, then the lines, and on top what stands out of the plot at its edges: best values and marks. */
export function paintLines(brush: Brush, lines: readonly Line[], marks: readonly Mark[]): void {
  const { ctx } = brush;
  ctx.save();
  clip(brush);
  ctx.lineJoin = "bevel"; // a mitre at a spike would stick out beyond its value
  ctx.lineWidth = thin(brush.ratio);
  for (const mark of marks) paintMark(brush, mark);
  paintCounts(brush, marks.filter(isLine));
  // Those with few points are drawn last, over the thicket of the others.
  const rank = ({ kind }: Line): number => Number(kind === "line") - Number(kind === "behind");
  const ordered = [...lines].sort(
    (one, other) => rank(one) - rank(other) || other.curve.length - one.curve.length,
  );
  for (const line of ordered) if (line.band !== null) paintBand(brush, line, line.band);
  for (const line of ordered) paintLine(brush, line);
  ctx.restore();
  ctx.save();
  for (const line of ordered) {
    paintBest(brush, line);
    paintMarks(brush, line);
  }
  ctx.restore();
}

/** The band behind a mean, from the least to the greatest. */
function paintBand({ ctx, box, y }: Brush, { curve, scene, colour }: Line, [low, high]: NonNullable<Line["band"]>): void {
  const view: View = { box, x: scene.x, y, column: scene.column, origin: scene.origin };
  const [from, to] = visible(curve, scene);
  const at = (values: Float64Array, index: number): [number, number] => {
    const up = y.toUnit(values[index] as number);
    return [
      box.left + scene.x.toUnit((curve[view.column][index] as number) - view.origin) * box.width,
      // What a logarithmic axis has no place for is at its foot.
      box.top + (1 - Math.max(-1, Math.min(2, Number.isNaN(up) ? -1 : up))) * box.height,
    ];
  };
  ctx.beginPath();
  for (let index = from; index < to; index++) {
    if (index === from) ctx.moveTo(...at(high, index));
    else ctx.lineTo(...at(high, index));
  }
  for (let index = to - 1; index >= from; index--) ctx.lineTo(...at(low, index));
  ctx.fillStyle = colour;
  ctx.globalAlpha = BAND_ALPHA;
  ctx.fill();
  ctx.globalAlpha = 1;
}

function paintLine({ ctx, box, ratio, y }: Brush, { curve, values, scene, colour, dash, kind }: Line): void {
  const view: View = { box, x: scene.x, y, column: scene.column, origin: scene.origin };
  const range = visible(curve, scene);
  const breaks = curve.breaks(scene.gaps);
  ctx.strokeStyle = ctx.fillStyle = colour;
  if (kind !== "line") {
    ctx.globalAlpha = BEHIND_ALPHA;
    ctx.lineWidth = (kind === "behind" ? BEHIND_WIDTH : 1) * ratio;
    ctx.beginPath();
    trace(ctx, curve, values, range, breaks, view);
    ctx.setLineDash(dash.map((length) => length * ratio));
    ctx.stroke();
    ctx.setLineDash([]);
    ctx.lineWidth = thin(ratio);
    ctx.globalAlpha = 1;
    return;
  }
  if (values !== curve.value) {
    ctx.globalAlpha = RAW_ALPHA;
    ctx.beginPath();
    trace(ctx, curve, curve.value, range, breaks, view);
    ctx.stroke();
    ctx.globalAlpha = 1;
  }
  ctx.beginPath();
  const { lonely, climb } = trace(ctx, curve, values, range, breaks, view);
  // In a line that goes up and down like mad nobody sees dashes, and both they and width take long to draw.
  if (climb < MAX_CALM_CLIMB * box.width) {
    ctx.setLineDash(dash.map((length) => length * ratio));
    ctx.lineWidth = 1.5 * ratio;
  }
  ctx.stroke();
  ctx.lineWidth = thin(ratio);
  ctx.setLineDash([]);
  if ((range[1] - range[0]) * DOT_SPACING * ratio < box.width) {
    for (let index = range[0]; index < range[1]; index++) {
      const at = place(view, (curve[view.column][index] as number) - view.origin, values[index] as number);
      if (at) dot(ctx, at, 2 * ratio);
    }
  } else {
    for (let index = 0; index < lonely.length; index += 2) {
      dot(ctx, [lonely[index] as number, lonely[index + 1] as number], 1.5 * ratio);
    }
  }
}

/** The best value: a ring around it. */
function paintBest({ ctx, box, ratio, y }: Brush, { best, scene, colour }: Line): void {
  const at = best && place({ box, x: scene.x, y }, best[scene.column] - scene.origin, best.value);
  if (!at) return;
  ctx.beginPath();
  ctx.arc(...at, 4 * ratio, 0, 2 * Math.PI);
  ctx.fillStyle = scene.theme.background;
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1.5 * ratio;
  ctx.fill();
  ctx.stroke();
  ctx.fillStyle = colour;
  dot(ctx, at, 1.5 * ratio);
}

/** What is not finite: a bar at the edge, with a sign where it begins; above for plus infinity, below for the others. */
function paintMarks({ ctx, box, ratio }: Brush, { curve, scene }: Line): void {
  ctx.strokeStyle = ctx.fillStyle = scene.theme.alert;
  ctx.lineWidth = 1.5 * ratio;
  const size = 3.5 * ratio;
  let signed = -Infinity;
  for (const [start, end, kind] of curve.marks) {
    const [first, last] = [scene.placeOf(start), scene.placeOf(end)];
    if (first === null || last === null || last < scene.x.min || first > scene.x.max) continue;
    const from = box.left + Math.max(0, scene.x.toUnit(first)) * box.width;
    const to = box.left + Math.min(1, scene.x.toUnit(last)) * box.width;
    const above = kind === "inf";
    const edge = above ? box.top : box.top + box.height;
    const inward = above ? 1 : -1;
    ctx.fillRect(from - ratio / 2, edge, Math.max(to - from, ratio), 3 * ratio * inward);
    const [x, y] = [from, edge + inward * (size + 4 * ratio)];
    if (x - signed < 3 * size) continue; // one sign for those that are closer than it is wide
    signed = x;
    ctx.beginPath();
    if (kind === "nan" || kind === "mixed") {
      ctx.moveTo(x - size, y - size);
      ctx.lineTo(x + size, y + size);
      ctx.moveTo(x - size, y + size);
      ctx.lineTo(x + size, y - size);
      ctx.stroke();
    } else {
      ctx.moveTo(x, y - inward * size);
      ctx.lineTo(x - size, y + inward * size);
      ctx.lineTo(x + size, y + inward * size);
      ctx.fill();
    }
  }
}

function isLine({ kind, isOwn }: Mark): boolean {
  return kind === "alert" && isOwn;
}

/** How far above the foot the marks of each kind begin, one kind above the other where they are at one step. */
const LANES = { validation: 0, alert: 0, checkpoint: 6, lr: 11 } as const;
const TICK = 5;

/**
 * An alert about a curve of the panel is a line through it; of all else there is a sign at the foot: a tick for a
 * validation, a square for a checkpoint, a triangle for a learning rate. Several as one: a faint bar from the first to
 * the last, and for alerts their number.
 */
function paintMark({ ctx, box, ratio, scene }: Brush, mark: Mark): void {
  const { kind, from, to } = mark;
  const bottom = box.top + box.height;
  const x = Math.round(box.left + from * box.width) + 0.5;
  const end = Math.round(box.left + to * box.width) + 0.5;
  const line = isLine(mark);
  ctx.strokeStyle = ctx.fillStyle = kind === "alert" ? scene.theme.alert : scene.theme.event;
  const foot = bottom - LANES[kind] * ratio;
  if (end > x) {
    ctx.globalAlpha = line ? 1 : 0.5;
    ctx.fillRect(x, line ? box.top : foot - 3 * ratio, end - x, 2 * ratio);
    ctx.globalAlpha = 1;
  }
  if (kind === "checkpoint") {
    ctx.fillRect(x - 2 * ratio, foot - 4 * ratio, 4 * ratio, 4 * ratio);
    return;
  }
  ctx.beginPath();
  if (kind === "lr") {
    ctx.moveTo(x, foot - TICK * ratio);
    ctx.lineTo(x - 3 * ratio, foot);
    ctx.lineTo(x + 3 * ratio, foot);
    ctx.fill();
    return;
  }
  ctx.setLineDash(line ? [4 * ratio, 3 * ratio] : []);
  ctx.moveTo(x, line ? box.top : foot - TICK * ratio);
  ctx.lineTo(x, bottom);
  ctx.stroke();
  ctx.setLineDash([]);
  if (!line) return;
  ctx.beginPath(); // a flag, so that an alert is not told by its colour alone
  ctx.moveTo(x, box.top);
  ctx.lineTo(x + 7 * ratio, box.top + 3.5 * ratio);
  ctx.lineTo(x, box.top + 7 * ratio);
  ctx.fill();
}

/** How many alerts are behind a line: beside its flag, on the side that has room; on none where there is no room. */
function paintCounts({ ctx, box, ratio, scene }: Brush, marks: readonly Mark[]): void {
  ctx.font = `600 ${(FONT_SIZE - 1) * ratio}px ${scene.theme.font}`;
  ctx.fillStyle = scene.theme.alert;
  ctx.textAlign = "left";
  ctx.textBaseline = "top";
  let taken = box.left;
  marks.forEach(({ from, events }, index) => {
    const x = box.left + from * box.width;
    const next = box.left + (marks[index + 1]?.from ?? 1) * box.width;
    const text = `×${events.length}`;
    const width = ctx.measureText(text).width;
    const [right, left] = [x + 9 * ratio, x - 4 * ratio - width];
    const place = right + width <= next ? right : left >= taken ? left : null;
    if (events.length > 1 && place !== null) {
      ctx.fillText(text, place, box.top + 3 * ratio);
      taken = Math.max(place + width, right);
    } else {
      taken = right;
    }
  });
}

/** What a scale to usual values leaves out: a wedge at the edge where it is, and how many points there are. */
export function paintOutside(brush: Brush, lines: readonly Line[], { above, below, isAtLeast }: Fit): void {
  if (above + below === 0) return;
  const { ctx, box, ratio, y } = brush;
  const bottom = box.top + box.height;
  ctx.save();
  for (const { curve, colour, scene } of lines) {
    ctx.fillStyle = colour;
    const [from, to] = inside(curve, scene);
    let drawn = [-Infinity, -Infinity];
    for (let index = from; index < to; index++) {
      const value = curve.value[index] as number;
      const side = value > y.max ? 0 : value < y.min ? 1 : null;
      if (side === null || (y.log && value <= 0)) continue;
      const x = box.left + scene.x.toUnit((curve[scene.column][index] as number) - scene.origin) * box.width;
      if (x - (drawn[side] as number) < 3 * ratio) continue;
      drawn = side === 0 ? [x, drawn[1] as number] : [drawn[0] as number, x];
      const [edge, inward] = side === 0 ? [box.top, 1] : [bottom, -1];
      ctx.beginPath();
      ctx.moveTo(x, edge);
      ctx.lineTo(x - 3.5 * ratio, edge + inward * 6 * ratio);
      ctx.lineTo(x + 3.5 * ratio, edge + inward * 6 * ratio);
      ctx.fill();
    }
  }
  const { scene } = brush;
  ctx.font = `600 ${(FONT_SIZE - 1) * ratio}px ${scene.theme.font}`;
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  const right = box.left + box.width - 4 * ratio;
  const say = (count: number, word: string, middle: number): void => {
    if (count === 0) return;
    const text = `${isAtLeast ? "at least " : ""}${count} ${word}`;
    const width = ctx.measureText(text).width;
    ctx.globalAlpha = 0.8; // lines behind it
    ctx.fillStyle = scene.theme.background;
    ctx.fillRect(right - width - 2 * ratio, middle - 7 * ratio, width + 4 * ratio, 14 * ratio);
    ctx.globalAlpha = 1;
    ctx.fillStyle = scene.theme.text;
    ctx.fillText(text, right, middle);
  };
  say(above, "above", box.top + 15 * ratio);
  say(below, "below", bottom - 15 * ratio);
  ctx.restore();
}

/** Write something into the middle of the plot, or at its foot. */
export function paintText({ ctx, box, ratio, scene }: Brush, text: string, where: "middle" | "foot"): void {
  ctx.save();
  ctx.font = `${FONT_SIZE * ratio}px ${scene.theme.font}`;
  ctx.fillStyle = scene.theme.faint;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  const y = where === "middle" ? box.top + box.height / 2 : box.top + box.height - 10 * ratio;
  ctx.fillText(text, box.left + box.width / 2, y);
  ctx.restore();
}

/** One device pixel where there is one to a CSS pixel: rasterisers have a fast way for exactly that. */
function thin(ratio: number): number {
  return Math.max(1, Math.floor(ratio));
}

function clip({ ctx, box: { left, top, width, height } }: Brush): void {
  ctx.beginPath();
  ctx.rect(left, top - 1, width, height + 2);
  ctx.clip();
}

/** Where a point is on the canvas; null if it is not in view. */
function place({ box, x, y }: Pick<View, "box" | "x" | "y">, atX: number, atY: number): [number, number] | null {
  const [right, up] = [x.toUnit(atX), y.toUnit(atY)];
  if (!(right >= 0 && right <= 1 && up >= 0 && up <= 1)) return null;
  return [box.left + right * box.width, box.top + (1 - up) * box.height];
}

function dot(ctx: Ink, [x, y]: [number, number], radius: number): void {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fill();
}
