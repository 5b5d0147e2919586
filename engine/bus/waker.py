"""Wake a task of an event loop from any thread, without ever waiting for that loop.

`anyio.from_thread` and portals wait until the event loop has run the call; a training thread must not. What each
backend offers below them only appends the call and wakes the loop: asyncio and uvloop with the pipe that they have
registered for as long as they run, trio likewise. So a waker needs no file descriptor of its own, and a wait need not
register one: that took most of its time.
"""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

__all__ = ["Waker", "result_of", "runs_event_loop"]

T = TypeVar("T")


class Waker:
    """One task waits, any thread wakes it. Wakes before the wait, or several at once, count as one.

    Belongs to an event loop during a wait only.
    """

    def __init__(self) -> None:
        # Set by the threads that wake, cleared by the task after its wait.
        self._is_woken = False
        # Set by the task while it waits, taken by a thread that wakes. The task sets it and then looks at `_is_woken`;
        # the thread does both the other way round, so one of the two sees the other.
        self._wake_task: Callable[[], None] | None = None

    def wake(self) -> None:
        """Wake the waiting task, or the next one that waits. Any thread, also a signal handler; never blocks."""
        self._is_woken = True
        wake_task, self._wake_task = self._wake_task, None
        if wake_task is not None:
            wake_task()

    async def wait(self) -> None:
        """Wait until woken. One task at a time. Cancellation: safe, no wake is lost."""
        if self._is_woken:
            await anyio.lowlevel.checkpoint()
        else:
            woken = anyio.Event()
            self._wake_task = _from_any_thread(woken.set)
            try:
                if not self._is_woken:
                    await woken.wait()
            finally:
                self._wake_task = None
        self._is_woken = False


def _from_any_thread(function: Callable[[], None]) -> Callable[[], None]:
    """Return what has a function called by this event loop, soon. Any thread, also a signal handler; never blocks."""
    loop: Any = anyio.lowlevel.current_token().native_token
    call_soon = loop.run_sync_soon if hasattr(loop, "run_sync_soon") else loop.call_soon_threadsafe
    process = os.getpid()

    def call() -> None:
        # In a forked child there is no event loop, only its locks.
        if os.getpid() == process:
            # The event loop may have ended.
            with contextlib.suppress(RuntimeError):
                call_soon(function)

    return call


def runs_event_loop() -> bool:
    """Return whether this code runs in an event loop of this thread."""
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:
        return False
    return True


async def result_of(future: Future[T]) -> T:
    """Wait for a future that another thread completes. Any event loop. Cancellation: does not affect the future."""
    waker = Waker()
    future.add_done_callback(lambda _: waker.wake())
    while not future.done():
        await waker.wait()
    return future.result()
