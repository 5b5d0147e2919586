"""Each rank's share of the batches. Threads stand for ranks."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import pytest
import torch
from rank_threads import Rank, World, seed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from offloop.engine import BatchError, ConfigError
from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.batches import length_of
from offloop.engine.data.divided import divided
from offloop.engine.data.loader_parts import set_epoch
from offloop.engine.data.random_state import kept_on_host
from offloop.engine.data.seeded_sampling import SeededSampling
from offloop.engine.distributed.shares import Mode, Shares, check_shareable
from offloop.engine.training.strategy import Share


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
    read = shares.training(loader)
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
        read = shares.training(loader)
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
        batches = list(shares.iterate(iter(shares.training(loader)), 0))
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
        read = shares.training(seeding.twin_of(loader, 1))
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
        assert len(shares.training(WHOLE[kind]())) == 2  # type: ignore[arg-type]  # it has a length
    assert shares.counting(WHOLE["list"](), is_training=True)(5) == 2
    assert [Rank(rank, World(4)).shares("whole").counting([], is_training=False)(6) for rank in range(4)] == [
        2,
        2,
        1,
        1,
    ]


# Lists of batches ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Item:
    inputs: torch.Tensor
    name: str


def lists(samples: int) -> list[Any]:
    """Return batches of each kind that can be divided."""
    rows = torch.arange(samples * 7).reshape(samples, 7)
    return [
        rows,
        (rows, rows[:, 0]),
        [rows, rows[:, 0]],
        {"inputs": rows, "scale": 2.0, "name": "one batch", "weight": torch.tensor(3.0)},
        Item(rows, "one batch"),
        [(rows[number], number) for number in range(samples)],
        [{"inputs": rows[number], "name": str(number)} for number in range(samples)],
        ([rows[number] for number in range(samples)], [str(number) for number in range(samples)]),
        (rows, {"mask": rows > 1}, rows.numpy()),
        (rows, [rows, rows]),
    ]


def flat(item: Any) -> list[Any]:
    """Return what is in a batch, in order."""
    if isinstance(item, torch.Tensor | numpy.ndarray):
        return [item.tolist()]
    if dataclasses.is_dataclass(item):
        return flat(list(vars(item).values()))
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else None
    return [item] if parts is None else [each for part in parts for each in flat(part)]


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_collated_batches_are_divided_part_by_part(samples: int) -> None:
    for kind, whole in enumerate(lists(samples)):
        # One sample is as much one batch as a list
        if samples == 1 and kind in (5, 6, 7):
            continue
        for rank in range(2):
            part = slice(rank, None, 2)
            share = divided(whole, samples, part)
            assert type(share) is type(whole)
            rows = torch.arange(samples * 7).reshape(samples, 7)
            one_by_one = [number for number in range(samples)][part]
            expected = [
                [rows[part].tolist()],
                [rows[part].tolist(), rows[part, 0].tolist()],
                [rows[part].tolist(), rows[part, 0].tolist()],
                [rows[part].tolist(), 2.0, "one batch", 3.0],
                [rows[part].tolist(), "one batch"],
                [each for number in one_by_one for each in (rows[number].tolist(), number)],
                [each for number in one_by_one for each in (rows[number].tolist(), str(number))],
                [rows[number].tolist() for number in one_by_one] + [str(number) for number in one_by_one],
                [rows[part].tolist(), (rows > 1)[part].tolist(), rows[part].tolist()],
                [rows[part].tolist()] * 3,
            ]
            assert flat(share) == expected[kind], kind
    assert divided((torch.zeros(4, 3), torch.zeros(4)), 4, slice(1, None, 2))[0].is_contiguous()


def test_images_in_a_list_are_samples() -> None:
    images = [torch.zeros(3, 4, width) for width in (4, 5, 6)]
    assert divided(images, 3, slice(1, None, 2)) == images[1::2]
    part = divided((images, [{"boxes": torch.zeros(3, 4)}] * 3), 3, slice(0, None, 2))
    assert [len(each) for each in part] == [2, 2]


def test_samples_that_are_taken_for_parts_of_a_batch_are_refused() -> None:
    batch = [(torch.zeros(7), 0)] * 3
    with pytest.raises(
        BatchError, match=r"a list of 3 items that look like samples counts as 7.*batch_size=len"
    ):
        divided(batch, guess_batch_size(batch), slice(0, 1))
    assert divided(batch, 3, slice(0, 2)) == batch[:2]


def test_a_list_of_batches_is_divided() -> None:
    batches = list(torch.arange(22).split(8))
    found = World(3).run(lambda rank: steps(rank.shares(), batches))
    for rank, of_rank in enumerate(found):
        assert of_rank == [taken_apart(batch.tolist(), rank, 3) for batch in batches]


# Own batches -----------------------------------------------------------------------------------------


def test_the_loader_of_each_rank_gives_its_own_with_a_distributed_sampler() -> None:
    """In every mode, with other orders in other epochs; the last batches weigh by their samples."""

    def act(rank: Rank) -> list[Steps]:
        sampler: DistributedSampler[Any] = DistributedSampler(Numbers(21), num_replicas=2, rank=rank.number)
        loader = DataLoader(Numbers(21), 4, sampler=sampler)
        shares = rank.shares("split")
        check_shareable(loader, "split", 2, "train_loader")
        return [steps(shares, loader, epoch) for epoch in range(2)]

    world = World(2)
    found = world.run(act)
    for epoch in range(2):
        samples = [each for of_rank in found for batch, _ in of_rank[epoch] for each in batch]
        assert len(samples) == 22
        assert set(samples) == set(range(21))
        assert {share for of_rank in found for _, share in of_rank[epoch]} == {Share(1.0)}
    assert found[0][0] != found[0][1]
    # The lengths, and the last batches
    assert world.gathers == 4


def test_own_batches_of_other_sizes_weigh_by_their_samples() -> None:
    def act(rank: Rank) -> Steps:
        sizes = (5, 15)
        loader = DataLoader(Numbers((17, 51)[rank.number]), sizes[rank.number])
        return steps(rank.shares("own"), loader)

    world = World(2)
    found = world.run(act)
    for (_, share), (_, other) in list(zip(*found, strict=True))[:-1]:
        assert (share, other) == (Share(0.5), Share(1.5))
    assert [of_rank[-1][1] for of_rank in found] == [Share(2 * 2 / 8), Share(6 * 2 / 8)]
    assert world.gathers == 2


def test_sizes_of_own_lists_of_batches_are_told_once() -> None:
    def act(rank: Rank) -> Steps:
        return steps(
            rank.shares("own"), [torch.arange(2 + 4 * rank.number), torch.arange(4), torch.arange(1)]
        )

    world = World(2)
    found = world.run(act)
    assert [share for _, share in found[0]] == [Share(2 * 2 / 8), Share(1.0), Share(1.0)]
    assert [share for _, share in found[1]] == [Share(6 * 2 / 8), Share(1.0), Share(1.0)]
    assert world.gathers == 1


def test_own_loaders_with_other_lengths_are_refused_as_the_epoch_starts() -> None:
    def act(rank: Rank) -> Steps:
        return steps(rank.shares("own"), DataLoader(Numbers(8 + 8 * rank.number), 4))

    with pytest.raises(ConfigError, match=r"rank 0: 2, rank 1: 4.*DistributedSampler.*\"whole\""):
        World(2).run(act)


def test_own_loaders_without_a_length_end_together() -> None:
    def act(rank: Rank) -> Steps:
        batches = (torch.arange(4 + rank.number) for _ in range(3 + rank.number))
        return steps(rank.shares("own"), batches)

    found = World(2).run(act)
    assert [len(each) for each in found] == [3, 3]
    assert {share for _, share in found[1]} == {Share(5 * 2 / 9)}


@pytest.mark.parametrize("batches", [2, 4])
def test_an_own_loader_that_gives_others_than_it_said_fails(batches: int) -> None:
    class Liar:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter([torch.arange(4)] * batches)

    with pytest.raises(BatchError, match=r"Liar gave (only 2|more) batches than the 3 of its length"):
        World(2).run(lambda rank: steps(rank.shares("own"), Liar()))


def test_seeded_samples_of_own_loaders_have_numbers_of_their_own() -> None:
    """The same ones as with one process, if the order is that of a DistributedSampler."""

    def act(rank: Rank) -> list[tuple[float, ...]]:
        dataset = Noisy(22)
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=rank.world.size, rank=rank.number
        )
        loader = SeededSampling(7).twin_of(DataLoader(dataset, 4, sampler=sampler), 0)
        read = rank.shares("split").training(loader)
        return [tuple(sample) for batch in read for sample in batch.tolist()]

    one, two = World(1).run(act), World(2).run(act)
    assert sorted(one[0]) == sorted(two[0] + two[1])


# Validation --------------------------------------------------------------------------------------------

VALIDATION: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Numbers(), 4),
    "with workers": lambda: DataLoader(Numbers(), 4, num_workers=2),
    "shuffled": lambda: DataLoader(Numbers(), 4, shuffle=True),
    "list": lambda: list(torch.arange(22).split(4)),
    "tuple": lambda: torch.arange(22).split(4),
    "iterable": Counting,
    "iterable data set": lambda: DataLoader(Streamed(), batch_size=None),
    "single samples": lambda: DataLoader(Grouped(), sampler=list(range(6)), batch_size=None),
}


@pytest.mark.parametrize("kind", VALIDATION)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["split", "own"])
def test_whole_batches_of_a_validation_go_round(kind: str, size: int, mode: Mode) -> None:
    def act(rank: Rank) -> list[list[list[int]]]:
        loader, shares = VALIDATION[kind](), rank.shares(mode)
        passes = []
        for _ in range(2):
            read = shares.validation(loader)
            passes.append([batch.tolist() for batch in read])
            if length_of(loader) is not None:
                assert length_of(read) == len(passes[-1])
            torch.rand(1 + rank.number)
            random.random()
        return passes

    world = World(size)
    found = world.run(act)
    for epoch, expected in enumerate(alone(VALIDATION[kind], epochs=2)):
        batches = [of_rank[epoch] for of_rank in found]
        assert [len(each) for each in batches] == [len(range(rank, 6, size)) for rank in range(size)]
        together = [batch for each in batches for batch in each]
        if kind in ("in order", "with workers", "list", "tuple", "single samples"):
            assert batches == [expected[rank::size] for rank in range(size)]
        if kind != "single samples":
            assert sorted(each for batch in together for each in batch) == list(range(22))
    draws = kind in ("shuffled", "iterable", "iterable data set")
    assert (world.gathers > 0) == draws


@pytest.mark.parametrize("batch", [4, 5])
def test_a_validation_drops_what_a_distributed_sampler_repeats(batch: int) -> None:
    def act(rank: Rank) -> list[int]:
        sampler: DistributedSampler[Any] = DistributedSampler(Numbers(21), num_replicas=2, rank=rank.number)
        read = rank.shares().validation(DataLoader(Numbers(21), batch, sampler=sampler))
        return [each for samples in read for each in samples.tolist()]

    world = World(2)
    found = world.run(act)
    assert [len(each) for each in found] == [11, 10]
    assert sorted(found[0] + found[1]) == list(range(21))
    assert world.gathers == 0


# Before the run ------------------------------------------------------------------------------------------


class OwnWay(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "iterable": (Counting, "Counting is no DataLoader or list of batches"),
    "iterable data set": (lambda: DataLoader(Streamed(), 4), "Streamed is an IterableDataset"),
    "no batches": (lambda: DataLoader(Numbers(), batch_size=None), "batch_size=None gives single samples"),
    "own __iter__": (lambda: OwnWay(Numbers(), 4), "OwnWay overrides __iter__"),
    "time steps first": (
        lambda: [(torch.zeros(16, 4), torch.zeros(16)), (torch.zeros(7, 16, 3), torch.zeros(16))],
        r"batch 1 cannot be divided: one of its parts has the shape \(7, 16, 3\), but the batch has 16 samples",
    ),
    "packed": (
        lambda: [torch.nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)])],
        "batch 0 cannot be divided: it has a PackedSequence",
    ),
    "words": (lambda: [{"name": "a"}, {"name": "b"}], "a dict has no tensor"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_divided_is_refused_before_the_run(kind: str) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(ConfigError, match=rf'train_loader.*{reason}.*rank_batches="whole".*"own"'):
        check_shareable(make(), "split", 2, "train_loader")
    for mode in ("whole", "own"):
        check_shareable(make(), mode, 2, "train_loader")


def test_fewer_samples_than_ranks_are_refused() -> None:
    for loader in (DataLoader(Numbers(3), 8), [torch.zeros(2, 1), torch.zeros(1, 1)]):
        for mode in ("split", "whole"):
            with pytest.raises(ConfigError, match="train_loader has 3 samples for 4 ranks"):
                check_shareable(loader, mode, 4, "train_loader")


def test_a_distributed_sampler_for_other_ranks_is_refused() -> None:
    loader = DataLoader(Numbers(), 8, sampler=DistributedSampler(Numbers(), num_replicas=4, rank=0))
    with pytest.raises(ConfigError, match=r"DistributedSampler of train_loader has num_replicas=4.*2 ranks"):
        check_shareable(loader, "split", 2, "train_loader")


def test_small_shares_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_shareable(DataLoader(Numbers(), 16), "split", 2, "train_loader")
    check_shareable(DataLoader(Numbers(), 4), "whole", 2, "train_loader")
    assert not caplog.records
    check_shareable(DataLoader(Numbers(), 12), "split", 4, "train_loader")
    assert [each.getMessage() for each in caplog.records] == [
        "each of the 4 ranks gets 3 samples of a batch of 12 (train_loader): a step may spend more time on "
        "communication than on them. Give a larger batch_size (it is that of all ranks together), or "
        'rank_batches="whole": then each rank takes whole batches, and a step 4 of them'
    ]


@pytest.mark.parametrize("mode", ["split", "whole"])
def test_workers_that_give_batches_as_they_come_are_refused(mode: Mode) -> None:
    with pytest.raises(ConfigError, match=r"train_loader has in_order=False.*rank_batches=\"own\""):
        check_shareable(DataLoader(Numbers(), 4, num_workers=2, in_order=False), mode, 2, "train_loader")
