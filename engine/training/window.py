"""The accumulation window: the batches of one optimizer step, and the values that were logged in it."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from offloop.engine.metrics.logged_names import check_name
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.training.step_output import checked_weight

logger = logging.getLogger("offloop")


class Logged(NamedTuple):
    """A value that a step logged."""

    name: str
    value: "torch.Tensor | float"
    weight: float | None
    """The user's; None for that of the loss."""
    batch_weight: float = 0.0
    """Weight of its batch's loss, or of the window's losses if it was logged for the whole step."""
    share: float = 1.0
    """Its share of that weight: 1/n for a name that the batch logged n times."""
    factor: float = 1.0
    """The process's share of the batch, see `strategy.Share`."""

    def in_epoch(self) -> float:
        """Return its weight in the mean of the epoch."""
        return self.batch_weight * self.share if self.weight is None else self.weight

    def in_step(self, *, is_weighted: bool) -> float:
        """Return its weight in the mean of the step, where batches count alike unless the losses have weights."""
        return self.in_epoch() if is_weighted or self.weight is not None else self.share * self.factor


@dataclasses.dataclass(slots=True)
class Window:
    """An accumulation window: the batches of one optimizer step."""

    size: int = 0
    """Number of batches it is planned for; 0 before the first window."""
    count: int = 0
    """Batches so far."""
    is_weighted: bool = False
    """True if the user gave weights for its losses."""
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """One scalar on the device per batch. Its graph is freed already, so keeping it costs less than detaching it."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """Weight of each loss in means: the user's, else the number of samples."""
    factors: list[float] = dataclasses.field(default_factory=list)
    """The process's share of the batch of each loss, see `strategy.Share`."""
    logged: list[Logged] = dataclasses.field(default_factory=list)
    """Values logged by its batches."""
    fresh: list[Logged] = dataclasses.field(default_factory=list)
    """Values logged since; their weight is known once their batch has a loss, or the step is over."""
    samples: int = 0
    """Samples so far."""
    weight: float = 0.0
    """Sum of `weights` so far, batches without a loss included."""
    data_time: float = 0.0
    """Seconds spent waiting for its batches."""
    started: float = 0.0
    """When its first batch had arrived, on the clock of `time.perf_counter`."""
    # That the loader gives more batches than its length says was logged
    _is_longer_than_said: bool = False

    def begin(self, size: int, now: float, *, batches_left: int | None = None) -> None:
        """Begin a window of `size` batches, a shorter one where the loader has fewer batches left."""
        if batches_left is not None and batches_left < size:
            if batches_left > 0:
                size = batches_left
            elif not self._is_longer_than_said:
                self._is_longer_than_said = True
                logger.warning(
                    "the train_loader gives more batches than its length says; accumulation continues without it"
                )
        self.size = size
        self.started = now
        self.data_time = 0.0

    def weighted(
        self, loss: torch.Tensor, weight: float | None, factor: float, world_size: int
    ) -> torch.Tensor:
        """Return a batch's loss as its share of the window and of the batches of all processes.

        The sum of the user's weights is known only at the window's end: the gradients are rescaled there.

        Args:
            loss: Mean over the samples here.
            weight: The user's; None for the number of samples.
            factor: See `strategy.Share`.
            world_size: Number of processes.
        """
        if weight is not None and (self.size > 1 or world_size > 1):
            self.is_weighted = True
            return loss * weight
        if self.size > 1:
            loss = loss / self.size
        return loss if factor == 1.0 else loss * factor

    def is_finite(self) -> bool:
        """Return True if all losses are finite (host sync)."""
        return bool(torch.isfinite(torch.stack(self.losses)).all())

    def settle(self, weight: float, factor: float = 1.0) -> None:
        """Assign the values logged since the last call to a batch, or a step, of this weight and share."""
        self.logged += settled(self.fresh, weight, factor)
        self.fresh.clear()

    def clear(self) -> None:
        """Empty it, after its step or instead of it."""
        self.count = self.samples = 0
        self.weight = 0.0
        self.is_weighted = False
        self.losses.clear()
        self.weights.clear()
        self.factors.clear()
        self.logged.clear()
        self.fresh.clear()


def settled(fresh: Sequence[Logged], weight: float, factor: float = 1.0) -> list[Logged]:
    """Return logged values with weight and share of the loss that they belong to."""
    times = Counter(each.name for each in fresh if each.weight is None)
    return [
        each._replace(batch_weight=weight, share=1.0 / (times[each.name] or 1), factor=factor)
        for each in fresh
    ]


def checked_value(
    name: str,
    value: "torch.Tensor | float",
    weight: "torch.Tensor | float | None",
    metrics: MetricSet | None,
    checked: set[str],
) -> Logged:
    """Return a value that was given to `log`, as it is now.

    Args:
        name: As given to `log`.
        value: Likewise. A tensor is copied, because the caller may change it before it is read.
        weight: Likewise.
        metrics: The named metrics, whose names are taken.
        checked: Names that were checked already; this one is added.

    Raises:
        TypeError: The name is no text, or the value neither a number nor a tensor.
        ValueError: The name is taken, the value has more than one element, or the weight is no such number.
    """
    if name not in checked:
        check_name(name, () if metrics is None else metrics.names)
        checked.add(name)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"log({name!r}) takes one number, got a tensor of shape {tuple(value.shape)}")
        value = value.detach().clone()
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"log({name!r}) takes a number or a tensor of one element, got {value!r}")
    return Logged(name, value, None if weight is None else checked_weight(weight, f"log({name!r})"))
