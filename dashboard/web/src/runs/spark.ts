// The little curve of a run in the list.

/** The path of a curve through `values`, from edge to edge of a picture of `width` by `height`; empty for fewer than two. */
export function sparkPath(values: readonly number[], width: number, height: number): string {
  const finite = values.filter(Number.isFinite);
  if (finite.length < 2) return "";
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const x = (index: number): string => ((index * (width - 2)) / (finite.length - 1) + 1).toFixed(1);
  const y = (value: number): string =>
    (high > low ? 1 + ((high - value) / (high - low)) * (height - 2) : height / 2).toFixed(1);
  return finite.map((value, index) => `${index === 0 ? "M" : "L"}${x(index)} ${y(value)}`).join("");
}
