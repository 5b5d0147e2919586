// Numbers and times as people read them. The same words everywhere on the page.

const THIN = "\u202f"; // narrow no-break space: groups digits without being read as a comma or a point
export const NONE = "–";

export function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** A count: `12 345`. */
export function count(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  return Math.round(value)
    .toString()
    .replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
}

/** A large count in few characters: `1.2 M`. */
export function shortCount(value: number): string {
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ] as const) {
    if (Math.abs(value) >= size) {
      const scaled = value / (unit === "k" ? 1e3 : size);
      return `${scaled >= 100 ? scaled.toFixed(0) : scaled.toPrecision(3)}${THIN}${unit}`;
    }
  }
  return count(value);
}

/** A measured value with `digits` significant ones, always as wide for values as large: `0.1230`, `1.20e-5`. */
export function number(value: number | null | undefined, digits = 4): string {
  if (value === null || value === undefined) return NONE;
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text =
    size >= 1e6 || size < 1e-3
      ? value.toExponential(digits - 2).replace("e+", "e")
      : size >= 10 ** (digits - 1)
        ? value.toFixed(0)
        : value.toPrecision(digits);
  return text.replace(/^-/, "−").replace("e-", "e−");
}

/** A value as people write it, in running text: `0.001`, `3e−5`, `2.71`. */
export function compact(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  if (!Number.isFinite(value)) return number(value);
  const rounded = Number(value.toPrecision(4));
  const text = rounded !== 0 && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);
  return text.replace(/^-/, "−").replace("e-", "e−").replace("e+", "e");
}

/** Something per second: three digits, more where it is large. */
export function perSecond(value: number): string {
  if (!Number.isFinite(value) || value <= 0) return NONE;
  return value >= 1000 ? shortCount(value) : value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

/** A duration: `8.2 s`, `4 m 12 s`, `3 h 05 m`, `2 d 4 h`, `1 066 d`. */
export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  const whole = Math.round(seconds);
  const pad = (value: number): string => String(Math.floor(value)).padStart(2, "0");
  if (seconds > 0 && seconds < 0.05) return "<0.1 s";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3_600) return `${Math.floor(whole / 60)} m ${pad(whole % 60)} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3_600)} h ${pad((whole % 3_600) / 60)} m`;
  if (whole >= 100 * 86_400) return `${count(Math.floor(whole / 86_400))} d`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3_600)} h`;
}

/** A duration in one unit: `5 m`, `3 d`. */
export function shortDuration(seconds: number): string {
  for (const [size, unit] of [[86_400, "d"], [3_600, "h"], [60, "m"]] as const) {
    if (seconds >= size) return `${count(Math.floor(seconds / size))} ${unit}`;
  }
  return `${Math.floor(seconds)} s`;
}

/** Whole seconds for something that is counted up on the screen. */
export function seconds(value: number): string {
  return value < 60 ? `${Math.max(0, Math.round(value))} s` : duration(value);
}

/** A time of day of a Unix time, in the viewer's zone: `14:32:05`. */
export function clock(time: number): string {
  return new Date(time * 1000).toLocaleTimeString([], { hour12: false });
}

/** A date and a time of day. */
export function dateTime(time: number): string {
  const date = new Date(time * 1000);
  const day = [date.getFullYear(), date.getMonth() + 1, date.getDate()];
  return `${day.map((part) => String(part).padStart(2, "0")).join("-")} ${clock(time)}`;
}

export function bytes(value: number): string {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let index = 0;
  let scaled = value;
  while (scaled >= 1000 && index < units.length - 1) {
    scaled /= 1000;
    index += 1;
  }
  return `${index === 0 || scaled >= 100 ? scaled.toFixed(0) : scaled.toPrecision(2)} ${units[index]}`;
}

export function percent(share: number): string {
  const value = Math.min(Math.max(share, 0), 1) * 100;
  return `${value > 0 && value < 1 ? "<1" : value.toFixed(0)} %`;
}
