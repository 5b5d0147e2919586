"""DurableLogs: a checkpoint is announced once the run's logs have everything before it on disk.

    training thread           writer's thread        announcing thread           the logs' own threads
    ───────────────           ───────────────        ─────────────────           ─────────────────────
    milestones ──note──┐
    save ──── pending ─┼────> durable ──announce───> a barrier in each ───────> everything before it
                       │                             log's stream                handled, make_durable()
                       └── removed <──────────────── all have answered  <───────┘
                                                     CheckpointSaved

Events reach the logs through the event loop, which a callback may hold for a minute. So neither training nor writing
waits for them: a thread does, for a limited time. A checkpoint contains the milestones that may not be in the logs
when it is taken, and a run that continues from it adds them (`event_log.rewind`).
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Final

from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.milestones import Milestones
from offloop.engine.events import Event
from offloop.engine.observers.event_log import EventLog
from offloop.engine.observers.observer import Observer

logger = logging.getLogger("offloop")

LOG_DEADLINE: Final = 5.0
"""Seconds for which an announcement waits for the logs. A silent event loop is reported after the same time."""


class DurableLogs:
    """Knows which milestones of a run may be missing in its logs, and announces checkpoints in order."""

    def __init__(self, bus: Bus, *, in_haste: Callable[[], bool]) -> None:
        """Begin without logs; `watch` adds them.

        Args:
            bus: Carries events and barriers to the logs.
            in_haste: Returns True when the end of the run must not wait any longer. Any thread.
        """
        self._bus = bus
        self._in_haste = in_haste
        # Replaced before the run starts and after it ends; read by the announcing thread.
        self._logs: Sequence[Observer] = ()
        self._lock = threading.Lock()  # guards the next two, for some assignments
        # Milestones that may be missing. The training thread appends, the announcing one removes.
        self._pending = Milestones()
        self._noted = 0  # written by the training thread, read by the announcing one
        self._late: list[Future[None]] = []  # announcing thread only: answers that were late
        # Filled by the writer's thread, emptied by the announcing one; None ends it.
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the next two
        self._unannounced = 0
        self._thread: threading.Thread | None = None  # started for the first announcement
        self._is_closed = False

    def watch(self, observers: Sequence[Observer]) -> None:
        """Choose the logs of the run: callbacks that override `make_durable`. Before the run starts."""
        self._logs = [each for each in observers if each.keeps_log]

    def note(self, milestone: Event) -> None:
        """Remember a milestone that was just published. Training thread."""
        with self._lock:
            self._noted += 1
            self._pending.extend((milestone,))

    def pending(self) -> list[Event]:
        """Return the milestones that may be missing in the logs, in order; the latest if they are too many.

        Training thread.
        """
        with self._lock:
            return self._pending.events()

    def announce(self, publish: Callable[[], None]) -> None:
        """Call `publish` once the logs have the events before it, in the order of these calls. Writer's thread."""
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="offloop-announcements", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    logger.warning(
                        "a checkpoint is announced without waiting for the logs: the system gives no thread"
                    )
                else:
                    self._thread = thread
            if self._thread is not None:
                self._unannounced += 1
                self._jobs.put(publish)
                return
        publish()

    def flush(self, seconds: float) -> bool:
        """Wait until all checkpoints are announced; False if that takes longer. Blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unannounced, seconds)

    def close(self) -> None:
        """Let the thread end after its announcements, and forget the logs. Blocks, at most a second; twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self._jobs.put(None)
            if self._thread is not None:
                self._thread.join(1.0)
        self._logs = ()
        with self._lock:
            self._pending.forget(len(self._pending))

    # The announcing thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while (publish := self._jobs.get()) is not None:
            try:
                self._wait_for_logs()
            except Exception:
                logger.exception("the logs of the run could not be waited for")
            try:
                publish()
            except Exception:
                logger.exception("a checkpoint was not announced")
            with self._changed:
                self._unannounced -= 1
                self._changed.notify_all()

    def _is_alive(self, observer: Observer) -> bool:
        return not observer.has_ended and not self._bus.has_ended

    def _wait_for_logs(self) -> None:
        """Wait until the logs have everything published so far, within the deadline."""
        self._late = [answer for answer in self._late if not answer.done()]
        if self._late:
            # These logs are still behind: do not wait for them again.
            return
        # Read before the barriers are put, so that all of these milestones are before them.
        noted = self._noted
        answers: dict[Future[None], Observer] = {}
        for log in self._logs:
            if self._is_alive(log):
                answer: Future[None] = Future()
                answers[answer] = log
                assert log.subscription is not None
                self._bus.put_barrier(log.subscription, functools.partial(log.make_durable, answer))
        deadline = time.monotonic() + LOG_DEADLINE
        waiting = set(answers)
        while waiting and not self._in_haste() and time.monotonic() < deadline:
            waiting = {each for each in wait(waiting, timeout=0.25).not_done if self._is_alive(answers[each])}
        # Only the event log counts: the other logs are completed from it.
        events = [answer for answer, log in answers.items() if isinstance(log.handlers.callback, EventLog)]
        if events and all(each.done() and each.exception() is None for each in events):
            with self._lock:
                self._pending.forget(len(self._pending) - (self._noted - noted))
        if waiting and not self._in_haste():
            self._late = list(waiting)
            logger.warning(
                "%s: behind by more than %g s; a checkpoint is announced before they have written what came before "
                "it. A run that continues from it completes them",
                ", ".join(sorted(answers[each].name for each in waiting)),
                LOG_DEADLINE,
            )
