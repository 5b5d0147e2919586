"""Threads whose end is known for certain, also if Ctrl-C interrupts the wait for it.

Before Python 3.13, a `KeyboardInterrupt` that is raised inside `Thread.join` or `Thread.is_alive` marks the
thread as ended while it still runs (https://github.com/python/cpython/issues/90882). From then on `join` returns
at once and `is_alive` is False. Only the main thread is interrupted like this, but it may wait for any thread. So
offloop calls neither method: its threads are of the class `Thread`, and `has_ended` tells about all others.

Locks have the same trap: `with condition:` runs Python code in `Condition.__enter__` and `__exit__`, and an
interrupt in there leaves the lock taken for ever. A condition that the main thread may enter therefore gets an
explicit lock, `threading.Condition(lock)`, and is entered by `with lock:`, which cannot be interrupted halfway.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Latch", "Thread", "has_ended"]

LOOK_INTERVAL: Final = 1.0
"""Seconds after which a waiter checks again: an interrupt may keep another waiter from passing the lock on."""


class Latch:
    """An event that happens once. Unlike with `threading.Event`, interrupting a waiter affects no other thread."""

    def __init__(self) -> None:
        # Written once, by the thread that opens it, before it releases the lock; read by waiters.
        self.is_open = False
        # Held while the latch is closed. Acquired in C, so an interrupt never leaves it half taken.
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let all waiters through. One thread; twice is fine."""
        if not self.is_open:
            self.is_open = True
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the latch is open, at most `timeout` seconds; return whether it is. Blocks.

        Raises:
            KeyboardInterrupt: A signal handler raised it; waiting again is fine.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.is_open:
            left = LOOK_INTERVAL if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            if self._lock.acquire(timeout=min(left, LOOK_INTERVAL)):
                self._lock.release()
        return True


class Thread(threading.Thread):
    """A thread that can be joined again after an interrupted `join`."""

    def __init__(self, target: Callable[..., object], *args: Any, name: str, daemon: bool) -> None:
        super().__init__(target=target, args=args, name=name, daemon=daemon)
        self._end = Latch()  # opened by the thread at its end
        self._process = os.getpid()

    def run(self) -> None:
        """Run the target. Called by `start`."""
        try:
            super().run()
        finally:
            self._end.open()

    @property
    def is_over(self) -> bool:
        """True once the target has returned or raised. Any thread. In a forked child, only its own thread lives."""
        return self._end.is_open or (os.getpid() != self._process and threading.current_thread() is not self)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, at most `timeout` seconds. Blocks.

        Raises:
            KeyboardInterrupt: A signal handler raised it. The thread still runs and can be joined again.
        """
        is_foreign = self.ident is not None and threading.current_thread() is not self
        if is_foreign and not self.is_over and not self._end.wait(timeout):
            return
        # Only the interpreter's own cleanup is left. Raises for a thread that was not started, and for itself.
        super().join(timeout)


def has_ended(thread: threading.Thread) -> bool:
    """Return True if a thread that was started has ended, whatever an interrupted `join` says. Any thread."""
    if isinstance(thread, Thread):
        return thread.is_over
    if thread.is_alive():
        return False
    # The interpreter removes a thread from this list last of all; the main thread stays in it.
    return thread is threading.main_thread() or thread not in threading.enumerate()
