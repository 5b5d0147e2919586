"""`rank_batches="own"`: each rank's loader gives its own batches, and all ranks take as many steps."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from torch.utils.data import BatchSampler, DataLoader

from offloop.engine.data.batches import length_of
from offloop.engine.data.loader_parts import name_of
from offloop.engine.data.twin import unwrapped
from offloop.engine.distributed.twins import Ranks
from offloop.engine.errors import BatchError, ConfigError
from offloop.engine.position.loader_doubts import is_sequence
from offloop.engine.training.strategy import Share

_END: Final = object()


class OwnBatches:
    """One pass over the loaders of all ranks. Training thread only."""

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        """Prepare a pass over this rank's loader."""
        self._loader = loader
        self._ranks = ranks
        self._length: int | None = None
        # While each rank's batches are full; None: unknown
        self._full: Share | None = None
        # Of lists of batches, which all ranks can count: samples by rank and batch
        self._counts: list[list[int]] | None = None

    def compare(self) -> None:
        """Compare the loaders of all ranks as a pass begins. Waits for the other ranks.

        Raises:
            ConfigError: Their lengths differ.
        """
        own = (
            [self._ranks.count_samples(each) for each in self._loader] if is_sequence(self._loader) else None
        )
        found = self._ranks.gather((length_of(self._loader), _batch_size(self._loader), own))
        lengths = [length for length, _, _ in found]
        known = [each for each in lengths if each is not None]
        if len(known) == len(lengths):
            if len(set(known)) > 1:
                told = ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(known))
                raise ConfigError(
                    f"{name_of(self._loader)} has not the same number of batches on all ranks ({told}), but a step "
                    "needs one of each: give them equal shares (a DistributedSampler does, drop_last=True where the "
                    'rest differs), or the whole data and rank_batches="split" or "whole"'
                )
            self._length = known[0]
            if all(counts is not None for _, _, counts in found):
                self._counts = [counts for _, _, counts in found]
        sizes = [size for _, size, _ in found]
        if self._length is not None and all(size is not None for size in sizes):
            self._full = self._ranks.share(sizes[self._ranks.rank], sum(sizes))

    def over(self, iterator: Iterator[Any], given: int, take: Callable[[Share], None]) -> Iterator[Any]:
        """Yield the batches of this rank while all ranks have one.

        Args:
            iterator: Over this rank's loader.
            given: Batches that the pass had before a resume.
            take: Is told the share of each batch before it is yielded.

        Raises:
            BatchError: The loader gives fewer or more batches than its length.
        """
        ranks, length = self._ranks, self._length
        while True:
            batch = next(iterator, _END)
            if length is None:
                counts = ranks.gather(None if batch is _END else ranks.count_samples(batch))
                if None in counts:
                    return
            elif (batch is _END) != (given == length):
                raise BatchError(
                    f"{name_of(self._loader)} gave {'more' if given == length else f'only {given}'} batches than the "
                    f"{length} of its length, with which the other ranks count: correct its __len__, or give it none"
                )
            elif batch is _END:
                return
            elif self._full is not None and given + 1 < length:
                given += 1
                take(self._full)
                yield batch
                continue
            elif self._counts is not None:
                counts = [of_rank[given] for of_rank in self._counts]
            else:
                counts = ranks.gather(ranks.count_samples(batch))
            given += 1
            take(ranks.share(counts[ranks.rank], sum(counts)))
            yield batch


def _batch_size(loader: Any) -> int | None:
    """Return the samples of all batches but the last; None if unknown."""
    sampler = unwrapped(getattr(loader, "batch_sampler", None))
    if isinstance(loader, DataLoader) and type(sampler).__iter__ is BatchSampler.__iter__:
        return int(sampler.batch_size)
    return None
