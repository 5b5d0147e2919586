"""Callbacks, and metrics of the user's, on two ranks: as in one process, and once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_scripts import callbacks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = (
    "steering",
    "plateau",
    "batch_norm",
    "monitors",
    "users_metrics",
    "checkpoints",
    "evaluations",
    "profile",
)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def ran(run_scenarios: Callable[..., Any]) -> Any:
    return run_scenarios("callbacks", NAMES)


@pytest.fixture(autouse=True)
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOOP_TEST_RUNS", str(tmp_path))


def both(ran: Any, name: str) -> tuple[Any, Any, Any]:
    """What the two ranks found, which have one result and one model, and one process; their numbers are close."""
    first, second = ran.of(name)
    alone = getattr(callbacks, name)()
    assert first["outcome"] == second["outcome"]
    assert first["weights"] == second["weights"]
    assert first["buffers"] == second["buffers"] or name == "batch_norm"
    if name != "batch_norm":
        assert first["numbers"] == pytest.approx(alone["numbers"], abs=CLOSE)
        assert first["losses"] == pytest.approx(alone["losses"], abs=CLOSE)
        assert first["lrs"] == alone["lrs"]
        for end, expected in zip(first["outcome"]["history"], alone["outcome"]["history"], strict=True):
            assert end["metrics"] == pytest.approx(expected["metrics"], abs=CLOSE)
    return first, second, alone


def test_average_schedule_and_best_weights_are_those_of_one_process(ran: Any) -> None:
    first, second, alone = both(ran, "steering")
    assert first["outcome"]["status"] == "stopped" == alone["outcome"]["status"]
    assert first["outcome"]["reason"].split("(")[0] == alone["outcome"]["reason"].split("(")[0]
    assert first["average"] == second["average"]
    assert first["average"] == pytest.approx(alone["average"], abs=CLOSE)
    for each in (first, second):
        assert (each["best_step"], each["misses"]) == (alone["best_step"], alone["misses"])


def test_plateau_reduces_the_rate_of_all_ranks(ran: Any) -> None:
    first, second, alone = both(ran, "plateau")
    assert first["lr"] == second["lr"] == alone["lr"] < 0.1


def test_validation_has_the_statistics_of_rank_0(ran: Any) -> None:
    first, second, _ = both(ran, "batch_norm")
    assert first["outcome"]["metrics"]["val_loss"] == pytest.approx(first["alone"]["val_loss"], abs=1e-6)
    assert first["alone"] == second["alone"]


def test_checkpoints_are_evaluated_once_for_all_ranks(ran: Any) -> None:
    first, second = ran.of("evaluations")
    assert first["outcome"] == second["outcome"]
    assert first["outcome"]["metrics"]["eval_weights"] == pytest.approx(first["sum"], abs=1e-4)
    assert [end["metrics"].keys() >= {"eval_weights"} for end in first["outcome"]["history"]] == [True, True]
    score = max(end["metrics"]["eval_weights"] for end in first["outcome"]["history"])
    assert first["outcome"]["best"][0] == pytest.approx(score, abs=1e-6)


def test_what_rank_0_measures_is_true_of_all(ran: Any) -> None:
    first, second, alone = both(ran, "monitors")
    assert len(first["gradients"]) == 7
    for one, other in zip(first["gradients"], alone["gradients"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert first["layers"] == alone["layers"] != []
    assert second["gradients"] == second["layers"] == []


def test_metrics_of_the_users_are_those_of_one_process(ran: Any) -> None:
    first, second, alone = both(ran, "users_metrics")
    metrics = first["outcome"]["metrics"]
    assert metrics["val_long_longest_count"] == 43
    assert metrics["train_longest_count"] == 53
    for each in (first, second):
        for text in each["refused"]:
            assert "its state 'total' has none of the reductions" in text
        assert len(each["refused"]) == 2
    assert alone["refused"] == []


def test_checkpoints_come_at_the_steps_of_one_process_and_logs_are_written_once(ran: Any) -> None:
    first, second, alone = both(ran, "checkpoints")
    assert first["saved"] == second["saved"] == alone["saved"]
    assert {3, 6, 9, 12, 15, 18} <= set(first["saved"])
    assert set(first["files"]) - {"ranks", "log.txt"} == set(alone["files"]) - {"log.txt"}
    assert first["lines"] == alone["lines"]
    for each in (first, second, alone):
        assert "checkpoints is the directory of a run already" in each["refused"]


def test_profile_is_that_of_rank_0(ran: Any) -> None:
    first, _, _ = both(ran, "profile")
    assert {"profile.txt", "trace.json.gz"} <= set(first["files"])
