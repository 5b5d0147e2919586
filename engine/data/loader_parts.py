"""The parts of a loader that decide what an epoch gives: samplers and data sets, found below every wrapper of ours."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from offloop.engine.data.seeded_sampling import Numbered, SeededDataset


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Call `set_epoch(epoch)` on the loader, its samplers and its data sets, where they have one.

    By that convention of torch's `DistributedSampler` an order follows from the epoch's number, so that a resumed
    epoch has the order it began with. Training thread, before `iter(loader)`.
    """
    for part in (loader, *samplers_of(loader), *datasets_of(loader)):
        method = getattr(part, "set_epoch", None)
        if callable(method):
            method(epoch)


def samplers_of(loader: Any) -> Iterator[Any]:
    """Yield what draws the indices of an epoch, outermost first, each once."""
    seen: list[Any] = []
    batch_sampler = unwrapped(getattr(loader, "batch_sampler", None))
    for part in (batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "sampler", None)):
        sampler = unwrapped(part)
        if sampler is not None and all(sampler is not each for each in seen):
            seen.append(sampler)
            yield sampler


def datasets_of(loader: Any) -> Iterator[Any]:
    """Yield the data set and, where torch's own wrappers hide others, those too."""
    waiting = [unwrapped(getattr(loader, "dataset", None))]
    while waiting:
        dataset = waiting.pop(0)
        if dataset is None:
            continue
        yield dataset
        if isinstance(dataset, Subset):
            waiting.append(dataset.dataset)
        elif isinstance(dataset, ConcatDataset):
            waiting.extend(dataset.datasets)


def unwrapped(part: Any) -> Any:
    """Return the user's sampler or data set behind the one that seeds its samples."""
    if isinstance(part, Numbered):
        return part.sampler_of_indices
    return part.unseeded if isinstance(part, SeededDataset) else part


def name_of(part: Any) -> str:
    """Return what a part is called in messages: the name of its class."""
    return type(part).__name__
