// The tab with texts, pictures and tables: a block for each key, with a slider over the steps, and runs side by side.

import { button, dialog, h, replaceChildren, setAttribute, setText, show } from "../dom";
import { clock, count } from "../format";
import { type SampleIndex, type ViewerMessage } from "../protocol";
import { finder, searchField } from "../search";
import { Contents } from "./contents";
import { showSample, type SampleHost } from "./sample";
import { SampleStore, type Moment } from "./store";

/** Samples of one run, key and step that are shown. */
const MOST_SHOWN = 24;

export interface SamplesHost {
  send(message: ViewerMessage): boolean;
  /** Keys of the runs on the screen, the watched one first. */
  runs(): string[];
  nameOf(key: string): string;
  colourOf(key: string): string | null;
}

export class Samples {
  readonly element: HTMLElement;
  readonly dialog: HTMLDialogElement;
  readonly search = searchField("Filter samples", () => this.#draw());
  readonly #host: SamplesHost;
  readonly #store = new SampleStore();
  readonly #contents: Contents;
  readonly #blocks = new Map<string, Block>();
  readonly #list = h("div", { class: "sample-blocks" });
  readonly #note = h("p", { class: "empty" });
  readonly #large = h("div", { class: "sample-large" });
  /** Blocks that can be seen: only these ask for contents. */
  readonly #seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        for (const block of this.#blocks.values()) if (block.element === target) block.setSeen(isIntersecting);
      }
    },
    { rootMargin: "200px" },
  );
  #active = false;
  /** What the blocks were drawn for. */
  #drawn = "";

  constructor(host: SamplesHost) {
    this.#host = host;
    this.#contents = new Contents((message) => host.send(message));
    const wrap = h("input", { type: "checkbox", checked: true, onchange: () => this.#list.classList.toggle("wraps", wrap.checked) });
    this.#list.classList.add("wraps");
    this.element = h(
      "div",
      { class: "samples" },
      h("div", { class: "toolbar" }, this.search, h("label", { class: "check" }, wrap, h("span", {}, "Wrap lines"))),
      this.#list,
      this.#note,
    );
    this.dialog = dialog("picture", h("h2", {}), this.#large, h("div", { class: "dialog-buttons" }, button("Close", { onclick: () => this.dialog.close() })));
    this.dialog.classList.add("sample-dialog");
  }

  /** Whether the runs on the screen have any. */
  get has(): boolean {
    return this.#store.has(this.#host.runs());
  }

  setActive(active: boolean): void {
    this.#active = active;
    this.#draw();
  }

  /** Show a key at a step. */
  goTo(key: string, step: number): void {
    const block = this.#blocks.get(key);
    block?.goTo(step);
    block?.element.scrollIntoView({ block: "nearest" });
  }

  // What the server says

  began(run: string): void {
    this.#store.begin(run);
    this.#contents.begin(run);
    this.#drawn = "";
  }

  listed(message: SampleIndex): void {
    this.#store.add(message);
    this.#drawn = "";
  }

  connected(): void {
    this.#contents.connected();
  }

  /** Take a frame with a sample. */
  take(data: ArrayBuffer): void {
    this.#host.send({ type: "drawn" });
    this.#contents.take(data);
  }

  // Showing it

  update(): void {
    const runs = this.#host.runs();
    const looks = JSON.stringify(runs.map((run) => [run, this.#host.nameOf(run), this.#host.colourOf(run)]));
    if (!this.#active || looks === this.#drawn) return;
    this.#draw();
    this.#drawn = looks;
  }

  #draw(): void {
    if (!this.#active) return;
    const runs = this.#host.runs();
    this.#contents.keep(runs);
    const { finds } = finder(this.search.value);
    const keys = this.#store.keys(runs);
    const shown = keys.filter((key) => finds(key));
    for (const [key, block] of this.#blocks) if (!keys.includes(key)) this.#remove(key, block);
    for (const key of keys) {
      let block = this.#blocks.get(key);
      if (block === undefined) {
        block = new Block(key, this.#store, this.#host, { contents: this.#contents, enlarge: (picture) => this.#enlarge(picture) });
        this.#blocks.set(key, block);
        this.#seen.observe(block.element);
      }
      show(block.element, shown.includes(key));
      block.update(runs);
    }
    const elements = keys.map((key) => (this.#blocks.get(key) as Block).element);
    // Moving an element takes the focus from its slider.
    if (elements.some((element, place) => this.#list.children[place] !== element)) replaceChildren(this.#list, ...elements);
    const note = keys.length === 0 ? "No text, picture or table yet: run.publish(TextSample(key, text)) shows one here." : shown.length === 0 ? "No key matches." : "";
    setText(this.#note, note);
    show(this.#note, note !== "");
  }

  #remove(key: string, block: Block): void {
    this.#seen.unobserve(block.element);
    block.element.remove();
    this.#blocks.delete(key);
  }

  #enlarge(picture: HTMLImageElement): void {
    const [width, height] = [picture.naturalWidth, picture.naturalHeight];
    const times = Math.max(1, Math.floor(Math.min((0.9 * innerWidth) / width, (0.7 * innerHeight) / height)));
    const image = picture.cloneNode() as HTMLImageElement;
    Object.assign(image, { width: width * times, height: height * times });
    image.classList.toggle("pixels", times > 1);
    setText(this.dialog.querySelector("h2") as HTMLElement, picture.alt);
    replaceChildren(this.#large, image);
    this.dialog.showModal();
  }
}

/** Samples of one key. */
class Block {
  readonly element: HTMLElement;
  readonly #key: string;
  readonly #store: SampleStore;
  readonly #host: SamplesHost;
  readonly #samples: SampleHost;
  readonly #slider: HTMLInputElement;
  readonly #where = h("output", { class: "sample-where" });
  readonly #body = h("div", { class: "sample-runs" });
  #runs: string[] = [];
  #steps: number[] = [];
  /** The step that somebody has moved to; null for the newest. */
  #step: number | null = null;
  #seen = false;
  #shown = "";

  constructor(key: string, store: SampleStore, host: SamplesHost, samples: SampleHost) {
    [this.#key, this.#store, this.#host, this.#samples] = [key, store, host, samples];
    this.#slider = h("input", { type: "range", min: 0, step: 1, "aria-label": `Step of ${key}`, oninput: () => this.#moved() });
    this.element = h(
      "section",
      { class: "sample-block", "aria-label": key },
      h("div", { class: "sample-head" }, h("h2", {}, key), this.#slider, this.#where),
      this.#body,
    );
  }

  setSeen(seen: boolean): void {
    this.#seen = seen;
    this.#draw();
  }

  update(runs: string[]): void {
    this.#runs = runs;
    this.#steps = this.#store.steps(runs, this.#key);
    this.#draw();
  }

  goTo(step: number): void {
    this.#step = step === this.#steps.at(-1) ? null : step;
    this.#draw();
  }

  #moved(): void {
    const step = this.#steps[Number(this.#slider.value)];
    if (step !== undefined) this.goTo(step);
  }

  #draw(): void {
    const last = this.#steps.length - 1;
    const chosen = this.#step === null ? last : this.#steps.filter((step) => step <= (this.#step as number)).length - 1;
    const place = Math.max(0, chosen);
    const step = this.#steps[place];
    if (step === undefined) return;
    setAttribute(this.#slider, "max", last);
    if (this.#slider.value !== String(place)) this.#slider.value = String(place);
    show(this.#slider, last > 0);
    const moments = this.#runs.flatMap((run) => {
      const moment = this.#store.at(run, this.#key, step);
      return moment === null ? [] : [{ run, moment }];
    });
    const [first] = moments.filter(({ moment }) => moment.step === step);
    const entry = first?.moment.entries.at(-1);
    const words = `step ${count(step)}${entry === undefined ? "" : `, epoch ${count(entry.epoch + 1)}, ${clock(entry.time)}`}`;
    setText(this.#where, words);
    setAttribute(this.#slider, "aria-valuetext", words);
    if (!this.#seen) return;
    const shown = JSON.stringify(moments.map(({ run, moment }) => [this.#look(run), moment.entries.map(({ seq, time }) => [seq, time])]));
    if (shown === this.#shown) return;
    this.#shown = shown;
    replaceChildren(this.#body, ...moments.map(({ run, moment }) => this.#column(run, moment, step)));
  }

  #look(run: string): unknown[] {
    return [run, this.#host.nameOf(run), this.#host.colourOf(run), this.#runs.length > 1];
  }

  #column(run: string, { step, entries }: Moment, wanted: number): HTMLElement {
    const name = this.#host.nameOf(run);
    const of = this.#runs.length > 1 ? ` of ${name}` : "";
    const colour = h("i", { class: "dot", "aria-hidden": "true" });
    colour.style.setProperty("--tone", this.#host.colourOf(run) ?? "var(--off)");
    const more = entries.length - MOST_SHOWN;
    return h(
      "div",
      { class: "sample-run" },
      of === "" ? null : h("h3", {}, colour, ` ${name}`, step === wanted ? null : h("span", { class: "hint" }, ` step ${count(step)}`)),
      ...entries.slice(0, MOST_SHOWN).map((entry) => showSample(entry, `${this.#key}${of}, step ${count(step)}`, this.#samples)),
      more > 0 ? h("p", { class: "hint" }, `${count(more)} more of this step are in the run's log.`) : null,
    );
  }
}
