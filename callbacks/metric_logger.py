"""MetricLogger: the numbers of a run in `metrics.csv` and `metrics.jsonl`, for a spreadsheet, pandas or jq."""

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from offloop.callbacks.value_logger import ValueLogger
from offloop.engine import ConfigError, EpochEnd, Run, StepEnd, TrainStart, ValidationEnd

Format = Literal["csv", "jsonl"]

_POSITION: Final = ("time", "attempt", "epoch", "step", "batch")


class MetricLogger(ValueLogger):
    """Writes a row for steps at a cadence, and for each validation and epoch, to `metrics.csv` and `metrics.jsonl`.

    A row begins with time (Unix seconds), attempt, epoch, step and batch. That of a step has `loss`, `lr`,
    `grad_norm` and what the step logged; rows of validations and epochs have their metrics. The last step of
    each epoch always has a row, so that short runs never look empty. In the CSV file each metric is a column from
    its first value on; a line of the other file is a JSON object with the values of its row only, in which NaN
    and infinities are the strings "NaN", "Infinity" and "-Infinity", because JSON has no numbers for them.

    Each row is with the operating system before the next one is written: a killed run loses none. A resumed
    attempt goes on in the same files, after cutting what came after the checkpoint that it continues.

    Runs in a thread of its own; training never waits for it.
    """

    needs_run_dir = True

    def __init__(
        self,
        *,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        formats: Sequence[Format] = ("csv", "jsonl"),
    ) -> None:
        """Choose the cadence of step rows: by time (a second by default), or by steps.

        Args:
            every_seconds: Seconds between two step rows, above 0. Which steps get a row depends on the machine.
            every_n_steps: Steps between two step rows, at least 1: the same rows on every machine.
            formats: Which files to write: `"csv"`, `"jsonl"`.
        """
        known = get_args(Format)
        if isinstance(formats, str) or not formats or not set(formats) <= set(known):
            raise ConfigError(f"formats must be a list of some of {', '.join(known)}; got {formats!r}")
        self.formats = tuple(formats)
        super().__init__(every_seconds=every_seconds, every_n_steps=every_n_steps)

    def reset(self) -> None:
        super().reset()
        self._csv: _Csv | None = None
        self._jsonl: _JsonLines | None = None
        self._attempt = 0

    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self._attempt = event.attempt
        moment = event.resumed_at if event.attempt else None
        assert run.dir is not None  # needs_run_dir
        if "csv" in self.formats:
            self._csv = _Csv(run.dir / "metrics.csv", moment)
        if "jsonl" in self.formats:
            self._jsonl = _JsonLines(run.dir / "metrics.jsonl", moment)

    def write(self, event: StepEnd | ValidationEnd | EpochEnd, values: Mapping[str, float]) -> None:
        position = {name: getattr(event, name) for name in _POSITION if name != "attempt"}
        row = {"time": position.pop("time"), "attempt": self._attempt, **position, **values}
        if self._csv is not None:
            self._csv.write(row)
        if self._jsonl is not None:
            self._jsonl.write(row)

    def close(self) -> None:
        if self._csv is not None or self._jsonl is not None:
            self.write_latest_step()
        if self._csv is not None:
            self._csv.close()
        if self._jsonl is not None:
            self._jsonl.close()


class _Csv:
    """A table whose header grows: a new column has the file rewritten, which is rare."""

    def __init__(self, path: Path, moment: float | None) -> None:
        """Open it with the rows up to a moment, None for none of them."""
        self._path = path
        self._columns: list[str] = list(_POSITION)
        rows: list[list[str]] = []
        if moment is not None and path.exists():
            header, *rows = self._read()
            self._columns = header
            rows = [row for row in rows if float(row[0]) <= moment]
        self._rewrite(rows)

    def write(self, row: Mapping[str, Any]) -> None:
        if new := [name for name in row if name not in self._columns]:
            self._file.close()
            rows = self._read()[1:]
            self._columns += new
            self._rewrite(rows)
        csv.writer(self._file).writerow([row.get(name, "") for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[list[str]]:
        """Return header and rows, without a last line that is half there."""
        text = self._path.read_bytes().decode("utf-8", "replace")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        header, *rows = lines or [self._columns]
        return [header, *(row for row in rows if len(row) == len(header))]

    def _rewrite(self, rows: list[list[str]]) -> None:
        """Write the file anew with the columns of now, whole or not at all, and go on after its end."""

        def write(file: io.BufferedWriter) -> None:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text)
            writer.writerow(self._columns)
            writer.writerows([*row, *[""] * (len(self._columns) - len(row))] for row in rows)
            text.flush()
            text.detach()

        _replace(self._path, write)
        self._file = open(self._path, "a", newline="", encoding="utf-8")


class _JsonLines:
    """A file of JSON objects, one a line."""

    def __init__(self, path: Path, moment: float | None) -> None:
        """Open it with the lines up to a moment, None for none of them."""
        lines: list[bytes] = []
        if moment is not None and path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if _time_of(line) <= moment]
        _replace(path, lambda file: file.writelines(lines))
        self._file = open(
            path, "ab", buffering=0
        )  # each line is one write, so it is there whole or not at all

    def write(self, row: Mapping[str, Any]) -> None:
        plain = {
            name: str(value).replace("inf", "Infinity").replace("nan", "NaN")
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in row.items()
        }
        self._file.write(msgspec.json.encode(plain) + b"\n")

    def close(self) -> None:
        self._file.close()


class _Line(msgspec.Struct):
    time: float


def _time_of(line: bytes) -> float:
    """Return when a line was written; never, if it is half there."""
    try:
        return msgspec.json.decode(line, type=_Line).time if line.endswith(b"\n") else math.inf
    except msgspec.DecodeError:
        return math.inf


def _replace(path: Path, write: Callable[[io.BufferedWriter], None]) -> None:
    """Write a file anew, whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)
