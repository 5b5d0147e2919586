"""Cost watch: names a callback that computes in this interpreter, or that blocks the event loop.

Both are measured per stretch: what a coroutine does between two awaits, or what a worker thread does with a batch of
events. A stretch is long for one of three reasons, which `Stretch` tells apart:

    it computes                    CPU time of its thread
    it waits for the interpreter   the thread asks for it again every switch interval, so it sleeps and wakes often
    it blocks                      the rest: `time.sleep`, a request, a lock

Waiting is the fault of another thread, and is not blamed. CPU time in C code that lets the interpreter go (NumPy,
zlib) looks like any other, but does not delay training: where the steps show that, the callback is not named.
"""

import functools
import logging
import math
import sys
import time
from typing import Final, NamedTuple

from offloop.engine.bus.step_times import Span, StepTimes
from offloop.engine.callback import Handlers
from offloop.engine.lazy_imports import was_importing

try:
    from resource import RUSAGE_THREAD, getrusage
except ImportError:  # macOS does not count per thread
    RUSAGE_THREAD = None  # type: ignore[assignment, misc]  # there is no such number

logger = logging.getLogger("offloop")

HOLD_WARNING: Final = 0.05
"""Seconds for which a handler may hold the event loop before it is named; a smooth page updates twice as often."""
WARNING_INTERVAL: Final = 10.0
"""Seconds between two such warnings about one callback."""
STRETCH: Final = 0.1
"""CPU seconds at a stretch from which a callback is named as one that computes."""
STRETCH_SHARE: Final = 0.2
"""Share of a stretch that is computing, at least; below, the handler mostly blocks, and computes now and then. Waiting
for a core is left out: on a busy machine, that is most of the time."""
WINDOW: Final = 10.0
"""Seconds over which the share of a core is taken."""
SHARE: Final = 0.05
"""Share of a core from which a callback is named."""
SPAN: Final = 0.001
"""CPU seconds of the shortest stretch that steps are compared with."""
COSTLESS: Final = 0.1
"""Share of its computing that training may lose, at most, for a callback to be left alone."""
SWITCH_LATENCY: Final = 0.003
"""Seconds that a thread may wait for a core each time that it wakes; measured 0.5-2 ms with both of two cores busy."""
SWITCH_CPU: Final = 10e-6
"""CPU seconds that each turn of waiting for the interpreter takes (measured)."""


class Stretch(NamedTuple):
    """What a thread did between two moments."""

    started: float
    """Seconds of `time.perf_counter`."""
    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of the thread."""
    switches: int
    """How often the thread slept or was interrupted; 0 where the system does not tell (macOS)."""

    @property
    def ended(self) -> float:
        """Seconds of `time.perf_counter`."""
        return self.started + self.wall

    @property
    def computed(self) -> float:
        """CPU seconds, without those that asking for the interpreter took."""
        return max(0.0, self.cpu - self.switches * SWITCH_CPU)

    @property
    def held(self) -> float:
        """Seconds, without those that the thread may have waited for the interpreter or for a core.

        A thread that waits for the interpreter wakes every switch interval, so the number of its wakes bounds the
        time for which it waited. `time.sleep(1)` wakes a few times, and a second of waiting at 5 ms two hundred times.
        """
        if self.wall <= HOLD_WARNING:
            return self.wall
        if was_importing(self.started):
            # An import of ours kept the interpreter from the handler
            return min(self.wall, self.cpu)
        waited = self.switches * (sys.getswitchinterval() + SWITCH_LATENCY)
        return max(min(self.computed, self.wall), self.wall - waited)


class Meter:
    """Measures one stretch of the thread that makes it."""

    __slots__ = ("_cpu", "_started", "_switches")

    def __init__(self) -> None:
        """Start to measure."""
        self._switches = _switches()
        self._started = time.perf_counter()
        self._cpu = time.thread_time()

    def read(self) -> Stretch:
        """Return what the thread has done since. The same thread."""
        cpu = time.thread_time() - self._cpu
        return Stretch(self._started, time.perf_counter() - self._started, cpu, _switches() - self._switches)


def _switches() -> int:
    if RUSAGE_THREAD is None:
        return 0
    usage = getrusage(RUSAGE_THREAD)
    return usage.ru_nvcsw + usage.ru_nivcsw


class CostWatch:
    """Watches the stretches of one callback in this interpreter. The run's event loop only."""

    def __init__(self, handlers: Handlers, steps: StepTimes) -> None:
        """Watch a callback.

        Args:
            handlers: The callback's methods.
            steps: The run's.
        """
        # Written here, read by any thread.
        self.warning = ""
        """How the log named the callback as one that computes; empty if it did not."""
        self.slowdown: float | None = None
        """How many times as long steps took meanwhile; None if that is unknown."""
        self._handlers = handlers
        self._steps = steps
        self._warned_of_hold_at = -math.inf
        # The time over which the share of a core is taken: its start, and CPU seconds since.
        self._window_start = -math.inf
        self._window_cpu = 0.0
        self._quiet_until = -math.inf  # no judgement until then

    def add(self, stretch: Stretch, what: str, *, on_loop: bool) -> None:
        """Note a stretch, and name the callback where it is due.

        Args:
            stretch: What its thread did.
            what: What it handled.
            on_loop: True if it was the event loop's thread.
        """
        is_watched = not self.warning and not self._steps.has_ended
        if stretch.wall < SPAN and stretch.started - self._window_start <= WINDOW:
            # Too short for all but its share of a core, like most.
            window_cpu = self._window_cpu + stretch.computed
            if window_cpu < SHARE * WINDOW or not is_watched:
                self._window_cpu = window_cpu
                return
        computed = 0.0 if was_importing(stretch.started) else stretch.computed
        computes = computed >= STRETCH and computed >= STRETCH_SHARE * stretch.held
        if on_loop and stretch.held > HOLD_WARNING and not (computes and (is_watched or self.warning)):
            self._warn_of_hold(stretch, what)
        if not is_watched:
            return
        if computed >= SPAN:
            self._steps.add(Span(self._handlers.name, stretch.started, stretch.ended))
        if stretch.started - self._window_start > WINDOW:
            self._window_start, self._window_cpu = stretch.started, 0.0
        self._window_cpu += computed
        seconds = stretch.ended - self._window_start
        if computes:
            told = f"computed for {computed:.2f} s at a stretch"
        elif self._window_cpu >= SHARE * max(WINDOW, seconds):
            told = f"computed for {self._window_cpu:.2f} of {seconds:.1f} s"
        else:
            return
        if stretch.ended >= self._quiet_until:
            self._quiet_until = math.inf
            judge = functools.partial(self._judge, told, what, stretch if computes and on_loop else None)
            # What the steps beside it took is known then.
            self._steps.after_next(judge)

    def _judge(self, told: str, what: str, hold: Stretch | None) -> None:
        """Name the callback as one that computes, unless training lost nothing by it.

        Args:
            told: What it did.
            what: What it handled.
            hold: The stretch, if it held the event loop: others lose by that, also where training does not.
        """
        name = self._handlers.name
        delay = self._steps.compare(name)
        if delay is not None and delay.lost_at_most < COSTLESS * delay.beside:
            self._window_start, self._quiet_until = -math.inf, time.perf_counter() + WINDOW
            if hold is not None:
                self._warn_of_hold(hold, what)
            return
        cost = ""
        if delay is not None and delay.is_sure:
            self.slowdown = delay.slowdown
            cost = (
                f": {delay.steps} steps beside it took {delay.slowdown:.1f} times as long as others, "
                f"{delay.lost:.2f} s in all"
            )
        is_mixed = self._handlers.deciders or self._handlers.hooks
        split = ", once its deciders and step hooks are a callback of their own" if is_mixed else ""
        self.warning = (
            f"callback {name} {told} while handling {what}, in the interpreter that training needs{cost}. "
            f'runs_in = "process" gives it a process of its own{split}'
        )
        logger.warning("%s", self.warning)

    def _warn_of_hold(self, stretch: Stretch, what: str) -> None:
        if stretch.ended - self._warned_of_hold_at <= WARNING_INTERVAL:
            return
        self._warned_of_hold_at = stretch.ended
        logger.warning(
            "callback %s held the event loop for %.0f ms (%.0f ms of them computing) while handling %s: "
            "await something, or make the handler a plain def, which runs in a thread",
            self._handlers.name,
            stretch.held * 1e3,
            stretch.computed * 1e3,
            what,
        )
