"""The checkpoint writer: a thread that takes snapshots from a short queue and commits them one by one.

A plain thread is enough, because `write`, `crc32` and `fsync` release the interpreter. At exit the interpreter waits
for the queue to be empty, so that a program that forgets `close` loses nothing. The thread is a daemon for the one
exception: after `abandon`, a disk that hangs cannot keep the process from exiting.
"""

import atexit
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from offloop.engine.checkpoint.errors import (
    CheckpointDeadlineError,
    CheckpointError,
    CheckpointWriteError,
    SnapshotBusyError,
    WriterDiedError,
)
from offloop.engine.checkpoint.manifest import CheckpointRequest
from offloop.engine.checkpoint.snapshot import Snapshot

logger = logging.getLogger("offloop")

QUEUE_SIZE = 4
"""More than the slots of an arena, so that slots run out first."""

OnFailed = Callable[[CheckpointRequest, CheckpointError], None]

CommitT = TypeVar("CommitT")
CommitT_co = TypeVar("CommitT_co", covariant=True)


class Store(Protocol[CommitT_co]):
    """Where snapshots go: a `CheckpointStore`, or the `PartStore` of a rank above 0."""

    @property
    def directory(self) -> Path: ...
    def commit(self, snapshot: Snapshot, request: CheckpointRequest) -> CommitT_co: ...


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    request: CheckpointRequest


@dataclass(frozen=True)
class _Call:
    function: Callable[[WriterDiedError | None], None]


class CheckpointWriter(Generic[CommitT]):
    """Commits snapshots in the background, in order.

    Args:
        store: The caller closes it after `close` of the writer.
        on_saved: Called in the writer thread with what `commit` returned, when a checkpoint is durable.
        on_failed: Called in the writer thread when a snapshot could not be saved. Errors that are no
            `CheckpointError` arrive as the cause of a `CheckpointWriteError`.

    Raises:
        WriterDiedError: The system provides no thread.
    """

    def __init__(
        self,
        store: Store[CommitT],
        *,
        on_saved: Callable[[CheckpointRequest, CommitT], None],
        on_failed: OnFailed,
        queue_size: int = QUEUE_SIZE,
        name: str = "offloop-checkpoint-writer",
    ) -> None:
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {queue_size}")
        self._store = store
        self._on_saved = on_saved
        self._on_failed = on_failed
        self._queue_size = queue_size
        self._jobs: queue.SimpleQueue[_Job | _Call | None] = queue.SimpleQueue()
        # Guarded by _changed: raised by submit, lowered by the writer thread.
        self._pending = 0
        # Those of them without a snapshot; they do not count for `queue_size`.
        self._calls = 0
        self._is_closed = False
        self._death: BaseException | None = None
        self._changed = threading.Condition()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        # The system has no more threads, or the interpreter is ending.
        except RuntimeError as error:
            raise WriterDiedError(f"the checkpoint writer has no thread: {error}") from error
        atexit.register(self._at_exit)

    @property
    def pending(self) -> int:
        """Snapshots and calls that were submitted and are not finished."""
        return self._pending

    def submit_nowait(self, snapshot: Snapshot, request: CheckpointRequest) -> None:
        """Queue a snapshot. The writer releases it in any case, unless this raises. Never blocks.

        Raises:
            SnapshotBusyError: The queue is full.
            WriterDiedError: The thread has ended or was closed.
        """
        with self._changed:
            if self._death is not None or self._is_closed:
                raise WriterDiedError("the checkpoint writer has ended") from self._death
            if self._pending - self._calls >= self._queue_size:
                raise SnapshotBusyError(self._queue_size)
            self._pending += 1
            self._jobs.put(_Job(snapshot, request))

    def call_nowait(self, function: Callable[[WriterDiedError | None], None]) -> None:
        """Call a function in the writer thread, after everything that was submitted before. Never blocks.

        Args:
            function: Called once, with None, or with the error if the thread died first. Must not raise.

        Raises:
            WriterDiedError: The thread has ended or was closed; the function is not called.
        """
        with self._changed:
            if self._death is not None or self._is_closed:
                raise WriterDiedError("the checkpoint writer has ended") from self._death
            self._pending += 1
            self._calls += 1
            self._jobs.put(_Call(function))

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything submitted is durable or has failed. Blocks.

        Raises:
            CheckpointDeadlineError: `timeout` seconds were not enough; the writer continues.
            WriterDiedError: The thread died.
        """
        with self._changed:
            is_done = self._changed.wait_for(lambda: not self._pending or self._death is not None, timeout)
            if self._death is not None:
                raise WriterDiedError("the checkpoint writer died") from self._death
            if not is_done:
                assert timeout is not None
                raise CheckpointDeadlineError(self._pending, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finish everything submitted and end the thread. Blocks. Calling twice is fine.

        Raises:
            CheckpointDeadlineError: `timeout` seconds were not enough; the thread ends when it has finished.
            WriterDiedError: The thread died.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._jobs.put(None)
        self.flush(timeout)
        self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        atexit.unregister(self._at_exit)

    def abandon(self) -> None:
        """Do not wait for the writer at the interpreter's exit. Any thread; never blocks."""
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        # A forked child has no such thread.
        if os.getpid() == self._process:
            with suppress(CheckpointError):
                self.close()

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                try:
                    if isinstance(job, _Call):
                        self._call(job, None)
                    else:
                        self._save(job)
                finally:
                    if isinstance(job, _Job):
                        job.snapshot.release()
                    with self._changed:
                        self._pending -= 1
                        self._calls -= isinstance(job, _Call)
                        self._changed.notify_all()
        except BaseException as error:
            logger.exception("the checkpoint writer died")
            self._bury(error)

    def _call(self, call: _Call, death: WriterDiedError | None) -> None:
        try:
            call.function(death)
        except Exception:
            logger.exception("a function in the checkpoint writer failed")

    def _save(self, job: _Job) -> None:
        try:
            commit = self._store.commit(job.snapshot, job.request)
        except CheckpointError as error:
            self._tell_failed(job.request, error)
        except Exception as error:
            wrapped = CheckpointWriteError(self._store.directory, None, repr(error))
            wrapped.__cause__ = error
            self._tell_failed(job.request, wrapped)
        except BaseException:
            self._tell_failed(job.request, WriterDiedError("the checkpoint writer died"))
            raise
        else:
            try:
                self._on_saved(job.request, commit)
            except Exception:
                logger.exception("on_saved failed for the checkpoint of step %d", job.request.step)

    def _tell_failed(self, request: CheckpointRequest, error: CheckpointError) -> None:
        try:
            self._on_failed(request, error)
        except Exception:
            logger.exception("on_failed failed")
            logger.error("the checkpoint of step %d was not saved", request.step, exc_info=error)

    def _bury(self, death: BaseException) -> None:
        """Refuse new work and report everything that waits as failed."""
        with self._changed:
            self._death = death
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if isinstance(job, _Call):
                self._call(job, WriterDiedError("the checkpoint writer died"))
            elif job is not None:
                self._tell_failed(job.request, WriterDiedError("the checkpoint writer died"))
                job.snapshot.release()
        with self._changed:
            self._pending = 0
            self._changed.notify_all()
