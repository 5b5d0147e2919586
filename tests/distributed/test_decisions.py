"""Whatever decides, on whichever rank: all ranks are at the same step with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
from rank_scripts import decisions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = (
    "early_stopping",
    "stop_by_observer",
    "stop_by_step_of_rank_1",
    "stop_everywhere",
    "set_lr",
    "pause_and_resume",
    "stop_in_a_pause",
    "slow_decider",
    "max_time",
    "max_steps",
    "cancel",
    "schedules",
    "commands",
    "nonfinite",
    "full_subscriber",
    "hook_of_one_rank",
    "cancelled_start",
)


@pytest.fixture(scope="module")
def ran(run_scenarios: Callable[..., Any]) -> Any:
    return run_scenarios("decisions", NAMES)


def together(ranks: list[Any]) -> Any:
    """Check that the ranks ended at the same step with the same weights; return what rank 0 found."""
    first = ranks[0]
    for each in ranks:
        assert each["outcome"] == first["outcome"]
        assert each["weights"] == first["weights"]
        assert len(each["seen"]) == len(first["seen"]), "the same number of batches"
    return first


def test_early_stopping(ran: Any) -> None:
    found = together(ran.of("early_stopping"))
    alone = decisions.early_stopping()
    for name in ("status", "reason", "epochs", "steps"):
        assert found["outcome"][name] == alone["outcome"][name]


def test_stop_by_an_observer(ran: Any) -> None:
    found = together(ran.of("stop_by_observer"))
    assert (found["outcome"]["status"], found["outcome"]["reason"]) == ("stopped", "enough")
    ((command, step, by, error),) = found["applied"]
    assert (command, by, error) == ("stop", "Stop", None)
    assert step == found["outcome"]["steps"] == len(found["losses"]) >= 20


def test_stop_by_a_step_of_another_rank(ran: Any) -> None:
    found = together(ran.of("stop_by_step_of_rank_1"))
    assert (found["outcome"]["status"], found["outcome"]["reason"]) == ("stopped", "rank 1 has enough")
    assert found["outcome"]["steps"] >= 12


def test_equal_stops_of_all_ranks_are_one(ran: Any) -> None:
    found = together(ran.of("stop_everywhere"))
    assert (found["outcome"]["status"], found["outcome"]["reason"]) == ("stopped", "enough")
    assert len(found["applied"]) == 1


def test_learning_rates(ran: Any) -> None:
    found = together(ran.of("set_lr"))
    assert found["lrs"][:20] == [0.01] * 20 and found["lrs"][20] == 0.5, "a decider's from its boundary on"
    (_, (_, step, _, _)) = found["applied"]
    assert found["lrs"][step - 1] == 0.5 and found["lrs"][step] == found["lrs"][-1] == 0.001


def test_pause_and_resume(ran: Any) -> None:
    found = together(ran.of("pause_and_resume"))
    assert found["outcome"]["status"] == "completed"
    assert found["states"] == ["paused", "running"]
    assert [each[0] for each in found["applied"]] == ["pause", "resume"]


def test_stop_ends_a_pause(ran: Any) -> None:
    found = together(ran.of("stop_in_a_pause"))
    assert (found["outcome"]["status"], found["outcome"]["reason"]) == ("stopped", "out of a pause")


def test_decider_may_take_longer_than_a_rank_may_be_silent(ran: Any) -> None:
    found = together(ran.of("slow_decider"))
    assert found["outcome"]["status"] == "completed"
    assert found["lrs"] == [0.01] * 4 + [0.25] * 4


def test_time_limit(ran: Any) -> None:
    found = together(ran.of("max_time"))
    assert (found["outcome"]["status"], found["outcome"]["reason"]) == ("completed", "max_time=0.4")


def test_step_limit(ran: Any) -> None:
    found = together(ran.of("max_steps"))
    alone = decisions.max_steps()
    assert found["outcome"]["steps"] == 17
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-6)
    assert found["events"] == alone["events"]


def test_call_validate_and_checkpoint(ran: Any) -> None:
    found = together(ran.of("commands"))
    assert found["said"][0] == 0, "a function runs on rank 0"
    assert "val_loss" in found["said"][1]
    assert found["said"][2] == "manual"
    assert [each[0] for each in found["applied"]] == ["call", "validate", "checkpoint", "stop"]
    assert [each[3] for each in found["applied"]] == [None] * 4


def test_cancellation(ran: Any) -> None:
    found = together(ran.of("cancel"))
    assert (found["outcome"]["status"], found["outcome"]["reason"]) == ("cancelled", "no longer wanted")


@pytest.mark.parametrize("which", ["by_step", "plateau", "callback"])
def test_schedules(which: str, ran: Any) -> None:
    found = together([each[which] for each in ran.of("schedules")])
    alone = decisions.schedules()[which]
    assert found["lrs"] == alone["lrs"]
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-6)


def test_loss_of_one_rank_that_is_not_finite(ran: Any) -> None:
    first, second = ran.of("nonfinite")
    assert first["weights"] == second["weights"], "all skip the step"
    assert first["outcome"] == second["outcome"]
    for each in (first, second):
        kind, text = each["raised"]
        assert kind == "LossError" and "step 7" in text


def test_a_full_subscriber_of_rank_0_holds_all_ranks_and_lets_them_go(ran: Any) -> None:
    first, second = ran.of("full_subscriber")
    assert first["status"] == second["status"] == "completed"
    assert first["taken"] == list(range(1, 27))


def test_a_step_hook_that_fails_on_one_rank_alone_is_an_error_on_all(ran: Any) -> None:
    for each in ran.of("hook_of_one_rank"):
        assert "Fails.after_step on rank 1 (ValueError: only here)" in each["raised"]


def test_a_start_that_is_cancelled_on_one_rank_is_none_and_the_next_one_works(ran: Any) -> None:
    first, second = ran.of("cancelled_start")
    assert "rank 1 has started no run: ConfigError: the task that started the run was" in first["raised"][0]
    assert second["raised"] == ["cancelled"]
    assert first["status"] == second["status"] == "completed"
