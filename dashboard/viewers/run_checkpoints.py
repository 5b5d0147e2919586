"""RunCheckpoints: the checkpoints of runs for viewers: their list, what verifies and tags them. Event loop only.

Everything is read and written in threads of `DiskCalls`, one at a time for each run.
"""

import functools
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import msgspec

from offloop.dashboard.protocol.encoding import number
from offloop.dashboard.protocol.from_server import Ack, CheckpointRow, Checkpoints
from offloop.dashboard.protocol.from_viewer import EditCheckpoint, ListCheckpoints
from offloop.dashboard.runs.disk_calls import DiskCalls
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.viewers.connection import Connection
from offloop.engine import OffloopError, TagCheckpoint
from offloop.engine.checkpoint import CheckpointError, CheckpointReader, CheckpointStore

T = TypeVar("T")

RUNS_REMEMBERED: Final = 100
"""Runs whose manifests and verifications are remembered."""
MAX_WAITING: Final = 200
"""Most requests about one run that wait for the disk."""


class Verified(NamedTuple):
    """What reading every byte of a checkpoint has found."""

    created: float
    """When the checkpoint was taken, to tell it from a later one of that name."""
    at: float
    damaged: str


class _Run:
    """What is known of the checkpoints of one run directory."""

    def __init__(self, directory: str) -> None:
        # In the thread of a call, and there is one at a time.
        self.reader = CheckpointReader(directory)
        # By name.
        self.verified: dict[str, Verified] = {}
        self.is_busy = False
        # Viewers that want the list, and those whose edits wait.
        self.listening: list[Connection] = []
        self.edits: deque[tuple[Connection, EditCheckpoint]] = deque()

    @property
    def verifying(self) -> list[str]:
        """Names of checkpoints that are to be verified."""
        return [edit.checkpoint for _, edit in self.edits if edit.action == "verify"]


class RunCheckpoints:
    """Lists, verifies and tags the checkpoints of runs for viewers."""

    def __init__(
        self,
        calls: DiskCalls,
        directory_of: Callable[[str], str | None],
        find: Callable[[str], LiveRun | None],
        post: Callable[[Callable[[], None]], object],
    ) -> None:
        """Read nothing yet.

        Args:
            calls: For files.
            directory_of: Returns the directory of a run, by its key; None for an unknown run.
            find: Returns a run, by its key, if it is here or open.
            post: Calls a function on the event loop. Any thread.
        """
        self._calls = calls
        self._directory_of = directory_of
        self._find = find
        self._post = post
        # By key.
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    def send(self, connection: Connection, request: ListCheckpoints) -> None:
        """Send a viewer the checkpoints of a run."""
        directory = self._directory_of(request.run)
        if directory is None:
            connection.put(Checkpoints(run=request.run, rows=[], error="this run has no directory"))
            return
        run = self._run(request.run, directory)
        if connection not in run.listening:
            run.listening.append(connection)
        self._go_on(request.run, run)

    def edit(self, connection: Connection, request: EditCheckpoint) -> None:
        """Do what a viewer wants with a checkpoint, and answer it."""
        why = connection.why_rejected(request.id, "an edit")
        directory = self._directory_of(request.run)
        if not why and directory is None:
            why = f"there is no run {request.run!r} with a directory"
        if why or directory is None:
            connection.put(_ack(request, why))
            return
        run = self._run(request.run, directory)
        live = self._find(request.run)
        is_going_on = live is not None and live.source is not None and not live.is_over
        if request.action != "verify" and is_going_on:
            assert live is not None and live.source is not None
            if not live.source.is_here:
                connection.put(
                    _ack(request, "the process that trains this run writes its tags: use its own page")
                )
            elif request.action == "untag":
                connection.put(_ack(request, "a run that goes on keeps its tags"))
            else:
                self._command(connection, request, live)
        elif len(run.edits) >= MAX_WAITING:
            connection.put(_ack(request, f"{MAX_WAITING} requests wait for the disk"))
        else:
            run.edits.append((connection, request))
            self._go_on(request.run, run)

    def forget(self, connection: Connection) -> None:
        """Send a viewer that is gone no list."""
        for run in self._runs.values():
            if connection in run.listening:
                run.listening.remove(connection)

    def _run(self, key: str, directory: str) -> _Run:
        run = self._runs.get(key)
        if run is None or run.reader.directory != Path(directory):
            run = self._runs[key] = _Run(directory)
        self._runs.move_to_end(key)
        for old in [each for each, run in self._runs.items() if not run.is_busy][:-RUNS_REMEMBERED]:
            del self._runs[old]
        return run

    def _go_on(self, key: str, run: _Run) -> None:
        """Begin the next call about a run, unless one is in progress: lists first, since they are quick."""
        if run.is_busy:
            return
        if run.listening:
            viewers, run.listening = run.listening, []
            self._begin(
                key,
                run,
                functools.partial(checkpoint_rows, run.reader),
                functools.partial(self._listed, key, run, viewers),
            )
        elif run.edits:
            self._begin(
                key,
                run,
                functools.partial(_apply, run.reader, run.edits[0][1]),
                functools.partial(self._edited, run),
            )

    def _begin(
        self, key: str, run: _Run, work: Callable[[], T], then: Callable[[Callable[[], T]], None]
    ) -> None:
        """Begin a call; `then` gets what returns its result, or raises why there is none."""
        run.is_busy = True

        def done(result: Callable[[], T]) -> None:
            run.is_busy = False
            then(result)
            self._post(lambda: self._go_on(key, run))

        try:
            self._calls.begin(work, lambda call: done(call.result))
        except OSError as error:
            done(functools.partial(_raise, error))

    def _listed(
        self, key: str, run: _Run, viewers: list[Connection], result: Callable[[], list[CheckpointRow]]
    ) -> None:
        rows, why = [], ""
        try:
            rows = [_with(row, run.verified.get(row.name)) for row in result()]
        except (OffloopError, OSError) as error:
            why = str(error)
        message = Checkpoints(run=key, rows=rows, verifying=run.verifying, error=why)
        for connection in viewers:
            connection.put(message)

    def _edited(self, run: _Run, result: Callable[[], Verified | None]) -> None:
        connection, request = run.edits.popleft()
        why = ""
        try:
            verified = result()
        except (OffloopError, OSError, ValueError) as error:
            why = str(error)
        else:
            if verified is not None:
                run.verified[request.checkpoint] = verified
        connection.put(_ack(request, why))
        if connection not in run.listening:
            run.listening.append(connection)

    def _command(self, connection: Connection, request: EditCheckpoint, live: LiveRun) -> None:
        """Have the run set a tag, which holds the lock of its checkpoints."""
        assert live.source is not None
        try:
            future = live.source.give_nowait(
                TagCheckpoint(request.tag, request.move, request.checkpoint),
                by=f"viewer {connection.viewer.address}",
            )
        except OffloopError as error:
            connection.put(_ack(request, str(error)))
            return

        def answer(future: Future[Any]) -> None:
            error = None if future.cancelled() else future.exception()
            why = "the run is over" if future.cancelled() else "" if error is None else str(error)
            connection.put(_ack(request, why))
            self.send(connection, ListCheckpoints(run=request.run))

        future.add_done_callback(lambda future: self._post(lambda: answer(future)))


# In the thread of a call -------------------------------------------------------------------------


def checkpoint_rows(reader: CheckpointReader) -> list[CheckpointRow]:
    """Return the checkpoints of a run, oldest first, damaged ones last. Blocks."""
    best, last = _name_of(reader, "best"), _name_of(reader, "last")
    tags = reader.tags()
    rows = [
        CheckpointRow(
            name=info.name,
            path=str(info.path.absolute()),
            step=info.step,
            epoch=info.manifest.epoch,
            attempt=info.manifest.attempt,
            reason=info.manifest.reason,
            created=info.manifest.created,
            bytes=info.bytes,
            metrics={key: number(value) for key, value in info.metrics.items()},
            is_best=info.name == best,
            is_last=info.name == last,
            tags=sorted(tag for tag, name in tags.items() if name == info.name),
        )
        for info in reader.checkpoints()
    ]
    damaged = [CheckpointRow(name=error.path.name, path="", damaged=str(error)) for error in reader.damaged()]
    return rows + damaged


def _name_of(reader: CheckpointReader, which: str) -> str | None:
    try:
        return reader.find(which).name
    except CheckpointError:
        return None


def _apply(reader: CheckpointReader, request: EditCheckpoint) -> Verified | None:
    """Do what a viewer wants, and return what a verification has found.

    Raises:
        OffloopError, OSError, ValueError: It cannot be done.
    """
    # The name comes from elsewhere: it is looked up among the checkpoints, and never taken as a path.
    info = next((each for each in reader.checkpoints() if each.name == request.checkpoint), None)
    if info is None:
        raise CheckpointError(f"there is no checkpoint {request.checkpoint!r} any more")
    if request.action == "verify":
        damaged = ""
        try:
            reader.verify(info)
        except CheckpointError as error:
            damaged = str(error).removeprefix(f"{info.path}: ").removeprefix(f"{info.path}/")
        return Verified(info.manifest.created, time.time(), damaged)
    with CheckpointStore(reader.directory) as store:
        if request.action == "tag":
            store.tag(request.tag, info.name, move=request.move)
        elif reader.tags().get(request.tag) == info.name:
            store.untag(request.tag)
        else:
            raise CheckpointError(f"{info.name} has no tag {request.tag!r}")
    return None


def _raise(error: OSError) -> NoReturn:
    raise error


def _with(row: CheckpointRow, verified: Verified | None) -> CheckpointRow:
    """Add what a verification has found."""
    if verified is None or verified.created != row.created:
        return row
    return msgspec.structs.replace(row, verified=verified.at, damaged=verified.damaged)


def _ack(request: EditCheckpoint, why: str) -> Ack:
    return Ack(id=request.id, name=request.action, state="rejected" if why else "applied", why=why)
