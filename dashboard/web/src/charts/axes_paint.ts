// The grid and the numbers along the axes of a plot.

import type { Ticks } from "./axes";
import { type Brush, FONT_SIZE } from "./paint";

/** Draw grid and numbers; titles, if any, stand outside of the numbers. `left` is where the canvas begins. */
export function paintAxes({ ctx: ink, box, ratio, scene, y }: Brush, x: Ticks, yTicks: Ticks): void {
  const { theme } = scene;
  const [right, bottom] = [box.left + box.width, box.top + box.height];
  // On whole pixels, so that a line is as wide as it should be
  const sharp = (place: number): number => Math.floor(place) + (Math.round(ratio) % 2) / 2;
  const places = (ticks: Ticks, at: (value: number) => number, from: number, to: number): [number, string][] =>
    ticks.values
      .map((value, index): [number, string] => [at(value), ticks.labels[index] ?? ""])
      .filter(([place]) => place >= from - 1 && place <= to + 1);
  const columns = places(x, (value) => box.left + scene.x.toUnit(value) * box.width, box.left, right);
  const rows = places(yTicks, (value) => bottom - y.toUnit(value) * box.height, box.top, bottom);
  ink.strokeStyle = theme.grid;
  ink.lineWidth = Math.max(1, Math.round(ratio));
  ink.setLineDash([]);
  ink.beginPath();
  for (const [place] of columns) {
    ink.moveTo(sharp(place), box.top);
    ink.lineTo(sharp(place), bottom);
  }
  for (const [place] of rows) {
    ink.moveTo(box.left, sharp(place));
    ink.lineTo(right, sharp(place));
  }
  ink.stroke();
  ink.font = `${FONT_SIZE * ratio}px ${theme.font}`;
  ink.fillStyle = theme.faint;
  ink.textAlign = "center";
  ink.textBaseline = "top";
  for (const [place, label] of columns) ink.fillText(label, place, bottom + 6 * ratio);
  ink.textAlign = "right";
  ink.textBaseline = "middle";
  for (const [place, label] of rows) ink.fillText(label, box.left - 8 * ratio, place);
}

/** Draw titles at the axes, in a canvas that ends at `end` below and begins at `start` on the left. */
export function paintTitles({ ctx: ink, box, ratio, scene }: Brush, [x, y]: readonly [string, string], start: number, end: number): void {
  ink.font = `${(FONT_SIZE + 1) * ratio}px ${scene.theme.font}`;
  ink.fillStyle = scene.theme.faint;
  ink.textAlign = "center";
  ink.textBaseline = "bottom";
  ink.fillText(x, box.left + box.width / 2, end);
  ink.save();
  ink.translate(start, box.top + box.height / 2);
  ink.rotate(-Math.PI / 2);
  ink.textBaseline = "top";
  ink.fillText(y, 0, 0);
  ink.restore();
}

/** How wide the numbers of a y axis are, in CSS pixels. */
export function axisWidth({ labels }: Ticks): number {
  const longest = Math.max(0, ...labels.map((label) => label.length));
  // In coarse steps, so that a plot does not move when a label gets one digit more
  return Math.max(44, 8 * Math.ceil((6.5 * longest + 14) / 8));
}
