"""Recording: the log of a run as a replay reads it, with what could not be read."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from offloop.engine.catalog.record import RunRecord, read_run
from offloop.engine.catalog.tail import EventTail
from offloop.engine.encoding import decode
from offloop.engine.errors import ConfigError, OffloopError
from offloop.engine.events import Event, UnknownEvent, known_events
from offloop.engine.paths import LOG, absolute_path, is_run, meant_run

EVENTS_AT_ONCE: Final = 1_000
"""Events that are decoded in one go."""
PART: Final = 1024 * 1024
"""Bytes that are searched for a validation in one go."""
_VALIDATION: Final = b'{"type":"Validation'
_MAIN: Final = "__main__."


class Recording:
    """The events of a run, from its directory. One thread at a time; everything blocks on the file system."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        """Look at the directory of a run.

        Raises:
            ConfigError: It is not there, is not that of a run, or has no events.
        """
        self.directory: Final = absolute_path(run_dir)
        if not self.directory.is_dir():
            raise ConfigError(f"there is no run {run_dir}{meant_run(run_dir)}")
        if not (self.directory / LOG).is_file():
            lacks = (
                f"has no {LOG}, so nothing of it can be replayed"
                if is_run(self.directory)
                else f"is not the directory of a run: it has neither run.json nor {LOG}"
            )
            raise ConfigError(f"{run_dir} {lacks}{meant_run(run_dir)}")
        self.record: Final[RunRecord] = read_run(self.directory)
        self.unknown: Counter[str] = Counter()
        """How many events there were so far of each class that is not defined here."""
        self.lines = 0
        """How many lines the log has, after `scan`."""
        self.has_validation = False
        """Whether the run has validated, after `scan`."""
        self._tail = EventTail(self.directory)
        # By tag: the class of that name that is defined in another module.
        self._elsewhere: dict[str, type[Event] | None] = {}

    @property
    def skipped(self) -> int:
        """Lines so far that hold no event, or one whose class has other fields by now."""
        return self._tail.skipped

    @property
    def why_skipped(self) -> str:
        """What is wrong with the first of them."""
        return self._tail.why_skipped

    def scan(self) -> None:
        """Count the lines, and look for a validation. Blocks: about a second for a gigabyte.

        Raises:
            OSError: The log cannot be read.
        """
        with open(self.directory / LOG, "rb") as file:
            rest = b""
            while part := file.read(PART):
                self.lines += part.count(b"\n")
                self.has_validation = self.has_validation or _VALIDATION in rest + part
                rest = part[-len(_VALIDATION) :]

    def __iter__(self) -> Iterator[tuple[int, Event]]:
        """Yield the events in order, each with the number of its attempt, up to the present end of the log.

        Raises:
            OffloopError: The log was cut back meanwhile, because the run was resumed.
            OSError: It cannot be read.
        """
        is_empty = True
        while True:
            before = self._tail.position
            events = self._tail.read(EVENTS_AT_ONCE)
            if self._tail.restarted:
                raise OffloopError(
                    f"{self._tail.path} was cut back during the replay, by a run that resumes: replay it again"
                )
            for attempt, event in events:
                is_empty = False
                yield attempt, self._known(event) if isinstance(event, UnknownEvent) else event
            # A last line without its end counts for nothing
            if self._tail.position == before:
                break
        if is_empty:
            why = f": {self.skipped} lines hold none ({self.why_skipped})" if self.skipped else ""
            raise ConfigError(f"{self._tail.path} has no events{why}")

    def _known(self, event: UnknownEvent) -> Event:
        """Return an event of a script's own class, which is `__main__.Spread` there and in a module here."""
        tag = event.type
        if tag not in self._elsewhere:
            self._elsewhere[tag] = _class_elsewhere(tag)
        event_class = self._elsewhere[tag]
        if event_class is not None:
            fields: dict[str, Any] = msgspec.json.decode(event.raw)
            fields["type"] = event_class.__struct_config__.tag
            try:
                return decode(msgspec.json.encode(fields))
            except msgspec.DecodeError:
                self._elsewhere[tag] = None
        self.unknown[tag] += 1
        return event


def _class_elsewhere(tag: str) -> type[Event] | None:
    """Return the one class that may have been, or may be by now, that of a script; None if there is none."""
    name = tag.rpartition(".")[2]
    found = [
        each
        for each in known_events()
        if each.__name__ == name
        and not each.__module__.startswith("offloop.")
        and (tag.startswith(_MAIN) or each.__module__ == "__main__")
    ]
    return found[0] if len(found) == 1 else None


def check_directory(directory: Path, recording: Recording) -> None:
    """Check that a replay may write into a directory.

    Raises:
        ConfigError: It is the recorded run's, is inside it, or has a run already.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"directory must be a directory, got {directory}")
    recorded, given = recording.directory.resolve(), directory.resolve()
    if given == recorded or recorded in given.parents:
        raise ConfigError(
            f"directory must not be that of the recorded run, nor inside it, got {directory}: what callbacks write in "
            "a replay is kept apart"
        )
    if is_run(directory):
        raise ConfigError(f"directory must not have a run already, got {directory}: give a new one")
