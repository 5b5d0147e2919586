"""`offloop watch`: on a pseudo-terminal, at a real run; and where there is no terminal."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from screen import PATIENCE, Program

from offloop.cli.braille import braille_chart
from offloop.cli.watch_screen import Seen, line_of, screen
from offloop.dashboard import Dashboard
from offloop.dashboard.client.curves import MetricCurve
from offloop.dashboard.protocol.from_server import Status
from offloop.engine.testing import EndlessLoader, tiny_loader, tiny_trainer

WATCH: Final = [sys.executable, "-m", "offloop", "watch"]


class Training:
    """A run that goes on until it is stopped."""

    def __init__(self, run_dir: Path, name: str = "long") -> None:
        self.dashboard = Dashboard(port=0, quiet=True)
        self.trainer = tiny_trainer(run_dir=str(run_dir), run_name=name, limit_train_batches=50)
        self.has_begun = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        self.trainer.train(EndlessLoader(), tiny_loader(2), epochs=1_000_000, callbacks=[self.dashboard])

    def __enter__(self) -> "Training":
        self.dashboard.__enter__()
        self._thread.start()
        return self

    @property
    def run(self) -> Any:
        return self.trainer.last_run

    def __exit__(self, *error: object) -> None:
        if not self.run.is_over:
            self.run.stop_nowait("the test is over")
        self._thread.join(PATIENCE)
        self.dashboard.__exit__(None, None, None)


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Training(tmp_path / "runs") as training:
        yield training


@pytest.fixture
def start() -> Iterator[Any]:
    """Start the command on a terminal."""
    programs: list[Program] = []

    def start(*arguments: str, **options: Any) -> Program:
        programs.append(Program([*WATCH, *arguments], **options))
        return programs[-1]

    yield start
    for each in programs:
        each.close()


def test_a_run_is_shown_paused_resumed_and_stopped(training: Training, start: Any) -> None:
    program = start(training.dashboard.url)
    program.wait("long  running", "steps/s", "loss", "val_loss")
    shown = program.wait_until(lambda shown: any("\u2800" < each <= "\u28ff" for each in shown), "a curve")
    assert "q quit" in shown.splitlines()[-1]
    program.press("p")
    program.wait("long  paused", "pause: done at step")
    program.press("p")
    program.wait("long  running", "resume: done")
    program.press("s")
    program.wait("Stop this run?")
    program.press("n")
    program.wait("long  running", without="Stop this run?")
    program.press("s")
    program.wait("Stop this run?")
    program.press("y")
    program.wait("long  stopped")
    program.press("q")
    assert program.end() == 0
    assert program.is_as_it_was
    # What stays in the terminal
    assert b"long  stopped  step" in program.written.rsplit(b"\x1b[?1049l", 1)[1]


def test_metrics_are_turned_over_and_the_size_may_change(training: Training, start: Any) -> None:
    program = start(training.dashboard.url, "--metric", "val_loss", columns=100, lines=30)
    program.wait("long  running", " of ", "val_loss  0.")
    program.press("\x1b[C")
    program.wait("long", without="val_loss  0.")
    program.press("\x1b[D")
    program.wait("val_loss  0.")
    program.resize(40, 12)
    program.wait("long  running", "p pause", "q…")
    program.resize(20, 6)
    program.wait("long  running")
    program.press("\t")
    program.wait("the server has no")
    program.press("q")
    assert program.end() == 0


def test_tab_goes_from_run_to_run(training: Training, start: Any, tmp_path: Path) -> None:
    with Training(tmp_path / "runs", "other") as other:
        assert other.dashboard.url == training.dashboard.url
        program = start(training.dashboard.url)
        first, second = (
            ("long", "other") if "long  running" in program.wait("  running", "loss") else ("other", "long")
        )
        program.press("\t")
        program.wait(f"{second}  running", "loss", without=f"{first}  running")
        program.press("p")
        program.wait(f"{second}  paused")
        paused, going_on = (other, training) if second == "other" else (training, other)
        assert (paused.run.state, going_on.run.state == "paused") == ("paused", False)
        program.press("\t")
        program.wait(f"{first}  ", "loss", without=f"{second}  paused")
        program.press("q")
        assert program.end() == 0


def test_tab_reaches_every_run_also_of_one_name(start: Any, tmp_path: Path) -> None:
    """Two runs have one name, in directories of their own."""
    with Dashboard(port=0, quiet=True) as dashboard:
        for steps, folder in ((1, "a"), (2, "b"), (3, "c")):
            trainer = tiny_trainer(run_dir=str(tmp_path / folder), run_name="other" if steps == 3 else "same")
            trainer.train(tiny_loader(4), max_steps=steps, callbacks=[Dashboard(port=0, quiet=True)])
        program = start(dashboard.url)
        steps_of = re.compile(r"100 %  step (\d)")
        seen: set[str] = set()
        for _ in range(3):
            shown = program.wait_until(
                lambda shown: (found := steps_of.search(shown)) is not None and found[1] not in seen,
                f"a run besides {seen}",
            )
            found = steps_of.search(shown)
            assert found is not None
            seen.add(found[1])
            program.press("\t")
        assert seen == {"1", "2", "3"}
        program.press("q")
        assert program.end() == 0


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "crash"])
def test_the_terminal_is_left_as_it_was(training: Training, start: Any, how: str) -> None:
    if how == "crash":
        # After the third drawing
        broken = (
            "import offloop.cli.watch as watch\n"
            "from offloop.cli.main import app\n"
            "real, times = watch.screen, []\n"
            "def screen(*arguments):\n"
            "    times.append(1)\n"
            "    return real(*arguments) if len(times) < 4 else 1 / 0\n"
            "watch.screen = screen\n"
            f"app(['watch', {training.dashboard.url!r}])"
        )
        program = Program([sys.executable, "-c", broken])
        try:
            assert program.end() == 1
            assert program.is_as_it_was
            assert b"ZeroDivisionError" in program.written.rsplit(b"\x1b[?1049l", 1)[1]
        finally:
            program.close()
        return
    program = start(training.dashboard.url)
    program.wait("long  running")
    if how == "Ctrl-C":
        program.press("\x03")
    else:
        program.process.terminate()
    assert program.end() == 0
    assert program.is_as_it_was
    assert not training.run.is_over


def test_readers_only_watch(training: Training, start: Any) -> None:
    program = start(training.dashboard.read_only_url)
    shown = program.wait("long  running", "q quit")
    assert "p pause" not in shown
    program.press("s")
    program.wait("may only watch")
    program.press("q")
    assert program.end() == 0


def test_the_token_comes_from_the_environment_a_file_or_is_typed(
    training: Training, start: Any, tmp_path: Path
) -> None:
    address, _, token = training.dashboard.url.partition("?token=")
    assert "long  running" in start(address, env={"OFFLOOP_TOKEN": token}).wait("long  running")
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    assert "long  running" in start(address, "--token-file", str(file)).wait("long  running")
    program = start(address)
    program.wait("Token:")
    program.press(f"{token}\n")
    program.wait("long  running")
    assert token.encode() not in program.written


def plain(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if name != "OFFLOOP_TOKEN"}
    return subprocess.run(
        [*WATCH, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**without, **env},
        timeout=PATIENCE,
    )


def test_without_a_terminal_lines_come_until_the_run_is_over(training: Training) -> None:
    process = subprocess.Popen(
        [*WATCH, training.dashboard.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("long  running  step ")
    training.run.stop_nowait("seen enough")
    out, error = process.communicate(timeout=PATIENCE)
    assert out.splitlines()[-1].startswith("long  stopped  step ") and "seen enough" in out
    assert (process.returncode, error) == (0, "")


def test_the_directory_of_a_run_is_enough(tmp_path: Path) -> None:
    tiny_trainer(run_dir=str(tmp_path / "runs"), run_name="done").train(
        tiny_loader(5), tiny_loader(2), epochs=2
    )
    done = plain(str(tmp_path / "runs" / "done"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("done  completed  step 10")


def test_bad_input_is_one_line(training: Training, tmp_path: Path) -> None:
    address = training.dashboard.url.partition("?")[0]
    for arguments, words in (
        ((address,), "the address has no token: set OFFLOOP_TOKEN, or give --token-file"),
        ((f"{address}?token={'x' * 32}",), "does not accept this token"),
        ((address, "--token-file", str(tmp_path / "none")), "--token-file cannot be read"),
        ((str(tmp_path / "none"),), "there is no run"),
        (("http://127.0.0.1:9/?token=abcdefgh",), "127.0.0.1:9"),
    ):
        done = plain(*arguments)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("offloop: ") and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr


# The screen, without a terminal ----------------------------------------------------------------------


def seen_of(values: list[float], **more: Any) -> Seen:
    size = len(values)
    curve = MetricCurve(
        metric="loss",
        step=np.arange(1, size + 1),
        time=np.arange(size, dtype=float),
        epoch=np.zeros(size),
        value=np.array(values, dtype=float),
    )
    given: dict[str, Any] = {
        "name": "run",
        "state": "running",
        "status": Status(
            run="run", state="running", step=size, progress=0.5, time_left=61.0, loss=0.25, lr=0.1
        ),
        "metrics": ("loss", "val_loss"),
        "metric": "loss",
        "curve": curve,
        "events": ("12:00:00  step 1  val_loss 2",),
        "notice": "",
        "is_connected": True,
        "may_steer": True,
    }
    return Seen(**(given | more))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32), max_size=50),
    st.integers(1, 200),
    st.integers(1, 60),
    st.text(max_size=40),
)
def test_every_size_and_value_is_drawn_within_the_screen(
    values: list[float], columns: int, lines: int, name: str
) -> None:
    drawn = screen(seen_of(values, name=name, notice=name, events=(name,) * 10), columns, lines)
    assert len(drawn) <= lines
    assert all(line.cell_len <= columns and "\n" not in line.plain for line in drawn)


def test_a_curve_touches_the_edges_and_falls_where_it_falls() -> None:
    drawn = braille_chart([1, 2, 3, 4], [3.0, 2.0, 1.0, 0.0], 4, 2)
    assert drawn[0][0] != " " and drawn[-1][-1] != " " and drawn[0][-1] == " "
    assert braille_chart([1, 2], [float("nan")] * 2, 3, 2) == ["   ", "   "]
    assert any("\u2800" < each for each in braille_chart([5], [1.0], 3, 1)[0])


def test_a_line_says_how_a_run_stands() -> None:
    seen = seen_of([2.0, 0.5], metric="val_loss")
    assert line_of(seen) == "run  running  step 2  50 %  loss 0.25  val_loss 0.5  1 min 1 s left"
    lost = seen_of([], status=Status(run="run", state="failed", error="ValueError: no"), state="failed")
    assert line_of(lost) == "run  failed  step 0  ValueError: no"
