"""A split without a seed is rank 0's on all ranks, in training and in what they do together."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # it is there
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from offloop.engine.distributed import plan as plan_module
from offloop.engine.distributed.plan import Plan
from offloop.engine.distributed.splits import chosen_samples, follow_splits

Numbers = TensorDataset(torch.arange(100))


def split(seed: int, data: Any = Numbers) -> Subset[Any]:
    """The smaller part of a split that this rank has drawn."""
    _, part = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(seed))
    return part


def follow(*of_ranks: Dataset[Any]) -> list[dict[str, str]]:
    """Let the ranks share their data sets; return what is compared of each."""
    store, marks = HashStore(), []
    for rank, each in enumerate(of_ranks):
        loaders = {"train_loader": DataLoader(each, 4)}
        follow_splits(Plan(store, rank, len(of_ranks)), rank == 0, loaders)
        marks.append(chosen_samples(loaders["train_loader"], "train_loader"))
    return marks


@pytest.mark.parametrize("length", [100, 3])
def test_all_ranks_have_the_split_of_rank_0(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    # Large ones are sent in pieces
    monkeypatch.setattr(plan_module, "PIECE", length)
    first, *others = (split(seed) for seed in (1, 2, 3))
    drawn = list(first.indices)
    assert all(list(each.indices) != drawn for each in others)
    marks = follow(first, *others)
    assert [list(each.indices) for each in (first, *others)] == [drawn] * 3
    assert marks[0] and marks == marks[:1] * 3


def test_splits_of_splits_and_of_joined_data_follow() -> None:
    first, other = (split(seed, split(seed + 1, ConcatDataset([Numbers, Numbers]))) for seed in (1, 3))
    follow(first, other)
    assert list(other.indices) == list(first.indices)
    assert isinstance(first.dataset, Subset) and isinstance(other.dataset, Subset)
    assert list(other.dataset.indices) == list(first.dataset.indices)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (range(0, 100, 2), range(1, 100, 2)),
        (range(50), range(40)),
        (["a", "b"], ["b", "c"]),
    ],
    ids=["divided by hand", "other lengths", "names"],
)
def test_parts_that_are_of_no_common_split_stay(first: Sequence[Any], other: Sequence[Any]) -> None:
    mine = Subset(Numbers, other)
    marks = follow(Subset(Numbers, first), mine)
    assert mine.indices is other
    if "a" not in first:
        # The run is refused, with what to do
        assert marks[0] != marks[1]
        assert list(marks[0]) == [
            'samples chosen by Subset of train_loader (seed the choice; rank_batches="own" is for data that is '
            "divided already)"
        ]


def test_a_rank_whose_data_set_is_smaller_keeps_its_split() -> None:
    mine = Subset(TensorDataset(torch.arange(10)), [1, 2])
    follow(Subset(Numbers, [1, 90]), mine)
    assert mine.indices == [1, 2]
