// Messages of the server for tests: whole, with the few fields that a test is about.

import type { Link } from "../src/connection";
import type { Hello, Rows, RunEvent, RunInfo, RunRow, RunSummary, ServerMessage, Status } from "../src/protocol";
import { NOTHING, reduce, type Happening, type Model } from "../src/model";

export function hello(fields: Partial<Hello> = {}): Hello {
  return {
    type: "hello", protocol: 1, server: "s1", page: "p1", role: "control", runs: [summary()], run: "a",
    time: 1_000, frame_interval: 0.1,
    ...fields,
  } as Hello;
}

export function summary(fields: Partial<RunSummary> = {}): RunSummary {
  return { key: "a", name: "a", state: "running", started: 100, ...fields };
}

export function run(fields: Partial<RunInfo> = {}): RunInfo {
  return {
    type: "run", key: "a", name: "a", attempt: 0, host: "h", pid: 1, command: [], commit: null, directory: null,
    started: 100, device: "cpu", world_size: 1, parameters: 1, epochs: 3, max_steps: null, max_time: null,
    steps_per_epoch: 10, batches_per_epoch: 10, optimizers: [], monitor: "val_loss", config: {}, refused: {},
    ...fields,
  } as RunInfo;
}

export function status(fields: Partial<Status> = {}): Status {
  return {
    type: "status", run: "a", state: "running", by: "", reason: "", error: null, traceback: null, epoch: 0,
    step: 5, progress: 0.1, seconds: 3, time_left: 30, steps_per_second: 2, samples_per_second: 8, lr: 0.1,
    loss: 0.5, data_share: 0.1, compute_share: 0.8, callback_share: 0, validating: false, saving: false,
    stalled: null, waiting_for: "", dropped: 0, trimmed: null, viewers: 1,
    ...fields,
  } as Status;
}

export function milestone(seq: number, fields: Partial<RunEvent> = {}, run = "a"): ServerMessage {
  return { type: "milestone", run, event: { type: "EpochEnd", seq, time: 1, step: 1, ...fields } };
}

export function after(...happenings: Happening[]): Model {
  return happenings.reduce((model, happening) => reduce(model, happening, 1_000), NOTHING);
}

/** What is known a moment after a viewer came to a run. */
export function watching(...happenings: Happening[]): Model {
  return after(hello(), run(), status(), ...happenings);
}

export function link(fields: Partial<Link> = {}): Link {
  return { phase: "open", since: 0, reason: "", heard: 900, latency: 2, waiting: null, ...fields };
}

export function row(key: string, fields: Partial<RunRow> = {}): RunRow {
  return {
    key, id: key, name: key, state: "completed", why: "", live: false, page: null, attempt: 0, host: "h",
    directory: null, started: 100, heard: 200, seconds: 100, step: 10, progress: 1, monitor: "val_loss",
    figures: {}, hyperparameters: {}, tags: [], note: "", archived: false, version: 0, sparkline: [],
    ...fields,
  };
}

export function rows(list: RunRow[], fields: Partial<Rows> = {}): Rows {
  return { type: "rows", rows: list, removed: [], more: false, total: list.length, ...fields };
}
