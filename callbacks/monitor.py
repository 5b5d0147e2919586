"""Monitor: one metric, watched for improvement. The one meaning of "better" for all callbacks.

NaN and infinities never improve; 0.0 is a value; the best moves only when it is beaten by more than
`min_delta`; ties keep the older.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from offloop.engine import ConfigError, EpochEnd, Run, TrainerConfig, ValidationEnd

Mode = Literal["auto", "min", "max"]


class Monitor:
    """A metric by key, whether less or more of it is better, and the best value so far."""

    def __init__(self, key: str, mode: Mode = "auto", min_delta: float = 0.0) -> None:
        """Watch `key`, like `"val_loss"`.

        Raises:
            ConfigError: The key is of no training or validation, or `min_delta` is negative.
        """
        if not isinstance(key, str) or not key.startswith(("train_", "val_")):
            raise ConfigError(f'monitor must begin with train_ or val_, like "val_loss"; got {key!r}')
        if mode not in ("auto", "min", "max"):
            raise ConfigError(f"mode must be 'auto', 'min' or 'max', got {mode!r}")
        if (
            isinstance(min_delta, bool)
            or not isinstance(min_delta, int | float)
            or not 0 <= min_delta < math.inf
        ):
            raise ConfigError(f"min_delta must be a number of at least 0, got {min_delta!r}")
        self.key = key
        self.min_delta = float(min_delta)
        self.best: float | None = None
        self._mode = mode
        self._config: TrainerConfig | None = None  # of the run; says when validations are due
        self._judged_epoch = -1
        self._direction: Literal["min", "max"] | None = None if mode == "auto" else mode

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether less or more is better; known from `begin` on."""
        assert self._direction is not None
        return self._direction

    def begin(self, run: Run) -> None:
        """Find out what better means in this run.

        Raises:
            ConfigError: `mode="auto"`, and neither the metric nor its name says what better means; or it is a metric
                of validations in a run that has none.
        """
        if self.key.startswith("val_") and "validate" in run.refused:
            raise ConfigError(f"monitor={self.key!r} needs a validation: give train() a val_loader")
        self._config = run.trainer.config
        self._judged_epoch = -1
        if self._mode == "auto":
            self._direction = run.direction_of(self.key)
            if self._direction is None:
                raise ConfigError(
                    f'monitor={self.key!r}: is less or more of it better? Give mode="min" or mode="max"'
                )

    def value_at(self, event: ValidationEnd | EpochEnd) -> float | None:
        """Return the metric where it is made: `val_...` at validations, else at the end of epochs; None elsewhere.

        Raises:
            MetricNotFoundError: It was due and was not made; the text lists what was.
        """
        if isinstance(event, ValidationEnd) is self.key.startswith("val_"):
            self._judged_epoch = event.epoch
            return event.metrics[self.key]
        if (
            isinstance(event, EpochEnd)
            and self._judged_epoch != event.epoch
            and self._validation_was_due(event)
        ):
            event.metrics[self.key]  # raising beats watching nothing for ever
        return None

    def _validation_was_due(self, event: EpochEnd) -> bool:
        """True if the epoch should have ended with a validation."""
        if self._config is None:
            return False
        every = self._config.val_every_n_epochs
        if every is None and self._config.val_every_n_steps is None:
            every = 1
        return every is not None and (event.epoch + 1) % every == 0

    def is_beyond(self, value: float, threshold: float) -> bool:
        """True if `value` is better than `threshold`."""
        return value < threshold if self._direction == "min" else value > threshold

    def improves(self, value: float) -> bool:
        """Take note of a value; True if it beats the best by more than `min_delta`."""
        if not math.isfinite(value):
            return False
        if self.best is not None:
            needed = self.best - self.min_delta if self._direction == "min" else self.best + self.min_delta
            if not self.is_beyond(value, needed):
                return False
        self.best = value
        return True

    def state_dict(self) -> Mapping[str, Any]:
        """Return the best value so far."""
        return {"key": self.key, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; a best of another metric is not taken over."""
        self.best = state["best"] if state["key"] == self.key else None
