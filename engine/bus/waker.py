"""Wake a task of an event loop from any thread, without ever waiting for that loop.

`anyio.from_thread` and portals wait until the event loop has run the call; a training thread must not.
A byte in a non-blocking socket pair does the same for one system call, on asyncio, uvloop and trio.
"""

import contextlib
import socket
from concurrent.futures import Future
from typing import Self, TypeVar

import anyio

T = TypeVar("T")


class _Socket(socket.socket):
    """A socket that is closed with the last reference to it, without a warning."""

    def __del__(self) -> None:
        self.close()


class Waker:
    """One task waits, any thread wakes it. Wakes before the wait, or several at once, count as one.

    Belongs to no event loop before the first wait. Holds two file descriptors until `close`, or until it is garbage.
    """

    def __init__(self) -> None:
        reader, writer = socket.socketpair()
        self._reader = _Socket(fileno=reader.detach())
        # Set to None by the thread that closes; read once by each thread that wakes.
        self._writer: _Socket | None = _Socket(fileno=writer.detach())
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self) -> None:
        """Wake the waiting task, or the next one that waits. Any thread, also a signal handler; never blocks."""
        # This reference keeps the descriptor open while we send, also if another thread closes the waker. So the byte
        # cannot reach another file with the same number.
        writer = self._writer
        if writer is None:
            return
        try:
            writer.send(b"\0")
        except OSError:
            # Full: the task is awake already. Broken: the reader was closed meanwhile.
            pass

    async def wait(self) -> None:
        """Wait until woken. One task at a time. Cancellation: safe, no wake is lost."""
        while True:
            await anyio.wait_readable(self._reader)
            try:
                self._reader.recv(4096)
                return
            # Readiness may be spurious.
            except BlockingIOError:
                continue

    def close(self) -> None:
        """Close the descriptors. No task may be waiting. Twice is fine."""
        self._writer = None
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


async def result_of(future: Future[T], waker: Waker | None = None) -> T:
    """Wait for a future that another thread completes. Any event loop. Cancellation: does not affect the future.

    Args:
        future: Completed, or cancelled, by any thread.
        waker: To wait with, for callers that opened its descriptors in time; the caller closes it.
    """
    with contextlib.nullcontext(waker) if waker is not None else Waker() as waking:
        future.add_done_callback(lambda _: waking.wake())
        while not future.done():
            await waking.wait()
    return future.result()
