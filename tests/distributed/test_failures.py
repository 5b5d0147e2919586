"""A rank that fails: its own words on all ranks, and nobody waits for it for long."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_scripts.worker import WORKER
from torchrun import Torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_at_a_time")]

Start = Callable[..., Torchrun]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a scenario of `rank_scripts.failures` on two ranks."""
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Torchrun:
            given = {"OFFLOOP_TEST_RUNS": str(tmp_path / "runs")}
            started = Torchrun(tmp_path, WORKER, str(tmp_path), "failures", name, environment=given)
            return stack.enter_context(started)

        yield start


def failed(ran: Torchrun, name: str) -> Any:
    """Return what the ranks report of their ends, after checks that hold for each failure."""
    ran.check_collectives(all_ended=False)
    runs = list((ran.folder / "runs").iterdir())
    assert len(runs) == 1, "one run, made by rank 0"
    checkpoints = runs[0] / "checkpoints"
    assert not checkpoints.exists() or not os.listdir(checkpoints), "survivors save nothing"
    return ran.results(name)


def test_exception_of_a_rank_is_told_by_all(start: Start) -> None:
    ran = start("raising")
    assert ran.wait() == 1
    first, second = failed(ran, "raising")
    assert (second["error"], second["text"]) == ("ValueError", "the sample is odd")
    assert (first["error"], first["rank"]) == ("RankFailedError", 1)
    assert "ValueError: the sample is odd" in first["text"]
    assert "training_step" in first["text"], "with the traceback"
    assert "Connection" not in first["text"]


def test_rank_that_hangs_is_named_with_its_stack(start: Start) -> None:
    ran = start("hanging")
    assert ran.wait() == 1
    first, _ = failed(ran, "hanging")
    assert (first["error"], first["rank"]) == ("RankFailedError", 1)
    assert "fail" in first["text"] and "threading" in first["text"], "the stack of its training thread"
    assert "rank 1" in ran.output(1), "and it says so itself, before it leaves"


def test_rank_that_the_kernel_kills(start: Start) -> None:
    ran = start("killed")
    assert ran.wait() == 1
    first, second = failed(ran, "killed")
    assert second is None
    assert (first["error"], first["rank"]) == ("RankFailedError", 1)


def test_rank_that_is_silent(start: Start) -> None:
    """No call gets a thread out of a collective: the other ends itself, after its last words."""
    ran = start("stopped")
    pid = ran.expect("stopping", 1)[1].pid
    ran.wait_for_output(0, "ends itself: RankFailedError: rank 1")
    # torchrun would wait for it for 30 seconds more
    os.kill(pid, signal.SIGKILL)
    assert ran.wait() == 1
    failed(ran, "stopped")


def test_decider_of_rank_0_and_hook_of_rank_1_that_raise(start: Start) -> None:
    ran = start("raising_decider")
    assert ran.wait() == 1
    first, second = failed(ran, "raising_decider")
    assert (first["error"], first["text"]) == ("LookupError", "no such service")
    assert (second["error"], second["rank"]) == ("RankFailedError", 0)
    assert "no such service" in second["text"]
