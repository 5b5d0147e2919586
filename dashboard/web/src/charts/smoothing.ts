// The exponential moving average over steps: debiased, so that it does not start at zero.
//
//     kept   = weight ** (steps since the point before / steps of a unit)
//     last   = kept * last + (1 - kept) * value
//     shown  = last / (1 - product of all kept)
//
// A unit is the distance of points in the panel's densest curve, and the same for all of its curves. So they are all
// averaged over the same number of steps: a curve with few points is hardly changed, and comes no later than one with
// many. A curve with a point in each unit looks as in TensorBoard. Where only the least and greatest of many
// neighbouring points are left, they are averaged along the line between them: which of the two has more steps before
// it says nothing about the points that are gone.
//
// A curve that has only had one value so far is drawn as it is, to the last bit. What is not finite is not in
// a curve's columns and leaves the average alone.

export interface SmoothedColumn {
  length: number;
  step: Float64Array;
  value: Float64Array;
  /** Up to this step, neighbouring points may have been merged. */
  reducedTo: number;
  /** Changes when points other than new ones at the end have come, gone or moved. */
  generation: number;
}

/** The average of a growing column, computed on only for what is new. */
export class Smoothed {
  #values = new Float64Array(0);
  #count = 0;
  #last = 0;
  #remaining = 1; // product of what was kept
  #constant = true;
  #generation = -1;

  constructor(
    readonly weight: number,
    /** Steps that the weight is for. */
    readonly unit: number,
  ) {}

  /** The average at each point of a curve, at the same indices. */
  update({ length: count, step, value: values, reducedTo, generation }: SmoothedColumn): Float64Array {
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
      const steps = index === 0 ? 0 : (step[index] as number) - (step[index - 1] as number);
      // The first point, and several at one step, count like points that are a unit apart.
      const kept = steps > 0 && steps !== this.unit ? this.weight ** (steps / this.unit) : this.weight;
      const isMerged = index > 0 && (step[index] as number) <= reducedTo;
      const mean = isMerged ? (value + (values[index - 1] as number)) / 2 : value;
      this.#last = kept * this.#last + (1 - kept) * mean;
      this.#remaining *= kept;
      this.#constant &&= value === first;
      this.#values[index] = this.#constant ? value : this.#last / (1 - this.#remaining);
    }
    this.#count = count;
    return this.#values;
  }
}
