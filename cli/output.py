"""Printing and exit codes, shared by the commands."""

import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, NoReturn

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

from offloop.engine import OffloopError
from offloop.engine.paths import is_run, meant_run
from offloop.engine.visible_text import visible

NARROW: Final = 9
"""Characters to which columns of text are cut at most: a state fits."""
PIPED_WIDTH: Final = 10_000
"""Columns of a table that is not printed to a terminal: no value is folded."""
PIPED_CELL: Final = 40
"""Characters of a cell up to which all others of its column are padded, where nothing is cut."""


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2: wrong usage, or unreadable files."""
    print_error(f"offloop: {' '.join(message.splitlines())}")
    raise typer.Exit(2)


def interrupt_on(*signals: signal.Signals) -> None:
    """Let signals end a command in order, as Ctrl-C does. The main thread only."""
    for each in signals:
        signal.signal(each, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def reason(error: OffloopError | OSError) -> str:
    """Return why something failed, in words: of the system's errors the file and their text, without the number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    words = error.strerror[:1].lower() + error.strerror[1:]
    return f"{error.filename}: {words}" if error.filename is not None else words


def check_run(run: Path) -> None:
    """Fail if a directory is not that of a run."""
    if not run.is_dir():
        fail(f"there is no run {run}{meant_run(run)}")
    if not is_run(run):
        fail(f"{run} is not the directory of a run: it has neither run.json nor events.jsonl{meant_run(run)}")


def print_error(text: str) -> None:
    """Print text to stderr."""
    typer.echo(visible(text, keep="\n"), err=True)


def print_json(value: Any) -> None:
    """Print a value as one JSON document, NaN and infinities as strings."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def print_text(text: str) -> None:
    """Print text without wrapping it at the width of the terminal."""
    typer.echo(visible(text, keep="\n"))


def print_table(table: Table) -> None:
    """Print a table, fitted to the terminal, or unfolded if the output goes to a program."""
    to_program = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, markup=False, emoji=False, width=PIPED_WIDTH if to_program else None)
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        typer.echo(line.rstrip())


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print thousands of rows in columns, each row in one line; a header that starts with `>` is right-aligned.

    On a terminal, columns of text are cut to fit its width. Elsewhere no cell is cut; a long one widens only its own
    row. `print_table` folds them instead, and takes a millisecond for each row.
    """
    titles = [header.removeprefix(">") for header in headers]
    lines = [titles, *([visible(" ".join(cell.split())) for cell in row] for row in rows)]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(headers))]
    is_cut = sys.stdout.isatty() or "COLUMNS" in os.environ
    if is_cut:
        least = [
            max((cell_len(line[column]) for line in lines[1:]), default=1)
            if header.startswith(">")
            else NARROW
            for column, header in enumerate(headers)
        ]
        _cut(widths, [header.startswith(">") for header in headers], least, Console().width)
    else:
        widths = [min(width, PIPED_CELL) for width in widths]
    for line in lines:
        cells = []
        for cell, width, header in zip(line, widths, headers, strict=True):
            if is_cut:
                cell = cut(cell, width)
            space = " " * (width - cell_len(cell))
            cells.append(space + cell if header.startswith(">") else cell + space)
        typer.echo("  ".join(cells).rstrip())


def cut(text: str, columns: int) -> str:
    """Return the begin of a text that fits so many columns, with an ellipsis if that is not all."""
    return text if cell_len(text) <= columns else set_cell_size(text, max(0, columns - 1)) + "…"


def _cut(widths: list[int], are_numbers: Sequence[bool], least: Sequence[int], width: int) -> None:
    """Narrow columns until a line fits the width: the widest of text, then titles of numbers that are wider than those.

    Args:
        widths: Of the columns; changed.
        are_numbers: Whether they have numbers.
        least: Widths that they keep.
        width: Of the terminal.
    """
    for of_numbers in (False, True):
        chosen = [column for column, is_number in enumerate(are_numbers) if is_number is of_numbers]
        while (excess := sum(widths) + 2 * (len(widths) - 1) - width) > 0:
            others = [column for column in chosen if widths[column] > least[column]]
            if not others:
                break
            widest = max(others, key=lambda column: widths[column])
            second = max((widths[column] for column in others if column != widest), default=0)
            widths[widest] -= min(excess, max(widths[widest] - max(second, least[widest]), 1))


class _VisibleTable(Table):
    """A table whose cells mean nothing to a terminal."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(
            *(visible(each, keep="\n") if isinstance(each, str) else each for each in cells), **options
        )


def plain_table(*headers: str) -> Table:
    """Return a table without lines, easy to read, cut and grep. A header that starts with `>` is right-aligned."""
    table = _VisibleTable(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in headers:
        right = header.startswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(header.removeprefix(">"), justify=justify, no_wrap=right, overflow="fold")
    return table


def size(count: int) -> str:
    """Format a number of bytes: `12.3 MB`."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 999.95 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "B" else f"{number:.1f} {units[0]}"


def age(seconds: float) -> str:
    """Format an age in seconds in its largest unit: `5 min ago`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def duration(seconds: float) -> str:
    """Format a duration with its two largest units: `1 h 5 min`."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for place, (unit, length) in enumerate(units[:-1]):
        if seconds >= length:
            smaller, size = units[place + 1]
            rest = int(seconds % length // size)
            return f"{int(seconds // length)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"


def number(value: float | None) -> str:
    """Format a metric or a difference with four digits."""
    return "-" if value is None else f"{value:.4g}"


def share(part: int, whole: int) -> str:
    """Format a percentage; `0%` and `100%` are exact."""
    if 0 < part < whole:
        percent = 100 * part / whole
        return "<1%" if percent < 1 else ">99%" if percent > 99 else f"{percent:.0f}%"
    return "100%" if part else "0%"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
