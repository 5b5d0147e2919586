// The buttons by which a viewer steers the run. A button that may not be used says why, also to the keyboard.

import { COMMAND_LABELS, judgeLr, refusal, tellCommand } from "./commands";
import type { Link } from "./connection";
import { button, dialog, h, icon, ICONS, replaceChildren, setAttribute, setText, show } from "./dom";
import * as format from "./format";
import { pending, stateOf, type Command, type Model } from "./model";
import type { CommandName, CommandRequest } from "./protocol";

export type Order = Pick<CommandRequest, "name"> & Partial<Pick<CommandRequest, "lr" | "optimizer" | "checkpoint">>;

export interface ControlsHost {
  give(order: Order): void;
  announce(text: string): void;
}

/** What became of a command stays in sight for this long, milliseconds; longer where it went wrong. */
const TOLD_FOR = 5_000;
const TOLD_FOR_BAD = 15_000;
/** Lines about commands at a time. */
const TOLD_AT_ONCE = 3;

class Control {
  readonly element: HTMLButtonElement;
  readonly #label: HTMLElement;
  #icon: SVGElement;
  #reason: string | null = null;
  #name: CommandName;

  constructor(name: CommandName, press: (name: CommandName) => void, refused: (reason: string) => void) {
    this.#name = name;
    this.#icon = icon(ICONS[iconOf(name)]);
    this.#label = h("span", { class: "label" });
    this.element = h(
      "button",
      {
        type: "button",
        class: `button control control-${name}`,
        // aria-disabled instead of disabled: the button keeps the focus and can be asked for its reason
        onclick: () => (this.#reason === null ? press(this.#name) : refused(this.#reason)),
      },
      this.#icon,
      this.#label,
    );
    this.rename(name, true);
  }

  rename(name: CommandName, always = false): void {
    if (name === this.#name && !always) return;
    this.#name = name;
    const picture = icon(ICONS[iconOf(name)]);
    this.#icon.replaceWith(picture);
    this.#icon = picture;
    const label = COMMAND_LABELS[name] + (name === "stop" || name === "set_lr" ? "…" : "");
    const short = name === "set_lr" ? h("span", { class: "short" }, "LR…") : null;
    replaceChildren(this.#label, h("span", { class: "long" }, label), short);
  }

  /** `of` is the name of the run where there are several, else empty. */
  update(model: Model, link: Link, of: string): void {
    this.#reason = refusal(this.#name, model, link);
    setAttribute(this.element, "aria-label", of === "" ? null : `${COMMAND_LABELS[this.#name]} ${of}`);
    const busy = pending(model, this.#name) !== undefined;
    setAttribute(this.element, "aria-disabled", this.#reason === null ? null : "true");
    setAttribute(this.element, "title", this.#reason);
    setAttribute(this.element, "aria-description", this.#reason);
    setAttribute(this.element, "aria-busy", busy ? "true" : null);
  }
}

function iconOf(name: CommandName): keyof typeof ICONS {
  return name === "set_lr" ? "lr" : name;
}

export class Controls {
  readonly element: HTMLElement;
  /** What has become of the last commands. */
  readonly acks = h("ul", { class: "acks", "aria-label": "Commands" });
  readonly dialogs: HTMLDialogElement[];
  readonly #host: ControlsHost;
  readonly #controls: Control[];
  readonly #pauseOrResume: Control;
  readonly #of = h("span", { class: "controls-of", dir: "auto" });
  readonly #page = h("a", { class: "button controls-page", target: "_blank", rel: "noopener noreferrer", hidden: true }, "Open its own page");
  readonly #stop: StopDialog;
  readonly #lr: LrDialog;
  #model: Model | null = null;
  #now = 0;
  #refused: { reason: string; until: number } | null = null;
  #told = "";
  readonly #spoken = new Map<string, string>();

  constructor(host: ControlsHost) {
    this.#host = host;
    this.#stop = new StopDialog((order) => host.give(order));
    this.#lr = new LrDialog((order) => host.give(order));
    this.dialogs = [this.#stop.element, this.#lr.element];
    const press = (name: CommandName): void => this.#press(name);
    const refused = (reason: string): void => this.#refuse(reason);
    const control = (name: CommandName): Control => new Control(name, press, refused);
    this.#pauseOrResume = control("pause");
    this.#controls = [this.#pauseOrResume, control("checkpoint"), control("validate"), control("set_lr"), control("stop")];
    this.element = h(
      "div",
      { class: "controls", role: "group", "aria-label": "Control of the run" },
      this.#of,
      ...this.#controls.map(({ element }) => element),
      this.#page,
    );
  }

  /** `of` is the name of the run where there are several, else empty. */
  update(model: Model, link: Link, now: number, of: string): void {
    this.#model = model;
    this.#now = now;
    const resumes = stateOf(model) === "paused" || pending(model, "resume") !== undefined;
    this.#pauseOrResume.rename(resumes ? "resume" : "pause");
    for (const control of this.#controls) control.update(model, link, of);
    setText(this.#of, of);
    setAttribute(this.#of, "title", of || null);
    show(this.#of, of !== "");
    // From a file of another process: nothing but an address of a page.
    const page = /^https?:\/\//.test(model.run?.page ?? "") ? (model.run?.page ?? null) : null;
    setAttribute(this.#page, "href", page);
    show(this.#page, page !== null);
    this.#stop.update(model, of);
    this.#lr.update(model);
    this.#tell(model.commands);
  }

  #press(name: CommandName): void {
    if (name === "stop" && this.#model) this.#stop.open(this.#model);
    else if (name === "set_lr" && this.#model) this.#lr.open(this.#model);
    else this.#host.give({ name });
  }

  #refuse(reason: string): void {
    this.#refused = { reason, until: this.#now + TOLD_FOR };
    this.#host.announce(reason);
    this.#tell(this.#model?.commands ?? []);
  }

  #tell(commands: readonly Command[]): void {
    const fresh = commands.filter((command) => {
      const { tone } = tellCommand(command);
      return tone === "busy" || this.#now - command.at < (tone === "bad" ? TOLD_FOR_BAD : TOLD_FOR);
    });
    const lines = fresh.slice(-TOLD_AT_ONCE).map(tellCommand) as { text: string; tone: string }[];
    if (this.#refused && this.#now < this.#refused.until) lines.push({ text: this.#refused.reason, tone: "off" });
    const told = JSON.stringify(lines);
    for (const command of fresh) {
      if (this.#spoken.get(command.request.id) === command.state) continue;
      this.#spoken.set(command.request.id, command.state);
      if (command.state !== "sent" && command.state !== "accepted") this.#host.announce(tellCommand(command).text);
    }
    if (told === this.#told) return;
    this.#told = told;
    show(this.acks, lines.length > 0);
    replaceChildren(
      this.acks,
      ...lines.map(({ text, tone }) =>
        h("li", { class: "ack", "data-tone": tone }, h("i", { class: "dot", "aria-hidden": "true" }), text),
      ),
    );
  }
}

class StopDialog {
  readonly element: HTMLDialogElement;
  readonly #heading = h("h2");
  readonly #checkpoint = h("input", { type: "checkbox", checked: true });
  readonly #why = h("span", { class: "hint" });
  #name = "";

  constructor(give: (order: Order) => void) {
    const stop = button("Stop training", {
      class: "button danger",
      icon: "stop",
      onclick: () => {
        this.element.close();
        give({ name: "stop", checkpoint: this.#checkpoint.checked });
      },
    });
    this.element = dialog(
      "stop",
      this.#heading,
      h("p", {}, "Training ends at the next step boundary. It can be resumed from a checkpoint later."),
      h("label", { class: "check" }, this.#checkpoint, h("span", {}, "Save a checkpoint first"), this.#why),
      h(
        "div",
        { class: "dialog-buttons" },
        button("Keep training", { onclick: () => this.element.close() }),
        stop,
      ),
    );
  }

  open(model: Model): void {
    const refused = model.run?.refused.checkpoint;
    setText(this.#heading, `Stop ${this.#name || (model.run?.name ?? "the run")}?`);
    this.#checkpoint.checked = !refused;
    this.#checkpoint.disabled = Boolean(refused);
    setText(this.#why, refused ?? "");
    this.element.showModal();
  }

  update(model: Model, name: string): void {
    this.#name = name;
    if (this.element.open && model.run === null) this.element.close();
  }
}

class LrDialog {
  readonly element: HTMLDialogElement;
  readonly #now = h("p", { class: "lr-now" });
  readonly #input = h("input", {
    id: "lr-input", class: "input", type: "text", inputmode: "decimal", autocomplete: "off", spellcheck: "false",
    "aria-describedby": "lr-problem",
  });
  readonly #optimizer = h("select", { class: "input", "aria-label": "Optimizer" });
  readonly #problem = h("p", { id: "lr-problem", class: "problem", role: "alert" });
  readonly #set: HTMLButtonElement;
  readonly #give: (order: Order) => void;
  #present: number | null = null;
  #asked: string | null = null;

  constructor(give: (order: Order) => void) {
    this.#give = give;
    this.#set = button("Set", { class: "button primary", onclick: () => this.#submit() });
    const factors = h(
      "div",
      { class: "factors", role: "group", "aria-label": "Times the present value" },
      ...[0.1, 0.5, 2, 10].map((factor) =>
        h("button", { type: "button", class: "button small", onclick: () => this.#times(factor) }, `× ${factor}`),
      ),
    );
    this.#input.addEventListener("input", () => this.#judge());
    const form = h(
      "form",
      { method: "dialog", class: "lr-form" },
      h("label", { for: "lr-input" }, "New value"),
      h("div", { class: "lr-row" }, this.#input, this.#optimizer),
      factors,
      this.#problem,
      h("div", { class: "dialog-buttons" }, button("Cancel", { onclick: () => this.element.close() }), this.#set),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.element = dialog("lr", h("h2", {}, "Learning rate"), this.#now, form);
  }

  open(model: Model): void {
    this.update(model);
    const names = model.run?.optimizers ?? [];
    replaceChildren(this.#optimizer, ...names.map((name) => h("option", { value: name }, name)));
    show(this.#optimizer, names.length > 1);
    this.#input.value = this.#present === null ? "" : String(Number(this.#present.toPrecision(4)));
    this.#judge();
    this.element.showModal();
    this.#input.select();
  }

  update(model: Model): void {
    if (this.element.open && model.run === null) this.element.close();
    this.#present = model.status?.lr ?? null;
    setText(this.#now, `Now ${format.compact(this.#present)}. A schedule continues from the new value.`);
  }

  #times(factor: number): void {
    if (this.#present === null) return;
    this.#input.value = String(Number((this.#present * factor).toPrecision(4)));
    this.#judge();
    this.#input.focus();
  }

  #judge(): void {
    this.#asked = null;
    const judged = judgeLr(this.#input.value, this.#present);
    setText(this.#problem, judged.lr === null ? (this.#input.value === "" ? "" : judged.problem) : (judged.question ?? ""));
    setText(this.#set.querySelector(".label") ?? this.#set, judged.lr !== null && judged.question ? "Set…" : "Set");
    this.#set.classList.toggle("danger", false);
  }

  #submit(): void {
    const judged = judgeLr(this.#input.value, this.#present);
    if (judged.lr === null) {
      setText(this.#problem, judged.problem);
      this.#input.focus();
      return;
    }
    if (judged.question !== null && this.#asked !== this.#input.value) {
      this.#asked = this.#input.value;
      setText(this.#problem, `${judged.question} Set it anyway?`);
      setText(this.#set.querySelector(".label") ?? this.#set, `Yes, set ${format.compact(judged.lr)}`);
      this.#set.classList.toggle("danger", true);
      this.#set.focus();
      return;
    }
    this.element.close();
    const optimizer = this.#optimizer.hidden ? undefined : this.#optimizer.value;
    this.#give({ name: "set_lr", lr: judged.lr, ...(optimizer ? { optimizer } : {}) });
  }
}
