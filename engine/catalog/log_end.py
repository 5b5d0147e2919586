"""What the end of a run's log says, read without decoding its steps: for lists of runs that have not ended."""

import os
import re
from pathlib import Path
from typing import Final

import msgspec

from offloop.engine.catalog.files import open_regular, read_range
from offloop.engine.encoding import decode
from offloop.engine.events import (
    EpochEnd,
    Evaluated,
    Event,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.observers.event_log import FILE_NAME

WHOLE: Final = 1024 * 1024
"""Bytes of a log up to which all its milestones are read: a millisecond."""
PART: Final = 64 * 1024
"""Bytes at the begin and at the end of a longer log."""
MOST_PART: Final = 4 * 1024 * 1024
"""Bytes of the end in which a whole line is looked for."""

_MILESTONES: Final = re.compile(
    rb'^\{"type":"(?:TrainStart|TrainEnd|EpochEnd|ValidationStart|ValidationEnd|StateChanged|Evaluated)".*\n',
    re.MULTILINE,
)
_STEP: Final = b'{"type":"StepEnd"'
_FIELD: Final = re.compile(rb'"(time|step|epoch)":(-?[0-9.e+]+)')


class LogEnd(msgspec.Struct, kw_only=True):
    """The state of a run by its log."""

    start: TrainStart | None = None
    """The last one that was found."""
    end: TrainEnd | None = None
    """The last event, if it is a `TrainEnd`."""
    state: str = "running"
    """`running`, `paused`, `stopping` or `validating`."""
    heard: float = 0.0
    """Time of the last event; 0 without events."""
    step: int = 0
    epoch: int = 0
    is_whole: bool = True
    """True if all milestones of the log were read."""
    points: dict[str, list[tuple[int, float]]] = {}
    """Metrics by name, each with steps and values, in order."""

    def _add(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.points.setdefault(name, []).append((step, value))

    def take(self, event: Event) -> None:
        """Take the next event in."""
        self.end = None
        match event:
            case TrainStart():
                self.start, self.state = event, "running"
            case TrainEnd():
                self.end = event
                if event.failed_loss is not None and event.failed_step is not None:
                    self._add(event.failed_step, {"loss": event.failed_loss})
            case StateChanged():
                self.state = event.state
            case ValidationStart():
                self.state = "validating" if self.state == "running" else self.state
            case ValidationEnd() | EpochEnd():
                self._add(event.step, event.metrics)
                self.state = "running" if self.state == "validating" else self.state
            case Evaluated():
                self._add(event.of_step, event.metrics)
            case StepEnd():
                if event.loss is not None:
                    self._add(event.step, {"loss": event.loss})
                self._add(event.step, {"lr": event.lr, **event.metrics})
        self.heard = max(self.heard, event.time)
        self.step, self.epoch = max(event.step, 0), max(event.epoch, 0)


def read_log_end(directory: Path | str) -> LogEnd:
    """Return what the log of a run says about its end. Blocks on the file system.

    All milestones of a log of up to 1 MiB are read, and of a longer one those in its first and last 64 KiB.

    Raises:
        OSError: The log is missing, or cannot be read.
    """
    file, state = open_regular(os.path.join(directory, FILE_NAME))
    found = LogEnd(points={})
    try:
        if state.st_size <= WHOLE:
            _take_milestones(found, read_range(file, 0, state.st_size))
            return found
        _take_milestones(found, read_range(file, 0, PART))
        # A run that was killed while it wrote its first steps is no run of now
        found.state, found.points, found.end, found.is_whole = "running", {}, None, False
        part = PART
        while part <= MOST_PART:
            content = read_range(file, state.st_size - part, part)
            content = content[content.find(b"\n") + 1 :]
            if b"\n" in content:
                _take_milestones(found, content)
                break
            # One line is longer
            part *= 8
    finally:
        os.close(file)
    return found


def _take_milestones(found: LogEnd, content: bytes) -> None:
    content = content[: content.rfind(b"\n") + 1]
    step = content.rfind(b"\n" + _STEP) + 1
    if step == 0 and not content.startswith(_STEP):
        step = -1
    for match in _MILESTONES.finditer(content):
        if 0 <= step < match.start():
            _take(found, content[step : content.index(b"\n", step)])
            step = -1
        _take(found, match[0].rstrip(b"\n"))
    if step >= 0:
        _take(found, content[step : content.index(b"\n", step)])
    last = content[content.rfind(b"\n", 0, max(len(content) - 1, 0)) + 1 :]
    # Any event tells that the run is alive
    for name, value in _FIELD.findall(last[:256]):
        if name == b"time":
            found.heard = max(found.heard, float(value))


def _take(found: LogEnd, line: bytes) -> None:
    try:
        event = decode(line)
    except (msgspec.DecodeError, RecursionError):
        return
    found.take(event)
