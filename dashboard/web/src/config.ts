// What is fixed about the run: where it runs and every knob of it, as the server has masked them.

import { button, h, replaceChildren, setText, show } from "./dom";
import * as format from "./format";
import type { RunInfo } from "./protocol";
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
  readonly #facts = h("dl", { class: "settings" });
  readonly #settings = h("dl", { class: "settings" });
  readonly #note = h("p", { class: "empty" });
  readonly #copied = h("span", { class: "hint", role: "status" });
  #run: RunInfo | null = null;

  constructor() {
    this.element = h(
      "div",
      { class: "config" },
      h("div", { class: "toolbar" }, this.search, button("Copy as JSON", { onclick: () => void this.#copy() }), this.#copied),
      h("h2", {}, "Run"),
      this.#facts,
      h("h2", {}, "Configuration"),
      this.#settings,
      this.#note,
    );
  }

  update(run: RunInfo | null): void {
    if (run === this.#run) return;
    this.#run = run;
    setText(this.#copied, "");
    this.#draw();
  }

  #draw(): void {
    const finds = finder(this.search.value);
    const fits = ({ key, value }: Entry): boolean => finds(`${key} ${value}`);
    const facts = this.#run === null ? [] : factsOf(this.#run).filter(fits);
    const settings = this.#run === null ? [] : flatten(this.#run.config).filter(({ key }) => key !== "").filter(fits);
    replaceChildren(this.#facts, ...facts.map(entry));
    replaceChildren(this.#settings, ...settings.map(entry));
    const text = this.#run === null ? "No run yet." : facts.length + settings.length === 0 ? "No setting matches." : "";
    setText(this.#note, text);
    show(this.#note, text !== "");
  }

  async #copy(): Promise<void> {
    if (this.#run === null) return;
    try {
      await navigator.clipboard.writeText(JSON.stringify(this.#run.config, null, 2));
      setText(this.#copied, "Copied.");
    } catch {
      setText(this.#copied, "The browser does not let this page copy (it does over https and on localhost).");
    }
  }
}

function entry({ key, value }: Entry): HTMLElement {
  return h("div", { class: "setting" }, h("dt", {}, key), h("dd", {}, value));
}

function factsOf(run: RunInfo): Entry[] {
  const limits = [
    run.epochs === null ? "" : `${format.count(run.epochs)} epochs`,
    run.max_steps === null ? "" : `${format.count(run.max_steps)} steps`,
    run.max_time === null ? "" : format.duration(run.max_time),
  ];
  const facts: [string, string | null][] = [
    ["name", run.name],
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
