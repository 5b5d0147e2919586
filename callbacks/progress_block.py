"""The block of lines that `ProgressBar` draws: bars between two texts, and values below them.

It is composed by hand, because it is drawn ten times a second: with tables of rich that took most of 1 % of a core.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment

BARS_WIDTH: Final = 100
"""Most columns of a bar with its texts: what is printed over a shorter one hides more of it."""
WIDE: Final = 60
"""Columns from which the bars keep their place when a text grows."""
LEFT_WIDTH, RIGHT_WIDTH = 16, 12
"""Columns kept for the texts then."""
_COLOR_SYSTEMS: Final = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
}
PULSES_A_SECOND: Final = 15
"""Columns by which a bar without an end moves."""


class Bar(NamedTuple):
    """A bar between two texts."""

    left: str
    right: str
    done: float
    total: float | None
    """None if the end is unknown: something moves in the bar."""


class Block:
    """Lines in a given width, drawn by a console of rich."""

    def __init__(self, bars: Sequence[Bar], values: Iterable[str], width: int, *, title: str = "") -> None:
        """Describe a block.

        Args:
            bars: One per line. All have the same columns.
            values: Arranged in lines below the bars, without breaking one.
            width: Columns, at least 20.
            title: First line; none if it is empty.
        """
        self._bars = bars
        self._values = wrapped(values, width)
        self._width = width
        self._title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return self._segments(console)

    def text(self, console: Console) -> str:
        """Return what `console` would print, in a fraction of the time."""
        system = _COLOR_SYSTEMS.get(console.color_system or "")
        if system is None:
            return "".join([segment.text for segment in self._segments(console)])
        return "".join(
            [
                text if style is None
                else (style.without_color if console.no_color else style).render(text, color_system=system)
                for text, style, _ in self._segments(console)
            ]
        )  # fmt: skip

    def _segments(self, console: Console) -> Iterator[Segment]:
        if self._title:
            yield Segment(fitted(self._title, self._width), console.get_style("bold"))
            yield Segment.line()
        width = min(self._width, BARS_WIDTH)
        least = (LEFT_WIDTH, RIGHT_WIDTH) if self._width >= WIDE else (0, 0)
        left = max(least[0], *(cell_len(bar.left) for bar in self._bars))
        right = max(least[1], *(cell_len(bar.right) for bar in self._bars))
        room = width - left - 1 - (right + 1 if right else 0)
        for bar in self._bars:
            if room < 1:
                yield Segment(fitted(f"{bar.left} {bar.right}", width))
            else:
                yield Segment(f"{set_cell_size(bar.left, left)} ")
                yield from _drawn(
                    bar,
                    room,
                    console,
                    ("-", " ", " ") if not console.encoding.startswith("utf") else ("━", "╸", "╺"),
                )
                if right:
                    yield Segment(" " * (1 + right - cell_len(bar.right)) + bar.right)
            yield Segment.line()
        for line in self._values:
            yield Segment(fitted(line, self._width))
            yield Segment.line()


def _drawn(bar: Bar, width: int, console: Console, characters: tuple[str, str, str]) -> Iterator[Segment]:
    """Yield a bar of `width` columns. Without colours, only what is done is visible."""
    full, half, other_half = characters
    has_colors = console.color_system is not None and not console.no_color
    rest = console.get_style("bar.back")
    if bar.total is None:
        size = max(1, width // 4)
        start = int(time.monotonic() * PULSES_A_SECOND) % (width + size) - size
        before, end = max(0, start), min(width, start + size)
        yield Segment((full if has_colors else " ") * before, rest)
        yield Segment(full * (end - before), console.get_style("bar.pulse"))
        yield Segment((full if has_colors else " ") * (width - end), rest)
        return
    is_over = bar.done >= bar.total
    halves = 2 * width if is_over else int(2 * width * max(0.0, bar.done) / bar.total)
    done = full * (halves // 2) + half * (halves % 2)
    yield Segment(done, console.get_style("bar.finished" if is_over else "bar.complete"))
    left = width - len(done)
    if left and not has_colors:
        yield Segment(" " * left)
    elif left:
        yield Segment(full * left if halves % 2 or not done else other_half + full * (left - 1), rest)


def fitted(text: str, width: int) -> str:
    """Return a text as one line of at most `width` columns."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else " " for each in text)
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def wrapped(items: Iterable[str], width: int) -> list[str]:
    """Arrange items in lines of at most `width` columns, without breaking an item."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(item)
    return lines
