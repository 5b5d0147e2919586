// A curve as a line on a canvas: which points of it a screen can show. Nothing here knows a browser.

import type { Column, Curve } from "./series_store";
import type { Scale } from "./axes";

/** What a line is drawn with: a canvas' context or a Path2D. */
export interface Pen {
  moveTo(x: number, y: number): void;
  lineTo(x: number, y: number): void;
}

/** The part of the canvas in which curves are drawn, in device pixels. */
export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

export interface View {
  box: Box;
  x: Scale;
  y: Scale;
  column: Column;
  /** What is subtracted from the column: the start of the run where x is the time since then. */
  origin: number;
}

/** Indices of the first point to draw and the one after the last: one more at either side than is in view. */
export function visible(curve: Curve, { column, x, origin }: Pick<View, "column" | "x" | "origin">): [number, number] {
  const [first, end] = [curve.search(column, x.min + origin), curve.after(column, x.max + origin)];
  return [Math.max(first - 1, 0), Math.min(end + 1, curve.length)];
}

/** Indices of the first point in view and the one after the last. */
export function inside(curve: Curve, view: Pick<View, "column" | "x" | "origin">): [number, number] {
  const [from, to] = visible(curve, view);
  const isIn = (index: number): boolean => {
    const place = (curve[view.column][index] as number) - view.origin;
    return place >= view.x.min && place <= view.x.max;
  };
  return [from < to && !isIn(from) ? from + 1 : from, to > from && !isIn(to - 1) ? to - 1 : to];
}

/** Values that a line between two points has where it crosses the left and the right edge of the view. */
export function edges(curve: Curve, view: Pick<View, "column" | "x" | "origin">): number[] {
  const [first, end] = inside(curve, view);
  const places = curve[view.column];
  const values: number[] = [];
  for (const [index, edge] of [
    [first, view.x.min],
    [end, view.x.max],
  ] as const) {
    if (index < 1 || index >= curve.length) continue;
    const [before, after] = [(places[index - 1] as number) - view.origin, (places[index] as number) - view.origin];
    const [from, to] = [curve.value[index - 1] as number, curve.value[index] as number];
    values.push(after > before ? from + ((to - from) * (edge - before)) / (after - before) : to);
  }
  return values;
}

/** What was drawn. */
export interface Traced {
  /** Points without a line at either side, as x, y, x, y, ... */
  lonely: number[];
  /** How far the pen went up and down, in device pixels. */
  climb: number;
}

/**
 * Draw `values` over the points of `curve` from index `from` to before `to`.
 *
 * Within one pixel's column only the first, least, greatest and last point are drawn: the picture is the same.
 * A line ends at each of `breaks`, at a value that a logarithmic axis has no place for, and a point without
 * a line at either side is lonely: it has to be drawn as a dot.
 */
export function trace(
  pen: Pen,
  curve: Curve,
  values: Float64Array,
  [from, to]: readonly [number, number],
  breaks: Float64Array,
  { box, x, y, column, origin }: View,
): Traced {
  const steps = curve.step;
  const places = curve[column];
  const lonely: number[] = [];
  const { left, top, width, height } = box;
  const [xMin, xFactor] = [x.min, width / (x.max - x.min)];
  const [yMin, yFactor] = [y.min, height / (y.max - y.min)];
  const bottom = top + height;
  // A line to far outside is cut short of where rasterisers lose precision.
  const limit = 1e5;

  let broken = 0; // index into breaks
  let drawing = false; // a line is being drawn, and
  let alone = false; // it has one point so far,
  let [startX, startY] = [0, 0]; // this one
  let pixel = -Infinity; // the column of pixels that is being gathered,
  let [least, greatest, lastX, lastY] = [0, 0, 0, 0]; // what it holds beside its first point,
  let held = 0; // and how many points that is
  let leastFirst = true;
  let climb = 0;

  const flush = (): void => {
    if (held > 1) {
      climb += greatest - least;
      if (leastFirst) {
        pen.lineTo(lastX, least);
        pen.lineTo(lastX, greatest);
      } else {
        pen.lineTo(lastX, greatest);
        pen.lineTo(lastX, least);
      }
    }
    if (held > 0) pen.lineTo(lastX, lastY);
    held = 0;
  };
  const finish = (): void => {
    flush();
    if (drawing && alone) lonely.push(startX, startY);
    drawing = false;
    pixel = -Infinity;
  };

  for (let index = from; index < to; index++) {
    const place = (places[index] as number) - origin;
    const value = values[index] as number;
    const unitX = x.log ? x.toUnit(place) * width : (place - xMin) * xFactor;
    const unitY = y.log ? y.toUnit(value) * height : (value - yMin) * yFactor;
    if (!(unitX === unitX && unitY === unitY)) {
      finish();
      continue;
    }
    if (drawing) {
      const before = steps[index - 1] as number;
      while (broken < breaks.length && (breaks[broken + 1] as number) <= before) broken += 2;
      if (broken < breaks.length && (breaks[broken] as number) < (steps[index] as number)) finish();
    }
    const atX = left + Math.max(-limit, Math.min(limit, unitX));
    const atY = bottom - Math.max(-limit, Math.min(limit, unitY));
    if (!drawing) {
      pen.moveTo(atX, atY);
      [drawing, alone, startX, startY, pixel] = [true, true, atX, atY, Math.floor(atX)];
      lastY = atY;
      continue;
    }
    alone = false;
    const now = Math.floor(atX);
    if (now !== pixel) {
      flush();
      pen.lineTo(atX, atY);
      climb += Math.abs(atY - lastY);
      lastY = atY;
      pixel = now;
      continue;
    }
    if (held === 0) [least, greatest] = [atY, atY];
    else if (atY < least) [least, leastFirst] = [atY, false];
    else if (atY > greatest) [greatest, leastFirst] = [atY, true];
    held++;
    [lastX, lastY] = [atX, atY];
  }
  finish();
  return { lonely, climb };
}

/** Least and greatest of `values` that are in view, beside what is there already; only those above 0 if `positive`. */
export function extent(
  values: Float64Array,
  [from, to]: readonly [number, number],
  positive: boolean,
  known: [number, number],
): [number, number] {
  let [low, high] = known;
  for (let index = from; index < to; index++) {
    const value = values[index] as number;
    if (positive && value <= 0) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}
