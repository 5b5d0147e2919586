// Protocol `offloop.v1` as TypeScript sees it: the types of dashboard/protocol/, and its chart frames taken
// apart. That file is the contract and explains it; names, defaults and bytes here follow it.

import type { LayersQuery } from "./layers/frame";

export const SUBPROTOCOL = "offloop.v1";
export const PROTOCOL_VERSION = 1;
/** Curves that one viewer can have on its screen at a time. */
export const MAX_SERIES_SHOWN = 200;
/** Runs that one viewer can lay over the watched one. */
export const MAX_OVERLAID = 9;
/** Seconds between two pings. */
export const HEARTBEAT = 5;

/** A page in a file: the file is not whole. No server closes with it. */
export const CLOSE_DAMAGED = 4000;
export const CLOSE_UNAUTHORISED = 4001;
export const CLOSE_PROTOCOL = 4002;
export const CLOSE_SLOW = 4008;

/** JSON has no word for what is not finite. */
export type WireNumber = number | "NaN" | "Infinity" | "-Infinity";

export type Role = "control" | "read_only";
export type RunState =
  | "starting"
  | "waiting"
  | "running"
  | "validating"
  | "paused"
  | "stopping"
  | "closing"
  | "completed"
  | "stopped"
  | "cancelled"
  | "failed"
  | "lost";
export type CommandName = "pause" | "resume" | "stop" | "set_lr" | "checkpoint" | "validate";

// Viewer to server

export interface Hi {
  type: "hi";
  protocol: number;
  run: string | null;
  /** No other run will do. */
  only: boolean;
  server: string | null;
  after: number;
  keys: string[];
  /** Texts and rows of samples do not come with their milestones: the page asks for those that are seen. */
  samples?: "index";
}

export interface Watch {
  type: "watch";
  run: string;
}

export interface Show {
  type: "show";
  run?: string;
  series: number[];
  points?: number;
  /** Whether chart frames have the samples seen. */
  samples?: boolean;
}

export interface Drawn {
  type: "drawn";
}

export interface RangeQuery {
  type: "range";
  query: number;
  run?: string;
  series: number[];
  start: number;
  end: number;
  axis?: "step" | "time" | "epoch" | "samples";
  points?: number;
  samples?: boolean;
}

export interface SampleQuery {
  type: "sample";
  query: number;
  run: string;
  seq: number;
  picture: number | null;
}

export interface CommandRequest {
  type: "command";
  id: string;
  name: CommandName;
  run: string;
  lr?: number;
  optimizer?: string;
  checkpoint?: boolean;
  ttl?: number;
}

export interface ListRuns {
  type: "list";
  on?: boolean;
}

export interface Overlay {
  type: "overlay";
  runs: string[];
}

export interface Edit {
  type: "edit";
  id: string;
  run: string;
  version: number;
  name?: string;
  tags?: string[];
  note?: string;
  archived?: boolean;
}

export interface ListCheckpoints {
  type: "checkpoints";
  run: string;
}

export interface EditCheckpoint {
  type: "edit_checkpoint";
  id: string;
  run: string;
  checkpoint: string;
  action: "verify" | "tag" | "untag";
  tag?: string;
  move?: boolean;
}

export interface Visibility {
  type: "visible";
  visible: boolean;
}

export interface Ping {
  type: "ping";
  sent: number;
}

export type ViewerMessage =
  | LayersQuery
  | Hi
  | Watch
  | Show
  | Drawn
  | RangeQuery
  | SampleQuery
  | CommandRequest
  | ListRuns
  | Overlay
  | Edit
  | ListCheckpoints
  | EditCheckpoint
  | Visibility
  | Ping;

// Server to viewer, text

export interface RunSummary {
  key: string;
  name: string;
  state: string;
  started: number;
}

export interface Hello {
  type: "hello";
  protocol: number;
  server: string;
  page: string | null;
  role: Role;
  runs: RunSummary[];
  run: string | null;
  time: number;
  frame_interval: number;
  /** When the file was made that this page is in; null where a server speaks. */
  saved?: number | null;
}

export interface Runs {
  type: "runs";
  runs: RunSummary[];
}

/** Last value, and the best finite one if it is known which way is better. */
export type Figure = [WireNumber | null, number | null];

export interface RunRow {
  key: string;
  id: string;
  name: string;
  state: RunState;
  why: string;
  live: boolean;
  page: string | null;
  attempt: number;
  host: string;
  directory: string | null;
  started: number;
  heard: number;
  seconds: number;
  step: number;
  /** Older servers send neither this nor the device. */
  epoch?: number;
  device?: string;
  progress: number | null;
  monitor: string;
  figures: Record<string, Figure>;
  /** How many metrics it has: figures are of some of them if there are many. */
  metrics?: number;
  hyperparameters: Record<string, unknown>;
  tags: string[];
  note: string;
  archived: boolean;
  version: number;
  sparkline: number[];
}

export interface Rows {
  type: "rows";
  rows: RunRow[];
  removed: string[];
  more: boolean;
  total: number;
}

export interface CheckpointRow {
  name: string;
  /** Its directory; empty if its manifest cannot be read. */
  path: string;
  step: number;
  epoch: number;
  attempt: number;
  reason: string;
  created: number;
  bytes: number;
  metrics: Record<string, WireNumber>;
  is_best: boolean;
  is_last: boolean;
  tags: string[];
  /** When the server has read every byte of it. */
  verified: number | null;
  /** What is wrong with it. */
  damaged: string;
}

export interface Checkpoints {
  type: "checkpoints";
  run: string;
  rows: CheckpointRow[];
  /** Names of those that are being read. */
  verifying: string[];
  error: string;
}

export interface RunInfo {
  type: "run";
  key: string;
  name: string;
  attempt: number;
  host: string;
  pid: number;
  command: string[];
  commit: string | null;
  directory: string | null;
  started: number;
  device: string;
  world_size: number;
  parameters: number;
  epochs: number | null;
  max_steps: number | null;
  max_time: number | null;
  steps_per_epoch: number | null;
  batches_per_epoch: number | null;
  optimizers: string[];
  monitor: string;
  config: Record<string, unknown>;
  refused: Partial<Record<CommandName, string>>;
  /** Names of its callbacks, as commands have them in `by`; an older server does not send it. */
  callbacks?: string[];
  /** By flat name, as `optimizer.lr`. */
  hyperparameters?: Record<string, unknown>;
  /** Of a run of another process: the address of that one's page, without a token. */
  page?: string | null;
  /** Whether it is laid over the watched run; else it is the watched one from now on. */
  overlaid?: boolean;
}

export interface SeriesInfo {
  id: number;
  key: string;
  /** Tab that has its panel. */
  tab: "metrics" | "system";
  panel: string;
  group: string;
  label: string;
  better: "min" | "max" | null;
  /** An older server does not send it. */
  unit?: string;
}

export interface Series {
  type: "series";
  run: string;
  series: SeriesInfo[];
}

/** `seq` of the event, key, kind, step, epoch, Unix time. */
export type SampleEntry = [number, string, "text" | "picture" | "table", number, number, number];

export interface SampleIndex {
  type: "samples";
  run: string;
  samples: SampleEntry[];
}

/** Last value, least and its step, greatest and its step. */
export type LatestValue = [WireNumber | null, number | null, number, number | null, number];

export interface Latest {
  type: "latest";
  run: string;
  values: Record<string, LatestValue>;
}

export interface Status {
  type: "status";
  run: string;
  state: RunState;
  by: string;
  reason: string;
  error: string | null;
  traceback: string | null;
  epoch: number;
  step: number;
  progress: number | null;
  seconds: number;
  time_left: number | null;
  steps_per_second: number;
  samples_per_second: number;
  lr: number | null;
  loss: WireNumber | null;
  data_share: number;
  compute_share: number;
  callback_share: number;
  validating: boolean;
  saving: boolean;
  stalled: number | null;
  waiting_for: string;
  dropped: number;
  trimmed: number | null;
  /** Layers that were measured; an older server does not send it. */
  layers?: number;
  viewers: number;
}

/** An event of the run as it stands in `events.jsonl`; fields that have their default are left out. */
export interface RunEvent {
  type: string;
  seq?: number;
  time?: number;
  epoch?: number;
  step?: number;
  [field: string]: unknown;
}

export interface Milestone {
  type: "milestone";
  run: string;
  event: RunEvent;
}

export interface MilestonesMissed {
  type: "missed";
  run: string;
  count: number;
}

export interface Ack {
  type: "ack";
  id: string;
  /** A command, or `edit`. */
  name: CommandName | "edit";
  state: "accepted" | "applied" | "rejected" | "expired";
  step: number | null;
  why: string;
}

export interface Pong {
  type: "pong";
  sent: number;
  time: number;
}

export interface Bye {
  type: "bye";
  reason: string;
}

export type ServerMessage =
  | Hello
  | Runs
  | RunInfo
  | Series
  | Latest
  | Status
  | Milestone
  | MilestonesMissed
  | Ack
  | Pong
  | Bye
  | Rows
  | SampleIndex
  | Checkpoints;

const SERVER_MESSAGES: Record<ServerMessage["type"], true> = {
  hello: true, runs: true, run: true, series: true, latest: true, status: true,
  milestone: true, missed: true, ack: true, pong: true, bye: true, rows: true, samples: true,
  checkpoints: true,
};

/** Read a text message; null for one of a kind that this page does not know. Throws on what is no message. */
export function decodeText(text: string): ServerMessage | null {
  const message: unknown = JSON.parse(text);
  if (typeof message !== "object" || message === null || !("type" in message)) {
    throw new Error(`no message of ${SUBPROTOCOL}: ${text.slice(0, 80)}`);
  }
  return Object.hasOwn(SERVER_MESSAGES, String(message.type)) ? (message as ServerMessage) : null;
}

/** What a wire number means; null stays null. */
export function toNumber(value: WireNumber): number;
export function toNumber(value: WireNumber | null): number | null;
export function toNumber(value: WireNumber | null): number | null {
  return value === null ? null : Number(value); // Number("NaN"), Number("-Infinity") are what they say
}

// Server to viewer, chart frames

/** First step, last step, kind and count of a stretch without a finite value. */
export type NonFinite = [number, number, "nan" | "inf" | "-inf" | "mixed", number];
/** Last step before and first step after a stretch of dropped samples, and how many are missing. */
export type Gap = [number, number, number];

export interface ChartColumn {
  id: number;
  points: number;
  dense: boolean;
  reduced: boolean;
  marks: NonFinite[];
}

export interface ChartHeader {
  type: "chart";
  run: string;
  kind: "snapshot" | "delta" | "range";
  query: number | null;
  more: boolean;
  rows: number;
  samples?: boolean;
  series: ChartColumn[];
  gaps: Gap[];
  trimmed: number | null;
}

export interface ChartFrame {
  header: ChartHeader;
  /** Axis columns, `rows` long. `time` is Unix time in seconds, `epoch` counts epochs done with a fraction. */
  step: Float64Array;
  time: Float64Array;
  epoch: Float64Array;
  /** Samples that the model was trained on until then; zeros where they were not asked for. */
  samples: Float64Array;
  /** Of each curve in `header.series`: its values, NaN where it is not finite, */
  values: Float64Array[];
  /** and in which row each of them is. */
  indices: Uint32Array[];
}

/**
 * Take a chart frame apart without copying it: the columns are views into `data`.
 *
 * Typed arrays have the byte order of the machine; every machine that browsers run on is little-endian, as
 * the frames are. Throws an Error where the bytes are no chart frame.
 */
export function decodeChart(data: ArrayBuffer): ChartFrame {
  const { header, length: begin } = decodeHead<ChartHeader>(data, "chart");
  let offset = begin;
  const sparse = header.series.filter((column) => !column.dense);
  const floats = (header.samples === true ? 4 : 3) * header.rows + sum(header.series);
  if (data.byteLength !== offset + 8 * floats + 4 * sum(sparse)) {
    throw new Error(`the chart frame has ${data.byteLength} bytes, its header speaks of another length`);
  }
  const column = (count: number): Float64Array => {
    const values = new Float64Array(data, offset, count);
    offset += 8 * count;
    return values;
  };
  const [step, time, epoch] = [column(header.rows), column(header.rows), column(header.rows)];
  const samples = header.samples === true ? column(header.rows) : new Float64Array(header.rows);
  const values = header.series.map(({ points }) => column(points));
  const everyRow = Uint32Array.from({ length: header.rows }, (_, row) => row);
  const indices = header.series.map(({ dense, points }) => {
    if (dense) return everyRow;
    const rows = new Uint32Array(data, offset, points);
    offset += 4 * points;
    return rows;
  });
  return { header, step, time, epoch, samples, values, indices };
}

// Server to viewer, sample frames

export interface SampleHeader {
  type: "sample";
  run: string;
  query: number;
  more?: boolean;
  error?: string;
  media_type?: string;
  /** In the first frame of an answer. */
  event?: RunEvent;
}

/** Take a sample frame apart. */
export function decodeSample(data: ArrayBuffer): { header: SampleHeader; content: ArrayBuffer } {
  const { header, length } = decodeHead<SampleHeader>(data, "sample");
  return { header, content: data.slice(length) };
}

// Server to viewer, every binary frame

export type FrameType = "chart" | "sample" | "layers";

/** What a binary frame is about, from its first bytes; the rest of it is not looked at. */
export function isFrame(type: FrameType, data: ArrayBuffer): boolean {
  const begin = `{"type":"${type}"`;
  return data.byteLength > 4 + begin.length && new TextDecoder().decode(new Uint8Array(data, 4, begin.length)) === begin;
}

/** Read the header of a binary frame; `length` is that of all that stands before the rest. Throws where it is none. */
export function decodeHead<Header>(data: ArrayBuffer, type: FrameType): { header: Header; length: number } {
  if (data.byteLength < 4) throw new Error(`a ${type} frame has at least 4 bytes, got ${data.byteLength}`);
  const length = new DataView(data).getUint32(0, true);
  if (4 + length > data.byteLength) throw new Error(`the header of a ${type} frame is cut off: ${length} bytes`);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length))) as Header & { type: string };
  if (header.type !== type) throw new Error(`not a ${type} frame: ${String(header.type)}`);
  return { header, length: 4 + length };
}

function sum(columns: ChartColumn[]): number {
  return columns.reduce((total, { points }) => total + points, 0);
}
