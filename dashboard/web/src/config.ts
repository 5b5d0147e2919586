// What is fixed about the run: what it was made with, where it runs, and every knob of it, as the server has masked them.

import { CANNOT_COPY, copyText } from "./clipboard";
import { button, h, replaceChildren, setText, show } from "./dom";
import * as format from "./format";
import type { RunInfo, RunRow } from "./protocol";
import { finder, searchField } from "./search";

export interface Entry {
  key: string;
  value: string;
}

/** Lay nested settings out flat: `optimizer.lr`. Lists of plain values stay one line. */
export function flatten(value: unknown, prefix = ""): Entry[] {
  if (typeof value === "object" && value !== null && !Array.isArray(value)) {
    const entries = Object.entries(value);
    if (entries.length > 0) {
      return entries.flatMap(([key, inner]) => flatten(inner, prefix === "" ? key : `${prefix}.${key}`));
    }
  }
  if (Array.isArray(value) && value.some((item) => typeof item === "object" && item !== null)) {
    return value.flatMap((item, index) => flatten(item, `${prefix}[${index}]`));
  }
  return [{ key: prefix, value: typeof value === "string" ? value : JSON.stringify(value) }];
}

export class Config {
  readonly element: HTMLElement;
  readonly search = searchField("Filter settings", () => this.#draw());
  readonly #made = h("dl", { class: "settings" });
  readonly #madeTitle = h("h2", {}, "Made with");
  readonly #facts = h("dl", { class: "settings" });
  readonly #settings = h("dl", { class: "settings" });
  /** Folded: knobs that are not at their default stand among what the run was made with. */
  readonly #summary = h("summary");
  readonly #knobs = h("details", {}, this.#summary, this.#settings);
  readonly #note = h("p", { class: "empty" });
  readonly #copied = h("span", { class: "hint", role: "status" });
  #run: RunInfo | null = null;
  #row: RunRow | null = null;

  constructor() {
    this.element = h(
      "div",
      { class: "config" },
      h("div", { class: "toolbar" }, this.search, button("Copy as JSON", { onclick: () => void this.#copy() }), this.#copied),
      this.#madeTitle,
      this.#made,
      h("h2", {}, "Run"),
      this.#facts,
      this.#knobs,
      this.#note,
    );
  }

  /** `row` is what the list of runs has of the run: its name, tags and note. */
  update(run: RunInfo | null, row: RunRow | null): void {
    if (run === this.#run && row?.version === this.#row?.version) return;
    if (run !== this.#run) {
      setText(this.#copied, "");
      // A recorded run of an earlier version has its knobs only.
      this.#knobs.open = Object.keys(run?.hyperparameters ?? {}).length === 0;
    }
    this.#run = run;
    this.#row = row;
    this.#draw();
  }

  #draw(): void {
    const { finds, problem } = finder(this.search.value);
    const fits = ({ key, value }: Entry): boolean => finds(`${key} ${value}`);
    const laidOut = (values: Record<string, unknown> | undefined): Entry[] =>
      flatten(values ?? {}).filter((each) => each.key !== "" && fits(each));
    const facts = this.#run === null ? [] : factsOf(this.#run, this.#row).filter(fits);
    const made = laidOut(this.#run?.hyperparameters);
    const knobs = laidOut(this.#run?.config);
    replaceChildren(this.#made, ...made.map(entry));
    replaceChildren(this.#facts, ...facts.map(entry));
    replaceChildren(this.#settings, ...knobs.map(entry));
    show(this.#madeTitle, made.length > 0);
    show(this.#knobs, knobs.length > 0);
    setText(this.#summary, `All knobs of the trainer: ${knobs.length}`);
    if (this.search.value !== "") this.#knobs.open = true;
    const none = facts.length + made.length + knobs.length === 0;
    const text = this.#run === null ? "No run yet." : problem || (none ? "No setting matches." : "");
    setText(this.#note, text);
    show(this.#note, text !== "");
  }

  async #copy(): Promise<void> {
    if (this.#run === null) return;
    const text = JSON.stringify({ ...this.#run.hyperparameters, config: this.#run.config }, null, 2);
    setText(this.#copied, (await copyText(text)) ? "Copied." : CANNOT_COPY);
  }
}

function entry({ key, value }: Entry): HTMLElement {
  return h("div", { class: "setting" }, h("dt", {}, key), h("dd", {}, value));
}

function factsOf(run: RunInfo, row: RunRow | null): Entry[] {
  const limits = [
    run.epochs === null ? "" : `${format.count(run.epochs)} epochs`,
    run.max_steps === null ? "" : `${format.count(run.max_steps)} steps`,
    run.max_time === null ? "" : format.duration(run.max_time),
  ];
  const facts: [string, string | null][] = [
    ["name", row?.name ?? run.name],
    ["id", row !== null && row.name !== run.name ? run.name : null],
    ["tags", row?.tags.join(", ") ?? null],
    ["note", row?.note ?? null],
    ["attempt", run.attempt > 0 ? String(run.attempt) : null],
    ["started", run.started > 0 ? format.dateTime(run.started) : null],
    ["host", run.host],
    ["process", run.pid > 0 ? String(run.pid) : null],
    ["command", run.command.join(" ")],
    ["commit", run.commit],
    ["directory", run.directory ?? "nothing is written"],
    ["device", run.device],
    ["ranks", run.world_size > 1 ? format.count(run.world_size) : null],
    ["trainable parameters", run.parameters > 0 ? format.count(run.parameters) : null],
    ["optimizers", run.optimizers.join(", ")],
    ["steps an epoch", run.steps_per_epoch === null ? null : format.count(run.steps_per_epoch)],
    ["batches an epoch", run.batches_per_epoch === null ? null : format.count(run.batches_per_epoch)],
    ["limit", limits.filter(Boolean).join(", ") || "none"],
    ["best by", run.monitor],
  ];
  return facts.flatMap(([key, value]) => (value ? [{ key, value }] : []));
}
