"""engine/session/session.py: whole event sequences, every way a run can end, and several runs at once."""

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import random
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
import trio
from warm_python import WarmPython

from offloop.callbacks import LearningRateScheduler, ModelCheckpoint, WeightAverage
from offloop.engine import (
    BusClosedError,
    Callback,
    CallbackFailed,
    CheckpointSaved,
    ConfigError,
    EpochEnd,
    EpochStart,
    Event,
    Run,
    RunEndedError,
    RunResult,
    Sample,
    StateChanged,
    StepEnd,
    StepPoint,
    TrainEnd,
    Trainer,
    TrainerBusyError,
    TrainStart,
    ValidationEnd,
    WeightsMismatchError,
    decides,
    in_step,
    read_events,
)
from offloop.engine.observers import observer as observer_module
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.session import session as session_module
from offloop.engine.session import storage as storage_module
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.testing import (
    EndlessLoader,
    FailingCallback,
    HangingCallback,
    Recorder,
    SlowCallback,
    WaitsFor,
    reproducible,
    tiny_batches,
    tiny_loader,
    tiny_model,
    tiny_trainer,
)
from offloop.engine.training.setup import Batch
from offloop.engine.training.step_output import StepOutput

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


class Remark(Event, frozen=True):
    """A milestone of the tests'."""

    text: str = ""


LONG = 30.0  # seconds that nothing here should take, also on a busy machine
ENDLESS = 1_000_000_000  # steps


@pytest.fixture(autouse=True, scope="module")
def torch_is_warm() -> None:
    """The first optimizer of a process imports half of torch, which would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


@pytest.fixture(autouse=True)
def switches_are_put_back() -> Iterator[None]:
    yield
    assert not torch.are_deterministic_algorithms_enabled()


def lines(recorder: Recorder) -> list[str]:
    """Every event as `Name epoch/step/batch`, with what distinguishes it."""

    def line(event: Event) -> str:
        more = [str(getattr(event, name)) for name in ("state", "command", "status") if hasattr(event, name)]
        return " ".join([type(event).__name__, *more, f"{event.epoch}/{event.step}/{event.batch}"])

    return [line(event) for event in recorder.events]


class Started(Callback):
    """Tells a test that steps are being made, and keeps the run."""

    def __init__(self) -> None:
        self.stepped = anyio.Event()
        self.is_closed = False

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        self.stepped.set()

    async def close(self) -> None:
        self.is_closed = True


class ClosedInThread(Callback):
    """Has a plain `close`, which runs in its worker thread."""

    def __init__(self) -> None:
        self.closes = 0

    def close(self) -> None:
        self.closes += 1


class At(Callback):
    """Calls a function in the training thread, at a point of one step."""

    def __init__(self, step: int, act: Callable[[Run], object], *, point: str = "after_step") -> None:
        self.step, self.act, self.point = step, act, point
        self.acted = False

    def _maybe(self, point: StepPoint) -> None:
        if point.name == self.point and point.step >= self.step and not self.acted:
            self.acted = True
            self.act(point.run)

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self._maybe(point)

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        self._maybe(point)

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        self._maybe(point)


class StopAt(Callback):
    """Stops the run at the first event of a class, as a decider."""

    def __init__(self, event_class: type[Event]) -> None:
        self.event_class = event_class

    def _decide(self, event: Event, run: Run) -> None:
        if isinstance(event, self.event_class):
            run.stop_nowait(f"decided at {type(event).__name__}")

    @decides
    def on_train_start(self, event: Event, run: Run) -> None:
        self._decide(event, run)

    @decides
    def on_epoch_start(self, event: Event, run: Run) -> None:
        self._decide(event, run)

    @decides
    def on_validation_end(self, event: Event, run: Run) -> None:
        self._decide(event, run)

    @decides
    def on_epoch_end(self, event: Event, run: Run) -> None:
        self._decide(event, run)


# Whole sequences ---------------------------------------------------------------------------------

EPOCH_0 = ["EpochStart 0/0/0", "StepEnd 0/1/1", "StepEnd 0/2/2"]


@pytest.mark.anyio
async def test_normal_run_with_validation_says_all_this() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(
            tiny_loader(2), tiny_loader(1), epochs=2, callbacks=[recorder]
        )
    assert lines(recorder) == [
        "TrainStart 0/0/0",
        *EPOCH_0,
        "ValidationStart 0/2/2",
        "ValidationEnd 0/2/2",
        "EpochEnd 0/2/2",
        "EpochStart 1/2/2",
        "StepEnd 1/3/3",
        "StepEnd 1/4/4",
        "ValidationStart 1/4/4",
        "ValidationEnd 1/4/4",
        "EpochEnd 1/4/4",
        "TrainEnd completed 1/4/4",
    ]
    assert [event.seq for event in recorder.events] == list(range(len(recorder.events)))
    assert {event.run_id for event in recorder.events} == {result.run_id}
    times = [event.time for event in recorder.events]
    assert times == sorted(times)
    assert (result.status, result.epochs, result.steps) == ("completed", 2, 4)
    assert [end.metrics for end in result.history] == [end.metrics for end in recorder.of(EpochEnd)]
    assert result.metrics["val_loss"] == recorder.of(ValidationEnd)[-1].metrics["val_loss"]
    assert recorder.of(TrainEnd)[0].metrics == result.metrics


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (TrainStart, ["StateChanged stopping 0/0/0", "CommandApplied stop 0/0/0", "TrainEnd stopped 0/0/0"]),
        (
            EpochStart,
            [
                "EpochStart 0/0/0",
                "StateChanged stopping 0/0/0",
                "CommandApplied stop 0/0/0",
                "TrainEnd stopped 0/0/0",
            ],
        ),
        (
            ValidationEnd,
            [
                *EPOCH_0,
                "ValidationStart 0/2/2",
                "ValidationEnd 0/2/2",
                "StateChanged stopping 0/2/2",
                "CommandApplied stop 0/2/2",
                "EpochEnd 0/2/2",  # the epoch was finished, so its end is said
                "TrainEnd stopped 0/2/2",
            ],
        ),
        (
            EpochEnd,
            [
                *EPOCH_0,
                "ValidationStart 0/2/2",
                "ValidationEnd 0/2/2",
                "EpochEnd 0/2/2",
                "StateChanged stopping 0/2/2",
                "CommandApplied stop 0/2/2",
                "TrainEnd stopped 0/2/2",
            ],
        ),
    ],
)
def test_decider_stops_at_its_very_boundary(where: type[Event], expected: list[str]) -> None:
    recorder = Recorder()
    result = tiny_trainer().train(
        tiny_loader(2), tiny_loader(1), epochs=9, callbacks=[recorder, StopAt(where)]
    )
    assert lines(recorder) == ["TrainStart 0/0/0", *expected]
    assert (result.status, result.reason) == ("stopped", f"decided at {where.__name__}")
    assert result.epochs == (1 if where in (ValidationEnd, EpochEnd) else 0)


def test_pause_and_resume_leave_everything_else_as_it_was() -> None:
    class Resume(Callback):
        async def on_state_changed(self, event: StateChanged, run: Run) -> None:
            if event.state == "paused":
                assert run.state == "paused"
                await run.resume()

    recorder = Recorder()
    pause = At(1, lambda run: run.pause_nowait("tea"))
    tiny_trainer().train(tiny_loader(2), epochs=1, callbacks=[recorder, Resume(), pause])
    assert lines(recorder) == [
        "TrainStart 0/0/0",
        "EpochStart 0/0/0",
        "StepEnd 0/1/1",
        "StateChanged paused 0/1/1",
        "CommandApplied pause 0/1/1",
        "StateChanged running 0/1/1",
        "CommandApplied resume 0/1/1",
        "StepEnd 0/2/2",
        "EpochEnd 0/2/2",
        "TrainEnd completed 0/2/2",
    ]


@pytest.mark.anyio
async def test_what_is_published_at_once_follows_the_first_event_into_the_log(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=tmp_path)
    async with trainer.start(tiny_loader(4), epochs=1) as run:
        for number in range(3):
            run.publish(Remark(text=str(number)))
    events = list(read_events(tmp_path / run.id))
    assert [type(event) for event in events[:4]] == [TrainStart, Remark, Remark, Remark]
    assert [event.text for event in events if isinstance(event, Remark)] == ["0", "1", "2"]
    assert run.result.callback_errors == {}


def test_a_run_that_fails_before_its_first_event_waits_for_no_callback(tmp_path: Path) -> None:
    recorder = Recorder()
    # If the run waited, this test would not end.
    trainer = tiny_trainer(run_dir=tmp_path, drain_timeout=1000.0)
    with pytest.raises(WeightsMismatchError):
        trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder], init_from={"other": torch.zeros(1)})
    assert recorder.names() == ["TrainEnd"]


def test_stop_in_a_validation_ends_it_without_its_end() -> None:
    recorder = Recorder()
    stop = At(2, lambda run: run.stop_nowait(), point="before_validation")
    result = tiny_trainer().train(tiny_loader(2), tiny_loader(3), epochs=9, callbacks=[recorder, stop])
    assert lines(recorder) == [
        "TrainStart 0/0/0",
        *EPOCH_0,
        "ValidationStart 0/2/2",
        "StateChanged stopping 0/2/2",
        "CommandApplied stop 0/2/2",
        "TrainEnd stopped 0/2/2",
    ]
    assert (result.epochs, result.history) == (0, ())


def test_stop_waits_for_the_end_of_the_accumulation_window_and_pause_does_not() -> None:
    class Resume(Callback):
        async def on_state_changed(self, event: StateChanged, run: Run) -> None:
            if event.state == "paused":
                await run.resume()

    def act(run: Run) -> None:
        run.stop_nowait()
        run.resume_nowait()

    recorder = Recorder()
    in_window = At(1, act, point="before_batch")  # the first batch of the second window
    trainer = tiny_trainer(accumulate_grad_batches=3)
    trainer.train(tiny_loader(9), epochs=9, callbacks=[recorder, in_window])
    assert lines(recorder) == [
        "TrainStart 0/0/0",
        "EpochStart 0/0/0",
        "StepEnd 0/1/3",
        "CommandApplied resume 0/1/4",
        "StepEnd 0/2/6",
        "StateChanged stopping 0/2/6",
        "CommandApplied stop 0/2/6",
        "TrainEnd stopped 0/2/6",
    ]


def test_cancelled_run_leaves_at_the_next_batch() -> None:
    recorder = Recorder()
    cancel = At(1, lambda run: run.cancel("enough"))
    result = tiny_trainer().train(tiny_loader(2), tiny_loader(1), epochs=9, callbacks=[recorder, cancel])
    assert lines(recorder) == [
        "TrainStart 0/0/0",
        "EpochStart 0/0/0",
        "StepEnd 0/1/1",
        "StateChanged stopping 0/1/1",
        "TrainEnd cancelled 0/1/1",
    ]
    assert (result.status, result.reason) == ("cancelled", "enough")


def test_cancel_in_an_accumulation_window_does_not_finish_it() -> None:
    recorder = Recorder()
    cancel = At(1, lambda run: run.cancel(), point="before_batch")
    trainer = tiny_trainer(accumulate_grad_batches=3)
    trainer.train(tiny_loader(9), epochs=9, callbacks=[recorder, cancel])
    assert lines(recorder)[2:] == [
        "StepEnd 0/1/3",
        "StateChanged stopping 0/1/4",
        "TrainEnd cancelled 0/1/4",
    ]


class Fault(Exception):
    """What fails here."""


class FailingTrainer(Trainer):
    """Fails in a step or in a validation."""

    fail_at: str = ""

    def training_step(self, batch: Batch) -> StepOutput:
        if self.fail_at == "step" and self.step == 1:
            raise Fault("in the step")
        return super().training_step(batch)

    def validation_step(self, batch: Batch) -> StepOutput:
        if self.fail_at == "validation":
            raise Fault("in the validation")
        return Trainer.training_step(self, batch)


class FailingDecider(Callback):
    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        raise Fault("in a decider")


class FailingAsyncDecider(Callback):
    @decides
    async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        raise Fault("in a decider")


class FailingHook(Callback):
    @in_step
    def before_forward(self, point: StepPoint) -> None:
        raise Fault("in a step hook")


@pytest.mark.parametrize(
    ("fail_at", "callbacks", "expected"),
    [
        ("step", [], ["EpochStart 0/0/0", "StepEnd 0/1/1"]),
        ("validation", [], [*EPOCH_0, "ValidationStart 0/2/2"]),
        ("", [FailingDecider], ["EpochStart 0/0/0"]),
        ("", [FailingAsyncDecider], ["EpochStart 0/0/0"]),
        ("", [FailingHook], ["EpochStart 0/0/0"]),
    ],
    ids=["step", "validation", "decider", "async decider", "step hook"],
)
@pytest.mark.anyio
async def test_failure_reaches_the_caller_once_unwrapped_and_with_a_note(
    fail_at: str, callbacks: list[type[Callback]], expected: list[str]
) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(FailingTrainer)
    assert isinstance(trainer, FailingTrainer)
    trainer.fail_at = fail_at
    with anyio.fail_after(LONG), pytest.raises(Fault) as caught:
        await trainer.train_async(
            tiny_loader(2), tiny_loader(1), epochs=9, callbacks=[recorder, *(each() for each in callbacks)]
        )
    said = lines(recorder)
    assert said == ["TrainStart 0/0/0", *expected, "TrainEnd failed " + expected[-1].split()[-1]]
    assert trainer.last_run is not None
    result = trainer.last_run.result
    assert result.status == "failed"
    assert [result.run_id in note for note in caught.value.__notes__] == [True]
    assert recorder.of(TrainEnd)[0].error == f"Fault: {caught.value}"
    assert "raise Fault(" in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    assert recorder.is_closed


@pytest.mark.anyio
@pytest.mark.parametrize("in_thread", [False, True])
async def test_observer_that_may_fail_the_run_does(in_thread: bool) -> None:
    class Async(Callback):
        on_error = "raise"

        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            raise Fault("in an observer")

    class Plain(Callback):
        on_error = "raise"

        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            raise Fault("in an observer")

    recorder = Recorder()
    trainer = tiny_trainer()
    with anyio.fail_after(LONG), pytest.raises(Fault):
        await trainer.train_async(
            EndlessLoader(),
            max_steps=ENDLESS,
            callbacks=[
                recorder,
                Plain() if in_thread else Async(),
                At(2, lambda run: publish_epoch_end(run)),
            ],
        )
    assert trainer.last_run is not None
    assert trainer.last_run.result.status == "failed"
    assert recorder.names()[-1] == "TrainEnd"
    assert recorder.of(TrainEnd)[0].status == "failed"


def publish_epoch_end(run: Run) -> None:
    run.publish(EpochEnd())


@pytest.mark.parametrize("in_thread", [False, True])
def test_observer_that_fails_the_run_late_is_heard_before_train_end(in_thread: bool) -> None:
    """A short run is over before its observers have seen much of it; `on_error="raise"` holds nevertheless."""

    class Async(Callback):
        on_error = "raise"

        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            await anyio.lowlevel.checkpoint()
            raise Fault("late")

    class Plain(Callback):
        on_error = "raise"

        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            raise Fault("late")

    recorder = Recorder()
    trainer = tiny_trainer()
    with pytest.raises(Fault):
        trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder, Plain() if in_thread else Async()])
    assert trainer.last_run is not None
    assert recorder.of(TrainEnd)[0].status == trainer.last_run.result.status == "failed"


def test_failure_in_train_end_is_only_listed_as_nothing_is_left_to_fail() -> None:
    class Late(Callback):
        on_error = "raise"

        async def on_train_end(self, event: TrainEnd, run: Run) -> None:
            raise Fault("too late")

    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[recorder, Late()])
    assert recorder.of(TrainEnd)[0].status == result.status == "completed"
    assert result.callback_errors == {"Late": ("TrainEnd: Fault: too late",)}


def test_failing_observers_are_isolated_and_train_end_stays_the_last_event() -> None:
    recorder = Recorder()
    failing = [FailingCallback(StepEnd), FailingCallback(EpochEnd), FailingCallback(TrainEnd, times=1)]
    waits = WaitsFor(recorder, CallbackFailed, times=2)
    result = tiny_trainer().train(tiny_loader(20), epochs=3, callbacks=[recorder, *failing, waits])
    assert result.status == "completed"
    assert recorder.names()[-1] == "TrainEnd"
    assert recorder.names().count("TrainEnd") == 1
    assert {failed.callback for failed in recorder.of(Event) if hasattr(failed, "callback")} == {
        "FailingCallback",
        "FailingCallback#2",
    }
    assert result.callback_errors["FailingCallback#2"] == ("EpochEnd: RuntimeError: injected",) * 3
    assert result.callback_errors["FailingCallback#3"] == ("TrainEnd: RuntimeError: injected",)
    assert all(each.is_closed for each in failing)


def test_decider_that_isolates_is_reported_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "FAILURE_INTERVAL", LONG)

    class Isolated(Callback):
        on_error = "isolate"

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            raise Fault("never mind")

    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(1), epochs=2, callbacks=[recorder, Isolated()])
    assert result.status == "completed"
    assert result.callback_errors == {"Isolated": ("EpochEnd: Fault: never mind",) * 2}
    assert recorder.names().count("CallbackFailed") == 1  # at most one a second


def test_isolated_decider_is_asked_again_however_often_it_fails_and_its_observers_go_on() -> None:
    class Isolated(Callback):
        on_error = "isolate"

        def __init__(self) -> None:
            self.seen: list[str] = []

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            raise Fault("never mind")

        def on_train_end(self, event: TrainEnd, run: Run) -> None:
            self.seen.append(event.status)

    recorder, isolated = Recorder(), Isolated()
    result = tiny_trainer().train(tiny_loader(1), epochs=12, callbacks=[recorder, isolated])
    assert result.callback_errors == {"Isolated": ("EpochEnd: Fault: never mind",) * 12}
    assert isolated.seen == ["completed"]
    assert not any(failed.disabled for failed in recorder.of(CallbackFailed))


# Deciders ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_async_decider_is_waited_for_and_its_command_applies_there() -> None:
    class Async(Callback):
        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            await anyio.lowlevel.checkpoint()
            await run.stop("thought about it")

    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(tiny_loader(1), epochs=9, callbacks=[Async(), recorder])
    assert lines(recorder)[-4:] == [
        "EpochEnd 0/1/1",
        "StateChanged stopping 0/1/1",
        "CommandApplied stop 0/1/1",
        "TrainEnd stopped 0/1/1",
    ]
    assert result.reason == "thought about it"


@pytest.mark.anyio
@pytest.mark.parametrize("plain", [False, True])
async def test_decider_sees_what_its_own_observers_saw_before(plain: bool) -> None:
    class Plain(Callback):
        def __init__(self) -> None:
            self.seen: list[str] = []

        async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            await anyio.lowlevel.checkpoint()
            self.seen.append(f"observed validation of step {event.step}")

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            self.seen.append(f"decided at step {event.step}")

    class Async(Plain):
        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:  # type: ignore[override]  # another place
            self.seen.append(f"decided at step {event.step}")

    decider = Plain() if plain else Async()
    with anyio.fail_after(LONG):
        await tiny_trainer().train_async(tiny_loader(1), tiny_loader(1), epochs=2, callbacks=[decider])
    assert decider.seen == [
        "observed validation of step 1",
        "decided at step 1",
        "observed validation of step 2",
        "decided at step 2",
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("plain", [False, True])
async def test_decider_goes_on_deciding_after_its_own_observers_were_turned_off(plain: bool) -> None:
    class Plain(Callback):
        def __init__(self) -> None:
            self.decided = 0

        async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            raise Fault("each time")

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            self.decided += 1

    class Async(Plain):
        on_error = "isolate"

        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:  # type: ignore[override]  # another place
            self.decided += 1

    decider = Plain() if plain else Async()
    with anyio.fail_after(LONG):
        await tiny_trainer().train_async(tiny_loader(1), tiny_loader(1), epochs=15, callbacks=[decider])
    assert decider.decided == 15


@pytest.mark.anyio
async def test_deciders_decide_in_declared_order() -> None:
    order: list[str] = []

    class Plain(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            order.append("plain")

    class Async(Callback):
        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            await anyio.lowlevel.checkpoint()
            order.append("async")

    with anyio.fail_after(LONG):
        await tiny_trainer(callbacks=[Async()]).train_async(
            tiny_loader(1), epochs=2, callbacks=[Plain(), Async()]
        )
    assert order == ["async", "plain", "async"] * 2


@pytest.mark.anyio
async def test_async_decider_with_a_timeout_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    class Patient(Callback):
        @decides(timeout=0.01)
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            await anyio.sleep_forever()

    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(tiny_loader(1), epochs=2, callbacks=[Patient()])
    assert (result.status, result.epochs) == ("completed", 2)
    warned = [record.getMessage() for record in caplog.records if "took longer" in record.getMessage()]
    assert len(warned) == 2
    assert "Patient.on_epoch_end" in warned[0]


@pytest.mark.anyio
async def test_cancel_frees_training_from_an_async_decider_and_cancels_it() -> None:
    class Stuck(Callback):
        def __init__(self) -> None:
            self.was_cancelled = False

        @decides
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            run.cancel("from inside")
            try:
                await anyio.sleep_forever()
            finally:
                self.was_cancelled = True

    stuck, recorder = Stuck(), Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[stuck, recorder])
    assert result.status == "cancelled"
    assert stuck.was_cancelled
    assert lines(recorder)[-2:] == ["StateChanged stopping 0/0/0", "TrainEnd cancelled 0/0/0"]


@pytest.mark.anyio
async def test_decider_may_await_a_task_that_awaits_a_command() -> None:
    """Whoever is waited for never waits for the waiting one: the command returns on acceptance."""

    class Entangled(Callback):
        def __init__(self) -> None:
            self.wish, self.granted = anyio.Event(), anyio.Event()

        @decides
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            self.wish.set()
            await self.granted.wait()

    entangled, recorder = Entangled(), Recorder()
    trainer = tiny_trainer()
    with anyio.fail_after(LONG):
        async with trainer.start(tiny_loader(1), epochs=1, callbacks=[entangled, recorder]) as run:
            await entangled.wish.wait()
            await run.set_lr(0.125)
            assert await run.call(lambda trainer: 1) is None  # accepted, not applied yet
            entangled.granted.set()
    assert lines(recorder)[1:6] == [
        "EpochStart 0/0/0",
        "LearningRateChanged 0/0/0",
        "CommandApplied set_lr 0/0/0",
        "CommandApplied call 0/0/0",
        "StepEnd 0/1/1",
    ]
    assert recorder.of(StepEnd)[0].lr == 0.125


@pytest.mark.anyio
async def test_command_given_before_a_decider_is_asked_returns_on_acceptance_too() -> None:
    class Entangled(Callback):
        def __init__(self) -> None:
            self.granted = anyio.Event()

        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            await self.granted.wait()

    entangled = Entangled()
    trainer = tiny_trainer(accumulate_grad_batches=2)
    may_go_on = threading.Event()
    hold = At(0, lambda run: may_go_on.wait(), point="before_batch")
    with anyio.fail_after(LONG):
        async with trainer.start(tiny_loader(2), epochs=1, callbacks=[entangled, hold]) as run:
            async with anyio.create_task_group() as tasks:

                async def steer() -> None:
                    await run.call(lambda trainer: None)  # given in the window, waits for its end
                    entangled.granted.set()

                tasks.start_soon(steer)
                await anyio.wait_all_tasks_blocked()
                may_go_on.set()
    assert run.result.status == "completed"


# Cancellation ------------------------------------------------------------------------------------


class Watched:
    """A run that somebody will cancel, and what must be true of it afterwards."""

    def __init__(self, *more: Callback, **knobs: Any) -> None:
        self.started, self.in_thread, self.recorder = Started(), ClosedInThread(), Recorder()
        self.trainer = tiny_trainer(**knobs)
        self.callbacks = [self.started, self.in_thread, self.recorder, *more]

    async def train(self) -> RunResult:
        return await self.trainer.train_async(EndlessLoader(), max_steps=ENDLESS, callbacks=self.callbacks)

    def assert_over(self, status: str = "cancelled") -> None:
        assert self.trainer.last_run is not None
        assert self.trainer.last_run.result.status == status
        assert self.trainer.last_run.state == status
        assert self.started.is_closed
        assert self.in_thread.closes == 1
        assert self.recorder.is_closed
        assert [each.name for each in threading.enumerate() if each.name.startswith("offloop")] == []

    def assert_drained(self) -> None:
        assert self.recorder.names()[-1] == "TrainEnd"


@pytest.mark.anyio
async def test_anyio_scope_cancels_a_run() -> None:
    watched = Watched()
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watched.train)
            await watched.started.stepped.wait()
            tasks.cancel_scope.cancel()
    watched.assert_over()
    watched.assert_drained()


@pytest.mark.anyio
async def test_move_on_after_cancels_a_run() -> None:
    watched = Watched()
    with anyio.fail_after(LONG), anyio.move_on_after(0.2) as scope:
        await watched.train()
    assert scope.cancelled_caught
    watched.assert_over()
    watched.assert_drained()


def test_asyncio_timeout_cancels_a_run() -> None:
    watched = Watched()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await watched.train()
        watched.assert_over()

    asyncio.run(main())
    watched.assert_drained()


@pytest.mark.parametrize("cancels", [1, 3])
def test_task_cancel_once_and_in_a_row(cancels: int) -> None:
    watched = Watched()

    async def main() -> None:
        task = asyncio.create_task(watched.train())
        await watched.started.stepped.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        watched.assert_over()

    asyncio.run(asyncio.wait_for(main(), LONG))
    watched.assert_drained()


def test_final_sweep_of_asyncio_run_stops_the_thread_and_closes() -> None:
    watched = Watched()
    tasks = []

    async def main() -> None:
        tasks.append(asyncio.create_task(watched.train()))
        await watched.started.stepped.wait()

    asyncio.run(main())
    watched.assert_over()


@pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning"
)  # of anyio's, swept unstarted
def test_final_sweep_before_the_run_has_begun_leaves_the_trainer_free() -> None:
    watched = Watched()
    tasks = []

    async def main() -> None:
        tasks.append(asyncio.create_task(watched.train()))
        await asyncio.sleep(0)  # the task has claimed the trainer; its supervisor has not run yet

    asyncio.run(main())
    result = watched.trainer.train(tiny_loader(1), epochs=1, callbacks=watched.callbacks)
    assert result.status == "completed"


def test_trio_nursery_cancels_a_run() -> None:
    watched = Watched()

    async def main() -> None:
        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watched.train)
                await watched.started.stepped.wait()
                nursery.cancel_scope.cancel()

    trio.run(main)
    watched.assert_over()
    watched.assert_drained()


@pytest.mark.anyio
async def test_exception_in_the_body_stops_the_run_and_is_not_wrapped() -> None:
    watched = Watched()
    with anyio.fail_after(LONG), pytest.raises(Fault, match="in the body"):
        async with watched.trainer.start(EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks):
            await watched.started.stepped.wait()
            raise Fault("in the body")
    watched.assert_over("stopped")
    watched.assert_drained()


@pytest.mark.anyio
async def test_system_exit_in_the_body_ends_the_run_and_is_not_wrapped() -> None:
    watched = Watched()

    async def body() -> None:
        async with watched.trainer.start(EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks):
            await watched.started.stepped.wait()
            raise SystemExit(3)

    with anyio.fail_after(LONG), pytest.raises(SystemExit):
        await body()
    watched.assert_over("stopped")


@pytest.mark.anyio
async def test_failing_run_cancels_the_body_and_raises_unwrapped() -> None:
    def fail(run: Run) -> NoReturn:
        raise Fault("in a step hook")

    watched = Watched(At(3, fail))
    was_cancelled = False
    with anyio.fail_after(LONG), pytest.raises(Fault, match="in a step hook"):
        async with watched.trainer.start(EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks):
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                was_cancelled = True
                raise
    assert was_cancelled
    watched.assert_over("failed")
    watched.assert_drained()


@pytest.mark.anyio
async def test_failures_of_run_and_body_that_have_nothing_in_common_are_both_raised() -> None:
    def fail(run: Run) -> NoReturn:
        raise Fault("in the run")

    watched = Watched(At(3, fail))
    with anyio.fail_after(LONG), pytest.raises(BaseExceptionGroup) as caught:
        async with watched.trainer.start(EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks):
            try:
                await anyio.sleep_forever()
            finally:
                raise KeyError("while cleaning up")
    assert sorted(type(each).__name__ for each in caught.value.exceptions) == ["Fault", "KeyError"]
    watched.assert_over("failed")


@pytest.mark.anyio
async def test_leaving_the_body_waits_for_the_end() -> None:
    async with tiny_trainer().start(tiny_loader(2), epochs=2) as run:
        assert run.state in ("starting", "running", "closing", "completed")
    assert run.result.status == "completed"
    assert run.state == "completed"


@pytest.mark.anyio
async def test_task_group_start_returns_the_run() -> None:
    watched = Watched()
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            start = partial(
                watched.trainer.train_async, EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks
            )
            run: Run = await tasks.start(start)
            await watched.started.stepped.wait()
            await run.stop("done here")
            assert (await run.wait()).reason == "done here"
    watched.assert_over("stopped")


@pytest.mark.anyio
async def test_cancel_while_paused() -> None:
    watched = Watched()
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watched.train)
            await watched.started.stepped.wait()
            assert watched.trainer.last_run is not None
            await watched.trainer.last_run.pause()
            assert watched.trainer.last_run.state == "paused"
            tasks.cancel_scope.cancel()
    watched.assert_over()
    watched.assert_drained()


@pytest.mark.anyio
async def test_cancel_of_the_task_while_an_async_decider_is_at_work() -> None:
    class Stuck(Callback):
        def __init__(self) -> None:
            self.reached = anyio.Event()

        @decides
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            self.reached.set()
            await anyio.sleep_forever()

    stuck = Stuck()
    watched = Watched(stuck)
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watched.train)
            await stuck.reached.wait()
            tasks.cancel_scope.cancel()
    watched.assert_over()
    watched.assert_drained()


@pytest.mark.anyio
async def test_cancel_during_the_drain_lets_callbacks_finish() -> None:
    class Last(Callback):
        def __init__(self) -> None:
            self.reached, self.release = anyio.Event(), anyio.Event()
            self.finished = False

        async def on_train_end(self, event: TrainEnd, run: Run) -> None:
            assert run.state == "closing"
            self.reached.set()
            await self.release.wait()
            self.finished = True

    last, recorder = Last(), Recorder()
    trainer = tiny_trainer()
    with anyio.fail_after(LONG):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(
                    partial(trainer.train_async, tiny_loader(1), epochs=1, callbacks=[last, recorder])
                )
                await last.reached.wait()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.wait_all_tasks_blocked()
                    last.release.set()
    assert last.finished
    assert recorder.is_closed
    assert trainer.last_run is not None
    assert trainer.last_run.result.status == "completed"  # it was over when the cancellation came


@pytest.mark.anyio
async def test_step_that_does_not_end_after_a_cancel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "STACK_INTERVAL", 0.01)
    reached, release = threading.Event(), threading.Event()
    said: list[str] = []

    class Stuck(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            reached.set()
            assert release.wait(LONG)
            return super().forward(inputs)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            if len(said) == 2:  # it is said again and again
                release.set()

    listener = Listener(logging.WARNING)
    logging.getLogger("offloop").addHandler(listener)
    watched = Watched(model=Stuck(8, 3))
    try:
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watched.train)
                await anyio.to_thread.run_sync(reached.wait)
                assert not said  # a step may take its time while nobody wants it to end
                tasks.cancel_scope.cancel()
    finally:
        logging.getLogger("offloop").removeHandler(listener)
    watched.assert_over()
    for text in said[:2]:
        assert "the training thread has not reached its next batch yet" in text
        assert "release.wait(LONG)" in text


@pytest.mark.anyio
async def test_cancel_during_set_up() -> None:
    reached, release = threading.Event(), threading.Event()

    class SlowToMove(torch.nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> "SlowToMove":
            reached.set()
            assert release.wait(LONG)
            return self

    watched = Watched(model=SlowToMove(8, 3))
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watched.train)
            await anyio.to_thread.run_sync(reached.wait)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            release.set()
    watched.assert_over()
    assert lines(watched.recorder) == [
        "TrainStart 0/0/0",
        "StateChanged stopping 0/0/0",
        "TrainEnd cancelled 0/0/0",
    ]


def test_cancel_in_the_middle_of_many_moments_always_ends_well() -> None:
    """Cancellation at any point between start and end; the places are chosen by how often the loop turned."""

    async def main(turns: int) -> None:
        recorder, in_thread = Recorder(), ClosedInThread()
        trainer = tiny_trainer(flush_interval=0.001)
        callbacks: list[Callback] = [recorder, in_thread]
        task = asyncio.create_task(trainer.train_async(tiny_loader(4), epochs=2, callbacks=callbacks))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if trainer.last_run is not None:  # else it was cancelled before it began
            assert recorder.is_closed
            assert in_thread.closes == 1
            assert trainer.last_run.result.status in ("cancelled", "completed")
            assert recorder.names()[-1] == "TrainEnd"

    for turns in (0, 1, 2, 3, 4, 5, 8, 12):
        asyncio.run(asyncio.wait_for(main(turns), LONG))


# The event loop ----------------------------------------------------------------------------------


def test_training_goes_on_while_a_handler_blocks_the_event_loop() -> None:
    release = threading.Event()

    class Blocking(Callback):
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            assert release.wait(LONG)  # 200 steps are made meanwhile, else nobody would set it

    recorder = Recorder()
    result = tiny_trainer().train(
        EndlessLoader(),
        max_steps=300,
        callbacks=[Blocking(), At(200, lambda run: release.set()), recorder],
    )
    assert result.status == "completed"
    assert len(recorder.of(StepEnd)) == 300
    assert result.callback_costs["Blocking"].longest_hold > 0


def test_event_loop_that_is_closed_in_mid_run_ends_the_run() -> None:
    watched = Watched()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it would complain about the tasks left in it
    task = loop.create_task(
        watched.trainer.train_async(tiny_loader(4), epochs=ENDLESS, callbacks=watched.callbacks)
    )
    loop.run_until_complete(watched.started.stepped.wait())
    assert watched.trainer.last_run is not None
    thread = next(each for each in threading.enumerate() if each.name.startswith("offloop-training"))
    loop.close()
    thread.join(LONG)
    assert not thread.is_alive()
    watched.assert_over()
    assert watched.trainer.last_run.result.reason == "the event loop is gone"
    assert not task.done()
    watched.trainer.train(tiny_loader(1), epochs=1)  # it is free again
    with contextlib.suppress(RuntimeError):  # it waits for its children, which nobody will ever run
        task.get_coro().close()  # gives back the socket that it waits on


# Several runs ------------------------------------------------------------------------------------


def weights(trainer: Trainer) -> bytes:
    return b"".join(value.detach().numpy().tobytes() for value in trainer.model.state_dict().values())


def run_of(seed: int) -> Trainer:
    trainer = tiny_trainer(seed_model=seed)
    trainer.train(tiny_loader(6, seed=seed, shuffle=True), tiny_loader(2, seed=seed), epochs=3)
    return trainer


def test_runs_in_threads_at_once_equal_the_same_runs_alone() -> None:
    alone = [weights(run_of(seed)) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: weights(run_of(seed)), range(8)))
    assert together == alone
    assert len(set(alone)) == 8


async def run_together(count: int) -> list[bytes]:
    trainers = [tiny_trainer(seed_model=seed) for seed in range(count)]
    async with anyio.create_task_group() as tasks:
        for seed, trainer in enumerate(trainers):
            train_loader = tiny_loader(6, seed=seed, shuffle=True)
            tasks.start_soon(partial(trainer.train_async, train_loader, tiny_loader(2, seed=seed), epochs=3))
    return [weights(trainer) for trainer in trainers]


@pytest.mark.anyio
async def test_runs_in_tasks_at_once_equal_the_same_runs_alone() -> None:
    with anyio.fail_after(LONG):
        together = await run_together(8)
    assert together == await anyio.to_thread.run_sync(lambda: [weights(run_of(seed)) for seed in range(8)])


@pytest.mark.slow
def test_thirty_two_runs_at_once_equal_the_same_runs_alone() -> None:
    assert anyio.run(run_together, 32) == [weights(run_of(seed)) for seed in range(32)]


@pytest.mark.anyio
async def test_busy_trainer_refuses_a_second_run() -> None:
    watched = Watched()
    with anyio.fail_after(LONG):
        async with watched.trainer.start(
            EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks
        ) as run:
            with pytest.raises(TrainerBusyError, match=run.id):
                watched.trainer.start(tiny_loader(1), epochs=1)
            with pytest.raises(TrainerBusyError, match=run.id):
                await watched.trainer.train_async(tiny_loader(1), epochs=1)
            await run.stop()
    watched.assert_over("stopped")


@pytest.mark.anyio
async def test_of_two_prepared_runs_of_one_trainer_the_second_is_refused_when_it_starts() -> None:
    trainer = tiny_trainer()
    first, second = trainer.start(tiny_loader(1), epochs=1), trainer.start(tiny_loader(1), epochs=1)
    with anyio.fail_after(LONG):
        async with first:
            with pytest.raises(TrainerBusyError):
                async with second:
                    raise AssertionError("not reached")


@pytest.mark.anyio
async def test_callback_serves_one_run_at_a_time() -> None:
    watched = Watched()
    with anyio.fail_after(LONG):
        async with watched.trainer.start(
            EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks
        ) as run:
            await watched.started.stepped.wait()
            seen = len(watched.recorder.events)
            with pytest.raises(ConfigError, match=r"this Recorder serves run .* every run its own callbacks"):
                await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[watched.recorder])
            assert len(watched.recorder.events) >= seen  # the refused run has not reset it
            await run.stop()
    watched.assert_over("stopped")
    result = await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[watched.recorder])
    assert result.status == "completed"


@pytest.mark.anyio
async def test_process_wide_knobs_that_contradict_a_running_run_are_refused() -> None:
    watched = Watched()
    with anyio.fail_after(LONG):
        async with watched.trainer.start(
            EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks
        ) as run:
            with pytest.raises(ConfigError, match="deterministic=True contradicts run"):
                await tiny_trainer(deterministic=True).train_async(tiny_loader(1), epochs=1)
            with pytest.raises(ConfigError, match=r"tf32=True contradicts run .* training with tf32=None"):
                await tiny_trainer(tf32=True).train_async(tiny_loader(1), epochs=1)
            with pytest.raises(ConfigError, match="seed=3 would reseed"):
                await tiny_trainer(seed=3).train_async(tiny_loader(1), epochs=1)
            await run.stop()
    watched.assert_over("stopped")


@pytest.mark.anyio
async def test_two_runs_of_one_name_at_once_are_refused() -> None:
    watched = Watched(run_name="mine")
    with anyio.fail_after(LONG):
        async with watched.trainer.start(
            EndlessLoader(), max_steps=ENDLESS, callbacks=watched.callbacks
        ) as run:
            with pytest.raises(ConfigError, match="'mine' is training in this process already"):
                await tiny_trainer(run_name="mine").train_async(tiny_loader(1), epochs=1)
            await run.stop()
    watched.assert_over("stopped")


def test_deterministic_is_switched_on_for_the_run_and_back_after_the_last_one() -> None:
    seen: list[bool] = []

    def look(run: Run) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    assert not torch.are_deterministic_algorithms_enabled()
    tiny_trainer(deterministic=True).train(tiny_loader(1), epochs=1, callbacks=[At(1, look)])
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()

    with pytest.raises(Fault):
        tiny_trainer(deterministic=True).train(tiny_loader(1), epochs=1, callbacks=[FailingHook()])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_set_for_the_run_and_back_after_it(allowed: bool) -> None:
    def now() -> tuple[str, bool, bool]:
        matmul = torch.backends.cuda.matmul.allow_tf32
        return torch.get_float32_matmul_precision(), matmul, torch.backends.cudnn.allow_tf32

    seen: list[tuple[bool, bool]] = []
    before = now()
    tiny_trainer(tf32=allowed).train(
        tiny_loader(1), epochs=1, callbacks=[At(1, lambda run: seen.append(now()[1:]))]
    )
    assert seen == [(allowed, allowed)]
    assert now() == before


def test_tf32_is_set_beside_torchs_newer_switches_too(tmp_path: Path, warm_python: WarmPython) -> None:
    source = """if True:
        import torch
        from offloop.engine import Callback, in_step
        from offloop.engine.testing import tiny_loader, tiny_trainer

        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        matmul.fp32_precision = cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"

        class Look(Callback):
            @in_step
            def after_step(self, point):
                assert matmul.fp32_precision == cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "tf32"

        tiny_trainer(tf32=True).train(tiny_loader(1), epochs=1, callbacks=[Look()])
        assert matmul.fp32_precision == cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "ieee"
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches only")
    script = tmp_path / "script.py"
    script.write_text(source)
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr


def test_seed_is_set_once_and_none_touches_no_generator() -> None:
    batches, trainer = tiny_batches(2), tiny_trainer()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    trainer.train(batches, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)

    tiny_trainer(seed=11).train(batches, epochs=2)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(after, torch.get_rng_state())


def test_second_run_of_a_trainer_starts_from_epoch_0_with_callbacks_reset() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder])
    first = trainer.train(tiny_loader(2), epochs=1)
    said = lines(recorder)
    losses = [event.loss for event in recorder.of(StepEnd)]
    second = trainer.train(tiny_loader(2), epochs=1)
    assert lines(recorder) == said  # nothing of the first run is left in it
    assert first.run_id != second.run_id
    assert (second.epochs, second.steps) == (1, 2)
    assert [event.loss for event in recorder.of(StepEnd)] != losses  # the model goes on as it is


def test_train_inside_an_event_loop_works_and_says_what_is_meant() -> None:
    pytest.importorskip("IPython")  # imported is not running: wandb does so too

    async def main() -> RunResult:
        with pytest.warns(RuntimeWarning, match=r"await train_async\(...\) instead"):
            return tiny_trainer().train(tiny_loader(2), epochs=1)

    assert asyncio.run(main()).status == "completed"
    assert trio.run(main).status == "completed"


def test_train_inside_an_event_loop_raises_what_the_run_raised() -> None:
    async def main() -> None:
        with pytest.warns(RuntimeWarning), pytest.raises(Fault):
            tiny_trainer().train(tiny_loader(2), epochs=1, callbacks=[FailingHook()])

    asyncio.run(main())


@pytest.mark.anyio
async def test_train_in_a_worker_thread_of_an_event_loop_needs_no_warning() -> None:
    with anyio.fail_after(LONG):
        result = await anyio.to_thread.run_sync(partial(tiny_trainer().train, tiny_loader(2), epochs=1))
    assert result.status == "completed"


def test_train_in_a_plain_thread_works() -> None:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(tiny_trainer().train(tiny_loader(2), epochs=1)))
    thread.start()
    thread.join(LONG)
    assert [result.status for result in results] == ["completed"]


# Determinism -------------------------------------------------------------------------------------


class SleepsAtRandom(Callback):
    def __init__(self) -> None:
        self.random = random.Random()

    async def on_event(self, event: Event, run: Run) -> None:
        await anyio.sleep(self.random.random() * 0.002)


class SleepsInThread(Callback):
    buffer = 5

    def __init__(self) -> None:
        self.waiting = threading.Event()

    def on_sample(self, event: Sample, run: Run) -> None:
        self.waiting.wait(random.random() * 0.002)


class StopWhenGood(Callback):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        if event.metrics["train_loss"] < 0.95:
            run.stop_nowait("good enough")


def disturbing() -> list[Callback]:
    return [
        SleepsAtRandom(),
        SleepsInThread(),
        SlowCallback(0.001),
        FailingCallback(),
        FailingCallback(StepEnd),
    ]


async def seeded_run(others: list[Callback]) -> tuple[list[tuple[str, dict[str, Any]]], bytes, int]:
    """A run whose step draws from torch's global generator, as dropout does."""
    recorder = Recorder()
    trainer = tiny_trainer(model=tiny_model(dropout=0.3), seed=5, drain_timeout=5.0, lr=0.2)
    result = await trainer.train_async(
        tiny_loader(8, shuffle=True), tiny_loader(2), epochs=40, callbacks=[recorder, StopWhenGood(), *others]
    )
    assert result.status == "stopped"
    return reproducible(recorder.events), weights(trainer), result.steps


def test_same_seed_gives_the_same_run_whatever_the_observers_do() -> None:
    plain = anyio.run(seeded_run, [])
    assert anyio.run(seeded_run, []) == plain
    assert anyio.run(seeded_run, disturbing()) == plain
    assert trio.run(seeded_run, disturbing()) == plain
    events, _, steps = plain
    assert sum(name == "StepEnd" for name, _ in events) == steps
    assert 8 < steps < 320


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_number_of_callbacks_changes_no_weight(backend: str) -> None:
    async def train(count: int) -> bytes:
        trainer = tiny_trainer(model=tiny_model(dropout=0.3), seed=5)
        recorders = [Recorder() for _ in range(count)]
        await trainer.train_async(tiny_loader(4, shuffle=True), tiny_loader(2), epochs=3, callbacks=recorders)
        assert len({tuple(map(repr, recorder.events)) for recorder in recorders}) == min(count, 1)
        return weights(trainer)

    none, one, many = (anyio.run(train, count, backend=backend) for count in (0, 1, 20))
    assert none == one == many


# The end -----------------------------------------------------------------------------------------


class Reaction(Event, frozen=True):
    """Published by a callback in reaction to another event."""

    number: int = 0


def wait_for_training_to_end(run: Run) -> None:
    cast(Any, run._session).thread.join()


class ReactsOnLoop(Callback):
    """Publishes when training is over, and again when that event comes back."""

    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        await anyio.to_thread.run_sync(wait_for_training_to_end, run)
        run.publish(Reaction())

    async def on_reaction(self, event: Reaction, run: Run) -> None:
        await anyio.lowlevel.checkpoint()
        if event.number < 3:
            run.publish(Reaction(number=event.number + 1))


class ReactsInThread(Callback):
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        wait_for_training_to_end(run)
        run.publish(Reaction())

    def on_reaction(self, event: Reaction, run: Run) -> None:
        if event.number < 3:
            run.publish(Reaction(number=event.number + 1))


@pytest.mark.parametrize("reacts", [ReactsOnLoop, ReactsInThread])
@pytest.mark.anyio
async def test_what_callbacks_publish_after_training_comes_before_train_end(reacts: type[Callback]) -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[recorder, reacts()])
    assert recorder.names()[-6:] == ["EpochEnd", *["Reaction"] * 4, "TrainEnd"]
    assert [event.number for event in recorder.of(Reaction)] == [0, 1, 2, 3]
    assert result.callback_errors == {}


@pytest.mark.anyio
async def test_reaction_to_the_last_checkpoint_comes_before_train_end(tmp_path: Path) -> None:
    class Register(Callback):
        """Has an async decider, which shares its task with the observer."""

        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None: ...

        async def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
            storage = cast(Any, run._session).storage
            assert storage is not None
            while (
                storage.checkpoints._optimizers
            ):  # until all of them are durable and the directory is given back
                await anyio.lowlevel.checkpoint()
            await anyio.wait_all_tasks_blocked()
            run.publish(Reaction())

    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer(run_dir=tmp_path).train_async(
            tiny_loader(1), epochs=1, callbacks=[recorder, Register(), ModelCheckpoint(monitor="train_loss")]
        )
    assert recorder.names()[-2:] == ["Reaction", "TrainEnd"]
    assert len(recorder.of(Reaction)) == len(recorder.of(CheckpointSaved)) > 0
    assert result.callback_errors == {}


@pytest.mark.anyio
async def test_failure_in_a_late_reaction_fails_the_run_before_train_end() -> None:
    class Fails(Callback):
        on_error = "raise"

        async def on_reaction(self, event: Reaction, run: Run) -> None:
            raise Fault("late")

    recorder, trainer = Recorder(), tiny_trainer()
    with anyio.fail_after(LONG), pytest.raises(Fault):
        await trainer.train_async(
            tiny_loader(1), epochs=1, callbacks=[recorder, ReactsOnLoop(), Fails(), ReactsInThread()]
        )
    assert recorder.of(TrainEnd)[0].status == "failed"


@pytest.mark.anyio
async def test_callbacks_that_never_stop_publishing_are_cut_off_by_the_drain_timeout(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Endless(Callback):
        async def on_event(self, event: Event, run: Run) -> None:
            if not isinstance(event, TrainEnd):
                run.publish(Reaction())

    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer(drain_timeout=0.05).train_async(
            tiny_loader(1), epochs=1, callbacks=[recorder, Endless()]
        )
    assert result.status == "completed"
    assert recorder.names()[-2:] == ["Reaction", "TrainEnd"]
    assert "callbacks still published events 0.05 s after training" in caplog.text


@pytest.mark.anyio
async def test_thread_that_publishes_until_the_run_ends_does_not_hold_its_end_up() -> None:
    class Ticks(Callback):
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            self.thread = threading.Thread(target=self.tick, args=(run,))
            self.thread.start()

        def tick(self, run: Run) -> None:
            with pytest.raises(BusClosedError):
                while True:
                    run.publish(Reaction())
                    while len(run._bus._queue) > 100 and not run._bus._closing:
                        os.sched_yield()

        def close(self) -> None:
            self.thread.join()

    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer(drain_timeout=3600.0).train_async(
            tiny_loader(1), epochs=1, callbacks=[Ticks(), recorder]
        )
    assert result.callback_errors == {}
    assert recorder.names()[-1] == "TrainEnd"


@pytest.mark.parametrize("in_child_task", [False, True])
@pytest.mark.anyio
async def test_handler_that_waits_for_the_end_of_the_run_is_not_waited_for(in_child_task: bool) -> None:
    class Follows(Callback):
        """Reads the run's events in one handler, from its start to its end."""

        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            if not in_child_task:
                await self.follow(run)
                return
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.follow, run)

        async def follow(self, run: Run) -> None:
            async for event in run.events(EpochEnd, TrainEnd):
                seen.append(type(event).__name__)
                await anyio.lowlevel.checkpoint()
                if isinstance(event, EpochEnd):
                    run.publish(Reaction())

    recorder = Recorder()
    seen: list[str] = []
    with anyio.fail_after(LONG):
        result = await tiny_trainer(drain_timeout=3600.0).train_async(
            tiny_loader(1), epochs=2, callbacks=[Follows(), recorder]
        )
    assert result.callback_errors == {}
    assert seen == ["EpochEnd", "EpochEnd", "TrainEnd"]
    assert recorder.names()[-1] == "TrainEnd" and len(recorder.of(Reaction)) == 2


@pytest.mark.anyio
async def test_callback_that_hangs_takes_train_end_from_no_other() -> None:
    hanging, recorder = HangingCallback(), Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer(drain_timeout=0.05).train_async(
            tiny_loader(1), epochs=1, callbacks=[hanging, SlowCallback(0.001), recorder]
        )
    hanging.release()
    assert list(result.callback_errors) == ["HangingCallback"]
    assert recorder.names()[-1] == "TrainEnd"


@pytest.mark.parametrize("in_thread", [False, True])
def test_callback_that_hangs_is_given_up_after_the_drain_timeout(in_thread: bool) -> None:
    hanging, recorder = HangingCallback(in_thread=in_thread), Recorder()
    try:
        result = tiny_trainer(drain_timeout=0.1).train(
            tiny_loader(1), epochs=1, callbacks=[hanging, recorder]
        )
    finally:
        hanging.release()
    assert result.status == "completed"
    assert [error.split(":")[0] for error in result.callback_errors["HangingCallback"]] == ["drain"]
    assert "Recorder" not in result.callback_errors
    assert hanging.is_closed
    assert recorder.names()[-1] == "TrainEnd"


def test_callback_that_never_closes_is_given_up() -> None:
    released = threading.Event()

    class Async(Callback):
        async def close(self) -> None:
            await anyio.sleep_forever()

    class InThread(Callback):
        def close(self) -> None:
            released.wait(LONG)

    try:
        recorder = Recorder()
        result = tiny_trainer(drain_timeout=0.1).train(
            tiny_loader(1), epochs=1, callbacks=[Async(), InThread(), recorder]
        )
    finally:
        released.set()
    assert {name: len(errors) for name, errors in result.callback_errors.items()} == {
        "Async": 1,
        "InThread": 1,
    }
    assert recorder.is_closed


def test_close_that_raises_is_listed_and_the_others_are_closed() -> None:
    class Bad(Callback):
        def close(self) -> None:
            raise Fault("in close")

    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Bad(), recorder])
    assert result.callback_errors == {"Bad": ("close: Fault: in close",)}
    assert recorder.is_closed


def test_handler_that_leaks_a_cancellation_of_something_else_does_not_take_the_run_along() -> None:
    class Leaky(Callback):
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            task = asyncio.ensure_future(asyncio.sleep(60))
            task.cancel()
            await task

    recorder = Recorder()
    trainer = tiny_trainer(drain_timeout=3600.0)  # nobody waits for it
    result = trainer.train(tiny_loader(1), epochs=2, callbacks=[Leaky(), recorder])
    assert result.status == "completed"
    assert result.callback_errors["Leaky"]
    assert recorder.names()[-1] == "TrainEnd"


def test_command_taken_back_by_its_giver_does_not_disturb_the_end() -> None:
    def act(run: Run) -> None:
        run.stop_nowait().cancel()
        run.call_nowait(lambda trainer: None).cancel()

    result = tiny_trainer(deterministic=True).train(
        tiny_loader(2), epochs=1, callbacks=[At(2, act), At(1, act)]
    )
    assert (result.status, result.steps) == ("completed", 2)
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_thread_carries_the_callers_context_and_default_device() -> None:
    seen: list[object] = []

    class Look(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            seen.extend([variable.get(), torch.empty(1).device.type, torch.is_grad_enabled()])
            run.stop_nowait()

    trainer, batches, token = tiny_trainer(), tiny_batches(1), variable.set("mine")
    try:
        with torch.device("meta"), torch.no_grad():
            trainer.train(batches, epochs=1, callbacks=[Look()])
    finally:
        variable.reset(token)
    assert seen == ["mine", "meta", True]


# What is left ------------------------------------------------------------------------------------


class Breaks(torch.nn.Module):
    """Runs out of memory in its forward or its backward pass, with an activation at hand."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)
        self.where = where
        self.activation: weakref.ref[torch.Tensor] | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.layer(inputs))
        self.activation = weakref.ref(hidden)
        if self.where == "forward":
            raise torch.OutOfMemoryError("no memory")
        hidden.register_hook(self.fail)
        outputs: torch.Tensor = hidden * hidden
        return outputs

    def fail(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_activations_of_a_step_that_failed_are_free_when_the_exception_is(where: str) -> None:
    """Also before the garbage collector comes: torch, when it is out of memory, does not call it."""
    model = Breaks(where)
    trainer = tiny_trainer(model=model)
    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            trainer.train(tiny_loader(1), epochs=1)
        assert model.activation is not None and model.activation() is None
    finally:
        gc.enable()
    assert trainer.last_run is not None and trainer.last_run.failure is None
    assert trainer.last_run.result.reason == "OutOfMemoryError: no memory"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.anyio
async def test_a_run_that_is_kept_keeps_no_activations(where: str) -> None:
    model = Breaks(where)
    trainer = tiny_trainer(model=model)
    with contextlib.suppress(torch.OutOfMemoryError):
        await trainer.train_async(tiny_loader(1), epochs=1)
    gc.collect()
    assert trainer.last_run is not None
    assert model.activation is not None and model.activation() is None


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["train", "train_async", "start"])
async def test_who_drops_a_trainer_has_its_memory_back_at_once(how: str, tmp_path: Path) -> None:
    """Not at the next garbage collection: the next trainer of a sweep may need the device's memory before that."""

    async def run() -> tuple[Run, list[weakref.ref[Any]]]:
        trainer = tiny_trainer(run_dir=tmp_path)
        callbacks = [Recorder(), ModelCheckpoint(), LearningRateScheduler("cosine"), WeightAverage()]
        loaders = tiny_loader(3), tiny_loader(1)
        if how == "start":
            async with trainer.start(*loaders, epochs=2, callbacks=callbacks) as started:
                pass
            assert (started.step, started.refused, started.state) == (6, {}, "completed")
            assert started.trainer is trainer
        elif how == "train_async":
            await trainer.train_async(*loaders, epochs=2, callbacks=callbacks)
        else:
            # A thread of its own: one of a pool may keep what it was given for a moment.
            train = partial(trainer.train, *loaders, epochs=2, callbacks=callbacks)
            thread = threading.Thread(target=train)
            thread.start()
            await anyio.to_thread.run_sync(thread.join)
            del train
        assert trainer.last_run is not None
        return trainer.last_run, [weakref.ref(trainer.model), weakref.ref(trainer.optimizer)]

    await run()  # what is imported on the way leaves cycles of its own
    gc.collect()
    gc.disable()
    try:
        kept, gone = await run()
        assert [each() for each in gone] == [None, None]
        assert kept.result.status == "completed"
    finally:
        gc.enable()


class StopsThenFails(Callback):
    on_error = "raise"

    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        run.stop_nowait("enough")

    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        await anyio.sleep(0.2)
        raise Fault("late")


def test_a_run_that_fails_while_its_checkpoints_are_written_is_not_called_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(self: Checkpoints) -> bool:
        failed.wait(30.0)
        return True

    def note(path: Path, description: dict[str, Any]) -> None:
        written.append(description["status"])

    def fail(self: Lifetime, error: BaseException) -> None:
        original(self, error)
        failed.set()

    failed, written, original = threading.Event(), list[str](), Lifetime.fail
    monkeypatch.setattr(Checkpoints, "flush", flush)
    monkeypatch.setattr(Lifetime, "fail", fail)
    monkeypatch.setattr(storage_module, "write_run_json", note)
    with pytest.raises(Fault):
        trainer = tiny_trainer(run_dir=tmp_path, callbacks=[StopsThenFails()])
        trainer.train(tiny_loader(1), tiny_loader(1), epochs=5)
    assert written == ["running", "failed"]


class StopsAtOnce(Callback):
    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        run.stop_nowait("no step")


def test_a_run_that_ended_before_its_first_step_gives_its_memory_back_at_once(tmp_path: Path) -> None:
    """The check of what can be saved waits for that step, with the loop and all that it holds."""

    def run() -> list[weakref.ref[Any]]:
        trainer = tiny_trainer(run_dir=tmp_path, callbacks=[StopsAtOnce(), ModelCheckpoint()])
        loader = tiny_loader(3)
        assert trainer.train(loader, epochs=1).status == "stopped"
        return [weakref.ref(trainer.model), weakref.ref(trainer.optimizer), weakref.ref(loader)]

    run()  # what is imported on the way leaves cycles of its own
    gc.collect()
    gc.disable()
    try:
        assert [each() for each in run()] == [None, None, None]
    finally:
        gc.enable()


def test_a_run_whose_trainer_is_gone_says_so() -> None:
    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(2), epochs=1, callbacks=[recorder])
    assert recorder.run is not None and recorder.run.result is result
    assert recorder.run.callback_costs == result.callback_costs
    with pytest.raises(RunEndedError):
        recorder.run.set_lr_nowait(0.1)
    with pytest.raises(RuntimeError, match="is over, and its trainer is gone: keep the trainer yourself"):
        recorder.run.trainer  # noqa: B018 - raises


def test_the_last_batch_and_the_outputs_that_metrics_have_kept_are_let_go() -> None:
    class Look(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            seen.append(weakref.ref(point.batch[0]))

    seen: list[weakref.ref[torch.Tensor]] = []
    trainer = tiny_trainer(callbacks=[Look()])
    trainer.train((pair for pair in tiny_batches(3)), tiny_batches(2), epochs=1, metrics=["roc_auc"])
    assert len(seen) == 3 and all(batch() is None for batch in seen)


def test_a_thread_that_cannot_be_started_fails_the_run_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith("offloop-training"):
            raise RuntimeError("can't start new thread")
        start(self)

    trainer = tiny_trainer(deterministic=True, callbacks=[recorder := Recorder()])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            trainer.train(tiny_loader(), epochs=1)
    assert recorder.names() == ["TrainEnd"]
    assert recorder.is_closed
    assert not torch.are_deterministic_algorithms_enabled()
    assert trainer.train(tiny_loader(), epochs=1).status == "completed"
