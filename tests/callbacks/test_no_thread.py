"""Callbacks with threads of their own, where the system gives none: one report says why, and the run goes on."""

import io
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from offloop.callbacks import (
    Alerts,
    Profiler,
    ProgressBar,
    ResourceMonitor,
    Stalled,
    TensorBoardLogger,
)
from offloop.callbacks.tracking import Entry, Point, Sender
from offloop.engine import Callback
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

NO_THREAD = "can't start new thread"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of other people's packages
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has its threads and callbacks those for their handlers; all others are refused."""
    start = threading.Thread.start
    names = (
        "offloop-training",
        "offloop-finish",
        "offloop-run-json",
        "offloop-checkpoint",
        "offloop-EventLog",
    )
    classes = ("ProgressBar", "ResourceMonitor", "Profiler", "TensorBoardLogger", "Alerts")

    def start_or_refuse(thread: threading.Thread) -> None:
        is_handlers = thread.name in [f"offloop-{each}" for each in classes]
        if not is_handlers and not thread.name.startswith(names):
            raise RuntimeError(NO_THREAD)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)


@pytest.mark.parametrize(
    ("make", "reports"),
    [
        (lambda: ResourceMonitor(every_seconds=0.01), 1),
        (lambda: Alerts(None, Stalled(3600.0)), 1),
        (TensorBoardLogger, 1),
        (lambda: Profiler(warmup=1, active=1), 0),
        (lambda: ProgressBar(file=Terminal()), 0),
    ],
    ids=["ResourceMonitor", "Alerts", "TensorBoardLogger", "Profiler", "ProgressBar"],
)
def test_callback_that_gets_no_thread_says_so_once_and_closes(
    make: Callable[[], Callback],
    reports: int,
    tmp_path: Path,
    no_threads: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback, recorder = make(), Recorder()
    result = tiny_trainer(run_dir=tmp_path).train(tiny_loader(20), epochs=1, callbacks=[callback, recorder])
    assert result.status == "completed"
    errors = result.callback_errors.get(type(callback).__name__, ())
    assert [NO_THREAD in each for each in errors] == [True] * reports
    assert recorder.is_closed


def test_profile_is_written_at_the_end_where_there_is_no_thread_for_it(
    tmp_path: Path, no_threads: None
) -> None:
    result = tiny_trainer(run_dir=tmp_path).train(
        tiny_loader(20), epochs=1, callbacks=[Profiler(warmup=1, active=1)]
    )
    assert result.dir is not None
    assert list(result.dir.rglob("*trace*"))


def test_last_line_of_a_bar_is_drawn_without_a_thread(
    no_threads: None, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    tiny_trainer().train(tiny_loader(2), epochs=1, callbacks=[ProgressBar(file=terminal)])
    assert "completed" in terminal.getvalue()
    assert NO_THREAD in caplog.text


def test_client_of_a_tracking_server_that_exits_is_a_problem_that_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "offloop")

    def leave(*_: Any) -> None:
        raise SystemExit("no server")

    def send(batch: Sequence[Entry]) -> None:
        leave()

    sender = Sender(
        "offloop-sender",
        connect=lambda: None,
        send=send,
        finish=lambda: None,
        is_hopeless=lambda error: False,
    )
    sender.put(Point(0.0, 0, 1, {"loss": 1.0}))
    sender.close(30.0)
    assert sender.problem == "SystemExit: no server"
    assert (sender.sent, sender.lost) == (0, 1)
