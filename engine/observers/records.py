"""Records: a checkpoint is announced when the run's logs have everything before it, on the disk.

    training thread           writer's thread        announcing thread           the logs' own threads
    ───────────────           ───────────────        ─────────────────           ─────────────────────
    milestones ──note──┐
    save ── unsettled ─┼────> durable ──announce───> a barrier in each ───────> everything before it
                       │                             log's stream                handled, make_durable()
                       └── settled <──────────────── all of them answered <─────┘
                                                     CheckpointSaved

Events reach the logs through the event loop, which a callback may hold for a minute. So neither training nor writing
waits for them: a thread does, for a limited time. What is not known to be in the logs when a checkpoint is taken
is in the checkpoint, and a run that is continued from there writes it down (`event_log.rewind`).
"""

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final

from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.subscription import MAX_MILESTONES_BEHIND
from offloop.engine.events import Event
from offloop.engine.observers.event_log import EventLog
from offloop.engine.observers.observer import Observer

logger = logging.getLogger("offloop")

RECORD_DEADLINE: Final = 5.0
"""Seconds for which an announcement waits for the logs. As long as a silent event loop takes to be reported."""


class Records:
    """What the logs of one run have, and the announcements that wait for it."""

    def __init__(self, bus: Bus, *, in_haste: Callable[[], bool]) -> None:
        """Watch the logs of a run; they are named by `watch`.

        Args:
            bus: Through which the logs get their events.
            in_haste: True when nothing must be waited for any more. Any thread.
        """
        self._bus = bus
        self._in_haste = in_haste
        self._logs: list[Observer] = []
        # Milestones of the training thread with their numbers: appended by that thread, taken out by the announcing one
        self._unsettled: deque[tuple[int, Event]] = deque(maxlen=MAX_MILESTONES_BEHIND)
        self._noted = 0  # written by the training thread
        self._late: list[Future[None]] = []  # answers to the barriers that were not waited for to the end
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending = 0  # announcements; guarded by _changed
        self._thread: threading.Thread | None = None

    def watch(self, observers: list[Observer]) -> None:
        """Choose the logs: callbacks with a `make_durable` of their own."""
        self._logs = [each for each in observers if each.keeps_records]

    def note(self, milestone: Event) -> None:
        """Take note of a milestone that was just published. Training thread."""
        self._noted += 1
        self._unsettled.append((self._noted, milestone))

    def unsettled(self) -> list[Event]:
        """Return the milestones that are not known to be in the logs, in order. Training thread."""
        return [event for _, event in list(self._unsettled)]

    def announce(self, say: Callable[[], None]) -> None:
        """Call `say` once the logs have what was published before, in the order of these calls. Writer's thread."""
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="offloop-announcements", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more threads: what waits for the logs cannot
                    logger.warning(
                        "a checkpoint is announced without waiting for the logs: there is no thread for it"
                    )
                else:
                    self._thread = thread
            if self._thread is not None:
                self._pending += 1
                self._jobs.put(say)
                return
        say()

    def flush(self, seconds: float) -> bool:
        """Wait until all is announced; False if it takes longer. Blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, seconds)

    def close(self) -> None:
        """Let the thread end after what it has to announce; waits a moment for it. Twice is fine."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(1.0)

    def let_go(self) -> None:
        """Forget the logs and the milestones; after the end of the run."""
        self._logs = []
        self._unsettled.clear()

    def _is_alive(self, observer: Observer) -> bool:
        return not observer.has_ended and not self._bus.has_ended

    # The announcing thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while (say := self._jobs.get()) is not None:
            try:
                self._settle()
            except Exception:
                logger.exception("the logs of the run could not be asked how far they are")
            try:
                say()
            except Exception:
                logger.exception("a checkpoint was not announced")
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()

    def _settle(self) -> None:
        """Wait until the logs have everything that was published so far, within the deadline."""
        self._late = [answer for answer in self._late if not answer.done()]
        if self._late:
            return  # they were told already, and are still behind
        noted = self._noted  # before the barriers are put: all of these are before them
        logs = [log for log in self._logs if self._is_alive(log)]
        answers: dict[Future[None], Observer] = {}
        for log in logs:
            answer: Future[None] = Future()
            answers[answer] = log
            assert log.subscription is not None
            self._bus.put_barrier(log.subscription, functools.partial(log.make_durable, answer))
        deadline = time.monotonic() + RECORD_DEADLINE
        waiting = set(answers)
        while waiting and not self._in_haste() and time.monotonic() < deadline:
            waiting = {each for each in wait(waiting, timeout=0.25).not_done if self._is_alive(answers[each])}
        # The other logs complete themselves from this one
        events = [answer for answer, log in answers.items() if isinstance(log.handlers.callback, EventLog)]
        if events and all(each.done() and each.exception() is None for each in events):
            while self._unsettled and self._unsettled[0][0] <= noted:
                self._unsettled.popleft()
        if waiting and not self._in_haste():
            self._late = list(waiting)
            logger.warning(
                "%s: behind by more than %g s; a checkpoint is announced before they have written what came before "
                "it. A run that is continued from it completes them",
                ", ".join(sorted(answers[each].name for each in waiting)),
                RECORD_DEADLINE,
            )
