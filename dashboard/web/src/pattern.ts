// Regular expressions that take time in proportion to the text, whatever they are: `RegExp` tries one way after the
// other, does not come to an end for `(a+)+$`, and nothing on the page can stop it. This follows all ways at the same
// time, and remembers the sets of places in the expression that it has met.
//
// What is known here is what `engine/catalog/pattern.py` knows, which explains it; `tests/support/run_filters.json` is
// tried with both. Upper and lower case are the same.

/** Most places of an expression, with repetitions written out: the time for a character is in proportion to it. */
const MAX_PLACES = 200;
/** Most groups inside one another. */
const MAX_DEPTH = 50;
/** Most places in all sets that are remembered. */
const KEPT_PLACES = 200_000;
const LAST = 0x10ffff;
const TOO_LARGE = `it is too large: more than ${MAX_PLACES} characters, repetitions written out`;

/** First and last character of each range. */
type Ranges = readonly (readonly [number, number])[];
type Node =
  | { kind: "char"; ranges: Ranges; negated: boolean }
  | { kind: "edge"; sign: string }
  | { kind: "sequence"; parts: Node[] }
  | { kind: "choice"; ways: Node[] }
  | { kind: "repeated"; part: Node; least: number; most: number | null };
type Char = Extract<Node, { kind: "char" }>;
type Place = { ways: number[] } | { char: Char; then: number } | { sign: string; then: number } | null;
/** What is before or after a place: a letter of a word, another character, or an end of the text. */
type Kind = "word" | "other" | "edge";

const DIGITS: Ranges = [[48, 57]];
const WORD: Ranges = [[48, 57], [65, 90], [95, 95], [97, 122]];
const SPACE: Ranges = [[9, 13], [32, 32]];
const CLASSES: Record<string, Ranges> = { d: DIGITS, w: WORD, s: SPACE, D: others(DIGITS), W: others(WORD), S: others(SPACE) };
const CONTROL: Record<string, number> = { t: 9, n: 10, v: 11, f: 12, r: 13 };
const COUNT = /\{([0-9]{1,4})(,([0-9]{1,4})?)?\}/y;

function others(ranges: Ranges): Ranges {
  const starts = [0, ...ranges.map(([, last]) => last + 1)];
  return starts.map((start, index) => [start, (ranges[index]?.[0] ?? LAST + 1) - 1] as const);
}

function codeOf(char: string): number {
  return char.codePointAt(0) as number;
}

class Parser {
  readonly #source: string[];
  #at = 0;

  constructor(source: string) {
    this.#source = [...source];
  }

  whole(): Node {
    const node = this.#choice(0);
    if (this.#at < this.#source.length) throw new Error("')' has no '(' before it");
    return node;
  }

  #peek(ahead = 0): string {
    return this.#source[this.#at + ahead] ?? "";
  }

  #take(): string {
    return this.#source[this.#at++] ?? "";
  }

  #choice(depth: number): Node {
    if (depth > MAX_DEPTH) throw new Error(`more than ${MAX_DEPTH} groups are inside one another`);
    const ways = [this.#sequence(depth)];
    while (this.#peek() === "|") {
      this.#take();
      ways.push(this.#sequence(depth));
    }
    return ways.length === 1 ? (ways[0] as Node) : { kind: "choice", ways };
  }

  #sequence(depth: number): Node {
    const parts: Node[] = [];
    while (!["", "|", ")"].includes(this.#peek())) parts.push(this.#repeated(this.#atom(depth)));
    return parts.length === 1 ? (parts[0] as Node) : { kind: "sequence", parts };
  }

  #repeated(part: Node): Node {
    const counts = this.#counts();
    if (counts === null) return part;
    const { sign, least, most } = counts;
    if (part.kind === "edge") throw new Error(`'${sign}' has nothing before it to repeat`);
    if (most !== null && least > most) throw new Error(`'${sign}' is out of order`);
    if (this.#peek() === "?") this.#take();
    const again = this.#counts();
    if (again !== null) throw new Error(`'${again.sign}' has nothing before it to repeat`);
    return { kind: "repeated", part, least, most };
  }

  /** Take how often something is repeated, if that comes next. */
  #counts(): { sign: string; least: number; most: number | null } | null {
    const sign = this.#peek();
    if (sign === "*" || sign === "+" || sign === "?") {
      this.#take();
      return { sign, least: sign === "+" ? 1 : 0, most: sign === "?" ? 1 : null };
    }
    const found = this.#count(this.#at);
    if (found === null) return null;
    const [whole, first, comma, second] = found;
    this.#at += whole.length;
    const least = Number(first);
    return { sign: whole, least, most: second ? Number(second) : comma ? null : least };
  }

  #count(at: number): RegExpExecArray | null {
    COUNT.lastIndex = 0;
    return COUNT.exec(this.#source.slice(at, at + 12).join(""));
  }

  #atom(depth: number): Node {
    const char = this.#take();
    if (char === "(") return this.#group(depth);
    if (char === "[") return this.#charClass();
    if (char === "\\") return this.#escape();
    if (char === "^" || char === "$") return { kind: "edge", sign: char };
    if (char === ".") return { kind: "char", ranges: [[0, LAST]], negated: false };
    if ("*+?".includes(char) || this.#count(this.#at - 1) !== null) throw new Error(`'${char}' has nothing before it to repeat`);
    return { kind: "char", ranges: [[codeOf(char), codeOf(char)]], negated: false };
  }

  #group(depth: number): Node {
    if (this.#peek() === "?") {
      if (this.#peek(1) !== ":") throw new Error(`'(?${this.#peek(1)}' is not known here, only (...) and (?:...)`);
      this.#at += 2;
    }
    const node = this.#choice(depth + 1);
    if (this.#take() !== ")") throw new Error("'(' has no ')' after it");
    return node.kind === "edge" ? { kind: "sequence", parts: [node] } : node; // ^* is refused, (^)* is not
  }

  #escape(): Node {
    const char = this.#take();
    if (char === "b" || char === "B") return { kind: "edge", sign: char };
    return { kind: "char", ranges: this.#escaped(char), negated: false };
  }

  #escaped(char: string): Ranges {
    if (char === "") throw new Error("'\\' has nothing after it");
    if (Object.hasOwn(CLASSES, char)) return CLASSES[char] as Ranges;
    const control = Object.hasOwn(CONTROL, char) ? CONTROL[char] : undefined;
    if (control === undefined && /[0-9A-Za-z]/.test(char)) throw new Error(`'\\${char}' is not known here`);
    const code = control ?? codeOf(char);
    return [[code, code]];
  }

  #charClass(): Node {
    const negated = this.#peek() === "^";
    if (negated) this.#take();
    const ranges: (readonly [number, number])[] = [];
    for (let char = this.#take(); char !== "]"; char = this.#take()) {
      if (char === "") throw new Error("'[' has no ']' after it");
      const found = this.#member(char);
      if (this.#peek() === "-" && !["", "]"].includes(this.#peek(1))) {
        this.#take();
        const end = this.#member(this.#take());
        const [[first, same], [, last]] = [found[0], end[0]] as [[number, number], [number, number]];
        if (found.length > 1 || end.length > 1 || first !== same || first > last) throw new Error("a range in [...] is out of order");
        ranges.push([first, last]);
      } else {
        ranges.push(...found);
      }
    }
    if (ranges.length === 0) throw new Error("[] is empty");
    return { kind: "char", ranges, negated };
  }

  #member(char: string): Ranges {
    return char === "\\" ? this.#escaped(this.#take()) : [[codeOf(char), codeOf(char)]];
  }
}

/** An expression as places: each is a character, an edge or a fork, and 0 is the end. */
class Program {
  readonly start: number;
  readonly #places: Place[] = [null];
  #calls = 0;

  constructor(node: Node) {
    this.start = this.#put(node, 0);
  }

  #add(place: Place): number {
    this.#places.push(place);
    if (this.#places.length > MAX_PLACES) throw new Error(TOO_LARGE);
    return this.#places.length - 1;
  }

  /** Add the places of a part that `then` follows, and return the first. */
  #put(node: Node, then: number): number {
    this.#calls += 1; // also of what has no places, such as ()
    if (this.#calls > 10 * MAX_PLACES) throw new Error(TOO_LARGE);
    switch (node.kind) {
      case "char":
        return this.#add({ char: node, then });
      case "edge":
        return this.#add({ sign: node.sign, then });
      case "sequence":
        return node.parts.reduceRight((next, part) => this.#put(part, next), then);
      case "choice":
        return this.#add({ ways: node.ways.map((way) => this.#put(way, then)) });
      case "repeated": {
        const { part, least, most } = node;
        let start = then;
        if (most === null) {
          const loop = this.#add({ ways: [] });
          const first = this.#put(part, loop);
          this.#places[loop] = { ways: [first, then] };
          start = least > 0 ? first : loop;
          for (let count = 1; count < least; count++) start = this.#put(part, start);
        } else {
          for (let count = least; count < most; count++) start = this.#add({ ways: [this.#put(part, start), then] });
          for (let count = 0; count < least; count++) start = this.#put(part, start);
        }
        return start;
      }
    }
  }

  /** The characters that may come next; null if the end is reached. */
  reached(places: readonly number[], before: Kind, after: Kind): { char: Char; then: number }[] | null {
    const steps: { char: Char; then: number }[] = [];
    const seen = new Uint8Array(this.#places.length);
    const waiting = [...places];
    for (let at = waiting.pop(); at !== undefined; at = waiting.pop()) {
      if (seen[at] === 1) continue;
      seen[at] = 1;
      const place = this.#places[at] as Place;
      if (place === null) return null;
      if ("char" in place) steps.push(place);
      else if ("ways" in place) waiting.push(...place.ways);
      else if (holds(place.sign, before, after)) waiting.push(place.then);
    }
    return steps;
  }
}

/** A text that is the same for the same places, in whichever order. */
function bitsOf(places: readonly number[]): string {
  const bits = new Uint16Array(Math.ceil(MAX_PLACES / 16));
  for (const place of places) bits[place >> 4] = (bits[place >> 4] as number) | (1 << (place & 15));
  return String.fromCharCode(...bits);
}

function holds(sign: string, before: Kind, after: Kind): boolean {
  if (sign === "^") return before === "edge";
  if (sign === "$") return after === "edge";
  return ((before === "word") !== (after === "word")) === (sign === "b");
}

function accepts({ ranges, negated }: Char, codes: readonly number[]): boolean {
  return negated !== ranges.some(([first, last]) => codes.some((code) => first <= code && code <= last));
}

/** A set of places after a character, and where the next characters lead: null is that the expression is found. */
interface Places {
  places: readonly number[];
  before: Kind;
  moves: Map<string, Places | null>;
  atEnd: boolean | null;
}

/** A regular expression, which is found in a text in time in proportion to its length. */
export class Pattern {
  readonly #program: Program;
  readonly #start: Places;
  readonly #sets = new Map<string, Places>();
  #kept = 0;

  /** Throws an Error with the reason if it is none, is too large, or has what is not known here. */
  constructor(source: string) {
    this.#program = new Program(new Parser(source).whole());
    this.#start = { places: [this.#program.start], before: "edge", moves: new Map(), atEnd: null };
  }

  /** Whether the expression is found somewhere in a text. */
  isIn(text: string): boolean {
    let now = this.#start;
    for (const char of text) {
      let after = now.moves.get(char);
      if (after === undefined) after = this.#move(now, char);
      if (after === null) return true;
      now = after;
    }
    return (now.atEnd ??= this.#program.reached(now.places, now.before, "edge") === null);
  }

  #move(now: Places, char: string): Places | null {
    if (this.#kept > KEPT_PLACES) {
      this.#sets.clear();
      this.#start.moves.clear();
      this.#kept = 0;
    }
    const kind: Kind = /^\w/.test(char) ? "word" : "other";
    const steps = this.#program.reached(now.places, now.before, kind);
    if (steps === null) {
      now.moves.set(char, null);
      return null;
    }
    const forms = [char, char.toLowerCase(), char.toUpperCase()].filter((form) => [...form].length === 1);
    const codes = forms.map(codeOf);
    // It may begin at each character anew
    const reached = new Set([this.#program.start]);
    for (const step of steps) if (accepts(step.char, codes)) reached.add(step.then);
    const places = [...reached];
    this.#kept += 1 + places.length;
    const key = kind + bitsOf(places);
    let after = this.#sets.get(key);
    if (after === undefined) this.#sets.set(key, (after = { places, before: kind, moves: new Map(), atEnd: null }));
    now.moves.set(char, after);
    return after;
  }
}
