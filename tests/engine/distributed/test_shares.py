"""Each rank's share of the batches. Threads stand for ranks: one runs at a time, with random states of its own."""

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from offloop.engine import ConfigError
from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.loader_parts import set_epoch
from offloop.engine.data.random_state import capture_on_host, kept_on_host, restore_on_host
from offloop.engine.data.seeded_sampling import SeededSampling
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


class OrderOfNumPy(Sampler[int]):
    """Draws when its iterator is made."""

    def __iter__(self) -> Iterator[int]:
        return iter(numpy.random.permutation(22).tolist())

    def __len__(self) -> int:
        return 22


class OrderOfPython(OrderOfNumPy):
    """Draws with every item."""

    def __iter__(self) -> Iterator[int]:
        for number in range(22):
            yield (number + random.randrange(22)) % 22


class OwnOrder(OrderOfNumPy):
    """Has generators of its own, of each kind, that another rank has seeded otherwise."""

    def __init__(self) -> None:
        self.first = random.Random(random.random())
        self.second = numpy.random.default_rng(random.randrange(1000))
        self.third = torch.Generator().manual_seed(random.randrange(1000))

    def __iter__(self) -> Iterator[int]:
        order = self.second.permutation(torch.randperm(22, generator=self.third).numpy()).tolist()
        self.first.shuffle(order)
        return iter(order)


def with_generator() -> Any:
    """One generator for the order and for the seeds of workers."""
    own = torch.Generator().manual_seed(random.randrange(1000))
    return DataLoader(Numbers(), 8, shuffle=True, generator=own)


ORDERS: dict[str, Callable[[], Any]] = {
    "torch": lambda: DataLoader(Numbers(), 8, shuffle=True),
    "its own generator": with_generator,
    "when iter is called": lambda: DataLoader(Numbers(), 8, sampler=OrderOfNumPy()),
    "with every item": lambda: DataLoader(Numbers(), 8, sampler=OrderOfPython()),
    "own generators": lambda: DataLoader(Numbers(), 8, sampler=OwnOrder()),
    "own batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(range(22)), 5, drop_last=True)
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_drawn_from_rank_zeros_random_state(order: str, workers: int) -> None:
    """Draws of training between two batches differ between ranks, and change nothing."""

    def make() -> Any:
        loader = ORDERS[order]()
        if workers:
            loader.num_workers, loader.prefetch_factor = workers, 2
        return loader

    def epochs(rank: Rank) -> list[Steps]:
        loader, shares = make(), rank.shares()
        return [steps(shares, loader, epoch) for epoch in range(2)]

    found = World(2).run(epochs)
    is_changed_by_training = order == "with every item"
    expected = alone(make, epochs=1 if is_changed_by_training else 2, draw=not is_changed_by_training)
    for rank, of_rank in enumerate(found):
        wanted = [[taken_apart(batch, rank, 2) for batch in epoch] for epoch in expected]
        assert of_rank[: len(wanted)] == wanted
    # Also where training draws from the generator from which the sampler draws
    joined = [
        [sorted(one + other) for (one, _), (other, _) in zip(*pair, strict=True)]
        for pair in zip(*found, strict=True)
    ]
    sizes = [[len(batch) for batch in epoch] for epoch in joined]
    assert sizes == [[8, 8, 6]] * 2 if order != "own batch sampler" else [[5] * 4] * 2


def test_what_is_drawn_on_rank_zero_is_what_one_process_draws() -> None:
    def act(rank: Rank) -> tuple[float, list[float]]:
        loader, shares = DataLoader(Noisy(), 8, shuffle=True, num_workers=2), rank.shares()
        read = shares.training(loader, 0)
        noise = [each for batch in shares.iterate(iter(read), 0) for each in batch[:, 1].tolist()]
        return torch.rand(()).item(), noise

    (drawn, noise), (other, other_noise) = World(2).run(act)
    with kept_on_host():
        seed(100)
        for _ in DataLoader(Noisy(), 8, shuffle=True, num_workers=2):
            pass
        assert torch.rand(()).item() == drawn
    assert drawn != other
    # The workers of each rank draw their own
    assert not set(noise) & set(other_noise)


def test_workers_of_two_ranks_with_one_loader_generator_draw_their_own() -> None:
    def act(rank: Rank) -> list[float]:
        own = torch.Generator().manual_seed(3)
        loader = DataLoader(Noisy(), 8, shuffle=True, num_workers=2, generator=own)
        shares = rank.shares()
        batches = list(shares.iterate(iter(shares.training(loader, 0)), 0))
        assert sum(len(each) for each in batches) == 11
        return [each for batch in batches for each in batch[:, 1].tolist()]

    noise, other = World(2).run(act)
    assert not set(noise) & set(other)


class Secret(OrderOfNumPy):
    """Draws from a generator that is no attribute."""

    def __iter__(self) -> Iterator[int]:
        return iter(numpy.random.default_rng().permutation(22).tolist())


def test_a_sampler_that_goes_its_own_way_on_each_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Secret began with other samples on rank 1 than on rank 0"):
        World(2).run(lambda rank: steps(rank.shares(), DataLoader(Numbers(), 8, sampler=Secret())))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", ["split", "whole"])
def test_seeded_samples_are_the_same_on_any_number_of_ranks(size: int, mode: Mode) -> None:
    """The numbers that seed a sample count in the epoch of all ranks."""

    def act(rank: Rank) -> list[Any]:
        loader, shares, seeding = DataLoader(Noisy(), 8, shuffle=True), rank.shares(mode), SeededSampling(7)
        found = []
        read = shares.training(seeding.twin_of(loader, 1), 1)
        for batch in shares.iterate(iter(read), 0):
            found += [tuple(sample) for sample in batch.tolist() if shares.share.counts]
        return found

    samples = sorted(sample for of_rank in World(size).run(act) for sample in of_rank)
    with kept_on_host():
        seed(100)
        loader = SeededSampling(7).twin_of(DataLoader(Noisy(), 8, shuffle=True), 1)
        assert samples == sorted(tuple(sample) for batch in loader for sample in batch.tolist())


# Whole batches -------------------------------------------------------------------------------------


def whole_shares(sizes: list[int], rank: int, size: int) -> list[Share]:
    groups = [sizes[start : start + size] for start in range(0, len(sizes), size)]
    return [
        Share(group[rank] * size / sum(group)) if rank < len(group) else Share(0.0, counts=False)
        for group in groups
    ]


class Counting:
    """An iterable of batches without a length, which draws from a global generator."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = list(range(22))
        random.shuffle(order)
        for start in range(0, 22, 4):
            # As a shuffling buffer does
            random.random()
            yield torch.tensor(order[start : start + 4])


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from Counting()


WHOLE: dict[str, Callable[[], Any]] = {
    "indices": lambda: DataLoader(Numbers(), 4, shuffle=True),
    "list": lambda: list(torch.arange(22).split(4)),
    "iterable": Counting,
    "iterable data set": lambda: DataLoader(Streamed(), batch_size=None),
    "batches of the data set": lambda: DataLoader(
        Grouped(), sampler=BatchSampler(RandomSampler(range(22)), 4, drop_last=False), batch_size=None
    ),
}


class Grouped(Numbers):
    """Takes a list of indices and gives a batch."""

    def __getitem__(self, index: Any) -> Any:
        return torch.tensor(index)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("size", [2, 4])
def test_whole_batches_go_round(kind: str, size: int) -> None:
    make = WHOLE[kind]
    found = World(size).run(lambda rank: steps(rank.shares("whole"), make()))
    counted = [batch for step in zip(*found, strict=True) for batch, share in step if share.counts]
    if kind in ("iterable", "iterable data set"):
        # Training draws from the generator from which they draw
        assert [len(each) for each in counted] == [4, 4, 4, 4, 4, 2]
    else:
        assert counted == alone(make)[0]
    assert sorted(each for batch in counted for each in batch) == list(range(22))
    for rank, of_rank in enumerate(found):
        assert [share for _, share in of_rank] == whole_shares([4, 4, 4, 4, 4, 2], rank, size)


def test_a_loader_of_whole_batches_has_the_length_of_its_steps() -> None:
    shares = Rank(0, World(4)).shares("whole")
    for kind in ("indices", "list", "batches of the data set"):
        assert len(shares.training(WHOLE[kind](), 0)) == 2  # type: ignore[arg-type]  # it has a length
    assert shares.counting(WHOLE["list"](), is_training=True)(5) == 2
    assert [Rank(rank, World(4)).shares("whole").counting([], is_training=False)(6) for rank in range(4)] == [
        2,
        2,
        1,
        1,
    ]
