"""`torchrun --max-restarts` and `resume="auto"`: a run whose ranks are killed goes on by itself, bit for bit.

python -m pytest tests/distributed/test_restarts.py -m soak      30 kills, some minutes
"""

import os
import random
import signal
from pathlib import Path

import pytest
from rank_scripts.worker import WORKER
from torchrun import Torchrun

from offloop.engine import StepEnd, read_events
from offloop.engine.checkpoint import CheckpointReader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_at_a_time")]

EPOCHS = 20
STEPS_PER_EPOCH = 13


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(5, marks=pytest.mark.timeout(600)),
        pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_killed_ranks_cost_nothing_but_time(kills: int, tmp_path: Path) -> None:
    """Rank 0 or 1, one to three checkpoints after the group trains again."""
    source = random.Random(0)
    epochs = EPOCHS * max(1, kills // 5)
    environment = {"OFFLOOP_TEST_RUNS": str(tmp_path / "runs"), "OFFLOOP_TEST_EPOCHS": str(epochs)}
    options = ("--standalone", f"--max-restarts={kills}")
    arguments = (str(tmp_path), "restarts", "killed", "whole")
    with Torchrun(tmp_path, WORKER, *arguments, options=options, environment=environment) as ran:
        saved = 0
        for _ in range(kills):
            pids = {rank: said.pid for rank, said in ran.expect("training", 0, 1).items()}
            if saved:
                _, step, exactness, *reasons = ran.hear_of("resumed", 0).what.split()
                assert int(step) >= saved, "what was said to be durable is there"
                assert (exactness, reasons) == ("bitwise", [])
            for _ in range(source.randint(1, 3)):
                saved = int(ran.hear_of("saved", 0).what.split()[1])
            os.kill(pids[source.randint(0, 1)], signal.SIGKILL)
            ran.forget(*pids.values())
        assert ran.wait(150.0 + 10.0 * kills) == 0
        killed = ran.results("killed", attempt=kills)
        whole = ran.results("whole", attempt=kills)
        assert [each["result"] for each in killed] == [each["result"] for each in whole]
        assert killed[0]["result"]["weights"] == killed[1]["result"]["weights"]
        ran.check_collectives(attempts=kills + 1)
    run = tmp_path / "runs" / "killed"
    reader = CheckpointReader(run)
    assert reader.damaged() == []
    assert not [each for each in os.listdir(run / "checkpoints") if each.startswith(".")], "swept"
    steps = [event.step for event in read_events(run) if isinstance(event, StepEnd)]
    assert steps == list(range(1, STEPS_PER_EPOCH * epochs + 1)), "each step once"
