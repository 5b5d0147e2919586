"""RunReader: reads one run directory into a `LiveRun`, in a thread that a disk may hold up for good.

A long log is read twice: first some lines of it, for coarse curves at once, then all of it.
"""

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from offloop.dashboard.curves.column_file import LEAST_LOG
from offloop.dashboard.protocol.from_server import SeriesInfo
from offloop.dashboard.runs.followed_run import FollowedRun, first_event, take_in, time_of
from offloop.dashboard.runs.kept_run import KeptRun, find_run, keep_run
from offloop.dashboard.runs.live_run import LiveRun, Numbers
from offloop.engine import (
    EpochEnd,
    Event,
    EventTail,
    OffloopError,
    RunRecord,
    Sample,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    ValidationEnd,
    decode,
)

logger = logging.getLogger("offloop")

LOG: Final = "events.jsonl"
LONG_LOG: Final = 8 * 1024 * 1024
"""Bytes of a log above which coarse curves are shown first: less is read within about a second."""
KEEP_AGAIN: Final = 1.25
"""Growth of a log after which its columns are kept again."""
COARSE_LINES: Final = 2_000
"""Lines of a long log that make the coarse curves."""
COARSE_PART: Final = 16 * 1024
"""Bytes that are read for one of them, while lines are shorter."""
LONGEST_COARSE: Final = 1024 * 1024
"""Bytes of the longest line in coarse curves."""
EVENTS_AT_ONCE: Final = 4_000
GENTLE_EVENTS: Final = 50
"""Events between two pauses beside a run of this process: some milliseconds of the interpreter."""
REST: Final = 9.0
"""Seconds of rest for each second of work beside a run of this process. Time spent waiting for the interpreter counts:
training waits for it as long."""
LONGEST_REST: Final = 2.0
"""Seconds: what took longer waited for the disk."""


class AbandonedError(OffloopError):
    """Reading was given up, since nothing is to be shown any more. Never leaves the dashboard."""


class News(NamedTuple):
    """What a run's directory has had to say since the last time."""

    events: Sequence[Event]
    written: float
    """When the log was written last."""
    before: int
    """Events of the log before these."""
    is_restarted: bool
    """True if the log is another one, or was cut back: it has to be filled in again."""
    is_described_anew: bool
    """True if the fixed facts have changed."""
    has_more: bool
    seconds: float
    """How long reading took."""


class RunReader:
    """Reads one run directory. One thread at a time; everything blocks on the file system."""

    def __init__(
        self,
        record: RunRecord,
        *,
        history_bytes: int,
        milestone_bytes: int,
        is_gentle: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read nothing yet.

        Args:
            record: The run, as it was known last.
            history_bytes: Limit of the memory for curves.
            milestone_bytes: Limit of the memory for milestones.
            is_gentle: Returns True while a run of this process trains, which needs the interpreter. Any thread.
        """
        self.directory = Path(record.directory)
        self.is_abandoned = False
        """Set by another thread to have reading end soon."""
        self.share_read = 0.0
        """Share of the log that `fill` has read, for another thread."""
        self._record = record
        self.parts_read = 0
        """Grows while reading gets on, for another thread."""
        self._log = self.directory / LOG
        self._history_bytes = history_bytes
        self._milestone_bytes = milestone_bytes
        self._is_gentle = is_gentle
        self._tail = EventTail(self.directory)
        self._count = 0
        # Whether the log was there: one that is missing then was taken away.
        self._had_log = False
        # Bytes of the log that a column file covers.
        self._kept_up_to = 0
        self._kept: KeptRun | None = None

    def coarse(self) -> LiveRun | None:
        """Return the curves of some of the log's lines; None if the log is short, or was read before."""
        self._kept = find_run(self._log, history_bytes=self._history_bytes)
        if self._kept is not None:
            return None
        try:
            file = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            # Told when the log is filled in.
            return None
        try:
            state = os.fstat(file)
            if not stat.S_ISREG(state.st_mode) or state.st_size < LONG_LOG:
                return None
            source = self._source()
            live: LiveRun | None = None
            for events in _batches(_some_events(file, state.st_size), self._at_once):
                if live is None:
                    live = self._live(source, events, is_coarse=True)
                take_in(source, live, events, state.st_mtime, 0)
                self._pause()
        finally:
            os.close(file)
        if live is None:
            return None
        # The whole log has more of them, and other numbers for them.
        live.forget_milestones()
        return live

    def fill(self, series: Sequence[SeriesInfo] = ()) -> LiveRun:
        """Return the run with all of its log.

        Args:
            series: Curves that are to keep their numbers.

        Raises:
            AbandonedError: Reading was given up.
            OSError: The directory is gone, or its log cannot be read.
        """
        self._tail, self._count, self.share_read = EventTail(self.directory), 0, 0.0
        source = self._source()
        live = self._restored(source)
        while True:
            before = self._tail.position
            events = self._read_log()
            if self._tail.restarted:
                live, self._count, source = None, 0, self._source()
                self._kept_up_to = 0
            if live is None and events:
                live = self._live(source, events, series=series)
            if live is not None:
                take_in(source, live, events, time_of(self._log), self._count)
            self._count += len(events)
            self.share_read = self._tail.position / max(self._tail.size, 1)
            if not events and self._tail.position == before:
                live = self._live(source, (), series=series) if live is None else live
                self._keep(live)
                return live
            self._pause()

    def _restored(self, source: FollowedRun) -> LiveRun | None:
        """Return the run as far as its columns were kept; None if they were not."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        self._tail, self._count = EventTail(self.directory, place=kept.place), kept.count
        self._kept_up_to = kept.place.position
        live = self._live(source, [kept.start])
        written = time_of(self._log)
        events: list[Event | Numbers] = []
        for event in kept.events:
            source.observe(event, written)
            # Counts those of unknown types.
            events.append(source.known(event))
        live.take_in(events)
        live.restore(kept.facts, kept.history, kept.layers)
        live.samples.restore(kept.samples)
        return live

    def _keep(self, live: LiveRun) -> None:
        """Keep what was read of a long log, once it is a good deal more than what is kept."""
        place = self._tail.place
        if (
            place is None
            or place.position < max(LEAST_LOG, KEEP_AGAIN * self._kept_up_to)
            or self._is_gentle()
        ):
            return
        self._kept_up_to = place.position
        try:
            keep_run(self._log, live, place, self._count)
        except OSError as error:
            logger.info("the columns of %s were not kept: %s", self._log, error)

    def empty(self, why: str) -> LiveRun:
        """Return the run without its log, of which there is something to say. Does not block."""
        source = FollowedRun(self._record)
        source.note = why
        return self._live(source, ())

    def news(self, live: LiveRun, *, with_record: bool) -> News:
        """Return what is new since `fill`, or since the last call.

        Args:
            live: The run that is shown. It has taken in all that was read before.
            with_record: Whether to look at the other files of the directory, too.

        Raises:
            OSError: The directory is gone, or its log cannot be read. A later call continues.
        """
        source = live.source
        assert isinstance(source, FollowedRun)
        self._keep(live)
        began = time.monotonic()
        events = self._read_log()
        is_restarted, count = self._tail.restarted, self._count
        self._count += len(events)
        is_described_anew = with_record and source.update()
        has_more = bool(events) and self._tail.position < self._tail.size
        written, seconds = time_of(self._log), time.monotonic() - began
        return News(events, written, count, is_restarted, is_described_anew, has_more, seconds)

    def _read_log(self) -> list[Event]:
        events = [event for _, event in self._tail.read(self._at_once)]
        if self._tail.size:
            self._had_log = True
        elif self._had_log:
            # Raises where it is missing: the curves of an empty log would take the place of those on the screen.
            os.lstat(self._log)
        return events

    @property
    def skipped(self) -> int:
        """Lines of the log that hold no event."""
        return self._tail.skipped

    @property
    def _at_once(self) -> int:
        return GENTLE_EVENTS if self._is_gentle() else EVENTS_AT_ONCE

    def _source(self) -> FollowedRun:
        source = FollowedRun(self._record)
        source.update()
        self._worked_since = time.monotonic()
        return source

    def _live(
        self,
        source: FollowedRun,
        events: Sequence[Event],
        *,
        series: Sequence[SeriesInfo] = (),
        is_coarse: bool = False,
    ) -> LiveRun:
        start = next((each for each in events if isinstance(each, TrainStart)), None)
        return LiveRun(
            source,
            first_event(source) if start is None else start,
            history_bytes=self._history_bytes,
            milestone_bytes=self._milestone_bytes,
            key=self._record.key,
            series=series,
            is_coarse=is_coarse,
        )

    def _pause(self) -> None:
        self.parts_read += 1
        if self.is_abandoned:
            raise AbandonedError("reading was given up")
        if self._is_gentle():
            time.sleep(min(REST * (time.monotonic() - self._worked_since), LONGEST_REST))
        self._worked_since = time.monotonic()


def _some_events(file: int, size: int) -> Iterator[Event]:
    """Yield events of a log that are evenly spaced, with the first and the last."""
    last = -1
    for number in range(COARSE_LINES):
        place = size * number // COARSE_LINES
        start, line = _line_after(file, place, is_begin=number == 0)
        if line is None or start <= last:
            continue
        last = start
        yield from _drawn(line)
    end = os.pread(file, COARSE_PART, max(0, size - COARSE_PART))
    start = size - len(end)
    for line in end.splitlines(keepends=True):
        if start > last and line.endswith(b"\n"):
            yield from _drawn(line)
        start += len(line)


def _line_after(file: int, place: int, *, is_begin: bool) -> tuple[int, bytes | None]:
    """Return the place of the first whole line from a place on, and the line; None if there is none, or a long one."""
    part = COARSE_PART
    while part <= LONGEST_COARSE:
        content = os.pread(file, part, place)
        start = 0 if is_begin else content.find(b"\n") + 1
        end = content.find(b"\n", start)
        if (start or is_begin) and end >= 0:
            return place + start, content[start:end]
        if len(content) < part:
            break
        part *= 8
    return place, None


def _drawn(line: bytes) -> Iterator[Event]:
    try:
        event = decode(line.rstrip(b"\n"))
    except (msgspec.DecodeError, RecursionError):
        return
    if isinstance(event, Sample | TrainStart | TrainEnd | ValidationEnd | EpochEnd | UnknownEvent):
        yield event


def _batches(events: Iterator[Event], size: int) -> Iterator[list[Event]]:
    batch: list[Event] = []
    for event in events:
        batch.append(event)
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
