// The live page: the connection's messages go into the model, and the parts of the page show the model.

import { Access } from "./access";
import { Charts } from "./charts";
import { Checkpoints } from "./checkpoints";
import { Config } from "./config";
import { Connection, isLoopback, openSocket, probeStatus, type Link } from "./connection";
import { Controls, type Order } from "./controls";
import { h, setText, show } from "./dom";
import { Events } from "./events";
import { Favicon } from "./favicon";
import * as format from "./format";
import { Header } from "./header";
import { Keys } from "./keys";
import { Layers } from "./layers";
import { markOf, tell } from "./milestones";
import { hasEnded, newestRun, NOTHING, reduce, stateOf, unanswered, type Happening } from "./model";
import { Notices } from "./notices";
import { Notifier } from "./notify";
import { decodeChart, isFrame, type CommandRequest, type Hi, type RunEvent, type ServerMessage } from "./protocol";
import { Runs } from "./runs";
import { Samples } from "./samples";
import { isSaved, readBlock, SavedServer } from "./saved/server";
import { Stage } from "./stage";
import { describe, title, type Action, type Seen } from "./states";
import { storage } from "./storage";
import { Tabs } from "./tabs";
import { AXES, View, type Axis, type ViewState } from "./view";
import { Watching } from "./watching";

/** What counts time up on the page is drawn this often, milliseconds. */
const TICK = 500;
/** What may wait for the charts' next frame waits this long, milliseconds: a frame of its own costs as much as theirs. */
const WAIT_FOR_CHARTS = 200;
/** Title and icon change at most this often, milliseconds. */
const TITLE_EVERY = 1_000;
const COMMAND_TTL = 60;
/** Smoothing that the keys step through. */
const SMOOTHINGS = [0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999];

class Page {
  #model = NOTHING;
  #link: Link;
  readonly #access = new Access(storage, window.top !== window);
  readonly #view = new View(this.#hash(), storage);
  readonly #connection: Connection;
  readonly #watching: Watching;
  readonly #notifier = new Notifier();
  readonly #favicon = new Favicon();
  readonly #header: Header;
  readonly #controls: Controls;
  readonly #events: Events;
  readonly #config = new Config();
  readonly #checkpoints: Checkpoints;
  readonly #charts: Charts;
  readonly #keys: Keys;
  readonly #runs: Runs;
  readonly #layers: Layers;
  readonly #samples: Samples;
  readonly #notices = new Notices((action) => this.#act(action));
  readonly #stage = new Stage((action) => this.#act(action));
  readonly #tabs: Tabs;
  readonly #chartsRoot = h("div", { class: "charts" });
  /** Read out by screen readers: states and acks at the next pause, alerts at once. */
  readonly #polite = h("div", { class: "sr-only", role: "status", "aria-live": "polite" });
  readonly #assertive = h("div", { class: "sr-only", role: "alert" });

  /** Hash of this page, out of its own address. */
  readonly #page = /\/static\/([^/]+)\/[^/]*$/.exec(new URL(import.meta.url).pathname)?.[1] ?? null;
  /** The state that was last read out. */
  #announced = "";
  /** Since when a chart frame waits to be drawn. */
  #frameSince: number | null = null;
  /** A drawing of the page is due with the next frame of the browser. */
  #drawing = false;
  /** When the charts were last drawn, and the timer of what waits to be drawn with them. */
  #chartsDrawn = -Infinity;
  #waiting: number | undefined;
  /** When title and icon were last changed, and for which state. */
  #titled = { at: 0, word: "" };
  /** The server's time when the page came: what happened before is no news. */
  #newsSince: number | null = null;
  /** The run that the page has seen going on: its end is news, that of one which was over before is not. */
  #going: string | null = null;

  constructor() {
    this.#connection = new Connection({
      open: () => (isSaved() ? new SavedServer(readBlock) : openSocket(document.baseURI)),
      probe: () => probeStatus(document.baseURI, this.#access.keys()),
      clock: {
        now: () => performance.now(),
        random: () => Math.random(),
        setTimeout: (callback, ms) => window.setTimeout(callback, ms),
        clearTimeout: (timer) => window.clearTimeout(timer),
      },
      loopback: isLoopback(location.hostname),
      greeting: () => this.#greeting(),
      onText: (message) => this.#received(message),
      onChart: (data) => this.#chart(data),
      onLink: (link) => this.#linked(link),
    });
    this.#link = this.#connection.link;
    this.#watching = new Watching({
      view: this.#view,
      history,
      base: location.pathname + location.search,
      hash: () => location.hash,
      now: () => performance.now(),
      model: () => this.#model,
      link: () => this.#link,
      send: (message) => this.#connection.send(message),
      happened: (happening) => this.#happened(happening),
      keep: (runs) => this.#charts.keep(runs),
      has: (run) => this.#charts.has(run),
    });
    this.#runs = new Runs({
      view: this.#view,
      storage,
      send: (message) => this.#connection.send(message),
      watched: () => this.#model.run?.key ?? this.#view.get().run,
      isFree: () => this.#watching.follows,
      followNewest: () => {
        const newest = newestRun(this.#model.runs);
        if (newest !== null) this.#watching.follow(newest.key);
      },
      colourOf: (key) => this.#charts.colourOf(key),
      announce: (text) => this.#announce(text),
      flash: (text) => this.#flash(text),
      newId: commandId,
      changed: () => this.#changed(),
    });
    this.#header = new Header(this.#runs.bar.toggle, {
      nextTheme: () => this.#nextTheme(),
      setNotify: (on) => void this.#setNotify(on),
      showKeys: () => this.#keys.toggle(),
    });
    this.#controls = new Controls({ give: (order) => this.#give(order), announce: (text) => this.#announce(text) });
    this.#events = new Events((event) => {
      const isSample = tell(event).kind === "sample";
      this.#view.set({ tab: isSample ? "samples" : "metrics" });
      if (isSample) this.#samples.goTo(String(event.key), event.step ?? 0);
      else this.#charts.goTo(event.step ?? 0);
    });
    this.#layers = new Layers({
      send: (message) => this.#connection.send(message),
      run: () => this.#model.run?.key ?? null,
    });
    this.#samples = new Samples({
      send: (message) => this.#connection.send(message),
      runs: () => this.#runsShown(),
      nameOf: (key) => this.#runs.row(key)?.name ?? key,
      colourOf: (key) => this.#charts.colourOf(key),
    });
    this.#checkpoints = new Checkpoints({
      send: (message) => this.#connection.send(message),
      announce: (text) => this.#announce(text),
      newId: commandId,
    });
    this.#tabs = this.#makeTabs();
    this.#keys = this.#makeKeys();
    this.#build();
    this.#charts = new Charts(this.#chartsRoot, {
      send: (message) => this.#connection.send(message),
      credit: () => this.#connection.send({ type: "drawn" }),
      drawn: () => this.#drawn(),
      row: (key) => this.#runs.row(key),
      view: this.#view,
      announce: (text) => this.#announce(text),
      tell: (text) => {
        this.#announce(text);
        this.#flash(text);
      },
    });
  }

  start(): void {
    this.#view.subscribe((state, previous) => this.#viewed(state, previous));
    this.#viewed(this.#view.get(), this.#view.get());
    this.#header.setNotify(this.#notifier.on);
    window.addEventListener("hashchange", () => {
      this.#hash();
      this.#watching.traversed();
    });
    window.addEventListener("online", () => this.#connection.wake());
    document.addEventListener("visibilitychange", () => {
      this.#connection.setVisible(document.visibilityState === "visible");
      this.#changed();
    });
    this.#connection.start();
    this.#connection.setVisible(document.visibilityState === "visible");
    window.setInterval(() => this.#tick(), TICK);
    this.#changed();
  }

  /** What stands after `#`; a key of the server in it leaves the address at once. */
  #hash(): string {
    const hash = this.#access.take(location.hash);
    if (hash !== location.hash) history.replaceState(history.state, "", hash || location.pathname + location.search);
    return hash;
  }

  // Layout

  #build(): void {
    // In the output of a notebook's cell: without head and controls.
    document.documentElement.classList.toggle("embedded", new URLSearchParams(location.search).has("embed"));
    document.body.append(
      h("a", { class: "skip", href: "#main", onclick: (event: Event) => this.#skip(event) }, "Skip to the content"),
      this.#runs.bar.element,
      this.#runs.bar.backdrop,
      this.#header.element,
      h("section", { class: "bar", "aria-label": "Views and control" }, this.#tabs.element, this.#controls.acks, this.#controls.element),
      h(
        "main",
        { id: "main", tabindex: -1 },
        this.#notices.element,
        this.#stage.element,
        ...this.#tabs.panels,
      ),
      this.#polite,
      this.#assertive,
      ...this.#controls.dialogs,
      this.#keys.dialog,
      this.#runs.editor.dialog,
      this.#samples.dialog,
      this.#checkpoints.dialog,
    );
  }

  /** The address after `#` is the view's, so a link within the page must not change it. */
  #skip(event: Event): void {
    event.preventDefault();
    document.querySelector<HTMLElement>("#main")?.focus();
  }

  /** Keys of the runs on the screen that are not switched off, the watched one first. */
  #runsShown(): string[] {
    const hidden = this.#view.get().hiddenRuns;
    const watched = this.#model.run?.key;
    return [...new Set([...(watched === undefined ? [] : [watched]), ...this.#runs.drawn])].filter((key) => !hidden.includes(key));
  }

  #makeTabs(): Tabs {
    const { table } = this.#runs;
    const charts = { element: this.#chartsRoot, search: () => this.#chartsRoot.querySelector<HTMLElement>("input[type=search]") };
    return new Tabs(
      [
        ["metrics", "Metrics", charts],
        ["system", "System", { ...charts, has: () => this.#charts.hasSystem }],
        [
          "layers",
          "Layers",
          {
            element: this.#layers.element,
            search: () => this.#layers.search,
            has: () => (this.#model.status?.layers ?? 0) > 0,
            setActive: (active) => this.#layers.setActive(active),
          },
        ],
        [
          "samples",
          "Samples",
          {
            element: this.#samples.element,
            search: () => this.#samples.search,
            has: () => this.#samples.has,
            setActive: (active) => this.#samples.setActive(active),
          },
        ],
        [
          "checkpoints",
          "Checkpoints",
          {
            element: this.#checkpoints.element,
            has: () => this.#checkpoints.has,
            setActive: (active) => this.#checkpoints.setActive(active),
          },
        ],
        [
          "events",
          "Events",
          {
            element: this.#events.element,
            search: () => this.#events.search,
            count: () => (this.#model.milestones.length === 0 ? "" : format.count(this.#model.milestones.length)),
            setActive: (active) => this.#events.setActive(active),
          },
        ],
        ["config", "Configuration", { element: this.#config.element, search: () => this.#config.search }],
        ["compare", "Compare", { element: table.element, search: () => table.search, has: () => this.#runs.drawn.length > 1 }],
      ],
      (tab) => this.#view.set({ tab }),
    );
  }

  #makeKeys(): Keys {
    const view = this.#view;
    const smooth = (more: boolean): void => {
      const now = view.get().smoothing;
      const next = more ? SMOOTHINGS.find((step) => step > now) : [...SMOOTHINGS].reverse().find((step) => step < now);
      view.set({ smoothing: next ?? now });
      this.#announce(`Smoothing ${view.get().smoothing}`);
    };
    const axis = (): void => {
      const next = AXES[(AXES.indexOf(view.get().axis) + 1) % AXES.length] as Axis;
      view.set({ axis: next, zoom: null });
      this.#announce(`x axis: ${next}`);
    };
    return new Keys(
      [
        { keys: ["1"], does: "Metrics", run: () => view.set({ tab: "metrics" }) },
        { keys: ["2"], does: "Events", run: () => view.set({ tab: "events" }) },
        { keys: ["3"], does: "Configuration", run: () => view.set({ tab: "config" }) },
        { keys: ["4"], does: "Compare the ticked runs", run: () => view.set({ tab: "compare" }) },
        { keys: ["5"], does: "System", run: () => view.set({ tab: "system" }) },
        { keys: ["6"], does: "Layers", run: () => view.set({ tab: "layers" }) },
        { keys: ["7"], does: "Samples", run: () => view.set({ tab: "samples" }) },
        { keys: ["8"], does: "Checkpoints", run: () => view.set({ tab: "checkpoints" }) },
        { keys: ["j"], does: "Next run of the list", run: () => this.#runs.bar.move(1) },
        { keys: ["k"], does: "Run before it", run: () => this.#runs.bar.move(-1) },
        { keys: ["r"], does: "Open or close the list of runs", run: () => this.#runs.bar.open(!this.#runs.bar.isOpen) },
        { keys: ["/"], does: "Search", run: () => this.#tabs.search() },
        { keys: ["x"], does: "Next x axis: step, epoch, samples, time, time of day", run: axis },
        { keys: ["l"], does: "Logarithmic y axis", run: () => view.set({ logY: !view.get().logY }) },
        { keys: ["["], does: "Smooth less", run: () => smooth(false) },
        { keys: ["]"], does: "Smooth more", run: () => smooth(true) },
        { keys: ["0"], does: "Show the whole run", run: () => view.set({ zoom: null, follow: false }) },
        { keys: ["t"], does: "Dark, light or the system's theme", run: () => this.#nextTheme() },
      ],
      [
        { keys: ["ArrowLeft", "ArrowRight"], does: "Move along a chart that has the focus, or between tabs" },
        { keys: ["Enter"], does: "In the list of runs: show the run" },
        { keys: ["x", "Space"], does: "In the list: lay the run over the others, or take it away" },
        { keys: ["b", "e"], does: "In the list: make the run the baseline, edit it" },
        { keys: ["Shift"], does: "and a drag: move along the run; a drag up or down sets the range" },
        { keys: ["Ctrl"], does: "and the wheel: zoom a chart" },
      ],
    );
  }

  #nextTheme(): void {
    const next = { auto: "dark", dark: "light", light: "auto" } as const;
    this.#view.set({ theme: next[this.#view.get().theme] });
    this.#announce(`Theme: ${this.#view.get().theme}`);
  }

  /** The view has changed: what of it is the page's own. */
  #viewed(state: ViewState, previous: ViewState): void {
    const { tab: current, theme } = state;
    if (current === "compare" && this.#runs.drawn.length < 2) {
      this.#view.set({ tab: "metrics" });
      return;
    }
    this.#watching.viewed(state, previous);
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    this.#header.setTheme(theme);
    this.#tabs.select(current);
    this.#changed();
  }

  // Messages

  #greeting(): Omit<Hi, "type" | "protocol"> {
    const server = this.#model.hello?.server ?? null;
    return { ...this.#watching.greeting(), server, keys: this.#access.keys(), samples: "index" };
  }

  #received(message: ServerMessage): void {
    const before = this.#model;
    if (message.type === "run" && message.overlaid === true) {
      this.#charts.overlay(message);
      this.#samples.began(message.key);
      return;
    }
    if (message.type === "run" && !this.#watching.run(message)) return;
    this.#happened(message);
    switch (message.type) {
      case "hello":
        this.#watching.hello(message);
        this.#newsSince ??= message.time;
        this.#runs.greeted(message);
        if (message.run === null) this.#charts.reset(null);
        for (const request of before.hello?.server === message.server ? unanswered(this.#model) : []) {
          this.#connection.send(request);
        }
        break;
      case "runs":
        this.#watching.runs(message);
        break;
      case "rows":
        this.#runs.listed(message);
        this.#charts.listed();
        break;
      case "ack":
        this.#runs.answered(message);
        this.#checkpoints.answered(message);
        break;
      case "checkpoints":
        this.#checkpoints.listed(message);
        break;
      case "run":
        this.#charts.reset(message);
        this.#layers.began();
        this.#samples.began(message.key);
        // Marks of milestones that are known from before and do not come again
        for (const event of this.#model.milestones) this.#mark(event);
        break;
      case "series":
        this.#runs.learned(message.series);
        this.#charts.addSeries(message.run, message.series);
        break;
      case "samples":
        this.#samples.listed(message);
        this.#changed();
        break;
      case "latest":
        this.#charts.applyLatest(message);
        break;
      case "status":
        this.#charts.applyStatus(message);
        break;
      case "milestone":
        if (this.#model.milestones !== before.milestones) this.#milestone(message.event);
        break;
      default:
    }
  }

  #milestone(event: RunEvent): void {
    this.#mark(event);
    const name = this.#model.run?.name ?? "The run";
    if (event.type === "Alert" && (event.time ?? 0) > (this.#newsSince ?? Infinity)) {
      const { text } = tell(event);
      setText(this.#assertive, `Alert: ${text}`);
      this.#notifier.notify(`${name}: alert`, text);
    }
  }

  #mark(event: RunEvent): void {
    const mark = markOf(event);
    if (mark !== null) this.#charts.addMark(mark);
  }

  #chart(data: ArrayBuffer): void {
    if (isFrame("sample", data)) return this.#samples.take(data);
    if (isFrame("layers", data)) return this.#layers.take(data);
    const frame = decodeChart(data);
    if (!this.#charts.has(frame.header.run)) {
      this.#connection.send({ type: "drawn" }); // of a run that was shown before: the credit goes back
      return;
    }
    this.#frameSince ??= performance.now();
    this.#charts.applyChart(frame);
  }

  #drawn(): void {
    this.#frameSince = null;
    this.#chartsDrawn = performance.now();
    if (this.#waiting !== undefined) this.#draw();
  }

  #linked(link: Link): void {
    const wasOpen = this.#link.phase === "open";
    this.#link = link;
    if (wasOpen !== (link.phase === "open")) {
      this.#frameSince = null;
      this.#charts.setConnected(link.phase === "open");
      if (link.phase === "open") this.#samples.connected();
    }
    this.#changed();
  }

  #happened(happening: Happening): void {
    const before = this.#model;
    this.#model = reduce(before, happening, performance.now());
    if (this.#model === before) return;
    if (happening.type === "gone") this.#charts.reset(null);
    const isRoutine = happening.type === "pong" || (happening.type === "status" && stateOf(this.#model) === stateOf(before));
    if (isRoutine) this.#changedALittle();
    else this.#changed();
  }

  // What the viewer does

  #give(order: Order): void {
    if (this.#model.run === null) return;
    const { key } = this.#model.run;
    const request: CommandRequest = { type: "command", id: commandId(), run: key, ttl: COMMAND_TTL, ...order };
    this.#happened({ type: "given", request, at: performance.now() });
    this.#connection.send(request);
  }

  async #setNotify(on: boolean): Promise<void> {
    const text = await this.#notifier.set(on);
    this.#header.setNotify(this.#notifier.on);
    this.#announce(text);
    this.#flash(text);
  }

  #act(action: Action["id"]): void {
    const newest = newestRun(this.#model.runs);
    if (action === "reload") location.reload();
    if (action === "show-newer" && newest) this.#watching.follow(newest.key);
    if (action === "stay") this.#watching.stay();
    this.#changed();
  }

  // Showing it

  /** Show what has changed with the next frame; a hidden page has none and keeps to its title. */
  #changed(): void {
    if (document.visibilityState === "hidden") {
      this.#draw();
    } else if (!this.#drawing) {
      this.#drawing = true;
      requestAnimationFrame(() => {
        this.#drawing = false;
        this.#draw();
      });
    }
  }

  /** As `#changed`, but while the charts are being drawn, with their next frame. */
  #changedALittle(): void {
    if (document.hidden || performance.now() - this.#chartsDrawn > WAIT_FOR_CHARTS) this.#changed();
    else this.#waiting ??= window.setTimeout(() => this.#changed(), WAIT_FOR_CHARTS);
  }

  #tick(): void {
    this.#watching.tick();
    this.#changedALittle();
  }

  #seen(): Seen {
    const now = performance.now();
    return {
      model: this.#model,
      link: this.#link,
      page: this.#page,
      now,
      time: Date.now() / 1000,
      behind: this.#frameSince === null || document.hidden ? 0 : now - this.#frameSince,
      newer: this.#watching.newer(),
      missing: this.#runs.missing,
    };
  }

  #draw(): void {
    clearTimeout(this.#waiting);
    this.#waiting = undefined;
    const seen = this.#seen();
    const described = describe(seen);
    const { model } = seen;
    this.#title(seen, described);
    this.#tellEnd();
    if (document.visibilityState === "hidden") return;
    const row = this.#runs.rowOf(model.run?.key);
    const name = row?.name ?? model.run?.name ?? "";
    this.#header.update(model, described, this.#link, name);
    this.#controls.update(model, this.#link, seen.now, this.#runs.bar.store.total > 1 ? name : "");
    this.#events.update(model);
    this.#checkpoints.update(model);
    this.#config.update(model.run, row);
    this.#samples.update();
    this.#runs.update();
    this.#notices.update(described.notices);
    const { tab } = this.#view.get();
    const staged = described.stage !== null && (model.run === null || tab === "metrics");
    this.#stage.update(described.stage, staged);
    this.#tabs.update(staged);
    document.body.toggleAttribute("data-empty", model.run === null);
    document.body.toggleAttribute("data-stale", this.#link.phase !== "open" && !hasEnded(stateOf(model)));
    // A validation each epoch is part of being live, and no news.
    const state = described.word === "validating" ? "live" : described.word;
    if (state !== this.#announced) {
      this.#announced = state;
      this.#announce(described.tone === "bad" && described.cause ? `${state}: ${described.cause}` : state);
    }
  }

  #title(seen: Seen, described: ReturnType<typeof describe>): void {
    const { at, word } = this.#titled;
    if (described.word === word && seen.now - at < TITLE_EVERY) return;
    this.#titled = { at: seen.now, word: described.word };
    const text = title(seen, described);
    if (document.title !== text) document.title = text;
    this.#favicon.update(described.sign, seen.model.losses, seen.model.status?.progress ?? null);
  }

  #tellEnd(): void {
    const { run, status } = this.#model;
    if (run === null || status === null || status.run !== run.key) return;
    if (!hasEnded(status.state)) {
      this.#going = run.key;
    } else if (this.#going === run.key) {
      this.#going = null;
      this.#notifier.notify(`${run.name}: ${status.state}`, status.error ?? status.reason);
    }
  }

  /** Say something to screen readers when they have time. */
  #announce(text: string): void {
    setText(this.#polite, text);
  }

  /** Show a line for a moment. */
  #flash(text: string): void {
    const line = h("p", { class: "flash" }, text);
    document.body.append(line);
    window.setTimeout(() => line.remove(), 5_000);
  }
}

function commandId(): string {
  // randomUUID is only there over https and on localhost; getRandomValues is everywhere
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

new Page().start();
