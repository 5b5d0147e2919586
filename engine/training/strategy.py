"""Strategy: what a training loop asks of the other processes that train with it. Here: there are none.

`engine/distributed/` has the strategies that speak to other processes ("ranks"). A loop calls the same methods with one
process as with many, so it need not know how many there are.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import torch

from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.training.setup import Program


class Share(NamedTuple):
    """A process's share of the batch that the loop took last."""

    factor: float = 1.0
    """Factor of the loss: the gradients, averaged over the processes, are then those of the whole batch."""
    counts: bool = True
    """False: the whole batch had no sample for this process. It repeats one, which must not count."""


WHOLE: Final = Share()
"""The share of a process that trains alone."""


class StepLoss(msgspec.Struct, array_like=True):
    """The loss of one batch of a step."""

    value: float
    weight: float
    """In the mean of the epoch."""
    step_weight: float
    """In the mean of the step."""


class StepValue(msgspec.Struct, array_like=True):
    """A value that a batch of a step logged."""

    name: str
    value: float
    weight: float
    """In the mean of the epoch."""
    step_weight: float
    """In the mean of the step."""


class StepValues(msgspec.Struct, array_like=True):
    """The numbers of one step that differ between processes. With several, those of all: one list after the other."""

    losses: list[StepLoss]
    logged: list[StepValue]
    samples: int


class ValidationSums(msgspec.Struct):
    """The numbers of one pass of a validation that differ between processes."""

    sums: dict[str, float]
    """Sum of value times weight, by name."""
    weights: dict[str, float]
    """Sum of the weights, by name."""
    samples: int
    batches: int


class Strategy:
    """The strategy of a process that trains alone. Training thread only.

    The methods are called in the same order in all processes, so each may wait for the others.
    """

    name: str = "none"
    """As in `Trainer(strategy=...)`."""
    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """Number of processes."""
    share: Share = WHOLE
    """Of the batch that the loop took last."""

    def begin(self, loop: Any) -> None:
        """Prepare for training: the model is on its device, and a checkpoint, if any, is restored.

        Args:
            loop: The `TrainingLoop`.
        """
        self._program: Program = loop.program

    def close(self) -> None:
        """Release what refers to the model."""

    # A step --------------------------------------------------------------------------------------

    @property
    def forward(self) -> Callable[[Any], Any]:
        """The function that takes a batch and returns what `training_step` returns."""
        return self._program.training_step

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward and backward of a batch.

        Args:
            is_last: True for the last batch of an accumulation window: its backward averages the gradients.
        """
        return _NOTHING

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter], factor: float = 1.0) -> None:
        """Average gradients that no backward has averaged, in place.

        Args:
            parameters: Those without a gradient in every process are left out.
            factor: Of the gradients here, before they are averaged.
        """

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a scalar tensor over the processes, weighted by their shares of the batch."""
        return value

    def sum(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        return value

    def all(self, value: bool) -> bool:
        """Return whether a condition is true in all processes."""
        return value

    # Numbers of steps and validations --------------------------------------------------------------

    def gather_step(self, values: StepValues, publish: Callable[[StepValues], None]) -> None:
        """Call `publish` with the numbers of a step from all processes, now or later, in the order of steps."""
        publish(values)

    def put(self, publish: Callable[[], None]) -> None:
        """Call `publish` in its turn: after everything that was given to `gather_step` before."""
        publish()

    def flush(self) -> None:
        """Publish all that waits."""

    def gather_validation(self, sums: ValidationSums) -> ValidationSums:
        """Return the sums over all processes."""
        return sums

    def gather_metrics(self, metrics: MetricSet) -> MetricSet:
        """Return the metrics of all processes' batches. Those here do not change."""
        return metrics

    # Data ----------------------------------------------------------------------------------------

    def shared_training(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return the loader of this process's share of the training batches; the same object each time.

        Args:
            loader: The user's, or its twin that seeds the samples.
        """
        return loader

    def shared_validation(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return a loader of this process's share of the batches of a validation; each sample counts once."""
        return loader

    def batches_of(
        self, loader: Iterable[Any], *batches: int | None, is_training: bool
    ) -> tuple[int | None, ...]:
        """Return how many batches this process takes of the first ones of a loader.

        Args:
            loader: The user's.
            batches: Numbers of its batches; None stays None.
            is_training: False for a validation.
        """
        return batches

    def iterate(self, iterator: Iterator[Any], given: int) -> Iterator[Any]:
        """Return an iterator over the same training batches that keeps `share` up to date.

        Args:
            iterator: Over what `shared_training` returned last.
            given: How many batches of that loader the epoch had before a resume.
        """
        return iterator

    def begin_pass(self) -> None:
        """Begin a pass over the batches of a validation."""

    def end_pass(self) -> bool:
        """Wait for the others at the end of a pass over a validation's batches; True if commands may have come."""
        return False

    # Time and decisions ----------------------------------------------------------------------------

    def seconds(self, own: float) -> float:
        """Return for how many seconds the run has trained, the same number in all processes.

        Args:
            own: By the clock of this process.
        """
        return own

    def agree(self, value: Any) -> Any:
        """Return the first process's value, in all processes. Plain values only."""
        return value

    def gather(self, value: Any) -> Sequence[Any]:
        """Return the values of all processes, by rank. Plain values only."""
        return [value]


_NOTHING: Final = contextlib.nullcontext()
