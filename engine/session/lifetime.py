"""Lifetime: how far a run has come, what it failed with, and how soon it must end. All parts of a run share it.

any thread, signal handlers        cancel, hurry, fail, on_signal: training ends at its next batch
event loop                         wait_until: a second signal shortens the wait
any other thread                   wait: the same, blocking; event_loop_is_gone
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Final, Literal

import anyio
import anyio.lowlevel

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.commands import Stop
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.threads import has_ended
from offloop.engine.errors import OffloopError, as_failure, describe

logger = logging.getLogger("offloop")

LOOK_INTERVAL: Final = 0.05
"""Seconds between two checks of a wait on the event loop: did a second signal come, is the wait pointless by now."""
BLOCKING_LOOK_INTERVAL: Final = 0.25
"""Seconds between two such checks in a thread that blocks."""
HASTY_CLOSE: Final = 2.0
"""Seconds that remain for everything after a second signal."""
SWALLOWING: Final = 1.0
"""Seconds for which a coroutine of a callback may swallow its cancellation before it is abandoned."""
HASTY_MOMENT: Final = 0.25
"""The same after a second signal. Callbacks then also have this long for their last events, and for `close()`."""

Phase = Literal["starting", "running", "closing", "completed", "stopped", "cancelled", "failed"]


class Lifetime:
    """The state of one run that ends it. Any thread, unless a method says otherwise."""

    def __init__(self, mailbox: Mailbox, bus: Bus) -> None:
        """Serve the run that has this mailbox and this bus."""
        # `starting` and `running` are written by the training thread, the rest by the supervisor after that thread
        # has ended. Read by any thread.
        self.phase: Phase = "starting"
        # The first failure: written by any thread, once, before the phase is `closing`; raised by the session.
        self.failure: BaseException | None = None
        # A SystemExit or the like that a callback raised after `TrainEnd`. The session raises it after all is closed.
        self.late_exit: BaseException | None = None
        # Written by the main thread, read by any thread.
        self.signal_count = 0
        # Name of the signal that has stopped the run on another rank. Written by the training thread, read by the main
        # thread when the run is over.
        self.signal_elsewhere: str | None = None
        # True if the run takes SIGINT or SIGTERM: written before the training thread starts, which reads it.
        self.handles_signals = False
        self._mailbox = mailbox
        self._bus = bus
        # When the second signal came; written by the main thread.
        self._hurried_at = math.inf
        # Written by the supervisor before the training thread starts.
        self._event_loop_thread: threading.Thread | None = None
        self._native_loop: object = None

    # Ending the run ------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """End the run at its next batch. Safe in a signal handler."""
        self._mailbox.cancel(reason)
        self._bus.unblock()

    def hurry(self, reason: str) -> None:
        """End the run in haste: callbacks do not drain, and only a checkpoint that is being written is finished."""
        self.signal_count = max(self.signal_count, 2)
        self._hurried_at = min(self._hurried_at, time.perf_counter())
        self.cancel(reason)

    def on_signal(self, name: str, count: int, *, third_is_final: bool = True) -> None:
        """Handle a signal: the first stops the run in order, the second in haste. Main thread."""
        self.signal_count = count
        if count == 1:
            with contextlib.suppress(OffloopError):
                self._mailbox.give(Stop(name), by="signal")
            logger.warning("%s: stopping; once more to leave in haste", name)
        else:
            self.hurry(f"{name}, twice")
            outlook = "; a third time ends the process at once" if third_is_final else ""
            logger.warning("%s: leaving in haste%s", name, outlook)

    def note_signal_elsewhere(self, name: str) -> None:
        """Note that a signal stops the run, which may have come to another process. Training thread."""
        self.signal_elsewhere = name
        if not self.signal_count:
            logger.warning("%s at another rank: stopping", name)
        self.signal_count = max(self.signal_count, 1)

    def fail(self, error: BaseException) -> None:
        """Keep the first failure, and end training."""
        error = as_failure(error)
        if self.phase == "closing":
            # `TrainEnd` has told how the run ended. This failure goes to the log and the result.
            logger.error("a callback failed after the end", exc_info=error)
            if not isinstance(error, Exception) and self.late_exit is None:
                self.late_exit = error
            return
        if self.failure is None:
            self.failure = error
        self.cancel(describe(error))

    def is_cancelled(self) -> bool:
        """Return whether training is to leave at its next batch."""
        return self._mailbox.cancelled

    def take_failure(self) -> BaseException | None:
        """Return the exception to raise, if any, and forget it: its frames may hold tensors."""
        failure = self.failure or self.late_exit
        self.failure = self.late_exit = None
        return failure

    # The event loop ------------------------------------------------------------------------------

    def begin_on_event_loop(self) -> None:
        """Note the event loop of the caller as the one that hosts the run."""
        self._event_loop_thread = threading.current_thread()
        self._native_loop = anyio.lowlevel.current_token().native_token

    @property
    def event_loop_is_dead(self) -> bool:
        """True if the event loop runs nothing any more: its thread has ended, or it was closed."""
        thread = self._event_loop_thread
        # asyncio's; trio always ends its tasks first
        is_closed = getattr(self._native_loop, "is_closed", None)
        return (thread is not None and has_ended(thread)) or (is_closed is not None and bool(is_closed()))

    @property
    def event_loop_is_gone(self) -> bool:
        """True if no task takes this run's events any more."""
        return self._bus.loop_is_gone or self._bus.has_ended or self.event_loop_is_dead

    def cancel_if_event_loop_is_gone(self) -> None:
        """Cancel the run if no task takes its events any more. Training thread."""
        if self.event_loop_is_gone:
            self.cancel("the event loop is gone")

    # Waiting -------------------------------------------------------------------------------------

    def is_in_haste(self) -> bool:
        """True if nothing is to be waited for any more: after a second signal, or without an event loop."""
        return self.signal_count > 1 or self.event_loop_is_gone

    @property
    def swallowing(self) -> float:
        """Seconds for which a coroutine may swallow its cancellation."""
        return SWALLOWING if self.signal_count < 2 else HASTY_MOMENT

    async def wait_until(
        self,
        event: anyio.Event,
        deadline: float,
        *,
        haste: float = 0.0,
        at_least: float = 0.0,
        unless: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Wait for an event; return False if it was not set by the deadline.

        Args:
            event: The event to wait for.
            deadline: On the clock of `time.perf_counter`.
            haste: A second signal ends the wait after this many seconds.
            at_least: A second signal does not end the wait before this time, on the same clock.
            unless: Ends the wait when it returns True.
        """
        while not event.is_set():
            left = min(deadline, max(self._hurried_at + haste, at_least)) - time.perf_counter()
            if left <= 0 or unless():
                return False
            with anyio.move_on_after(min(left, LOOK_INTERVAL)):
                await event.wait()
        return True

    def wait(
        self, wait: Callable[[float], bool], *, deadline: float = math.inf, haste: float = HASTY_CLOSE
    ) -> bool:
        """Wait in a thread until something is done; return False if it was not done in time. Blocks.

        Args:
            wait: Waits for that many seconds and returns whether it is done.
            deadline: On the clock of `time.perf_counter`.
            haste: A second signal ends the wait after this many seconds.
        """
        while not wait(min(BLOCKING_LOOK_INTERVAL, max(0.0, deadline - time.perf_counter()))):
            if time.perf_counter() >= min(deadline, self._hurried_at + haste):
                return False
        return True
