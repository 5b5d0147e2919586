"""Twins of a loader, or of its sampler, that give one rank's share. `shares.py` says which is taken when."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from torch.utils.data import DistributedSampler

from offloop.engine.data.divided import divided
from offloop.engine.data.loader_parts import datasets_of, samplers_of
from offloop.engine.data.seeded_sampling import Key
from offloop.engine.data.twin import Twin
from offloop.engine.distributed.shared_order import Gather, SharedOrder
from offloop.engine.training.strategy import WHOLE, Share

NOTHING: Final = Share(0.0, counts=False)
"""The share of a rank that a batch leaves without a sample: it repeats one."""


class Queue:
    """The shares of the batches of one pass, from the sampler's look at an item until the loop has its batch."""

    def __init__(self, *, is_ahead: bool, is_known: bool = True) -> None:
        self.shares: deque[Share] = deque()
        self.is_ahead = is_ahead
        """True for a sampler: it is asked for the items of batches that a resumed pass leaves out, too."""
        self.is_known = is_known
        """False where only the loaded batches tell their samples: the ranks tell each other."""


class Ranks(NamedTuple):
    """What twins know of the ranks."""

    rank: int
    world_size: int
    gather: Gather
    """For plain values."""
    gather_objects: Gather
    count_samples: Callable[[Any], int]
    begin: Callable[[Queue], None]
    """Called when a pass begins."""

    def share(self, own: int, whole: int) -> Share:
        """Return the share of this rank: the factor is exactly 1 where all have the same."""
        return Share(own * self.world_size / whole) if own else NOTHING

    def part(self, samples: int) -> slice:
        """Return which samples of a batch this rank takes; the first one if there is none for it."""
        return slice(self.rank, None, self.world_size) if self.rank < samples else slice(0, 1)

    def split_share(self, samples: int) -> Share:
        """Return the share of a batch that is divided."""
        return self.share(len(range(self.rank, samples, self.world_size)), samples) if samples else WHOLE

    def in_order(
        self, source: Iterable[Any], parts: Iterable[Any], *, gives_indices: bool, at_once: bool = False
    ) -> SharedOrder:
        """Return an iterator that gives all ranks the same items."""
        return SharedOrder(
            source,
            parts,
            rank=self.rank,
            gather=self.gather_objects,
            gives_indices=gives_indices,
            at_once=at_once,
        )

    def groups(self, batches: int) -> int:
        """Return in how many steps the ranks take whole batches."""
        return math.ceil(batches / self.world_size)

    def turns(self, batches: int) -> int:
        """Return how many whole batches this rank takes in a validation."""
        return max(0, math.ceil((batches - self.rank) / self.world_size))


# Samplers ------------------------------------------------------------------------------------------


class SplitSampler(Twin):
    """A batch sampler that gives this rank's part of each batch."""

    def __init__(self, sampler: Iterable[Any], loader: Any, ranks: Ranks) -> None:
        super().__init__(sampler)
        self._parts = list(samplers_of(loader))
        self._gives_batches = loader.batch_sampler is not None
        self._ranks = ranks

    def __iter__(self) -> Iterator[Any]:
        queue = Queue(is_ahead=True, is_known=self._gives_batches)
        self._ranks.begin(queue)
        items = self._ranks.in_order(self.original, self._parts, gives_indices=True)
        return self._shared(items, queue)

    def _shared(self, items: Iterator[Any], queue: Queue) -> Iterator[Any]:
        for item in items:
            samples = len_of(item)
            queue.shares.append(self._ranks.split_share(samples))
            yield taken(item, self._ranks.part(samples)) if samples else item


class WholeSampler(SplitSampler):
    """A sampler that gives one item of each group, the one of this rank."""

    def __init__(self, sampler: Iterable[Any], loader: Any, ranks: Ranks) -> None:
        super().__init__(sampler, loader, ranks)
        self.batches_per_step = ranks.world_size

    def _shared(self, items: Iterator[Any], queue: Queue) -> Iterator[Any]:
        count = len_of if self._gives_batches else _one
        for item, share in in_groups(items, self._ranks, count):
            queue.shares.append(share)
            yield item

    def __len__(self) -> int:
        return self._ranks.groups(len(self.original))


def in_groups(items: Iterator[Any], ranks: Ranks, count: Callable[[Any], int]) -> Iterator[tuple[Any, Share]]:
    """Yield this rank's item of each group of as many items as there are ranks, and its share.

    Args:
        items: All items.
        ranks: The ranks.
        count: Returns the samples of an item.
    """
    while group := list(itertools.islice(items, ranks.world_size)):
        if ranks.rank < len(group):
            counts = [count(each) for each in group]
            yield group[ranks.rank], ranks.share(counts[ranks.rank], sum(counts))
        else:
            yield group[0], NOTHING


class TurnSampler(Twin):
    """A sampler for validations: whole items in turn."""

    def __init__(self, sampler: Iterable[Any], loader: Any, ranks: Ranks, *, draws: bool) -> None:
        super().__init__(sampler)
        self._parts = list(samplers_of(loader))
        self._ranks = ranks
        self._draws = draws

    def __iter__(self) -> Iterator[Any]:
        rank, world_size, *_ = self._ranks
        items: Iterable[Any] = self.original
        if self._draws:
            items = self._ranks.in_order(items, self._parts, gives_indices=True, at_once=True)
        return itertools.islice(items, rank, None, world_size)

    def __len__(self) -> int:
        return self._ranks.turns(len(self.original))


class RenumberedSampler(Twin):
    """A seeding sampler over this rank's own samples: their numbers are those among the samples of all ranks."""

    def __init__(self, sampler: Iterable[Any], ranks: Ranks) -> None:
        super().__init__(sampler)
        self._ranks = ranks

    def __iter__(self) -> Iterator[Any]:
        rank, world_size, *_ = self._ranks
        for key in self.original:
            first, end = key.numbers.start, key.numbers.stop
            yield key._replace(numbers=range(first * world_size + rank, end * world_size + rank, world_size))


class UnpaddedSampler(Twin):
    """A sampler without the sample that a `DistributedSampler` repeats at its end so that all ranks have as many."""

    def __init__(self, sampler: Iterable[Any], inner: "DistributedSampler[Any]") -> None:
        super().__init__(sampler)
        self._inner = inner

    def __iter__(self) -> Iterator[Any]:
        inner, given = self._inner, 0
        last = (inner.num_samples - 1) * inner.num_replicas + inner.rank
        is_padded = not inner.drop_last and last >= len(inner.dataset)  # type: ignore[arg-type]  # it has a length
        for item in self.original:
            is_single = not hasattr(item, "__len__")
            given += 1 if is_single else len(item)
            if not is_padded or given < inner.num_samples:
                yield item
            elif not is_single and len(item) > 1:
                yield item[:-1]


def len_of(item: Any) -> int:
    """Return the number of samples of a batch sampler's item."""
    return len(item.numbers if isinstance(item, Key) else item)


def _one(item: Any) -> int:
    return 1


def taken(item: Any, part: slice) -> Any:
    """Return a part of a batch sampler's item."""
    if isinstance(item, Key):
        return Key(item.epoch, item.numbers[part], item.indices[part])
    return item[part]


# Loaders -------------------------------------------------------------------------------------------


class SplitBatches(Twin):
    """A list of batches, each divided when it is given: views of every n-th row would not be contiguous."""

    def __init__(self, batches: Any, ranks: Ranks) -> None:
        super().__init__(batches)
        self._ranks = ranks

    def __getitem__(self, rest: slice) -> "SplitBatches":
        """Return the rest of the list, from a batch of this rank on."""
        return type(self)(self.original[self._whole(rest.start) :], self._ranks)

    def _whole(self, batches: int) -> int:
        return batches

    def __iter__(self) -> Iterator[Any]:
        queue = Queue(is_ahead=False)
        self._ranks.begin(queue)
        return self._shared(queue)

    def _shared(self, queue: Queue) -> Iterator[Any]:
        ranks = self._ranks
        for batch in self.original:
            samples = ranks.count_samples(batch)
            queue.shares.append(ranks.split_share(samples))
            yield divided(batch, samples, ranks.part(samples))


class WholeBatches(SplitBatches):
    """A list of batches, in turn."""

    def __init__(self, batches: Any, ranks: Ranks) -> None:
        super().__init__(batches, ranks)
        self.batches_per_step = ranks.world_size

    def _whole(self, batches: int) -> int:
        return batches * self._ranks.world_size

    def _shared(self, queue: Queue) -> Iterator[Any]:
        for batch, share in in_groups(iter(self.original), self._ranks, self._ranks.count_samples):
            queue.shares.append(share)
            yield batch

    def __len__(self) -> int:
        return self._ranks.groups(len(self.original))


class WholeStream(Twin):
    """A loader without indices: each rank reads all batches, and takes its own."""

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        super().__init__(loader)
        self._ranks = ranks
        self.batches_per_step = ranks.world_size

    def __iter__(self) -> Iterator[Any]:
        queue = Queue(is_ahead=False)
        self._ranks.begin(queue)
        return self._shared(self._all(at_once=False), queue)

    def _all(self, *, at_once: bool) -> Iterator[Any]:
        loader = self.original
        parts = (loader, *samplers_of(loader), *datasets_of(loader))
        return self._ranks.in_order(loader, parts, gives_indices=False, at_once=at_once)

    def _shared(self, batches: Iterator[Any], queue: Queue) -> Iterator[Any]:
        for batch, share in in_groups(batches, self._ranks, self._ranks.count_samples):
            # A resumed pass reads batches again without a look at their shares
            queue.shares.clear()
            queue.shares.append(share)
            yield batch

    def __len__(self) -> int:
        return self._ranks.groups(len(self.original))


class TurnStream(WholeStream):
    """The same for validations. Takes part in what ranks exchange even where a limit lets it give no batch."""

    def __iter__(self) -> Iterator[Any]:
        rank, world_size, *_ = self._ranks
        return itertools.islice(self._all(at_once=True), rank, None, world_size)

    def __len__(self) -> int:
        return self._ranks.turns(len(self.original))
