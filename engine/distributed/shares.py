"""Each rank's share of the batches; being written."""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from offloop.engine.training.strategy import Share


class _Split:
    def __init__(self, batches: Any, rank: int, world_size: int, sizes: deque[tuple[int, int]]) -> None:
        self.batches, self.rank, self.world_size, self.sizes = batches, rank, world_size, sizes

    def __iter__(self) -> Iterator[Any]:
        for indices in self.batches:
            own = indices[self.rank :: self.world_size]
            self.sizes.append((len(own), len(indices)))
            yield own or indices[:1]

    def __len__(self) -> int:
        return len(self.batches)


class Shares:
    """The shares of one rank. Training thread only."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        mode: str,
        *,
        gather: Callable[[Any], list[Any]],
        count_samples: Callable[[Any], int],
    ) -> None:
        self.share = Share()
        self._rank, self._world_size = rank, world_size
        self._twins: dict[int, Any] = {}
        self._sizes: deque[tuple[int, int]] = deque()

    def training(self, loader: Any, epoch: int) -> Iterable[Any]:
        """Return the twin."""
        if isinstance(loader, list):
            return loader
        if id(loader) not in self._twins:
            twin = copy.copy(loader)
            sampler = _Split(loader.batch_sampler, self._rank, self._world_size, self._sizes)
            twin.__dict__.update({"batch_sampler": sampler, "_iterator": None})
            self._twins[id(loader)] = twin
        twin_of: Iterable[Any] = self._twins[id(loader)]
        return twin_of

    def validation(self, loader: Iterable[Any], epoch: int) -> Iterable[Any]:
        """Return the batches in turn."""
        return list(itertools.islice(loader, self._rank, None, self._world_size))

    def iterate(self, iterator: Iterator[Any], given: int) -> Iterator[Any]:
        """Keep the share."""
        for batch in iterator:
            if self._sizes:
                own, whole = self._sizes.popleft()
                self.share = Share(own * self._world_size / whole, own > 0)
            yield batch

    def close(self) -> None:
        """Drop the twins."""
        self._twins.clear()


def check_shareable(loader: Iterable[Any], mode: str, world_size: int, name: str) -> None:
    """Check."""
