// Events of a run in words: what the log says about each, and which of them mark the curves. No DOM.

import { bytes, compact, count, duration } from "./format";
import type { ChartEvent } from "./charts/scene";
import type { RunEvent, WireNumber } from "./protocol";

export type EventKind =
  | "alert" | "command" | "automatic" | "checkpoint" | "validation" | "lr" | "state" | "epoch" | "sample" | "other"
  /** A class of the user's own, by its name. */
  | `own ${string}`;
export type Tone = "plain" | "good" | "warn" | "bad";

export interface Told {
  kind: EventKind;
  tone: Tone;
  /** What happened, in a sentence. */
  text: string;
  /** Who caused it; empty where nobody is known. */
  by: string;
  /** Names of fields that the text has whole. */
  whole: readonly string[];
}

const BASE_FIELDS = new Set(["type", "run_id", "seq", "time", "epoch", "step", "batch"]);
const METRICS_TOLD = 4;
const FIELDS_TOLD = 6;

const KNOWN: Record<string, (event: RunEvent) => Partial<Told> & { text: string }> = {
  TrainStart: (event) => ({
    kind: "state",
    text: event.resumed_from
      ? `Training resumes from ${words(event.resumed_from)}, attempt ${words(event.attempt)}`
      : `Training begins on ${words(event.device, "cpu")}`,
  }),
  Resumed: (event) => ({
    kind: "state",
    tone: event.exactness === "bitwise" ? "good" : "plain",
    text: `Continued ${words(event.exactness)} from ${words(event.checkpoint)}${because(event.reasons)}`,
  }),
  EpochStart: (event) => ({ kind: "epoch", text: `Epoch ${(event.epoch ?? 0) + 1} begins` }),
  EpochEnd: (event) => ({
    kind: "epoch",
    text:
      `Epoch ${(event.epoch ?? 0) + 1} ends${event.complete === false ? " early" : ""}` +
      `${inSeconds(event.seconds)}${metrics(event.metrics)}`,
  }),
  ValidationStart: () => ({ kind: "validation", text: "Validation begins" }),
  ValidationEnd: (event) => ({
    kind: "validation",
    text: `Validated${inSeconds(event.seconds)}${metrics(event.metrics)}`,
  }),
  TrainEnd: (event) => ({
    kind: "state",
    tone: event.status === "failed" ? "bad" : event.status !== "completed" ? "plain" : lossIsFinite(event) ? "good" : "warn",
    text: `Training ${words(event.status)}${inSeconds(event.seconds, " after ")}${because(event.error ?? event.reason)}`,
  }),
  LearningRateChanged: (event) => ({
    kind: "lr",
    text:
      `Learning rate${event.optimizer ? ` of ${words(event.optimizer)}` : ""} ` +
      `${compact(numeric(event.previous))} → ${compact(numeric(event.lr))}`,
    by: event.source === "command" ? "" : words(event.source), // the command itself stands there with its giver
  }),
  StateChanged: (event) => ({ kind: "state", text: `Now ${words(event.state)}${because(event.reason)}` }),
  CommandApplied: (event) => ({
    kind: "command",
    tone: event.error ? "bad" : "plain",
    text: event.error
      ? `Command ${command(event)} failed: ${words(event.error)}`
      : `Command ${command(event)} took effect`,
  }),
  CheckpointSaved: (event) => ({
    kind: "checkpoint",
    text:
      `Checkpoint of step ${count(numeric(event.saved_step))} saved` +
      `${event.reason ? ` (${words(event.reason)})` : ""}` +
      `${typeof event.bytes === "number" ? `, ${bytes(event.bytes)}` : ""}${inSeconds(event.seconds)}`,
  }),
  CheckpointFailed: (event) => ({
    kind: "checkpoint",
    tone: "bad",
    text: `Checkpoint of step ${count(numeric(event.saved_step))} could not be written: ${words(event.error)}`,
  }),
  Evaluated: (event) => ({
    kind: "validation",
    tone: event.error ? "bad" : "plain",
    text: event.error
      ? `Checkpoint of step ${count(numeric(event.of_step))} could not be evaluated: ${words(event.error)}`
      : `Checkpoint of step ${count(numeric(event.of_step))} evaluated${inSeconds(event.seconds)}${metrics(event.metrics)}`,
  }),
  CallbackFailed: (event) => ({
    kind: "alert",
    tone: "bad",
    text:
      `${words(event.callback)} failed on ${words(event.event)}: ${words(event.error)}` +
      `${event.disabled === true ? "; it gets no more events" : ""}`,
  }),
  EventsDropped: (event) => ({
    kind: "other",
    tone: "warn",
    text: `${words(event.subscriber)} lagged and missed ${count(numeric(event.count))} samples`,
  }),
  Alert: (event) => ({ kind: "alert", tone: "bad", text: words(event.message, words(event.rule)), by: words(event.rule) }),
  TextSample: (event) => sample("Text", event),
  PictureSample: (event) => sample("Picture", event),
  TableSample: (event) => sample("Table", event),
  ProfileWritten: (event) => ({ kind: "other", text: `Profile of ${words(event.steps)} steps written to ${words(event.trace)}` }),
};

function sample(what: string, { key, caption }: RunEvent): Partial<Told> & { text: string } {
  return { kind: "sample", text: `${what} ${words(key)}${caption ? `: ${words(caption)}` : ""}` };
}

/** Tell an event, also of a type that this page has never heard of. */
export function tell(event: RunEvent): Told {
  const known = Object.hasOwn(KNOWN, event.type) ? KNOWN[event.type] : undefined;
  const told = known?.(event) ?? unknown(event);
  return { kind: "other", tone: "plain", by: words(event.by), whole: [], ...told };
}

/** What events have in common that are told once, with their number; null for one that stands for itself. */
export function repetitionOf(event: RunEvent): string | null {
  const by = { Alert: [event.rule], CallbackFailed: [event.callback, event.event], EventsDropped: [event.subscriber] };
  return Object.hasOwn(by, event.type) ? [event.type, ...by[event.type as keyof typeof by]].map((part) => words(part)).join(" ") : null;
}

/** All that an event carries, for reading: a field a line, texts of several lines as they are. */
export function wholeOf(event: RunEvent, without: readonly string[] = []): string {
  return Object.entries(event)
    .filter(([name]) => !without.includes(name))
    .map(([name, value]) => {
      const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
      return text.includes("\n") ? `${name}:\n${text.trimEnd().replace(/^/gm, "  ")}` : `${name}: ${text}`;
    })
    .join("\n");
}

/** How an event is marked in the charts, if it is. */
export function markOf(event: RunEvent): ChartEvent | null {
  const { kind, text } = tell(event);
  const saved = numeric(event.saved_step);
  const metric = typeof event.metric === "string" ? event.metric : null;
  const at = { step: saved ?? event.step ?? -1, time: event.time ?? 0, text, metric: null };
  if (at.step < 0) return null;
  if (event.type === "Alert") return { ...at, kind: "alert", metric };
  if (event.type === "CallbackFailed") return { ...at, kind: "alert" };
  if (event.type === "ValidationEnd") return { ...at, kind: "validation" };
  if (event.type === "CheckpointSaved" || event.type === "LearningRateChanged") {
    return { ...at, kind: kind === "lr" ? "lr" : "checkpoint" };
  }
  return null;
}

/** An event of another class: its fields, texts of several lines below the others. A class is told by its own name. */
function unknown(event: RunEvent): Partial<Told> & { text: string } {
  const fields = Object.entries(event).filter(([name]) => !BASE_FIELDS.has(name) && name !== "by");
  const isLong = ([, value]: [string, unknown]): boolean => typeof value === "string" && value.trim().includes("\n");
  const [long, short] = [fields.filter(isLong), fields.filter((field) => !isLong(field))];
  const one = fields.length === 1 && typeof fields[0]?.[1] === "string";
  const told = short.slice(0, FIELDS_TOLD).map(([name, value]) => (one ? plain(value) : `${name} ${plain(value)}`));
  if (short.length > FIELDS_TOLD) told.push(`${short.length - FIELDS_TOLD} more`);
  const texts = long.map(([name, value]) => (one ? "" : `${name}:\n`) + String(value).replace(/^\s*\n|\s+$/g, ""));
  const name = event.type.slice(event.type.lastIndexOf(".") + 1);
  return {
    kind: `own ${name}`,
    text: [told.join(" · "), ...texts].filter(Boolean).join("\n") || name,
    whole: [...short.slice(0, FIELDS_TOLD).filter(([, value]) => typeof value === "string"), ...long].map(([field]) => field),
  };
}

function command(event: RunEvent): string {
  const given = Object.entries((event.arguments ?? {}) as Record<string, unknown>)
    .filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => `${name} ${plain(value)}`);
  return words(event.command) + (given.length > 0 ? ` (${given.join(", ")})` : "");
}

function metrics(values: unknown): string {
  if (typeof values !== "object" || values === null) return "";
  const entries = Object.entries(values as Record<string, WireNumber>);
  const told = entries.slice(0, METRICS_TOLD).map(([name, value]) => `${name} ${compact(Number(value))}`);
  if (entries.length > METRICS_TOLD) told.push(`${entries.length - METRICS_TOLD} more`);
  return told.length > 0 ? `: ${told.join(", ")}` : "";
}

/** Whether the loss of training is a number at the end of a run, as far as the run says. */
function lossIsFinite(event: RunEvent): boolean {
  const { train_loss: loss = 0 } = (event.metrics ?? {}) as Record<string, WireNumber>;
  return Number.isFinite(Number(loss));
}

function inSeconds(value: unknown, word = " in "): string {
  return typeof value === "number" ? `${word}${duration(value)}` : "";
}

function because(reason: unknown): string {
  return reason ? `: ${words(reason)}` : "";
}

function words(value: unknown, otherwise = ""): string {
  return value === undefined || value === null || value === "" ? otherwise : plain(value);
}

function plain(value: unknown): string {
  if (typeof value === "string") return value;
  if (typeof value === "number") return Number.isInteger(value) ? count(value) : compact(value);
  return JSON.stringify(value);
}

function numeric(value: unknown): number | null {
  return typeof value === "number" ? value : null;
}
