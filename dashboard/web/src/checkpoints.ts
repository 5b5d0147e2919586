// The tab of the run's checkpoints: what is on disk, as the server lists it, with what events tell of each. They are
// verified and tagged from here, and the line that resumes from one or loads it can be copied.

import { CANNOT_COPY, copyText } from "./clipboard";
import { button, dialog, h, replaceChildren, setText, show } from "./dom";
import * as format from "./format";
import { hasEnded, stateOf, type Model } from "./model";
import { toNumber, type Ack, type CheckpointRow, type Checkpoints as Listed, type EditCheckpoint, type ListCheckpoints, type RunEvent } from "./protocol";

export interface CheckpointsHost {
  send(message: ListCheckpoints | EditCheckpoint): boolean;
  announce(text: string): void;
  newId(): string;
}

/** Events after which the list may be another one. */
const CHANGES = new Set(["CheckpointSaved", "CheckpointFailed", "Evaluated", "Resumed", "TrainEnd"]);
/** Rows in the document, unless more are asked for. */
const ROWS = 200;

/** What events tell of checkpoints: seconds to write, by name, and where they were uploaded, by step. */
export interface Told {
  seconds: ReadonlyMap<string, number>;
  uploaded: ReadonlyMap<number, string>;
  /** Number of events after which the list may be another one. */
  changes: number;
}

export function toldBy(milestones: readonly RunEvent[]): Told {
  const seconds = new Map<string, number>();
  const uploaded = new Map<number, string>();
  let changes = 0;
  for (const event of milestones) {
    if (CHANGES.has(event.type) || (event.type === "CommandApplied" && event.command === "tag")) changes++;
    if (event.type === "CheckpointSaved" && typeof event.path === "string" && typeof event.seconds === "number") {
      seconds.set(event.path.split("/").pop() as string, event.seconds);
    }
    if (event.type === "CheckpointUploaded" && typeof event.url === "string") uploaded.set(Number(event.uploaded_step), event.url);
  }
  return { seconds, uploaded, changes };
}

/** Lines of Python that go on from a checkpoint, or load its weights. */
export function linesOf({ path }: CheckpointRow): { resume: string; load: string } {
  const text = JSON.stringify(path); // a string of Python, too
  return { resume: `trainer.train(train_loader, val_loader, resume=${text})`, load: `load_model(${text}, into=model)` };
}

/** What is known about the bytes of a checkpoint, in words. */
export function stateIn(row: CheckpointRow, verifying: readonly string[]): { text: string; tone: "plain" | "good" | "bad" } {
  if (verifying.includes(row.name)) return { text: "is being read", tone: "plain" };
  if (row.damaged !== "") return { text: `damaged: ${row.damaged}`, tone: "bad" };
  if (row.verified !== null) return { text: `verified ${format.clock(row.verified)}`, tone: "good" };
  return { text: "not verified", tone: "plain" };
}

export class Checkpoints {
  readonly element: HTMLElement;
  readonly dialog: HTMLDialogElement;
  readonly #host: CheckpointsHost;
  readonly #table = h("table", { class: "compare-table checkpoint-table" });
  readonly #scroll = h("div", { class: "compare-scroll", tabindex: 0, role: "region", "aria-label": "Checkpoints" }, this.#table);
  readonly #note = h("p", { class: "empty" });
  readonly #problem = h("p", { class: "problem", role: "alert" });
  readonly #line = h("code", { class: "stage-line" });
  readonly #copied = h("span", { class: "hint", role: "status" });
  readonly #lineRow = h("div", { class: "stage-copy", hidden: true }, this.#line, this.#copied);
  readonly #verifyAll: HTMLButtonElement;
  readonly #all = h("button", { type: "button", class: "button small", hidden: true, onclick: () => this.#showAll() });
  // The dialog that tags
  readonly #heading = h("h2");
  readonly #tag = h("input", { id: "checkpoint-tag", class: "input", autocomplete: "off", maxlength: 64, placeholder: "good" });
  readonly #move = h("input", { type: "checkbox" });
  #tagged: CheckpointRow | null = null;

  #model: Model | null = null;
  #milestones: readonly RunEvent[] = [];
  #told: Told = toldBy([]);
  #listed: Listed | null = null;
  #active = false;
  /** The run, and what was known of it, when the list was asked for last. */
  #asked = "";
  /** Ids of what was asked for, and the words to say when it is done. */
  readonly #waiting = new Map<string, string>();
  #most = ROWS;
  #made = "";

  constructor(host: CheckpointsHost) {
    this.#host = host;
    this.#verifyAll = button("Verify all", { onclick: () => this.#verify(this.#rows) });
    this.element = h(
      "div",
      { class: "checkpoints" },
      h("div", { class: "toolbar" }, this.#verifyAll, this.#lineRow),
      this.#problem,
      this.#scroll,
      this.#all,
      this.#note,
    );
    const form = h(
      "form",
      { class: "edit-form" },
      h("label", { for: "checkpoint-tag" }, "Tag: letters, digits, dots, dashes and underscores"),
      this.#tag,
      h("label", { class: "check" }, this.#move, h("span", {}, "Take it off another checkpoint that has it")),
      h(
        "div",
        { class: "dialog-buttons" },
        button("Cancel", { onclick: () => this.dialog.close() }),
        h("button", { class: "button primary" }, "Tag"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#setTag();
    });
    this.dialog = dialog("tag", this.#heading, form);
  }

  /** Whether the run has any, as far as its events tell. */
  get has(): boolean {
    return this.#told.changes > 0 && (this.#told.seconds.size > 0 || this.#rows.length > 0 || (this.#model?.run?.attempt ?? 0) > 1);
  }

  get #rows(): readonly CheckpointRow[] {
    return this.#listed?.run === this.#model?.run?.key ? (this.#listed?.rows ?? []) : [];
  }

  setActive(active: boolean): void {
    this.#active = active;
    if (active) this.#asked = "";
    this.#ask();
  }

  update(model: Model): void {
    if (model.run?.key !== this.#model?.run?.key) {
      this.#listed = null;
      this.#most = ROWS;
      setText(this.#problem, "");
      show(this.#lineRow, false);
    }
    // A question may have gone with its connection
    if (model.hello !== this.#model?.hello) this.#asked = "";
    this.#model = model;
    if (model.milestones !== this.#milestones) {
      this.#milestones = model.milestones;
      this.#told = toldBy(model.milestones);
    }
    this.#ask();
    if (this.#active) this.#draw();
  }

  listed(message: Listed): void {
    this.#listed = message;
    if (this.#active) this.#draw();
  }

  answered({ id, state, why }: Ack): void {
    const done = this.#waiting.get(id);
    if (done === undefined) return;
    this.#waiting.delete(id);
    if (state === "applied") {
      if (done !== "") this.#host.announce(done);
      setText(this.#problem, "");
    } else {
      setText(this.#problem, `That was not done: ${why}.`);
    }
  }

  /** Ask for the list, if it can be seen and may be another one than before. */
  #ask(): void {
    const { run } = this.#model ?? {};
    if (!this.#active || !run) return;
    const asked = `${run.key} ${run.attempt} ${this.#told.changes}`;
    if (asked !== this.#asked && this.#host.send({ type: "checkpoints", run: run.key })) this.#asked = asked;
  }

  #edit(row: CheckpointRow, edit: Pick<EditCheckpoint, "action" | "tag" | "move">, done = ""): void {
    const run = this.#model?.run;
    if (!run) return;
    const id = this.#host.newId();
    this.#waiting.set(id, done);
    this.#host.send({ type: "edit_checkpoint", id, run: run.key, checkpoint: row.name, ...edit });
  }

  #verify(rows: readonly CheckpointRow[]): void {
    for (const row of rows) if (row.path !== "") this.#edit(row, { action: "verify" }, `Step ${row.step} was read`);
    const run = this.#model?.run;
    if (run) this.#host.send({ type: "checkpoints", run: run.key }); // says which are being read
  }

  #askTag(row: CheckpointRow): void {
    this.#tagged = row;
    setText(this.#heading, `Tag the checkpoint of step ${format.count(row.step)}`);
    this.#tag.value = "";
    this.#move.checked = false;
    this.dialog.showModal();
    this.#tag.focus();
  }

  #setTag(): void {
    const tag = this.#tag.value.trim();
    if (this.#tagged === null || tag === "") return;
    this.#edit(this.#tagged, { action: "tag", tag, move: this.#move.checked }, `Tagged ${tag}`);
    this.dialog.close();
  }

  async #copy(line: string): Promise<void> {
    show(this.#lineRow, true);
    setText(this.#line, line);
    const copied = await copyText(line);
    setText(this.#copied, copied ? "Copied." : CANNOT_COPY);
    if (!copied) getSelection()?.selectAllChildren(this.#line);
  }

  #showAll(): void {
    this.#most = Infinity;
    this.#draw();
  }

  #draw(): void {
    const model = this.#model as Model;
    const monitor = model.run?.monitor ?? "";
    const isControl = model.hello?.role === "control";
    const rows = [...this.#rows].reverse();
    const verifying = this.#listed?.verifying ?? [];
    const made = JSON.stringify([this.#listed, this.#told.seconds.size, [...this.#told.uploaded], monitor, isControl, hasEnded(stateOf(model)), this.#most]);
    if (made === this.#made) return;
    this.#made = made;
    show(this.#verifyAll, isControl && rows.length > 0);
    show(this.#scroll, rows.length > 0);
    const hasUploads = rows.some(({ step }) => this.#told.uploaded.has(step));
    const titles = ["Step", "Reason", "Epoch", ...(monitor ? [monitor] : []), "Size", "Written in", "Saved", "Names", "Bytes", ...(hasUploads ? ["Uploaded to"] : []), ""];
    const texts = new Set(["Reason", "Names", "Bytes", "Uploaded to", ""]);
    const head = h("tr", {}, ...titles.map((title) => h("th", { scope: "col", class: texts.has(title) ? "compare-text" : null }, title)));
    replaceChildren(
      this.#table,
      h("thead", {}, head),
      h("tbody", {}, ...rows.slice(0, this.#most).map((row) => this.#row(row, { monitor, isControl, hasUploads, verifying }))),
    );
    show(this.#all, rows.length > this.#most);
    setText(this.#all, `Show all ${format.count(rows.length)}`);
    const error = this.#listed?.error ?? "";
    const note = error !== "" ? `The checkpoints cannot be listed: ${error}.` : this.#listed === null ? "The list is on its way." : rows.length === 0 ? "No checkpoint is on disk." : "";
    setText(this.#note, note);
    show(this.#note, note !== "");
  }

  #row(row: CheckpointRow, { monitor, isControl, hasUploads, verifying }: { monitor: string; isControl: boolean; hasUploads: boolean; verifying: readonly string[] }): HTMLElement {
    const isWhole = row.path !== "";
    // Of a page in a file the paths do not tell where the checkpoint is.
    const isUsable = isWhole && row.damaged === "" && !this.#model?.hello?.saved;
    const known = (value: string): string => (isWhole ? value : "");
    const score = row.metrics[monitor];
    const seconds = this.#told.seconds.get(row.name);
    const state = stateIn(row, verifying);
    const buttons = [
      isUsable && button("Resume", { class: "button small", title: "Copy the line that goes on from it", onclick: () => void this.#copy(linesOf(row).resume) }),
      isUsable && button("Load", { class: "button small", title: "Copy the line that loads its weights", onclick: () => void this.#copy(linesOf(row).load) }),
      isWhole && isControl && button("Tag", { class: "button small", onclick: () => this.#askTag(row) }),
      isWhole && isControl && button("Verify", { class: "button small", title: "Read every byte and compare checksums", onclick: () => this.#verify([row]) }),
    ];
    return h(
      "tr",
      { "data-name": row.name },
      h("th", { scope: "row", title: row.name }, isWhole ? format.count(row.step) : row.name),
      h("td", { class: "compare-text" }, row.reason),
      h("td", {}, known(String(row.epoch))),
      monitor ? h("td", { class: row.is_best ? "compare-best" : null }, score === undefined ? "" : format.number(toNumber(score))) : null,
      h("td", {}, known(format.bytes(row.bytes))),
      h("td", {}, seconds === undefined ? "" : format.duration(seconds)),
      h("td", {}, known(format.dateTime(row.created))),
      h("td", { class: "compare-text" }, ...this.#names(row, isControl)),
      h("td", { class: "compare-text checkpoint-state", "data-tone": state.tone }, state.text),
      hasUploads ? h("td", { class: "compare-text" }, this.#told.uploaded.get(row.step) ?? "") : null,
      h("td", { class: "compare-text checkpoint-buttons" }, ...buttons),
    );
  }

  #names(row: CheckpointRow, isControl: boolean): HTMLElement[] {
    const fixed = [row.is_best ? "best" : "", row.is_last ? "last" : ""].filter(Boolean);
    const mayRemove = isControl && this.#model !== null && hasEnded(stateOf(this.#model));
    const remove = (tag: string): HTMLButtonElement => {
      const label = `Take off the tag ${tag}`;
      const onclick = (): void => this.#edit(row, { action: "untag", tag }, `${tag} was taken off`);
      return h("button", { type: "button", class: "name-remove", "aria-label": label, title: label, onclick }, "×");
    };
    return [
      ...fixed.map((name) => h("span", { class: "name-chip" }, name)),
      ...row.tags.map((tag) => h("span", { class: "name-chip" }, tag, mayRemove ? remove(tag) : null)),
    ];
  }
}
