"""The only meaning of "better", and a monitor: one metric, watched for improvement.

NaN and infinities are never better; 0.0 is a value like any other; ties keep the older value.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol, get_args

from offloop.engine import checks
from offloop.engine.errors import ConfigError
from offloop.engine.events import EpochEnd, ValidationEnd

__all__ = ["EVALUATED", "Direction", "Mode", "Monitor", "is_better"]

Direction = Literal["min", "max"]
"""`"min"` where less of a metric is better, `"max"` where more is."""
Mode = Literal["auto", "min", "max"]
"""A direction; `"auto"` takes that of the metric."""

EVALUATED: Final = "eval_"
"""Prefix of metrics of checkpoints that are evaluated beside training, and so known later than their step."""


def is_better(score: float, best: float | None, direction: Direction, min_delta: float = 0.0) -> bool:
    """Return whether a score beats the best so far by more than `min_delta`.

    Args:
        score: NaN and infinities are never better.
        best: None if there is no score yet: then every finite one is better.
        direction: Whether less or more is better.
        min_delta: Least improvement, absolute, at least 0.
    """
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return score < best - min_delta if direction == "min" else score > best + min_delta


def check_key(key: object, *, of_checkpoints: bool = False) -> None:
    """Raise `ConfigError` for what cannot be the key of a metric.

    Args:
        key: The key.
        of_checkpoints: Whether metrics of checkpoints that are evaluated beside training can be used.
    """
    if isinstance(key, str) and key.startswith(EVALUATED):
        if of_checkpoints:
            return
        raise ConfigError(
            f"monitor={key!r} cannot decide anything in training: it is known when a checkpoint has been evaluated, "
            f"and when that is depends on the machine. Name a train_ or val_ metric; ModelCheckpoint(monitor={key!r}) "
            "chooses the best checkpoint by it"
        )
    if not isinstance(key, str) or not key.startswith(("train_", "val_")):
        hint = f": did you mean {f'val_{key}'!r}?" if isinstance(key, str) and key.isidentifier() else ""
        raise ConfigError(f'monitor must begin with train_ or val_, like "val_loss"; got {key!r}{hint}')


def needs_validation(key: str) -> ConfigError:
    """Return the error for a metric of validations in a run that has none."""
    return ConfigError(f"monitor={key!r} needs a validation: give train() a val_loader")


class MonitoredRun(Protocol):
    """What a monitor asks of a run; a `RunHandle` has it."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Why commands cannot be given in this run, by their names."""
        ...

    def direction_of(self, metric: str, /) -> Direction | None:
        """Return whether less or more of a metric is better, None if that is not known."""


class Monitor:
    """A metric, whether less or more of it is better, and the best value so far.

    Use it from one thread: callbacks call it in deciders, that is in the training thread.
    """

    def __init__(
        self, key: str, mode: Mode = "auto", min_delta: float = 0.0, *, of_checkpoints: bool = False
    ) -> None:
        """Watch a metric.

        Args:
            key: Key of the metric, like `"val_loss"`.
            mode: Whether less or more of it is better; `"auto"` asks the run, in `begin`.
            min_delta: Least improvement, absolute, at least 0.
            of_checkpoints: Whether `eval_...` is a key, of which `value_at` knows no value.

        Raises:
            ConfigError: The key is of no training or validation, or another value is out of range.
        """
        check_key(key, of_checkpoints=of_checkpoints)
        checks.choice("mode", mode, get_args(Mode))
        checks.number("min_delta", min_delta, at_least=0)
        self.key = key
        self.min_delta = float(min_delta)
        self.best: float | None = None
        self._mode = mode
        self._direction: Direction | None = None if mode == "auto" else mode

    @property
    def direction(self) -> Direction:
        """Whether less or more is better; with `mode="auto"` known once `begin` was called."""
        assert self._direction is not None
        return self._direction

    @property
    def is_evaluated(self) -> bool:
        """True for a metric of checkpoints that are evaluated beside training."""
        return self.key.startswith(EVALUATED)

    def begin(self, run: MonitoredRun) -> None:
        """Take the direction from a run that starts.

        Raises:
            ConfigError: `mode="auto"`, and neither the metric nor its name tells the direction; or it is a metric of
                validations and the run has none.
        """
        if self.key.startswith("val_") and "validate" in run.refused:
            raise needs_validation(self.key)
        if self._mode == "auto":
            self._direction = run.direction_of(self.key)
            if self._direction is None:
                raise ConfigError(
                    f"monitor={self.key!r}: neither the metric nor its name tells whether less or more is better; "
                    'check the spelling, or give mode="min" or mode="max"'
                )

    def value_at(self, event: ValidationEnd | EpochEnd) -> float | None:
        """Return the metric at the event that carries it: `val_...` at `ValidationEnd`, others at `EpochEnd`.

        Returns:
            None at the other event, and always for `eval_...`.

        Raises:
            MetricNotFoundError: The event lacks the metric; the text lists those that it has.
        """
        if not self.is_evaluated and isinstance(event, ValidationEnd) is self.key.startswith("val_"):
            return event.metrics[self.key]
        return None

    def is_beyond(self, value: float, threshold: float) -> bool:
        """Return whether a value is better than a threshold."""
        return is_better(value, threshold, self.direction)

    def improves(self, value: float) -> bool:
        """Return whether a value beats the best by more than `min_delta`; it is the best from then on."""
        if not is_better(value, self.best, self.direction, self.min_delta):
            return False
        self.best = value
        return True

    def state_dict(self) -> Mapping[str, Any]:
        """Return the best value so far."""
        return {"key": self.key, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the best of another metric is ignored."""
        self.best = state["best"] if state["key"] == self.key else None
