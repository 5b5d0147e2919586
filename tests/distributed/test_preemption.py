"""SIGTERM to one rank, to all or to torchrun: all stop at the same step, with one checkpoint, and leave together.

python -m pytest tests/distributed/test_preemption.py -m soak      every target in every place
"""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rank_scripts.worker import WORKER
from torchrun import Said, Torchrun

from offloop.engine import RunResult, StepEnd, read_events
from offloop.engine.checkpoint import CheckpointReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_at_a_time")]

TARGETS = ("one", "all", "torchrun", "everything")
PLACES = ("step", "validation", "commit")
BY_DEFAULT = {("one", "step"), ("all", "validation"), ("torchrun", "commit")}
CASES = [
    pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.soak)
    for case in itertools.product(TARGETS, PLACES)
]
PREEMPTED = 75


def start(folder: Path, name: str) -> Torchrun:
    given = {"OFFLOOP_TEST_RUNS": str(folder / "runs")}
    return Torchrun(folder / name, WORKER, str(folder / name), "preemption", name, environment=given)


def send(target: str, ran: Torchrun, held: dict[int, Said]) -> None:
    """Send the signal to its target."""
    ranks, torchrun = [each.pid for each in held.values()], ran.process.pid
    pids = {"one": [held[1].pid], "all": ranks, "torchrun": [torchrun], "everything": [*ranks, torchrun]}
    for pid in pids[target]:
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize(("target", "place"), CASES)
def test_sigterm(target: str, place: str, tmp_path: Path) -> None:
    name = f"in_a_{place}"
    with start(tmp_path, name) as ran:
        held = ran.expect(place, 0, 1)
        at = [*held.values(), *(ran.expect("renaming", 0).values() if place == "commit" else ())]
        send(target, ran, held)
        if target in ("torchrun", "everything"):
            # It sends the signal on; each rank logs that it has it, and rank 0 alone says so
            for rank in (0, 1):
                log = tmp_path / "runs" / "run" / "ranks" / str(rank) / "log.txt"
                while "SIGTERM: stopping" not in log.read_text():
                    time.sleep(0.02)  # bounded by the limit for one test
            assert ["SIGTERM: stopping" in ran.output(rank) for rank in (0, 1)] == [True, False]
            while (ran.folder / "torchrun.log").read_text().count("closing signal SIGTERM") < 2:
                time.sleep(0.02)  # bounded by the limit for one test
        ran.open(*at)
        assert ran.wait() == 1, "torchrun's own code"
        results = ran.results(name)
        assert [(each["error"], each["code"]) for each in results] == [("Preempted", PREEMPTED)] * 2
        assert set(ran.exit_codes().values()) <= {PREEMPTED}
        assert not [text for _, text in ran.outputs() if "leaving in haste" in text]
        ran.check_collectives()

    run = tmp_path / "runs" / "run"
    result = RunResult.load(run)
    assert (result.status, result.reason) == ("stopped", "SIGTERM")
    reader = CheckpointReader(run)
    assert reader.damaged() == []
    there = reader.checkpoints()
    for each in there:
        reader.verify(each)
    assert [each.manifest.reason for each in there].count("preempt") <= 1
    assert there[-1].step == result.steps, "the last step is saved"
    assert not [each for each in os.listdir(run / "checkpoints") if each.startswith(".")]
    (reached,) = {result.steps}

    with start(tmp_path, "continued") as ran:
        assert ran.wait() == 0
        first, second = check_same(ran.results("continued"))
        assert first["outcome"]["status"] == "completed" and first["outcome"]["steps"] == 39
        assert second["weights"] == first["weights"]
        assert first["resumed"] == [f"{reached} bitwise"]
        ran.check_collectives()
    steps = [event.step for event in read_events(run) if isinstance(event, StepEnd)]
    assert steps == list(range(1, 40)), "each step once"


def check_same(results: list[Any]) -> list[Any]:
    """Return the results of all ranks, which agree on the outcome."""
    found = [each["result"] for each in results]
    assert all(each["outcome"] == found[0]["outcome"] for each in found)
    return found
