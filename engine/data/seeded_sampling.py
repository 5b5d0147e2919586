"""Seeded sampling: what a sample draws follows from the seed, the epoch and its place in the epoch.

Augmentation draws from the generators of whichever process loads the sample, in the order in which it comes to
them. In loader workers nobody can put these generators back, so a resumed run draws anew. Here the generators
of torch, Python and NumPy are seeded before each sample, wherever it is loaded: the numbers are the same with
any number of workers, and after a resume. The order of the samples stays that of the loader's own sampler.

    batch sampler ── [7, 2] ──> (epoch, 4, [7, 2]) ──> worker: seed(epoch, 4), data_set[7]; seed(epoch, 5), ...
"""

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from offloop.engine.data.random_state import kept_on_host
from offloop.engine.errors import ConfigError

Key = tuple[int, int, Any]
"""Epoch, number of the (first) sample in it, and what the sampler gave: an index, or a list of them."""


def check_seedable(loader: Iterable[Any]) -> None:
    """Raise unless what `loader` draws can be seeded sample by sample.

    Raises:
        ConfigError: It decides itself which samples it loads, and where.
    """
    if isinstance(loader, list | tuple):
        return  # batches that are there already draw nothing
    fix = 'leave sampling at "loader" and give the data set its own state_dict'
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f'sampling="seeded" needs a DataLoader or a list of batches, got {type(loader).__name__}: {fix}'
        )
    if isinstance(loader.dataset, IterableDataset):
        name = type(loader.dataset).__name__
        raise ConfigError(
            f'sampling="seeded" needs a data set with indices, {name} is an iterable one: {fix}'
        )
    if loader.num_workers and hasattr(loader, "state_dict") and hasattr(loader.dataset, "state_dict"):
        raise ConfigError(
            f'{type(loader).__name__} keeps the state of its data set: leave sampling at "loader", or take a DataLoader'
        )


class SeededSampling:
    """Twins of a run's loaders that seed what their samples draw. Training thread only."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._twins: dict[
            int, tuple[DataLoader[Any], DataLoader[Any]]
        ] = {}  # by id; the original is kept too

    def twin_of(self, loader: Iterable[Any], epoch: int) -> Iterable[Any]:
        """Return a loader with the same batches whose samples draw what `epoch` says.

        One twin serves all epochs, so that persistent workers stay.
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
        """Let the twins go, and their persistent workers with them."""
        self._twins.clear()


def _twin(loader: "DataLoader[Any]", seed: int) -> "DataLoader[Any]":
    twin = copy.copy(loader)
    # DataLoader forbids to change these, because they would no longer fit to each other; these do.
    changed: dict[str, Any] = {
        "dataset": SeededDataset(loader.dataset, loader.collate_fn, seed),
        "collate_fn": _as_it_is,
        "_iterator": None,  # of persistent workers, which have the other data set
    }
    if loader.batch_sampler is None:  # batch_size=None: single samples
        changed["sampler"] = Numbered(loader.sampler, count=_one)
    else:
        changed["batch_sampler"] = Numbered(loader.batch_sampler, count=len)
    twin.__dict__.update(changed)
    return twin


class Numbered:
    """A sampler that says with each item which samples of the epoch it stands for."""

    def __init__(self, sampler: Iterable[Any], count: Callable[[Any], int]) -> None:
        self.epoch = 0
        self.sampler_of_indices = sampler
        self._count = count

    def __iter__(self) -> Iterator[Key]:
        number = 0
        for item in self.sampler_of_indices:
            yield self.epoch, number, item
            number += self._count(item)

    def __len__(self) -> int:
        return len(self.sampler_of_indices)  # type: ignore[arg-type]  # a sampler has a length or raises

    def __getattr__(self, name: str) -> Any:  # its generator, its state_dict
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.sampler_of_indices, name)


class SeededDataset:
    """A data set that takes keys, seeds the generators and returns batches that are collated already."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], seed: int) -> None:
        self.unseeded = dataset
        self.collate = collate
        self._seed = seed

    def __getitems__(self, key: Key) -> Any:
        epoch, first, indices = key
        fetch = getattr(self.unseeded, "__getitems__", None)
        with _training_undisturbed():
            if fetch is not None:
                self._seed_for(epoch, first)
                return self.collate(fetch(indices))
            samples = []
            for number, index in enumerate(indices, first):
                self._seed_for(epoch, number)
                samples.append(self.unseeded[index])
            return self.collate(
                samples
            )  # a collate function that draws goes on with the last sample's numbers

    def __getitem__(self, key: Key) -> Any:
        epoch, number, index = key
        with _training_undisturbed():
            self._seed_for(epoch, number)
            return self.collate(self.unseeded[index])

    def __len__(self) -> int:
        return len(self.unseeded)

    def __getattr__(self, name: str) -> Any:  # what a worker_init_fn looks up, and a state_dict
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.unseeded, name)

    def _seed_for(self, epoch: int, number: int) -> None:
        text = f"{self._seed} {epoch} {number}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
        # Not torch.manual_seed, which seeds the devices too: those draw for the training.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed & 0xFFFFFFFF)  # it takes no more


def _training_undisturbed() -> AbstractContextManager[None]:
    """Put the generators back afterwards, except in a worker, where nobody else draws."""
    return nullcontext() if get_worker_info() is not None else kept_on_host()


def _as_it_is(batch: Any) -> Any:
    return batch


def _one(index: Any) -> int:
    return 1
