// Panels as files, and on the clipboard: all points as CSV, what is seen as PNG or SVG.

import { h } from "../dom";
import type { Question } from "./details";
import { fileName, save } from "./dom";
import { readCsv } from "./export";
import type { Panel } from "./panel";
import { drawPicture, PIXELS, SIZE } from "./picture";
import { NoAnswer } from "./ranges";
import type { RunCurves } from "./run_curves";
import { SvgInk } from "./svg";
import type { PanelCurve } from "./values";

export interface FilesHost {
  /** The runs that are shown, the watched one first. */
  runs(): RunCurves[];
  /** Say what has become of it. */
  tell(text: string): void;
}

export class Files {
  readonly #host: FilesHost;

  constructor(host: FilesHost) {
    this.#host = host;
  }

  async savePng(panel: Panel): Promise<void> {
    save(await this.#png(panel), this.#name(panel.name, "png"));
  }

  /** Put a picture on the clipboard, where the browser lets the page. */
  async copyPng(panel: Panel): Promise<void> {
    try {
      // As a promise: a browser wants to be asked while the click is fresh.
      await navigator.clipboard.write([new ClipboardItem({ "image/png": this.#png(panel) })]);
      this.#host.tell(`Copied the picture of ${panel.name}.`);
    } catch {
      this.#host.tell("The browser does not let the page copy pictures: it does over https and on localhost.");
    }
  }

  saveSvg(panel: Panel): void {
    const pen = h("canvas").getContext("2d");
    const measure = (text: string, font: string): number => {
      if (!pen) return 6 * text.length;
      pen.font = font;
      return pen.measureText(text).width;
    };
    const ink = new SvgInk(SIZE.width, SIZE.height, measure);
    drawPicture(ink, panel.picture(this.#names()), 1);
    save(new Blob([ink.toString()], { type: "image/svg+xml" }), this.#name(panel.name, "svg"));
  }

  #png(panel: Panel): Promise<Blob> {
    const canvas = h("canvas", { width: PIXELS * SIZE.width, height: PIXELS * SIZE.height });
    const ink = canvas.getContext("2d");
    if (ink) drawPicture(ink, panel.picture(this.#names()), PIXELS);
    return new Promise((resolve, reject) => {
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the browser has made no picture"))), "image/png");
    });
  }

  /** Save all points of some curves as one file. */
  async saveCsv(name: string, curves: readonly PanelCurve[]): Promise<void> {
    const file = this.#name(name, "csv");
    const runs = this.#host.runs().flatMap((run) => {
      // A curve may be in two panels
      const own = new Map(curves.filter((curve) => curve.run === run).map(({ info }) => [info.id, info]));
      const series = [...own.values()];
      const lastStep = run.lastStep(series.map(({ id }) => id));
      return series.length === 0
        ? []
        : [{ name: run.name, series, lastStep, ask: (question: Question) => run.ask(question) }];
    });
    try {
      save(await readCsv(runs), file);
      this.#host.tell(`Saved ${file}.`);
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
      this.#host.tell(`${file} was not saved: ${error.message}.`);
    }
  }

  #names(): string[] {
    return this.#host.runs().map(({ name }) => name);
  }

  /** A file is named after its run, if there is one. */
  #name(panel: string, extension: string): string {
    const runs = this.#host.runs();
    const name = runs.length === 1 ? (runs[0]?.info?.name ?? "") : `${runs.length} runs`;
    return `${fileName(name, panel)}.${extension}`;
  }
}
