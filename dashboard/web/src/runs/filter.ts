// What is typed to filter the list of runs: words, /patterns/, and conditions such as `val_loss<0.3` or `state:failed`.
//
// The language is that of `engine/catalog/run_filter.py`, which explains it; `tests/support/run_filters.json` is tried
// with both, errors included.

import { Pattern } from "../pattern";
import type { RunRow } from "../protocol";
import { FIELDS, nearest, RunNames, STATES, valuesOf, type Kind } from "./fields";
import { hasEnded } from "../model";

/** Most characters of a filter. */
const MAX_FILTER = 1_000;
/** Characters of a term in an error. */
const SHOWN = 60;

// Sticky, to read on from a place
const SPACES = /[ \t-\r]*/y;
const WORD = /(?:[^ \t-\r<>=:!]|!(?!=))+/y;
const OPERATOR = /[ \t-\r]*:?(<=|>=|!=|==?|<|>)[ \t-\r]*|[ \t-\r]*(:)[ \t-\r]*/y;
const VALUE = /[^ \t-\r,]+/y;
const AFTER_REGEX = /i?(?=[ \t-\r,]|$)/y;
const NUMBER = /^(?:([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)(%?)|([+-]?)inf(?:inity)?|nan)$/i;
const DURATION = /^(?:[0-9]+(?:\.[0-9]+)?|(?:[0-9]+(?:\.[0-9]+)?(?:s|min|m|h|d|w))+)$/;
const PART = /([0-9.]+)([a-z]*)/g;
const SECONDS: Record<string, number> = { "": 1, s: 1, m: 60, min: 60, h: 3_600, d: 86_400, w: 604_800 };
const DATE = /^((?:19[7-9]|2[01][0-9])[0-9])(?:-([0-9]{2})(?:-([0-9]{2})(?:[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2}))?)?)?)?$/;
const ORDERS: Record<string, (one: number, other: number) => boolean> = {
  "<": (one, other) => one < other,
  "<=": (one, other) => one <= other,
  ">": (one, other) => one > other,
  ">=": (one, other) => one >= other,
};
const ALL_HOLD = "all terms must hold anyway";
const ALTERNATIVES = "alternatives are separated by commas, as in state:failed,lost";
const LOGIC: Record<string, string> = {
  and: ALL_HOLD,
  "&&": ALL_HOLD,
  or: ALTERNATIVES,
  "||": ALTERNATIVES,
  not: "a - in front turns a term round, as in -state:failed",
};
const FLAGS: Record<string, string> = { yes: "yes", true: "yes", no: "no", false: "no" };

interface Value {
  text: string;
  pattern: Pattern | null;
}

interface Condition {
  field: string;
  sign: string;
  values: Value[];
  /** The term as errors show it. */
  shown: string;
}

interface Term {
  negated: boolean;
  content: string | Pattern | Condition;
}

type Values = (number | string)[];
type Holds = (values: Values) => boolean;

export class Filter {
  /** Why it means nothing; empty if it does. */
  readonly problem: string = "";
  /** Names of the fields that it compares. */
  readonly fields: ReadonlySet<string> = new Set();
  readonly #tests: ((row: RunRow) => boolean)[] = [];
  readonly #conditions: Condition[] = [];

  /** `now` is the server's Unix time in seconds, for ages. */
  constructor(text: string, now: number) {
    try {
      if ([...text].length > MAX_FILTER) throw new Error("a filter has at most 1,000 characters");
      const reader = new Reader(text);
      for (let term = reader.term(); term !== null; term = reader.term()) this.#tests.push(this.#test(term, now));
      this.fields = new Set(this.#conditions.map(({ field }) => field));
    } catch (error) {
      this.problem = (error as Error).message;
    }
  }

  /** Whether all terms hold for a run; none does if the filter means nothing. */
  test(row: RunRow): boolean {
    return this.problem === "" && this.#tests.every((test) => test(row));
  }

  /** Why it means nothing for these runs: none of them has a field of it. Empty if it does. */
  problemWith(rows: Iterable<RunRow>): string {
    if (this.problem !== "" || this.#conditions.length === 0) return this.problem;
    const names = new RunNames(rows);
    for (const { field, values, shown } of this.#conditions) {
      const problem = names.problem(field);
      if (problem !== "") return `${shown}: ${problem}${problem.endsWith("?") ? "" : "; quote it to look for this text"}`;
      const odd = values.find((value) => value.text !== "" && numberOf(value) === null);
      if (odd && kindOf(field) === null && !names.isEmpty && !names.isHyperparameter(field)) return noNumber(shown, odd);
    }
    return "";
  }

  #test({ negated, content }: Term, now: number): (row: RunRow) => boolean {
    let test: (row: RunRow) => boolean;
    if (typeof content === "string") {
      const word = content.toLowerCase();
      test = (row) => textsOf(row).some((text) => text.toLowerCase().includes(word));
    } else if (content instanceof Pattern) {
      test = (row) => textsOf(row).some((text) => content.isIn(text));
    } else {
      this.#conditions.push(content);
      test = condition(content, now);
    }
    return negated ? (row) => !test(row) : test;
  }
}

function textsOf(row: RunRow): string[] {
  return [row.name, row.id, row.key, ...row.tags];
}

/** Write a condition as it is typed. */
export function writeCondition(name: string, operator: string, value: string): string {
  const quoted = (text: string): string => `"${text.replace(/["\\]/g, "\\$&")}"`;
  const field = /^[^ \t-\r<>=:!"'/-][^ \t-\r<>=:!]*$/.test(name) ? name : quoted(name);
  return `${field}${operator}${/^[^ \t-\r,"'/][^ \t-\r,]*$/.test(value) ? value : quoted(value)}`;
}

// Reading

/** The text of a filter, and how far it is read. */
class Reader {
  readonly #text: string;
  #at = 0;
  #start = 0;

  constructor(text: string) {
    this.#text = text;
  }

  #wrong(reason: string): Error {
    return new Error(`${shownOf(this.#text.slice(this.#start, this.#at))}: ${reason}`);
  }

  #match(pattern: RegExp, at = this.#at): RegExpExecArray | null {
    pattern.lastIndex = at;
    return pattern.exec(this.#text);
  }

  #take(pattern: RegExp): string {
    const taken = this.#match(pattern)?.[0] ?? "";
    this.#at += taken.length;
    return taken;
  }

  /** Read the next term; null at the end. */
  term(): Term | null {
    const text = this.#text;
    this.#take(SPACES);
    this.#start = this.#at;
    if (this.#at >= text.length) return null;
    const negated = /^-[^ \t-\r]/.test(text.slice(this.#at, this.#at + 2));
    if (negated) this.#at += 1;
    const first = text[this.#at] as string;
    if (first === "/") {
      const content = this.#regex();
      if (content !== null) return { negated, content };
      this.#at = text.length;
      throw this.#wrong("the / at its end is missing; quote a text that begins with /");
    }
    const isQuoted = first === '"' || first === "'";
    const word = isQuoted ? this.#quoted() : this.#take(WORD);
    const operator = this.#match(OPERATOR);
    if (operator === null) {
      const logic = word.toLowerCase();
      if (!isQuoted && Object.hasOwn(LOGIC, logic)) throw this.#wrong(`${LOGIC[logic]}; quote it to look for the word`);
      return { negated, content: word };
    }
    const sign = (operator[1] ?? operator[2]) as string;
    this.#at += operator[0].length;
    if (word === "") throw this.#wrong(`a field is missing before ${sign}`);
    const values = [this.#value(sign)];
    while (text[this.#at] === ",") {
      this.#at += 1;
      this.#take(SPACES);
      values.push(this.#value(","));
    }
    const field = Object.hasOwn(FIELDS, word.toLowerCase()) ? word.toLowerCase() : word;
    const shown = shownOf(text.slice(this.#start, this.#at));
    return { negated, content: { field, sign: sign === "==" ? "=" : sign, values, shown } };
  }

  #value(after: string): Value {
    const first = this.#text[this.#at];
    if (first === '"' || first === "'") return { text: this.#quoted(), pattern: null };
    const begin = this.#at;
    if (first === "/") {
      const pattern = this.#regex();
      if (pattern !== null) return { text: this.#text.slice(begin, this.#at), pattern };
    }
    const text = this.#take(VALUE);
    if (text === "") throw this.#wrong(`a value is missing after ${after}`);
    return { text, pattern: null };
  }

  #quoted(): string {
    const text = this.#text;
    const quote = text[this.#at] as string;
    let letters = "";
    for (let place = this.#at + 1; place < text.length; place++) {
      if (text[place] === quote) {
        this.#at = place + 1;
        return letters;
      }
      const next = text[place + 1];
      if (text[place] === "\\" && (next === quote || next === "\\")) place += 1;
      letters += text[place];
    }
    this.#at = text.length;
    throw this.#wrong(`its second ${quote} is missing`);
  }

  /** Read an expression; null if it does not end. */
  #regex(): Pattern | null {
    const text = this.#text;
    for (let place = this.#at + 1; place < text.length; place++) {
      if (text[place] === "\\") {
        place += 1;
      } else if (text[place] === "/" && place > this.#at + 1) {
        const after = this.#match(AFTER_REGEX, place + 1);
        if (after === null) continue;
        const source = text.slice(this.#at + 1, place);
        this.#at = place + 1 + after[0].length;
        try {
          return new Pattern(source);
        } catch (error) {
          throw this.#wrong((error as Error).message);
        }
      }
    }
    return null;
  }
}

/** A part of a filter as errors show it: in one line. */
function shownOf(text: string): string {
  const line = [...text.replace(/^[ \t-\r]+|[ \t-\r]+$/g, "").replace(/[\x00- \x7f-\x9f\u2028\u2029]+/g, " ")];
  return line.length <= SHOWN ? line.join("") : `${line.slice(0, SHOWN - 1).join("")}…`;
}

// Conditions

/** The kind of a field; null for a metric or a hyperparameter. */
function kindOf(field: string): Kind | null {
  return Object.hasOwn(FIELDS, field) ? (FIELDS[field]?.kind as Kind) : null;
}

function condition({ field, sign, values, shown }: Condition, now: number): (row: RunRow) => boolean {
  const kind = kindOf(field);
  const order = ORDERS[sign];
  if (order && (kind === "text" || kind === "tag" || kind === "state" || kind === "flag")) {
    throw new Error(`${shown}: ${field} has no order; use :, = or !=`);
  }
  if (order && values.length > 1) throw new Error(`${shown}: ${sign} takes one value`);
  const holds = values.map((value): Holds => {
    switch (kind) {
      case "date":
        return dateTest(value, sign, shown, now);
      case "number":
      case "duration":
        return numberTest(value, sign, shown, kind);
      case null:
        return namedTest(value, field, sign, shown);
      default:
        return textTest(value, sign, shown, kind);
    }
  });
  const test = (row: RunRow): boolean => {
    const found = valuesOf(row, field, now);
    return holds.some((each) => each(found));
  };
  return sign === "!=" ? (row) => !test(row) : test;
}

const isMissing: Holds = (values) => values.length === 0;

function dateTest({ text }: Value, sign: string, shown: string, now: number): Holds {
  if (text === "") return isMissing;
  const span = spanOf(text, now);
  if (span === null) throw new Error(`${shown}: '${shownOf(text)}' is no date such as 2026-11-30 or 2026-11-30T14:30`);
  const [start, end] = span;
  const tests: Record<string, (time: number) => boolean> = {
    "<": (time) => time < start,
    "<=": (time) => time < end,
    ">": (time) => time >= end,
    ">=": (time) => time >= start,
  };
  const holds = tests[sign] ?? ((time) => start <= time && time < end);
  return (values) => values.some((value) => holds(value as number));
}

function numberTest(value: Value, sign: string, shown: string, kind: "number" | "duration"): Holds {
  const order = ORDERS[sign];
  if (value.text === "" && !order) return isMissing;
  const wanted = kind === "number" ? numberOf(value) : secondsOf(value);
  if (wanted === null && kind === "number") throw new Error(noNumber(shown, value));
  if (wanted === null) throw new Error(`${shown}: '${shownOf(value.text)}' is no time such as 90s, 5min, 2h or 7d`);
  const compare = order ?? Object.is;
  return (values) => values.some((each) => compare(each as number, wanted) || (!order && each === wanted));
}

/** Test a metric, which is a number, or a hyperparameter, which may be anything. */
function namedTest(value: Value, field: string, sign: string, shown: string): Holds {
  const number = numberOf(value);
  const order = ORDERS[sign];
  if (order) {
    if (number === null) {
      const meant = nearest(field, Object.keys(FIELDS)); // such as created>2026-11-30
      throw new Error(noNumber(shown, value) + (meant === null ? "" : `; did you mean '${meant}'?`));
    }
    return (values) => values.some((each) => typeof each === "number" && order(each, number));
  }
  if (value.text === "") return (values) => values.length === 0 || values.includes("");
  const isText = textIs(value, sign);
  return (values) =>
    values.some((each) => (typeof each === "number" ? each === number || Object.is(each, number) : isText(each)));
}

function textTest(value: Value, sign: string, shown: string, kind: Kind): Holds {
  const text = value.text.toLowerCase();
  if (kind === "state") {
    if (!STATES.includes(text)) {
      const meant = nearest(text, STATES);
      const more = meant === null ? `there are ${STATES.join(", ")}` : `did you mean '${meant}'?`;
      throw new Error(`${shown}: there is no state '${shownOf(value.text)}'; ${more}`);
    }
    return ([state]) => (text === "live" ? !hasEnded(state as RunRow["state"]) : state === text);
  }
  if (kind === "flag") {
    if (!Object.hasOwn(FLAGS, text)) throw new Error(`${shown}: '${shownOf(value.text)}' is neither yes nor no`);
    return ([flag]) => flag === FLAGS[text];
  }
  if (text === "") return isMissing;
  const isText = textIs(value, kind === "text" ? sign : "="); // a tag is a word
  return (values) => values.some((each) => isText(String(each)));
}

/** Whether a text is that of a condition, or with `:`, has it. */
function textIs({ text, pattern }: Value, sign: string): (text: string) => boolean {
  if (pattern !== null) return (each) => pattern.isIn(each);
  const wanted = text.toLowerCase();
  return (each) => (sign === ":" ? each.toLowerCase().includes(wanted) : each.toLowerCase() === wanted);
}

/** A number, which may be in percent; null if it is none. */
function numberOf({ text }: Value): number | null {
  const found = NUMBER.exec(text);
  if (found === null) return null;
  const [, digits, percent, sign] = found;
  if (digits !== undefined) return Number(digits) / (percent ? 100 : 1);
  return sign === undefined ? NaN : sign === "-" ? -Infinity : Infinity;
}

function noNumber(shown: string, { text }: Value): string {
  return `${shown}: '${shownOf(text)}' is no number`;
}

/** Seconds; null if it is no duration. */
function secondsOf({ text }: Value): number | null {
  if (!DURATION.test(text)) return null;
  return [...text.matchAll(PART)].reduce((sum, [, count, unit]) => sum + Number(count) * (SECONDS[unit as string] as number), 0);
}

/** The first and the last moment of a local date; null if it is none. */
function spanOf(text: string, now: number): [number, number] | null {
  const today = new Date(now * 1000);
  const dayFrom = (days: number): number => new Date(today.getFullYear(), today.getMonth(), today.getDate() + days).getTime() / 1000;
  if (text.toLowerCase() === "today") return [dayFrom(0), dayFrom(1)];
  if (text.toLowerCase() === "yesterday") return [dayFrom(-1), dayFrom(0)];
  const found = DATE.exec(text);
  if (found === null) return null;
  const parts = found.slice(1).filter((part) => part !== undefined).map(Number);
  const at = (more: number): number => {
    const [year, month = 1, day = 1, hour = 0, minute = 0, second = 0] = parts.map((part, place) => part + (place === parts.length - 1 ? more : 0));
    return new Date(year as number, month - 1, day, hour, minute, second).getTime() / 1000;
  };
  const [year, month = 1, day = 1, hour = 0, minute = 0, second = 0] = parts as [number, ...number[]];
  const start = new Date(year, month - 1, day);
  const isReal = start.getMonth() === month - 1 && start.getDate() === day && hour < 24 && minute < 60 && second < 60;
  return isReal ? [at(0), at(1)] : null;
}
