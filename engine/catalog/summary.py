"""Summary: last and best values of a run's metrics, and a sparkline, from its milestones.

A run keeps one for its `run.json`, and readers make one from the log of a run that has not ended.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from offloop.engine.encoding import with_non_finite_as_text
from offloop.engine.events import EpochEnd, Evaluated, Event, StepEnd, TrainEnd, ValidationEnd
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction, is_better

SPARKLINE: Final = 32
"""Most values of a sparkline."""
OF_STEPS: Final = frozenset({"loss", "lr"})
"""Values of single steps. They have no best one: a summary does not see all steps."""


class RunMetric(msgspec.Struct, frozen=True, kw_only=True):
    """A metric of a run."""

    last: float
    """Last value; may be NaN or infinite."""
    best: float | None = None
    """Best finite value of the run. None if there is none; if it is unknown whether less or more is better; or for a
    run that goes on with a log above 1 MiB, of which a list reads only the end."""
    best_step: int | None = None
    """Step at which it was reached."""
    mode: Direction | None = None
    """Whether less or more is better; None if unknown."""


class Summary:
    """Last and best values, from the milestones so far. Its size does not grow with the run. One thread at a time."""

    def __init__(
        self,
        monitor: str,
        direction_of: Callable[[str], Direction | None] = metric_direction,
        *,
        sees_all: bool = True,
    ) -> None:
        """Begin without values.

        Args:
            monitor: Metric of the sparkline.
            direction_of: Returns whether less or more of a metric is better.
            sees_all: False if milestones are left out, so that best values stay unknown.
        """
        self._sees_all = sees_all
        self.metrics: dict[str, RunMetric] = {}
        self._monitor = monitor
        self._direction_of = direction_of
        # Every n-th value of the monitored metric; n doubles when there are too many
        self._values: list[float] = []
        self._every = 1
        self._seen = 0
        self._newest: float | None = None

    def take(self, event: Event) -> None:
        """Take the values of the next event in. Those of steps are taken as they come, so the last one suffices."""
        match event:
            case ValidationEnd() | EpochEnd():
                self._add(event.step, event.metrics)
            case Evaluated():
                self._add(event.of_step, event.metrics)
            case StepEnd():
                if event.loss is not None:
                    self._add(event.step, {"loss": event.loss})
                self._add(event.step, {"lr": event.lr, **event.metrics}, of_steps=True)
            case TrainEnd():
                if event.failed_step is not None and event.failed_loss is not None:
                    self._add(event.failed_step, {"loss": event.failed_loss})

    def _add(self, step: int, values: Mapping[str, float], *, of_steps: bool = False) -> None:
        for name, value in values.items():
            known = self.metrics.get(name)
            mode = self._direction_of(name) if known is None else known.mode
            best, best_step = (None, None) if known is None else (known.best, known.best_step)
            is_of_step = of_steps or name in OF_STEPS
            if self._sees_all and mode is not None and not is_of_step and is_better(value, best, mode):
                best, best_step = value, step
            self.metrics[name] = RunMetric(last=value, best=best, best_step=best_step, mode=mode)
            # An `EpochEnd` repeats the values of its validation
            is_new = known is None or known.last != value
            if name == self._monitor and is_new and math.isfinite(value):
                self._draw(value)

    def _draw(self, value: float) -> None:
        self._newest = value
        if self._seen % self._every == 0:
            self._values.append(value)
        self._seen += 1
        if len(self._values) >= 2 * SPARKLINE:
            del self._values[1::2]
            self._every *= 2

    @property
    def sparkline(self) -> tuple[float, ...]:
        """At most 32 values of the monitored metric, from the first to the last; empty if there are less than two."""
        values = list(self._values)
        if self._newest is not None and (self._seen - 1) % self._every:
            values.append(self._newest)
        return thinned(values) if len(values) > 1 else ()

    def as_settings(self) -> dict[str, Any]:
        """Return the metrics as plain values, for `run.json`."""
        plain: dict[str, Any] = with_non_finite_as_text(
            {
                name: {key: value for key, value in msgspec.structs.asdict(each).items() if value is not None}
                for name, each in self.metrics.items()
            }
        )
        return plain


def thinned(values: "list[float]") -> tuple[float, ...]:
    """Return at most 32 of some values, evenly spaced, with the first and the last, to four digits."""
    last = len(values) - 1
    if last >= SPARKLINE:
        values = [values[round(index * last / (SPARKLINE - 1))] for index in range(SPARKLINE)]
    return tuple(float(f"{value:.4g}") for value in values)
