"""EarlyStopping: stop a run whose metric no longer improves."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from offloop.engine import (
    Callback,
    EpochEnd,
    Run,
    StepPoint,
    TrainStart,
    ValidationEnd,
    checks,
    decides,
    in_step,
    load_model,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.monitor import Mode, Monitor


class EarlyStopping(Callback):
    """Stops a run when its metric has not improved in `patience` checks in a row.

    Each validation is a check of a `val_` metric, each epoch one of a `train_` metric. NaN never improves. It decides
    in the training thread, so the same data and seed stop at the same step. With several processes, rank 0 stops the
    run, and each rank restores its own copy of the best weights.
    """

    # Each rank keeps the weights that it restores. Metrics are the same on all, so all find the same best
    ranks = "all"

    @explains_arguments()
    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        mode: Mode = "auto",
        min_delta: float = 0.0,
        patience: int = 3,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        restore_best: bool = False,
    ) -> None:
        """Choose the metric and when to stop.

        Args:
            monitor: Key of the metric.
            mode: Whether less (`"min"`) or more (`"max"`) is better. `"auto"` takes it from the metric or its name.
            min_delta: Least improvement that counts, absolute, at least 0.
            patience: Checks without improvement after which the run stops, at least 1.
            check_finite: Stop at once when the metric is NaN or infinite.
            stopping_threshold: Stop at once when the metric is better than this.
            divergence_threshold: Stop at once when the metric is worse than this.
            restore_best: When the run completes or stops, restore the weights and buffers of the best check, after the
                last checkpoint, which keeps the weights in training. With a `WeightAverage` that validations use, its
                average is restored. Keeps one copy of the weights on the device, and one in each checkpoint.

        Raises:
            ConfigError: A value is out of range.
        """
        checks.whole_number("patience", patience)
        self.monitor = Monitor(monitor, mode, min_delta)
        self.needs_metrics = (monitor,)
        self.patience = patience
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.restore_best = restore_best
        self.reset()

    def reset(self) -> None:
        self.monitor.best = None
        self.misses = 0
        self.best_step = 0
        self._best_weights: dict[str, Any] | None = None

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self.monitor.begin(run)

    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self._check(event, run)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._check(event, run)

    @in_step
    def before_train_end(self, point: StepPoint) -> None:
        if self._best_weights is not None:
            # By load_model, since an earlier attempt may have wrapped the model differently.
            load_model(self._best_weights, into=point.model)

    @property
    def sets_final_weights(self) -> bool:
        return self.restore_best

    def state_dict(self) -> Mapping[str, Any]:
        return {
            "monitor": self.monitor.state_dict(),
            "misses": self.misses,
            "best_step": self.best_step,
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["monitor"]["key"] != self.monitor.key:
            # The misses are those of another metric.
            return
        self.monitor.load_state_dict(state["monitor"])
        self.misses, self.best_step = state["misses"], state["best_step"]
        if self.restore_best:
            self._best_weights = state["best_weights"]

    def _check(self, event: ValidationEnd | EpochEnd, run: Run) -> None:
        value = self.monitor.value_at(event)
        if value is None:
            return
        if self.monitor.improves(value):
            self.misses = 0
            self.best_step = event.step
            if self.restore_best:
                weights = run.trainer.measured_weights(self.monitor.key)
                self._best_weights = {
                    name: each.detach().clone() if isinstance(each, torch.Tensor) else each
                    for name, each in weights.items()
                }
        else:
            self.misses += 1
        reason = self._reason(value)
        if reason:
            run.stop_nowait(reason)

    def _reason(self, value: float) -> str:
        """Return why to stop; empty to continue."""
        key = self.monitor.key
        is_finite = math.isfinite(value)
        if not is_finite and self.check_finite:
            return f"{key} is {value}"
        goal = self.stopping_threshold
        if goal is not None and self.monitor.is_beyond(value, goal):
            return f"{key} is {value:.6g}, beyond stopping_threshold={goal:g}"
        if self.divergence_threshold is not None and self.monitor.is_beyond(self.divergence_threshold, value):
            return f"{key} is {value:.6g}, worse than divergence_threshold={self.divergence_threshold:g}"
        if self.misses >= self.patience:
            best = "never finite" if self.monitor.best is None else f"best {self.monitor.best:.6g}"
            return f"{key} did not improve in {self.misses} checks ({best} at step {self.best_step})"
        return ""
