// The layers in the order in which they are shown: a tree by the dots in their names, or a list by a number. No DOM.

export interface Line {
  /** What stands there: the end of the name in a tree, all of it in a list. */
  label: string;
  /** Name of the layer, or the common begin of those of a group. */
  name: string;
  level: number;
  /** Number of the layer in the model; null for a group. */
  place: number | null;
  /** Layers in a group. */
  count: number;
}

interface Node {
  name: string;
  label: string;
  place: number | null;
  children: Map<string, Node>;
}

/** Lay layers out as a tree in the order of the model; groups that are folded keep their layers to themselves. */
export function tree(names: readonly string[], places: readonly number[], folded: ReadonlySet<string>): Line[] {
  const root: Node = { name: "", label: "", place: null, children: new Map() };
  for (const place of places) {
    const name = names[place] as string;
    const parts = name.split(".");
    let node = root;
    parts.forEach((part, depth) => {
      const isLayer = depth === parts.length - 1;
      // A layer and a group may have the same name.
      const key = isLayer ? `=${part}` : part;
      let child = node.children.get(key);
      if (child === undefined) {
        child = { name: parts.slice(0, depth + 1).join("."), label: part, place: isLayer ? place : null, children: new Map() };
        node.children.set(key, child);
      }
      node = child;
    });
  }
  const lines: Line[] = [];
  const add = (node: Node, level: number, prefix: string): void => {
    const [only] = node.children.values();
    // A group of one takes no line.
    if (node.place === null && node.children.size === 1) return add(only as Node, level, `${prefix}${node.label}.`);
    const line = { label: prefix + node.label, name: node.name, level, place: node.place, count: node.place === null ? size(node) : 0 };
    lines.push(line);
    if (!folded.has(node.name) || node.place !== null) for (const child of node.children.values()) add(child, level + 1, "");
  };
  for (const child of root.children.values()) add(child, 1, "");
  return lines;
}

function size(node: Node): number {
  let layers = node.place === null ? 0 : 1;
  for (const child of node.children.values()) layers += size(child);
  return layers;
}

/** Lay layers out by a number, the greatest first: what is not finite before, what was not measured behind. */
export function list(names: readonly string[], places: readonly number[], value: (place: number) => number): Line[] {
  const rank = (place: number): number => {
    const number = value(place);
    return Number.isNaN(number) ? -Infinity : number === -Infinity ? Infinity : number;
  };
  return places
    .map((place) => ({ place, by: rank(place) }))
    .sort((one, other) => (one.by === other.by ? one.place - other.place : other.by - one.by))
    .map(({ place }) => ({ label: names[place] as string, name: names[place] as string, level: 1, place, count: 0 }));
}

/** The layer of another kind that belongs to one: of the same name, within its module, or its module. */
export function counterpart(names: readonly string[], name: string | null): string | null {
  if (name === null) return null;
  const module = name.slice(0, Math.max(0, name.lastIndexOf(".")));
  return [
    (other: string) => other === name,
    (other: string) => other.startsWith(`${name}.`),
    (other: string) => other === module,
  ].reduce<string | null>((found, fits) => found ?? names.find(fits) ?? null, null);
}
