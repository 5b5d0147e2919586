"""MetricLogger: the metrics of a run in `metrics.csv` and `metrics.jsonl`, for a spreadsheet, pandas or jq."""

import contextlib
import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from offloop.callbacks.value_logger import Measured, ValueLogger
from offloop.engine import (
    ConfigError,
    EpochEnd,
    Evaluated,
    LineFile,
    RunHandle,
    StepEnd,
    TrainStart,
    ValidationEnd,
    read_attempts,
    replace_file,
)
from offloop.engine.argument_hints import explains_arguments

logger = logging.getLogger("offloop")

Format = Literal["csv", "jsonl"]

Moment = tuple[int, float]
"""An attempt, and a time on that attempt's clock."""

_POSITION: Final = ("time", "attempt", "epoch", "step", "batch")


class MetricLogger(ValueLogger):
    """Writes rows for steps, validations, epochs and evaluations: `metrics.csv` and `metrics.jsonl` of the run.

    A row starts with time (Unix seconds), attempt, epoch, step and batch. Rows of steps have `loss`, `lr`, `grad_norm`
    and logged values; the others have their metrics. The last step of an epoch always has a row. The row of an
    evaluation has the step of its checkpoint, and comes later.
    In the CSV file a metric is a column from its first value on. A line of the other file is a JSON object with the
    values of its row, where NaN and infinities are the strings "NaN", "Infinity" and "-Infinity".

    A row reaches the operating system before the next one is written. A resumed attempt continues the files, after
    cutting the rows that came after its checkpoint. Earlier rows that a killed run did not write are rebuilt from
    `events.jsonl`.

    While a file cannot be written, its rows are lost; the first failure is reported, and the log says when it is over.
    It runs in the callback's worker thread; training never waits for it.
    """

    needs_run_dir = True

    @explains_arguments()
    def __init__(
        self,
        *,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        formats: Sequence[Format] = ("csv", "jsonl"),
    ) -> None:
        """Choose the interval of steps, by time (a second by default) or by steps, and the files.

        Args:
            every_seconds: Seconds between rows of steps, above 0. The steps depend on the machine.
            every_n_steps: Steps between rows of steps, at least 1. The rows are the same on every machine.
            formats: The files to write: `"csv"`, `"jsonl"`.

        Raises:
            ConfigError: A value is out of range.
        """
        known = get_args(Format)
        if isinstance(formats, str) or not formats or not set(formats) <= set(known):
            raise ConfigError(f"formats must be a list of some of {', '.join(known)}; got {formats!r}")
        self.formats = tuple(formats)
        super().__init__(every_seconds=every_seconds, every_n_steps=every_n_steps)

    def reset(self) -> None:
        super().reset()
        self._tables: list[_Table] = []
        self._attempt = 0

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        until: Moment | None = None
        if event.attempt and event.resumed_at is not None:
            before = event.attempt - 1 if event.resumed_attempt is None else event.resumed_attempt
            until = (before, event.resumed_at)
        assert run.dir is not None  # needs_run_dir
        kinds: dict[str, type[_Table]] = {"csv": _Csv, "jsonl": _JsonLines}
        self._tables = [kinds[each](run.dir / f"metrics.{each}", until) for each in self.formats]
        if any(table.has is not None for table in self._tables):
            self._complete(event, run)
        self._attempt = event.attempt

    def write(self, event: Measured, values: Mapping[str, float]) -> None:
        position = {"time": event.time, "attempt": self._attempt, "epoch": event.epoch, "step": event.step}
        row = {**position, "batch": event.batch}
        row |= {name: value for name, value in values.items() if name not in _POSITION}
        errors = [error for table in self._tables if (error := table.put(row)) is not None]
        if errors:
            raise errors[0]

    def make_durable(self) -> None:
        for table in self._tables:
            table.sync()

    def close(self) -> None:
        try:
            if self._tables:
                self.write_latest_step()
        finally:
            for table in self._tables:
                table.close()

    def _complete(self, start: TrainStart, run: RunHandle) -> None:
        """Write the rows that an earlier attempt did not write. Its event log is complete already."""
        assert run.dir is not None
        try:
            for self._attempt, event in read_attempts(run.dir):
                if self._attempt >= start.attempt:
                    break
                if isinstance(event, StepEnd):
                    self.on_step_end(event, run)
                elif isinstance(event, ValidationEnd):
                    self.on_validation_end(event, run)
                elif isinstance(event, EpochEnd):
                    self.on_epoch_end(event, run)
                elif isinstance(event, Evaluated):
                    self.on_evaluated(event, run)
        except FileNotFoundError:
            pass
        finally:
            # The interval of steps starts again.
            super().reset()
            for table in self._tables:
                table.has = None


class _Table:
    """A file of rows. A row that cannot be written is lost; later ones are written again."""

    def __init__(self, path: Path, until: Moment | None) -> None:
        """Prepare the file, if possible; otherwise the first row tries again.

        Args:
            path: The file.
            until: Keep the rows up to this moment. None keeps none.
        """
        self.path = path
        # The moment of the last row that was kept, as long as older rows may be missing.
        self.has: Moment | None = None
        self._until = until
        self._file: LineFile | None = None
        # Whether the file has exactly the rows to keep.
        self._is_prepared = False
        self._lost = 0
        # A failure is reported with the first row.
        with contextlib.suppress(OSError):
            self._prepare()

    def put(self, row: Mapping[str, Any]) -> OSError | None:
        """Write a row unless it is there. Return the first error of several in a row."""
        if self.has is not None and (row["attempt"], row["time"]) <= self.has:
            return None
        try:
            if not self._is_prepared:
                self._prepare()
            if self._file is None:
                self._file = LineFile(self.path)
            self.write(row)
        except OSError as error:
            self._lost += 1
            error.add_note("offloop: rows are lost until the file can be written again")
            return error if self._lost == 1 else None
        if self._lost:
            logger.warning("%s can be written again; %d rows are missing in it", self.path, self._lost)
            self._lost = 0
        return None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Remove all rows from the file but those to keep."""
        raise NotImplementedError

    def _replace(self, content: bytes) -> None:
        replace_file(self.path, content)
        self._is_prepared = True
        if self._file is not None:
            self._file.close()
            self._file = None
        self._file = LineFile(self.path)

    def sync(self) -> None:
        """Flush written rows to disk."""
        if self._lost:
            raise OSError(f"{self.path} cannot be written")
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Csv(_Table):
    """A table whose header grows. A new column rewrites the file, which is rare."""

    def __init__(self, path: Path, until: Moment | None) -> None:
        self._columns: list[str] = list(_POSITION)
        super().__init__(path, until)

    def write(self, row: Mapping[str, Any]) -> None:
        if new := [name for name in row if name not in self._columns]:
            columns = self._columns + new
            self._replace(_csv_of([columns, *self._read()[1:]], len(columns)))
            self._columns = columns
        assert self._file is not None
        self._file.append(_csv_of([[row.get(name, "") for name in self._columns]]))

    def _prepare(self) -> None:
        rows: list[list[str]] = []
        columns = self._columns
        if self._until is not None and self.path.exists():
            columns, *rows = self._read()
            places = [columns.index(name) for name in ("attempt", "time") if name in columns]
            moments = [(_moment(*(row[place] for place in places)), row) for row in rows]
            kept = [(moment, row) for moment, row in moments if moment is not None and moment <= self._until]
            rows = [row for _, row in kept]
            self.has = max((moment for moment, _ in kept), default=(-1, 0.0))
        self._replace(_csv_of([columns, *rows]))
        self._columns = columns

    def _read(self) -> list[list[str]]:
        """Return header and rows, without an incomplete last line."""
        text = self.path.read_bytes().decode("utf-8", "replace")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        header, *rows = lines or [self._columns]
        return [header, *(row for row in rows if len(row) == len(header))]


class _JsonLines(_Table):
    """A file with one JSON object per line."""

    def write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        plain = {
            name: str(value).replace("inf", "Infinity").replace("nan", "NaN")
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in row.items()
        }
        self._file.append(msgspec.json.encode(plain) + b"\n")

    def _prepare(self) -> None:
        lines: list[bytes] = []
        if self._until is not None and self.path.exists():
            self.has = (-1, 0.0)
            for line in self.path.read_bytes().splitlines(keepends=True):
                moment = _moment_of(line)
                if moment is not None and moment <= self._until:
                    lines.append(line)
                    self.has = max(self.has, moment)
        self._replace(b"".join(lines))


def _csv_of(rows: Sequence[Sequence[Any]], width: int = 0) -> bytes:
    """Return rows as CSV, padded to a number of columns."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([*row, *[""] * (width - len(row))] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _moment(attempt: str, time: str) -> Moment | None:
    """Return the moment of a row, None if its fields are invalid."""
    try:
        return int(attempt), float(time)
    except ValueError:
        return None


class _Line(msgspec.Struct):
    time: float
    attempt: int = 0


def _moment_of(line: bytes) -> Moment | None:
    """Return the moment of a line, None if it is incomplete."""
    try:
        found = msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError:
        return None
    return (found.attempt, found.time) if line.endswith(b"\n") else None
