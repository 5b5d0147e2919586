"""Faults of child processes: each is an error that is reported, and no run hangs, misses a milestone or leaves one."""

import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_callbacks import (
    Counts,
    ForksAndReturns,
    LeavesProgram,
    LeavesThread,
    PublishesUndecodable,
    StopsItself,
    TakesAllMemory,
    Talks,
)
from placed_callbacks import Gate, Told

from offloop.engine import (
    Callback,
    CallbackFailed,
    CallbackProcessError,
    EpochEnd,
    RunResult,
    StepPoint,
    in_step,
)
from offloop.engine.processes import child_process
from offloop.engine.processes.process_observer import ProcessObserver
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer


def train(*callbacks: Callback, epochs: int = 2) -> tuple[RunResult, Recorder]:
    """Train beside callbacks, and check that no one else is hurt."""
    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(), epochs=epochs, callbacks=[*callbacks, recorder])
    assert result.status == "completed"
    assert [event.epoch for event in recorder.of(EpochEnd)] == list(range(epochs))
    assert recorder.names()[-1] == "TrainEnd"
    return result, recorder


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def told(recorder: Recorder) -> list[str]:
    return [event.what for event in recorder.of(Told)]


def test_twenty_children_at_once_see_every_milestone(tmp_path: Path) -> None:
    """Takes the start of twenty interpreters."""
    counts = [Counts(tmp_path / str(number)) for number in range(20)]
    result, _ = train(*counts, epochs=3)
    assert not result.callback_errors
    noted = [each.notes.read_text().split() for each in counts]
    assert [epochs for epochs, _ in noted] == ["3"] * 20
    assert len({pid for _, pid in noted}) == 20
    assert not any(is_alive(int(pid)) for _, pid in noted)


def test_a_child_without_memory_is_reported() -> None:
    result, recorder = train(TakesAllMemory())
    errors = result.callback_errors["TakesAllMemory"]
    assert errors[0].startswith("TrainStart: MemoryError")
    assert recorder.of(CallbackFailed)


def test_a_module_that_is_missing_in_the_child_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gone_by_then.py"
    file.write_text(
        "from offloop.engine import Callback\n\n"
        "class Mine(Callback):\n    runs_in = 'process'\n\n    def on_event(self, event, run): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("gone_by_then")
    file.unlink()
    result, recorder = train(module.Mine())
    (error,) = result.callback_errors["Mine"]
    text = "Mine could not be loaded in its process: ModuleNotFoundError: No module named 'gone_by_then'"
    assert error == f"its process: CallbackProcessError: {text}"
    (failed,) = recorder.of(CallbackFailed)
    assert "pickling.loads(load.callback)" in failed.traceback and failed.disabled
    mine = module.Mine()
    mine.on_error = "raise"
    with pytest.raises(CallbackProcessError, match="gone_by_then"):
        tiny_trainer().train(tiny_loader(), epochs=10**6, callbacks=[mine])


def test_an_event_that_cannot_be_decoded_is_a_failure() -> None:
    result, recorder = train(PublishesUndecodable())
    assert told(recorder) == ["goes on"] * 2
    errors = result.callback_errors["PublishesUndecodable"]
    assert len(errors) == result.callback_costs["PublishesUndecodable"].failures == 2
    assert errors[0].startswith("publish: ValidationError: ")


def test_threads_and_exit_functions_of_a_child_have_their_end(tmp_path: Path) -> None:
    result, _ = train(LeavesThread(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text().split() == ["thread", "exit"]
    assert not result.callback_errors


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """A file with the pid of a process that is ended after the test."""
    notes = tmp_path / "notes"
    yield notes
    os.kill(int(notes.read_text().split()[0]), signal.SIGKILL)


@pytest.mark.parametrize("how", ["starts", "forks"])
def test_a_program_that_outlives_the_child_does_not_hold_up_the_end(how: str, notes: Path) -> None:
    result, _ = train(LeavesProgram(how, notes))
    pid, closed = notes.read_text().split()
    assert closed == "close" and is_alive(int(pid))
    assert not result.callback_errors


def test_a_fork_that_returns_from_a_handler_is_ended_and_the_child_goes_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    result, recorder = train(ForksAndReturns())
    assert not result.callback_errors
    (pid,) = [int(each) for each in told(recorder) if each.isdigit() and each != "0"]
    assert told(recorder).count("epoch 0") == told(recorder).count("epoch 1") == 1
    assert "a process that was forked inside a run has returned into the run" in capfd.readouterr().err
    status = Path(f"/proc/{pid}/stat")
    # As a zombie at most: its parent, the child, has not waited for it.
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_child_that_is_stopped_by_a_signal_is_ended_after_its_time() -> None:
    result, recorder = train(StopsItself(), Gate())
    drain, close = result.callback_errors["StopsItself"]
    assert "still busy 0.1 s after the end: cancelled" in drain
    assert close.startswith("close: TimeoutError: ")
    assert not is_alive(int(told(recorder)[0]))


class WatchesQueue(Callback):
    """Looks in each step how many messages wait for the child."""

    longest = 0

    @in_step
    def after_step(self, point: StepPoint) -> None:
        (child,) = [
            each._child
            for each in point.run._session.callbacks.observers
            if isinstance(each, ProcessObserver)
        ]
        self.longest = max(self.longest, len(child._outgoing))


def test_messages_do_not_pile_up_for_a_child_that_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child may compute for hours, in C, and the state of the run changes all the time."""
    monkeypatch.setattr(child_process, "FACTS_INTERVAL", 1e-4)
    watches = WatchesQueue()
    train(StopsItself(), Gate(), watches, epochs=100)
    assert watches.longest < 10


# Output and log records that find no taker -------------------------------------------------------


class Breaks(io.StringIO):
    def write(self, text: str) -> int:
        raise ZeroDivisionError


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "broken"])
def test_output_arrives_in_whatever_encoding_and_breaks_nothing(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Breaks() if encoding == "broken" else io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # of the child
    result, recorder = train(Talks())
    assert not result.callback_errors
    assert told(recorder) == ["goes on"] * 2
    if isinstance(stream, io.TextIOWrapper):
        stream.seek(0)
        expected = {"utf-8": "größer \\udcff\n", "ascii": "gr\\xf6\\xdfer \\udcff\n"}
        assert stream.read() == expected[encoding]


def test_a_log_filter_that_fails_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ZeroDivisionError

    fails = Fails()
    logging.getLogger("mine").addFilter(fails)
    try:
        result, recorder = train(Talks())
    finally:
        logging.getLogger("mine").removeFilter(fails)
    assert not result.callback_errors
    assert told(recorder) == ["goes on"] * 2
    assert "a log record of Talks was lost" in caplog.text


def test_a_child_that_cannot_be_served_any_more_is_ended_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As for want of memory or of file descriptors in this process."""

    def fail(self: Any, message: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ProcessObserver, "_on_message", fail)
    result, _ = train(Counts(tmp_path / "notes"))
    (error,) = result.callback_errors["Counts"]
    assert error == "its process: CallbackProcessError: the process of Counts was lost: MemoryError: "
    assert "the process of Counts was lost" in caplog.text


def test_paths_that_are_no_strings_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`sys.path.append(Path(...))` is a common mistake, which imports ignore."""
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, os.fsdecode(b"/no/\xff")])
    result, _ = train(Counts(tmp_path / "notes"))
    assert not result.callback_errors
    assert (tmp_path / "notes").read_text().startswith("2 ")
