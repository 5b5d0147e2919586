// Menus of the charts' bar.

import { h } from "../dom";

/** A button that opens a list of settings; a click beside it or Escape closes it. */
export function menu(button: HTMLElement, label: string, items: HTMLElement[]): HTMLDetailsElement {
  const list = h("div", { class: "menu-items", role: "group", "aria-label": label }, ...items);
  const details = h("details", { class: "menu" }, button, list);
  document.addEventListener("click", (event) => {
    if (!details.contains(event.target as Node)) details.open = false;
  });
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    event.preventDefault(); // it closes the menu and nothing else
    details.open = false;
    button.focus();
  });
  return details;
}

export function select<T extends string | number>(
  options: readonly (readonly [T, string])[],
  chosen: (value: T) => void,
): HTMLSelectElement {
  const onchange = (): void => chosen((options[made.selectedIndex] as readonly [T, string])[0]);
  const made: HTMLSelectElement = h(
    "select",
    { onchange },
    ...options.map(([value, name]) => h("option", { value }, name)),
  );
  return made;
}
