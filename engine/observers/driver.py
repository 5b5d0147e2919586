"""Driver: runs the coroutines of one callback, measures them, and abandons those that do not end.

A coroutine may swallow its cancellation, as a retry loop around a bare `except` does. Its task then never
ends, and a task group waits for it for ever. The driver stands between the task and the coroutine: after
`abandon_after` it no longer passes a cancellation on but ends the task with it, and the coroutine is never
resumed.

What is inside an abandoned coroutine, such as its cancel scopes, stays open on its task. So the task must
end with it: no scope or task group of ours may be entered around `drive` in the same task. The
backend complains of the open scopes when that task ends; `allowing_abandoned` goes around its task group.
"""

import contextlib
import ctypes
import logging
import math
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar

import anyio

from offloop.engine.bus import forked
from offloop.engine.observers.cost_watch import Meter, Stretch

logger = logging.getLogger("offloop")
T = TypeVar("T")


@contextlib.contextmanager
def allowing_abandoned(driver: "Callable[[], Driver]") -> Iterator[None]:
    """Allow tasks of a group to end with open scopes if a coroutine was abandoned. Enter it around the task group.

    Args:
        driver: Returns the driver of the task; called when the group has failed.
    """
    try:
        yield
    except* RuntimeError:
        if not driver().has_abandoned:
            raise


class Driver:
    """Drives the coroutines of one callback, one at a time. Event loop only."""

    def __init__(self, name: str) -> None:
        """Drive coroutines of the callback `name`."""
        self.has_abandoned = False
        """True once a coroutine was abandoned."""
        self._name = name
        self._abandon_at = math.inf  # on the clock of `time.perf_counter`
        self._has_passed_on = False  # True once a cancellation was passed on since `abandon_after`
        self._is_torn_down = False  # True once the event loop was closed while a coroutine was suspended

    @types.coroutine
    def drive(
        self, coroutine: Coroutine[Any, Any, T], account: Callable[[Stretch], None]
    ) -> Generator[Any, Any, T]:
        """Await a coroutine. Cancellation: passed on, but abandons a coroutine that swallows it for too long.

        Args:
            coroutine: The callback's.
            account: Called with each stretch between two awaits.
        """
        value: Any = None
        error: BaseException | None = None
        cancelled: BaseException | None = None
        generation = forked.generation
        while True:
            meter = Meter()
            try:
                yielded = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]  # StopIteration is untyped
            except BaseException as raised:
                if forked.generation != generation:
                    forked.end_process(raised)
                raise
            finally:
                if forked.generation != generation:
                    forked.end_process(None)
                # An exception that holds this frame must not be held by it.
                error = cancelled = None
                account(meter.read())
            value = None
            try:
                value = yield yielded
            except GeneratorExit:
                self._is_torn_down = True
                coroutine.close()
                raise
            except BaseException as thrown:
                error = thrown
            # asyncio throws a cancellation in, trio sends it wrapped
            cancelled = error or getattr(value, "error", None)
            if self._abandon_at < math.inf and isinstance(cancelled, anyio.get_cancelled_exc_class()):
                # However late it comes, on a machine that is busy, the coroutine gets one to clean up.
                if self._has_passed_on and time.perf_counter() >= self._abandon_at:
                    self._abandon(coroutine)
                    raise cancelled
                self._has_passed_on = True

    def abandon_after(self, seconds: float) -> None:
        """Abandon a coroutine that still swallows its cancellation in so many seconds."""
        self._abandon_at = min(self._abandon_at, time.perf_counter() + seconds)

    def is_ending(self, error: BaseException) -> bool:
        """True for the cancellation of this task, and for the end of its event loop. False for stray ones."""
        if isinstance(error, GeneratorExit):
            return self._is_torn_down
        return (
            isinstance(error, anyio.get_cancelled_exc_class())
            and anyio.get_current_task().has_pending_cancellation()
        )

    def _abandon(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.has_abandoned = True
        logger.error("callback %s swallows its cancellation: %s is abandoned", self._name, coroutine)
        # Never freed: that would resume it, and a loop around a bare `except` would then never end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(coroutine))
