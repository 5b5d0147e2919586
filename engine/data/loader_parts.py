"""The parts of a loader that decide the content of an epoch: samplers and data sets, without offloop's wrappers."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from offloop.engine.data.twin import unwrapped


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Call `set_epoch(epoch)` on the loader, its samplers and its data sets, if they have it.

    By this convention of torch's `DistributedSampler` the order depends on the epoch's number, so that a resumed
    epoch has the same order. Training thread, before `iter(loader)`.
    """
    for part in (loader, *samplers_of(loader), *datasets_of(loader)):
        method = getattr(part, "set_epoch", None)
        if callable(method):
            method(epoch)


def samplers_of(loader: Any) -> Iterator[Any]:
    """Yield the samplers, outermost first, without repetition."""
    seen: list[Any] = []
    batch_sampler = unwrapped(getattr(loader, "batch_sampler", None))
    for part in (batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "sampler", None)):
        sampler = unwrapped(part)
        if sampler is not None and all(sampler is not each for each in seen):
            seen.append(sampler)
            yield sampler


def datasets_of(loader: Any) -> Iterator[Any]:
    """Yield the data set, and those inside torch's own wrappers."""
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


def parts_by_place(loader: Any) -> dict[str, Any]:
    """Return a loader and its parts by the names under which checkpoints hold their state; None for a missing part."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return {
        "loader": loader,
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "sampler of batches": getattr(batch_sampler, "sampler", None),
        "dataset": getattr(loader, "dataset", None),
    }


def name_of(part: Any) -> str:
    """Return the name of a part in messages: that of its class."""
    return type(unwrapped(part)).__name__
