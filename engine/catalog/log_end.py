"""What the end of a run's log says, read without decoding its steps: for lists of runs, and for `run.json`."""

import math
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from offloop.engine.catalog.files import open_regular, read_range
from offloop.engine.catalog.summary import SPARKLINE, Summary, thinned
from offloop.engine.encoding import decode
from offloop.engine.events import (
    EpochEnd,
    Event,
    StateChanged,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction
from offloop.engine.observers.event_log import FILE_NAME

WHOLE: Final = 1024 * 1024
"""Bytes of a log up to which all its milestones are read: a millisecond."""
PART: Final = 64 * 1024
"""Bytes at the begin and at the end of a longer log."""
MOST_PART: Final = 4 * 1024 * 1024
"""Bytes of the end in which a whole line is looked for."""
SPOT: Final = 4096
"""Bytes at each of the places of a log from which its losses are taken."""

_MILESTONES: Final = re.compile(
    rb'^\{"type":"(?:TrainStart|TrainEnd|EpochEnd|ValidationStart|ValidationEnd|StateChanged|Evaluated)".*\n',
    re.MULTILINE,
)
_STEP: Final = b'{"type":"StepEnd"'
_LOSS: Final = re.compile(rb'^\{"type":"StepEnd".*?"loss":([^,}]+)', re.MULTILINE)
_TIME: Final = re.compile(rb'"time":([0-9.e+]+)')


class LogEnd:
    """The state of a run by its log."""

    def __init__(self, summary: Summary) -> None:
        """Begin before the first event.

        Args:
            summary: Takes the milestones in.
        """
        self.summary = summary
        self.start: TrainStart | None = None
        """The last one that was found."""
        self.end: TrainEnd | None = None
        """The last event, if it is a `TrainEnd`."""
        self.state = "running"
        """`running`, `paused`, `stopping` or `validating`."""
        self.heard = 0.0
        """Time of the last event; 0 without events."""
        self.step = self.epoch = 0
        self.sparkline: tuple[float, ...] = ()

    def take(self, event: Event) -> None:
        """Take the next event in."""
        self.end = None
        match event:
            case TrainStart():
                self.start, self.state = event, "running"
            case TrainEnd():
                self.end = event
            case StateChanged():
                self.state = event.state
            case ValidationStart():
                self.state = "validating" if self.state == "running" else self.state
            case ValidationEnd() | EpochEnd():
                self.state = "running" if self.state == "validating" else self.state
        self.summary.take(event)
        self.heard = max(self.heard, event.time)
        self.step, self.epoch = max(event.step, 0), max(event.epoch, 0)


def read_log_end(
    directory: Path | str, monitor: str = "", mode: Direction | None = None, *, is_short: bool = False
) -> LogEnd:
    """Return what the log of a run says about its end. Blocks on the file system.

    All milestones of a log of up to 1 MiB are read, and of a longer one the start and those in its last 64 KiB. Its
    sparkline then shows losses at 32 places.

    Args:
        directory: The run's.
        monitor: Metric of the sparkline.
        mode: Whether less or more of it is better, if its name does not tell.
        is_short: Read no more than the last 64 KiB in any case.

    Raises:
        OSError: The log is missing, or cannot be read.
    """

    def direction_of(name: str) -> Direction | None:
        return mode if name == monitor and mode is not None else metric_direction(name)

    file, state = open_regular(os.path.join(directory, FILE_NAME))
    size = state.st_size
    found = LogEnd(Summary(monitor, direction_of))
    try:
        if size <= (PART if is_short else WHOLE):
            _take_milestones(found, read_range(file, 0, size))
        else:
            begin = LogEnd(Summary(monitor))
            _take_milestones(begin, read_range(file, 0, PART))
            found = LogEnd(Summary(monitor, direction_of, sees_all=False))
            found.start = begin.start
            _take_milestones(found, _end_of(file, size))
        found.sparkline = found.summary.sparkline or _losses(file, size)
    finally:
        os.close(file)
    return found


def take_milestones(directory: Path | str, summary: Summary) -> None:
    """Take all milestones of a run's log in. Blocks on the file system: about a second for a gigabyte.

    Raises:
        OSError: The log is missing, or cannot be read.
    """
    file, state = open_regular(os.path.join(directory, FILE_NAME))
    found, position, rest = LogEnd(summary), 0, b""
    try:
        while position < state.st_size and (content := read_range(file, position, WHOLE)):
            position += len(content)
            content = rest + content
            end = content.rfind(b"\n") + 1
            for match in _MILESTONES.finditer(content, 0, end):
                _take(found, match[0].rstrip(b"\n"))
            rest = content[end:]
    finally:
        os.close(file)


def _end_of(file: int, size: int) -> bytes:
    """Return the last lines of a log; empty if one of them is too long."""
    part = PART
    while part <= MOST_PART:
        content = read_range(file, max(size - part, 0), part)
        content = content[content.find(b"\n") + 1 :]
        if b"\n" in content:
            return content
        part *= 8
    return b""


def _take_milestones(found: LogEnd, content: bytes) -> None:
    """Take milestones and the last step of some lines in."""
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
    # Any event tells that the run goes on
    last = content[content.rfind(b"\n", 0, max(len(content) - 1, 0)) + 1 :]
    if time := _TIME.search(last[:256]):
        found.heard = max(found.heard, _number(time[1]) or 0.0)


def _take(found: LogEnd, line: bytes) -> None:
    try:
        event = decode(line)
    except (msgspec.DecodeError, RecursionError):
        return
    found.take(event)


def _losses(file: int, size: int) -> tuple[float, ...]:
    """Return the losses of some steps, evenly spaced in the log."""
    found = []
    spots = min(SPARKLINE, max(size // SPOT, 1))
    for index in range(spots):
        start = round(index * max(size - SPOT, 0) / max(spots - 1, 1))
        content = read_range(file, start, SPOT)
        # The first line is not whole
        match = _LOSS.search(content, 0 if start == 0 else max(content.find(b"\n"), 0))
        value = None if match is None else _number(match[1])
        if value is not None:
            found.append(value)
    return thinned(found) if len(found) > 1 else ()


def _number(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
