"""FollowedRuns: the runs of a directory, whichever processes write them. Lists them, and opens those that are watched.

    RunCatalog ──refresh──> rows of the list              while a viewer has asked for the list
    RunReader ──fill, news──> LiveRun ──> Hub ──> viewers  while a viewer has the run, and a minute longer

Files are read in threads (`disk_calls.py`), so a disk that hangs holds up nothing but the run on it.
"""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec

from offloop.dashboard.protocol.from_server import RunRow, RunSummary
from offloop.dashboard.runs.directories import Directories
from offloop.dashboard.runs.disk_calls import DiskCalls
from offloop.dashboard.runs.followed_run import FollowedRun, take_in
from offloop.dashboard.runs.live_run import FINAL_STATES, LiveRun
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.dashboard.runs.page_file import page_of
from offloop.dashboard.runs.rows import row_of_record
from offloop.dashboard.runs.run_reader import LOG, LONGEST_REST, REST, AbandonedError, RunReader
from offloop.engine import RunRecord
from offloop.engine.visible_text import visible

logger = logging.getLogger("offloop")

POLL: Final = 0.25
"""Seconds between two looks at the log of a run that is watched: its writer keeps samples for most of a second."""
RECORD_INTERVAL: Final = 2.0
"""Seconds between two looks at its other files, and whether a process writes it."""
RETRY: Final = 2.0
"""Seconds until a directory that could not be read is tried again."""
REFRESH: Final = 1.0
"""Least seconds between two looks at all directories ..."""
REFRESH_SHARE: Final = 0.1
"""... which take this share of the time at most."""
KEPT_OPEN: Final = 60.0
"""Seconds that a run stays open without a viewer."""
MAX_OPEN: Final = 20
"""Most open runs ..."""
MAX_BYTES: Final = 256 * 1024 * 1024
"""... and the bytes of their curves above which those without a viewer are let go early."""
FILLING_AT_ONCE: Final = 2
"""Logs that are filled in at the same time; one whose disk does not answer is not counted."""
PATIENCE: Final = 3.0
"""Seconds after which a disk that has not answered is reported."""
AT_ONCE: Final = 0.005
"""Seconds that a thread works between two rests beside a run of this process."""
EVENTS_AT_ONCE: Final = 200
"""Events that the event loop takes in before other tasks have their turn."""

T = TypeVar("T")


class Audience(Protocol):
    """Those who watch: the hub."""

    def show(self, live: LiveRun, *, is_new_attempt: bool = False) -> None:
        """Have a run's viewers begin anew with this: it was opened, filled in again, or its facts have changed."""

    def distribute(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        """Send what a run has taken in."""

    def changed(self, live: LiveRun) -> None:
        """Send the status of a run again."""

    def listed(self, rows: Sequence[RunRow], removed: Sequence[str]) -> None:
        """Take changes of the list."""

    def named(self, *, is_first: bool) -> None:
        """Send the names of all runs, which have changed."""

    def missing(self, key: str) -> None:
        """Tell the viewers that want a run that the directory has none with this key."""

    def wanted(self, newest: str | None) -> frozenset[str]:
        """Return the keys of the runs that viewers watch or lay over others, or wait for.

        Args:
            newest: Key of the newest run, for viewers that wait for any.
        """

    def is_listening(self) -> bool:
        """Return whether a viewer wants to know which runs there are."""

    def is_training(self) -> bool:
        """Return whether a run of this process goes on. Any thread."""


class _OpenRun:
    """A run that is open, or about to be."""

    def __init__(self, reader: RunReader) -> None:
        self.reader = reader
        self.live: LiveRun | None = None
        self.scope = anyio.CancelScope()
        self.is_wanted = True
        # Monotonic time.
        self.wanted_at = time.monotonic()
        self.looked_at = 0.0
        # Set when it is wanted again.
        self.wake = anyio.Event()
        # Why its files cannot be read, and the Unix time since when; None while they can.
        self.fault: tuple[str, float] | None = None


class FollowedRuns:
    """The runs of a directory. Event loop of the dashboard only."""

    def __init__(
        self,
        runs_dir: Path,
        audience: Audience,
        calls: DiskCalls,
        *,
        history_bytes: int,
        milestone_bytes: int,
    ) -> None:
        """Open nothing, and look at nothing.

        Args:
            runs_dir: The directory. It need not exist.
            audience: The hub.
            calls: For reading files.
            history_bytes: Limit of the memory for the curves of a run.
            milestone_bytes: Limit of the memory for its milestones.
        """
        self.records: dict[str, RunRecord] = {}
        self._rows: dict[str, RunRow] = {}
        # Keys of runs whose directories are gone, and that stay in the list while somebody has them.
        self._gone: set[str] = set()
        self._keys: dict[str, str] = {}
        self.live: dict[str, LiveRun] = {}
        """The open runs by key."""
        self.problem = ""
        """Why the directory cannot be read; empty if it can."""
        self.ready = anyio.Event()
        """Set once all directories were looked at."""
        self._audience = audience
        self._calls = calls
        self._directories = Directories(runs_dir)
        self._options = {"history_bytes": history_bytes, "milestone_bytes": milestone_bytes}
        self._open: dict[str, _OpenRun] = {}
        self._wanted: frozenset[str] = frozenset()
        # Wanted runs whose viewers were told that they are opened later.
        self._postponed: set[str] = set()
        self._filling = anyio.Semaphore(FILLING_AT_ONCE)
        self._tasks: anyio.abc.TaskGroup | None = None
        # One for each task that waits: `ask` sets both, and each task replaces its own.
        self._is_asked = anyio.Event()
        self._is_list_asked = anyio.Event()

    # What viewers want

    @property
    def summaries(self) -> list[RunSummary]:
        """The runs as entries of the list of names, oldest first."""
        found = [
            RunSummary(
                key=key, name=visible(each.id), state=self._seen(self._rows[key]).state, started=each.started
            )
            for key, each in self.records.items()
        ]
        return sorted(found, key=lambda each: each.started)

    def record_in(self, directory: str) -> RunRecord | None:
        """Return what is known of a directory; None if it has no run, or was not looked at."""
        key = self._keys.get(directory)
        return None if key is None else self.records.get(key)

    @property
    def newest(self) -> str | None:
        """Key of the run that began last; None if there is none."""
        found = max(self.records.values(), key=lambda each: each.started, default=None)
        return None if found is None else found.key

    def may_have(self, key: str) -> bool:
        """Return whether there is a run with this key, as far as it is known."""
        return key in self.records or not self.ready.is_set()

    def add_directory(self, runs_dir: Path) -> None:
        """List the runs of one more directory."""
        if self._directories.add(runs_dir):
            self.ask()

    def ask(self) -> None:
        """Do now what viewers want, which has changed."""
        self._is_asked.set()
        self._is_list_asked.set()

    async def run(self) -> None:
        """Do what viewers want. Runs until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._keep_list)
            while True:
                self._sweep(time.monotonic())
                if not self._open and not self._wanted:
                    await self._is_asked.wait()
                with anyio.move_on_after(REFRESH):
                    await self._is_asked.wait()
                self._is_asked = anyio.Event()

    def _sweep(self, now: float) -> None:
        """Open what is wanted, and let go of what was not for a while."""
        self._wanted = self._audience.wanted(self.newest)
        self._postponed &= self._wanted
        for key, each in self._open.items():
            if key in self._wanted:
                each.wanted_at = now
                if not each.is_wanted:
                    each.wake.set()
            each.is_wanted = key in self._wanted
        unwanted = sorted((each.wanted_at, key) for key, each in self._open.items() if not each.is_wanted)
        new = [key for key in self._wanted if key not in self._open and key in self.records]
        over = len(self._open) + len(new) - MAX_OPEN
        for place, (since, key) in enumerate(unwanted):
            if place < over or now - since > KEPT_OPEN or self._bytes > MAX_BYTES or key in self._gone:
                self._let_go(key)
        for key in new:
            reader = RunReader(self.records[key], is_gentle=self._audience.is_training, **self._options)
            if len(self._open) >= MAX_OPEN:
                self._postpone(key, reader)
                continue
            self._postponed.discard(key)
            self._open[key] = _OpenRun(reader)
            assert self._tasks is not None
            self._tasks.start_soon(self._follow, key, self._open[key])

    @property
    def _bytes(self) -> int:
        return sum(live.history.bytes for live in self.live.values())

    def _postpone(self, key: str, reader: RunReader) -> None:
        """Tell the viewers of a run that it is opened later."""
        if key not in self._postponed:
            self._postponed.add(key)
            self._audience.show(
                reader.empty(f"{MAX_OPEN} other runs are open; it is opened when one of them has no viewer")
            )

    def _let_go(self, key: str) -> None:
        open_run = self._open.pop(key)
        self.live.pop(key, None)
        open_run.reader.is_abandoned = True
        open_run.scope.cancel()
        if key in self._gone:
            self._forget(key)
            self._audience.listed([], [key])
            self._audience.named(is_first=False)
        elif open_run.fault is not None:
            # The list has other reasons then: it does not try to read it.
            self._list(key)

    # One run

    async def _follow(self, key: str, run: _OpenRun) -> None:
        """Read a run until it is let go."""
        with run.scope:
            try:
                await self._read_on(key, run)
            except Exception:
                # A bug: it costs this run, and no other.
                logger.exception("the live page failed: run %s is no longer followed", key)
                with contextlib.suppress(Exception):
                    self._say(run, "reading it failed; the log of this server has the error")
                await anyio.sleep_forever()

    async def _read_on(self, key: str, run: _OpenRun) -> None:
        is_filled = False
        while True:
            pause = POLL
            try:
                if not is_filled:
                    await self._fill(run)
                    is_filled = True
                    if run.fault is not None:
                        run.fault = None
                        self._list(key)
                else:
                    is_filled = await self._take_news(run)
                    pause = POLL if is_filled else 0.0
            except AbandonedError:
                return
            except OSError as error:
                is_filled = False
                self._fail(key, run, error)
                pause = RETRY
            await anyio.sleep(pause)
            if not run.is_wanted and not run.wake.is_set():
                await run.wake.wait()
            run.wake = anyio.Event()

    async def _fill(self, run: _OpenRun) -> None:
        """Read the whole log; of a long one, first some lines."""
        reader = run.reader
        slot = _Slot(self._filling)
        async with slot:
            if run.live is None:
                coarse = await self._read(run, reader.coarse, slot)
                if coarse is not None:
                    self._show(run, coarse)
            series = () if run.live is None else tuple(run.live.series)
            live = await self._read(run, functools.partial(reader.fill, series), slot)
        self._show(run, live)
        self._say(run, "")

    async def _read(self, run: _OpenRun, function: Callable[[], T], slot: "_Slot | None" = None) -> T:
        """Call a function that reads a run; tell how far it is, or that the disk does not answer."""
        call = self._calls.begin(function)
        moved_at, parts = time.monotonic(), run.reader.parts_read
        while True:
            await call.wait(1.0)
            if call.is_done:
                return call.result()
            if run.reader.parts_read != parts:
                moved_at, parts = time.monotonic(), run.reader.parts_read
            quiet = time.monotonic() - moved_at
            if quiet < PATIENCE:
                if slot is not None:
                    self._say(run, f"reading the log: {run.reader.share_read:.0%}")
                continue
            if slot is not None:
                # Others may read meanwhile.
                slot.release()
            self._say(run, f"the disk has not answered for {quiet:.0f} s")

    async def _take_news(self, run: _OpenRun) -> bool:
        """Take in what is new; return False if the log has to be read again from its begin."""
        reader, live = run.reader, run.live
        assert live is not None and isinstance(live.source, FollowedRun)
        has_more = True
        while has_more:
            now = time.monotonic()
            with_record = now - run.looked_at >= RECORD_INTERVAL
            if with_record:
                run.looked_at = now
            news = await self._read(run, functools.partial(reader.news, live, with_record=with_record))
            if news.is_restarted:
                return False
            self._say(run, "")
            count, began = news.before, time.monotonic()
            if news.is_described_anew:
                live.describe_again()
                self._audience.show(live)
            for events in _parts(news.events, EVENTS_AT_ONCE):
                attempt = live.info.attempt
                milestones = take_in(live.source, live, events, news.written, count)
                count += len(events)
                if live.info.attempt != attempt:
                    self._audience.show(live, is_new_attempt=True)
                else:
                    self._audience.distribute(live, milestones)
                await anyio.lowlevel.checkpoint()
            has_more = news.has_more
            if has_more and self._audience.is_training():
                await anyio.sleep(min(REST * (news.seconds + time.monotonic() - began), LONGEST_REST))
        return True

    def _show(self, run: _OpenRun, live: LiveRun) -> None:
        run.live = self.live[live.key] = live
        self._audience.show(live)

    def _fail(self, key: str, run: _OpenRun, error: OSError) -> None:
        """Tell viewers that a run's files cannot be read, in its status and its row; its curves stay on the screen."""
        cause = _cause_of(error)
        if run.fault is None or run.fault[0] != cause:
            run.fault = cause, time.time()
            self._list(key)
        live = run.reader.empty("") if run.live is None else run.live
        assert isinstance(live.source, FollowedRun)
        live.source.fault = _fault_in_words(run.fault)
        if live is run.live:
            self._audience.changed(live)
        else:
            self._show(run, live)

    def _say(self, run: _OpenRun, note: str) -> None:
        """Tell viewers how reading a run goes; empty: well."""
        if not note and run.reader.skipped:
            note = f"{run.reader.skipped:,} lines of its log hold no event and are left out"
        if run.live is None:
            self._show(run, run.reader.empty(note))
            return
        assert isinstance(run.live.source, FollowedRun)
        if run.live.source.note != note:
            run.live.source.note = note
            self._audience.changed(run.live)

    # The list

    async def _keep_list(self) -> None:
        while True:
            if not self._is_list_wanted:
                await self._is_list_asked.wait()
                self._is_list_asked = anyio.Event()
                continue
            began = time.monotonic()
            try:
                changed, removed = await self._calls.call(self._refresh)
            except Exception:
                logger.exception("the live page cannot list %s", self._directories.first)
                changed, removed = [], []
            took = 0.0 if self._directories.rest else time.monotonic() - began
            self.problem = self._directories.problem
            for part in _parts(changed, EVENTS_AT_ONCE):
                for record, row in part:
                    self.records[record.key], self._rows[record.key] = record, row
                    self._keys[record.directory] = record.key
                    self._gone.discard(record.key)
                self._audience.listed([self._seen(row) for _, row in part], [])
                await anyio.lowlevel.checkpoint()
            shown = {key for key in removed if key in self._open and self._open[key].is_wanted}
            self._gone |= shown
            for key in shown:
                self._list(key)
            removed = [key for key in removed if key not in shown]
            for key in removed:
                self._forget(key)
            self._audience.listed([], removed)
            is_first = not self.ready.is_set()
            self.ready.set()
            if changed or removed or is_first:
                self._audience.named(is_first=is_first)
            for key in self._wanted - self.records.keys():
                self._audience.missing(key)
            self.ask()
            await anyio.sleep(max(REFRESH, took / REFRESH_SHARE - took))

    def _forget(self, key: str) -> None:
        """Know nothing of a run any more."""
        self._gone.discard(key)
        self._rows.pop(key, None)
        gone = self.records.pop(key, None)
        if gone is not None:
            self._keys.pop(gone.directory, None)

    def _list(self, key: str) -> None:
        """Send the row of a run again: what the list did not know about it has changed."""
        if key in self._rows:
            self._audience.listed([self._seen(self._rows[key])], [])
            self._audience.named(is_first=False)

    def _seen(self, row: RunRow) -> RunRow:
        """Return the row of a run with what reading it has told."""
        run = self._open.get(row.key)
        if run is not None and run.fault is not None:
            why = _fault_in_words(run.fault)
        elif row.key in self._gone:
            why = "its files are gone"
        else:
            return row
        return msgspec.structs.replace(row, why=why, state=row.state if row.state in FINAL_STATES else "lost")

    @property
    def _is_list_wanted(self) -> bool:
        return self._audience.is_listening() or bool(self._wanted - self.records.keys())

    def _refresh(self) -> tuple[list[tuple[RunRecord, RunRow]], list[str]]:
        """Look at all directories. In a thread; blocks."""
        self._directories.rest = REST if self._audience.is_training() else 0.0
        changed, removed = self._directories.refresh()
        rows = []
        since = time.monotonic()
        # The newest first: a long list comes in parts.
        for record in sorted(changed, key=lambda each: -each.created):
            goes_on = not record.has_ended and record.state != "lost"
            page = page_of(Path(record.directory)) if goes_on else None
            rows.append((record, row_of_record(record, page)))
            if self._directories.rest and (worked := time.monotonic() - since) > AT_ONCE:
                time.sleep(min(self._directories.rest * worked, LONGEST_REST))
                since = time.monotonic()
        return rows, removed


class _Slot:
    """A place among the logs that are filled in, which may be given back early."""

    def __init__(self, places: anyio.Semaphore) -> None:
        self._places = places
        self._is_held = False

    async def __aenter__(self) -> None:
        await self._places.acquire()
        self._is_held = True

    async def __aexit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the place back; twice is fine."""
        if self._is_held:
            self._is_held = False
            self._places.release()


def _cause_of(error: OSError) -> str:
    """Return in words why files cannot be read."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return (error.strerror or str(error)).lower()
    name = os.path.basename(str(error.filename or ""))
    return f"{name if name == LOG else 'its directory'} was deleted or renamed"


def _fault_in_words(fault: tuple[str, float]) -> str:
    cause, since = fault
    then, today = time.localtime(since), time.localtime()
    day = "" if then[:3] == today[:3] else time.strftime("%Y-%m-%d ", then)
    return f"cannot be read since {day}{time.strftime('%H:%M:%S', then)}: {cause}"


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
