"""`offloop export`: write the metrics of a run as CSV, or runs as a page in one file."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from offloop.cli.output import check_run, fail, print_error, print_text, reason
from offloop.engine import ConfigError, OffloopError, export_metrics

MEGABYTE = 1_000_000


def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="The run's directory; with --html several, or directories of runs.",
            show_default=False,
        ),
    ],
    html: Annotated[bool, typer.Option("--html", help="Write a page that opens from disk.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; by default stdout, with --html NAME.html or runs.html."
        ),
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            help="Write rows of this event only, such as StepEnd or ResourceUsage; may be repeated."
        ),
    ] = None,
    max_size: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            help="With --html: fail if the file cannot be this small, at least 1. By default about 3, more if many "
            "runs need it. A larger number keeps more digits, texts and pictures.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write all metrics of a run as CSV, or with --html one or more runs as a page in one file.

    CSV has a row for each step, validation, epoch, evaluation and sample.

    The page shows curves, events and configuration as the live page does, without a server and without any request.
    It has all points of curves with up to 5,000, minima and maxima of longer ones, secrets masked, and neither host,
    process, command line nor directory. Values are exact up to 3 MB; beyond, they have at least 4 digits. Least,
    greatest and last values are always exact.

    Of a run that goes on, what was there at the beginning is written.
    """
    if html:
        if event:
            fail("--event is for CSV: a page has all events")
        _export_html(runs, output, max_size, force=force)
    elif max_size is not None:
        fail("--max-size is for --html")
    elif len(runs) > 1:
        fail(f"CSV is written of one run, got {len(runs)}; --html takes several")
    else:
        _export_csv(runs[0], output, event or [], force=force)


def _export_html(runs: list[Path], output: Path | None, max_size: float | None, *, force: bool) -> None:
    if max_size is not None and not 1 <= max_size < 1_000_000:
        fail(f"--max-size must be from 1 to 1,000,000 (MB), got {max_size:g}")
    if output is None:
        # Of "." the name is that of the directory.
        name = runs[0].resolve().name if len(runs) == 1 else ""
        output = Path(f"{name or 'runs'}.html")
    _check_target(output, force=force)

    from offloop.dashboard.saved.saved_page import GOAL, export_html

    most = None if max_size is None else round(max_size * MEGABYTE)
    try:
        saved = export_html(runs, output, max_bytes=most, replace=force)
    except ConfigError as error:
        fail(str(error).replace(f"max_bytes={most:,}", f"--max-size {max_size:g}") if most else str(error))
    except (OffloopError, OSError) as error:
        fail(f"{output} cannot be written: {reason(error).removeprefix(f'{output}: ')}")
    count = "1 run" if saved.runs == 1 else f"{saved.runs} runs"
    detail = "exact values" if saved.digits is None else f"values with {saved.digits} digits"
    print_text(f"{output}: {count}, {saved.bytes / MEGABYTE:.1f} MB, {detail}")
    if most is None and saved.bytes > GOAL:
        print_error(f"the file has more than {GOAL / MEGABYTE:g} MB; fewer runs make it smaller")
    if saved.samples_left_out:
        print_error(
            f"{saved.samples_left_out:,} texts, pictures and tables are left out; a larger --max-size has room for more"
        )
    _tell_skipped(saved.skipped)


def _export_csv(run: Path, output: Path | None, event: list[str], *, force: bool) -> None:
    check_run(run)
    if output is None:
        try:
            exported = export_metrics(run, sys.stdout, only=event)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            fail(f"{run} cannot be exported: {reason(error)}")
    else:
        _check_target(output, force=force)
        part = output.with_name(f".{output.name}.part")
        try:
            with open(part, "w", encoding="utf-8", newline="") as file:
                exported = export_metrics(run, file, only=event)
            os.replace(part, output)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            why = reason(error).replace(str(part), str(output))
            fail(f"{run} cannot be exported to {output}: {why.removeprefix(f'{output}: ')}")
        print_text(f"{output}: {exported.rows:,} rows")
    if event and not exported.rows:
        print_error(f"the log has no event {' or '.join(event)} with numbers")
    _tell_skipped(exported.skipped)


def _check_target(output: Path, *, force: bool) -> None:
    if output.is_dir():
        fail(f"{output} is a directory: --output names a file")
    if output.exists() and not force:
        fail(f"{output} exists; --force replaces it")
    if not output.parent.is_dir():
        fail(f"there is no directory {output.parent}")


def _tell_skipped(lines: int) -> None:
    if lines:
        print_error(f"{lines} lines of the log hold no event and were skipped")
