"""Reading and setting learning rates, so that a schedule continues from the new rate."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, SequentialLR

from offloop.engine.errors import ConfigError
from offloop.engine.events import NO_METRICS, Metrics
from offloop.engine.training.schedule_state import settings_of

logger = logging.getLogger("offloop")

_SCHEDULED_KEYS: Final = ("initial_lr", "max_lr", "min_lr")
"""Entries of a parameter group from which torch's schedules compute later rates."""


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """A torch schedule at work in a run."""

    scheduler: LRScheduler
    interval: Literal["epoch", "step"]
    """When it steps: after each epoch, or after each optimizer step."""
    monitor: str | None = None
    """For a plateau: the metric that it watches; None for the run's."""
    after_steps: int = 0
    """Optimizer steps before it begins: the length of a warm-up in front of it."""
    made: Mapping[str, Any] = dataclasses.field(init=False)
    """Its settings when it was new, see `settings_of`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "made", settings_of(self.scheduler))

    def step(self) -> None:
        """Step the schedule. A one-cycle schedule that is over keeps its last rate; torch would raise."""
        scheduler = self.scheduler
        try:
            scheduler.step()
        except ValueError:
            if not isinstance(scheduler, OneCycleLR) or scheduler.last_epoch <= scheduler.total_steps:
                raise
            # Warn once
            if scheduler.last_epoch == scheduler.total_steps + 1:
                logger.warning(
                    "the one-cycle schedule is over after %d %ss, but the run continues: the learning rate stays",
                    scheduler.total_steps,
                    self.interval,
                )


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Keep torch from warning that a schedule steps before its optimizer.

    A run always steps the optimizer first. torch does not see it if that step was skipped, or made by an earlier
    attempt of the run.
    """
    # torch's own mark
    optimizer._opt_called = True  # type: ignore[attr-defined]


def check_length(schedule: Schedule, to_go: int | None) -> None:
    """Check that a one-cycle schedule is long enough: torch raises in the step after its last one.

    Args:
        schedule: Of a run that is about to begin or to resume.
        to_go: How many times it will step; None if unknown.

    Raises:
        ConfigError: The schedule would end before the run.
    """
    scheduler = schedule.scheduler
    if not isinstance(scheduler, OneCycleLR) or to_go is None:
        return
    left = scheduler.total_steps - scheduler.last_epoch
    if to_go > left:
        raise ConfigError(
            f"the one-cycle schedule was made for {scheduler.total_steps} {schedule.interval}s and has {left} "
            f"left, but the run has {to_go} to go: give a run that may be resumed the whole length from the "
            "beginning (total_steps=...), or make a new run with a new schedule"
        )


def largest_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the largest learning rate of the optimizer's groups."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        lr = groups[0]["lr"]
        # A tensor, for a capturable optimizer: host sync
        return lr if type(lr) is float else float(lr)
    return max(float(group["lr"]) for group in groups)


def rates_by_group(optimizers: Mapping[str, torch.optim.Optimizer]) -> Metrics:
    """Return the learning rate of each parameter group by name; empty if all are the same.

    The name of a group is its entry `name`, otherwise its index.
    """
    rates: dict[str, float] = {}
    for optimizer_name, optimizer in optimizers.items():
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            parts = [optimizer_name] if len(optimizers) > 1 else []
            if len(groups) > 1:
                parts.append(str(group.get("name", index)))
            # Host sync if it is a tensor, for a capturable optimizer
            rates["/".join(parts)] = float(group["lr"])
    return Metrics(rates) if len(set(rates.values())) > 1 else NO_METRICS


def scale_lr(
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    group: int | None,
    schedulers: Sequence[LRScheduler] = (),
) -> None:
    """Set a learning rate: of one group, or the largest with all others scaled alike.

    What schedules compute their later rates from is scaled by the same factor, so that they continue from the new
    rate. A rate of 0 cannot be scaled: the new one is set, and schedules stay as they are.
    """
    groups = optimizer.param_groups
    chosen = range(len(groups)) if group is None else [group]
    current = largest_lr(optimizer) if group is None else float(groups[group]["lr"])
    factor = lr / current if current else None
    for index in chosen:
        target = groups[index]
        new = lr if factor is None or len(groups) == 1 or group is not None else float(target["lr"]) * factor
        _assign(target, "lr", new)
        if factor is not None:
            for key in _SCHEDULED_KEYS:
                if key in target:
                    _assign(target, key, float(target[key]) * factor)
    for scheduler in schedulers:
        if factor is not None and scheduler.optimizer is optimizer:
            _scale_schedule(scheduler, chosen, factor)


def _scale_schedule(scheduler: Any, groups: range | list[int], factor: float) -> None:
    if isinstance(scheduler, SequentialLR) or hasattr(scheduler, "_schedulers"):
        for inner in scheduler._schedulers:
            _scale_schedule(inner, groups, factor)
    for name in ("base_lrs", "max_lrs", "min_lrs", "_last_lr", "scales"):
        rates = getattr(scheduler, name, None)
        if isinstance(rates, list):
            setattr(
                scheduler,
                name,
                [rate * factor if index in groups else rate for index, rate in enumerate(rates)],
            )
    # A cosine's floor is one number for all groups, so it is scaled only with all of them
    if hasattr(scheduler, "eta_min") and len(groups) == len(scheduler.optimizer.param_groups):
        scheduler.eta_min *= factor


def _assign(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value
