"""Waits that could never end: they raise instead, at once, and say what to write.

A run's commands are applied by its training thread, at a boundary, and its events are handed on by its event loop.
Code that runs in one of these places, or that training waits for, must not block until a command is applied:

    place                                        why its wait would not end
    ───────────────────────────────────────────  ─────────────────────────────────────────────────────
    training thread (step, step hook, decider)   it is the one that applies the command
    event loop                                   it hands events on, serves async deciders and the page
    what an async decider waits for              training waits for that decider
    worker thread of a callback                  training waits for that callback, see `Places.held_up`

`await run.stop()` is safe wherever code can await: while training waits for others, it returns on acceptance.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from offloop.engine.errors import DeadlockError

T = TypeVar("T")


class Places:
    """Which threads and tasks of a run must not wait for which of its commands. Any thread."""

    def __init__(self, is_decider: Callable[[], bool]) -> None:
        """Begin with none.

        Args:
            is_decider: True in the context of an async decider for which training waits.
        """
        # Identities of threads and tasks. Each is written by the thread or task that it means.
        self.training_thread: int | None = None
        self.event_loop_thread: int | None = None
        # By worker thread of a callback: its name, and whether it holds training up by a full `block` subscription.
        self.workers: dict[int, tuple[str, Callable[[], bool]]] = {}
        # Tasks that the end of the run waits for: those in which callbacks handle events.
        self.tasks: set[int] = set()
        # Name of the callback that the training thread waits for; written by that thread.
        self.awaited: str | None = None
        self._is_decider = is_decider
        self._lock = threading.Lock()
        self._waiting: set[threading.Event] = set()  # of workers that wait for a command; under the lock

    @contextmanager
    def worker(self, name: str, is_blocking: Callable[[], bool]) -> Iterator[None]:
        """Mark this thread as the worker of a callback."""
        thread = threading.get_ident()
        self.workers[thread] = name, is_blocking
        try:
            yield
        finally:
            del self.workers[thread]

    @contextmanager
    def task(self, task: int) -> Iterator[None]:
        """Mark a task as one that the end of the run waits for."""
        self.tasks.add(task)
        try:
            yield
        finally:
            self.tasks.discard(task)

    def changed(self) -> None:
        """Have workers that wait for a command look again. Training thread, when it begins to wait for others."""
        with self._lock:
            for each in self._waiting:
                each.set()

    def is_plain(self) -> bool:
        """True where nothing can be awaited: in the training thread, and in a callback's worker thread as it is.

        A worker thread may run an event loop of its own, which can wait for a command as any other can.
        """
        thread = threading.get_ident()
        return thread == self.training_thread or (thread in self.workers and not _runs_event_loop())

    def is_handling(self) -> bool:
        """True where a callback handles an event, for which the end of the run waits. In an event loop only."""
        return threading.get_ident() in self.workers or anyio.get_current_task().id in self.tasks

    def held_up(self) -> bool:
        """True in the worker thread of a callback for which training waits at this moment."""
        name, is_blocking = self.workers.get(threading.get_ident(), (None, None))
        return is_blocking is not None and (self.awaited == name or is_blocking())

    def completes_without(self, command: str) -> bool:
        """True if a command that was taken at its boundary is completed without the help of this thread.

        A checkpoint is on its way to the disk, also while training waits. The event loop is needed even so: by the
        logs that must have what came before.
        """
        return command in ("checkpoint", "tag") and threading.get_ident() != self.event_loop_thread

    def why_endless(self, command: str) -> str | None:
        """Return why the result of a command cannot be waited for here, and what to write; None where it can."""
        thread = threading.get_ident()
        given = f"run.{command}_nowait(...)"
        if thread == self.training_thread:
            return (
                f"{given}.result() would wait for ever: this is the training thread, which applies commands at its "
                f"next boundary. Leave .result() out: {given} alone takes effect there"
            )
        if self._is_decider():
            return (
                f"{given}.result() would wait for ever: training waits for this decider. Leave .result() out: "
                f"{given} alone takes effect when the decider returns"
            )
        if thread == self.event_loop_thread:
            return f"{given}.result() would block the event loop, which the run needs: write await run.{command}(...)"
        if self.held_up():
            return (
                f"{given}.result() would wait for ever: training waits until this callback has handled its events. "
                f"Leave .result() out, or use {given}.add_done_callback(...)"
            )
        return None

    def wait(self, future: "CommandFuture[Any]", timeout: float | None) -> None:
        """Wait in the worker thread of a callback until a command is done or the time is over.

        Raises:
            DeadlockError: Training has begun to wait for this very callback.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        woken = threading.Event()
        future.add_done_callback(lambda _: woken.set())
        with self._lock:
            self._waiting.add(woken)
        try:
            while not future.done():
                woken.clear()
                future.check()
                left = None if deadline is None else deadline - time.monotonic()
                if future.done() or (left is not None and left <= 0):
                    return
                woken.wait(left)
        finally:
            with self._lock:
                self._waiting.discard(woken)


def _runs_event_loop() -> bool:
    """True if this code runs in an event loop of this thread."""
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:
        return False
    return True


class CommandFuture(Future[T]):
    """The result of a command, once it was applied. Waiting for it where it can never come raises `DeadlockError`."""

    def __init__(self, places: Places, command: str) -> None:
        super().__init__()
        self._places = places
        self._command = command

    def result(self, timeout: float | None = None) -> T:
        """Return the result, waiting for it at most `timeout` seconds. Blocks this thread.

        Raises:
            DeadlockError: This thread is one that the command waits for.
            TimeoutError: The time is over.
            RunEndedError: The run ended before the command was applied.
        """
        return super().result(self._left(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the command raised, None if nothing; waits and raises as `result`."""
        return super().exception(self._left(timeout))

    def _left(self, timeout: float | None) -> float | None:
        """Return how long to wait still, after what the place of this thread allows."""
        if self.done() or (timeout is not None and timeout <= 0):
            return timeout
        self.check()
        if threading.get_ident() not in self._places.workers:
            return timeout
        self._places.wait(self, timeout)
        return 0.0

    def check(self) -> None:
        """Raise `DeadlockError` if this thread must not wait for the command."""
        # Looked at before `done`: another thread may complete it between the two, and it then is no longer running.
        is_running = self.running()
        if self.done() or (is_running and self._places.completes_without(self._command)):
            return
        if (why := self._places.why_endless(self._command)) is not None:
            raise DeadlockError(why)
