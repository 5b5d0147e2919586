"""Seeded sampling: the random numbers of a sample depend on the seed, the epoch and its position in the epoch.

Augmentation draws from the generators of the process that loads the sample, in the order of loading. The generators
of loader workers cannot be restored, so a resumed run would draw other numbers. Here the generators of torch, Python
and NumPy are seeded before every sample, in whatever process: the numbers are the same with any number of workers and
after a resume. The order of the samples stays that of the loader's own sampler.

    batch sampler ── [7, 2] ──> (epoch, 4..5, [7, 2]) ──> worker: seed(epoch, 4), data_set[7]; seed(epoch, 5), ...
"""

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from offloop.engine.data.random_state import kept_on_host
from offloop.engine.data.twin import Twin
from offloop.engine.errors import ConfigError


class Key(NamedTuple):
    """An item of a sampler together with the numbers that seed its samples."""

    epoch: int
    numbers: range
    """Of the samples in the epoch."""
    indices: Any
    """What the sampler gave: an index or a list of indices."""


def check_seedable(loader: Iterable[Any]) -> None:
    """Check that a loader's samples can be seeded.

    Raises:
        ConfigError: The loader itself decides which samples it loads, and where.
    """
    # Existing batches draw nothing.
    if isinstance(loader, list | tuple):
        return
    fix = 'leave sampling at "loader" and give the data set its own state_dict'
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f'sampling="seeded" needs a DataLoader or a list of batches, got {type(loader).__name__}: {fix}'
        )
    if isinstance(loader.dataset, IterableDataset):
        name = type(loader.dataset).__name__
        raise ConfigError(
            f'sampling="seeded" needs a data set with indices, {name} is an IterableDataset: {fix}'
        )
    if loader.num_workers and hasattr(loader, "state_dict") and hasattr(loader.dataset, "state_dict"):
        raise ConfigError(
            f'{type(loader).__name__} keeps the state of its data set: leave sampling at "loader", or take a DataLoader'
        )


class SeededSampling:
    """Twins of a run's loaders that seed their samples. Training thread only."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # By id of the original, which is kept alive.
        self._twins: dict[int, tuple[DataLoader[Any], DataLoader[Any]]] = {}

    def twin_of(self, loader: Iterable[Any], epoch: int) -> Iterable[Any]:
        """Return a loader with the same batches whose samples are seeded for an epoch.

        All epochs share one twin, so that persistent workers stay.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return loader
        if id(loader) not in self._twins:
            self._twins[id(loader)] = (loader, _twin(loader, self._seed))
        twin = self._twins[id(loader)][1]
        numbered = twin.sampler if twin.batch_sampler is None else twin.batch_sampler
        assert isinstance(numbered, Numbered)
        numbered.epoch = epoch
        return twin

    def close(self) -> None:
        """Drop the twins and their persistent workers."""
        self._twins.clear()


def _twin(loader: "DataLoader[Any]", seed: int) -> "DataLoader[Any]":
    twin = copy.copy(loader)
    # DataLoader forbids changing these, because they might not fit together. These do.
    changed: dict[str, Any] = {
        "dataset": SeededDataset(loader.dataset, loader.collate_fn, seed),
        "collate_fn": _as_it_is,
        # Existing persistent workers have the other data set.
        "_iterator": None,
    }
    # With batch_size=None, the sampler gives single samples.
    if loader.batch_sampler is None:
        changed["sampler"] = Numbered(loader.sampler, count=_one)
    else:
        changed["batch_sampler"] = Numbered(loader.batch_sampler, count=len)
    twin.__dict__.update(changed)
    return twin


class Numbered(Twin):
    """A sampler that gives items together with their epoch and the numbers of their samples."""

    def __init__(self, sampler: Iterable[Any], count: Callable[[Any], int]) -> None:
        super().__init__(sampler)
        self.epoch = 0
        self._count = count

    def __iter__(self) -> Iterator[Key]:
        number = 0
        for item in self.original:
            following = number + self._count(item)
            yield Key(self.epoch, range(number, following), item)
            number = following


class SeededDataset(Twin):
    """A data set that takes keys, seeds the generators and returns collated batches."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], seed: int) -> None:
        super().__init__(dataset)
        self.collate = collate
        self._seed = seed

    def __getitems__(self, key: Key) -> Any:
        fetch = getattr(self.original, "__getitems__", None)
        with _training_undisturbed():
            if fetch is not None:
                self._seed_for(key.epoch, key.numbers[0])
                return self.collate(fetch(key.indices))
            samples = []
            for number, index in zip(key.numbers, key.indices, strict=True):
                self._seed_for(key.epoch, number)
                samples.append(self.original[index])
            # A collate function that draws continues with the last sample's numbers.
            return self.collate(samples)

    def __getitem__(self, key: Key) -> Any:
        with _training_undisturbed():
            self._seed_for(key.epoch, key.numbers[0])
            return self.collate(self.original[key.indices])

    def _seed_for(self, epoch: int, number: int) -> None:
        text = f"{self._seed} {epoch} {number}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
        # torch.manual_seed would seed the devices too, from which training draws.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            # NumPy accepts 32 bits.
            numpy.random.seed(seed & 0xFFFFFFFF)


def _training_undisturbed() -> AbstractContextManager[None]:
    """Restore the generators afterwards, except in a worker, where training does not draw."""
    return nullcontext() if get_worker_info() is not None else kept_on_host()


def _as_it_is(batch: Any) -> Any:
    return batch


def _one(index: Any) -> int:
    return 1
