"""engine/observers/cost_watch.py: a callback that computes beside training is named, one that waits is not."""

import logging
import threading
import time
from typing import Any, Final

import pytest

from offloop.engine import Callback, EpochStart, RunHandle, RunResult, StepEnd, StepPoint, decides, in_step
from offloop.engine.observers import cost_watch
from offloop.engine.testing import EndlessLoader, tiny_loader, tiny_trainer

LONG: Final = 60.0  # seconds; a bound for what takes a moment


def compute(seconds: float) -> None:
    """Compute in pure Python for so many seconds of this thread's CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))


class Until(Callback):
    """Lets a run train until a handler has returned, and for some steps more."""

    def __init__(self, done: threading.Event) -> None:
        self.done, self.more = done, 100

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if self.done.is_set():
            self.more -= 1
            if not self.more:
                point.run.stop_nowait("done")


class Works(Callback):
    """Does something at step 100, once: there are steps before it to compare with."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def work(self) -> None:
        raise NotImplementedError

    def look(self, event: StepEnd) -> None:
        if event.step >= 100 and not self.done.is_set():
            self.work()
            self.done.set()


class Plain(Works):
    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.look(event)


class PlainComputes(Plain):
    def work(self) -> None:
        compute(0.3)


class AsyncComputes(Works):
    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.look(event)

    def work(self) -> None:
        compute(0.3)


class PlainSleeps(Plain):
    def work(self) -> None:
        time.sleep(0.3)


class AsyncSleeps(AsyncComputes):
    def work(self) -> None:
        time.sleep(0.3)


class Listens(Callback):
    """Computes nothing, while `Plain` computes: it may have to wait for the interpreter."""

    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None: ...


def train(working: Works, *others: Callback, caplog: pytest.LogCaptureFixture) -> tuple[RunResult, list[str]]:
    """Train beside a callback; return the result and the warnings."""
    with caplog.at_level(logging.WARNING, "offloop"):
        result = tiny_trainer().train(
            EndlessLoader(), max_time=LONG, callbacks=[working, *others, Until(working.done)]
        )
    assert result.reason == "done"
    return result, [each.getMessage() for each in caplog.records if each.name == "offloop"]


@pytest.mark.parametrize("working", [PlainComputes, AsyncComputes])
def test_a_callback_that_computes_is_named_once_with_the_way_out(
    working: type[Works], caplog: pytest.LogCaptureFixture
) -> None:
    callback = working()
    result, messages = train(callback, Listens(), caplog=caplog)
    (message,) = messages
    assert message.startswith(f"callback {working.__name__} computed for 0.")
    assert "at a stretch while handling StepEnd, in the interpreter that training needs" in message
    assert message.endswith('runs_in = "process" gives it a process of its own')
    costs = result.callback_costs[working.__name__]
    assert costs.warning == message
    assert costs.cpu >= 0.3
    assert result.callback_costs["Listens"].warning == ""


@pytest.mark.parametrize("working", [PlainSleeps, AsyncSleeps])
def test_a_callback_that_waits_does_not_compute(
    working: type[Works], caplog: pytest.LogCaptureFixture
) -> None:
    result, messages = train(working(), caplog=caplog)
    assert result.callback_costs[working.__name__].warning == ""
    # One that blocks the event loop is named for that.
    held = [each for each in messages if "held the event loop" in each and "(0 ms of them" in each]
    assert len(messages) == len(held) == (working is AsyncSleeps)


def test_a_little_computing_in_many_events_is_named_by_its_share(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_watch, "WINDOW", 0.5)

    class Often(Callback):
        def __init__(self) -> None:
            self.total, self.done = 0, threading.Event()

        def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
            compute(0.005)
            self.total += 1
            if self.total == 100:
                self.done.set()

    callback: Any = Often()
    callback.buffer = 1
    result, messages = train(callback, caplog=caplog)
    (message,) = messages
    assert message.startswith("callback Often computed for ") and "at a stretch" not in message
    assert result.callback_costs["Often"].warning == message


def test_a_callback_that_also_decides_has_to_be_split(caplog: pytest.LogCaptureFixture) -> None:
    class Splits(Callback):
        """Observes milestones, and decides."""

        def __init__(self) -> None:
            self.done = threading.Event()

        def on_state_changed(self, event: Any, run: RunHandle) -> None: ...

        def on_epoch_end(self, event: Any, run: RunHandle) -> None:
            compute(0.3)

        @decides
        def on_epoch_start(self, event: EpochStart, run: RunHandle) -> None: ...

    with caplog.at_level(logging.WARNING, "offloop"):
        result = tiny_trainer().train(tiny_loader(), epochs=5, callbacks=[Splits()])
    warning = result.callback_costs["Splits"].warning
    assert warning.endswith("once its deciders and step hooks are a callback of their own")
    assert [each.getMessage() for each in caplog.records] == [warning]


def test_a_callback_in_a_process_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    class Away(Callback):
        runs_in = "process"

        def on_epoch_end(self, event: Any, run: RunHandle) -> None:
            until = time.thread_time() + 0.3
            while time.thread_time() < until:
                sum(range(1000))

    with caplog.at_level(logging.WARNING, "offloop"):
        result = tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[Away()])
    assert result.callback_costs["Away"].cpu >= 0.6
    assert result.callback_costs["Away"].warning == ""
    assert not caplog.records
