// The exponential moving average that TensorBoard draws: debiased, so that it does not start at zero.
//
//     last   = weight * last + (1 - weight) * value
//     shown  = last / (1 - weight ** count)
//
// A curve that has only had one value so far is drawn as it is, to the last bit. What is not finite is not in
// a curve's columns and leaves the average alone.
//
// Where only the least and greatest of many neighbouring points are left, one that stands for n points counts
// as n: otherwise the average would look further back there, and move each time a curve is thinned.

export interface SmoothedColumn {
  length: number;
  step: Float64Array;
  value: Float64Array;
  /** Up to this step, neighbouring points may have been merged. */
  reducedTo: number;
  /** Steps between two points before they were merged. */
  cadence: number;
  /** Changes when points other than new ones at the end have come, gone or moved. */
  generation: number;
}

/** The average of a growing column, computed on only for what is new. */
export class Smoothed {
  #values = new Float64Array(0);
  #count = 0;
  #last = 0;
  #remaining = 1; // weight ** count
  #constant = true;
  #generation = -1;

  constructor(readonly weight: number) {}

  /** The average at each point of a curve, at the same indices. */
  update({ length: count, step, value: values, reducedTo, cadence, generation }: SmoothedColumn): Float64Array {
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
      let weight = this.weight;
      if (index > 0 && (step[index] as number) <= reducedTo) {
        const points = ((step[index] as number) - (step[index - 1] as number)) / cadence;
        if (points > 1) weight **= points;
      }
      this.#last = weight * this.#last + (1 - weight) * value;
      this.#remaining *= weight;
      this.#constant &&= value === first;
      this.#values[index] = this.#constant ? value : this.#last / (1 - this.#remaining);
    }
    this.#count = count;
    return this.#values;
  }
}
