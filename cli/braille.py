"""Braille: a curve in characters of a terminal, two by four dots each."""

import math
from collections.abc import Sequence
from typing import Final

_BASE: Final = 0x2800
# Bits of the dots of a character, by row and column
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def braille_chart(x: Sequence[float], y: Sequence[float], columns: int, lines: int) -> list[str]:
    """Draw a curve.

    Args:
        x: Ascending.
        y: Values; those that are not finite are left out.
        columns: Width of the drawing in characters, at least 1.
        lines: Height, at least 1.

    Returns:
        Its lines, from the top; the least and the greatest value touch the edges.
    """
    width, height = 2 * columns, 4 * lines
    points = [(across, up) for across, up in zip(x, y, strict=True) if math.isfinite(up)]
    cells = [[0] * columns for _ in range(lines)]
    if not points:
        return [" " * columns] * lines
    first, last = points[0][0], points[-1][0]
    low, high = min(up for _, up in points), max(up for _, up in points)
    before: tuple[int, int] | None = None
    for across, up in points:
        column = round((width - 1) * (across - first) / (last - first)) if last > first else 0
        row = round((height - 1) * (high - up) / (high - low)) if high > low else height // 2
        for dot_column, dot_row in _line(before or (column, row), (column, row)):
            cells[dot_row // 4][dot_column // 2] |= _DOTS[dot_row % 4][dot_column % 2]
        before = column, row
    return ["".join(chr(_BASE + bits) if bits else " " for bits in line) for line in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of a straight line."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    if steps == 0:
        return [end]
    return [
        (
            round(start[0] + (end[0] - start[0]) * step / steps),
            round(start[1] + (end[1] - start[1]) * step / steps),
        )
        for step in range(steps + 1)
    ]
