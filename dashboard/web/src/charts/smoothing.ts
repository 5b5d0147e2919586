// The exponential moving average that TensorBoard draws: debiased, so that it does not start at zero.
//
//     last   = weight * last + (1 - weight) * value
//     shown  = last / (1 - weight ** count)
//
// A curve that has only had one value so far is drawn as it is, to the last bit. What is not finite is not in
// a curve's columns and leaves the average alone.

/** The average of a growing column, computed on only for what is new. */
export class Smoothed {
  #values = new Float64Array(0);
  #count = 0;
  #last = 0;
  #remaining = 1; // weight ** count
  #constant = true;
  #generation = -1;

  constructor(readonly weight: number) {}

  /**
   * The average of the first `count` of `values`, at the same indices.
   *
   * `generation` is any number that stays as long as values are only appended.
   */
  update(values: Float64Array, count: number, generation: number): Float64Array {
    if (generation !== this.#generation || count < this.#count) {
      this.#generation = generation;
      this.#count = 0;
      this.#last = 0;
      this.#remaining = 1;
      this.#constant = true;
    }
    if (this.#values.length < count) {
      const longer = new Float64Array(Math.max(values.length, count));
      longer.set(this.#values);
      this.#values = longer;
    }
    const first = values[0] as number;
    for (let index = this.#count; index < count; index++) {
      const value = values[index] as number;
      this.#last = this.weight * this.#last + (1 - this.weight) * value;
      this.#remaining *= this.weight;
      this.#constant &&= value === first;
      this.#values[index] = this.#constant ? value : this.#last / (1 - this.#remaining);
    }
    this.#count = count;
    return this.#values;
  }
}
