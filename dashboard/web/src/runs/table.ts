// The tab that compares the ticked runs: settings that differ, last and best metrics, and the table as text.

import { CANNOT_COPY, copyText } from "../clipboard";
import { button, h, replaceChildren, setText, show } from "../dom";
import type { RunRow } from "../protocol";
import { finder, searchField } from "../search";
import { lackingFigures } from "./row";
import { cellText, compare, toCsv, toMarkdown, type Better, type Comparison } from "./compare";

export interface TableHost {
  focus(key: string): void;
  colourOf(key: string): string | null;
  /** Key of the baseline. */
  baseline(): string | null;
}

/** Lines in the document, unless more are asked for. */
const LINES = 100;

export class CompareTable {
  readonly element: HTMLElement;
  readonly search = searchField("Filter settings and metrics", () => this.#draw());
  readonly #host: TableHost;
  readonly #table = h("table", { class: "compare-table" });
  readonly #note = h("p", { class: "empty" });
  readonly #told = h("span", { class: "hint", role: "status" });
  readonly #all = h("button", { type: "button", class: "button small", hidden: true, onclick: () => this.#showAll() }, "");
  #comparison: Comparison = { runs: [], lines: [], same: 0 };
  #most = LINES;
  #made = "";

  constructor(host: TableHost) {
    this.#host = host;
    this.element = h(
      "div",
      { class: "compare" },
      h(
        "div",
        { class: "toolbar" },
        this.search,
        button("Copy Markdown", { onclick: () => void this.#copy(toMarkdown(this.#comparison)) }),
        button("Copy CSV", { onclick: () => void this.#copy(toCsv(this.#comparison)) }),
        button("Download CSV", { icon: "download", onclick: () => this.#download() }),
        this.#told,
      ),
      h("div", { class: "compare-scroll", tabindex: 0, role: "region", "aria-label": "Comparison of runs" }, this.#table),
      this.#all,
      this.#note,
    );
  }

  /** Compare these runs; `better` tells which way metrics are better, where that is known. */
  update(runs: RunRow[], better: ReadonlyMap<string, Better>): void {
    const made = JSON.stringify([runs, [...better], runs.map(({ key }) => this.#host.colourOf(key)), this.#host.baseline()]);
    if (made === this.#made) return;
    this.#made = made;
    this.#comparison = compare(runs, better);
    setText(this.#told, "");
    this.#draw();
  }

  #draw(): void {
    const { runs, lines, same } = this.#comparison;
    const { finds, problem } = finder(this.search.value);
    const found = lines.filter(({ name }) => finds(name));
    const shown = found.slice(0, this.#most);
    const kinds = ["setting", "metric"] as const;
    replaceChildren(
      this.#table,
      h("caption", { class: "sr-only" }, "Settings that differ, and metrics"),
      h(
        "thead",
        {},
        h("tr", {}, h("td", {}), ...runs.map((run) => this.#head(run))),
      ),
      ...kinds.map((kind) => {
        const some = shown.filter((line) => line.kind === kind);
        if (some.length === 0) return null;
        const title = kind === "setting" ? "Settings that differ" : "Metrics";
        return h(
          "tbody",
          {},
          h("tr", { class: "compare-kind" }, h("th", { scope: "rowgroup", colspan: runs.length + 1 }, title)),
          ...some.map(({ name, values, best }) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, name),
              ...values.map((value, place) => {
                const isBest = best.includes(place);
                const classes = [isBest ? "compare-best" : "", typeof value === "string" ? "compare-text" : ""];
                return h("td", { class: classes.join(" ").trim() || null, title: isBest ? "The best value" : null }, cellText(value));
              }),
            ),
          ),
        );
      }),
    );
    const more = found.length - shown.length;
    setText(this.#all, `Show ${more} more`);
    show(this.#all, more > 0);
    const settings = lines.filter(({ kind }) => kind === "setting").length;
    const notes = [
      found.length === 0 && lines.length > 0 ? problem || "Nothing matches." : "",
      lines.length === 0 ? "These runs have neither settings that differ nor metrics." : "",
      settings === 0 && lines.length > 0 ? "No setting differs." : "",
      ...runs.map((run) => (lackingFigures(run) === "" ? "" : `${run.name} has ${lackingFigures(run)} here; its charts have all.`)),
      same > 0 ? `${same} settings are the same in all of them.` : "",
    ];
    setText(this.#note, notes.filter(Boolean).join(" "));
  }

  #head(run: RunRow): HTMLElement {
    const mark = h("i", { class: "dot", "aria-hidden": "true" });
    mark.style.setProperty("--tone", this.#host.colourOf(run.key) ?? "var(--off)");
    const name = h("button", { type: "button", class: "compare-run", dir: "auto", title: run.key, onclick: () => this.#host.focus(run.key) }, run.name);
    return h("th", { scope: "col" }, mark, name, run.key === this.#host.baseline() ? h("span", { class: "hint" }, " baseline") : null);
  }

  #showAll(): void {
    this.#most = Infinity;
    this.#draw();
  }

  async #copy(text: string): Promise<void> {
    setText(this.#told, (await copyText(text)) ? "Copied." : CANNOT_COPY);
  }

  #download(): void {
    const address = URL.createObjectURL(new Blob([toCsv(this.#comparison)], { type: "text/csv;charset=utf-8" }));
    h("a", { href: address, download: "runs.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }
}
