"""RunCatalog: all runs below a directory, kept up to date at little cost.

    thread of the caller                   reading thread
    ────────────────────                   ──────────────
    refresh() ── places to look at ──────> one after the other: directories, then the runs in them
        waits, while it gets on
        a place takes too long ──────────> left alone with it; another thread takes the rest
    changed, removed <────────────────────

A run that has ended, or was killed, costs some calls of `stat` each time. A run that goes on has its locks and the end
of its log read. A directory that does not answer, on a disk that hangs, keeps its thread until it does; others are read
meanwhile.
"""

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from offloop.engine.bus.threads import Thread
from offloop.engine.catalog.labels import LABELS_JSON
from offloop.engine.catalog.record import RunRecord, make_record, unreadable
from offloop.engine.checkpoint.lock import LOCK
from offloop.engine.monitor import is_better
from offloop.engine.observers.event_log import FILE_NAME
from offloop.engine.paths import RUN_JSON, absolute_path

DEPTH: Final = 3
"""Levels of directories below that of the runs in which runs are looked for."""
NO_ANSWER: Final = 5.0
"""Seconds after which a directory that does not answer is left out."""
AT_ONCE: Final = 0.005
"""Seconds of work between two rests."""
LONGEST_REST: Final = 0.5
"""Seconds: what took longer waited for the disk."""
NEVER: Final = float("-inf")
FILES: Final = (RUN_JSON, FILE_NAME, LABELS_JSON, LOCK)
"""Files whose changes make a record out of date."""


class _Place(NamedTuple):
    """A directory to look at."""

    key: str
    """Relative to that of the runs; empty for itself."""
    path: str
    depth: int

    def inside(self, name: str) -> "_Place":
        """Return the directory of a name in it."""
        key = f"{self.key}/{name}" if self.key else name
        return _Place(key, os.path.join(self.path, name), self.depth + 1)


class _Known(msgspec.Struct):
    """What was known of a run at the last look."""

    record: RunRecord
    marks: tuple[object, ...]
    """Sizes and times of its files."""
    log_mark: object
    grew: float
    """Monotonic time at which its log was seen growing; `NEVER` if it was not."""


class _Walk:
    """A walk over places, by one thread."""

    def __init__(self, places: Iterable[_Place], found: Mapping[str, _Known]) -> None:
        self.found = dict(found)
        self.problem = ""
        self.is_done = threading.Event()
        # Guards the next three, which the reading thread and the caller use.
        self._lock = threading.Lock()
        self._places = deque(places)
        self._at: tuple[_Place, float] | None = None
        self._is_given_up = False

    def add(self, places: Iterable[_Place]) -> None:
        """Visit these, too. Reading thread."""
        with self._lock:
            self._places.extend(places)

    def next_place(self) -> _Place | None:
        """Return where to look next; None at the end. Reading thread."""
        with self._lock:
            if self._is_given_up or not self._places:
                self._at = None
                return None
            place = self._places.popleft()
            self._at = (place, time.monotonic())
            return place

    def give_up(self, seconds: float) -> "tuple[_Place, _Walk] | None":
        """End the walk if it has been at one place for so long. The caller's thread.

        Returns:
            The place, and a walk over those that are left.
        """
        with self._lock:
            if self._at is None or time.monotonic() - self._at[1] < seconds:
                return None
            self._is_given_up = True
            return self._at[0], _Walk(self._places, self.found)


class RunCatalog:
    """All runs in a directory and in up to three levels below it. One thread at a time; everything blocks.

    Links are not followed, hidden directories are left out, and in the directory of a run no runs are looked for.
    """

    def __init__(self, runs_dir: Path | str) -> None:
        """Know of no run yet.

        Args:
            runs_dir: Directory of runs, or that of one run. It need not exist.
        """
        self.runs_dir = absolute_path(runs_dir)
        self.problem = ""
        """Why the directory itself cannot be read, in words; empty if it can."""
        self.no_answer = NO_ANSWER
        """Seconds after which a directory that does not answer is left out."""
        self.rest = 0.0
        """Seconds that reading rests for each second that it works, to leave the interpreter to other threads."""
        # Written by the caller's thread between two walks
        self._known: dict[str, _Known] = {}
        # Keys of directories that do not answer, with the threads that wait for them.
        self._stuck: dict[str, Thread] = {}

    @property
    def records(self) -> dict[str, RunRecord]:
        """All runs by key, as of the last `refresh`."""
        return {key: known.record for key, known in self._known.items()}

    def refresh(self) -> tuple[list[RunRecord], list[str]]:
        """Look at all runs again. Blocks on the file system, and at most five seconds on a directory that hangs.

        Returns:
            The runs that are new or have changed, and the keys of those that are gone.
        """
        self._stuck = {key: thread for key, thread in self._stuck.items() if not thread.is_over}
        walk = _Walk([_Place("", str(self.runs_dir), 0)], {})
        thread = self._start(walk)
        while not walk.is_done.wait(self.no_answer / 5):
            if left := walk.give_up(self.no_answer):
                place, walk = left
                self._stuck[place.key] = thread
                thread = self._start(walk)
        self.problem = walk.problem
        for key in self._stuck:
            self._keep(_Place(key, "", 0), walk, "its directory does not answer")
        before, found = self._known, walk.found
        self._known = found
        changed = [
            known.record
            for key, known in found.items()
            if key not in before or before[key].record != known.record
        ]
        return changed, [key for key in before if key not in found]

    def _start(self, walk: _Walk) -> Thread:
        thread = Thread(lambda: self._walk(walk), name="offloop-catalog", daemon=True)
        thread.start()
        return thread

    def _walk(self, walk: _Walk) -> None:
        """Look at all places. Reading thread."""
        stuck = set(self._stuck)
        since = time.monotonic()
        while place := walk.next_place():
            # Time spent waiting for the interpreter counts: other threads waited for it as long.
            if self.rest and (worked := time.monotonic() - since) > AT_ONCE:
                time.sleep(min(self.rest * worked, LONGEST_REST))
                since = time.monotonic()
            if place.key in stuck:
                continue
            try:
                self._look_at(place, walk)
            except OSError as error:
                why = unreadable(error)
                if not place.key:
                    walk.problem = f"{place.path} {why}"
                if not isinstance(error, FileNotFoundError | NotADirectoryError):
                    self._keep(place, walk, why, is_lost=True)
        walk.is_done.set()

    def _look_at(self, place: _Place, walk: _Walk) -> None:
        key = place.key or os.path.basename(place.path)
        before = self._known.get(key)
        marks = None
        if before is not None:
            if place.key and not stat.S_ISDIR(os.lstat(place.path).st_mode):
                raise NotADirectoryError
            marks = [_mark(os.path.join(place.path, name)) for name in FILES]
        if marks is None or not (marks[0] or marks[1]):
            inside = _directories_unless_run(place.path)
            if inside is not None:
                if place.depth < DEPTH:
                    walk.add(place.inside(name) for name in inside)
                return
            marks = [_mark(os.path.join(place.path, name)) for name in FILES]
        walk.found[key] = _look_at_run(key, place.path, marks, before)

    def _keep(self, place: _Place, walk: _Walk, why: str, *, is_lost: bool = False) -> None:
        """Keep what was known of a directory that cannot be read, and of those in it. Without that, it may be a run.

        Args:
            place: The directory.
            walk: Finds it.
            why: Why it cannot be read.
            is_lost: True if nothing tells any more how the runs go on.
        """
        is_known = False
        for key, known in self._known.items():
            if not place.key or key == place.key or key.startswith(f"{place.key}/"):
                is_known = True
                is_over = known.record.has_ended or not is_lost
                record = msgspec.structs.replace(
                    known.record, why=why, state=known.record.state if is_over else "lost"
                )
                walk.found[key] = _Known(record=record, marks=(), log_mark=known.log_mark, grew=known.grew)
        if place.key and not is_known:
            record = RunRecord(
                key=place.key,
                directory=str(self.runs_dir / place.key),
                id=place.key.rpartition("/")[2],
                state="lost",
                why=why,
            )
            walk.found[place.key] = _Known(record=record, marks=(), log_mark=None, grew=NEVER)


def _look_at_run(key: str, path: str, marks: list[object], before: _Known | None) -> _Known:
    log_mark, grew = marks[1], NEVER
    if before is not None:
        has_grown = before.log_mark is not None and before.log_mark != log_mark
        grew = time.monotonic() if has_grown else before.grew
        # A lost run that goes on again writes its run.json first
        is_over = before.record.has_ended or before.record.state == "lost"
        if is_over and before.marks == tuple(marks):
            return before
    silent = None if grew == NEVER else time.monotonic() - grew
    record = make_record(key, path, silent=silent)
    if before is not None:
        record = _with_best_of(before.record, record)
    return _Known(record=record, marks=tuple(marks), log_mark=log_mark, grew=grew)


def _with_best_of(before: RunRecord, now: RunRecord) -> RunRecord:
    """Return the record of a run that goes on with the best values that were known, of a log that grew too long."""
    if now.has_ended or now.attempt != before.attempt:
        return now
    metrics = dict(now.metrics)
    for name, old in before.metrics.items():
        new = metrics.setdefault(name, old)
        if new.best is None and old.best is not None and old.mode is not None:
            is_new = is_better(new.last, old.best, old.mode)
            best, step = (new.last, now.step) if is_new else (old.best, old.best_step)
            metrics[name] = msgspec.structs.replace(new, best=best, best_step=step)
    return msgspec.structs.replace(now, metrics=metrics, sparkline=now.sparkline or before.sparkline)


def _mark(path: str) -> object:
    """Return what changes when a file does; None if it is missing."""
    try:
        state = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (state.st_mtime_ns, state.st_size, state.st_ino)


def _directories_unless_run(path: str) -> list[str] | None:
    """Return the directories in a directory, sorted; None if it is that of a run."""
    inside = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name in (RUN_JSON, FILE_NAME):
                return None
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                inside.append(entry.name)
    return sorted(inside)
