// Building the page from text that nobody has to trust: every string becomes a text node, none becomes HTML.

type Child = Node | string | null | undefined | false;
type Attributes = Record<string, string | number | boolean | null | undefined | ((event: never) => void)>;

/**
 * Make an element. `class` and other attributes go by their HTML names; null and false leave one out, true
 * writes it empty; a function is a listener: `{ onclick: () => ... }`.
 */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value as EventListener);
    else setAttribute(element, name, value);
  }
  element.append(...present(children));
  return element;
}

function present(children: Child[]): (Node | string)[] {
  return children.filter((child): child is Node | string => child !== null && child !== undefined && child !== false);
}

export function setAttribute(element: Element, name: string, value: string | number | boolean | null | undefined): void {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set a text, touching the page only where it differs: selections and screen readers stay undisturbed. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

export function show(element: HTMLElement, visible: boolean): void {
  if (element.hidden === visible) element.hidden = !visible;
}

export function replaceChildren(element: Element, ...children: Child[]): void {
  element.replaceChildren(...present(children));
}

const SVG = "http://www.w3.org/2000/svg";

/** Make a piece of a picture. */
export function shape(tag: string, attributes: Record<string, string>, ...children: Node[]): SVGElement {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A picture of 16 by 16 drawn with one path in the colour of the text; a screen reader passes it by. */
export function icon(path: string): SVGElement {
  return shape("svg", { viewBox: "0 0 16 16", "aria-hidden": "true", class: "icon" }, shape("path", { d: path }));
}

/** Drawn with strokes. */
export const ICONS = {
  pause: "M5.5 3.5v9M10.5 3.5v9",
  resume: "M5 3.2v9.6l7.6-4.8z",
  stop: "M4 4h8v8H4z",
  checkpoint: "M3 3h8.2L13 4.8V13H3zM5.5 3v3.5h4.5V3M5.5 13V9.5h5V13",
  validate: "M3 8.5l3.2 3.2L13 4.8",
  lr: "M2.5 4h6M12 4h1.5M2.5 8h1.5M7.5 8h6M2.5 12h7M13 12h.5M10.2 2.5v3M5.8 6.5v3M11.2 10.5v3",
  bell: "M4 11.5c1-1 1-2 1-4a3 3 0 0 1 6 0c0 2 0 3 1 4zM6.8 13.5h2.4",
  light: "M8 5a3 3 0 1 1 0 6a3 3 0 1 1 0-6M8 1.2v1.4M8 13.4v1.4M1.2 8h1.4M13.4 8h1.4M3.2 3.2l1 1M11.8 11.8l1 1M12.8 3.2l-1 1M4.2 11.8l-1 1",
  dark: "M12.8 9.8A5.3 5.3 0 0 1 6.2 3.2a5.3 5.3 0 1 0 6.6 6.6z",
  auto: "M8 2.5a5.5 5.5 0 1 1 0 11a5.5 5.5 0 1 1 0-11M8 2.5v11M9.5 3v10M11 3.6v8.8M12.3 4.8v6.4",
  keys: "M6 6.2a2 2 0 1 1 2.8 1.9c-.6.3-.8.7-.8 1.4M8 12v.3",
  close: "M4 4l8 8M12 4l-8 8",
  eye: "M1.8 8S4 4 8 4s6.2 4 6.2 4S12 12 8 12S1.8 8 1.8 8M8 6.4a1.6 1.6 0 1 1 0 3.2a1.6 1.6 0 1 1 0-3.2",
  maximise: "M9.5 2.5h4v4M13.5 2.5l-4.5 4.5M6.5 13.5h-4v-4M2.5 13.5l4.5-4.5",
  restore: "M13.5 6.5h-4v-4M9.5 6.5l4.5-4.5M2.5 9.5h4v4M6.5 9.5l-4.5 4.5",
  usual: "M2.5 3.5h11M2.5 12.5h11M3 9.5l3-2 2 1.5 2-2 3 1M8 1v.1M11 1v.1",
  unfold: "M3.5 6l4.5 4.5L12.5 6",
  options: "M2.5 4.5h6M12 4.5h1.5M2.5 11.5h2M8 11.5h5.5M10.2 3v3M6.2 10v3",
  dots: "M3 7.4a.6.6 0 1 1 0 1.2a.6.6 0 1 1 0-1.2M8 7.4a.6.6 0 1 1 0 1.2a.6.6 0 1 1 0-1.2M13 7.4a.6.6 0 1 1 0 1.2a.6.6 0 1 1 0-1.2",
  table: "M2.5 3.5h11v9h-11zM2.5 6.5h11M2.5 9.5h11M6.5 6.5v6",
  runs: "M2.5 4h1M6 4h7.5M2.5 8h1M6 8h7.5M2.5 12h1M6 12h7.5",
  pin: "M5.5 2.5h5M6.5 2.5v4L4.5 9h7l-2-2.5v-4M8 9v4.5",
  edit: "M3 13l.6-2.6L10.8 3.2l2 2L5.6 12.4zM9.4 4.6l2 2",
  download: "M8 2.5v7.5M4.8 7l3.2 3.2L11.2 7M2.5 13h11",
} as const;

export type Icon = keyof typeof ICONS;

/** A button with a picture and a word. */
export function button(
  label: string,
  options: { icon?: Icon; class?: string; title?: string; onclick: () => void },
): HTMLButtonElement {
  return h(
    "button",
    { type: "button", class: options.class ?? "button", title: options.title, onclick: options.onclick },
    options.icon ? icon(ICONS[options.icon]) : null,
    h("span", { class: "label" }, label),
  );
}

/** A button that shows a picture and is called `label`. */
export function iconButton(name: Icon, label: string, onclick: () => void): HTMLButtonElement {
  const made = h("button", { type: "button", class: "icon-button", onclick });
  setIcon(made, name, label);
  return made;
}

export function setIcon(button: HTMLButtonElement, name: Icon, label: string): void {
  replaceChildren(button, icon(ICONS[name]));
  setAttribute(button, "aria-label", label);
  setAttribute(button, "title", label);
}

/** A dialog with a heading; a click beside it closes it, as Escape does. */
export function dialog(name: string, heading: HTMLElement, ...children: HTMLElement[]): HTMLDialogElement {
  heading.id = `${name}-heading`;
  const element = h("dialog", { class: "dialog", "aria-labelledby": heading.id }, heading, ...children);
  element.addEventListener("click", (event) => {
    if (event.target === element) element.close();
  });
  return element;
}
