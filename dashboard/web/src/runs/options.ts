// What the list of runs shows and in which order: conditions, columns, archived runs.

import { button, h, replaceChildren, setText, show } from "../dom";
import { finder, searchField } from "../search";
import { allFields, FIELDS, HPARAMS, LAST, RunNames, SPARK, titleOf, type Field } from "./fields";
import { writeCondition } from "./filter";
import type { Preferences } from "./preferences";
import type { RunRow } from "../protocol";

/** Columns to choose from at a time; the search finds the others. */
const CHOICES = 60;

export interface OptionsHost {
  /** Add a condition to the filter. */
  filter(condition: string): void;
  prefer(patch: Partial<Preferences>): void;
}

export class Options {
  readonly element: HTMLElement;
  readonly #host: OptionsHost;
  readonly #names = h("datalist", { id: "runs-names" });
  readonly #name = h("input", { class: "input", list: "runs-names", placeholder: "val_loss", "aria-label": "What to filter by" });
  readonly #operator = h(
    "select",
    { class: "input", "aria-label": "How to compare" },
    ...["<", "<=", "=", "!=", ">=", ">", ":"].map((operator) => h("option", {}, operator)),
  );
  readonly #value = h("input", { class: "input", placeholder: "0.3", "aria-label": "Value" });
  readonly #sort = h("input", { class: "input", list: "runs-names", "aria-label": "Sort by", onchange: () => this.#sortBy(this.#sort.value.trim()) });
  readonly #sortProblem = h("p", { class: "hint runs-problem", role: "status", hidden: true });
  readonly #search = searchField("Find a column", () => this.#draw());
  readonly #columns = h("div", { class: "runs-columns", role: "group", "aria-label": "Columns" });
  readonly #more = h("p", { class: "hint" });
  readonly #archived: HTMLInputElement;
  readonly #turn: HTMLButtonElement;
  #fields: Field[] = [];
  #known = new RunNames([]);
  #preferences: Preferences | null = null;

  constructor(host: OptionsHost) {
    this.#host = host;
    this.#archived = h("input", { type: "checkbox", onchange: () => host.prefer({ archived: this.#archived.checked }) });
    this.#turn = button("", { class: "button small", onclick: () => host.prefer({ descending: this.#preferences?.descending !== true }) });
    const form = h("form", { class: "runs-condition" }, this.#name, this.#operator, this.#value, h("button", { class: "button small" }, "Add"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#name.value.trim() === "") return;
      host.filter(writeCondition(this.#name.value.trim(), this.#operator.value, this.#value.value.trim()));
      this.#value.value = "";
    });
    this.element = h(
      "div",
      { class: "runs-options", id: "runs-options", hidden: true },
      h("h3", {}, "Filter"),
      this.#names,
      form,
      h("p", { class: "hint" }, `A metric (val_loss, best.val_loss), a hyperparameter (optimizer.lr), or ${Object.keys(FIELDS).join(", ")}.`),
      h("h3", {}, "Sort by"),
      h("div", { class: "runs-sort" }, this.#sort, this.#turn),
      this.#sortProblem,
      h("h3", {}, "Columns"),
      this.#search,
      this.#columns,
      this.#more,
      h("label", { class: "check" }, this.#archived, h("span", {}, "Show archived runs")),
    );
  }

  /** Sort by what was typed, as `offloop runs --sort` takes it, unless no run has it. */
  #sortBy(text: string): void {
    const field = text.replace(/^-/, "");
    if (field === "") return;
    const problem = this.#known.problem(field);
    setText(this.#sortProblem, problem);
    show(this.#sortProblem, problem !== "");
    if (problem === "") this.#host.prefer({ sort: field, descending: text.startsWith("-") });
  }

  update(rows: readonly RunRow[], preferences: Preferences): void {
    this.#preferences = preferences;
    this.#fields = allFields(rows);
    this.#known = new RunNames(rows);
    this.#archived.checked = preferences.archived;
    const names = this.#fields.map((field) => (field.startsWith(LAST) || field.startsWith(HPARAMS) ? titleOf(field) : field));
    replaceChildren(this.#names, ...[...new Set(names)].map((value) => h("option", { value })));
    if (document.activeElement !== this.#sort) this.#sort.value = `${preferences.descending ? "-" : ""}${preferences.sort}`;
    setText(this.#turn, preferences.descending ? "Largest or newest first" : "Smallest or oldest first");
    this.#draw();
  }

  #draw(): void {
    const preferences = this.#preferences;
    if (preferences === null) return;
    const { finds, problem } = finder(this.#search.value);
    const chosen = preferences.columns;
    const found = [...new Set([...chosen, SPARK, ...this.#fields])].filter((field) => field !== "name" && finds(labelOf(field)));
    replaceChildren(
      this.#columns,
      ...found.slice(0, CHOICES).map((field) => {
        const box = h("input", {
          type: "checkbox",
          checked: chosen.includes(field),
          onchange: () =>
            this.#host.prefer({
              columns: chosen.includes(field) ? chosen.filter((each) => each !== field) : [...chosen, field],
            }),
        });
        return h("label", { class: "check" }, box, h("span", {}, labelOf(field)));
      }),
    );
    const more = found.length - CHOICES;
    setText(this.#more, problem || (more > 0 ? `${more} more: search for them.` : ""));
    show(this.#more, this.#more.textContent !== "");
  }
}

function labelOf(field: Field): string {
  if (field === "last" || field === "best") return `${titleOf(field)} value of the monitored metric`;
  if (field.startsWith(LAST)) return `last ${titleOf(field)}`;
  return titleOf(field);
}
