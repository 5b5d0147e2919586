"""engine/testing.py: the kit does what it says, with real threads."""

import threading
from typing import Any

import anyio
import pytest
import torch

from offloop.engine import (
    Callback,
    CallbackFailed,
    EpochEnd,
    EpochStart,
    Event,
    Metrics,
    Run,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    decides,
)
from offloop.engine.testing import (
    EndlessLoader,
    FailingCallback,
    HangingCallback,
    Recorder,
    SlowCallback,
    WaitsFor,
    drive,
    drive_async,
    reproducible,
    tiny_batches,
    tiny_loader,
    tiny_model,
    tiny_trainer,
)


def epoch(number: int, **metrics: float) -> EpochEnd:
    return EpochEnd(epoch=number, step=number + 1, metrics=Metrics(metrics))


def test_recorder_keeps_everything_in_order_and_forgets_it_before_the_next_run() -> None:
    recorder = Recorder()
    assert recorder.names() == []
    trainer = tiny_trainer(callbacks=[recorder])
    trainer.train(tiny_loader(2), epochs=1)
    names = ["TrainStart", "EpochStart", "StepEnd", "StepEnd", "EpochEnd", "TrainEnd"]
    assert recorder.names() == names
    assert [type(each) for each in recorder.of(StepEnd)] == [StepEnd, StepEnd]
    assert len(recorder.of(Event)) == 6
    assert recorder.is_closed
    assert recorder.run is trainer.last_run
    trainer.train(tiny_loader(2), epochs=1)
    assert recorder.names() == names


def test_recorder_waits_for_what_observers_have_to_say() -> None:
    recorder = Recorder()
    callbacks = [recorder, FailingCallback(EpochStart), FailingCallback(EpochEnd)]
    result = tiny_trainer(callbacks=callbacks).train(
        tiny_loader(1), epochs=1, callbacks=[WaitsFor(recorder, CallbackFailed, times=2)]
    )
    assert result.status == "completed"
    assert {failed.event for failed in recorder.of(CallbackFailed)} == {"EpochStart", "EpochEnd"}


def test_recorder_says_what_did_not_come() -> None:
    recorder = Recorder()
    with pytest.raises(TimeoutError, match="1 of 2 StepEnd came"):
        tiny_trainer(callbacks=[recorder]).train(
            tiny_loader(1), epochs=1, callbacks=[WaitsFor(recorder, StepEnd, times=2, timeout=0.01)]
        )


def test_reproducible_leaves_out_what_names_or_times_a_run_and_what_others_say() -> None:
    def events(*callbacks: Callback) -> list[Event]:
        recorder = Recorder()
        callbacks = (recorder, *callbacks)
        if len(callbacks) > 1:
            callbacks = (*callbacks, WaitsFor(recorder, CallbackFailed))
        tiny_trainer().train(tiny_loader(3), tiny_loader(1), epochs=2, callbacks=callbacks)
        return recorder.events

    plain, disturbed = events(), events(FailingCallback(EpochStart))
    assert [type(each).__name__ for each in plain] != [type(each).__name__ for each in disturbed]
    assert reproducible(plain) == reproducible(disturbed)
    other = Recorder()
    tiny_trainer(lr=0.1).train(tiny_loader(3), tiny_loader(1), epochs=2, callbacks=[other])
    assert reproducible(other.events) != reproducible(plain)


def test_tiny_things_are_the_same_for_the_same_seed_and_draw_from_no_global_generator() -> None:
    def state(model: torch.nn.Module) -> list[torch.Tensor]:
        return list(model.state_dict().values())

    one, same, other = state(tiny_model(seed=1)), state(tiny_model(seed=1)), state(tiny_model(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    before = torch.get_rng_state()
    tiny_model()
    batches = tiny_batches(3)
    tiny_loader(3, shuffle=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [inputs.shape for inputs, _ in batches] == [(4, 8)] * 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, tiny_loader(3), strict=True))


def test_tiny_task_can_be_learned() -> None:
    result = tiny_trainer(lr=0.5).train(tiny_loader(16), epochs=20)
    assert result.metrics["train_loss"] < 0.3 < result.history[0].metrics["train_loss"]


def test_drive_stops_where_a_decider_stops() -> None:
    class StopBelow(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            if event.metrics["val_loss"] < 0.5:
                run.stop_nowait("low")

    driven = drive(
        StopBelow(), events=[epoch(0, val_loss=0.9), epoch(1, val_loss=0.4), epoch(2, val_loss=0.1)]
    )
    assert (driven.result.status, driven.result.reason) == ("stopped", "low")
    assert [type(each).__name__ for each in driven.events] == [
        "TrainStart",
        "EpochEnd",
        "EpochEnd",
        "StateChanged",
        "CommandApplied",
        "TrainEnd",
    ]
    assert [(each.command, each.by) for each in driven.commands] == [("stop", "StopBelow")]
    assert driven.result.metrics == {"val_loss": 0.4}
    assert [each.epoch for each in driven.result.history] == [0, 1]
    assert driven.result.epochs == 2


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_drive_lets_observers_act_before_the_next_event(kind: str) -> None:
    class Async(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.loss is not None and event.loss > 1:
                await run.stop(f"at {event.step}")

    class Plain(Callback):
        def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.loss is not None and event.loss > 1:
                run.stop_nowait(f"at {event.step}")

    events = [StepEnd(loss=loss, lr=0.1, step=step) for step, loss in enumerate([0.5, 0.5, 2.0, 0.5], 1)]
    driven = drive(Async() if kind == "async" else Plain(), events=events)
    assert driven.result.reason == "at 3"
    assert [each.step for each in driven.events if isinstance(each, StepEnd)] == [1, 2, 3]


def test_drive_keeps_positions_and_takes_a_script_with_start_and_end() -> None:
    start = TrainStart(epochs=3, steps_per_epoch=2)
    driven = drive(events=[start, StepEnd(loss=1.0, lr=0.1, epoch=1, step=7, batch=8), TrainEnd(status="x")])
    assert [type(each).__name__ for each in driven.events] == ["TrainStart", "StepEnd", "TrainEnd"]
    first, step, end = driven.events
    assert isinstance(first, TrainStart)
    assert first.epochs == 3
    assert (step.epoch, step.step, step.batch) == (1, 7, 8)
    assert isinstance(end, TrainEnd)
    assert end.status == "completed"
    assert len({each.run_id for each in driven.events}) == 1


def test_drive_may_use_the_same_script_twice() -> None:
    script = [epoch(0, train_loss=1.0), epoch(1, train_loss=0.5)]
    first, second = drive(events=script), drive(events=script)
    assert reproducible(first.events) == reproducible(second.events)
    assert first.result.best is not None
    assert (first.result.best.score, first.result.best.epoch) == (0.5, 1)


def test_drive_raises_what_a_decider_raises_and_closes() -> None:
    class Bad(Callback):
        closed = False

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            raise KeyError("bad")

        def close(self) -> None:
            self.closed = True

    bad = Bad()
    with pytest.raises(KeyError):
        drive(bad, events=[epoch(0)])
    assert bad.closed


@pytest.mark.anyio
async def test_drive_async_works_beside_an_event_loop() -> None:
    with anyio.fail_after(30):
        driven = await drive_async(events=[ValidationEnd(metrics=Metrics(val_loss=1.0))])
    assert [type(each).__name__ for each in driven.events] == ["TrainStart", "ValidationEnd", "TrainEnd"]
    assert driven.result.metrics == {"val_loss": 1.0}


def test_failing_callback_fails_as_often_as_told_with_what_it_is_told() -> None:
    twice = FailingCallback(StepEnd, times=2, error=lambda: LookupError("mine"))
    result = tiny_trainer().train(tiny_loader(5), epochs=1, callbacks=[twice])
    assert result.callback_errors == {"FailingCallback": ("StepEnd: LookupError: mine",) * 2}
    assert twice.raised == 2
    assert twice.is_closed


def test_slow_callback_handles_each_sample() -> None:
    slow = SlowCallback(0.001)
    tiny_trainer().train(tiny_loader(5), epochs=1, callbacks=[slow])
    assert slow.handled == 5


@pytest.mark.parametrize("in_thread", [False, True])
def test_hanging_callback_hangs_until_it_is_released(in_thread: bool) -> None:
    hanging = HangingCallback(in_thread=in_thread)
    result = tiny_trainer(drain_timeout=0.05).train(tiny_loader(1), epochs=1, callbacks=[hanging])
    assert "cancelled" in result.callback_errors["HangingCallback"][0]
    assert hanging.is_closed
    left = [each for each in threading.enumerate() if each.name == "offloop-HangingCallback"]
    assert len(left) == in_thread
    hanging.release()
    for each in left:
        each.join(30)
        assert not each.is_alive()


def test_endless_loader_has_no_length_and_no_end() -> None:
    loader: Any = EndlessLoader()
    with pytest.raises(TypeError):
        len(loader)
    iterator = iter(loader)
    assert len([next(iterator) for _ in range(200)]) == 200
