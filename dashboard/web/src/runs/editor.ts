// The dialog in which name, tags, note and archive mark of a run are edited.

import { button, dialog, h, setText, show } from "../dom";
import type { Ack, Edit, RunRow } from "../protocol";

/** Bounds of the protocol. */
const MOST = { name: 200, tags: 50, tag: 100, note: 16_384 };

export interface EditorHost {
  send(edit: Edit): boolean;
  rowOf(key: string): RunRow | undefined;
  announce(text: string): void;
  newId(): string;
}

/** Tags as they are typed: with commas between them. */
export function readTags(text: string): string[] {
  return [...new Set(text.split(/[,\n]/).map((tag) => tag.trim()).filter(Boolean))];
}

/** Why this cannot be saved, in a sentence; empty if it can. */
export function judge(name: string, tags: readonly string[], note: string): string {
  if ([...name].length > MOST.name) return `A name has at most ${MOST.name} characters, this one has ${[...name].length}.`;
  if (tags.length > MOST.tags) return `A run has at most ${MOST.tags} tags, these are ${tags.length}.`;
  const long = tags.find((tag) => [...tag].length > MOST.tag);
  if (long !== undefined) return `A tag has at most ${MOST.tag} characters: ${long.slice(0, 30)}…`;
  if ([...note].length > MOST.note) return `A note has at most ${MOST.note} characters, this one has ${[...note].length}.`;
  return "";
}

export class Editor {
  readonly dialog: HTMLDialogElement;
  readonly #host: EditorHost;
  readonly #heading = h("h2");
  readonly #name = h("input", { id: "edit-name", class: "input", dir: "auto", autocomplete: "off" });
  readonly #tags = h("input", { id: "edit-tags", class: "input", dir: "auto", autocomplete: "off", placeholder: "baseline, paper" });
  readonly #note = h("textarea", { id: "edit-note", class: "input", dir: "auto", rows: 6 });
  readonly #archived = h("input", { type: "checkbox" });
  readonly #problem = h("p", { class: "problem", role: "alert" });
  readonly #save: HTMLButtonElement;
  /** What the dialog began with: an edit is about what differs from it. */
  #begun: RunRow | null = null;
  /** Version of the run that the next edit is based on. */
  #version = 0;
  #waiting: string | null = null;
  #rejected = false;

  constructor(host: EditorHost) {
    this.#host = host;
    this.#save = h("button", { class: "button primary" }, "Save");
    const form = h(
      "form",
      { class: "edit-form" },
      h("label", { for: "edit-name" }, "Name"),
      this.#name,
      h("label", { for: "edit-tags" }, "Tags, with commas between them"),
      this.#tags,
      h("label", { for: "edit-note" }, "Note"),
      this.#note,
      h("label", { class: "check" }, this.#archived, h("span", {}, "Archived: hidden in lists")),
      this.#problem,
      h("div", { class: "dialog-buttons" }, button("Cancel", { onclick: () => this.dialog.close() }), this.#save),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.dialog = dialog("edit", this.#heading, form);
    this.dialog.addEventListener("close", () => (this.#waiting = null));
  }

  open(row: RunRow): void {
    this.#begun = row;
    this.#version = row.version;
    this.#rejected = false;
    setText(this.#heading, `About ${row.id}`);
    this.#name.value = row.name;
    this.#name.placeholder = row.id;
    this.#tags.value = row.tags.join(", ");
    this.#note.value = row.note;
    this.#archived.checked = row.archived;
    this.#tell("");
    this.dialog.showModal();
    this.#name.select();
  }

  /** The server has answered an edit. */
  answered(ack: Ack): void {
    if (ack.id !== this.#waiting) return;
    if (ack.state === "accepted") return;
    this.#waiting = null;
    if (ack.state === "applied") {
      this.dialog.close();
      this.#host.announce("Saved.");
      return;
    }
    this.#rejected = true;
    this.#tell(ack.why);
    this.changed();
  }

  /** Rows have changed: after a rejection, tell what the run has by now. */
  changed(): void {
    const begun = this.#begun;
    const now = begun === null || !this.#rejected ? undefined : this.#host.rowOf(begun.key);
    if (begun === null || now === undefined || now.version === this.#version) return;
    // What was typed stays; saving once more is based on what the run has by now.
    this.#version = now.version;
    this.#tell(`Changed meanwhile in another place${differs(begun, now)}. Save again to replace it with yours.`);
  }

  #submit(): void {
    const begun = this.#begun;
    if (begun === null || this.#waiting !== null) return;
    const name = this.#name.value.trim();
    const tags = readTags(this.#tags.value);
    const note = this.#note.value;
    const problem = judge(name, tags, note);
    if (problem !== "") {
      this.#tell(problem);
      return;
    }
    const edit: Edit = { type: "edit", id: this.#host.newId(), run: begun.key, version: this.#version };
    if (name !== begun.name) edit.name = name === begun.id ? "" : name;
    if (JSON.stringify(tags) !== JSON.stringify(begun.tags)) edit.tags = tags;
    if (note !== begun.note) edit.note = note;
    if (this.#archived.checked !== begun.archived) edit.archived = this.#archived.checked;
    if (Object.keys(edit).length === 4) {
      this.dialog.close();
      return;
    }
    if (!this.#host.send(edit)) {
      this.#tell("There is no connection to the server.");
      return;
    }
    this.#waiting = edit.id;
    this.#rejected = false;
    this.#tell("");
  }

  #tell(text: string): void {
    setText(this.#problem, text);
    show(this.#problem, text !== "");
  }
}

/** What a run has by now, where that differs from what an edit began with. */
function differs(begun: RunRow, now: RunRow): string {
  const parts = [
    now.name !== begun.name ? `the name is ${now.name}` : "",
    now.tags.join() !== begun.tags.join() ? `the tags are ${now.tags.join(", ") || "none"}` : "",
    now.note !== begun.note ? `the note is “${now.note.length > 200 ? `${now.note.slice(0, 200)}…` : now.note}”` : "",
    now.archived !== begun.archived ? (now.archived ? "it is archived" : "it is not archived") : "",
  ];
  const text = parts.filter(Boolean).join(", ");
  return text === "" ? "" : `: ${text}`;
}
