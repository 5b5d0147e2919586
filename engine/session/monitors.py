"""Which metric decides what. Each decision has one owner, and no callback changes another's.

default     Trainer(monitor=, mode=), else val_loss (of several val_loaders that of the first: val_fit_loss),
            or train_loss in a run without a validation:
            what plateaus and callbacks watch that name no metric of their own
best        Trainer(monitor=), else the first callback that names one (`Callback.best_by`), else the default:
            what `result.best` and `resume="best"` go by
the rest    a callback that names a metric decides by that one, for itself
"""

from collections.abc import Iterable
from typing import Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from offloop.engine.callback import Callback
from offloop.engine.config import TrainerConfig
from offloop.engine.data.val_loaders import PREFIX, ValLoader, bare_key, by_prefix
from offloop.engine.errors import ConfigError
from offloop.engine.metrics.names import RunMetrics, chosen_metrics, metric_direction, metrics_for
from offloop.engine.monitor import Direction, Mode, check_key, needs_validation


class Monitors:
    """The metrics that a run is judged by, and whether less or more of them is better. Never changes."""

    def __init__(
        self,
        config: TrainerConfig,
        callbacks: Iterable[Callback],
        metrics: RunMetrics,
        val_loader: ValLoader | None,
    ) -> None:
        """Choose them.

        Args:
            config: Has `monitor` and `mode`.
            callbacks: In declared order.
            metrics: As `train` gets them.
            val_loader: None in a run without a validation.

        Raises:
            ConfigError: A metric is of validations in a run that has none, or nothing says whether less or more of
                it is better.
        """
        self._config, self._metrics, self._prefixes = config, metrics, tuple(by_prefix(val_loader))
        self.default = config.monitor or f"{self._prefixes[0] if self._prefixes else 'train_'}loss"
        self._best_mode: Mode = config.mode
        self.best = self._checked(self.default, config.mode)
        self.is_best_named = config.monitor is not None
        """Whether the metric of `best` was asked for: then a run that does not make it fails."""
        wish = next((each.best_by for each in callbacks if getattr(each, "best_by", None) is not None), None)
        if wish is not None and not self.is_best_named:
            key, self._best_mode = wish
            self.best, self.is_best_named = self._checked(key, self._best_mode), True

    def direction_of(self, key: str) -> Direction | None:
        """Return whether less or more of a metric is better, None where nothing says so.

        What the trainer says about its own monitor comes first, then the metric itself and its name, then what is
        said about the metric of `best`.
        """
        if key == self.default and self._config.mode != "auto":
            return self._config.mode
        known = metric_direction(bare_key(key, self._prefixes), self._metrics)
        if known is None and key == self.best and self._best_mode != "auto":
            return self._best_mode
        return known

    @property
    def best_direction(self) -> Direction:
        """Whether less or more of the metric of `best` is better."""
        direction = self.direction_of(self.best) if self._best_mode == "auto" else self._best_mode
        assert direction is not None
        return direction

    def check_schedule(self, scheduler: LRScheduler, key: str | None, mode: Mode = "auto") -> None:
        """Raise where a plateau schedule would reduce the rate while its metric improves.

        Args:
            scheduler: Any schedule; only a plateau is looked at.
            key: The metric that it watches; None for the default.
            mode: Whether less or more of that is better; `"auto"`: ask the metric.

        Raises:
            ConfigError: It was made for the other direction.
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            return
        key = key or self.default
        direction = self.direction_of(key) if mode == "auto" else mode
        if direction is None or direction == scheduler.mode:
            return
        better = "less" if direction == "min" else "more"
        raise ConfigError(
            f"the plateau schedule was made with mode={scheduler.mode!r}, but it watches {key!r}, of which {better} is "
            f"better: make it with mode={direction!r}; or have it watch another metric, by Trainer(monitor=...) or "
            "LearningRateScheduler(plateau, monitor=...)"
        )

    def _checked(self, monitor: str, mode: Mode) -> str:
        """Return the key, if validations make it where they should and its direction is known."""
        if monitor.startswith("val_") and not self._prefixes:
            raise needs_validation(monitor)
        bare = bare_key(monitor, self._prefixes)
        if monitor in (f"val_{name}" for name in self._names("val")) and self._prefixes != (PREFIX,):
            of_each = ", ".join(prefix + monitor.removeprefix("val_") for prefix in self._prefixes)
            raise ConfigError(
                f"monitor={monitor!r} is of no val_loader, there are several: use one of {of_each}"
            )
        check_key(monitor)
        if mode == "auto" and metric_direction(bare, self._metrics) is None:
            raise ConfigError(
                f"monitor={monitor!r} is no metric that is known: {self._known_keys()} will be made. "
                'If a step logs it, say whether less or more of it is better: mode="min" or mode="max"'
            )
        return monitor

    def _names(self, data_set: Literal["train", "val"]) -> tuple[str, ...]:
        return ("loss", *chosen_metrics(metrics_for(data_set, self._metrics)))

    def _known_keys(self) -> str:
        keys = [f"train_{name}" for name in self._names("train")]
        keys += [f"{prefix}{name}" for prefix in self._prefixes for name in self._names("val")]
        return ", ".join(keys)
