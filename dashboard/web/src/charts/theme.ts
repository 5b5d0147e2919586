// Colours and dashes of the charts. Colours are CSS custom properties of the charts' root (charts.css), so that
// dark, light and forced colours are the style sheet's business; a canvas has to be told.

import { h } from "../dom";

/** Hues after which they repeat, with another dash: the palette of Okabe and Ito without its yellow. */
export const HUES = 7;
/** Colours of runs: those of curves without grey, which is the baseline's, and further ones. */
const RUN_HUES: readonly number[] = [0, 1, 2, 3, 7, 5, 8, 4, 9, 10];
const DASHES: readonly (readonly number[])[] = [[], [7, 3], [2, 2.5], [9, 3, 2, 3], [14, 4]];

export interface Theme {
  hues: string[];
  background: string;
  text: string;
  faint: string;
  grid: string;
  alert: string;
  event: string;
  shade: string;
  font: string;
}

export function readTheme(root: HTMLElement): Theme {
  // What a property would be, light-dark() and system colours resolved, only an element says that has it.
  const probe = root.appendChild(h("i"));
  probe.style.setProperty("forced-color-adjust", "none");
  const style = getComputedStyle(probe);
  const colour = (name: string): string => {
    probe.style.color = `var(--chart-${name})`;
    return style.color;
  };
  const theme = {
    hues: Array.from({ length: Math.max(...RUN_HUES) + 1 }, (_, index) => colour(String(index + 1))),
    background: colour("background"),
    text: colour("text"),
    faint: colour("faint"),
    grid: colour("grid"),
    alert: colour("alert"),
    event: colour("event"),
    shade: colour("shade"),
    font: style.fontFamily,
  };
  probe.remove();
  return theme;
}

/** How the n-th curve of a panel is dashed: each has a dash of its own among those of the first colours. */
export function dash(slot: number): readonly number[] {
  return DASHES[(slot + Math.floor(slot / HUES)) % DASHES.length] as readonly number[];
}

export function hue(slot: number): number {
  return slot % HUES;
}

/** How a line looks. */
export interface Look {
  /** Which of the hues; null for what stands behind the others, in grey. */
  hue: number | null;
  dash: readonly number[];
}

/** The look of the n-th curve of a panel, where there is one run. */
export function lookOfCurve(slot: number): Look {
  return { hue: hue(slot), dash: dash(slot) };
}

/** The look of a run's n-th curve of a panel, where there are several. */
export function lookOfRun(run: number, slot: number): Look {
  return { hue: RUN_HUES[run % RUN_HUES.length] as number, dash: DASHES[slot % DASHES.length] as readonly number[] };
}

export function colourOf({ hue }: Look, theme: Theme): string {
  return hue === null ? theme.faint : (theme.hues[hue] as string);
}

/** The same for the style sheet. */
export function cssColour({ hue }: Pick<Look, "hue">): string {
  return hue === null ? "var(--chart-faint)" : `var(--chart-${hue + 1})`;
}

/** Call `changed` when colours may be others: the system's scheme or contrast, or the page's own switch. */
export function watchTheme(changed: () => void): void {
  for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)", "(prefers-contrast: more)"]) {
    matchMedia(query).addEventListener("change", changed);
  }
  const observer = new MutationObserver(changed);
  for (const element of [document.documentElement, document.body]) {
    observer.observe(element, { attributes: true, attributeFilter: ["class", "data-theme", "style"] });
  }
}
