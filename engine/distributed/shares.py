"""Each rank's share of the batches.

    "split"    each batch is divided: a step takes what it takes with one process
    "whole"    whole batches in turn: a step takes as many as there are ranks
    "own"      each rank's loader gives its own

The user's own sampler decides what a batch is, so the sampling is that of one process. A twin of the loader, with the
same workers and data set, has a sampler that passes on this rank's part of each item and loads nothing else. The size
of each batch is known from the sampler, which workers ask ahead of time: the shares wait in a queue for their batches.

    batch sampler ── [7, 2, 9] ──> twin's sampler ── [7, 9] ──> workers ── batch ──> iterate: share 4/3 of the mean
                                          └── queue of shares ───────────────────────────┘

A rank that a batch leaves without a sample repeats one with the factor 0, so that it takes part in the step. In
validations, whole batches go round, and no sample counts twice.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.batches import length_of
from offloop.engine.data.divided import divided
from offloop.engine.data.loader_parts import name_of, samplers_of
from offloop.engine.data.seeded_sampling import SeededDataset
from offloop.engine.distributed.own_batches import OwnBatches
from offloop.engine.distributed.shared_order import Gather, draws_order
from offloop.engine.distributed.twins import (
    Queue,
    Ranks,
    RenumberedSampler,
    SplitBatches,
    SplitSampler,
    TurnSampler,
    TurnStream,
    UnpaddedSampler,
    WholeBatches,
    WholeSampler,
    WholeStream,
)
from offloop.engine.errors import BatchError, ConfigError
from offloop.engine.position.loader_doubts import (
    gives_its_sampler_order,
    is_sequence,
    restores_itself,
)
from offloop.engine.training.strategy import WHOLE, Share

Mode = Literal["split", "whole", "own"]

logger = logging.getLogger("offloop")

FEW_SAMPLES: Final = 8
"""Samples per rank below which a step is mostly overhead, and batch norm sees little. Arbitrary."""


def check_shareable(
    loader: Iterable[Any],
    mode: Mode,
    world_size: int,
    name: str,
    *,
    count_samples: Callable[[Any], int] = guess_batch_size,
    warns: bool = True,
) -> None:
    """Check before a run that the batches of a training loader can be shared; warn of small shares.

    Args:
        loader: The user's.
        mode: How its batches are shared.
        world_size: Number of ranks.
        name: Of the loader in messages: `train_loader`.
        count_samples: Returns the number of samples in a batch.
        warns: False: another rank warns of small shares.

    Raises:
        ConfigError: The batches cannot be shared in this way, or there are fewer samples than ranks.
    """
    if _is_own(loader, mode, world_size, name):
        return
    if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
        raise ConfigError(
            f"{name} has in_order=False: its workers give batches in another order on each rank; leave in_order at "
            'True, or give each rank a loader of its own batches and rank_batches="own"'
        )
    if mode == "split" and not _can_be_split(loader):
        raise ConfigError(_cannot_split(name, _why_not(loader)))
    size: int | None = None
    if is_sequence(loader):
        sizes = []
        for number, batch in enumerate(loader):
            sizes.append(count_samples(batch))
            if mode == "split":
                try:
                    divided(batch, sizes[-1], slice(0, 1))
                except BatchError as error:
                    raise ConfigError(
                        _cannot_split(name, f"batch {number} cannot be divided: {error}")
                    ) from error
        samples: int | None = sum(sizes)
        size = max(sizes, default=None)
    else:
        samples = length_of(getattr(loader, "dataset", None))
        found = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        size = found if isinstance(found, int) else None
    if samples is not None and samples < world_size:
        raise ConfigError(
            f"{name} has {samples} sample{'' if samples == 1 else 's'} for {world_size} ranks: start fewer processes, "
            "or give more data"
        )
    if warns and mode == "split" and size is not None and size < FEW_SAMPLES * world_size:
        logger.warning(
            "each of the %d ranks gets %s samples of a batch of %d (%s): a step may spend more time on communication "
            'than on them. Give a larger batch_size (it is that of all ranks together), or rank_batches="whole": '
            "then each rank takes whole batches, and a step %d of them",
            world_size,
            f"{size / world_size:.3g}",
            size,
            name,
            world_size,
        )


class Shares:
    """The shares of one rank. Training thread only."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        mode: Mode,
        *,
        gather: Gather,
        gather_objects: Gather,
        count_samples: Callable[[Any], int],
    ) -> None:
        """Start before the first epoch.

        Args:
            rank: Number of this process.
            world_size: Number of processes.
            mode: How training batches are shared.
            gather: Returns the plain values of all ranks.
            gather_objects: The same for anything that can be pickled; slower.
            count_samples: Returns the number of samples in a batch.
        """
        self.share: Share = WHOLE
        """Of the batch given last."""
        self._mode: Mode = mode
        self._ranks = Ranks(rank, world_size, gather, gather_objects, count_samples, self._begin)
        self._training: Twins = weakref.WeakKeyDictionary()
        self._validation: Twins = weakref.WeakKeyDictionary()
        # Of the pass that began last
        self._queue: Queue | None = None
        # Of the loader that was asked for last, if it gives this rank's own batches
        self._own: OwnBatches | None = None

    def training(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return the loader of this rank's share of the training batches; for a DataLoader the same one each time.

        Args:
            loader: The user's, or its twin that seeds the samples.

        Raises:
            ConfigError: The batches cannot be shared.
        """
        self._queue = self._own = None
        ranks, is_split = self._ranks, self._mode == "split"
        if _is_own(loader, self._mode, ranks.world_size, name_of(loader)):
            self._own = OwnBatches(loader, ranks)
            if isinstance(loader, DataLoader) and isinstance(loader.dataset, SeededDataset):
                return self._twin(loader, self._training, lambda each: RenumberedSampler(each, ranks))
            return loader
        if is_sequence(loader):
            return SplitBatches(loader, ranks) if is_split else WholeBatches(loader, ranks)
        if isinstance(loader, DataLoader) and _has_indices(loader):
            kind = SplitSampler if is_split else WholeSampler
            return self._twin(loader, self._training, lambda each: kind(each, loader, ranks))
        if is_split:
            raise ConfigError(_cannot_split(name_of(loader), _why_not(loader)))
        return WholeStream(loader, ranks)

    def validation(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return the loader of this rank's share of the batches of a validation: whole ones, each on one rank."""
        ranks = self._ranks
        if isinstance(loader, list | tuple) and is_sequence(loader):
            return loader[ranks.rank :: ranks.world_size]
        inner = _sampler_of_ranks(loader, ranks.world_size, name_of(loader))
        if inner is not None:
            if not isinstance(inner, DistributedSampler) or not isinstance(loader, DataLoader):
                return loader
            return self._twin(loader, self._validation, lambda each: UnpaddedSampler(each, inner))
        if isinstance(loader, DataLoader) and _has_indices(loader):
            draws = draws_order(loader)
            return self._twin(
                loader, self._validation, lambda each: TurnSampler(each, loader, ranks, draws=draws)
            )
        return TurnStream(loader, ranks)

    def counting(self, loader: Iterable[Any], *, is_training: bool) -> Callable[[int], int]:
        """Return a function that takes a number of a loader's batches and returns how many of them are this rank's.

        With `"whole"`, a step takes a batch on each rank, so the last step may take some more.

        Args:
            loader: The user's.
            is_training: False for a validation.
        """
        ranks = self._ranks
        if _sampler_of_ranks(loader, ranks.world_size, name_of(loader)) is not None:
            return int
        if is_training:
            return ranks.groups if self._mode == "whole" else int
        return ranks.turns

    def iterate(self, iterator: Iterator[Any], given: int) -> Iterator[Any]:
        """Return an iterator over the same training batches that keeps `share` up to date.

        Args:
            iterator: Over what `training` returned last.
            given: How many batches of that loader the epoch had before a resume.

        Raises:
            ConfigError: The ranks' own loaders do not fit together.
        """
        if self._own is not None:
            self._own.compare()
            return self._own.over(iterator, given, self._take)
        assert self._queue is not None
        return self._over(iterator, self._queue, given if self._queue.is_ahead else 0)

    def close(self) -> None:
        """Drop the twins and their persistent workers."""
        self._training.clear()
        self._validation.clear()
        self._queue = self._own = None

    def _begin(self, queue: Queue) -> None:
        self._queue = queue

    def _take(self, share: Share) -> None:
        self.share = share

    def _over(self, iterator: Iterator[Any], queue: Queue, skip: int) -> Iterator[Any]:
        ranks, shares = self._ranks, queue.shares
        for batch in iterator:
            for _ in range(skip):
                shares.popleft()
            skip = 0
            share = shares.popleft()
            if not queue.is_known:
                own = ranks.count_samples(batch) if share.counts else 0
                share = ranks.share(own, sum(ranks.gather(own)))
            self.share = share
            yield batch

    def _twin(
        self, loader: "DataLoader[Any]", twins: "Twins", sampler: Callable[[Any], Any]
    ) -> "DataLoader[Any]":
        """Return a loader with the same workers and samples, and another sampler."""
        if loader not in twins:
            twins[loader] = twin = copy.copy(loader)
            place = "sampler" if loader.batch_sampler is None else "batch_sampler"
            changed: dict[str, Any] = {place: sampler(getattr(loader, place)), "_iterator": None}
            if loader.generator is not None and self._ranks.rank:
                # It seeds the workers, which must not draw the same on all ranks
                own = torch.Generator()
                own.manual_seed((loader.generator.initial_seed() + self._ranks.rank) % 2**63)
                changed["generator"] = own
            # DataLoader forbids changing these, because they might not fit together. These do.
            twin.__dict__.update(changed)
        return twins[loader]


Twins = weakref.WeakKeyDictionary["DataLoader[Any]", "DataLoader[Any]"]


def _has_indices(loader: Iterable[Any]) -> bool:
    """Return True where a sampler decides what is loaded, so that another one can take its place."""
    return (
        gives_its_sampler_order(loader)
        and not isinstance(loader.dataset, IterableDataset)  # type: ignore[attr-defined]  # it is a DataLoader
        and not restores_itself(loader)
    )


def _can_be_split(loader: Iterable[Any]) -> bool:
    if is_sequence(loader):
        return True
    return _has_indices(loader) and loader.batch_sampler is not None  # type: ignore[attr-defined]  # as above


def _why_not(loader: Iterable[Any]) -> str:
    if not isinstance(loader, DataLoader):
        return f"{name_of(loader)} is no DataLoader or list of batches"
    if isinstance(loader.dataset, IterableDataset):
        return f"{name_of(loader.dataset)} is an IterableDataset, without indices"
    if not gives_its_sampler_order(loader):
        return f"{name_of(loader)} overrides __iter__"
    if restores_itself(loader):
        return f"{name_of(loader)} keeps the state of its data set in its workers"
    return "batch_size=None gives single samples, or batches that the data set has made"


def _cannot_split(name: str, why: str) -> str:
    return (
        f'rank_batches="split" divides each batch among the ranks, which {name} does not allow: {why}. Give '
        'rank_batches="whole" (whole batches in turn; each rank reads all that have no index) or "own" (the loader of '
        "each rank gives its own batches)"
    )


def _is_own(loader: Iterable[Any], mode: Mode, world_size: int, name: str) -> bool:
    return _sampler_of_ranks(loader, world_size, name) is not None or mode == "own"


def _sampler_of_ranks(loader: Iterable[Any], world_size: int, name: str) -> Any:
    """Return a sampler that gives this rank's own samples already, as torch's DistributedSampler; else None.

    Raises:
        ConfigError: It is one for another number of ranks.
    """
    for sampler in samplers_of(loader):
        ranks = getattr(sampler, "num_replicas", None)
        if isinstance(ranks, int) and ranks != 1:
            if ranks != world_size:
                raise ConfigError(
                    f"the {name_of(sampler)} of {name} has num_replicas={ranks}, but there are {world_size} ranks: "
                    "leave num_replicas and rank out, or give a usual sampler and let offloop share its batches"
                )
            return sampler
    return None
