"""`offloop replay`: on a pseudo-terminal, and where there is none."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from screen import PATIENCE, Program

from offloop import ConfigError, EarlyStopping, connect
from offloop.engine import EpochEnd, Event, StepEnd, TrainEnd, encode, read_events
from offloop.engine.testing import tiny_loader, tiny_trainer

REPLAY: Final = [sys.executable, "-m", "offloop", "replay"]

MINE: Final = """
from offloop import Callback, EarlyStopping, EpochEnd, Event, Run, ValidationEnd, decides

class Spread(Event, frozen=True):
    value: float

class Mine(Callback):
    needs_run_dir = True

    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        (run.dir / "mine.txt").write_text(f"{event.step}")
        print("epoch ended at", event.step)

    def on_spread(self, event: Spread, run: Run) -> None:
        print("spread", event.value)

class Breaks(Callback):
    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        raise KeyError("val_acc")

class Needs(Callback):
    def __init__(self, what: str) -> None:
        pass

stopper = EarlyStopping("val_loss", patience=2, min_delta=0.02)
number = 3
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run and a file of callbacks."""
    here = tmp_path_factory.mktemp("made")
    tiny_trainer(run_dir=here / "runs", run_name="first", lr=0.5).train(
        tiny_loader(10),
        tiny_loader(4),
        epochs=100,
        callbacks=[EarlyStopping("val_loss", patience=2, min_delta=0.02)],
    )
    tiny_trainer(run_dir=here / "runs", run_name="second").train(tiny_loader(2), epochs=1)
    (here / "mine.py").write_text(MINE)
    return here


@pytest.fixture
def here(made: Path, here: Path) -> Path:
    shutil.copy(made / "mine.py", here)
    return here


def plain(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*REPLAY, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=here,
        timeout=PATIENCE,
    )


def reason_of(run: Path) -> str:
    *_, end = read_events(run)
    assert isinstance(end, TrainEnd)
    return end.reason


# Without a terminal --------------------------------------------------------------------------------


def test_events_are_printed_one_in_a_line(here: Path) -> None:
    done = plain(here, "runs/first")
    events = list(read_events("runs/first"))
    lines = done.stdout.splitlines()
    assert [line.split("  ")[2].strip() for line in lines] == [type(event).__name__ for event in events]
    (first, *_) = (line for line in lines if "StepEnd" in line)
    assert "step 1  StepEnd  loss=" in first and "lr=0.5" in first
    assert done.stderr == f"first: {len(events)} events up to step {events[-1].step}\n"
    assert done.returncode == 0


def test_nothing_of_it_needs_torch() -> None:
    script = (
        "import sys; import offloop.cli.replay; from offloop import Replay; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=PATIENCE).returncode == 0


def test_callbacks_come_from_files_and_modules(here: Path) -> None:
    done = plain(
        here, "runs/first", "-c", "mine.py:stopper", "--callback", "mine:Mine", "-c", "offloop:MetricLogger",
        "--directory", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ends = [event for event in read_events("runs/first") if isinstance(event, EpochEnd)]
    assert [line for line in lines if line.startswith("epoch")] == [
        f"epoch ended at {event.step}" for event in ends
    ]
    (asked,) = (line for line in lines if line.startswith("->"))
    assert asked == (
        f"-> EarlyStopping: stop(reason={reason_of(Path('runs/first'))!r}) at ValidationEnd, step {ends[-1].step}"
    )
    assert Path("out/mine.txt").read_text() == f"{ends[-1].step}"
    assert Path("out/metrics.csv").is_file()
    assert f"what callbacks wrote: {Path('out').absolute()}" in done.stderr
    assert not Path("runs/first/mine.txt").exists()


def test_events_of_the_runs_own_classes_need_their_module(here: Path) -> None:
    log = Path("runs/first/events.jsonl")
    start = next(read_events(log))
    log.write_bytes(
        encode(start)
        + b'\n{"type":"__main__.Spread","seq":1,"time":5.0,"epoch":0,"step":0,"batch":0,"value":1.5}\n'
    )
    done = plain(here, "runs/first")
    assert "step 0  __main__.Spread" in done.stdout
    assert (
        "1 events are of classes that are not defined here: __main__.Spread (1). Only on_event got them, as "
        "UnknownEvent; give their modules with --import"
    ) in done.stderr
    done = plain(here, "runs/first", "--import", "mine.py")
    assert "step 0  Spread  value=1.5" in done.stdout
    assert "not defined" not in done.stderr
    assert "spread 1.5" in plain(here, "runs/first", "-c", "mine.py:Mine").stdout


def test_a_decider_that_fails_ends_the_command_with_its_traceback(here: Path) -> None:
    done = plain(here, "runs/first", "-c", "mine.py:Breaks")
    assert done.returncode == 1
    assert 'raise KeyError("val_acc")' in done.stderr
    assert "offloop: replay of run first, ValidationEnd of step 10" in done.stderr
    assert "ExceptionGroup" not in done.stderr


def test_a_pipe_that_nobody_reads_ends_it(here: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb") as pipe:
        done = subprocess.run(
            [*REPLAY, "runs/first"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["runs/frist"], "there is no run runs/frist; did you mean runs/first?"),
        (["runs"], "runs is not the directory of a run: it has neither run.json nor events.jsonl; it is a direct"),
        (["runs/first", "--speed", "0"], "--speed must be a number above 0, or max; got '0': to hold it"),
        (["runs/first", "--speed", "-2"], "--speed must be a number above 0, or max; got '-2'"),
        (["runs/first", "--speed", "nan"], "--speed must be a number above 0, or max; got 'nan'"),
        (["runs/first", "--speed", "fast"], "--speed must be a number above 0, or max; got 'fast'"),
        (["runs/first", "--paused"], "--paused needs a terminal with keys, or --page"),
        (["runs/first", "-c", "Mine"], "--callback must be file.py:Name or package.module:Name, got 'Mine'"),
        (["runs/first", "-c", "mine.py:Other"], "there is no Other in mine.py; callbacks there: "),
        (["runs/first", "-c", "mine.py:number"], "it is no callback, but a int"),
        (["runs/first", "-c", "mine.py:Needs"], "missing 1 required positional argument: 'what'; make an instance"),
        (["runs/first", "-c", "gone.py:Mine"], "there is no file gone.py"),
        (["runs/first", "-c", "gone.module:Mine"], "ModuleNotFoundError: No module named 'gone'"),
        (["runs/first", "--import", "broken.py"], "--import broken.py: ZeroDivisionError: division by zero ("),
        (["runs/first", "-c", "script.py:Mine"], 'trains in it belongs behind if __name__ == "__main__":'),
        (["runs/first", "-c", "offloop:GradientMonitor"], "has only step hooks"),
        (["runs/first", "-c", "mine.py:Mine", "--directory", "runs/first"], "must not be that of the recorded run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(here: Path, arguments: list[str], text: str) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("script.py").write_text(
        "from offloop.engine.testing import tiny_loader, tiny_trainer\n"
        "trainer = tiny_trainer(run_dir='runs', run_name='first')\n"
        "trainer.train(tiny_loader(2), epochs=1)\n"
    )
    done = plain(here, *arguments)
    assert done.returncode == 2, done.stdout
    assert text in done.stderr and done.stderr.count("\n") == 1


def test_the_page_shows_the_replay_until_somebody_ends_it(here: Path) -> None:
    events = list(read_events("runs/first"))
    command = [*REPLAY, "runs/first", "--page", "--port", "0", "--speed", "max", "--paused"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = process.stderr.readline().removeprefix("Live page: ").strip()

        async def watch() -> tuple[list[Event], list[float], str]:
            with anyio.fail_after(PATIENCE):
                async with connect(url) as watch:
                    assert (watch.id, watch.state) == ("first", "paused")
                    with pytest.raises(ConfigError, match="this is a replay, which trains nothing"):
                        await watch.set_lr(0.1)
                    await watch.resume()
                    seen = [event async for event in watch.events(EpochEnd, TrainEnd)]
                    curve = await watch.history("loss")
                    return seen, list(curve.value), watch.state

        seen, losses, state = anyio.run(watch)
        assert seen == [event for event in events if isinstance(event, EpochEnd | TrainEnd)]
        assert losses == [event.loss for event in events if isinstance(event, StepEnd)]
        assert state == "stopped"
        # It stays
        assert process.poll() is None
        process.terminate()
        out, error = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in error
    finally:
        process.kill()
        process.communicate()


# On a terminal -------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Any]:
    programs: list[Program] = []

    def start(*arguments: str, **options: Any) -> Program:
        programs.append(Program([*REPLAY, *arguments], **options))
        return programs[-1]

    yield start
    for each in programs:
        each.close()


def test_keys_advance_resume_and_set_the_speed(here: Path, start: Any) -> None:
    events = list(read_events("runs/first"))
    program = start("runs/first", "--paused", columns=100)
    program.wait("first  paused  1x", "space pause  n next event")
    program.press("n")
    program.wait("step 0  TrainStart", "first  paused  1x")
    program.press("s")
    (step, *_) = (event for event in events if isinstance(event, StepEnd))
    program.wait("step 1  StepEnd", f"loss {step.loss:.4g}", "first  paused  1x", without="step 2  StepEnd")
    program.press("+")
    program.wait("first  paused  2x")
    program.press("--")
    program.wait("first  paused  0.5x")
    program.press("++++++++++")
    program.wait("first  paused  max")
    program.press(" ")
    assert program.end() == 0
    assert program.is_as_it_was
    assert f"first: {len(events)} events up to step {events[-1].step}" in program.text


@pytest.mark.parametrize("how", ["q", "Ctrl-C", "SIGTERM", "crash"])
def test_the_terminal_is_left_as_it_was(here: Path, start: Any, how: str) -> None:
    crash = ["--speed", "max", "-c", "mine.py:Breaks"] if how == "crash" else []
    program = start("runs/first", "--paused", *crash)
    program.wait("first  paused")
    program.press("n")
    program.wait("TrainStart")
    if how == "q":
        program.press("q")
    elif how == "Ctrl-C":
        program.press("\x03")
    elif how == "SIGTERM":
        program.process.terminate()
    else:
        program.press(" ")
    assert program.end() == (1 if how == "crash" else 0)
    assert program.is_as_it_was
    if how == "crash":
        assert b'raise KeyError("val_acc")' in program.written
