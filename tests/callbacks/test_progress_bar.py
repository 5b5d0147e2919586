"""callbacks/progress_bar.py: on a pseudo-terminal, without one, and beside forked workers."""

import concurrent.futures
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pyte
import pytest
import torch
from rich.console import Console

from offloop.callbacks import ProgressBar, progress_bar
from offloop.callbacks.progress_bar import RESTORE_CURSOR
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
    TrainEnd,
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
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._reader)
        self._thread.start()

    def _reader(self) -> None:
        try:
            while chunk := os.read(self._ours, 65536):
                with self._more:
                    self._read.append(chunk)
                    self._more.notify_all()
        except OSError:  # Linux says so at the end
            pass

    def wait_for(self, text: str, *, after: str = "") -> None:
        """Wait until something has been written, after something else that was written."""

        def is_there() -> bool:
            written = b"".join(self._read).decode(errors="ignore")
            return after in written and text in written[written.index(after) + len(after) :]

        with self._more:
            assert self._more.wait_for(is_there, 30)

    def print(self, text: str) -> None:
        """Write in one call, and wait until the bars have been drawn again."""
        self.file.write(text)
        self.file.flush()
        self.wait_for(RESTORE_CURSOR, after=text.replace("\n", "\r\n"))

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
    for name in ("REDRAW_INTERVAL", "REDRAW_SHARE", "UNCHANGED_INTERVAL", "LINE_INTERVAL"):
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
    # On a busy machine a run takes a second.
    return [
        re.sub(r"completed in \d+:\d\d", "completed in 0:00", line) for line in file.getvalue().splitlines()
    ]


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
        "epoch 2/3  step 5/12  loss 1e-09  val_loss 0.5  lr 0.1  completed in 0:00",
    ]


@pytest.mark.usefixtures("at_once")
def test_number_of_ranks_is_shown_if_there_are_several() -> None:
    file, run = io.StringIO(), fake_run("run", step=6, epoch=1)
    bar = ProgressBar(file=file)
    bar.on_train_start(TrainStart(epochs=3, steps_per_epoch=4, world_size=2), run)
    bar.on_step_end(StepEnd(loss=0.5, lr=0.1, step=6, epoch=1), run)
    assert file.getvalue() == "epoch 2/3  2 ranks  step 6/12  loss 0.5  lr 0.1\n"
    assert drawn(bar, 80)[0] == "epoch 2/3  2 ranks ~"
    assert drawn(bar, 40)[0] == "epoch 2/3 ~"
    bar.close()


def test_plain_lines_are_few_and_the_end_is_always_said() -> None:
    said = lines(*[StepEnd(loss=1.0, lr=0.1, step=step) for step in range(1, 13)])
    assert said == ["epoch 1/3  step 12/12  loss 1  lr 0.1  completed in 0:00"]


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


def test_the_metric_by_which_the_run_is_judged_is_shown() -> None:
    file = io.StringIO()
    trainer = tiny_trainer(monitor="val_accuracy")
    bar = ProgressBar(file=file)
    trainer.train(tiny_loader(2), tiny_loader(2), epochs=1, metrics=["accuracy"], callbacks=[bar])
    *_, last = file.getvalue().splitlines()
    assert re.search(r"loss \S+  val_loss \S+  val_accuracy \S+  lr", last)


@pytest.mark.usefixtures("at_once")
def test_pause_is_shown_and_over_after_it() -> None:
    said = lines(
        StepEnd(loss=1.0, lr=0.1, step=1),
        StateChanged(state="paused", step=1),
        StateChanged(state="running", step=1),
        StateChanged(state="stopping", step=1),
    )
    assert [line.split("  ")[4:] for line in said] == [
        [],
        ["paused"],
        [],
        ["stopping"],
        ["completed in 0:00"],
    ]


def test_a_stop_is_one_line() -> None:
    said = lines(
        StepEnd(loss=1.0, lr=0.1, step=1),
        StateChanged(state="stopping", step=1),
        StepEnd(loss=1.0, lr=0.1, step=2),
    )
    assert said == ["epoch 1/3  step 2/12  loss 1  lr 0.1  completed in 0:00"]


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
    run = fake_run("run")
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


def screen_of(written: str, columns: int = 200, lines: int = 24) -> list[str]:
    """What a terminal shows after all that was written, and what has left it at the top; empty lines left out."""
    screen = pyte.HistoryScreen(columns, lines, history=1000)
    screen.set_mode(pyte.modes.LNM)  # a terminal driver adds the carriage returns
    pyte.Stream(screen).feed(written)
    gone = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*gone, *screen.display] if line.strip()]


def test_bar_is_drawn_on_a_terminal_and_streams_are_left_alone(terminal: Terminal, at_once: None) -> None:
    streams: list[tuple[object, object]] = []

    class Look(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            streams.append((sys.stdout, sys.stderr))
            if point.step == 8:
                terminal.wait_for("━")

    before = (sys.stdout, sys.stderr)
    result = tiny_trainer().train(
        tiny_loader(5), tiny_loader(1), epochs=2, callbacks=[ProgressBar(file=terminal.file), Look()]
    )
    assert result.callback_errors == {}
    assert not terminal.file.closed  # it is not ours to close
    written = terminal.close()
    (line,) = screen_of(written)  # the bars are gone
    assert re.fullmatch(
        r"epoch 2/2  step 10/10  loss \S+  val_loss \S+  lr 0.05 .*completed in \d+:\d\d", line
    )
    assert set(streams) == {before}


def test_killed_run_leaves_a_usable_terminal(terminal: Terminal, at_once: None) -> None:
    """At every moment: the cursor is never hidden, no mode is set that would have to be reset."""
    tiny_trainer().train(tiny_loader(5), epochs=2, callbacks=[ProgressBar(file=terminal.file)])
    assert "\x1b[?" not in terminal.close()


def test_failed_run_says_so_in_its_last_line(terminal: Terminal) -> None:
    class Fails(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        tiny_trainer().train(tiny_loader(5), epochs=2, callbacks=[ProgressBar(file=terminal.file), Fails()])
    (line,) = screen_of(terminal.close())
    assert line.endswith("failed in 0:00")


def print_at_each_epoch(terminal: Terminal, texts: list[str]) -> list[str]:
    """Train an epoch for each text, print it at the end of that, and return what the terminal then shows."""

    class Print(Callback):
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            terminal.print(texts[event.epoch])

    bar = ProgressBar(file=terminal.file)
    result = tiny_trainer().train(tiny_loader(5), epochs=len(texts), callbacks=[bar, Print()])
    assert result.callback_errors == {}
    return screen_of(terminal.close())


def test_what_is_printed_meanwhile_stands_above_the_bars(terminal: Terminal, at_once: None) -> None:
    *printed, last = print_at_each_epoch(terminal, [f"epoch {epoch} is over\n" for epoch in range(6)])
    assert printed == [f"epoch {epoch} is over" for epoch in range(6)]
    assert "completed" in last


def test_a_few_lines_may_be_printed_at_once(terminal: Terminal, at_once: None) -> None:
    """More than the screen has lines."""
    texts = [
        "".join(f"epoch {epoch} line {line}\n" for line in range(progress_bar.ROOM)) for epoch in range(4)
    ]
    *printed, last = print_at_each_epoch(terminal, texts)
    assert printed == "".join(texts).splitlines()
    assert "completed" in last


def test_many_lines_printed_at_once_are_all_there_and_start_their_lines(
    terminal: Terminal, at_once: None
) -> None:
    """Those that meet the block may be followed by what is left of it; the block has three lines here."""
    texts = ["".join(f"epoch {epoch} line {line:<20}|\n" for line in range(12)) for epoch in range(3)]
    *printed, last = print_at_each_epoch(terminal, texts)
    expected = "".join(texts).splitlines()
    assert [line.partition("|")[0] + "|" for line in printed] == expected
    assert sum(line != each for line, each in zip(printed, expected, strict=True)) <= 3 * len(texts)
    assert "completed" in last


def test_a_line_may_be_printed_piece_by_piece(terminal: Terminal, at_once: None) -> None:
    printed, last = print_at_each_epoch(terminal, ["epoch 0,", " epoch 1,", " epoch 2\n"])
    assert printed == "epoch 0, epoch 1, epoch 2"
    assert "completed" in last


def fake_run(name: str, **values: Any) -> Any:
    return SimpleNamespace(id=name, **{"monitor": "", "step": 0, "epoch": 0, "validation_batch": 0, **values})


def filled(bar: ProgressBar, run: Any) -> ProgressBar:
    """A bar in the middle of the third of five epochs of 200 steps, 40 steps/s."""
    bar.on_train_start(TrainStart(epochs=5, steps_per_epoch=200), run)
    bar.on_validation_end(
        ValidationEnd(metrics=Metrics(val_loss=0.4321, val_accuracy=0.87654, val_f1_score=0.8)), run
    )
    for step in (400, 440, 500):
        bar.on_step_end(StepEnd(loss=0.25, lr=3e-4, step=step, epoch=2, time=step / 40, samples=32), run)
    run.step, run.epoch = 500, 2
    return bar


def drawn(bar: ProgressBar, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        console.print(bar.block(width))
    lines = captured.get().splitlines()
    assert all(len(line) <= width for line in lines)
    return [re.sub(" *[━╸╺]+ *", " ~ ", line).strip() for line in lines]


@pytest.mark.parametrize(
    ("width", "values"),
    [
        (
            120,
            [
                "loss 0.25  val_loss 0.4321  val_accuracy 0.8765  val_f1_score 0.8  lr 0.0003  1.28e+03 samples/s"
            ],
        ),
        (
            80,
            [
                "loss 0.25  val_loss 0.4321  val_accuracy 0.8765  val_f1_score 0.8  lr 0.0003",
                "1.28e+03 samples/s",
            ],
        ),
        (
            40,
            [
                "loss 0.25  val_loss 0.4321",
                "val_accuracy 0.8765  val_f1_score 0.8",
                "lr 0.0003  1.28e+03 samples/s",
            ],
        ),
    ],
)
def test_bars_and_values_fit_any_width(width: int, values: list[str]) -> None:
    run = fake_run("run")
    bar = filled(ProgressBar(metrics=["val_accuracy", "val_f1_score"], file=io.StringIO()), run)
    assert drawn(bar, width) == ["epoch 3/5 ~ 0:12 left", "step 100/200 ~ 40 steps/s", *values]
    bar.on_validation_start(ValidationStart(step=500, epoch=2, batches=9), run)
    run.validation_batch = 4
    assert drawn(bar, width)[:2] == ["epoch 3/5 ~ 0:12 left", "validation 4/9 ~"]
    bar.on_state_changed(StateChanged(state="paused"), run)
    assert drawn(bar, width)[0] == "epoch 3/5 ~ paused"
    bar.close()


@pytest.mark.parametrize(
    ("start", "first", "second"),
    [
        (TrainStart(max_steps=50), "epoch 1 ~", "step 7 ~"),
        (TrainStart(epochs=3), "epoch 1/3", "step 7 ~"),
        (TrainStart(max_time=3600.0), "epoch 1 1:00:00 left", "step 7 ~"),
    ],
)
def test_bars_of_runs_whose_length_is_not_known(start: TrainStart, first: str, second: str) -> None:
    bar = ProgressBar(file=io.StringIO())
    bar.on_train_start(start, fake_run("run", step=7))
    assert [" ".join(line.split()) for line in drawn(bar, 80)[:2]] == [first, second]
    bar.close()


def test_runs_of_a_process_share_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "REDRAW_INTERVAL", 3600.0)  # draws when told to
    read: list[list[str]] = []
    one, two = (ProgressBar(file=terminal.file) for _ in range(2))
    for bar, name in ((one, "run-one"), (two, "run-two")):
        filled(bar, fake_run(name))
    display = one._display
    assert isinstance(display, progress_bar._Terminal) and two._display is display
    written = io.StringIO()
    monkeypatch.setattr(display, "_write", written.write)
    with display._drawing:
        display._drawn = ""
        display.draw()
    read.append(screen_of(written.getvalue()))
    one.on_train_end(TrainEnd(status="completed", step=1000, seconds=61.0), one._run)  # type: ignore[arg-type]
    one.close()
    read.append(screen_of(written.getvalue()))
    two.on_train_end(TrainEnd(status="stopped", step=1000, seconds=3.0), two._run)  # type: ignore[arg-type]
    two.close()
    read.append(screen_of(written.getvalue()))
    assert [re.sub(" *[━╸╺]+ *", " ~ ", line) for line in read[0]] == [
        *("run-one", "epoch 3/5 ~ 0:12 left", "step 100/200 ~ 40 steps/s"),
        "loss 0.25  val_loss 0.4321  lr 0.0003  1.28e+03 samples/s",
        *("run-two", "epoch 3/5 ~ 0:12 left", "step 100/200 ~ 40 steps/s"),
        "loss 0.25  val_loss 0.4321  lr 0.0003  1.28e+03 samples/s",
    ]
    assert read[1][0].startswith("run-one  epoch 3/5  step 1000/1000")
    assert read[1][0].endswith("completed in 1:01")
    assert read[1][1] == "run-two"  # which of the two goes on
    assert len(read[1]) == 1 + 4
    assert len(read[2]) == 2
    assert read[2][1].startswith("run-two  epoch 3/5") and read[2][1].endswith("stopped in 0:03")
    assert progress_bar._displays == {}


@pytest.mark.slow
def test_real_runs_in_threads_leave_one_line_each(terminal: Terminal, at_once: None) -> None:
    together = threading.Barrier(3)

    class Meet(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step in (1, 10):
                together.wait()

    def train(name: str) -> None:
        callbacks = [ProgressBar(file=terminal.file), Meet()]
        tiny_trainer(run_name=name).train(tiny_loader(10), epochs=2, callbacks=callbacks)

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        list(threads.map(train, ["one", "two", "three"]))
    lines = screen_of(terminal.close())
    assert len(lines) == 3
    assert all("step 20/20" in line and re.search(r"completed in \d+:\d\d$", line) for line in lines)


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_obeyed(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    tiny_trainer().train(tiny_loader(5), epochs=2, callbacks=[ProgressBar(file=terminal.file)])
    colours = [
        each for each in re.findall(r"\x1b\[([0-9;]*)m", terminal.close()) if each not in ("0", "1", "")
    ]
    assert bool(colours) is not no_color


def test_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    tiny_trainer().train(tiny_loader(5), epochs=2, callbacks=[ProgressBar(file=terminal.file)])
    written = terminal.close()
    assert "\x1b" not in written
    assert written.count("\n") == 1


def test_reader_that_goes_away_is_no_failure(at_once: None) -> None:
    file = io.StringIO()

    class HangUp(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            file.close()

    result = tiny_trainer().train(tiny_loader(5), epochs=2, callbacks=[ProgressBar(file=file), HangUp()])
    assert result.callback_errors == {}


def test_without_a_file_it_draws_on_a_stream_of_its_own(
    terminal: Terminal, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    opened: list[TextIO | None] = []
    open_own = progress_bar._own_stderr

    def spy() -> TextIO | None:
        opened.append(open_own())
        return opened[-1]

    monkeypatch.setattr(progress_bar, "_own_stderr", spy)
    tiny_trainer().train(tiny_loader(3), epochs=1, callbacks=[ProgressBar()])
    assert sys.stderr is terminal.file
    assert not terminal.file.closed
    (stream,) = opened
    assert stream is not None and stream.closed
    assert "completed" in text(terminal.close())


NOTEBOOK = """
from offloop.callbacks import ProgressBar, progress_bar
from offloop.engine.testing import tiny_loader, tiny_trainer
progress_bar.NOTEBOOK_INTERVAL = 0.01
result = tiny_trainer().train(tiny_loader(200), tiny_loader(2), epochs=5, callbacks=[ProgressBar()])
assert result.callback_errors == {}, result.callback_errors
"""

IN_KERNEL = """
import json, sys
from jupyter_client import KernelManager

manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.blocking_client()
client.start_channels()
client.wait_for_ready(timeout=60)
messages = []
client.execute_interactive(sys.argv[1], output_hook=messages.append, timeout=60)
client.stop_channels()
manager.shutdown_kernel(now=True)
json.dump([{"type": each["msg_type"], "content": each["content"]} for each in messages], sys.stdout)
"""


@pytest.mark.slow
def test_notebook_has_one_output_that_is_updated(tmp_path: Path) -> None:
    """In a real kernel, asked over its real protocol, as a browser does."""
    home = {
        name: str(tmp_path) for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_KERNEL, NOTEBOOK],
        cwd=tmp_path,
        env={**os.environ, **home, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert [each["content"] for each in messages if each["type"] in ("error", "stream")] == []
    first, *updates = [each for each in messages if each["type"].endswith("display_data")]
    assert first["type"] == "display_data"
    assert {each["type"] for each in updates} == {"update_display_data"}
    pictures = [each["content"] for each in (first, *updates)]
    assert len({each["transient"]["display_id"] for each in pictures}) == 1
    assert "━" in pictures[0]["data"]["text/plain"]
    last = pictures[-1]["data"]
    said = re.sub(r"\s*\n", "  ", last["text/plain"])  # on a slow machine it has a speed, and a second line
    assert re.search(r"epoch 5/5  step 1000/1000  loss \S+  val_loss .*  completed in", said)
    assert last["text/html"].startswith("<pre") and "completed" in last["text/html"]


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12+
def test_forked_workers_that_print_log_and_warn_never_hang_while_the_bar_draws(
    terminal: Terminal, at_once: None, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = torch.utils.data.DataLoader(
        Chatty(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=30
    )
    bar = ProgressBar(file=terminal.file)  # it draws without a pause, so that each fork falls into a redraw
    result = tiny_trainer().train(loader, epochs=40, callbacks=[bar])
    assert result.status == "completed"
    assert result.steps == 160
    assert capfd.readouterr().out.count("sample 3") == 40
    assert terminal.close().count("\x1b[J") > 100


def test_reset_forgets_the_run_before() -> None:
    file = io.StringIO()
    bar = ProgressBar(file=file)
    first = drive(bar, events=[START, StepEnd(loss=1.0, lr=0.1, step=9)])
    second = drive(bar, events=[TrainStart(epochs=1)])
    assert first.result.callback_errors == second.result.callback_errors == {}
    assert file.getvalue().splitlines()[-1] == "epoch 1/1  step 0  completed in 0:00"


def test_nothing_is_drawn_where_there_is_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under pythonw and in applications without a console."""
    monkeypatch.setattr(sys, "stderr", None)
    result = tiny_trainer().train(tiny_loader(2), tiny_loader(1), epochs=2, callbacks=[ProgressBar()])
    assert not result.callback_errors
    assert not progress_bar._displays
