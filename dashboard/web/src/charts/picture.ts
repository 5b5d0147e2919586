// A panel as a picture to show elsewhere: with its title, its run, a legend with values, and titles at the axes. Drawn
// with the same code as the panel, on a canvas or as SVG.

import { xTicks, yTicks } from "./axes";
import { paintAxes, paintTitles } from "./axes_paint";
import type { Fit } from "./fit";
import { type Brush, FONT_SIZE, type Line, paintBackground, paintLines, paintOutside } from "./paint";
import type { Mark } from "./marks";
import type { Scene } from "./scene";
import type { Ink } from "./svg";

/** What a panel shows now. */
export interface Picture {
  name: string;
  /** Names of the runs. */
  runs: readonly string[];
  /** Each curve with its look and its value. */
  legend: readonly { label: string; value: string; colour: string; dash: readonly number[] }[];
  lines: readonly Line[];
  fitted: Fit;
  unit: string;
  xTitle: string;
  yTitle: string;
  scene: Scene;
  /** Marks for a plot of so many CSS pixels. */
  marks(width: number): Mark[];
}

/** CSS pixels of a picture, and how many pixels of a bitmap one of them is. */
export const SIZE = { width: 960, height: 540 } as const;
export const PIXELS = 2;

const EDGE = 16;
const LEGEND_ROW = 18;
/** Between the legend and the plot, whose first label stands half above it. */
const LEGEND_GAP = 16;
/** Rows of a legend; the picture of a hundred curves is no list of them. */
const MOST_ROWS = 6;

/** Draw a picture; `ratio` is the pixels of a CSS pixel. */
export function drawPicture(ink: Ink, picture: Picture, ratio: number): void {
  const { scene, fitted } = picture;
  const { theme } = scene;
  const [width, height] = [SIZE.width * ratio, SIZE.height * ratio];
  const font = (size: number, weight = ""): string => `${weight} ${size * ratio}px ${theme.font}`.trim();
  ink.fillStyle = theme.background;
  ink.fillRect(0, 0, width, height);
  ink.textAlign = "left";
  ink.textBaseline = "alphabetic";
  ink.fillStyle = theme.text;
  ink.font = font(16, "600");
  ink.fillText(cut(ink, picture.name, width - 2 * EDGE * ratio), EDGE * ratio, 28 * ratio);
  ink.font = font(12);
  ink.fillStyle = theme.faint;
  ink.fillText(cut(ink, picture.runs.join(", "), width - 2 * EDGE * ratio), EDGE * ratio, 47 * ratio);
  const top = drawLegend(ink, picture, font(12), ratio, 68) + LEGEND_GAP;

  const bottom = SIZE.height - 50;
  const yLabels = yTicks(fitted.scale, Math.max(2, Math.floor((bottom - top) / 40)), picture.unit);
  ink.font = font(FONT_SIZE);
  const widest = Math.max(0, ...yLabels.labels.map((label) => ink.measureText(label).width)) / ratio;
  const left = EDGE + 20 + widest + 8;
  const box = { left: left * ratio, top: top * ratio, width: (SIZE.width - EDGE - 8 - left) * ratio, height: (bottom - top) * ratio };
  const xLabels = xTicks(scene.axis, scene.x, Math.floor(box.width / ratio / 90));
  const brush: Brush = { ctx: ink, ground: { width, height: 0 }, box, ratio, scene, y: fitted.scale };
  paintBackground(brush);
  paintAxes(brush, xLabels, yLabels);
  paintLines(brush, picture.lines, picture.marks(box.width / ratio));
  paintOutside(brush, picture.lines, fitted);
  ink.font = font(FONT_SIZE + 1);
  paintTitles(brush, [picture.xTitle, cut(ink, picture.yTitle, box.height)], EDGE * ratio, height - 8 * ratio);
}

/** Draw the legend in rows from a place on; returns where its last row is, in CSS pixels. */
function drawLegend(ink: Ink, { legend, scene }: Picture, font: string, ratio: number, from: number): number {
  const { theme } = scene;
  let [x, y, rows] = [EDGE, from, 1];
  ink.font = font;
  for (const [index, { label, value, colour, dash }] of legend.entries()) {
    const name = cut(ink, label, 300 * ratio);
    const wide = 26 + (ink.measureText(`${name} `).width + ink.measureText(value).width) / ratio;
    if (x > EDGE && x + wide > SIZE.width - EDGE) {
      if (rows === MOST_ROWS) {
        ink.fillStyle = theme.faint;
        ink.fillText(`and ${legend.length - index} more`, EDGE * ratio, (y + LEGEND_ROW) * ratio);
        return y + LEGEND_ROW;
      }
      [x, y, rows] = [EDGE, y + LEGEND_ROW, rows + 1];
    }
    ink.strokeStyle = colour;
    ink.lineWidth = 2 * ratio;
    ink.setLineDash(dash.map((length) => length * ratio));
    ink.beginPath();
    ink.moveTo(x * ratio, (y - 4) * ratio);
    ink.lineTo((x + 20) * ratio, (y - 4) * ratio);
    ink.stroke();
    ink.setLineDash([]);
    ink.fillStyle = theme.faint;
    ink.fillText(name, (x + 26) * ratio, y * ratio);
    ink.fillStyle = theme.text;
    ink.fillText(value, (x + 26) * ratio + ink.measureText(`${name} `).width, y * ratio);
    x += wide + 18;
  }
  return y;
}

/** As much of a text as there is room for. */
function cut(ink: Ink, text: string, room: number): string {
  if (ink.measureText(text).width <= room) return text;
  let [least, most] = [0, text.length];
  while (least < most) {
    const middle = (least + most + 1) >> 1;
    if (ink.measureText(`${text.slice(0, middle)}…`).width <= room) least = middle;
    else most = middle - 1;
  }
  return `${text.slice(0, least)}…`;
}
