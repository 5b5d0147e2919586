"""GroupStrategy: what ranks exchange in any loop, also one that only validates: numbers, metrics, data."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
import torch

from offloop.engine.data.batches import to_device
from offloop.engine.distributed.group import Group
from offloop.engine.distributed.shares import Shares
from offloop.engine.metrics.merging import merged
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.training.setup import Program, Setup
from offloop.engine.training.strategy import Strategy, ValidationSums

_HOST: Final = torch.device("cpu")


class GroupStrategy(Strategy):
    """The strategy of a loop that only validates, and the base of those that train. Training thread only."""

    group: Group
    """All ranks."""

    def __init__(self, rank: int, world_size: int, program: Program, setup: Setup) -> None:
        """Prepare; `group` is set once it has been made.

        Args:
            rank: Of this process.
            world_size: Number of ranks.
            program: Its model has the same names and shapes on all ranks.
            setup: Of the loop.
        """
        self.rank, self.world_size = rank, world_size
        self._program = program
        self._shares = Shares(
            rank,
            world_size,
            setup.config.rank_batches,
            gather=self.gather,
            gather_objects=lambda value: self.group.gather_objects(value),
            count_samples=setup.count_samples,
        )

    def close(self) -> None:
        """Release the data."""
        self._shares.close()

    def share_weights(self, others: Iterable[torch.nn.Parameter] = ()) -> None:
        """Give all ranks the weights and buffers of rank 0: those of the model, and of the loss if it is a module.

        Args:
            others: Parameters outside of them.
        """
        found = [each for module in self._modules() for each in (*module.parameters(), *module.buffers())]
        self._broadcast([*found, *others])

    def _broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        self.group.broadcast([each.data for each in {id(each): each for each in tensors}.values()])

    def _modules(self) -> list[torch.nn.Module]:
        parts: list[Any] = [self._program.model, self._program.loss]
        return [each for each in parts if isinstance(each, torch.nn.Module)]

    # Numbers -----------------------------------------------------------------------------------------

    def sum(self, value: float) -> float:
        """Return the sum of a number over the ranks."""
        return float(sum(self.gather(float(value))))

    def all(self, value: bool) -> bool:
        """Return whether a condition is true on all ranks."""
        return all(self.gather(bool(value)))

    def gather_validation(self, sums: ValidationSums) -> ValidationSums:
        """Return the sums over all ranks."""
        parts = [msgspec.convert(each, ValidationSums) for each in self.gather(sums)]
        return ValidationSums(
            _added(each.sums for each in parts),
            _added(each.weights for each in parts),
            sum(each.samples for each in parts),
            sum(each.batches for each in parts),
        )

    def gather_metrics(self, metrics: MetricSet) -> MetricSet:
        """Return the metrics of all ranks' batches. Waits for the device."""
        state = to_device(metrics.state_dict(), _HOST, non_blocking=False)
        return merged(metrics, self.group.gather_objects(state))

    # Data --------------------------------------------------------------------------------------------

    def shared_validation(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return the loader of this rank's batches of a validation.

        Each rank's last training step has changed its own buffers, such as the statistics of a normalization. Those of
        rank 0 are the model's, and all ranks validate with them.
        """
        self._broadcast(each for module in self._modules() for each in module.buffers())
        return self._shares.validation(loader)

    def batches_of(
        self, loader: Iterable[Any], *batches: int | None, is_training: bool
    ) -> tuple[int | None, ...]:
        """Return how many batches this rank takes of the first ones of a loader."""
        count = self._shares.counting(loader, is_training=is_training)
        return tuple(None if each is None else count(each) for each in batches)

    # Decisions ---------------------------------------------------------------------------------------

    def agree(self, value: Any) -> Any:
        """Return rank 0's value."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks. Plain values only."""
        own = msgspec.msgpack.encode(value)
        return [msgspec.msgpack.decode(each) for each in self.group.gather(own)]


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add numbers by name, in the order of ranks."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
