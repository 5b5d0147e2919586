"""Which samples each rank has, and that the numbers of all ranks are those of one process."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from rank_scripts import data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = (
    "strategy_none",  # first: nothing of the others is loaded yet
    "split",
    "workers",
    "whole",
    "own",
    "own_stream",
    "distributed_sampler",
    "uneven_validation",
    "evaluate_and_predict",
    "callbacks",
    "seeds",
    "refusals",
)
CLOSE = 1e-6
COUNTED = ("accuracy", "f1_score", "roc_auc")


@pytest.fixture(scope="module")
def ran(run_scenarios: Callable[..., Any]) -> Any:
    return run_scenarios("data", NAMES)


def assert_like_one_process(ranks: list[Any], alone: Any, *, weights: float = 1e-5) -> None:
    """Compare a run on several ranks with one in one process."""
    first = ranks[0]
    for each in ranks:
        assert each["outcome"] == first["outcome"], "one result"
        assert each["weights"] == first["weights"], "one model"
    assert first["losses"] == pytest.approx(alone["losses"], abs=CLOSE)
    assert first["numbers"] == pytest.approx(alone["numbers"], abs=weights)
    assert first["samples"] == alone["samples"]
    assert first["lrs"] == alone["lrs"]
    milestones = [name for name in first["events"] if name != "DataBottleneck"]
    assert milestones == [name for name in alone["events"] if name != "DataBottleneck"]
    ours, theirs = first["outcome"], alone["outcome"]
    for name in ("status", "reason", "epochs", "steps"):
        assert ours[name] == theirs[name]
    for end, expected in zip(ours["history"], theirs["history"], strict=True):
        assert (end["epoch"], end["step"], end["samples"]) == (
            expected["epoch"],
            expected["step"],
            expected["samples"],
        )
        assert end["metrics"].keys() == expected["metrics"].keys()
        for name, value in end["metrics"].items():
            if any(name.endswith(each) for each in COUNTED):
                assert value == expected["metrics"][name], name
            else:
                assert math.isclose(value, expected["metrics"][name], abs_tol=CLOSE), name


def epochs_seen(ranks: list[Any], count: int, epochs: int, steps: int, *, key: str = "seen") -> None:
    """Check that each epoch has each sample once, over all ranks."""
    per_epoch = steps // epochs
    for epoch in range(epochs):
        seen = [
            sample
            for rank in ranks
            for batch in rank[key][epoch * per_epoch : (epoch + 1) * per_epoch]
            for sample in batch
        ]
        assert sorted(seen) == list(range(count)), f"epoch {epoch}"


def test_script_of_one_process_gives_the_same_numbers_on_two_ranks(ran: Any) -> None:
    """101 samples in batches of 8, three epochs; 53 of a validation. The order of samples is rank 0's."""
    alone = data.split()
    ranks = ran.of("split")
    assert_like_one_process(ranks, alone)
    epochs_seen(ranks, 101, 3, 39)
    for number, batch in enumerate(alone["seen"]):
        assert sorted(ranks[0]["seen"][number] + ranks[1]["seen"][number]) == sorted(batch), "the same steps"
    assert ranks[0]["random_state"] == alone["random_state"]
    validated = [ranks[rank]["validated"] for rank in (0, 1)]
    assert [len(each) for each in validated] == [4 * 3, 3 * 3]
    assert sorted(itertools.chain(*validated[0][:4], *validated[1][:3])) == list(range(53))


def test_loader_workers_give_the_same_batches(ran: Any) -> None:
    assert_like_one_process(ran.of("workers"), data.workers())
    epochs_seen(ran.of("workers"), 53, 2, 14)


def test_whole_batches_in_turn_are_batches_twice_as_large(ran: Any) -> None:
    ranks = ran.of("whole")
    assert_like_one_process(ranks, data.whole_in_one())
    assert ranks[0]["seen"][0] == list(range(8)) and ranks[1]["seen"][0] == list(range(8, 16))
    assert ranks[0]["outcome"]["steps"] == 14


def test_loaders_of_each_ranks_own(ran: Any) -> None:
    assert_like_one_process(ran.of("own"), data.own())
    epochs_seen(ran.of("own"), 104, 2, 26)


def test_loaders_of_each_ranks_own_without_a_length(ran: Any) -> None:
    ranks = ran.of("own_stream")
    assert_like_one_process(ranks, data.own_stream())
    epochs_seen(ranks, 51, 2, 14)


def test_distributed_sampler_is_told_its_epoch(ran: Any) -> None:
    for rank in ran.of("distributed_sampler"):
        assert list(itertools.chain(*rank["seen"])) == rank["expected"]


def test_validations_that_do_not_divide(ran: Any) -> None:
    ranks = ran.of("uneven_validation")
    assert_like_one_process(ranks, data.uneven_validation())
    assert not any(len(batch) == 5 for batch in ranks[1]["validated"]), "rank 1 had no batch of the short one"


def test_evaluation_of_all_ranks_and_prediction_in_order(ran: Any) -> None:
    alone = data.evaluate_and_predict()
    ranks = ran.of("evaluate_and_predict")
    for each in ranks:
        assert each["metrics"]["val_accuracy"] == alone["metrics"]["val_accuracy"]
        assert each["metrics"] == pytest.approx(alone["metrics"], abs=CLOSE)
    assert (ranks[0]["lengths"], ranks[0]["outputs"]) == (alone["lengths"], alone["outputs"])


def test_observers_run_once_unless_they_ask_for_all_ranks(ran: Any) -> None:
    first, second = ran.of("callbacks")
    assert (first["observed"], second["observed"]) == ([2, 2], [0, 2])
    assert (first["rank"], second["rank"]) == ([0, 2], [1, 2])


def test_seed_gives_each_rank_a_stream_of_its_own(ran: Any) -> None:
    first, second = ran.of("seeds")
    assert first["drawn"] == data.seeds()["drawn"], "rank 0's is that of one process"
    assert set(first["drawn"]).isdisjoint(second["drawn"])


def test_nothing_distributed_is_loaded_where_nothing_is_asked_for(ran: Any) -> None:
    alone = data.strategy_none()
    for each in ran.of("strategy_none"):
        assert (each["loaded"], each["has_group"]) == ([], False)
        assert (each["weights"], each["losses"]) == (alone["weights"], alone["losses"])
        assert each["events"] == alone["events"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other_model", ["model", "rank 1"]),
        ("other_optimizer", ["optimizer", "rank 1"]),
        ("other_callbacks", ["callbacks", "rank 1"]),
        ("other_window", ["accumulate_grad_batches"]),
        ("other_name", ["run_name"]),
        ("few_samples", ["sample"]),
        ("no_indices", ['"whole"', '"own"']),
        ("sync_batchnorm", ["sync_batchnorm"]),
        ("finder", ["one process"]),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(what: str, words: list[str], ran: Any) -> None:
    ranks = ran.of("refusals")
    for each in ranks:
        kind, text = each["refused"][what]
        assert kind == "ConfigError"
        assert [word for word in words if word not in text] == [], text
    assert ranks[0]["weights"] == ranks[1]["weights"], "and the group lives on"
