// What the viewer may ask the run for, why not, and what has become of it. No DOM.

import type { Link } from "./connection";
import * as format from "./format";
import { hasEnded, pending, stateOf, type Command, type Model } from "./model";
import type { CommandName } from "./protocol";

export const COMMAND_LABELS: Record<CommandName, string> = {
  pause: "Pause",
  resume: "Resume",
  stop: "Stop",
  set_lr: "Learning rate",
  checkpoint: "Checkpoint",
  validate: "Validate",
};

/** A learning rate further than this from the present one, up or down, is asked about. */
export const LR_ASK_BEYOND = 10;

/** Why a command cannot be given now, as a sentence; null if it can. */
export function refusal(name: CommandName, model: Model, link: Link): string | null {
  const state = stateOf(model);
  if (model.run === null) return "There is no run.";
  if (model.hello?.role === "read_only") return "This viewer may only watch: its access is read-only.";
  if (hasEnded(state)) return "The run has ended.";
  if (link.phase !== "open") return "There is no connection to the server.";
  const refused = model.run.refused[name];
  if (refused) return sentence(refused);
  if (state === "starting") return "The run is still being set up.";
  if (state === "closing") return "Training is over; last checkpoints are being written.";
  if (state === "stopping") return "The run is stopping already.";
  if (name === "pause" && state === "paused") return "The run is paused already.";
  if (name === "resume" && state !== "paused") return "The run is not paused.";
  if (name === "validate" && (state === "validating" || model.status?.validating)) return "It is validating already.";
  const given = pending(model, name);
  if (given) return `${COMMAND_LABELS[name]} is on its way.`;
  return null;
}

/** Why a learning rate cannot be set, whether it has to be asked about, or that it is fine. */
export function judgeLr(
  text: string,
  present: number | null,
): { lr: number; question: string | null } | { lr: null; problem: string } {
  const lr = Number(text.trim().replace("−", "-"));
  if (text.trim() === "" || !Number.isFinite(lr) || lr <= 0) {
    return { lr: null, problem: "A learning rate is a number above 0, like 0.001 or 3e-4." };
  }
  if (present === null || present <= 0) return { lr, question: null };
  const ratio = lr / present;
  // A hair's breadth of room: 0.003 / 0.0003 is a little more than 10.
  const far = Math.max(ratio, 1 / ratio) > LR_ASK_BEYOND * (1 + 1e-9);
  const times = ratio >= 1 ? `${format.number(ratio, 3)} times` : `1/${format.number(1 / ratio, 3)} of`;
  return { lr, question: far ? `That is ${times} the present ${format.compact(present)}.` : null };
}

/** A command in a line: what was asked for and what has become of it. */
export function tellCommand(command: Command): { text: string; tone: "busy" | "good" | "bad" } {
  const { request, state, step, why } = command;
  const name =
    request.name === "set_lr"
      ? `Learning rate ${format.compact(request.lr)}${request.optimizer ? ` for ${request.optimizer}` : ""}`
      : request.name === "stop" && request.checkpoint === false
        ? "Stop without a checkpoint"
        : COMMAND_LABELS[request.name];
  const at = step === null ? "" : ` at step ${format.count(step)}`;
  const because = why === "" ? "" : `: ${why}`;
  switch (state) {
    case "sent":
      return { text: `${name}: sent`, tone: "busy" };
    case "accepted":
      return { text: `${name}: accepted, waiting for the run`, tone: "busy" };
    case "applied": // what has come of it stands in the log
      return { text: `${name}: applied${at}`, tone: "good" };
    case "rejected":
      return { text: `${name}: rejected${because}`, tone: "bad" };
    case "expired":
      return { text: `${name}: expired${because || ", it could not be applied in time"}`, tone: "bad" };
    case "lost":
      return { text: `${name}: lost${because}`, tone: "bad" };
  }
}

function sentence(text: string): string {
  return format.capital(text) + (/[.!?]$/.test(text) ? "" : ".");
}
