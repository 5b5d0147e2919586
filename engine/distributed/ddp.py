"""The strategy `ddp`: torch's DistributedDataParallel around the user's steps.

DDP wraps a module whose only child is the user's model, and whose forward is `training_step`. So `self.model` stays
the user's object, names in its state dict stay, and a step may call parts of it. Manual steps do not go through DDP:
it refuses parameters that a backward pass leaves out, and a second backward pass would let the gradients of the ranks
differ without an error. There each optimizer's gradients are averaged before it steps.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from offloop.engine.distributed.rank_strategy import RankStrategy


class _Step(torch.nn.Module):
    """A module whose forward is a step of the trainer."""

    def __init__(
        self,
        model: torch.nn.Module,
        others: Iterable[torch.nn.Parameter],
        step: Callable[[Any], Any],
        has_passed: Callable[[], None],
    ) -> None:
        super().__init__()
        self.model = model
        # Parameters that the optimizers own besides: those of a loss, of a second model
        self.others = torch.nn.ParameterList(others)
        self._step = step
        self._has_passed = has_passed

    def forward(self, batch: Any) -> Any:
        output = self._step(batch)
        self._has_passed()
        return output


class DDPStrategy(RankStrategy):
    """Gradients are averaged over the ranks in each backward pass. More than 25 methods, see `RankStrategy`."""

    name = "ddp"

    def begin(self, loop: Any) -> None:
        """Wrap the model, which is on its device, with the weights of a checkpoint, if any."""
        super().begin(loop)
        self._ddp: DistributedDataParallel | None = None
        self._wrapped_at = -1
        if self._program.automatic_optimization:
            if self._loop.setup.config.sync_batchnorm:
                # In place, except a model that is itself a normalization
                torch.nn.SyncBatchNorm.convert_sync_batchnorm(self._program.model)
            self._wrap()

    def close(self) -> None:
        """Release the model and the data."""
        self._ddp = None
        super().close()

    def _wrap(self) -> None:
        program, config = self._program, self._loop.setup.config
        own = {id(each) for each in program.model.parameters()}
        others = [each for each in self._loop.parameters() if id(each) not in own and each.requires_grad]
        self._ddp = None
        self._ddp = DistributedDataParallel(
            _Step(program.model, others, program.training_step, self._has_passed),
            find_unused_parameters=config.find_unused_parameters,
        )
        self._wrapped_at = self._loop.frozen.changes

    def _has_passed(self) -> None:
        """Tell that this rank is past the forward pass of its batch."""
        self._life.place = self._loop.progress.batch, 2

    @property
    def forward(self) -> Callable[[Any], Any]:
        """The function that takes a batch and returns what `training_step` returns."""
        if self._ddp is None:
            return self._program.training_step
        if self._loop.frozen.changes != self._wrapped_at:
            # DDP raises for parameters that were frozen after it was made, and would leave out thawed ones
            self._wrap()
        return self._ddp

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward and backward of a batch; only the last of a window averages gradients."""
        if is_last or self._ddp is None:
            return contextlib.nullcontext()
        return self._ddp.no_sync()

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter], factor: float = 1.0) -> None:
        """Average gradients over the ranks, in place. A parameter with a gradient on some rank gets one on all."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
        for each in parameters:
            if each.requires_grad:
                by_kind.setdefault((each.dtype, each.device), []).append(each)
        for (dtype, device), alike in by_kind.items():
            has_gradient = torch.tensor([float(each.grad is not None) for each in alike], device=device)
            pieces = [
                (torch.zeros_like(each) if each.grad is None else each.grad.to_dense()).reshape(-1).to(dtype)
                for each in alike
            ]
            flat = torch.cat([*pieces, has_gradient.to(dtype)])
            if factor != 1.0:
                flat[: -len(alike)] *= factor
            self.group.add(flat)
            counts = flat[-len(alike) :].tolist()
            flat /= self.world_size
            start = 0
            for each, count in zip(alike, counts, strict=True):
                if count:
                    each.grad = flat[start : start + each.numel()].view_as(each).clone()
                start += each.numel()
