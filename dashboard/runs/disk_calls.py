"""DiskCalls: calls of functions that read or write files, which a disk may hold up for good.

Each call has a thread of its own. A call that is no longer waited for is left alone, and its thread ends when the
disk answers. The threads are daemons: they do not keep the interpreter from ending.
"""

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast

import anyio

from offloop.engine.bus.threads import Thread

MAX_CALLS: Final = 64
"""Most calls at a time: beyond that the disk hangs, and further ones fail."""

T = TypeVar("T")


class DiskCall(Generic[T]):
    """A call that was begun. Event loop of the dashboard only."""

    def __init__(self) -> None:
        self.is_done = False
        self._done = anyio.Event()
        # Written by the call's thread before the event loop hears that it is done.
        self._result: T | None = None
        self._error: BaseException | None = None

    async def wait(self, seconds: float) -> None:
        """Wait until it is done, at most some seconds."""
        with anyio.move_on_after(seconds):
            await self._done.wait()

    def result(self) -> T:
        """Return what the function has returned, or raise what it has raised."""
        assert self.is_done
        if self._error is not None:
            raise self._error
        return cast("T", self._result)

    def _finish(self) -> None:
        self.is_done = True
        self._done.set()


class DiskCalls:
    """Begins calls. Event loop of the dashboard only."""

    def __init__(self, post: Callable[[Callable[[], None]], object]) -> None:
        """`post` calls a function on the event loop. Any thread; never waits."""
        self._post = post
        self._calls: set[DiskCall[Any]] = set()

    def begin(
        self, function: Callable[[], T], then: Callable[[DiskCall[T]], object] | None = None
    ) -> DiskCall[T]:
        """Call a function in a thread of its own, and `then` on the event loop when it is done.

        Raises:
            OSError: Too many calls wait for a disk, or the system has no thread left.
        """
        if len(self._calls) >= MAX_CALLS:
            raise OSError(f"{MAX_CALLS} calls wait for a disk that does not answer")
        call = DiskCall[T]()

        def finish() -> None:
            self._calls.discard(call)
            call._finish()
            if then is not None:
                then(call)

        def work() -> None:
            try:
                call._result = function()
            except BaseException as error:
                call._error = error
            self._post(finish)

        try:
            Thread(work, name="offloop-dashboard-disk", daemon=True).start()
        except RuntimeError as error:
            raise OSError(f"no thread can be started: {error}") from error
        self._calls.add(call)
        return call

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function and wait for it. A cancellation leaves the call alone.

        Raises:
            OSError: As `begin`; and what the function raises.
        """
        call = self.begin(function)
        await call._done.wait()
        return call.result()
