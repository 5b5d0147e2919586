"""Monitors: the metrics by which a run is judged. Each decision has one owner, and no callback changes another's.

default     Trainer(monitor=, mode=), else val_loss (with several val_loaders that of the first: val_fit_loss),
            or train_loss without a validation:
            the metric of plateaus, and of callbacks that name none
best        Trainer(monitor=), else that of the first callback with `Callback.best_by`, else the default:
            the metric of `result.best` and `resume="best"`
others      a callback that names a metric uses it for its own decisions
"""

from collections.abc import Iterable
from typing import Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from offloop.engine.callback import Callback
from offloop.engine.config import TrainerConfig
from offloop.engine.data.val_loaders import PREFIX, ValLoader, bare_key, by_prefix, live_prefix
from offloop.engine.errors import ConfigError, nearest
from offloop.engine.metrics.names import ALIASES, RunMetrics, chosen_metrics, metric_direction, metrics_for
from offloop.engine.monitor import EVALUATED, Direction, Mode, check_key, needs_validation


class Monitors:
    """The metrics by which a run is judged, and their directions. Immutable."""

    def __init__(
        self,
        config: TrainerConfig,
        callbacks: Iterable[Callback],
        metrics: RunMetrics,
        val_loader: ValLoader | None,
        *,
        may_log: bool = True,
    ) -> None:
        """Choose the metrics.

        Args:
            config: For `monitor` and `mode`.
            callbacks: The callbacks in declared order.
            metrics: The argument of `train`.
            val_loader: None without a validation.
            may_log: Whether a step, an epoch or a step hook of the user's may log values of other names.

        Raises:
            ConfigError: One is a metric of validations and the run has none, it is not computed, or its direction is
                unknown.
        """
        callbacks = list(callbacks)
        self._may_log = may_log
        self._validates_live = any(each.validates_live for each in callbacks)
        self._config, self._metrics, self._prefixes = config, metrics, tuple(by_prefix(val_loader))
        self.default = config.monitor or f"{self._prefixes[0] if self._prefixes else 'train_'}loss"
        self._best_mode: Mode = config.mode
        self.best = self._checked(self.default, config.mode)
        for each in callbacks:
            for key in each.needs_metrics:
                self._check_computed(key)
        self.is_best_named = config.monitor is not None
        """Whether the metric of `best` was named; a run that does not compute it then fails."""
        evaluators = [each for each in callbacks if getattr(each, "evaluates_every", None) is not None]
        if len(evaluators) > 1:
            raise ConfigError(
                f"{' and '.join(type(each).__name__ for each in evaluators)} both evaluate checkpoints: give one of "
                "them, whose function returns the metrics of both"
            )
        for each in callbacks:
            named = getattr(each, "best_by", None)
            if named is not None and named[0].startswith(EVALUATED) and not evaluators:
                raise ConfigError(
                    f"monitor={named[0]!r} is a metric of checkpoints that are evaluated beside training, and no "
                    "callback evaluates them"
                )
        wish = next((each.best_by for each in callbacks if getattr(each, "best_by", None) is not None), None)
        if wish is not None and not self.is_best_named:
            key, self._best_mode = wish
            self.best, self.is_best_named = self._checked(key, self._best_mode, of_checkpoints=True), True

    def direction_of(self, key: str) -> Direction | None:
        """Return whether less or more of a metric is better, None if unknown.

        `Trainer(mode=)` comes first for its own monitor, then the metric and its name, then the mode that came with the
        metric of `best`.
        """
        if key == self.default and self._config.mode != "auto":
            return self._config.mode
        known = metric_direction(bare_key(key, self._prefixes), self._metrics)
        if known is None and key == self.best and self._best_mode != "auto":
            return self._best_mode
        return known

    @property
    def directions(self) -> dict[str, Direction]:
        """The directions of the metrics that the run computes, where they are known."""
        keys = (*self._known_keys(), self.default, self.best)
        return {key: direction for key in keys if (direction := self.direction_of(key)) is not None}

    @property
    def best_direction(self) -> Direction:
        """Whether less or more of the metric of `best` is better."""
        direction = self.direction_of(self.best) if self._best_mode == "auto" else self._best_mode
        assert direction is not None
        return direction

    def check_schedule(self, scheduler: LRScheduler, key: str | None, mode: Mode = "auto") -> None:
        """Raise if a plateau schedule would reduce the rate while its metric improves.

        Args:
            scheduler: Any schedule; only plateaus are checked.
            key: Its metric; None for the default.
            mode: Whether less or more is better; `"auto"` takes it from the metric.

        Raises:
            ConfigError: The plateau has the other direction.
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            return
        key = key or self.default
        direction = self.direction_of(key) if mode == "auto" else mode
        if direction is None or direction == scheduler.mode:
            return
        better = "less" if direction == "min" else "more"
        raise ConfigError(
            f"the plateau schedule has mode={scheduler.mode!r}, but {better} of its metric {key!r} is better: create "
            f"it with mode={direction!r}, or name another metric, by Trainer(monitor=...) or "
            "LearningRateScheduler(plateau, monitor=...)"
        )

    def _checked(self, monitor: str, mode: Mode, *, of_checkpoints: bool = False) -> str:
        """Return the key, if the run can compute the metric and its direction is known."""
        self._check_computed(monitor, of_checkpoints=of_checkpoints)
        if mode == "auto" and metric_direction(bare_key(monitor, self._prefixes), self._metrics) is None:
            give = 'give mode="min" or mode="max"'
            if monitor.startswith(EVALUATED):
                raise ConfigError(
                    f"monitor={monitor!r}: its name does not tell whether less or more is better, {give}"
                )
            raise ConfigError(
                f"monitor={monitor!r} is no known metric: {', '.join(self._known_keys())} will be computed. "
                f"If a step logs it, {give}"
            )
        return monitor

    def _check_computed(self, monitor: str, *, of_checkpoints: bool = False) -> None:
        """Raise `ConfigError` for a metric that the run cannot compute, as far as that is known before it starts."""
        if monitor.startswith("val_") and not self._prefixes:
            raise needs_validation(monitor)
        if monitor in (f"val_{name}" for name in self._names("val")) and self._prefixes != (PREFIX,):
            of_each = ", ".join(prefix + monitor.removeprefix("val_") for prefix in self._prefixes)
            raise ConfigError(
                f"monitor={monitor!r} is ambiguous with several val_loaders: use one of {of_each}"
            )
        check_key(monitor, of_checkpoints=of_checkpoints)
        known = self._known_keys()
        # What a user's own metric is called, if it gives several values, is known once it has computed them
        if self._may_log or monitor.startswith(EVALUATED) or monitor in known or self._has_instances():
            return
        bare = bare_key(monitor, self._prefixes).removeprefix("train_").removeprefix("val_")
        near = nearest(monitor, known)
        if bare in ALIASES and ALIASES[bare] not in self._names("train" if monitor[0] == "t" else "val"):
            advice = f"give train() metrics=[{ALIASES[bare]!r}]"
            if bare != ALIASES[bare]:
                advice += f" and monitor {monitor.removesuffix(bare)}{ALIASES[bare]}"
        elif bare in ALIASES:
            advice = f"did you mean {monitor.removesuffix(bare)}{ALIASES[bare]!s}?"
        else:
            advice = (
                f"did you mean {near}?" if near else "name it in metrics= of train(), or log it in a step"
            )
        raise ConfigError(
            f"monitor={monitor!r} will not be computed, but {', '.join(known)} will be computed: {advice}"
        )

    def _has_instances(self) -> bool:
        """Return whether `metrics` has objects, of which only those that compute know what they give."""
        return any(
            metric is not None
            for data_set in ("train", "val")
            for metric in chosen_metrics(metrics_for(data_set, self._metrics)).values()
        )

    def _names(self, data_set: Literal["train", "val"]) -> tuple[str, ...]:
        return ("loss", *chosen_metrics(metrics_for(data_set, self._metrics)))

    def _known_keys(self) -> list[str]:
        keys = [f"train_{name}" for name in self._names("train")]
        prefixes = list(self._prefixes)
        if self._validates_live:
            prefixes += map(live_prefix, self._prefixes)
        keys += [f"{prefix}{name}" for prefix in prefixes for name in self._names("val")]
        return keys
