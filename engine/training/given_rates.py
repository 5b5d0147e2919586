"""The learning rates that the optimizers had before a run's schedules, restored when the next run begins.

A schedule that a callback attaches belongs to its run. A cosine, for example, ends at a rate of 0, with which the next
`train()` would train nothing. After a run the optimizer has the rates that the run ended with, as after a loop written
by hand. The next run begins with the rates from before, or with those set in between. The schedule of
`Trainer(scheduler=...)` belongs to the user and continues in the next run, as model and optimizer do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.optim.lr_scheduler import LRScheduler

_ADDED: Final = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
"""What torch's schedules add to a parameter group and compute their rates from; a later schedule finds it there."""
_MOMENTUM: Final = ("momentum", "betas")
"""What cyclic schedules change besides the rate."""


class GivenRates:
    """The options of each parameter group before any schedule of the run was made. Training thread only."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Copy the options of each parameter group."""
        self._given = [
            (optimizer, [_noted(each) for each in optimizer.param_groups]) for optimizer in optimizers
        ]
        # By optimizer: which options, what they were before and after the run, by group
        self._changes: list[
            tuple[torch.optim.Optimizer, list[str], list[dict[str, Any]], list[dict[str, Any]]]
        ] = []

    def end(self, attached: Sequence[LRScheduler], lasting: Sequence[LRScheduler]) -> None:
        """Note what the schedules of a run leave behind. Called at the end of every run.

        Args:
            attached: Schedules that end with the run.
            lasting: Schedules that continue; the rates of their optimizers stay.
        """
        self._changes = []
        for optimizer, given in self._given:
            own = [each for each in attached if each.optimizer is optimizer]
            if not own or any(each.optimizer is optimizer for each in lasting):
                continue
            keys = ["lr", *_ADDED]
            if any(getattr(each, "cycle_momentum", False) for each in own):
                keys += _MOMENTUM
            groups = optimizer.param_groups
            # A group that was added during the run has the rate that it came with.
            added = [{"lr": group.get("initial_lr", group["lr"])} for group in groups[len(given) :]]
            before = [{key: each[key] for key in keys if key in each} for each in (*given, *added)]
            self._changes.append((optimizer, keys, before, [_noted(each) for each in groups]))

    def put_back(self) -> None:
        """Restore what the schedules of the last run have changed, unless it was changed again since."""
        for optimizer, keys, before, left in self._changes:
            for group, first, last in zip(optimizer.param_groups, before, left, strict=False):
                for key in keys:
                    if key in group and key in last and _is_equal(group[key], last[key]):
                        _restore(group, key, first)
        self._changes = []


def _is_equal(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other)) if isinstance(one, torch.Tensor) else bool(one == other)


def _noted(group: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("lr", *_ADDED, *_MOMENTUM)
    kept = {key: group[key] for key in keys if key in group}
    return {key: each.clone() if isinstance(each, torch.Tensor) else each for key, each in kept.items()}


def _restore(group: dict[str, Any], key: str, before: Mapping[str, Any]) -> None:
    if key not in before:
        if key in _ADDED:
            group.pop(key, None)
    elif isinstance(group.get(key), torch.Tensor):
        # In place, because a captured CUDA graph reads it
        group[key].fill_(before[key])
    else:
        group[key] = before[key]
