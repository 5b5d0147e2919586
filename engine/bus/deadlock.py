"""Waits that could never end raise `DeadlockError` at once, and the text says what to write instead.

The training thread applies a run's commands at a boundary, and the run's event loop delivers events. Code that runs
in one of these places, or that training waits for, must not block until a command applies:

    place                                        why the wait would not end
    ───────────────────────────────────────────  ─────────────────────────────────────────────────────
    training thread (step, step hook, decider)   this thread applies the command
    event loop                                   it delivers events, serves async deciders and the page
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

from offloop.engine.bus.commands import Command
from offloop.engine.bus.waker import runs_event_loop
from offloop.engine.errors import DeadlockError

T = TypeVar("T")


class Places:
    """Which threads and tasks of a run must not wait for which of its commands. Any thread."""

    def __init__(self, is_decider: Callable[[], bool]) -> None:
        """Start with no threads and no tasks.

        Args:
            is_decider: True in the context of an async decider for which training waits.
        """
        # Identities of threads and tasks. A thread or task adds and removes only its own, so these need no lock.
        self.training_thread: int | None = None
        self.event_loop_thread: int | None = None
        # By worker thread of a callback: the callback's name, and whether its full `block` subscription holds
        # training up.
        self.workers: dict[int, tuple[str, Callable[[], bool]]] = {}
        # Tasks in which callbacks handle events: the end of the run waits for them.
        self.tasks: set[int] = set()
        # Name of the callback that the training thread waits for. Written by the training thread, read by workers.
        self.awaited: str | None = None
        self._is_decider = is_decider
        self._lock = threading.Lock()
        # One event for a worker that waits for a command; under the lock.
        self._waiting: set[threading.Event] = set()

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
        """Mark a task as one in which a callback handles events."""
        self.tasks.add(task)
        try:
            yield
        finally:
            self.tasks.discard(task)

    def changed(self) -> None:
        """Make workers that wait for a command check again. Training thread, when it begins to wait for others."""
        with self._lock:
            for woken in self._waiting:
                woken.set()

    def is_plain(self) -> bool:
        """True where nothing can be awaited: in the training thread, and in a callback's worker thread.

        False in a worker thread that runs an event loop itself: code there can await.
        """
        thread = threading.get_ident()
        return thread == self.training_thread or (thread in self.workers and not runs_event_loop())

    def is_handling(self) -> bool:
        """True where a callback handles an event, which the end of the run waits for. In an event loop only."""
        return threading.get_ident() in self.workers or anyio.get_current_task().id in self.tasks

    def held_up(self) -> bool:
        """True in the worker thread of a callback for which training waits at this moment."""
        name, is_blocking = self.workers.get(threading.get_ident(), (None, None))
        return is_blocking is not None and (self.awaited == name or is_blocking())

    def completes_without(self, command: Command[Any]) -> bool:
        """True if a command that has reached its boundary completes without the help of this thread.

        A checkpoint is then being written, also while training waits. The writer needs the event loop, though: event
        logs must first hold what came before the checkpoint.
        """
        return command.rule.is_done_when_durable and threading.get_ident() != self.event_loop_thread

    def why_endless(self, command: Command[Any]) -> str | None:
        """Return why the result of a command cannot be waited for here, and what to write; None where it can."""
        thread = threading.get_ident()
        given = f"run.{command.name}_nowait(...)"
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
            return (
                f"{given}.result() would block the event loop, which the run needs: "
                f"write await run.{command.name}(...)"
            )
        if self.held_up():
            return (
                f"{given}.result() would wait for ever: training waits until this callback has handled its events. "
                f"Leave .result() out, or use {given}.add_done_callback(...)"
            )
        return None

    def wait(self, future: "CommandFuture[Any]", timeout: float | None) -> None:
        """Wait in the worker thread of a callback until a command is done or the timeout has passed.

        Raises:
            DeadlockError: Training has begun to wait for this callback.
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


class CommandFuture(Future[T]):
    """The result of a command, once it applied. Waiting where it can never come raises `DeadlockError`."""

    def __init__(self, places: Places, command: Command[T]) -> None:
        super().__init__()
        self._places = places
        self._command = command

    def result(self, timeout: float | None = None) -> T:
        """Return the result. Blocks this thread for at most `timeout` seconds.

        Raises:
            DeadlockError: The command waits for this thread.
            TimeoutError: The timeout has passed.
            RunEndedError: The run ended before the command applied.
        """
        return super().result(self._left(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the exception of the command, None if there is none. Waits and raises as `result` does."""
        return super().exception(self._left(timeout))

    def _left(self, timeout: float | None) -> float | None:
        """Wait where a callback's worker does, and return how long the caller may still wait.

        A plain `Future` could not be woken when training begins to wait for that callback.
        """
        if self.done() or (timeout is not None and timeout <= 0):
            return timeout
        self.check()
        if threading.get_ident() not in self._places.workers:
            return timeout
        self._places.wait(self, timeout)
        return 0.0

    def check(self) -> None:
        """Raise `DeadlockError` if this thread must not wait for the command."""
        # Read before `done`: if another thread completes the command between the two, it no longer runs.
        is_running = self.running()
        if self.done() or (is_running and self._places.completes_without(self._command)):
            return
        if (why := self._places.why_endless(self._command)) is not None:
            raise DeadlockError(why)
