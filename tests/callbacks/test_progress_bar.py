"""callbacks/progress_bar.py: on a pseudo-terminal, without one, and beside forked workers."""

import io
import logging
import os
import pty
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offloop.callbacks import ProgressBar, progress_bar
from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Event,
    Metrics,
    Run,
    StateChanged,
    StepEnd,
    StepPoint,
    TrainStart,
    ValidationEnd,
    ValidationStart,
    in_step,
)
from offloop.engine.testing import drive, tiny_batches, tiny_loader, tiny_trainer


class Terminal:
    """A pseudo-terminal whose other end is read all the time, as a terminal does."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.file = open(theirs, "w", encoding="utf-8")
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._reader)
        self._thread.start()

    def _reader(self) -> None:
        try:
            while chunk := os.read(self._ours, 65536):
                self._read.append(chunk)
        except OSError:  # Linux says so at the end
            pass

    def close(self) -> str:
        """Hang up and return everything that was written."""
        self.file.close()
        self._thread.join()
        os.close(self._ours)
        return b"".join(self._read).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    made = Terminal()
    yield made
    if not made.file.closed:
        made.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw at every event, however long the last drawing took."""
    for name in ("REDRAW_INTERVAL", "REDRAW_SHARE", "LINE_INTERVAL"):
        monkeypatch.setattr(progress_bar, name, 0.0)


def text(written: str) -> str:
    """What was written, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)


START = TrainStart(epochs=3, steps_per_epoch=4)


def lines(*events: Event, bar: ProgressBar | None = None) -> list[str]:
    """The plain lines that a script of events leaves."""
    file = io.StringIO()
    given = bar or ProgressBar()
    given._given_file = file
    result = drive(given, events=[START, *events]).result
    assert result.callback_errors == {}
    return file.getvalue().splitlines()


@pytest.mark.usefixtures("at_once")
def test_plain_lines_where_there_is_no_terminal() -> None:
    said = lines(
        EpochStart(),
        StepEnd(loss=0.123456, lr=0.1, step=1),
        StepEnd(loss=1e-9, lr=0.1, step=5, epoch=1),
        ValidationStart(epoch=1, step=5),
        ValidationEnd(epoch=1, step=5, metrics=Metrics(val_loss=0.5)),
        EpochEnd(epoch=1, step=5),
    )
    assert said == [
        "epoch 1/3  step 1/12  loss 0.1235  lr 0.1",
        "epoch 2/3  step 5/12  loss 1e-09  lr 0.1",
        "epoch 2/3  step 5/12  loss 1e-09  lr 0.1  validating",
        "epoch 2/3  step 5/12  loss 1e-09  val_loss 0.5  lr 0.1",
        "epoch 2/3  step 5/12  loss 1e-09  val_loss 0.5  lr 0.1",
        "epoch 2/3  step 5/12  loss 1e-09  val_loss 0.5  lr 0.1  completed",
    ]


def test_plain_lines_are_few_and_the_end_is_always_said() -> None:
    said = lines(*[StepEnd(loss=1.0, lr=0.1, step=step) for step in range(1, 13)])
    assert said == ["epoch 1/3  step 12/12  loss 1  lr 0.1  completed"]


@pytest.mark.usefixtures("at_once")
def test_asked_for_metrics_are_shown_once_they_are_known() -> None:
    said = lines(
        StepEnd(loss=1.0, lr=0.1, step=1),
        ValidationEnd(step=1, metrics=Metrics(val_accuracy=0.75, val_other=1.0)),
        bar=ProgressBar(metrics=["val_accuracy", "nothing"]),
    )
    assert said[0] == "epoch 1/3  step 1/12  loss 1  lr 0.1"
    assert said[1] == "epoch 1/3  step 1/12  loss 1  val_accuracy 0.75  lr 0.1"
    with pytest.raises(TypeError, match="list of names"):
        ProgressBar(metrics="val_accuracy")  # type: ignore[arg-type]  # the point of the test


@pytest.mark.usefixtures("at_once")
def test_pause_is_shown_and_over_after_it() -> None:
    said = lines(
        StepEnd(loss=1.0, lr=0.1, step=1),
        StateChanged(state="paused", step=1),
        StateChanged(state="running", step=1),
        StateChanged(state="stopping", step=1),
    )
    assert [line.split("  ")[4:] for line in said] == [[], ["paused"], [], ["stopping"], ["completed"]]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("start", "shown"),
    [
        (TrainStart(epochs=3, steps_per_epoch=4), "epoch 1/3  step 1/12"),
        (TrainStart(epochs=3, steps_per_epoch=4, max_steps=5), "epoch 1/3  step 1/5"),
        (TrainStart(epochs=3, steps_per_epoch=4, max_steps=50), "epoch 1/3  step 1/12"),
        (TrainStart(max_steps=7), "epoch 1  step 1/7"),
        (TrainStart(epochs=3), "epoch 1/3  step 1"),
        (TrainStart(max_time=60.0), "epoch 1  step 1"),
    ],
)
def test_totals_are_what_the_limits_say(start: TrainStart, shown: str) -> None:
    file = io.StringIO()
    drive(ProgressBar(file=file), events=[start, StepEnd(loss=1.0, lr=0.1, step=1)])
    assert file.getvalue().splitlines()[0] == f"{shown}  loss 1  lr 0.1"


def test_speed_and_time_left_come_from_the_events_times() -> None:
    """By hand, with a clock of its own: two steps a second, later four; a validation is no slow step."""
    bar = ProgressBar(file=io.StringIO())
    run: Any = None
    bar.on_train_start(TrainStart(epochs=1, steps_per_epoch=7200), run)
    for step in range(1, 5):
        bar.on_step_end(StepEnd(loss=1.0, lr=0.1, step=step, time=100.0 + step / 2), run)
    assert bar.status().endswith("2 steps/s  59:58 left")
    bar.on_validation_start(ValidationStart(step=4, time=200.0), run)
    assert bar.status().endswith("2 steps/s  validating")
    bar.on_validation_end(ValidationEnd(step=4, time=900.0), run)
    bar.on_step_end(StepEnd(loss=1.0, lr=0.1, step=5, time=900.5), run)
    assert "2 steps/s" in bar.status()
    bar.close()


def test_bar_is_drawn_on_a_terminal_and_streams_are_left_alone(terminal: Terminal, at_once: None) -> None:
    streams: list[tuple[object, object]] = []

    class Look(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            streams.append((sys.stdout, sys.stderr))

    before = (sys.stdout, sys.stderr)
    result = tiny_trainer().train(
        tiny_loader(5), tiny_loader(1), epochs=2, callbacks=[ProgressBar(file=terminal.file), Look()]
    )
    assert result.callback_errors == {}
    assert not terminal.file.closed  # it is not ours to close
    written = terminal.close()
    shown = text(written)
    assert "━" in shown
    assert "epoch 2/2" in shown
    assert re.search(r"step 10/10  loss \S+  val_loss \S+  lr 0.05 .*completed", shown)
    assert "\x1b[?25l" in written  # the cursor was hidden ...
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # ... and is back
    assert set(streams) == {before}


def test_bar_leaves_the_cursor_visible_when_the_run_fails(terminal: Terminal) -> None:
    class Fails(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        tiny_trainer().train(tiny_loader(5), epochs=2, callbacks=[ProgressBar(file=terminal.file), Fails()])
    written = terminal.close()
    assert "failed" in text(written)
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_without_a_file_it_draws_on_a_stream_of_its_own(
    terminal: Terminal, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    bar, own = ProgressBar(), []

    class Look(Callback):
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            own.append(bar._file)

        @in_step
        def after_step(self, point: StepPoint) -> None:
            pass

    tiny_trainer().train(tiny_loader(3), epochs=1, callbacks=[bar, Look()])
    assert sys.stderr is terminal.file
    assert not terminal.file.closed
    assert bar._file is not None
    assert bar._file is not terminal.file
    assert bar._file.closed
    assert "completed" in text(terminal.close())


class Chatty(torch.utils.data.Dataset[Any]):
    """Prints, logs and warns in the worker process, through whatever locks the fork has left it."""

    def __init__(self) -> None:
        self.batches = tiny_batches(4)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(f"sample {index}", UserWarning, stacklevel=1)
        print(f"sample {index}", flush=True)
        print(f"sample {index}", file=sys.stderr, flush=True)
        logging.getLogger("offloop.test").warning("sample %d", index)
        return self.batches[index]


class NeverResting(Callback):
    """Keeps drawing at full speed, so that each fork falls into the middle of a redraw."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.draws = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if self._thread is None and self.bar._progress is not None:
            self._thread = threading.Thread(target=self._draw)
            self._thread.start()

    def _draw(self) -> None:
        while not self._stop.is_set():
            self.bar._draw(now=True)
            self.draws += 1

    async def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12+
def test_forked_workers_that_print_log_and_warn_never_hang_while_the_bar_draws(
    terminal: Terminal, at_once: None, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = torch.utils.data.DataLoader(
        Chatty(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=30
    )
    bar = ProgressBar(file=terminal.file)
    never_resting = NeverResting(bar)
    result = tiny_trainer().train(loader, epochs=40, callbacks=[never_resting, bar])
    assert result.status == "completed"
    assert result.steps == 160
    assert never_resting.draws > 100
    out = capfd.readouterr().out
    assert out.count("sample 3") == 40
    assert "━" in text(terminal.close())


def test_reset_forgets_the_run_before() -> None:
    file = io.StringIO()
    bar = ProgressBar(file=file)
    first = drive(bar, events=[START, StepEnd(loss=1.0, lr=0.1, step=9)])
    second = drive(bar, events=[TrainStart(epochs=1)])
    assert first.result.callback_errors == second.result.callback_errors == {}
    assert file.getvalue().splitlines()[-1] == "epoch 1/1  step 0  completed"
