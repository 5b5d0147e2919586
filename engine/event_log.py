"""EventLog: every event of a run in `events.jsonl`, one encoded event a line; and how to read it back.

Milestones are written and flushed at once, samples at most a second later, so that a crash loses no
milestone and at most a second of samples. A reader survives a last line that is half there and events of
types that it does not know.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from offloop.engine.callback import Callback
from offloop.engine.events import Event, Sample, TrainStart, decode, encode
from offloop.engine.run import Run

logger = logging.getLogger("offloop")

FILE_NAME: Final = "events.jsonl"
FLUSH_INTERVAL: Final = 1.0
"""Seconds after which samples are written at the latest."""


class EventLog(Callback):
    """Writes the events that it receives. On wherever a run has a directory.

    A resumed attempt goes on in the same file, after cutting what came after the checkpoint that it continues.
    """

    needs_run_dir = True

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._flushed_at = 0.0

    def reset(self) -> None:
        self._file = None

    def on_event(self, event: Event, run: Run) -> None:
        if run.dir is None:
            return  # the run was refused its directory: only TrainEnd comes, and belongs nowhere
        if self._file is None:
            path = run.dir / FILE_NAME
            if isinstance(event, TrainStart) and event.attempt and path.exists():
                _cut(path, event.resumed_at)
            self._file = open(path, "ab")
        self._file.write(encode(event) + b"\n")
        now = time.monotonic()
        if not isinstance(event, Sample) or now - self._flushed_at > FLUSH_INTERVAL:
            self._file.flush()
            self._flushed_at = now

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _cut(path: Path, until: float | None) -> None:
    """Leave out of the file all events after a moment, all of them if it is None; whole or not at all."""
    temporary = path.with_suffix(".jsonl.new")
    with open(temporary, "wb") as file:
        if until is not None:
            file.writelines(encode(event) + b"\n" for event in read_events(path) if event.time <= until)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_events(path: "Path | str") -> Iterator[Event]:
    """Read a run's events, in order, from its directory or the file itself. Blocks on the file system.

    Unknown events come as `UnknownEvent`. A last line that is half there is left out; a broken line elsewhere
    is left out with a warning.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                event = decode(line.rstrip(b"\n"))  # an unknown one keeps these bytes
            except msgspec.DecodeError:
                if line.endswith(b"\n"):
                    logger.warning("%s:%d is no event and was left out", path, number)
                continue
            yield event
