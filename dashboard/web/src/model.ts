// What the page knows about the run: a pure function of what the server has said and what the viewer has asked for.

import { toNumber } from "./protocol";
import type {
  Ack,
  CommandName,
  CommandRequest,
  Hello,
  Role,
  RunEvent,
  RunInfo,
  RunSummary,
  ServerMessage,
  Status,
} from "./protocol";

/** Milestones that the page keeps; the run's `events.jsonl` has all. */
export const MILESTONES_KEPT = 5_000;
/** Commands that are over and still told about. */
const COMMANDS_KEPT = 20;
/** Losses behind the little curve in the page's icon. */
const LOSSES_KEPT = 24;

export type CommandState =
  /** Waits for the connection, or for the server's first answer. */
  | "sent"
  | "accepted"
  | "applied"
  | "rejected"
  | "expired"
  /** The server that had it is no more: nobody knows. */
  | "lost";

export interface Command {
  request: CommandRequest;
  state: CommandState;
  step: number | null;
  why: string;
  /** When it was given and last heard of, milliseconds of the page's clock. */
  at: number;
}

export interface Model {
  /** The server's last hello; null until it has spoken. */
  hello: Hello | null;
  runs: readonly RunSummary[];
  /** The run that is watched; null while there is none. */
  run: RunInfo | null;
  /** Key of the one run that the page is to show and that the server does not have; null for none. */
  gone: string | null;
  status: Status | null;
  /** How many curves there are. */
  curves: number;
  /** Events of the run, oldest first. */
  milestones: readonly RunEvent[];
  /** Milestones that this page has not got: older than the server or the page keeps. */
  missed: number;
  /** `seq` of the last milestone. */
  last: number;
  /** Commands of this page, oldest first. */
  commands: readonly Command[];
  /** Losses of a few steps up to now, finite ones. */
  losses: readonly number[];
  lossStep: number;
  /** Why the server said that it would go. */
  bye: string | null;
}

export const NOTHING: Model = {
  hello: null,
  runs: [],
  run: null,
  gone: null,
  status: null,
  curves: 0,
  milestones: [],
  missed: 0,
  last: -1,
  commands: [],
  losses: [],
  lossStep: -1,
  bye: null,
};

/** Everything that is about one run. */
const NO_RUN = {
  run: null, gone: null, status: null, curves: 0, milestones: [], missed: 0, last: -1, losses: [], lossStep: -1,
} satisfies Partial<Model>;

/** A command goes out; `at` is the page's clock in milliseconds. */
export interface Given {
  type: "given";
  request: CommandRequest;
  at: number;
}

/** The server does not have the one run that the page is to show. */
export interface Gone {
  type: "gone";
  key: string;
}

export type Happening = ServerMessage | Given | Gone;

/** Return what is known after a message. Messages about another run than the one watched change nothing. */
export function reduce(model: Model, message: Happening, now = 0): Model {
  switch (message.type) {
    case "hello":
      return greeted(model, message, now);
    case "runs":
      return { ...model, runs: message.runs };
    case "run":
      return watching(model, message);
    case "status":
      return message.run === model.run?.key ? withStatus(model, message) : model;
    case "milestone":
      return message.run === model.run?.key ? withMilestone(model, message.event) : model;
    case "series":
      return message.run === model.run?.key ? { ...model, curves: model.curves + message.series.length } : model;
    case "missed":
      // All that the server keeps no longer; some of them may have come before the connection was lost.
      return message.run === model.run?.key
        ? { ...model, missed: Math.max(model.missed, message.count - model.milestones.length) }
        : model;
    case "given": {
      const command: Command = { request: message.request, state: "sent", step: null, why: "", at: message.at };
      return { ...model, commands: [...model.commands, command].slice(-COMMANDS_KEPT) };
    }
    case "ack":
      return { ...model, commands: model.commands.map((command) => answered(command, message, now)) };
    case "gone":
      return { ...model, ...NO_RUN, gone: message.key };
    case "bye":
      return { ...model, bye: message.reason };
    default:
      return model; // latest and pong: the charts' and the connection's
  }
}

function greeted(model: Model, hello: Hello, now: number): Model {
  const next: Model = { ...model, ...(hello.run === null ? NO_RUN : {}), hello, runs: hello.runs, bye: null };
  if (model.hello !== null && model.hello.server !== hello.server) {
    // Other server, other run process: it knows neither our milestones (the run message starts anew) nor commands.
    next.last = -1;
    next.commands = model.commands.map((command) =>
      isPending(command) ? { ...command, state: "lost", why: "the server was restarted", at: now } : command,
    );
  }
  return next;
}

function watching(model: Model, run: RunInfo): Model {
  // A followed run may begin its next attempt.
  const { key, attempt, started } = model.run ?? {};
  const same = key === run.key && attempt === run.attempt && started === run.started && model.last >= 0;
  return same ? { ...model, run, gone: null, curves: 0 } : { ...model, ...NO_RUN, run };
}

function withStatus(model: Model, status: Status): Model {
  const loss = toNumber(status.loss);
  if (loss === null || !Number.isFinite(loss) || status.step <= model.lossStep) return { ...model, status };
  const losses = [...model.losses, loss].slice(-LOSSES_KEPT);
  return { ...model, status, losses, lossStep: status.step };
}

function withMilestone(model: Model, event: RunEvent): Model {
  const seq = event.seq ?? -1;
  if (seq >= 0 && seq <= model.last) return model; // known from the connection before
  const over = Math.max(0, model.milestones.length + 1 - MILESTONES_KEPT);
  return {
    ...model,
    milestones: [...model.milestones.slice(over), event],
    missed: model.missed + over,
    last: Math.max(seq, model.last),
  };
}

function answered(command: Command, ack: Ack, now: number): Command {
  if (command.request.id !== ack.id || !isPending(command)) return command;
  return { ...command, state: ack.state, step: ack.step, why: ack.why, at: now };
}

/** Whether nobody knows yet what has become of it. */
export function isPending(command: Command): boolean {
  return command.state === "sent" || command.state === "accepted";
}

export function pending(model: Model, name: CommandName): Command | undefined {
  return model.commands.find((command) => command.request.name === name && isPending(command));
}

/** Commands that a server which has come back has to be told once more: the ids make that harmless. */
export function unanswered(model: Model): CommandRequest[] {
  return model.commands.filter(isPending).map(({ request }) => request);
}

const ENDED = new Set(["completed", "stopped", "cancelled", "failed", "lost"]);

export function hasEnded(state: string | undefined): boolean {
  return state !== undefined && ENDED.has(state);
}

/** State of the watched run, as far as it is known. */
export function stateOf(model: Model): string | undefined {
  return model.status?.state ?? model.runs.find(({ key }) => key === model.run?.key)?.state;
}

export function role(model: Model): Role {
  return model.hello?.role ?? "read_only";
}

/** The newest run of the server, if it is newer than the one that is watched; none that was over when the page came. */
export function newerRun(model: Model): RunSummary | null {
  const watched = model.runs.find(({ key }) => key === model.run?.key);
  const since = watched?.started ?? model.run?.started ?? -Infinity;
  const newest = newestRun(model.runs);
  if (newest === null || newest.key === model.run?.key || newest.started < since) return null;
  return hasEnded(newest.state) && newest.started < (model.hello?.time ?? 0) ? null : newest;
}

export function newestRun(runs: readonly RunSummary[]): RunSummary | null {
  return runs.reduce<RunSummary | null>(
    (newest, run) => (newest === null || run.started >= newest.started ? run : newest),
    null,
  );
}
