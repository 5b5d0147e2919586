"""Printing and exit codes, shared by the commands."""

import json
import math
import os
import sys
from typing import Any, Final, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

PIPED_WIDTH: Final = 10_000
"""Columns of a table that is not printed to a terminal: no value is folded."""


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2: wrong usage, or unreadable files."""
    typer.echo(f"offloop: {message}", err=True)
    raise typer.Exit(2)


def print_json(value: Any) -> None:
    """Print a value as one JSON document, NaN and infinities as strings."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def print_text(text: str) -> None:
    """Print text without wrapping it at the width of the terminal."""
    typer.echo(text)


def print_table(table: Table) -> None:
    """Print a table, fitted to the terminal, or unfolded if the output goes to a program."""
    to_program = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, width=PIPED_WIDTH if to_program else None)
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        typer.echo(line.rstrip())


def plain_table(*headers: str) -> Table:
    """Return a table without lines, easy to read, cut and grep. A header that starts with `>` is right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
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
