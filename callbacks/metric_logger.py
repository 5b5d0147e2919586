"""MetricLogger: the numbers of a run in `metrics.csv` and `metrics.jsonl`, for a spreadsheet, pandas or jq."""

import contextlib
import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from offloop.callbacks.value_logger import ValueLogger
from offloop.engine import (
    ConfigError,
    EpochEnd,
    LineFile,
    Run,
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
"""An attempt, and a time on that attempt's own clock."""

_POSITION: Final = ("time", "attempt", "epoch", "step", "batch")


class MetricLogger(ValueLogger):
    """Writes a row for steps at a cadence, and for each validation and epoch, to `metrics.csv` and `metrics.jsonl`.

    A row begins with time (Unix seconds), attempt, epoch, step and batch. That of a step has `loss`, `lr`,
    `grad_norm` and what the step logged; rows of validations and epochs have their metrics. The last step of
    each epoch always has a row, so that short runs never look empty. In the CSV file each metric is a column from
    its first value on; a line of the other file is a JSON object with the values of its row only, in which NaN
    and infinities are the strings "NaN", "Infinity" and "-Infinity", because JSON has no numbers for them.

    Each row is with the operating system before the next one is written. A resumed attempt goes on in the same files,
    after cutting what came after the checkpoint that it continues. Rows before it that a killed run had no time to
    write are made from the run's `events.jsonl`.

    While a file cannot be written, the rows of that time are lost to it. The first failure is reported, and a log
    record says when it is over.

    Runs in a thread of its own; training never waits for it.
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
        self._tables: list[_Table] = []
        self._attempt = 0

    def on_train_start(self, event: TrainStart, run: Run) -> None:
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

    def write(self, event: StepEnd | ValidationEnd | EpochEnd, values: Mapping[str, float]) -> None:
        position = {"time": event.time, "attempt": self._attempt, "epoch": event.epoch, "step": event.step}
        row = {**position, "batch": event.batch}
        row |= {name: value for name, value in values.items() if name not in _POSITION}  # these are ours
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

    def _complete(self, start: TrainStart, run: Run) -> None:
        """Write the rows that an earlier attempt had no time for; its log has been completed already."""
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
        except FileNotFoundError:
            pass
        finally:
            super().reset()  # the cadence begins anew
            for table in self._tables:
                table.has = None


class _Table:
    """A file of rows. A row that cannot be written is lost; those after it are not."""

    def __init__(self, path: Path, until: Moment | None) -> None:
        """Prepare the file; it is opened by the first row.

        Args:
            path: Of the file.
            until: Rows up to this moment are kept; None for none of them.
        """
        self.path = path
        self.has: Moment | None = (
            None  # the moment of the last row that was kept, if older ones may be missing
        )
        self._until = until
        self._file: LineFile | None = None
        self._is_prepared = False  # it holds the rows that are kept, and no others
        self._lost = 0
        with contextlib.suppress(OSError):  # tried again with the first row, and told of then
            self._prepare()

    def put(self, row: Mapping[str, Any]) -> OSError | None:
        """Write a row if it is not there; returns what prevented it the first time, until it works again."""
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
            error.add_note("offloop: rows are lost until it can be written again")
            return error if self._lost == 1 else None
        if self._lost:
            logger.warning("%s can be written again; %d rows are missing in it", self.path, self._lost)
            self._lost = 0
        return None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Leave the rows in the file that are kept."""
        raise NotImplementedError

    def _replace(self, content: bytes) -> None:
        replace_file(self.path, content)
        self._is_prepared = True
        if self._file is not None:
            self._file.close()
            self._file = None
        self._file = LineFile(self.path)

    def sync(self) -> None:
        """Put on the disk what was written."""
        if self._lost:
            raise OSError(f"{self.path} cannot be written")
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Csv(_Table):
    """A table whose header grows: a new column has the file rewritten, which is rare."""

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
        """Return header and rows, without a last line that is half there."""
        text = self.path.read_bytes().decode("utf-8", "replace")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        header, *rows = lines or [self._columns]
        return [header, *(row for row in rows if len(row) == len(header))]


class _JsonLines(_Table):
    """A file of JSON objects, one a line."""

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
    """Return rows as text, filled up to a number of columns."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([*row, *[""] * (width - len(row))] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _moment(attempt: str, time: str) -> Moment | None:
    """Return when a row was written; None if it does not say so."""
    try:
        return int(attempt), float(time)
    except ValueError:
        return None


class _Line(msgspec.Struct):
    time: float
    attempt: int = 0


def _moment_of(line: bytes) -> Moment | None:
    """Return when a line was written; None if it is half there."""
    try:
        found = msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError:
        return None
    return (found.attempt, found.time) if line.endswith(b"\n") else None
