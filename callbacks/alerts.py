"""Alerts: rules about a run, an event when one is broken, and a function of yours that is called with it.

    Alerts(notify, Spike("loss", factor=5), Below("val_accuracy", 0.5), Stalled(600))

A rule alerts when its condition begins, and again only after the condition has ended: a loss that stays NaN is one
alert. Rules are evaluated on the event loop. Only `Stalled` has a thread, because a run without steps publishes no
events.
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
    RunHandle,
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
"""`Stalled(n)` checks ten times in n seconds, so it alerts at most a tenth of n late."""


class Alert(Event, frozen=True, kw_only=True):
    """Published when a rule of `Alerts` is broken.

    Thread: event loop; the watching thread if the run stalls.
    """

    rule: str
    """The rule as written in the script: `Below('val_accuracy', 0.5)`."""
    message: str
    """What is wrong, as text."""
    value: float | None = None
    """The value that broke the rule; None if the rule is not about a value."""
    metric: str | None = None
    """Key of the metric that broke the rule, such as `loss`; None if the rule is not about one."""


Notify = Callable[[Alert], Awaitable[object]]


class Rule:
    """A condition to alert on. Subclass it for your own rules, and return a message from `look` while it is broken."""

    key: str | None = None
    """The metric given to `look`: `loss`, `lr`, `grad_norm`, a value that steps log, `train_...` or `val_...`."""

    def reset(self) -> None:
        """Discard the state of the previous run."""

    def look(self, value: float) -> str:
        """Return what is wrong with a new value of the metric; empty if nothing is."""
        return ""

    def look_at_end(self, event: TrainEnd) -> str:
        """Return what is wrong with how the run ended; empty if nothing is."""
        return ""


class _OfMetric(Rule):
    """A rule about one metric."""

    def __init__(self, key: str) -> None:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"a rule needs the key of a metric, like 'loss'; got {key!r}")
        self.key: str = key


class NonFinite(_OfMetric):
    """The metric is NaN or infinite.

    With `on_nonfinite="raise"`, the trainer's default, such a loss fails the run before it is published; `Failed`
    alerts then.
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


class _Limit(_OfMetric):
    """A rule that a metric breaks beyond a limit."""

    def __init__(self, key: str, limit: float) -> None:
        """Choose the metric and its limit.

        Args:
            key: Name of the metric: `loss`, `lr`, `grad_norm`, a value that steps log, `train_...` or `val_...`.
            limit: The last value that does not break the rule.
        """
        super().__init__(key)
        checks.number("limit", limit)
        self.limit = float(limit)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r}, {self.limit:g})"


class Above(_Limit):
    """The metric is above a limit."""

    def look(self, value: float) -> str:
        return f"{self.key} is {value:.6g}, above {self.limit:g}" if value > self.limit else ""


class Below(_Limit):
    """The metric is below a limit."""

    def look(self, value: float) -> str:
        return f"{self.key} is {value:.6g}, below {self.limit:g}" if value < self.limit else ""


class Spike(_OfMetric):
    """The metric is above a multiple of its running median, over at most `window` earlier finite values.

    It starts once a quarter of the window is filled, and needs a median above 0. Spikes enter the window too; a few
    hardly move the median.
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
        # The same values, kept sorted for the median.
        self._sorted: list[float] = []

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
    """No optimizer step for a number of seconds.

    Pauses do not count, but validations do: allow for the longest one, and for the first step with its compilation.
    A blocked event loop causes no false alert: the rule reads the progress of the run itself.
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

    The function is awaited on the event loop; meanwhile later events wait, and samples may be dropped. If it raises,
    that is reported like any failure of a callback. About the last steps or a failure it may be called after the run
    has ended; such an alert is not published as an event.

    The steps that it sees can depend on the machine's load. Use a decider, such as `EarlyStopping`, to change the run
    reproducibly.
    """

    @explains_arguments()
    def __init__(self, notify: Notify | None = None, *rules: Rule) -> None:
        """Choose the function and the rules.

        Args:
            notify: An `async def` of one argument, the `Alert`; None to only publish the event.
            rules: The conditions to alert on. Default: `NonFinite("loss")`, `Spike("loss")`, `Failed()`.

        Raises:
            TypeError: `notify` cannot be called, or a rule is no `Rule`.
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
        self.reset()

    def reset(self) -> None:
        # Indices of the rules that are broken now.
        self._broken: set[int] = set()
        # Rules and messages of this instance's alerts on their way to `on_alert`, which may get a copy of the event.
        # Event loop and watchdog append, the event loop removes; both are atomic.
        self._published: list[tuple[str, str]] = []
        self._watchdog: _Watchdog | None = None
        for rule in self.rules:
            rule.reset()

    async def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        stalled = [rule for rule in self.rules if isinstance(rule, Stalled)]
        if stalled:
            self._watchdog = _Watchdog(stalled, run, self._publish)

    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        values = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}
        await self._look(event, values | event.metrics, run)

    async def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        await self._look(event, event.metrics, run)
        self._expect("val_", event)

    async def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        # The metrics of a validation were checked when it ended.
        metrics = {key: value for key, value in event.metrics.items() if key.startswith("train_")}
        await self._look(event, metrics, run)
        self._expect("train_", event)

    async def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        for rule in self.rules:
            if message := rule.look_at_end(event):
                await self._alert(event, rule, message, None, run)

    async def on_alert(self, event: Alert, run: RunHandle) -> None:
        is_of_this_instance = (event.rule, event.message) in self._published
        if is_of_this_instance:
            self._published.remove((event.rule, event.message))
            await self._call(event)

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()

    async def _look(self, event: Event, values: Mapping[str, float | None], run: RunHandle) -> None:
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
        """Raise if a metric of a rule is missing: a mistyped key would go unnoticed."""
        for rule in self.rules:
            if rule.key is not None and rule.key.startswith(prefix):
                event.metrics[rule.key]

    async def _alert(
        self, event: Event, rule: Rule, message: str, value: float | None, run: RunHandle
    ) -> None:
        # Its position is that of the event that broke the rule; training may have got further.
        alert = Alert(
            rule=repr(rule),
            message=message,
            value=value,
            metric=rule.key,
            epoch=event.epoch,
            step=event.step,
            batch=event.batch,
        )
        if not self._publish(alert, run):
            await self._call(msgspec.structs.replace(alert, run_id=run.id, time=time.time()))

    def _publish(self, alert: Alert, run: RunHandle) -> bool:
        """Publish an alert, which brings it to `on_alert`. Return False if the run is over. Any thread."""
        logger.warning("alert in run %s: %s", run.id, alert.message)
        self._published.append((alert.rule, alert.message))
        try:
            run.publish(alert)
        except BusClosedError:
            self._published.remove((alert.rule, alert.message))
            return False
        return True

    async def _call(self, alert: Alert) -> None:
        if self.notify is None:
            return
        awaitable = self.notify(alert)
        if not inspect.isawaitable(awaitable):
            raise TypeError(f"notify must be an async def, but {self.notify!r} returned nothing to await")
        await awaitable


class _Watchdog:
    """A thread that checks the progress of a run and alerts when it stalls."""

    def __init__(
        self, rules: list[Stalled], run: RunHandle, publish: Callable[[Alert, RunHandle], bool]
    ) -> None:
        self._rules = rules
        self._run = run
        self._publish = publish
        self._interval = min(rule.seconds for rule in rules) / LOOKS
        # Step and state at the last look, and since when they are these. Only the thread uses them.
        self._seen: object = None
        self._since = time.monotonic()
        self._alerted: set[Stalled] = set()
        self._closed = threading.Event()
        # A daemon: it holds no resources, and must not keep the process alive if the event loop dies.
        self._thread = Thread(self._watch, name=f"offloop-alerts-{run.id}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Blocks for at most one look. Idempotent."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self._look()

    def _look(self) -> None:
        state, now = self._run.state, time.monotonic()
        seen = (self._run.step, state)
        # The time starts again after a step and after a pause.
        if seen != self._seen:
            self._seen, self._since = seen, now
            self._alerted.clear()
        quiet = now - self._since
        for rule in self._rules:
            if quiet >= rule.seconds and rule not in self._alerted and state in ("running", "validating"):
                self._alerted.add(rule)
                message = f"no step for {quiet:.3g} s after step {self._run.step} ({state})"
                self._publish(Alert(rule=repr(rule), message=message, value=quiet), self._run)
