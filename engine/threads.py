"""Threads whose end is known for certain, also when Ctrl-C interrupts the wait for it.

Before Python 3.13, a `KeyboardInterrupt` that is raised inside `Thread.join` or `Thread.is_alive` marks the
thread as ended while it still runs (https://github.com/python/cpython/issues/90882). From then on `join` returns
at once and `is_alive` is False. Only the main thread can be interrupted like this, but any thread may be the
victim, so offloop asks neither method: its own threads are of the class `Thread`, and `has_ended` judges others.
"""

import threading
from collections.abc import Callable
from typing import Any


class Thread(threading.Thread):
    """A thread that can be joined again after an interrupted `join`."""

    def __init__(self, target: Callable[..., object], *args: Any, name: str, daemon: bool) -> None:
        super().__init__(target=target, args=args, name=name, daemon=daemon)
        self.is_over = False  # written by the thread as its last act, before it releases the lock
        self._running = threading.Lock()  # held from here to the thread's last act
        self._running.acquire()

    def run(self) -> None:
        """Run the target. Called by `start`."""
        try:
            super().run()
        finally:
            self.is_over = True
            self._running.release()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, at most `timeout` seconds. Blocks.

        Raises:
            KeyboardInterrupt: A signal handler raised it. The thread goes on and can be joined again.
        """
        is_foreign = self.ident is not None and threading.current_thread() is not self
        if is_foreign and not self.is_over:
            # A lock that is acquired in C: if a handler raises, it is either not taken, or was released already.
            if not self._running.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
                return
            self._running.release()
        super().join(timeout)  # what is left is the interpreter's own work; not started or itself: raises


def has_ended(thread: threading.Thread) -> bool:
    """Return True if a thread that was started has ended, whatever an interrupted `join` says. Any thread."""
    if isinstance(thread, Thread):
        return thread.is_over
    if thread.is_alive():
        return False
    # The interpreter takes a thread off this list as the thread's last act; the main thread stays on it.
    return thread is threading.main_thread() or thread not in threading.enumerate()
