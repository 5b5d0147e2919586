"""The examples of several processes, and the demo, as their users start them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

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


def test_one_host(folder: Path) -> None:
    with started(folder, "./one_host.sh", "2") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    said = re.findall(r"completed: .*", output)
    assert len(said) == 1, output
    assert said[0].startswith(f"completed: {STEPS} steps, 2 ranks, loss 0.")
    assert "Warning" not in output
    starts = [each for each in read_events(folder / "runs" / "several") if isinstance(each, TrainStart)]
    assert [each.world_size for each in starts] == [2]
    assert steps_of(folder) == list(range(1, STEPS + 1))
