"""Step times: when the latest steps of a run ended, to tell what a computation beside them costs training.

    drainer, at each hand-over          observers                          one that is to be named
    ──────────────────────────          ─────────                          ───────────────────────
    take(batch) ──> ends of steps       add(span): a handler computed      compare(owner) -> Delay

The training thread has no part in it: each `StepEnd` carries its time. Steps that overlap a computation are compared
with steps beside which no callback computed. All of it belongs to the drainer's event loop.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from offloop.engine.events import Event, Sample, StepEnd, TrainEnd

STEPS_KEPT: Final = 4096
"""Steps that are remembered: two seconds or more. Comparing all of them takes two milliseconds."""
SPANS_KEPT: Final = 1024
"""Computations that are remembered, of all callbacks together."""
FEWEST_OTHERS: Final = 10
"""Steps without a computation beside them that a comparison needs."""
SURE: Final = 3.0
"""Standard errors by which a delay must differ from none to be told."""


class Span(NamedTuple):
    """A time in which a callback computed. Seconds of `time.perf_counter`."""

    owner: str
    start: float
    end: float


class Delay(NamedTuple):
    """What a computation cost training."""

    steps: int
    """Steps that overlap it."""
    beside: float
    """Seconds for which the callback computed beside them."""
    slowdown: float
    """How many times as long as others they took."""
    lost: float
    """Seconds by which they took longer than as many others."""
    lost_at_most: float
    """Upper bound of the seconds lost, with the noise of the steps."""
    is_sure: bool
    """True if the loss exceeds the noise."""


class StepTimes:
    """When the latest steps of one run ended, and when callbacks computed beside them. Drainer's event loop only."""

    def __init__(self, offset: float) -> None:
        """Begin without steps.

        Args:
            offset: Seconds by which the times of events are ahead of `time.perf_counter`.
        """
        self.has_ended = False
        """True once `TrainEnd` was handed over: there is no training left to delay."""
        self._offset = offset
        # On the clock of events. NaN where something else came between two steps: a validation, a pause.
        self._ends: deque[float] = deque(maxlen=STEPS_KEPT)
        self._spans: deque[Span] = deque(maxlen=SPANS_KEPT)
        self._due: list[Callable[[], None]] = []

    def take(self, batch: list[Event], *, has_milestones: bool) -> None:
        """Note the steps of a hand-over, and call what waits for it."""
        if not has_milestones:
            # About 0.05 us a step
            self._ends.extend([event.time for event in batch if event.__class__ is StepEnd])
        else:
            for event in batch:
                if event.__class__ is StepEnd:
                    self._ends.append(event.time)
                elif isinstance(event, Event) and not isinstance(event, Sample):
                    self._ends.append(math.nan)
                    self.has_ended = self.has_ended or isinstance(event, TrainEnd)
        if self._due:
            due, self._due = self._due, []
            for each in due:
                each()

    def after_next(self, function: Callable[[], None]) -> None:
        """Call a function once the steps so far are known, at the next hand-over."""
        self._due.append(function)

    def add(self, span: Span) -> None:
        """Note that a callback computed."""
        self._spans.append(span)

    def compare(self, owner: str) -> Delay | None:
        """Compare the steps beside which a callback computed with those beside which none did.

        Returns:
            None if too few steps of either kind are known.
        """
        others: list[float] = []
        mine: list[tuple[float, float]] = []
        for seconds, by_owner, by_any in self._gaps(owner):
            if by_owner:
                mine.append((seconds, by_owner))
            elif not by_any:
                others.append(seconds)
        if not mine or len(others) < FEWEST_OTHERS:
            return None
        usual = sum(others) / len(others)
        variance = sum((each - usual) ** 2 for each in others) / (len(others) - 1)
        noise = math.sqrt(variance)
        # A step cannot lose more than the time for which the callback computed beside it: the rest has other reasons
        lost = sum(min(seconds - usual, beside + SURE * noise) for seconds, beside in mine)
        count = len(mine)
        error = noise * math.sqrt(count + count * count / len(others))
        return Delay(
            steps=count,
            beside=sum(beside for _, beside in mine),
            slowdown=max(0.0, 1.0 + lost / (count * usual)) if usual > 0 else 1.0,
            lost=lost,
            lost_at_most=lost + SURE * error,
            is_sure=lost > SURE * error,
        )

    def _gaps(self, owner: str) -> Iterator[tuple[float, float, float]]:
        """Yield the seconds of each step, those of them in which the owner computed, and in which any callback did."""
        spans = sorted(self._spans, key=lambda span: span.start)
        running: list[Span] = []
        upcoming = 0
        start = math.nan
        for end in self._ends:
            seconds = end - start
            if seconds >= 0:
                since, until = start - self._offset, end - self._offset
                while upcoming < len(spans) and spans[upcoming].start < until:
                    running.append(spans[upcoming])
                    upcoming += 1
                running = [span for span in running if span.end > since]
                by_owner = by_any = 0.0
                for span in running:
                    beside = min(span.end, until) - max(span.start, since)
                    by_any += beside
                    if span.owner == owner:
                        by_owner += beside
                yield seconds, by_owner, by_any
            start = end
