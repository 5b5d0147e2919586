"""GivenRates: what the optimizers were given, to be put back when the schedules of a run are over.

A schedule that a callback attaches belongs to its run: a cosine leaves a rate of 0 behind, in which the next `train()`
would train nothing. The schedule of `Trainer(scheduler=...)` is the user's, and goes on in the next run as model and
optimizer do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.optim.lr_scheduler import LRScheduler

_ADDED: Final = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
"""What torch's schedules add to a parameter group, and take their rates from: also from that of the schedule before."""
_MOMENTUM: Final = ("momentum", "betas")
"""What cyclic schedules change beside the rate."""


class GivenRates:
    """The options of each parameter group before any schedule of the run was made. Training thread only."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take note of them."""
        self._given = [
            (optimizer, [_noted(each) for each in optimizer.param_groups]) for optimizer in optimizers
        ]

    def put_back(self, attached: Sequence[LRScheduler], lasting: Sequence[LRScheduler]) -> None:
        """Put back what the schedules of a run have changed.

        Args:
            attached: Those that end with the run.
            lasting: Those that go on; the rates of their optimizers stay.
        """
        for optimizer, given in self._given:
            own = [each for each in attached if each.optimizer is optimizer]
            if not own or any(each.optimizer is optimizer for each in lasting):
                continue
            keys = ["lr", *_ADDED]
            if any(getattr(each, "cycle_momentum", False) for each in own):
                keys += _MOMENTUM
            for group, before in zip(optimizer.param_groups, given, strict=False):
                for key in keys:
                    _restore(group, key, before)
            for group in optimizer.param_groups[
                len(given) :
            ]:  # added during the run: the rate that it came with
                _restore(group, "lr", {"lr": group.get("initial_lr", group["lr"])})
                for key in _ADDED:
                    group.pop(key, None)


def _noted(group: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("lr", *_ADDED, *_MOMENTUM)
    kept = {key: group[key] for key in keys if key in group}
    return {key: each.clone() if isinstance(each, torch.Tensor) else each for key, each in kept.items()}


def _restore(group: dict[str, Any], key: str, before: Mapping[str, Any]) -> None:
    if key not in before:
        if key in _ADDED:
            group.pop(key, None)
    elif isinstance(group.get(key), torch.Tensor):
        group[key].fill_(before[key])  # in place: a captured graph reads it
    else:
        group[key] = before[key]
