// What is typed to filter the list of runs: words, /patterns/, and conditions such as `val_loss<0.3` or `state=failed`.

import type { RunRow } from "../protocol";
import { ageOf, BEST, isLive, LAST, settingOf, valueOf, type Value } from "./fields";

export interface Filter {
  test(row: RunRow): boolean;
  /** Why a part of it was left out; empty if none was. */
  problem: string;
}

const TOKEN = /\/((?:[^/\\]|\\.)+)\/(?=\s|$)|("[^"]+"|[^\s<>=!"]+)\s*(<=|>=|!=|=|<|>)\s*("[^"]*"|[^\s"]+)|"([^"]+)"|(\S+)/g;
const UNITS: Record<string, number> = { s: 1, m: 60, h: 3_600, d: 86_400 };

/** Read a filter. `now` is the server's Unix time in seconds, for ages. */
export function readFilter(text: string, now: number): Filter {
  const tests: ((row: RunRow) => boolean)[] = [];
  let problem = "";
  for (const [, pattern, name, operator, value, quoted, word] of text.matchAll(TOKEN)) {
    if (pattern !== undefined) {
      try {
        const expression = new RegExp(pattern, "i");
        tests.push((row) => expression.test(row.name) || expression.test(row.key));
      } catch {
        problem = `/${pattern}/ is no pattern.`;
      }
    } else if (name !== undefined) {
      tests.push(condition(unquoted(name), operator as string, unquoted(value as string), now));
    } else {
      const part = (quoted ?? word ?? "").toLowerCase();
      tests.push((row) => `${row.name} ${row.key} ${row.tags.join(" ")}`.toLowerCase().includes(part));
    }
  }
  return { test: (row) => tests.every((test) => test(row)), problem };
}

function unquoted(text: string): string {
  return text.replace(/^"|"$/g, "");
}

/** Write a condition as it is typed. */
export function writeCondition(name: string, operator: string, value: string): string {
  const quoted = (text: string): string => (/[\s<>=!]/.test(text) || text === "" ? `"${text}"` : text);
  return `${quoted(name)}${operator}${quoted(value)}`;
}

function condition(name: string, operator: string, wanted: string, now: number): (row: RunRow) => boolean {
  const holds = comparison(operator, wanted);
  return (row) => {
    switch (name) {
      case "state":
        return wanted === "live" ? isLive(row) === (operator !== "!=") : holds(row.state);
      case "tag":
        return operator === "!=" ? row.tags.every(holds) : row.tags.some(holds);
      case "age":
        return holds(row.started > 0 ? ageOf(row.started, now) : null);
      case "duration":
        return holds(row.seconds || null);
      case "archived":
        return holds(row.archived ? "yes" : "no");
      default:
        return holds(named(row, name));
    }
  };
}

/** A field by its id, a metric or a setting by its name. */
function named(row: RunRow, name: string): Value {
  if (name.startsWith(BEST) || name.startsWith(LAST)) return valueOf(row, name);
  if (Object.hasOwn(row.figures, name)) return valueOf(row, LAST + name);
  if (Object.hasOwn(row.hyperparameters, name)) return settingOf(row, name);
  return valueOf(row, name === "date" ? "started" : name);
}

function comparison(operator: string, wanted: string): (value: Value) => boolean {
  const number = numberOf(wanted);
  const text = wanted.toLowerCase();
  return (value) => {
    if (value === null) return operator === "!=" ? text !== "" : operator === "=" && text === "";
    const order =
      typeof value === "number" && number !== null
        ? value - number
        : String(value).toLowerCase() === text ? 0 : String(value).toLowerCase() < text ? -1 : 1;
    switch (operator) {
      case "<":
        return order < 0;
      case ">":
        return order > 0;
      case "<=":
        return order <= 0;
      case ">=":
        return order >= 0;
      case "=":
        return order === 0;
      default:
        return order !== 0;
    }
  };
}

/** A number, a duration with its unit, or a date; null if a text is none of them. */
function numberOf(text: string): number | null {
  const number = Number(text);
  if (text !== "" && !Number.isNaN(number)) return number;
  const [, count, unit] = /^([\d.]+)([smhd])$/.exec(text) ?? [];
  if (count !== undefined && unit !== undefined) return Number(count) * (UNITS[unit] as number);
  const time = /^\d{4}-\d\d/.test(text) ? new Date(text.length <= 10 ? `${text}T00:00` : text).getTime() / 1000 : NaN;
  return Number.isNaN(time) ? null : time;
}
