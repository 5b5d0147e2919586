// Columns of a saved page taken apart: dashboard/saved/packed_column.py packs them and explains how.

/** Kind, how many numbers, bytes of each, whether differences, what the first one is counted from, and the divisor. */
export type Layout = [kind: "float" | "whole" | "decimal", count: number, bytes: number, delta: boolean, first: number, scale: number];

const NO_VALUE = 255;

export class Columns {
  readonly #data: Uint8Array;
  readonly #layouts: readonly Layout[];
  readonly #starts: number[] = [];
  readonly #read = new Map<number, Float64Array>();

  /** The columns that begin at `start`. Throws where there are fewer bytes than they need. */
  constructor(data: Uint8Array, start: number, layouts: readonly Layout[]) {
    this.#data = data;
    this.#layouts = layouts;
    for (const [kind, count, bytes] of layouts) {
      this.#starts.push(start);
      start += count * (bytes + Number(kind === "decimal"));
    }
    if (start !== data.length) throw new Error(`columns need ${start} bytes, there are ${data.length}`);
  }

  /** The numbers of a column. */
  get(index: number): Float64Array {
    let numbers = this.#read.get(index);
    if (!numbers) this.#read.set(index, (numbers = this.#unpack(index)));
    return numbers;
  }

  #unpack(index: number): Float64Array {
    const [kind, count, bytes, delta, first, scale] = this.#layouts[index] as Layout;
    const start = this.#starts[index] as number;
    const byte = (plane: number, place: number): number => this.#data[start + plane * count + place] as number;
    const numbers = new Float64Array(count);
    if (kind === "float") {
      const raw = new Uint8Array(numbers.buffer);
      for (let plane = 0; plane < 8; plane++) {
        for (let place = 0; place < count; place++) raw[8 * place + plane] = byte(plane, place);
      }
      return numbers;
    }
    let before = first;
    for (let place = 0; place < count; place++) {
      let signless = 0;
      for (let plane = bytes - 1; plane >= 0; plane--) signless = 256 * signless + byte(plane, place);
      const whole = withSign(signless) + (delta ? before : 0);
      before = whole;
      numbers[place] = kind === "whole" ? whole / scale : timesTenTo(whole, byte(bytes, place));
    }
    return numbers;
  }
}

/** 0, 1, 2, 3, ... mean 0, -1, 1, -2, ... */
function withSign(signless: number): number {
  return signless % 2 === 0 ? signless / 2 : -(signless + 1) / 2;
}

/** Dividing by a power of ten gives the number that its digits say; multiplying by its inverse would be a little off. */
function timesTenTo(whole: number, exponent: number): number {
  if (exponent === NO_VALUE) return NaN;
  const power = withSign(exponent);
  return power < 0 ? whole / 10 ** -power : whole * 10 ** power;
}
