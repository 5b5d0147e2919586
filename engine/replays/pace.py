"""Pace: when a replay hands its next event over. Others pause it, let it advance, and set its speed.

replay's thread                          any thread
───────────────                          ──────────
wait_until_due(event) <── wakes ──────── pause, resume, advance, stop, set_speed
delivered(event) ─────── futures ──────> done when they have taken effect
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from offloop.engine.errors import RunEndedError
from offloop.engine.events import Event

TICK: Final = 0.02
"""Seconds that are waited at least: what is due meanwhile comes together, since each hand-over takes its time."""
LONGEST_WAIT: Final = 3600.0
"""Seconds that are waited in one go: some systems take no number that is very large."""


class Pace:
    """The pace of one replay. Any thread, unless a method says otherwise."""

    def __init__(self, speed: float, *, is_paused: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin before the first event.

        Args:
            speed: Recorded seconds that pass in a second; infinity: events wait for callbacks alone.
            is_paused: Whether the first event waits for `resume` or `advance`.
            clock: Of this machine, in seconds.
        """
        self._clock = clock
        # Guards everything below. An explicit one, see `bus/threads.py`.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._speed = speed
        self._is_paused = is_paused
        self._is_stopped = False
        self._has_ended = False
        self._advances: deque[tuple[type[Event], Future[Event | None]]] = deque()
        # Completed when the replay's thread has come to where they hold.
        self._pauses: list[Future[None]] = []
        # True while an event is due as soon as the one before it is handled. Read without the lock, for each event.
        self._is_free = False
        # A moment of the recorded time, and when that was or, in a pause, when the pause began, here.
        self._tied = 0.0, 0.0
        # Of the last event. Written by the replay's thread without the lock.
        self._last_time = 0.0
        self._set_free()

    @property
    def speed(self) -> float:
        """Recorded seconds that pass in a second; infinity without a pace."""
        return self._speed

    @property
    def is_paused(self) -> bool:
        """True while events wait for `resume` or `advance`."""
        return self._is_paused

    @property
    def is_stopped(self) -> bool:
        """True if no further events are to come."""
        return self._is_stopped

    def pause(self) -> Future[None]:
        """Hold the next event. Done when the events before it are handled."""
        future: Future[None] = Future()
        with self._lock:
            self._expect_going("pause")
            self._tie_again()
            self._is_paused = True
            self._pauses.append(future)
            self._change()
        return future

    def resume(self) -> Future[None]:
        """Continue after a pause."""
        future: Future[None] = Future()
        with self._lock:
            self._expect_going("resume")
            self._tie_again()
            self._is_paused = False
            pauses, self._pauses = self._pauses, []
            self._change()
        for each in (*pauses, future):
            _complete(each, None)
        return future

    def advance(self, until: type[Event]) -> Future[Event | None]:
        """Pause, and hand over the events up to the next one of a class. Done with it, or with None if none is left."""
        future: Future[Event | None] = Future()
        with self._lock:
            self._expect_going("advance")
            self._tie_again()
            self._is_paused = True
            self._advances.append((until, future))
            self._change()
        return future

    def stop(self) -> None:
        """Let no further events come. Twice is fine. Does not wait."""
        with self._lock:
            self._is_stopped = True
            self._change()

    def set_speed(self, speed: float) -> None:
        """Go on at another speed."""
        with self._lock:
            self._tie_again()
            self._speed = speed
            self._change()

    def _expect_going(self, name: str) -> None:
        if self._has_ended:
            raise RunEndedError(f"{name} came too late: the replay is over")

    def _change(self) -> None:
        self._set_free()
        self._changed.notify_all()

    def _set_free(self) -> None:
        self._is_free = self._speed == math.inf and not (
            self._is_paused or self._is_stopped or self._advances
        )

    def _tie_again(self) -> None:
        """Tie the present moment of the recorded time to now. Before anything that decides about it changes."""
        now = self._clock()
        recorded, here = self._tied
        if self._speed == math.inf:
            recorded = self._last_time
        elif not self._is_paused:
            recorded += (now - here) * self._speed
        self._tied = recorded, now

    # The replay's thread

    def begin(self, event: Event) -> None:
        """Begin with the first event of an attempt, which is due at once."""
        with self._lock:
            self._last_time = event.time
            self._tied = event.time, self._clock()

    def is_due(self, event: Event) -> bool:
        """Return whether an event is due together with the one before it."""
        if self._is_free:
            return True
        with self._lock:
            return not (self._is_paused or self._is_stopped) and self._seconds_until(event) <= 0

    def wait_until_due(self, event: Event) -> bool:
        """Wait until an event is due; False if it must not come, nor any other. Blocks."""
        if self._is_free:
            return True
        while True:
            with self._lock:
                if self._is_stopped:
                    return False
                held, self._pauses = self._pauses, []
                if self._advances:
                    wait = 0.0
                elif self._is_paused:
                    wait = LONGEST_WAIT
                else:
                    wait = min(self._seconds_until(event), LONGEST_WAIT)
                if not held and wait <= 0:
                    return True
                if not held:
                    self._changed.wait(max(wait, TICK))
            # Outside of the lock: their callbacks may be anything
            for each in held:
                _complete(each, None)

    def delivered(self, event: Event) -> None:
        """Note that an event, and all before it, is handled."""
        self._last_time = event.time
        if self._is_free:
            return
        done: Future[Event | None] | None = None
        with self._lock:
            if self._is_paused:
                # What comes next is due after the time that lies between the two
                self._tied = event.time, self._clock()
            if self._advances and isinstance(event, self._advances[0][0]):
                done = self._advances.popleft()[1]
                self._set_free()
        if done is not None:
            _complete(done, event)

    def end(self) -> None:
        """Complete what waits for events that do not come. The last call."""
        with self._lock:
            self._has_ended = True
            pauses, self._pauses = self._pauses, []
            advances, self._advances = list(self._advances), deque()
        for future in pauses:
            _complete(future, None)
        for _, waiting in advances:
            _complete(waiting, None)

    def _seconds_until(self, event: Event) -> float:
        """Return in how many seconds an event is due."""
        if self._speed == math.inf:
            return 0.0
        recorded, here = self._tied
        return here + (event.time - recorded) / self._speed - self._clock()


def _complete(future: "Future[Event | None] | Future[None]", result: Event | None) -> None:
    """Complete a future, unless it was taken back."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)  # type: ignore[arg-type]  # one of nothing gets None
