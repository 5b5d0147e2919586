"""The thread that writes: takes snapshots from a short queue and commits them one by one.

It is a plain thread, since what it does is `write`, `crc32` and `fsync`, all of which leave the
interpreter to others.  The end of the interpreter waits for its queue to be empty, so that a program
that forgets `close` loses nothing, unless the writer was abandoned: then a disk that hangs cannot
keep the process from leaving (which is why it is a daemon).
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from offloop.engine.checkpoint.errors import (
    CheckpointDeadlineError,
    CheckpointError,
    CheckpointWriteError,
    SnapshotBusyError,
    WriterDiedError,
)
from offloop.engine.checkpoint.manifest import CheckpointRequest
from offloop.engine.checkpoint.snapshot import Snapshot
from offloop.engine.checkpoint.store import CheckpointStore, Commit

logger = logging.getLogger(__name__)

QUEUE_SIZE = 4
"""More than slots of an arena, so that slots are what runs out; the bound is a second fence."""

OnSaved = Callable[[CheckpointRequest, Commit], None]
OnFailed = Callable[[CheckpointRequest, CheckpointError], None]


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    request: CheckpointRequest


@dataclass(frozen=True)
class _Call:
    function: Callable[[WriterDiedError | None], None]


class CheckpointWriter:
    """Commit snapshots in the background, in order.

    Args:
        store: Closed by whoever opened it, after `close` of the writer.
        on_saved: Called in the writer thread once a checkpoint is durable.
        on_failed: Called in the writer thread for each snapshot that did not become a checkpoint;
            errors that are not ours arrive as the cause of a `CheckpointWriteError`.

    Raises:
        WriterDiedError: If the system gives no thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        on_saved: OnSaved,
        on_failed: OnFailed,
        queue_size: int = QUEUE_SIZE,
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
        self._calls = 0  # those among them that hold no snapshot, which the bound is about
        self._is_closed = False
        self._death: BaseException | None = None
        self._changed = threading.Condition()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="offloop-checkpoint-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system gives no more threads, or the interpreter is about to end
            raise WriterDiedError(f"the checkpoint writer has no thread: {error}") from error
        atexit.register(self._at_exit)

    @property
    def pending(self) -> int:
        """Snapshots and calls handed over and not yet done with."""
        return self._pending

    def submit_nowait(self, snapshot: Snapshot, request: CheckpointRequest) -> None:
        """Hand a snapshot over; the writer releases it, whatever becomes of it. Never blocks.

        Raises:
            SnapshotBusyError: If the queue is full; the snapshot is still the caller's.
            WriterDiedError: If the thread is gone or was closed; likewise.
        """
        with self._changed:
            if self._death is not None or self._is_closed:
                raise WriterDiedError("the checkpoint writer has ended") from self._death
            if self._pending - self._calls >= self._queue_size:
                raise SnapshotBusyError(self._queue_size)
            self._pending += 1
            self._jobs.put(_Job(snapshot, request))

    def call_nowait(self, function: Callable[[WriterDiedError | None], None]) -> None:
        """Have a function called in the writer thread, after everything that was submitted before. Never blocks.

        Args:
            function: Called once, with None; or with the error if the thread died before its turn came. It must
                not raise.

        Raises:
            WriterDiedError: If the thread is gone or was closed; the function is not called then.
        """
        with self._changed:
            if self._death is not None or self._is_closed:
                raise WriterDiedError("the checkpoint writer has ended") from self._death
            self._pending += 1
            self._calls += 1
            self._jobs.put(_Call(function))

    def flush(self, timeout: float | None = None) -> None:
        """Return when all that was submitted is durable or has failed. Blocks.

        Raises:
            CheckpointDeadlineError: If `timeout` seconds were not enough; the work goes on.
            WriterDiedError: If the thread died on it.
        """
        with self._changed:
            is_done = self._changed.wait_for(lambda: not self._pending or self._death is not None, timeout)
            if self._death is not None:
                raise WriterDiedError("the checkpoint writer died") from self._death
            if not is_done:
                assert timeout is not None
                raise CheckpointDeadlineError(self._pending, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted, end the thread. Blocks. Calling twice is fine.

        Raises:
            CheckpointDeadlineError: If it was not finished in time; the thread then ends
                when it is.
            WriterDiedError: If the thread had died.
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
        """Let the end of the interpreter cut off what is being written. Any thread; never blocks."""
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        if os.getpid() == self._process:  # a forked child has no such thread
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
                logger.exception("on_saved failed for %s", commit.info.path)

    def _tell_failed(self, request: CheckpointRequest, error: CheckpointError) -> None:
        try:
            self._on_failed(request, error)
        except Exception:
            logger.exception("on_failed failed")
            logger.error("the checkpoint of step %d was not saved", request.step, exc_info=error)

    def _bury(self, death: BaseException) -> None:
        """Refuse new work and report what still waits; nothing is forgotten."""
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
