// Which state the page is in, in words: the pill in the header, what stands in the way of seeing the run, and the
// notices above it. A pure function, so that each state can be looked at by itself.

import type { Link } from "./connection";
import * as format from "./format";
import { hasEnded, stateOf, type Model } from "./model";
import { toNumber, type RunSummary } from "./protocol";

export type Tone = "off" | "busy" | "live" | "good" | "warn" | "bad";

/** What the page's icon shows. */
export type Sign = "none" | "live" | "paused" | "good" | "stopped" | "bad" | "warn";

export interface Action {
  id: "reload" | "show-newer" | "stay";
  label: string;
}

export interface Notice {
  /** Same id, same notice: one that was closed stays closed while its id stays. */
  id: string;
  tone: Tone;
  title: string;
  text: string;
  /** Text to be shown as it is, folded. */
  details: { summary: string; text: string } | null;
  actions: Action[];
  closable: boolean;
}

export interface Described {
  /** State in one or two words. */
  word: string;
  tone: Tone;
  sign: Sign;
  /** Who, why or on what; empty where a notice says it. */
  detail: string;
  /** Who, why or on what, in any case. */
  cause: string;
  /** A further thing that goes on: a checkpoint is written. */
  aside: string;
  /** What to show where there is no run to show; `line` is code to copy. */
  stage: { title: string; text: string; actions?: Action[]; line?: string } | null;
  notices: Notice[];
}

export interface Seen {
  model: Model;
  link: Link;
  /** The page's clock, milliseconds, as in `link`. */
  now: number;
  /** Unix time of `now` in seconds. */
  time: number;
  /** Hash of this page; null where it is not known. */
  page: string | null;
  /** Milliseconds that the page has been drawing a chart frame for. */
  behind: number;
  /** A newer run, and seconds until the page changes to it; null for when asked. */
  newer: { run: RunSummary; seconds: number | null } | null;
  /** Keys of runs that are to be laid over the watched one, or behind it, and that the server does not have. */
  missing: readonly string[];
}

/** How a run gets a live page. */
const LINE_TO_START = "trainer.train(train_loader, epochs=10, callbacks=[Dashboard()])";

/** Unanswered for longer than this, milliseconds, the page says that it lags. */
const LAGGING_AFTER = 2_500;

/** A connection that is lost for shorter, milliseconds, is told by the pill alone. */
const PATIENCE = 1_500;

interface Words {
  word: string;
  tone: Tone;
  sign: Sign;
  detail?: string;
  /** If there is no detail because a notice says it. */
  cause?: string;
}

export function describe(seen: Seen): Described {
  const { model, link } = seen;
  const words = pill(seen);
  const status = link.phase === "open" ? model.status : null;
  return {
    ...words,
    detail: words.detail ?? "",
    cause: words.cause ?? words.detail ?? "",
    aside: status?.saving && !hasEnded(status.state) ? "writing a checkpoint" : "",
    stage: stage(seen),
    notices: notices(seen),
  };
}

function pill(seen: Seen): Words {
  const { model, link } = seen;
  const ended = hasEnded(stateOf(model));
  if (ended && link.phase !== "unauthorised" && link.phase !== "refused" && link.phase !== "damaged") return runWords(model);
  switch (link.phase) {
    case "connecting":
      return { word: "connecting", tone: "busy", sign: "none" };
    case "reconnecting":
      return { word: "reconnecting", tone: "warn", sign: "warn", detail: lastHeard(seen) };
    case "gone":
      return { word: "server gone", tone: "off", sign: "warn", detail: lastHeard(seen) };
    case "unauthorised":
      return { word: "not authorised", tone: "bad", sign: "bad" };
    case "full":
      return { word: "too many viewers", tone: "warn", sign: "warn" };
    case "blocked":
      return { word: "connection blocked", tone: "bad", sign: "warn" };
    case "refused":
      return { word: "protocol differs", tone: "bad", sign: "warn", detail: link.reason };
    case "damaged":
      return { word: "file damaged", tone: "bad", sign: "warn" };
    case "open":
  }
  if (model.run === null) return { word: model.gone === null ? "no run yet" : "run not here", tone: "off", sign: "none" };
  if (model.hello?.saved) return { word: `${stateOf(model)} when saved`, tone: "off", sign: "none" };
  const unanswered = link.waiting === null ? 0 : seen.now - link.waiting;
  const lag = Math.max(unanswered, seen.behind, link.latency ?? 0);
  if (lag > LAGGING_AFTER) {
    const whose = seen.behind === lag ? "this page draws too slowly" : "the server answers late";
    return { word: "lagging", tone: "warn", sign: "warn", detail: `${format.seconds(lag / 1000)} behind: ${whose}` };
  }
  return runWords(model);
}

function runWords(model: Model): Words {
  const status = model.status;
  const cause = [status?.by ? `by ${status.by}` : "", status?.reason ?? ""].filter(Boolean).join(": ");
  switch (stateOf(model)) {
    case "starting":
      return { word: "starting", tone: "busy", sign: "none" };
    case "waiting":
      return { word: "waiting for the first step", tone: "busy", sign: "none", cause: stalledOn(model) };
    case "paused":
      return { word: "paused", tone: "warn", sign: "paused", detail: cause };
    case "stopping":
      return { word: "stopping", tone: "warn", sign: "stopped", detail: cause };
    case "closing":
      return { word: "finishing", tone: "busy", sign: "live", detail: "last checkpoints and callbacks" };
    case "completed": {
      const loss = toNumber(status?.loss ?? null);
      if (loss === null || Number.isFinite(loss)) {
        return { word: "completed", tone: "good", sign: "good", detail: status?.reason };
      }
      return { word: "completed", tone: "warn", sign: "warn", detail: `the last loss is ${format.number(loss)}` };
    }
    case "stopped":
      return { word: "stopped", tone: "off", sign: "stopped", detail: cause };
    case "cancelled":
      return { word: "cancelled", tone: "off", sign: "stopped", detail: cause };
    case "failed":
      return { word: "failed", tone: "bad", sign: "bad", cause: status?.error ?? status?.reason };
    case "validating":
    case "running":
      if (status !== null && status.stalled !== null) {
        return { word: "stalled", tone: "bad", sign: "warn", cause: stalledOn(model) };
      }
      return status?.state === "validating" || status?.validating
        ? { word: "validating", tone: "live", sign: "live", detail: cause }
        : { word: "live", tone: "live", sign: "live", detail: cause };
    case "lost":
      return { word: "lost", tone: "warn", sign: "warn", detail: cause };
    default:
      return { word: stateOf(model) ?? "starting", tone: "busy", sign: "none" };
  }
}

function stalledOn(model: Model): string {
  const { stalled = null, waiting_for = "" } = model.status ?? {};
  if (stalled === null) return "";
  return `no step for ${format.seconds(stalled)}${waiting_for ? `, in ${waiting_for}` : ""}`;
}

function lastHeard({ link, now, time }: Seen): string {
  return link.heard === null ? "" : `last heard at ${format.clock(time - (now - link.heard) / 1000)}`;
}

function stage(seen: Seen): Described["stage"] {
  const { model, link } = seen;
  if (model.run !== null) {
    const state = stateOf(model);
    if (model.curves > 0 || (state !== "starting" && state !== "waiting")) return null;
    return state === "starting"
      ? { title: "The run is starting", text: "Its callbacks are being set up." }
      : { title: "Waiting for the first step", text: "Curves appear with it." };
  }
  switch (link.phase) {
    case "connecting":
      return { title: "Connecting", text: "" };
    case "open":
      if (model.gone !== null) {
        return {
          title: `${model.gone} is not here`,
          text: model.hello?.saved
            ? "This file does not have this run."
            : "The server does not have this run, or no longer. It appears here should it begin.",
          actions: model.runs.length > 0 ? [{ id: "show-newer", label: "Show the newest run" }] : [],
        };
      }
      return {
        title: "No run yet",
        text: "The server is ready, and the next run appears here automatically. Start one with the page among its callbacks:",
        line: LINE_TO_START,
      };
    default:
      return { title: format.capital(pill(seen).word), text: explain(seen) };
  }
}

/** Why there is no connection, and what happens next or is to be done. */
function explain({ link }: Seen): string {
  switch (link.phase) {
    case "reconnecting":
      return "The connection was lost; looking for the server.";
    case "gone":
      return "No server answers at this address. The page keeps trying and shows the next run automatically.";
    case "unauthorised":
      return "The server does not know this browser. Open the address with the token that the run printed. Where an application shows this page, sign in there again.";
    case "full":
      return "The server has its maximum number of viewers. The page connects as soon as another one leaves.";
    case "blocked":
      return "The server answers, but websockets do not reach it. Allow them in the proxy in between.";
    case "refused":
      return "The server speaks another version of the protocol. Reload the page; if that does not help, rebuild it.";
    case "damaged":
      return "This file is not whole: copy or download it again.";
    default:
      return "";
  }
}

function notices(seen: Seen): Notice[] {
  const { model, link, page, newer } = seen;
  const status = model.status;
  const shown: Notice[] = [];
  const add = (notice: Pick<Notice, "id" | "tone" | "title" | "text"> & Partial<Notice>): void => {
    shown.push({ details: null, actions: [], closable: false, ...notice });
  };
  if (model.run === null) return shown; // the stage says it

  const run = model.run.key;
  const ended = hasEnded(stateOf(model));
  if (newer !== null && !model.hello?.saved) {
    add({
      id: `newer ${newer.run.key}`,
      tone: "busy",
      title: `Run ${newer.run.name} has begun.`,
      text: newer.seconds === null ? "" : `Showing it in ${Math.ceil(newer.seconds)} s.`,
      actions: [
        { id: "show-newer", label: newer.seconds === null ? "Show it" : "Show it now" },
        ...(newer.seconds === null ? [] : [{ id: "stay", label: "Stay here" } as const]),
      ],
      closable: newer.seconds === null,
    });
  }
  const { missing } = seen;
  if (missing.length > 0 && link.phase === "open") {
    add({
      id: `missing ${missing.join()}`,
      tone: "warn",
      title: `${missing.length === 1 ? "A run" : `${missing.length} runs`} of this view ${missing.length === 1 ? "is" : "are"} not here:`,
      text: `${missing.join(", ")}. ${model.hello?.saved ? "This file" : "The server"} does not have ${missing.length === 1 ? "it" : "them"}${model.hello?.saved ? "" : ", or no longer"}.`,
      closable: true,
    });
  }
  if (link.phase === "gone" && ended) {
    const text = "This page keeps its data. The next run at this address appears automatically.";
    add({ id: `over ${run}`, tone: "off", title: "The server closed with its run.", text, closable: true });
  } else if (link.phase === "reconnecting" && (ended || seen.now - link.since < PATIENCE)) {
    // Most often it is back before anybody could read this.
  } else if (link.phase !== "open" && link.phase !== "connecting") {
    const tone = link.phase === "reconnecting" || link.phase === "gone" || link.phase === "full" ? "warn" : "bad";
    const kept = link.phase === "reconnecting" ? "" : " What is below is as it was.";
    const said = link.phase === "gone" && model.bye ? `Its last message: ${model.bye}. ` : "";
    add({ id: link.phase, tone, title: `${format.capital(pill(seen).word)}.`, text: `${said}${explain(seen)}${kept}` });
  }
  if (link.phase === "open" && page !== null && model.hello?.page && model.hello.page !== page) {
    add({
      id: `older ${model.hello.page}`,
      tone: "warn",
      title: "This page is older than its server.",
      text: "",
      actions: [{ id: "reload", label: "Reload" }],
      closable: true,
    });
  }
  if (status?.state === "failed") {
    const readOnly = model.hello?.role === "read_only" && !model.hello.saved;
    add({
      id: `failed ${run}`,
      tone: "bad",
      title: "The run has failed.",
      text: `${status.error ?? status.reason}${readOnly ? " The traceback is for viewers with the control role." : ""}`,
      details: status.traceback ? { summary: "Traceback", text: status.traceback } : null,
    });
  }
  if (status?.stalled != null && !ended && link.phase === "open" && !model.hello?.saved) {
    const text = status.waiting_for ? `Training is in ${status.waiting_for}.` : "";
    add({ id: "stalled", tone: "bad", title: `No step for ${format.seconds(status.stalled)}.`, text });
  }
  if (status && status.dropped > 0) {
    add({
      id: `dropped ${run}`,
      tone: "warn",
      title: `${format.count(status.dropped)} samples were dropped.`,
      text: "The page's history could not keep up with training. Its curves have a gap; the run is complete.",
      closable: true,
    });
  }
  if (status?.trimmed != null) {
    add({
      id: `trimmed ${run}`,
      tone: "off",
      title: "The history is trimmed.",
      text: `Before step ${format.count(status.trimmed)} the history holds only minima and maxima; events.jsonl has everything.`,
      closable: true,
    });
  }
  return shown;
}

const SYMBOLS: Record<Sign, string> = {
  none: "…", live: "▶", paused: "⏸", good: "✓", stopped: "■", bad: "✕", warn: "!",
};

/** Title of the window: state, loss, run. */
export function title(seen: Seen, described: Described): string {
  const { run, status } = seen.model;
  if (run === null) return `${format.capital(described.word)} · offloop`;
  const loss = toNumber(status?.loss ?? null);
  const parts = [loss === null ? described.word : format.number(loss), run.name];
  const state = described.sign === "live" || loss === null ? "" : ` · ${described.word}`;
  return `${SYMBOLS[described.sign]} ${parts.join(" · ")}${state}`;
}
