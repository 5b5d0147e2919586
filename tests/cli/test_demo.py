"""`offloop demo`, run as the command that it is."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from warm_python import WarmPython

from offloop.engine import StepEnd, TrainEnd, TrainStart, ValidationEnd, read_events

COMMAND = [sys.executable, "-m", "offloop.cli.main"]
STEPS = 10
Offloop = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """The environment of this process, without what would colour the output.

    One thread for torch: beside other work, several that wait for each other are much slower.
    """
    kept = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return {**kept, "TERM": "dumb", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command itself to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(), capture_output=True, text=True, timeout=110
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command as a script, for an interpreter that has imported torch already."""
    script = tmp_path_factory.mktemp("command") / "offloop"
    script.write_text("from offloop.cli.main import app\napp()\n")
    return script


@pytest.fixture(scope="module")
def offloop(script: Path, warm_python: WarmPython) -> Offloop:
    """Run the script to its end."""

    def offloop(*arguments: str) -> subprocess.CompletedProcess[str]:
        return warm_python.run(script, *arguments, environment=environment())

    return offloop


def only_run_in(run_dir: Path) -> Path:
    (run,) = run_dir.iterdir()
    return run


def val_losses(run: Path) -> list[float]:
    events = read_events(run / "events.jsonl")
    return [event.metrics["val_loss"] for event in events if isinstance(event, ValidationEnd)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs"


@pytest.fixture(scope="module")
def finished(run_dir: Path, offloop: Offloop) -> subprocess.CompletedProcess[str]:
    """The demo after a few steps; several tests look at what it printed and wrote."""
    return offloop("demo", "--steps", str(STEPS), "--device", "cpu", "--run-dir", str(run_dir))


@pytest.mark.slow
def test_demo_tells_what_came_of_the_run(finished: subprocess.CompletedProcess[str], run_dir: Path) -> None:
    assert finished.returncode == 0, finished.stderr
    run = only_run_in(run_dir)
    assert f"Run {run.name}: completed" in finished.stdout
    assert f"{STEPS} in " in finished.stdout
    assert f"files in {run}" in finished.stdout
    for heading in ("Training a GPT", "What the model writes now", "val_loss", "Cost of every callback"):
        assert heading in finished.stdout
    for callback in ("MetricLogger", "ProgressBar", "ValidationLosses"):
        assert callback in finished.stdout
    assert "Live page: http://127.0.0.1:" in finished.stderr
    assert "Warning" not in finished.stderr  # such as the one that NumPy is missing


@pytest.mark.slow
def test_demo_leaves_the_files_of_its_run(finished: subprocess.CompletedProcess[str], run_dir: Path) -> None:
    run = only_run_in(run_dir)
    assert sorted(path.name for path in run.iterdir()) == [
        "events.jsonl",
        "metrics.csv",
        "metrics.jsonl",
        "run.json",
    ]
    for path in run.iterdir():
        assert path.name in finished.stdout
    events = list(read_events(run / "events.jsonl"))
    assert isinstance(events[0], TrainStart)
    assert isinstance(events[-1], TrainEnd)
    assert events[-1].status == "completed"
    assert [event.step for event in events if isinstance(event, StepEnd)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_loss_falls_from_the_first_steps_on(
    finished: subprocess.CompletedProcess[str], run_dir: Path
) -> None:
    (val_loss,) = val_losses(only_run_in(run_dir))
    assert val_loss < 3.5  # 4.56 before training


@pytest.mark.slow
@pytest.mark.usefixtures("finished")
def test_quiet_prints_one_line_and_trains_the_same(run_dir: Path, tmp_path: Path, offloop: Offloop) -> None:
    done = offloop("demo", "--quiet", "--steps", str(STEPS), "--device", "cpu", "--run-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"completed: {STEPS} steps in ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert val_losses(only_run_in(tmp_path)) == val_losses(only_run_in(run_dir))


@pytest.mark.slow
def test_interrupted_demo_ends_in_order_and_says_where_its_files_are(
    tmp_path: Path, script: Path, warm_python: WarmPython
) -> None:
    arguments = "demo", "--no-dashboard", "--steps", "100000", "--device", "cpu", "--run-dir", str(tmp_path)
    with warm_python.start(script, *arguments, environment=environment()) as process:
        while not any(tmp_path.glob("*/metrics.csv")):  # bounded by the suite's limit for one test
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)  # another process: there is nothing to wait on but its files
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Live page" not in stderr
    run = only_run_in(tmp_path)
    assert f"files are in {run}" in stdout
    *_, end = read_events(run / "events.jsonl")
    assert isinstance(end, TrainEnd)
    assert end.status == "stopped"


@pytest.mark.slow
def test_on_a_terminal_the_page_stays_open_until_it_is_interrupted(tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    command = [*COMMAND, "demo", "--steps", "3", "--device", "cpu", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while b"press Ctrl-C" not in seen:
            seen += os.read(master, 65536)
        address = re.search(rb"Live page: (http://127.0.0.1:\d+/)\?token=", seen)
        assert address is not None, seen
        with urllib.request.urlopen(address[1].decode()) as response:
            assert b"offloop" in response.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be from 0 to 2**64 - 1, got -1"),
        (["--run-dir", __file__], "--run-dir must be a writable directory"),
    ],
)
def test_bad_option_gives_one_clear_line(arguments: Sequence[str], message: str) -> None:
    done = command("demo", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"offloop: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_unknown_device_gives_one_clear_line(tmp_path: Path, offloop: Offloop) -> None:
    done = offloop("demo", "--quiet", "--device", "abacus", "--run-dir", str(tmp_path))
    assert done.returncode == 2
    assert "'abacus'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_and_does_not_wait_for_torch() -> None:
    done = command("demo", "--help")
    assert done.returncode == 0
    for option in ("--steps", "--seed", "--device", "--run-dir", "--quiet", "--no-dashboard"):
        assert option in done.stdout
    code = "import sys, offloop.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0
