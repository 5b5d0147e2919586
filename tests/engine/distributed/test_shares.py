"""Each rank's share of the batches. Threads stand for ranks: one runs at a time, with random states of its own."""

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.loader_parts import set_epoch
from offloop.engine.data.random_state import capture_on_host, kept_on_host, restore_on_host
from offloop.engine.distributed.shares import Mode, Shares
from offloop.engine.training.strategy import Share

PATIENCE = 60.0
"""Seconds for a rank to wait for the others."""


class Rank:
    """A rank in a thread. It has the generators to itself until it waits in `gather`."""

    def __init__(self, number: int, world: "World") -> None:
        self.number = number
        self.world = world

    def gather(self, own: Any) -> list[Any]:
        world = self.world
        world.values[self.number] = own
        state = capture_on_host()
        world.turn.release()
        try:
            world.barrier.wait(PATIENCE)
            found = list(world.values)
            world.barrier.wait(PATIENCE)
        finally:
            world.turn.acquire()
        restore_on_host(state)
        if self.number == 0:
            world.gathers += 1
        return found

    def shares(self, mode: Mode = "split") -> Shares:
        return Shares(
            self.number,
            self.world.size,
            mode,
            gather=self.gather,
            gather_objects=self.gather,
            count_samples=guess_batch_size,
        )


class World:
    """Several ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size
        self.gathers = 0

    def run(self, act: Callable[[Rank], Any]) -> list[Any]:
        """Return what each rank returns; raise what the first of them raises."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException | None] = [None] * self.size

        def body(number: int) -> None:
            with self.turn:
                seed(100 + number)
                try:
                    results[number] = act(Rank(number, self))
                except BaseException as error:
                    errors[number] = error
                    self.barrier.abort()

        threads = [threading.Thread(target=body, args=(number,)) for number in range(self.size)]
        with kept_on_host():
            for each in threads:
                each.start()
            for each in threads:
                each.join(2 * PATIENCE)
        for error in errors:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return results


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


class Numbers(Dataset[Any]):
    """Gives its indices."""

    def __init__(self, samples: int = 22) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index)


class Noisy(Numbers):
    """Gives its indices with numbers drawn from each global generator."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, torch.rand(()), random.random(), numpy.random.rand()])


Steps = list[tuple[list[int], Share]]


def steps(shares: Shares, loader: Iterable[Any], epoch: int = 0, draw: bool = True) -> Steps:
    """Return an epoch of a rank: the samples of each step, and its share."""
    read = shares.training(loader, epoch)
    set_epoch(read, epoch)
    found: Steps = []
    for batch in shares.iterate(iter(read), 0):
        found.append((batch.tolist(), shares.share))
        if draw:
            # As dropout does
            torch.rand(1 + shares._ranks.rank)
    return found


def taken_apart(batch: list[int], rank: int, size: int) -> tuple[list[int], Share]:
    """Return what a rank should have of a batch that is divided."""
    own = batch[rank::size]
    return (own, Share(len(own) * size / len(batch))) if own else (batch[:1], Share(0.0, counts=False))


def alone(make: Callable[[], Iterable[Any]], epochs: int = 1, draw: bool = True) -> list[list[list[int]]]:
    """Return the batches of one process with rank 0's random states."""
    with kept_on_host():
        seed(100)
        loader, found = make(), []
        for epoch in range(epochs):
            set_epoch(loader, epoch)
            batches = []
            for batch in loader:
                batches.append(batch.tolist())
                if draw:
                    torch.rand(1)
            found.append(batches)
        return found


def shuffled(**options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(Numbers(), 8, shuffle=True, **options)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_of_one_process_is_divided_among_the_ranks(size: int, workers: int) -> None:
    make = shuffled(num_workers=workers)

    def epochs(rank: Rank) -> list[Steps]:
        loader, shares = make(), rank.shares()
        return [steps(shares, loader, epoch) for epoch in range(2)]

    found = World(size).run(epochs)
    expected = alone(make, epochs=2)
    for rank, of_rank in enumerate(found):
        assert of_rank == [[taken_apart(batch, rank, size) for batch in epoch] for epoch in expected]
    # 22 samples in batches of 8: the last one has 6
    assert found[0][0][0][1].factor == (1.0 if size != 3 else 3 * 3 / 8)
