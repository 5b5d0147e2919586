"""The examples of several processes, and the demo, as their users start them.

python -m pytest tests/distributed/test_examples.py -m soak      the examples for two machines, on this one
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from torchrun import Torchrun

from offloop.engine import StepEnd, TrainStart, read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_at_a_time")]

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
STEPS = 3 * 64
"""Of the example: three epochs of 4096 samples, 64 a step."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


def environment() -> Mapping[str, str]:
    """Variables under which a shell finds this interpreter's torchrun."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def started(folder: Path, *command: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a script, and kill what is left of it."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def steps_of(folder: Path) -> list[int]:
    return [event.step for event in read_events(folder / "runs" / "several") if isinstance(event, StepEnd)]


def world_sizes(folder: Path) -> list[int]:
    """Return the number of ranks of each attempt."""
    events = read_events(folder / "runs" / "several")
    return [event.world_size for event in events if isinstance(event, TrainStart)]


def test_one_host(folder: Path) -> None:
    with started(folder, "./one_host.sh", "2") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    said = re.findall(r"completed: .*", output)
    assert len(said) == 1, output
    assert said[0].startswith(f"completed: {STEPS} steps, 2 ranks, loss 0.")
    assert "Warning" not in output
    assert world_sizes(folder) == [2]
    assert steps_of(folder) == list(range(1, STEPS + 1))


@pytest.mark.soak
def test_two_hosts(folder: Path) -> None:
    with (
        started(folder, "./two_hosts.sh", "localhost", "1") as near,
        started(folder, "./two_hosts.sh", "localhost", "1") as far,
    ):
        outputs = [each.communicate(timeout=120)[0] for each in (near, far)]
    assert [near.returncode, far.returncode] == [0, 0], outputs
    assert "".join(outputs).count("completed: ") == 1
    assert world_sizes(folder) == [2]
    assert steps_of(folder) == list(range(1, STEPS + 1))


@pytest.mark.soak
def test_elastic_run_tells_that_it_was_preempted_and_goes_on(folder: Path) -> None:
    script = folder / "train.py"
    script.write_text(script.read_text().replace("epochs=3", "epochs=30"))
    command = "./elastic.sh", "localhost", "1"
    with started(folder, *command) as near, started(folder, *command) as far:
        while not (folder / "runs" / "several" / "refs" / "last").exists():
            assert near.poll() is None, near.communicate()
            time.sleep(0.05)  # another process: there is nothing to wait on but its files
        # One alone would leave the other machine to go on by itself
        near.terminate()
        far.terminate()
        outputs = [each.communicate(timeout=120)[0] for each in (near, far)]
    assert [near.returncode, far.returncode] == [75, 75], outputs
    with started(folder, *command) as near, started(folder, *command) as far:
        outputs = [each.communicate(timeout=120)[0] for each in (near, far)]
    assert [near.returncode, far.returncode] == [0, 0], outputs
    assert world_sizes(folder) == [2, 2]
    assert steps_of(folder) == list(range(1, 10 * STEPS + 1)), "each step once"


def test_demo_speaks_once(tmp_path: Path) -> None:
    arguments = "--steps", "5", "--device", "cpu", "--run-dir", str(tmp_path / "runs")
    with Torchrun(tmp_path, Path("offloop"), "demo", *arguments, options=["--standalone", "-m"]) as ran:
        assert ran.wait() == 0
        texts = dict(ran.outputs())
    printed = {name: text for name, text in texts.items() if text.strip()}
    assert set(printed) == {"attempt_0, rank 0, stderr", "attempt_0, rank 0, stdout"}
    assert printed["attempt_0, rank 0, stderr"].count("Live page: ") == 1
    assert "2 ranks" in printed["attempt_0, rank 0, stderr"].splitlines()[-1]
    assert "Ranks: 2." in printed["attempt_0, rank 0, stdout"]
    assert "completed (max_steps=5)" in printed["attempt_0, rank 0, stdout"]
    (run,) = (tmp_path / "runs").iterdir()
    assert [event.step for event in read_events(run) if isinstance(event, StepEnd)] == [1, 2, 3, 4, 5]
