// The head of the page: which run this is, where it is, and what it waits for.

import { h, icon, iconButton, ICONS, replaceChildren, setAttribute, setIcon, setText, show } from "./dom";
import type { Link } from "./connection";
import * as format from "./format";
import { hasEnded, type Model } from "./model";
import { toNumber, type RunInfo, type Status } from "./protocol";
import type { Described } from "./states";
import type { Theme } from "./view";

export interface HeaderHost {
  nextTheme(): void;
  setNotify(on: boolean): void;
  showKeys(): void;
}

/** Shares of the time in which a run is said to wait for something. */
const MOSTLY = 0.5;
/** An answer that takes longer is slow, milliseconds. */
const SLOW = 500;

class Figure {
  readonly element: HTMLElement;
  readonly #label: HTMLElement;
  readonly #value = h("span", { class: "value" }, format.NONE);
  readonly #more = h("span", { class: "more" });

  constructor(label: string, name: string) {
    this.#label = h("dt", {}, label);
    this.element = h(
      "div",
      { class: `figure figure-${name}` },
      this.#label,
      h("dd", {}, this.#value, this.#more),
    );
  }

  label(text: string): void {
    setText(this.#label, text);
  }

  set(value: string, more = "", tone = ""): void {
    setText(this.#value, value);
    setText(this.#more, more);
    setAttribute(this.element, "data-tone", tone || null);
  }
}

const OTHER = "Validation, checkpoints, pauses, and the loop itself";

class Shares {
  readonly element: HTMLElement;
  readonly #bar = h("div", { class: "shares-bar", "aria-hidden": "true" });
  readonly #parts: { name: string; segment: HTMLElement; value: HTMLElement }[];
  readonly #says = h("dt", {}, "Time goes to");

  constructor() {
    this.#parts = ["data", "compute", "callbacks", "other"].map((name) => ({
      name,
      segment: h("span", { class: `share share-${name}` }),
      value: h("span", { class: "share-value" }, format.NONE),
    }));
    this.#bar.append(...this.#parts.map(({ segment }) => segment));
    const legend = this.#parts.map(({ name, value }) =>
      h("span", { class: "share-legend", title: name === "other" ? OTHER : null }, h("i", { class: `share-${name}`, "aria-hidden": "true" }), `${name} `, value),
    );
    this.element = h(
      "div",
      { class: "figure shares" },
      this.#says,
      h("dd", {}, this.#bar, h("span", { class: "share-legends" }, ...legend)),
    );
  }

  update(status: Status | null): void {
    const known = [status?.data_share ?? 0, status?.compute_share ?? 0, status?.callback_share ?? 0];
    const shares = [...known, Math.max(0, 1 - known.reduce((sum, share) => sum + share))];
    this.#parts.forEach(({ segment, value }, index) => {
      const share = shares[index] ?? 0;
      segment.style.width = `${(Math.min(share, 1) * 100).toFixed(1)}%`;
      setText(value, status === null ? format.NONE : format.percent(share));
    });
    const [data = 0, , callbacks = 0] = shares;
    const waits = data > MOSTLY ? "Waits for data" : callbacks > MOSTLY ? "Waits for callbacks" : "Time goes to";
    setText(this.#says, waits);
    setAttribute(this.element, "data-tone", waits === "Time goes to" ? null : "warn");
  }
}

export class Header {
  readonly element: HTMLElement;
  readonly #name = h("h1", { class: "run-name" }, "offloop");
  readonly #about = h("p", { class: "about" });
  readonly #word = h("span", { class: "word" });
  readonly #pill = h("span", { class: "pill" }, h("i", { class: "dot", "aria-hidden": "true" }), this.#word);
  readonly #detail = h("span", { class: "state-detail" });
  readonly #aside = h("span", { class: "chip", hidden: true });
  readonly #readOnly = h("span", { class: "chip", hidden: true }, icon(ICONS.eye), "read-only");
  readonly #linkWord = h("span", { class: "link-word" });
  readonly #latency = h("span", { class: "latency" });
  readonly #link = h("span", { class: "link" }, this.#linkWord, this.#latency);
  readonly #viewers = h("span", { class: "viewers" });
  readonly #bell: HTMLButtonElement;
  readonly #theme: HTMLButtonElement;
  /** What a phone shows of the figures while the head is folded. */
  readonly #brief = h("span", { class: "brief" });
  readonly #fold: HTMLButtonElement;
  readonly #progress = h("progress", { class: "progress", max: 1, "aria-label": "Share of the run that is done", hidden: true });
  readonly #figures = {
    loss: new Figure("Loss", "loss"),
    done: new Figure("Progress", "done"),
    step: new Figure("Step", "step"),
    left: new Figure("Time left", "left"),
    epoch: new Figure("Epoch", "epoch"),
    lr: new Figure("Learning rate", "lr"),
    steps: new Figure("Steps/s", "steps"),
    samples: new Figure("Samples/s", "samples"),
  };
  readonly #shares = new Shares();
  #run: RunInfo | null = null;

  /** `runs` opens the list of runs. */
  constructor(runs: HTMLElement, host: HeaderHost) {
    this.#bell = iconButton("bell", "Notify me at the end and at alerts", () =>
      host.setNotify(this.#bell.getAttribute("aria-pressed") !== "true"),
    );
    this.#theme = iconButton("auto", "", () => host.nextTheme());
    const keys = iconButton("keys", "Keys (?)", () => host.showKeys());
    keys.classList.add("keys-button");
    this.#fold = iconButton("unfold", "Figures of the run", () => this.#setFolded(!this.element.classList.contains("folded")));
    this.#fold.classList.add("fold-button");
    this.setTheme("auto");
    this.setNotify(false);
    this.element = h(
      "header",
      { class: "head folded" },
      h(
        "div",
        { class: "head-top" },
        h("div", { class: "identity" }, runs, this.#name),
        h("div", { class: "state" }, this.#pill, this.#aside, this.#readOnly, this.#detail),
        this.#brief,
        h("div", { class: "meta" }, this.#link, this.#viewers, this.#bell, this.#theme, keys, this.#fold),
      ),
      this.#about,
      h("dl", { class: "figures" }, ...Object.values(this.#figures).map(({ element }) => element), this.#shares.element),
      this.#progress,
    );
    this.#setFolded(true);
  }

  /** On a phone the head is one line until it is unfolded. */
  #setFolded(folded: boolean): void {
    this.element.classList.toggle("folded", folded);
    setAttribute(this.#fold, "aria-expanded", String(!folded));
  }

  setTheme(theme: Theme): void {
    setIcon(this.#theme, theme, `Theme: ${theme === "auto" ? "as the system" : theme} (t)`);
  }

  setNotify(on: boolean): void {
    setAttribute(this.#bell, "aria-pressed", String(on));
  }

  update(model: Model, described: Described, link: Link, name: string): void {
    const { run, status } = model;
    this.#updateRun(run);
    const title = run === null ? "offloop" : name + (run.attempt > 0 ? ` #${run.attempt}` : "");
    setText(this.#name, title);
    setAttribute(this.#name, "title", title);
    setText(this.#word, described.word);
    setAttribute(this.#pill, "data-tone", described.tone);
    setText(this.#detail, described.detail);
    setAttribute(this.#detail, "title", described.detail || null);
    setText(this.#aside, described.aside);
    show(this.#aside, described.aside !== "");
    const saved = model.hello?.saved ?? null;
    show(this.#readOnly, model.hello?.role === "read_only" && saved === null);
    show(this.#bell, saved === null);
    if (saved === null) this.#updateLink(link);
    else this.#updateSaved(saved);
    const others = status && link.phase === "open" ? status.viewers - 1 : 0;
    setText(this.#viewers, others > 0 ? `${others + 1} viewers` : "");
    this.#updateFigures(run, status);
  }

  #updateRun(run: RunInfo | null): void {
    if (run === this.#run) return;
    this.#run = run;
    const facts: [string, string][] =
      run === null
        ? []
        : [
            ["host", run.host],
            ["commit", run.commit?.slice(0, 10) ?? ""],
            ["device", run.device],
            ["ranks", run.world_size > 1 ? `${format.count(run.world_size)} ranks` : ""],
            ["parameters", run.parameters > 0 ? `${format.shortCount(run.parameters)} parameters` : ""],
            ["command", run.command.join(" ")],
          ];
    replaceChildren(
      this.#about,
      ...facts
        .filter(([, value]) => value !== "")
        .map(([name, value]) => h("span", { class: `fact fact-${name}`, title: `${name}: ${value}` }, value)),
    );
  }

  /** A page in a file has no connection, and says how old it is. */
  #updateSaved(saved: number): void {
    const time = format.dateTime(saved);
    setText(this.#linkWord, `saved ${time.slice(0, 10)}`);
    setAttribute(this.#link, "title", `This file shows its runs as they were at ${time}`);
    this.#link.classList.add("saved");
  }

  #updateLink(link: Link): void {
    const open = link.phase === "open";
    const latency = link.latency === null ? "" : `${link.latency < 1 ? "<1" : Math.round(link.latency)} ms`;
    const word = open ? "connected" : link.phase === "connecting" ? "connecting" : "not connected";
    setText(this.#linkWord, word);
    setText(this.#latency, open && (link.latency ?? 0) > SLOW ? `slow: ${latency}` : "");
    setAttribute(this.#link, "title", open ? `${word}${latency && `, a message and its answer take ${latency}`}` : word);
    setAttribute(this.#link, "data-tone", open ? "live" : "off");
  }

  #updateFigures(run: RunInfo | null, status: Status | null): void {
    const figures = this.#figures;
    const limit = run?.max_steps ?? (run?.epochs && run.steps_per_epoch ? run.epochs * run.steps_per_epoch : null);
    const loss = toNumber(status?.loss ?? null);
    figures.step.set(format.count(status?.step), limit === null ? "" : ` / ${format.count(limit)}`);
    const epochs = run?.epochs ?? null;
    const epoch = status === null ? null : Math.min(status.epoch + 1, epochs ?? Infinity);
    figures.epoch.set(format.count(epoch), epochs === null ? "" : ` / ${format.count(epochs)}`);
    const ended = hasEnded(status?.state);
    figures.left.label(ended ? "Took" : "Time left");
    if (ended) figures.left.set(format.duration(status?.seconds));
    else figures.left.set(format.duration(status?.time_left), status ? ` ${format.duration(status.seconds)} elapsed` : "");
    const lossTone = loss !== null && !Number.isFinite(loss) ? "bad" : "";
    figures.loss.set(format.number(loss), "", lossTone);
    setAttribute(this.#brief, "data-tone", lossTone || null);
    figures.lr.set(format.compact(status?.lr));
    figures.steps.set(format.perSecond(status?.steps_per_second ?? 0));
    figures.samples.set(format.perSecond(status?.samples_per_second ?? 0));
    this.#shares.update(status);
    const progress = status?.progress ?? null;
    // Not 100 % before it is done
    const percent = progress === null ? "" : format.percent(Math.floor(100 * progress) / 100);
    show(figures.done.element, progress !== null);
    figures.done.set(percent);
    // How far a run that is over has come, its state says; a name needs the room.
    setText(this.#brief, [loss === null ? "" : format.number(loss), ended ? "" : percent].filter(Boolean).join(" · "));
    show(this.#progress, progress !== null);
    if (progress !== null) this.#progress.value = progress;
    const tones: Record<string, string> = { completed: "good", failed: "bad", stopped: "off", cancelled: "off" };
    const isBad = status?.state === "completed" && loss !== null && !Number.isFinite(loss);
    setAttribute(this.#progress, "data-tone", isBad ? "warn" : tones[status?.state ?? ""]);
  }
}
