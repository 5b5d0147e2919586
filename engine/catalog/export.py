"""Export of all metrics of a run to CSV, from its log."""

import csv
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from offloop.engine import events
from offloop.engine.catalog.files import open_regular, read_range
from offloop.engine.observers.event_log import FILE_NAME, AttemptCounter, decode_head
from offloop.engine.sample_numbers import numbers_in_fields
from offloop.engine.samples import events as sample_events

CHUNK: Final = 1024 * 1024
LONGEST_LINE: Final = 64 * 1024 * 1024
"""Bytes of the longest line that is read."""
POSITION: Final = ("time", "attempt", "event", "epoch", "step", "batch")
"""First columns."""

_KINDS: Final = frozenset({"StepEnd", "ValidationEnd", "EpochEnd", "Evaluated", "TrainEnd"})
_OTHERS: Final = (
    frozenset(
        name
        for module in (events, sample_events)
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, events.Event)
    )
    - _KINDS
)
"""Events of the engine that have no metrics."""


class _Row(msgspec.Struct):
    """Fields of events with metrics. Decoded several times as fast as the events themselves."""

    type: str
    time: float = 0.0
    epoch: int = -1
    step: int = -1
    batch: int = -1
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    samples: int | None = None
    data_time: float | None = None
    step_time: float | None = None
    seconds: float | None = None
    lrs: dict[str, float] = {}
    metrics: dict[str, float] = {}
    of_step: int = -1
    of_epoch: int = -1
    failed_step: int | None = None
    failed_loss: float | None = None

    def values(self) -> dict[str, float | int]:
        """Return the metrics of the event, in the order of columns."""
        if self.type == "TrainEnd":
            return {} if self.failed_loss is None else {"loss": self.failed_loss}
        own = {
            name: value
            for name in ("loss", "lr", "grad_norm", "samples", "data_time", "step_time")
            if self.type == "StepEnd" and (value := getattr(self, name)) is not None
        }
        return {**own, **{f"lr/{name}": value for name, value in self.lrs.items()}, **self.metrics}


_decode_row = msgspec.json.Decoder(_Row, strict=False).decode
_decode_fields = msgspec.json.Decoder(dict[str, Any]).decode


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was exported."""

    rows: int
    """Rows without the header."""
    skipped: int
    """Lines of the log that hold no event, or are longer than 64 MiB."""


def export_metrics(directory: Path | str, file: TextIO, *, only: Collection[str] = ()) -> Exported:
    """Write all metrics of a run as CSV: a row for each step, validation, epoch, evaluation and sample. Blocks.

    The first columns are `time` (Unix seconds), `attempt`, `event`, `epoch`, `step` and `batch`; each metric has a
    column, in the order in which they appear, and an empty field where an event lacks it. An evaluation has the step
    of its checkpoint. A step that failed because its loss is not finite has a row, too. Numbers of samples
    (`ResourceUsage`, `GradientStatistics`, `LayersMeasured`) and of events of your own have the names that they have
    on the live page: `resource_usage/cpu_percent`, `layers_measured/weights/mean/0.bias`.

    The log is read twice, in bounded memory. Of a run that goes on, what was there at the beginning is exported.

    Args:
        directory: The run's.
        file: Opened for text with `newline=""`.
        only: Names of events to export, like `"StepEnd"`; all if it is empty. Statistics of many layers make many
            columns.

    Raises:
        OSError: The log cannot be read, or was cut back meanwhile by a run that was resumed; or `file` cannot be
            written.
    """
    log, state = open_regular(os.path.join(directory, FILE_NAME))
    try:
        names: dict[str, None] = {}
        for _, row in _rows(log, state.st_size, _Count(), only):
            names |= dict.fromkeys(row.values())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*POSITION, *names])
        count, skipped = 0, _Count()
        for attempt, row in _rows(log, state.st_size, skipped, only):
            values = row.values()
            step, epoch = row.step, row.epoch
            if row.type == "Evaluated":
                step, epoch = row.of_step, row.of_epoch
            elif row.type == "TrainEnd":
                if not values:
                    continue
                step = row.step if row.failed_step is None else row.failed_step
            # Which batch an evaluated checkpoint was saved at is not known here
            batch = "" if row.type == "Evaluated" else row.batch
            position = (row.time, attempt, row.type, epoch, step, batch)
            writer.writerow([*position, *(values.get(name, "") for name in names)])
            count += 1
    finally:
        os.close(log)
    return Exported(rows=count, skipped=skipped.count)


class _Count:
    """A number that a generator adds to."""

    count = 0


def _rows(file: int, size: int, skipped: _Count, only: Collection[str]) -> Iterator[tuple[int, _Row]]:
    """Yield the events with metrics in the first bytes of a log, each with its attempt."""
    attempts = AttemptCounter()
    for line in _lines(file, size, skipped):
        try:
            head = decode_head(line)
            attempt = attempts.take(head)
            # Events of users have the name of their module, too
            name = head.type.rpartition(".")[2]
            if only and name not in only:
                continue
            if head.type in _KINDS:
                yield attempt, _decode_row(line)
            elif head.type not in _OTHERS:
                fields = _decode_fields(line)
                if numbers := dict(numbers_in_fields(head.type, fields)):
                    position = {each: fields[each] for each in ("epoch", "step", "batch") if each in fields}
                    yield attempt, _Row(name, head.time, **position, metrics=numbers)
        except (msgspec.DecodeError, RecursionError):
            skipped.count += 1


def _lines(file: int, size: int, skipped: _Count) -> Iterator[bytes]:
    """Yield the whole lines in the first bytes of a file."""
    position, rest, is_too_long = 0, b"", False
    while position < size:
        content = read_range(file, position, min(CHUNK, size - position))
        if not content:
            raise OSError(
                "the log was cut back while it was exported, as a resumed run does it: export it again"
            )
        position += len(content)
        *lines, end = content.split(b"\n")
        if lines:
            first, *others = lines
            if is_too_long:
                skipped.count += 1
            else:
                yield rest + first
            yield from others
            rest, is_too_long = end, False
        elif not is_too_long:
            rest += end
            if len(rest) > LONGEST_LINE:
                rest, is_too_long = b"", True
