"""The parameters that a run's optimizers own."""

import math
import operator
from collections.abc import Mapping

import torch
from torch.nn.parameter import is_lazy

from offloop.engine.training.setup import Program


class OwnedParameters:
    """What the optimizers own right now; parameter groups may be added during a run. Training thread only."""

    def __init__(self, program: Program, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._program = program
        self._optimizers = optimizers
        self._owned: list[torch.nn.Parameter] = []
        self._ordered: list[torch.nn.Parameter] = []

    def __call__(self) -> list[torch.nn.Parameter]:
        """Return them in the model's order, as `clip_grad_norm_(model.parameters())` sees them.

        Parameters that no optimizer owns are left out, because no optimizer zeroes their gradients.
        """
        owned = [
            parameter
            for optimizer in self._optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        if len(owned) != len(self._owned) or not all(map(operator.is_, owned, self._owned)):
            left = {id(parameter): parameter for parameter in owned}
            in_model = [left.pop(id(each)) for each in self._program.model.parameters() if id(each) in left]
            self._owned, self._ordered = owned, [*in_model, *left.values()]
        return self._ordered

    def are_finite(self) -> bool:
        """Return True if all weights that train are finite. Host sync."""
        trained: list[torch.Tensor] = [
            each for each in self() if each.requires_grad and not is_lazy(each) and each.numel()
        ]
        if not trained:
            return True
        largest = torch._foreach_norm(trained, math.inf)
        device = largest[0].device
        return bool(torch.stack([each.isfinite().to(device) for each in largest]).all())
