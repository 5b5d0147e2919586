"""Signals: `train()` in real processes that are told to stop, in order, in haste and at once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from offloop.engine import Callback, Preempted, Run, StateChanged, StepPoint, TrainEnd, in_step
from offloop.engine.testing import EndlessLoader, Recorder, tiny_trainer

ENDLESS = 1_000_000_000

SCRIPT = """
import asyncio, signal, sys, threading
from offloop.engine import Callback, in_step
from offloop.engine.testing import EndlessLoader, tiny_trainer

def say(text):
    print(text, flush=True)

class Report(Callback):
    async def on_state_changed(self, event, run):
        say(f"state {event.state}")
    async def on_train_end(self, event, run):
        say(f"TrainEnd {event.status} {event.reason}")
        if "hanging callback" in sys.argv:
            await asyncio.sleep(3600)
    async def close(self):
        say("closed")

class Step(Callback):
    said = False
    @in_step
    def after_step(self, point):
        if not self.said:
            self.said = True
            say("stepping")
            if "hanging step" in sys.argv:
                threading.Event().wait(3600)

def train():
    trainer, given = tiny_trainer(drain_timeout=3600.0), dict(max_steps=10**9, callbacks=[Report(), Step()])
    if "async" in sys.argv:
        asyncio.run(trainer.train_async(EndlessLoader(), **given, handle_signals=True))
    else:
        trainer.train(EndlessLoader(), **given)

try:
    train()
except BaseException as error:
    default = (signal.default_int_handler, signal.SIG_DFL)
    restored = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == default
    say(f"{type(error).__name__}, handlers restored: {restored}")
    raise
"""


class Child:
    """A training script in a process of its own."""

    def __init__(self, path: Path, *arguments: str) -> None:
        path.write_text(SCRIPT)
        self.process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.readline().rstrip()
        if not said:
            assert self.process.stderr is not None
            pytest.fail(f"no {line!r}: {self.process.stderr.read()}")
        assert said == line

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "number", "raised", "code"),
    [
        ("blocking", signal.SIGTERM, "Preempted", 75),
        ("async", signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT),
    ],
)
def test_first_signal_stops_the_run_in_order(
    how: str, number: signal.Signals, raised: str, code: int, tmp_path: Path, children: list[Child]
) -> None:
    child = Child(tmp_path / "script.py", how)
    children.append(child)
    child.expect("stepping")
    child.send(number)
    child.expect("state stopping")
    child.expect(f"TrainEnd stopped {number.name}")
    child.expect("closed")
    child.expect(f"{raised}, handlers restored: True")
    assert child.end() == code


@pytest.mark.slow
def test_second_signal_does_not_wait_for_a_callback_that_hangs(tmp_path: Path, children: list[Child]) -> None:
    child = Child(tmp_path / "script.py", "hanging callback")
    children.append(child)
    child.expect("stepping")
    child.send(signal.SIGTERM)
    child.expect("state stopping")
    child.expect("TrainEnd stopped SIGTERM")
    child.send(signal.SIGTERM)  # its callback would hold the drain for an hour
    child.expect("closed")
    child.expect("Preempted, handlers restored: True")
    assert child.end() == 75


@pytest.mark.slow
def test_third_signal_ends_the_process_also_in_a_step_that_never_returns(
    tmp_path: Path, children: list[Child]
) -> None:
    number = signal.SIGINT
    child = Child(tmp_path / "script.py", "hanging step")
    children.append(child)
    child.expect("stepping")
    assert child.process.stderr is not None
    child.send(number)
    assert "stopping; once more to leave in haste" in child.process.stderr.readline()
    child.send(number)
    assert "a third time" in child.process.stderr.readline()
    child.send(number)
    assert child.end() == -number


# In this process -----------------------------------------------------------------------------------


class Signal(Callback):
    """Sends signals to this process from the training thread."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.numbers = list(numbers)
        self.handlers: list[Any] = []

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        if self.numbers:
            os.kill(os.getpid(), self.numbers.pop(0))


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.steps:
            point.run.stop_nowait("by itself")


def test_keyboard_interrupt_comes_after_train_end() -> None:
    recorder, trainer = Recorder(), tiny_trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Signal(signal.SIGINT), recorder])
    assert recorder.names()[-1] == "TrainEnd"
    assert [event.by for event in recorder.of(StateChanged)] == ["signal"]
    assert recorder.is_closed
    assert trainer.last_run is not None
    assert (trainer.last_run.result.status, trainer.last_run.result.reason) == ("stopped", "SIGINT")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_is_preempted_with_code_75() -> None:
    with pytest.raises(Preempted) as caught:
        tiny_trainer().train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Signal(signal.SIGTERM)])
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signal_ends_a_pause() -> None:
    class Pause(Callback):
        async def on_state_changed(self, event: StateChanged, run: Run) -> None:
            if event.state == "paused":
                os.kill(os.getpid(), signal.SIGTERM)

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                point.run.pause_nowait()

    with pytest.raises(Preempted):
        tiny_trainer().train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Pause()])


def test_hosts_own_handler_is_left_alone() -> None:
    seen: list[int] = []

    def mine(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    spy = Signal(signal.SIGTERM)
    try:
        result = tiny_trainer().train(EndlessLoader(), max_steps=ENDLESS, callbacks=[spy, StopAfter(50)])
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.reason == "by itself"
    assert seen == [signal.SIGTERM]
    assert spy.handlers[1] is mine
    assert spy.handlers[0] not in (mine, signal.default_int_handler)  # that one was ours to take


@pytest.mark.anyio
async def test_async_run_takes_signals_only_when_asked_to() -> None:
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    spy = Signal()
    with anyio.fail_after(30):
        await tiny_trainer().train_async(EndlessLoader(), max_steps=3, callbacks=[spy])
        assert spy.handlers == before
        await tiny_trainer().train_async(EndlessLoader(), max_steps=3, callbacks=[spy], handle_signals=True)
    assert spy.handlers[0] is spy.handlers[1]
    assert spy.handlers != before
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_run_in_another_thread_leaves_signals_alone() -> None:
    spy, recorder = Signal(), Recorder()
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    thread = threading.Thread(
        target=lambda: tiny_trainer().train(EndlessLoader(), max_steps=3, callbacks=[spy, recorder])
    )
    thread.start()
    thread.join(30)
    assert spy.handlers == before
    assert recorder.of(TrainEnd)[0].status == "completed"
