// The options of one panel: its y axis, its curves, its place, and its files. One list for all panels, filled for the
// panel whose button opens it.

import { button, h, replaceChildren, setAttribute, setText, show } from "../dom";
import { scaleIn, type View } from "../view";
import { swatch } from "./dom";
import type { Files } from "./files";
import { select } from "./menu";
import type { Panel } from "./panel";
import { readRange } from "./range";
import type { Scene } from "./scene";
import { cssColour } from "./theme";

const LOGS = [
  ["", "as all panels"],
  ["linear", "linear"],
  ["log", "logarithmic"],
] as const;

/** A button that is pressed sooner after its options were closed, by pressing it, does not open them again: milliseconds. */
const REOPEN_AFTER = 400;

export interface OptionsHost {
  view: View;
  files: Files;
  scene(): Scene;
  connected(): boolean;
}

export class Options {
  readonly element = h("div", { class: "chart-options", popover: "auto", role: "group" });
  readonly #host: OptionsHost;
  #panel: Panel | null = null;
  /** What was open when the browser closed it, and when: a click on its button comes after that. */
  #closed: { panel: Panel | null; at: number } = { panel: null, at: 0 };

  constructor(host: OptionsHost) {
    this.#host = host;
    this.element.addEventListener("toggle", () => {
      const open = this.element.matches(":popover-open");
      if (this.#panel !== null) setAttribute(this.#panel.optionsButton, "aria-expanded", String(open));
      if (open) return;
      this.#closed = { panel: this.#panel, at: performance.now() };
      this.#panel = null;
    });
    // Escape closes this and nothing else.
    this.element.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") this.close();
    });
    document.addEventListener("scroll", () => this.close(), { passive: true });
  }

  /** Show the options of a panel at its button, or hide them if they are shown. */
  toggle(panel: Panel): void {
    const { panel: closed, at } = this.#closed;
    const wasOpen = this.#panel === panel || (closed === panel && performance.now() - at < REOPEN_AFTER);
    this.close();
    if (wasOpen) return;
    this.#fill(panel);
    this.element.showPopover();
    this.#panel = panel;
    this.#place(panel.optionsButton);
    this.element.querySelector<HTMLElement>("select")?.focus({ preventScroll: true });
  }

  close(): void {
    if (this.#panel === null) return;
    const { optionsButton } = this.#panel;
    this.element.hidePopover();
    setAttribute(optionsButton, "aria-expanded", "false");
    optionsButton.focus({ preventScroll: true });
    this.#panel = null;
    this.#closed.panel = null;
  }

  /** Below the button, and on the screen. */
  #place(opener: HTMLElement): void {
    const { right, bottom } = opener.getBoundingClientRect();
    const { width, height } = this.element.getBoundingClientRect();
    const left = Math.max(8, Math.min(right - width, innerWidth - width - 8));
    const top = Math.max(8, Math.min(bottom + 4, innerHeight - height - 8));
    this.element.style.left = `${left}px`;
    this.element.style.top = `${top}px`;
  }

  #fill(panel: Panel): void {
    const { view, files } = this.#host;
    const { name } = panel;
    const state = view.get();
    const scale = scaleIn(state, name);
    setAttribute(this.element, "aria-label", `Options of ${name}`);
    const { element: range, check: checkRange } = this.#range(name);
    const log = select(LOGS, (value) => {
      view.setScale(name, { log: value === "" ? null : value === "log" });
      checkRange();
    });
    log.value = scale?.log === null || scale === null ? "" : scale.log ? "log" : "linear";
    checkRange();
    const check = (label: string, checked: boolean, onchange: () => void): HTMLElement => {
      const box = h("input", { type: "checkbox", onchange });
      box.checked = checked;
      return h("label", { class: "check" }, box, label);
    };
    const usual = check("Only usual values, outliers at the edge", state.usual.includes(name), () => view.toggle("usual", name));
    const pinned = check("Pinned to the top", state.pinned.includes(name), () => view.toggle("pinned", name));
    replaceChildren(
      this.element,
      h("label", {}, "Y axis", log),
      range,
      usual,
      panel.curves.length > 1 ? this.#curves(panel) : null,
      pinned,
      state.joined.includes(name)
        ? button("Take apart", { class: "button small", onclick: () => this.#leave(() => {
            view.set({ joined: state.joined.filter((one) => one !== name), pinned: state.pinned.filter((one) => one !== name) });
          }) })
        : null,
      h(
        "div",
        { class: "chart-files", role: "group", "aria-label": "Files" },
        this.#file("Copy picture", panel, () => files.copyPng(panel)),
        this.#file("PNG", panel, () => files.savePng(panel)),
        this.#file("SVG", panel, () => files.saveSvg(panel)),
        this.#file("CSV", panel, () => files.saveCsv(name, panel.curves), this.#host.connected()),
      ),
    );
  }

  /** The fields of a range. What is no range stays as it was typed, with what is wrong about it. */
  #range(name: string): { element: HTMLElement; check: () => void } {
    const { view } = this.#host;
    const problem = h("p", { class: "chart-problem", role: "alert", hidden: true });
    const check = (): void => {
      const scale = scaleIn(view.get(), name);
      const range = readRange(...(fields.map(({ value }) => value) as [string, string]), scale?.log ?? view.get().logY);
      const wrong = typeof range === "string";
      for (const field of fields) setAttribute(field, "aria-invalid", wrong ? "true" : null);
      setText(problem, wrong ? range : "");
      show(problem, wrong);
      if (!wrong) view.setScale(name, range);
    };
    const field = (label: string, value: number | null | undefined): HTMLInputElement => {
      const made: HTMLInputElement = h("input", {
        class: "input", inputmode: "text", size: 7, placeholder: "auto", autocomplete: "off", "aria-label": label, onchange: check,
      });
      made.value = value == null ? "" : String(value);
      return made;
    };
    const scale = scaleIn(view.get(), name);
    const fields = [field("Least value of the y axis", scale?.min), field("Greatest value of the y axis", scale?.max)];
    const element = h("div", {}, h("div", { class: "chart-range" }, "Range", fields[0], "to", fields[1]), problem);
    return { element, check };
  }

  #curves(panel: Panel): HTMLElement {
    const { view } = this.#host;
    // Of each metric one, whichever runs have it
    const curves = [...new Map(panel.curves.map((curve) => [curve.info.key, curve])).values()];
    const keys = curves.map(({ info }) => info.key);
    const scene = this.#host.scene();
    const { hidden } = view.get();
    const items = curves.map((curve) => {
      const { info } = curve;
      const look = panel.lookOf(curve, scene);
      const box = h("input", { type: "checkbox", onchange: () => view.toggle("hidden", info.key) });
      box.checked = !hidden.includes(info.key);
      return h("label", { class: "check" }, box, swatch(cssColour(look), look.dash), h("span", { class: "curve-label" }, info.label));
    });
    const set = (shown: boolean): void => {
      const others = view.get().hidden.filter((key) => !keys.includes(key));
      view.set({ hidden: shown ? others : [...others, ...keys] });
      this.#fill(panel);
    };
    return h(
      "div",
      { class: "chart-curves", role: "group", "aria-label": "Curves" },
      h("div", { class: "menu-row" }, button("All curves", { class: "button small", onclick: () => set(true) }),
        button("None", { class: "button small", onclick: () => set(false) })),
      h("div", { class: "menu-list" }, ...items),
    );
  }

  #file(label: string, panel: Panel, make: () => void | Promise<void>, possible = true): HTMLElement {
    const made = button(label, { class: "button small", title: `${label} of ${panel.name}`, onclick: () => this.#leave(make) });
    made.disabled = !possible;
    return made;
  }

  /** Close, then do it. */
  #leave(act: () => void | Promise<void>): void {
    this.close();
    void act();
  }
}
