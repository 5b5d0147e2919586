"""Wake a task of an event loop from any thread, without ever waiting for that loop.

`anyio.from_thread` and portals wait until the event loop has run the call; a training thread must not.
A byte in a non-blocking socket pair does the same for one system call, on asyncio, uvloop and trio.
"""

import contextlib
import socket
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

import anyio

T = TypeVar("T")


class _Socket(socket.socket):
    """A socket that is closed with the last reference to it, without a warning."""

    def __del__(self) -> None:
        self.close()


class Waker:
    """One task waits, any thread wakes it. Wakes that come before the wait, or several at once, count as one.

    Belongs to no event loop until somebody waits. Holds two file descriptors until `close`, or
    until it is garbage.
    """

    def __init__(self) -> None:
        reader, writer = socket.socketpair()
        self._reader = _Socket(fileno=reader.detach())
        self._writer: _Socket | None = _Socket(fileno=writer.detach())  # read by every thread that wakes
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self) -> None:
        """Wake the waiting task, or the next one that waits. Any thread, also a signal handler; never blocks."""
        # A reference of our own: close() in another thread cannot close the descriptor while we send, so the
        # byte never goes to a stranger's that got the same number.
        writer = self._writer
        if writer is None:
            return  # closed: nobody waits any more
        try:
            writer.send(b"\0")
        except OSError:
            pass  # full: it is awake already; broken: closed meanwhile

    async def wait(self) -> None:
        """Wait until woken. One task at a time. Cancellation: safe, no wake is lost."""
        while True:
            await anyio.wait_readable(self._reader)
            try:
                self._reader.recv(4096)
                return
            except BlockingIOError:  # somebody else emptied it; readiness may be spurious
                continue

    def close(self) -> None:
        """Give the descriptors back. Nobody may be waiting. Calling it twice is fine."""
        self._writer = None
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


async def result_of(future: Future[T], waker: Waker | None = None) -> T:
    """Wait for a future that another thread completes. Any event loop. Cancellation: the future goes on.

    Args:
        future: Completed, or cancelled, by any thread.
        waker: One to wait with, made where its descriptors were still to be had; closed by its maker.
    """
    with contextlib.nullcontext(waker) if waker is not None else Waker() as waking:
        future.add_done_callback(lambda _: waking.wake())
        while not future.done():
            await waking.wait()
    return future.result()
