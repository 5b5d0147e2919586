"""engine/training/readback.py: at once on a CPU, late and in order on a device."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.engine import (
    Callback,
    Event,
    LossError,
    StepEnd,
    StepPoint,
    Trainer,
    in_step,
)
from offloop.engine.testing import Recorder, reproducible, tiny_batches, tiny_trainer
from offloop.engine.training import readback, reporter
from offloop.engine.training.readback import Readback


class FakeDevice:
    """A device whose copies arrive when the test says so, and which counts how often it was waited for."""

    def __init__(self) -> None:
        self.copies: list[FakeEvent] = []
        self.waits = 0

    def arrive(self, number: int = 1) -> None:
        for event in [event for event in self.copies if not event.has_arrived][: max(0, number)]:
            event.has_arrived = True


class FakeEvent:
    """Takes the place of `torch.cuda.Event`."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.has_arrived = False

    def record(self) -> None:
        self.device.copies.append(self)

    def query(self) -> bool:
        return self.has_arrived

    def synchronize(self) -> None:
        self.device.waits += not self.has_arrived
        self.has_arrived = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(fake))
    monkeypatch.setattr(readback, "_pinned", lambda count: torch.empty(count, dtype=torch.float64))
    return fake


@pytest.fixture
def late(device: FakeDevice) -> Readback:
    made = Readback(torch.device("cpu"))
    made.is_immediate = False
    return made


def keep(seen: list[object]) -> Callable[[list[float]], None]:
    return seen.append


def test_on_a_cpu_values_are_delivered_at_once() -> None:
    seen: list[object] = []
    direct = Readback(torch.device("cpu"))
    direct.read([torch.tensor(1.5), torch.tensor([2])], keep(seen))
    direct.put(lambda: seen.append("put"))
    assert seen == [[1.5, 2.0], "put"]


def test_values_are_delivered_when_they_have_arrived(late: Readback, device: FakeDevice) -> None:
    seen: list[object] = []
    late.read([torch.tensor(1.0)], keep(seen))
    late.poll()
    assert seen == []
    device.arrive()
    late.poll()
    assert seen == [[1.0]]
    assert device.waits == 0


def test_a_later_read_delivers_what_has_arrived_meanwhile(late: Readback, device: FakeDevice) -> None:
    seen: list[object] = []
    late.read([torch.tensor(1.0)], keep(seen))
    late.read([torch.tensor(2.0)], keep(seen))
    device.arrive(2)
    late.read([torch.tensor(3.0)], keep(seen))
    assert seen == [[1.0], [2.0]]


def test_what_arrives_early_waits_for_what_was_read_before(late: Readback, device: FakeDevice) -> None:
    seen: list[object] = []
    late.read([torch.tensor(1.0)], keep(seen))
    late.read([torch.tensor(2.0)], keep(seen))
    device.copies[1].has_arrived = True
    late.poll()
    assert seen == []
    device.arrive()
    late.poll()
    assert seen == [[1.0], [2.0]]


def test_what_is_put_keeps_its_turn(late: Readback, device: FakeDevice) -> None:
    seen: list[object] = []
    late.put(lambda: seen.append("first"))
    late.read([torch.tensor(1.0)], keep(seen))
    late.put(lambda: seen.append("second"))
    late.read([torch.tensor(2.0)], keep(seen))
    assert seen == ["first"]
    device.arrive()
    late.poll()
    assert seen == ["first", [1.0], "second"]


def test_flush_waits_and_delivers_all_in_order(late: Readback, device: FakeDevice) -> None:
    seen: list[object] = []
    late.read([torch.tensor(1.0)], keep(seen))
    late.put(lambda: seen.append("put"))
    late.read([torch.tensor(2.0)], keep(seen))
    late.flush()
    assert seen == [[1.0], "put", [2.0]]
    assert device.waits == 2
    late.flush()
    assert len(seen) == 3


def test_a_value_is_read_as_it_was_when_it_was_given(late: Readback) -> None:
    seen: list[object] = []
    value = torch.tensor(1.0)
    late.read([value], keep(seen))
    value.fill_(2.0)
    late.flush()
    assert seen == [[1.0]]


def test_numbers_keep_their_precision(late: Readback) -> None:
    seen: list[object] = []
    late.read([torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(2**24 + 1)], keep(seen))
    late.flush()
    assert seen == [[1 / 3, 2**24 + 1]]


def test_a_gradient_is_not_held(late: Readback) -> None:
    seen: list[object] = []
    late.read([torch.ones(1, requires_grad=True) * 2], keep(seen))
    late.flush()
    assert seen == [[2.0]]


# In a run -------------------------------------------------------------------------------------------------


class Logs(Trainer):
    """Lets 100 s pass in each step, and logs."""

    passed = 0.0

    def training_step(self, batch: Any) -> Any:
        Logs.passed += 100.0
        self.log("done", torch.tensor(float(self.step)))
        self.log("number", 7)
        return super().training_step(batch)


@pytest.mark.parametrize("lag", [0, 2, 1000])
def test_a_run_on_a_late_device_tells_the_same_story(
    lag: int, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values arrive `lag` copies later, or when somebody waits for them before a milestone."""
    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + Logs.passed)

    class LateReadback(Readback):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.is_immediate = False

        def poll(self) -> None:
            device.arrive(len([each for each in device.copies if not each.has_arrived]) - lag)
            super().poll()

    def run() -> list[Event]:
        recorder = Recorder()
        trainer = tiny_trainer(
            Logs, gradient_clip_val=0.1, accumulate_grad_batches=2, val_every_n_steps=3, callbacks=[recorder]
        )
        trainer.train(tiny_batches(8), tiny_batches(2), epochs=2, metrics=["accuracy"])
        return recorder.events

    expected = run()
    monkeypatch.setattr(reporter, "Readback", LateReadback)
    events = run()
    assert reproducible(events) == reproducible(expected)
    assert device.copies and (device.waits > 0) == (lag > 0)
    times = [event.time for event in events if isinstance(event, StepEnd)]
    # the time of a step is its launch: those delivered together lie two batches apart, too
    assert all(later - earlier >= 200.0 for earlier, later in itertools.pairwise(times))


def test_a_loss_that_turns_out_to_be_nan_fails_the_run_and_not_the_command_that_finds_it(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class LateReadback(Readback):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.is_immediate = False

    class OneNan(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> Any:
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.backward(loss)
            self.optimizer_step()
            return loss * math.nan if self.step == 1 else loss

    class Save(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 3:
                point.run.checkpoint_nowait()

    monkeypatch.setattr(reporter, "Readback", LateReadback)
    trainer = tiny_trainer(OneNan, callbacks=[Save()], run_dir=tmp_path)
    with pytest.raises(LossError, match="the loss of step 2 is nan"):
        trainer.train(tiny_batches(8), epochs=1)
    assert trainer.last_run is not None and trainer.last_run.result.steps == 3
