"""Children that are killed at random moments. Fifty runs, about a minute: `pytest -m soak tests/engine/processes`."""

import os
import random
import signal
import threading
from typing import Final

import pytest

from offloop.engine import Callback, EpochEnd, Event, RunHandle, StepPoint, TrainStart, in_step
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

EPOCHS: Final = 40


class Begun(Event, frozen=True):
    """A child is at work."""

    pid: int


class AtWork(Callback):
    """Computes in a process of its own."""

    runs_in = "process"

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Begun(pid=os.getpid()))

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        sum(range(200_000))


class Kills(Callback):
    """Kills the child in one of the steps after it has begun, and lets training wait for it to begin."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps
        self.pid = 0
        self.begun = threading.Event()

    def on_begun(self, event: Begun, run: RunHandle) -> None:
        self.pid = event.pid
        self.begun.set()

    @in_step
    def after_step(self, point: StepPoint) -> None:
        assert self.begun.wait(60)
        self.left -= 1
        if self.left == 0:
            os.kill(self.pid, signal.SIGKILL)


def kill_in_runs(count: int, seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(count):
        recorder = Recorder()
        steps = generator.randint(1, EPOCHS * 8)
        result = tiny_trainer().train(
            tiny_loader(), epochs=EPOCHS, callbacks=[AtWork(), Kills(steps), recorder]
        )
        assert result.status == "completed"
        assert [event.epoch for event in recorder.of(EpochEnd)] == list(range(EPOCHS))
        (error,) = result.callback_errors["AtWork"]
        assert "ended with SIGKILL (exit code -9)" in error


def test_runs_survive_children_that_are_killed() -> None:
    kill_in_runs(3, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_fifty_runs_survive_children_that_are_killed() -> None:
    kill_in_runs(50, seed=1)
