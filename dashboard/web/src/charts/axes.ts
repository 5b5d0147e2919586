// The numbers along the axes: where a value lies, where the ticks are, how a value is written. Nothing here
// knows a browser.
//
// Plots are drawn from 0 to 1, and a `Scale` maps values to that: so linear and logarithmic axes and values from
// 1e-300 to 1e300 are one case.

import { clock, count } from "../format";
import type { Axis } from "../view";

/** Maps values to 0..1 between `min` and `max`, on a linear or logarithmic axis. */
export class Scale {
  readonly #from: number;
  readonly #span: number;

  /** `min < max`, both finite; both above 0 if `log`. */
  constructor(
    readonly min: number,
    readonly max: number,
    readonly log = false,
  ) {
    this.#from = log ? Math.log10(min) : min;
    this.#span = (log ? Math.log10(max) : max) - this.#from;
  }

  /** 0 at `min`, 1 at `max`; NaN where a logarithmic axis has no place for it. */
  toUnit(value: number): number {
    if (!this.log) return (value - this.#from) / this.#span;
    return value > 0 ? (Math.log10(value) - this.#from) / this.#span : NaN;
  }

  fromUnit(unit: number): number {
    const value = this.#from + unit * this.#span;
    return this.log ? 10 ** value : value;
  }
}

/** A scale that shows all values from `low` to `high` with some air; also for one value, or none (infinite). */
export function fitScale(low: number, high: number, log: boolean): Scale {
  if (log) {
    if (!(low > 0) || !(high >= low)) return new Scale(0.1, 10, true);
    const [from, to] = [Math.log10(low), Math.log10(high)];
    const air = to - from < 1e-9 ? 0.5 : 0.05 * (to - from);
    return new Scale(
      Math.max(10 ** (from - air), Number.MIN_VALUE),
      Math.min(10 ** (to + air), Number.MAX_VALUE),
      true,
    );
  }
  if (!(high >= low)) return new Scale(0, 1);
  // Equal, or so close that a double has no ticks between them
  if (high - low <= 1e-12 * Math.max(Math.abs(low), Math.abs(high))) {
    const air = low === 0 ? 1 : Math.abs(low) * 0.1;
    return new Scale(low - air, high + air);
  }
  const limit = Number.MAX_VALUE / 4; // else the difference of two of them would be infinite
  const step = niceStep(high / 8 - low / 8);
  // To whole ticks, so that the axis rests while values move a little; with air where a value is at the edge.
  let min = Math.floor(low / step) * step;
  let max = Math.ceil(high / step) * step;
  if (low - min < 0.02 * (max - min) && low !== 0) min -= step / 2;
  if (max - high < 0.02 * (max - min) && high !== 0) max += step / 2;
  // An axis of values that cannot be negative does not look as if they could.
  if (low >= 0) min = Math.max(min, 0);
  return new Scale(Math.max(min, -limit), Math.min(max, limit));
}

/** The smallest of 1, 2 and 5 times a power of ten that is at least `least`. */
export function niceStep(least: number): number {
  if (!(least > 0)) return 1;
  const exponent = Math.floor(Math.log10(least));
  for (const digit of [1, 2, 5]) {
    const step = times10(digit, exponent);
    if (step >= least * (1 - 1e-9)) return step;
  }
  return times10(1, exponent + 1);
}

/** `number * 10**exponent`, the double nearest to the decimal where the two-step product would miss it. */
function times10(number: number, exponent: number): number {
  if (exponent < -300) return number * 10 ** exponent;
  return exponent < 0 ? number / 10 ** -exponent : number * 10 ** exponent;
}

export interface Ticks {
  values: number[];
  labels: string[];
}

const SECONDS = [
  ...[1, 2, 5, 10, 15, 30],
  ...[1, 2, 5, 10, 15, 30].map((minutes) => 60 * minutes),
  ...[1, 2, 3, 6, 12].map((hours) => 3_600 * hours),
  ...[1, 2, 7, 14, 28].map((days) => 86_400 * days),
];

/** Ticks of the x axis, at most about `count` of them. */
export function xTicks(axis: Axis, scale: Scale, count: number): Ticks {
  if (scale.log) return yTicks(scale, count);
  if (axis === "wall") return wallTicks(scale, count);
  if (axis === "time") return durationTicks(scale, count);
  const step = niceStep((scale.max - scale.min) / Math.max(count, 1));
  // There is no half optimizer step
  const values = multiples(scale, axis === "step" || axis === "samples" ? Math.max(step, 1) : step);
  return { values, labels: formatTicks(values) };
}

/** What an x axis shows. */
export function xTitle(axis: Axis): string {
  return { step: "Step", epoch: "Epoch", samples: "Samples seen", time: "Time since the start", wall: "Time of day" }[axis];
}

/** Ticks of an axis of numbers with a unit, if any. */
export function yTicks(scale: Scale, count: number, unit = ""): Ticks {
  const values = scale.log ? logTicks(scale, count) : multiples(scale, niceStep(scale.max / count - scale.min / count));
  const written = unit === "share" ? values.map((value) => 100 * value) : values;
  return { values, labels: formatTicks(written, scale.log).map((label) => withUnit(label, unit)) };
}

/** How units are written behind a number; others are written as they are. */
const UNITS: Readonly<Record<string, string>> = {
  bytes: "B",
  "bytes/s": "B/s",
  "1/s": "/s",
  percent: "%",
  share: "%",
  seconds: "s",
  celsius: "°C",
  watts: "W",
};

/** A number with its unit: `340M` of bytes is `340 MB`. */
function withUnit(label: string, unit: string): string {
  if (unit === "" || label === "") return label;
  const sign = Object.hasOwn(UNITS, unit) ? (UNITS[unit] as string) : unit;
  if (unit === "1/s") return label + sign;
  const [, number, prefix] = /^(.*?)([kMGT]?)$/.exec(label) as unknown as [string, string, string];
  return `${number}\u202f${prefix}${sign}`;
}

/** All multiples of `step` on a scale. */
function multiples(scale: Scale, step: number): number[] {
  const first = Math.ceil(scale.min / step - 1e-9);
  const last = Math.floor(scale.max / step + 1e-9);
  const exponent = Math.floor(Math.log10(step) + 1e-9);
  const digit = Math.round(step / 10 ** exponent);
  const whole = Math.abs(step / 10 ** exponent - digit) < 1e-9;
  const values: number[] = [];
  for (let index = first; index <= last && values.length < 100; index++) {
    values.push(whole ? times10(index * digit, exponent) : index * step);
  }
  return values.map((value) => value + 0); // -0 reads as 0
}

function logTicks(scale: Scale, count: number): number[] {
  const [from, to] = [Math.log10(scale.min), Math.log10(scale.max)];
  if (to - from < 0.8) {
    // Less than a decade: its powers of ten would leave the axis empty.
    return multiples(scale, niceStep((scale.max - scale.min) / count)).filter((value) => value > 0);
  }
  const decades = Math.ceil((to - from) / count);
  const digits = decades > 1 || to - from > count / 2 ? [1] : to - from > count / 3 ? [1, 3] : [1, 2, 5];
  const values: number[] = [];
  for (let exponent = Math.floor(from); exponent <= to + 1e-9; exponent++) {
    if (exponent % decades !== 0) continue;
    for (const digit of digits) {
      const value = times10(digit, exponent);
      if (value >= scale.min * (1 - 1e-9) && value <= scale.max * (1 + 1e-9)) values.push(value);
    }
  }
  return values;
}

function secondStep(span: number, count: number): number {
  const least = span / Math.max(count, 1);
  if (least < 1) return niceStep(least);
  return SECONDS.find((step) => step >= least) ?? niceStep(least / 86_400) * 86_400;
}

function durationTicks(scale: Scale, count: number): Ticks {
  const step = secondStep(scale.max - scale.min, count);
  const values = multiples(scale, step);
  return { values, labels: values.map((value) => (step < 1 ? `${formatTick(value, step)}s` : formatDuration(value))) };
}

function wallTicks(scale: Scale, count: number): Ticks {
  const step = secondStep(scale.max - scale.min, count);
  // Whole hours and days are those of the viewer's clock.
  const offset = -60 * new Date(1_000 * scale.min).getTimezoneOffset();
  const local = multiples(new Scale(scale.min + offset, scale.max + offset), step);
  const values = local.map((value) => value - offset);
  return { values, labels: values.map((value) => formatWallTick(value, step)) };
}

function formatWallTick(value: number, step: number): string {
  const date = new Date(1_000 * value);
  const midnight = date.getHours() === 0 && date.getMinutes() === 0 && date.getSeconds() === 0;
  if (step >= 86_400 || (midnight && step >= 60)) return formatDay(date);
  const clock = `${two(date.getHours())}:${two(date.getMinutes())}`;
  if (step >= 60) return clock;
  const seconds = step >= 1 ? two(date.getSeconds()) : (date.getSeconds() + (value % 1)).toFixed(decimals(step));
  return `${clock}:${seconds}`;
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

function formatDay(date: Date): string {
  return `${date.getDate()} ${MONTHS[date.getMonth()] ?? ""}`;
}

function two(number: number): string {
  return String(number).padStart(2, "0");
}

/** Seconds as one reads them: `45s`, `1m 30s`, `2h`, `3d 4h`. */
export function formatDuration(seconds: number): string {
  const sign = seconds < 0 ? "−" : "";
  let rest = Math.round(Math.abs(seconds));
  const parts: string[] = [];
  for (const [unit, length] of [
    ["d", 86_400],
    ["h", 3_600],
    ["m", 60],
    ["s", 1],
  ] as const) {
    const number = Math.floor(rest / length);
    rest -= number * length;
    if (number > 0 && parts.length < 2) parts.push(`${number}${unit}`);
  }
  return parts.length === 0 ? "0s" : sign + parts.join(" ");
}

/** Labels for neighbouring ticks: as few digits as tell them apart, all written alike. */
export function formatTicks(values: number[], log = false): string[] {
  if (values.length < 2) {
    return values.map((value) => formatTick(value, 10 ** (Math.floor(Math.log10(Math.abs(value) || 1)) - 1)));
  }
  let [step, size] = [Infinity, 0];
  for (let index = 0; index < values.length; index++) {
    const value = values[index] as number;
    size = Math.max(size, Math.abs(value));
    if (index > 0) step = Math.min(step, Math.abs(value - (values[index - 1] as number)));
  }
  // Ticks of a logarithmic axis have a step each, unless it shows less than a decade.
  const even = !log || size < 10 * (values[0] as number);
  const small = even ? size < 1e-3 : values.some((value) => Math.abs(value) < 1e-3);
  return values.map((value) => {
    const own = even ? step : 10 ** Math.floor(Math.log10(Math.abs(value)) + 1e-9);
    return small && Math.abs(value) < 0.1 && value !== 0
      ? exponential(value, digitsOf(value, own))
      : formatTick(value, own);
  });
}

/** Digits behind the first one that a value needs to show steps of this size. */
function digitsOf(value: number, step: number): number {
  const digits = Math.floor(Math.log10(Math.abs(value)) + 1e-9) - Math.floor(Math.log10(step) + 1e-9);
  return Math.max(0, Math.min(digits, 6));
}

/** Digits after the point that show a step of this size. */
function decimals(step: number): number {
  const exponent = Math.floor(Math.log10(step) + 1e-9);
  const second = Math.abs(step / 10 ** exponent - Math.round(step / 10 ** exponent)) > 1e-6 ? 1 : 0;
  return Math.max(0, Math.min(20, second - exponent));
}

function formatTick(value: number, step: number): string {
  if (value === 0 || Math.abs(value) < step / 1e6) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) return exponential(value, digitsOf(value, step));
  for (const [suffix, unit] of [
    ["T", 1e12],
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e3],
  ] as const) {
    if (size >= (unit === 1e3 ? 1e4 : unit)) {
      return minus((value / unit).toFixed(decimals(step / unit))) + suffix;
    }
  }
  return minus(value.toFixed(decimals(step)));
}

function exponential(value: number, digits: number): string {
  return minus(value.toExponential(digits).replace("e+", "e"));
}

/** A minus sign as wide as a digit, where people read; never in files. */
function minus(text: string): string {
  return text.replaceAll("-", "−");
}

/** A value to read, with its unit: four significant digits, for bytes in the prefix that suits them. */
export function formatWithUnit(value: number, unit = ""): string {
  if (!Number.isFinite(value)) return formatValue(value);
  const size = Math.abs(value);
  if (unit === "share") return withUnit(formatValue(Number((100 * value).toPrecision(4))), unit);
  if (unit === "seconds" && size >= 60) return formatDuration(value);
  if (unit === "seconds" && size > 0 && size < 0.1) return `${minus((1_000 * value).toPrecision(3))}\u202fms`;
  if (unit.startsWith("bytes") && size >= 1_000) {
    const power = Math.min(4, Math.floor(Math.log10(size) / 3 + 1e-9));
    return withUnit(minus((value / 1_000 ** power).toPrecision(4)) + ["", "k", "M", "G", "T"][power], unit);
  }
  return withUnit(formatValue(value), unit);
}

/** A value to read: four significant digits, all of them in a whole number. */
export function formatValue(value: number): string {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (Number.isInteger(value) && size < 1e7) return minus(count(value));
  if (size >= 1e7 || size < 1e-3) return exponential(value, 3);
  if (size >= 1e4) return minus(count(value));
  return minus(value.toPrecision(4));
}

/** A place on the x axis, to read. */
export function formatX(axis: Axis, value: number): string {
  if (axis === "step") return `step ${count(value)}`;
  if (axis === "samples") return `${count(value)} samples`;
  if (axis === "epoch") return `epoch ${minus(value.toFixed(2))}`;
  if (axis === "time") return Math.abs(value) < 60 ? `${minus(value.toFixed(1))}s` : formatDuration(value);
  return `${formatDay(new Date(1_000 * value))} ${clock(value)}`;
}
