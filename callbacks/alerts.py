"""Alerts: rules over a run's events, an event when one is broken, and a function of yours to tell somebody.

    Alerts(tell, Spike("loss", factor=5), Below("val_accuracy", 0.5), Stalled(600))

A rule speaks once when what it looks for begins, and again only after it has ended in between: a loss that
stays NaN is one alert. Rules are asked on the event loop; only `Stalled` has a thread, because a run that
stands still publishes nothing that could be handled.
"""

import bisect
import collections
import inspect
import logging
import math
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec

from offloop.engine import (
    BusClosedError,
    Callback,
    ConfigError,
    EpochEnd,
    Event,
    Run,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    checks,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

LOOKS: Final = 10
"""`Stalled(n)` looks ten times in n seconds, so it speaks at most a tenth of n late."""


class Alert(Event, frozen=True, kw_only=True):
    """Published when a rule of `Alerts` is broken.

    Thread: event loop; the watching thread if the run stands still.
    """

    rule: str
    """The rule as written in the script: `Below('val_accuracy', 0.5)`."""
    message: str
    """What is wrong, as text."""
    value: float | None = None
    """The value that broke the rule; None if the rule is not about a value."""


Notify = Callable[[Alert], Awaitable[object]]


class Rule:
    """What to look for. Subclass it for rules of your own: return words from `look` while it is broken."""

    key: str | None = None
    """The metric that `look` wants: `loss`, `lr`, `grad_norm`, what steps log, `train_...` or `val_...`."""

    def reset(self) -> None:
        """Forget the previous run."""

    def look(self, value: float) -> str:
        """Return what is the matter with the metric's new value, empty if nothing is."""
        return ""

    def look_at_end(self, event: TrainEnd) -> str:
        """Return what is the matter with how the run has ended, empty if nothing is."""
        return ""


class _OfMetric(Rule):
    """A rule about one metric."""

    def __init__(self, key: str) -> None:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"a rule needs the key of a metric, like 'loss'; got {key!r}")
        self.key: str = key


class NonFinite(_OfMetric):
    """The metric is NaN or infinite.

    With `on_nonfinite="raise"`, the trainer's default, such a loss fails the run before it is published: that
    is what `Failed` is for.
    """

    def __init__(self, key: str = "loss") -> None:
        """Choose the metric.

        Args:
            key: Name of the metric: `loss`, `lr`, `grad_norm`, a value that steps log, `train_...` or `val_...`.
        """
        super().__init__(key)

    def look(self, value: float) -> str:
        return "" if math.isfinite(value) else f"{self.key} is {value}"

    def __repr__(self) -> str:
        return f"NonFinite({self.key!r})"


class Above(_OfMetric):
    """The metric is above a limit."""

    def __init__(self, key: str, limit: float) -> None:
        """Choose the metric and its limit.

        Args:
            key: Name of the metric: `loss`, `lr`, `grad_norm`, a value that steps log, `train_...` or `val_...`.
            limit: The rule is broken by values above this.
        """
        super().__init__(key)
        checks.number("limit", limit)
        self.limit = float(limit)

    def look(self, value: float) -> str:
        return f"{self.key} is {value:.6g}, above {self.limit:g}" if value > self.limit else ""

    def __repr__(self) -> str:
        return f"Above({self.key!r}, {self.limit:g})"


class Below(_OfMetric):
    """The metric is below a limit."""

    def __init__(self, key: str, limit: float) -> None:
        """Choose the metric and its limit.

        Args:
            key: Name of the metric: `loss`, `lr`, `grad_norm`, a value that steps log, `train_...` or `val_...`.
            limit: The rule is broken by values below this.
        """
        super().__init__(key)
        checks.number("limit", limit)
        self.limit = float(limit)

    def look(self, value: float) -> str:
        return f"{self.key} is {value:.6g}, below {self.limit:g}" if value < self.limit else ""

    def __repr__(self) -> str:
        return f"Below({self.key!r}, {self.limit:g})"


class Spike(_OfMetric):
    """The metric is above a multiple of its running median: of the finite values before it, up to `window`.

    Says nothing before a quarter of the window is there, nor while the median is not above 0. The spikes
    themselves join the window; a median does not mind a few.
    """

    def __init__(self, key: str = "loss", *, factor: float = 3.0, window: int = 100) -> None:
        """Choose the metric and what counts as a spike.

        Args:
            key: Name of the metric: `loss`, `lr`, `grad_norm`, a value that steps log, `train_...` or `val_...`.
            factor: Multiple of the median that breaks the rule, above 1.
            window: Number of values in the median, at least 4.
        """
        super().__init__(key)
        checks.number("factor", factor, above=1)
        checks.whole_number("window", window, at_least=4)
        self.factor = float(factor)
        self.window = window
        self.reset()

    def reset(self) -> None:
        self._recent: collections.deque[float] = collections.deque()
        self._sorted: list[float] = []  # the same values, so that the median costs no sorting

    def look(self, value: float) -> str:
        if not math.isfinite(value):
            return ""
        found = ""
        if len(self._recent) >= self.window // 4:
            usual = statistics.median(self._sorted)
            if usual > 0 and value > self.factor * usual:
                found = f"{self.key} is {value:.6g}, {value / usual:.3g} times its running median {usual:.6g}"
        if len(self._recent) == self.window:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._recent.append(value)
        bisect.insort(self._sorted, value)
        return found

    def __repr__(self) -> str:
        return f"Spike({self.key!r}, factor={self.factor:g}, window={self.window})"


class Failed(Rule):
    """The run has failed."""

    def look_at_end(self, event: TrainEnd) -> str:
        return f"the run has failed: {event.reason}" if event.status == "failed" else ""

    def __repr__(self) -> str:
        return "Failed()"


class Stalled(Rule):
    """No optimizer step for so many seconds.

    A pause does not count, a validation does: give more seconds than one takes, and than the first step with
    its compilation. Whatever holds the event loop up cannot make it speak wrongly: it looks at the run itself.
    """

    def __init__(self, seconds: float) -> None:
        """Choose how long a step may take.

        Args:
            seconds: Longest time between two steps, above 0.
        """
        checks.number("seconds", seconds, above=0)
        self.seconds = float(seconds)

    def __repr__(self) -> str:
        return f"Stalled({self.seconds:g})"


class Alerts(Callback):
    """Publishes an `Alert` when a rule is broken, and calls a function with it.

    The function is awaited on the event loop; while it takes its time, later events wait and samples may be
    thinned. One that raises is reported as any failing callback is. An alert that comes after the end of the
    run, about its last steps or its failure, is no event any more, but the function is called.

    Which steps it sees can depend on the load: it only tells people. What must change the run the same way every
    time is a decider's task, see `EarlyStopping`.
    """

    @explains_arguments()
    def __init__(
        self, notify: Notify | None = None, *rules: Rule, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Choose whom to tell and what about.

        Args:
            notify: `async def` of one argument, the `Alert`; None if the event is enough.
            rules: What to look for; without any: `NonFinite("loss")`, `Spike("loss")`, `Failed()`.
            clock: Seconds; for tests.
        """
        if notify is not None and (isinstance(notify, Rule) or not callable(notify)):
            raise TypeError(
                f"notify must be an async function of an Alert or None, got {notify!r}; "
                "rules come after it: Alerts(None, NonFinite(), Spike())"
            )
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"rules must be instances of Rule, like Above('val_loss', 10); got {rule!r}")
        self.notify = notify
        self.rules = rules or (NonFinite(), Spike(), Failed())
        self._clock = clock
        self._watchdog: _Watchdog | None = None
        self.reset()

    def reset(self) -> None:
        self._broken: set[int] = set()  # places of the rules that are broken right now
        # Ours on their way to `on_alert`, by id; added by the event loop and the watchdog, taken out by the loop.
        self._published: dict[int, Alert] = {}
        self._watchdog = None
        for rule in self.rules:
            rule.reset()

    async def on_train_start(self, event: TrainStart, run: Run) -> None:
        stalled = [rule for rule in self.rules if isinstance(rule, Stalled)]
        if stalled:
            self._watchdog = _Watchdog(stalled, run, self._publish, self._clock)

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        values = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}
        await self._look(event, values | event.metrics, run)

    async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        await self._look(event, event.metrics, run)
        self._expect("val_", event)

    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        made_here = {key: value for key, value in event.metrics.items() if key.startswith("train_")}
        await self._look(event, made_here, run)  # the validation's were looked at when it ended
        self._expect("train_", event)

    async def on_train_end(self, event: TrainEnd, run: Run) -> None:
        for rule in self.rules:
            if message := rule.look_at_end(event):
                await self._alert(event, rule, message, None, run)

    async def on_alert(self, event: Alert, run: Run) -> None:
        if self._published.pop(id(event), None) is not None:  # else it is another instance's
            await self._tell(event)

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()

    async def _look(self, event: Event, values: Mapping[str, float | None], run: Run) -> None:
        for place, rule in enumerate(self.rules):
            value = None if rule.key is None else values.get(rule.key)
            if value is None:
                continue
            message = rule.look(value)
            if not message:
                self._broken.discard(place)
            elif place not in self._broken:
                self._broken.add(place)
                await self._alert(event, rule, message, value, run)

    def _expect(self, prefix: str, event: ValidationEnd | EpochEnd) -> None:
        """Raise, as a mistyped key would else never be noticed."""
        for rule in self.rules:
            if rule.key is not None and rule.key.startswith(prefix):
                event.metrics[rule.key]

    async def _alert(self, event: Event, rule: Rule, message: str, value: float | None, run: Run) -> None:
        # It stands where the event is that broke the rule, however far training has got meanwhile.
        alert = Alert(
            rule=repr(rule),
            message=message,
            value=value,
            epoch=event.epoch,
            step=event.step,
            batch=event.batch,
        )
        if not self._publish(alert, run):
            await self._tell(msgspec.structs.replace(alert, run_id=run.id, time=time.time()))

    def _publish(self, alert: Alert, run: Run) -> bool:
        """Publish it, which brings it to `on_alert`; False if the run is over. Any thread."""
        logger.warning("alert in run %s: %s", run.id, alert.message)
        self._published[id(alert)] = alert
        try:
            run.publish(alert)
        except BusClosedError:
            del self._published[id(alert)]
            return False
        return True

    async def _tell(self, alert: Alert) -> None:
        if self.notify is None:
            return
        told = self.notify(alert)
        if not inspect.isawaitable(told):
            raise TypeError(f"notify must be an async def, {self.notify!r} gave nothing to await")
        await told


class _Watchdog:
    """A thread that looks at a run now and then and says when it stands still."""

    def __init__(
        self,
        rules: list[Stalled],
        run: Run,
        publish: Callable[[Alert, Run], bool],
        clock: Callable[[], float],
    ) -> None:
        self._rules = rules
        self._run = run
        self._publish = publish
        self._clock = clock
        self._interval = min(rule.seconds for rule in rules) / LOOKS
        self._seen: object = None  # step and state at the last look
        self._since = clock()
        self._told: set[Stalled] = set()
        self._is_closed = False  # guarded by _changed, as are the two counts
        self._wanted = self._looks = 0
        self._changed = threading.Condition()
        # A daemon: it holds nothing, and must not keep an interpreter whose event loop died.
        self._thread = Thread(self._watch, name=f"offloop-alerts-{run.id}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Blocks for at most one look. Twice is fine."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def look_now(self) -> None:
        """Look and return when that is done. Blocks; for a clock that a test turns."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._looks >= wanted or self._is_closed)

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._wanted > self._looks, self._interval)
                if self._is_closed:
                    return
                wanted = self._wanted
            self._look()
            with self._changed:
                self._looks = wanted
                self._changed.notify_all()

    def _look(self) -> None:
        state, now = self._run.state, self._clock()
        seen = (self._run.step, state)
        if seen != self._seen:  # so a pause ends with a fresh start
            self._seen, self._since = seen, now
            self._told.clear()
        for rule in self._rules:
            quiet = now - self._since
            if quiet >= rule.seconds and rule not in self._told and state in ("running", "validating"):
                self._told.add(rule)
                message = f"no step for {quiet:.3g} s after step {self._run.step} ({state})"
                self._publish(Alert(rule=repr(rule), message=message, value=quiet), self._run)
