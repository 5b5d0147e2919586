"""A pass of several ranks goes on where it was interrupted, also on another number of ranks."""

import random
from collections.abc import Iterator
from typing import Any, Final

import numpy
import pytest
import torch
from rank_threads import Rank, World
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # it has no types

from offloop.engine.data.random_state import capture_random_state, restore_random_state
from offloop.engine.distributed.shares import Mode
from offloop.engine.position.epoch_source import EpochSource
from offloop.engine.training.strategy import Share

pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated:UserWarning"
)  # torchdata asks torch for it

SAMPLES, BATCH = 44, 6
"""Eight batches, the last with two samples."""


class Noisy(Dataset[Any]):
    """Gives its indices with numbers drawn from each global generator."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, torch.rand(()), random.random(), numpy.random.rand()])


QUIET: Final = TensorDataset(torch.arange(SAMPLES))
"""Draws nothing."""


class Restless(Sampler[int]):
    """Draws with every item."""

    def __iter__(self) -> Iterator[int]:
        for number in range(SAMPLES):
            yield (number + random.randrange(SAMPLES)) % SAMPLES

    def __len__(self) -> int:
        return SAMPLES

    def set_epoch(self, epoch: int) -> None:
        """There is no state to doubt."""


class Stream:
    """An iterable of batches."""

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(SAMPLES).split(BATCH))


class StatefulStream(IterableDataset[Any]):
    """Knows where it is."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < SAMPLES:
            self.position += 1
            yield torch.tensor(self.position - 1)
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Program:
    """Stands for a trainer: the place of its loader."""


class Reading:
    """A rank that reads epochs of one loader, and may be interrupted in one."""

    def __init__(self, rank: Rank, loader: Any, mode: Mode, seed: int | None) -> None:
        self.shares = shares = rank.shares(mode)
        self.source = EpochSource(
            Program(),
            loader,
            None,
            seed=seed,
            is_resumable=True,
            share=shares.training,
            share_validation=shares.validation,
        )
        self.loader = loader
        self.found: list[tuple[Any, Share]] = []

    def begin_epoch(self, batches: int) -> None:
        self.source.position.begin_epoch(batches)

    def read(self, epoch: int, start: int = 0, steps: int | None = None) -> None:
        source, position = self.source, self.source.position
        is_resumed = position.saved_pass() is not None
        random_states = self.random if is_resumed else None
        iterator, given = source.begin(
            self.loader, epoch=epoch, start=start, keep_random=random_states is None
        )
        iterator = self.shares.iterate(iterator, given)
        if random_states is not None:
            restore_random_state(random_states)
        for number, batch in enumerate(iterator, given + 1):
            position.current.given = number
            batch = batch[0] if isinstance(batch, list) else batch
            self.found.append((batch.tolist(), self.shares.share))
            # As dropout does
            torch.rand(1)
            if number == steps:
                source.leave(iterator, in_training=True)
                return
        position.current.is_done = True

    def saved(self, steps: int) -> Any:
        return self.source.position.capture(in_epoch=True, batches=steps), capture_random_state()

    def resume(self, saved: Any, epoch: int, steps: int) -> None:
        position, self.random = saved
        self.source.restore(position, in_epoch=True, epoch=epoch, batches=steps)

    def close(self) -> None:
        self.source.release()
        self.source.close()
        self.shares.close()


def make_loader(kind: str, workers: int, persistent: bool) -> Any:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": persistent}
    if kind == "quiet":
        return DataLoader(QUIET, BATCH, shuffle=True, **options)
    if kind == "its own generator":
        own = torch.Generator().manual_seed(5)
        return DataLoader(QUIET, BATCH, shuffle=True, generator=own, **options)
    if kind == "stream":
        return Stream()
    if kind == "own data set":
        return StatefulDataLoader(StatefulStream(), BATCH)
    if kind == "stateful loader":
        return StatefulDataLoader(QUIET, BATCH, shuffle=True, **options)
    if kind == "every item":
        return DataLoader(QUIET, BATCH, sampler=Restless(), **options)
    if kind == "list":
        return list(torch.arange(SAMPLES).split(BATCH))
    return DataLoader(Noisy(), BATCH, shuffle=True, **options)


def interrupted(
    size: int,
    again: int,
    mode: Mode,
    kind: str,
    workers: int,
    persistent: bool,
    seed: int | None,
    steps: int = 3,
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return what ranks read in the second and third epoch: uninterrupted, resumed; and doubts."""

    def whole(rank: Rank) -> Any:
        reading = Reading(rank, make_loader(kind, workers, persistent), mode, seed)
        for epoch in range(3):
            reading.begin_epoch(8)
            reading.read(epoch)
            if epoch == 0:
                reading.found.clear()
        reading.close()
        return reading.found

    def first(rank: Rank) -> Any:
        reading = Reading(rank, make_loader(kind, workers, persistent), mode, seed)
        reading.begin_epoch(0)
        reading.read(0)
        reading.begin_epoch(8)
        reading.found.clear()
        reading.read(1, steps=steps)
        saved = reading.saved(steps)
        reading.close()
        return reading.found, saved

    parts = World(size).run(first)

    def rest(rank: Rank) -> Any:
        # As a rank that was not there before: from what rank 0 has saved
        found, saved = parts[rank.number if rank.number < size else 0]
        reading = Reading(rank, make_loader(kind, workers, persistent), mode, seed)
        reading.resume(saved, 1, steps)
        reading.read(1, start=steps)
        reading.begin_epoch(8)
        reading.read(2)
        doubts = [each.reason for each in reading.source.position.doubts]
        reading.close()
        return (found if again == size else []) + reading.found, doubts

    resumed = World(again).run(rest)
    return World(again).run(whole), [found for found, _ in resumed], [doubts for _, doubts in resumed]


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    "mode, kind",
    [
        ("split", "quiet"),
        ("split", "its own generator"),
        ("split", "every item"),
        ("split", "seeded"),
        ("split", "stateful loader"),
        ("whole", "quiet"),
    ],
)
def test_an_interrupted_epoch_goes_on_bit_for_bit(
    mode: Mode, kind: str, workers: int, persistent: bool
) -> None:
    uninterrupted, resumed, doubts = interrupted(
        2, 2, mode, kind, workers, persistent, 7 if kind == "seeded" else None
    )
    assert resumed == uninterrupted
    assert doubts == [[], []]


def test_samples_that_draw_in_this_process_are_the_same_too() -> None:
    uninterrupted, resumed, doubts = interrupted(2, 2, "split", "noisy", 0, False, None)
    assert resumed == uninterrupted
    assert doubts == [[], []]


@pytest.mark.parametrize("kind, workers", [("quiet", 2), ("its own generator", 0), ("seeded", 0)])
@pytest.mark.parametrize("size, again", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_ranks_takes_over_where_batches_are_split(
    size: int, again: int, kind: str, workers: int
) -> None:
    """The whole batches are those of the uninterrupted run, and each sample draws the same numbers."""
    uninterrupted, resumed, doubts = interrupted(
        size, again, "split", kind, workers, False, 7 if kind == "seeded" else None
    )
    for whole, rest in zip(uninterrupted, resumed, strict=True):
        assert rest == whole[3:]
    assert doubts == [[]] * again


def test_a_list_of_batches_is_taken_over() -> None:
    uninterrupted, resumed, doubts = interrupted(2, 3, "split", "list", 0, False, None)
    assert resumed == [whole[3:] for whole in uninterrupted]
    assert doubts == [[]] * 3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "kind, doubts",
    [
        ("list", []),
        (
            "stream",
            [
                "the state of Stream is not saved: give it state_dict and load_state_dict, or take a DataLoader",
                "{} batches of Stream were read again to skip them",
            ],
        ),
        (
            "own data set",
            ["what is drawn while all ranks read all batches of StatefulDataLoader is not restored"],
        ),
    ],
)
def test_batches_that_all_ranks_read_go_on_in_turn(kind: str, doubts: list[str], steps: int) -> None:
    uninterrupted, resumed, found = interrupted(2, 2, "whole", kind, 0, False, None, steps=steps)
    assert resumed == uninterrupted
    assert found == [[each.format(steps) for each in doubts]] * 2


def test_another_number_of_ranks_is_named_where_they_take_whole_batches() -> None:
    _, _, doubts = interrupted(2, 1, "whole", "quiet", 0, False, None, steps=2)
    assert doubts == [["batches per step was 2, now it is 1"]]


def test_workers_of_a_validation_are_taken_for_those_of_the_interrupted_run() -> None:
    """Workers that stay draw no seed in later passes: training draws the same numbers after them."""

    def source(rank: Rank) -> tuple[EpochSource, Any]:
        loader = DataLoader(QUIET, BATCH, num_workers=1, persistent_workers=True)
        shares = rank.shares()
        return EpochSource(
            Program(),
            [],
            loader,
            seed=None,
            is_resumable=True,
            share=shares.training,
            share_validation=shares.validation,
        ), loader

    def uninterrupted(rank: Rank) -> Any:
        of_run, loader = source(rank)
        samples = sum(len(batch) for (batch,) in of_run.begin_validation(loader, 0))
        saved = of_run.position.capture(in_epoch=False, batches=0), capture_random_state()
        assert sum(len(batch) for (batch,) in of_run.begin_validation(loader, 1)) == samples
        of_run.close()
        return samples, saved, torch.rand(()).item()

    parts = World(2).run(uninterrupted)
    assert [samples for samples, _, _ in parts] == [24, 20]

    def resumed(rank: Rank) -> float:
        of_run, loader = source(rank)
        (position, random_state) = parts[rank.number][1]
        of_run.restore(position, in_epoch=False, epoch=1, batches=0)
        restore_random_state(random_state)
        for _ in of_run.begin_validation(loader, 1):
            pass
        of_run.close()
        return torch.rand(()).item()

    assert World(2).run(resumed) == [drawn for _, _, drawn in parts]
