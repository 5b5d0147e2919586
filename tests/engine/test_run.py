"""engine/run.py: what a run tells, and every command from everywhere it may be given."""

import asyncio
import math
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from offloop.engine import (
    Callback,
    CommandApplied,
    ConfigError,
    EpochEnd,
    EpochStart,
    Event,
    LearningRateChanged,
    MetricNotFoundError,
    Metrics,
    Run,
    RunEndedError,
    StateChanged,
    StepEnd,
    StepPoint,
    TrainEnd,
    Trainer,
    TrainStart,
    ValidationEnd,
    ValidationStart,
    decides,
    in_step,
)
from offloop.engine.bus.waker import result_of
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_model, tiny_trainer

LONG = 30.0  # seconds that nothing here should take, also on a busy machine
ENDLESS = 1_000_000_000  # steps


@pytest.fixture(autouse=True, scope="module")
def torch_is_warm() -> None:
    """The first optimizer of a process imports half of torch, which would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


class Gate(Callback):
    """Holds the training thread inside a step, so that a test knows where it stands."""

    def __init__(self, step: int = 0) -> None:
        """Hold it in the step after `step` steps are done."""
        self.step = step
        self.reached = threading.Event()
        self.open = threading.Event()

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        if point.step == self.step and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(LONG)

    async def pass_by(self) -> None:
        await anyio.to_thread.run_sync(self.reached.wait)


class Act(Callback):
    """Calls functions in the training thread, each after a step."""

    def __init__(self, **after: Callable[[Run], object]) -> None:
        """Take them as `step_3=...`."""
        self.after = {int(name.removeprefix("step_")): act for name, act in after.items()}

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step in self.after:
            self.after[point.step](point.run)


def applied(recorder: Recorder) -> list[tuple[str, int]]:
    return [(event.command, event.step) for event in recorder.of(CommandApplied)]


# Commands and what they return -------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_command_from_a_task_is_acknowledged_and_returns_what_was_asked_for() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(
            EndlessLoader(), tiny_loader(2), max_steps=ENDLESS, callbacks=[recorder]
        ) as run:
            await run.pause("a look", by="somebody")
            assert run.state == "paused"
            metrics = await run.validate()
            step = run.step
            await run.set_lr(0.25)
            assert await run.call(lambda trainer: trainer.optimizer.param_groups[0]["lr"]) == 0.25
            assert run.step == step  # all of them while paused
            await run.resume()
            assert run.state == "running"
            await run.stop("seen enough", by="somebody")
    assert metrics is not None
    assert metrics == recorder.of(ValidationEnd)[0].metrics
    acknowledged = recorder.of(CommandApplied)
    assert [event.command for event in acknowledged] == [
        "pause",
        "validate",
        "set_lr",
        "call",
        "resume",
        "stop",
    ]
    assert [event.command_id for event in acknowledged] == list(range(6))
    assert [event.by for event in acknowledged] == ["somebody", "user", "user", "user", "user", "somebody"]
    assert acknowledged[0].arguments == {"reason": "a look"}
    assert acknowledged[2].arguments["lr"] == 0.25
    assert (run.result.status, run.result.reason) == ("stopped", "seen enough")
    states = [(event.state, event.reason, event.by) for event in recorder.of(StateChanged)]
    assert states == [
        ("paused", "a look", "somebody"),
        ("running", "", "user"),
        ("stopping", "seen enough", "somebody"),
    ]


def test_every_command_from_a_plain_thread() -> None:
    seen: list[object] = []

    def steer(run: Run) -> None:
        seen.append(run.pause_nowait().result(LONG))
        seen.append(run.validate_nowait().result(LONG)["val_loss"] > 0)
        seen.append(run.set_lr_nowait(0.5).result(LONG))
        seen.append(run.call_nowait(lambda trainer: trainer.step).result(LONG) == run.step)
        seen.append(run.resume_nowait().result(LONG))
        seen.append(run.stop_nowait().result(LONG))

    recorder, threads = Recorder(), []

    class StartThread(Callback):
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            threads.append(threading.Thread(target=steer, args=(run,)))
            threads[0].start()

    result = tiny_trainer().train(
        EndlessLoader(), tiny_loader(1), max_steps=ENDLESS, callbacks=[StartThread(), recorder]
    )
    threads[0].join(LONG)
    assert seen == [None, True, None, True, None, None]
    assert result.status == "stopped"
    assert {event.by for event in recorder.of(CommandApplied)} == {"user"}


@pytest.mark.parametrize("in_thread", [False, True])
def test_every_command_from_an_observer_is_signed_with_its_name(in_thread: bool) -> None:
    class Async(Callback):
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            await run.pause()
            assert await run.validate() is not None
            await run.set_lr(0.5)
            assert await run.call(lambda trainer: 7) == 7
            await run.resume()
            await run.stop()

    class Plain(Callback):
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            run.pause_nowait().result(LONG)
            assert run.validate_nowait().result(LONG) is not None
            run.set_lr_nowait(0.5).result(LONG)
            assert run.call_nowait(lambda trainer: 7).result(LONG) == 7
            run.resume_nowait().result(LONG)
            run.stop_nowait().result(LONG)

    recorder = Recorder()
    result = tiny_trainer().train(
        EndlessLoader(),
        tiny_loader(1),
        max_steps=ENDLESS,
        callbacks=[recorder, Plain() if in_thread else Async()],
    )
    assert result.status == "stopped"
    assert result.callback_errors == {}
    assert {event.by for event in recorder.of(CommandApplied)} == {"Plain" if in_thread else "Async"}
    assert len(recorder.of(CommandApplied)) == 6


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_every_command_from_a_decider_applies_at_its_boundary(kind: str) -> None:
    futures: list[Future[Any]] = []

    def decide(run: Run) -> None:
        futures.extend(
            [
                run.stop_nowait(),  # last, whenever it was given
                run.set_lr_nowait(0.5),
                run.validate_nowait(),
                run.call_nowait(lambda trainer: 7),
                run.pause_nowait(),
                run.resume_nowait(),
            ]
        )

    class Plain(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            decide(run)

    class Async(Callback):
        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            decide(run)

    recorder = Recorder()
    callback = Plain() if kind == "plain" else Async()
    result = tiny_trainer(val_every_n_epochs=100).train(
        tiny_loader(2), tiny_loader(1), epochs=5, callbacks=[recorder, callback]
    )
    assert applied(recorder) == [
        ("set_lr", 2),
        ("validate", 2),
        ("call", 2),
        ("pause", 2),
        ("resume", 2),
        ("stop", 2),
    ]
    assert {event.by for event in recorder.of(CommandApplied)} == {type(callback).__name__}
    assert result.status == "stopped"
    assert [future.result(0) for future in futures][3] == 7
    assert futures[2].result(0)["val_loss"] == recorder.of(ValidationEnd)[0].metrics["val_loss"]


@pytest.mark.anyio
async def test_commands_and_events_from_another_event_loop_in_another_thread() -> None:
    async def steer(run: Run) -> list[object]:
        seen: list[object] = []
        async with run.events(StateChanged) as events:
            await run.pause("from afar")
            async for event in events:
                seen.append(event.reason)
                break
        metrics = await run.validate()
        assert metrics is not None
        seen.append(await run.call(lambda trainer: 7))
        with pytest.raises(ZeroDivisionError):
            await run.call(lambda trainer: 1 / 0)
        await run.resume()
        await run.stop()
        seen.append((await run.wait()).status)
        return seen

    with anyio.fail_after(LONG):
        async with tiny_trainer().start(EndlessLoader(), tiny_loader(1), max_steps=ENDLESS) as run:
            seen = await anyio.to_thread.run_sync(lambda: asyncio.run(steer(run)))
    assert seen == ["from afar", 7, "stopped"]


@pytest.mark.anyio
@pytest.mark.parametrize("then", ["set_lr", "resume"])
async def test_validation_in_a_pause_is_not_held_by_it_whatever_comes_meanwhile(then: str) -> None:
    class MeddlingLoader:
        def __iter__(self) -> Iterator[Any]:
            _ = run.set_lr_nowait(0.5) if then == "set_lr" else run.resume_nowait()
            return iter(tiny_loader(3))

    with anyio.fail_after(LONG):
        async with tiny_trainer().start(EndlessLoader(), MeddlingLoader(), max_steps=ENDLESS) as run:
            await run.pause()
            assert await run.validate() is not None
            await run.call(lambda trainer: None)  # what came meanwhile has been applied
            assert run.state == ("paused" if then == "set_lr" else "running")
            await run.stop()
    assert run.result.status == "stopped"


@pytest.mark.anyio
async def test_call_gives_what_it_raises_to_the_caller_and_training_goes_on() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(EndlessLoader(), max_steps=ENDLESS, callbacks=[recorder]) as run:
            with pytest.raises(ZeroDivisionError):
                await run.call(lambda trainer: 1 / 0)
            where = await run.call(lambda trainer: threading.current_thread().name)
            assert where == f"offloop-training-{run.id}"
            await run.stop()
    assert recorder.of(CommandApplied)[0].error == "ZeroDivisionError: division by zero"
    assert run.result.status == "stopped"


@pytest.mark.anyio
async def test_command_that_cannot_work_is_refused_before_it_is_given() -> None:
    model = tiny_model()
    with anyio.fail_after(LONG):
        async with tiny_trainer(model=model).start(EndlessLoader(), max_steps=ENDLESS) as run:
            with pytest.raises(ConfigError, match="no val_loader"):
                await run.validate()
            for lr in (0.0, -1.0, math.nan, math.inf, True):
                with pytest.raises(ConfigError, match="lr must be a finite number"):
                    await run.set_lr(lr)
            with pytest.raises(ConfigError, match="group must be from 0 to 0, got 1"):
                await run.set_lr(0.1, group=1)
            with pytest.raises(ConfigError, match="no optimizer 'other'; there are optimizer"):
                await run.set_lr(0.1, optimizer="other")
            with pytest.raises(ConfigError, match="no directory"):
                await run.checkpoint()
            with pytest.raises(TypeError, match="call takes a function"):
                await run.call(3)  # type: ignore[arg-type]  # the point of the test
            with pytest.raises(RuntimeError, match="is not over"):
                run.result  # noqa: B018 - raises
            await run.stop()


# Order at a boundary -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_commands_of_one_boundary_apply_by_arrival_and_stop_last() -> None:
    gate, recorder = Gate(step=1), Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(
            EndlessLoader(), tiny_loader(1), max_steps=ENDLESS, callbacks=[gate, recorder]
        ) as run:
            await gate.pass_by()
            run.stop_nowait()
            run.set_lr_nowait(0.5)
            run.call_nowait(lambda trainer: None)
            run.set_lr_nowait(0.25)
            run.validate_nowait()
            gate.open.set()
    assert applied(recorder) == [
        ("set_lr", 2),
        ("call", 2),
        ("set_lr", 2),
        ("validate", 2),
        ("stop", 2),
    ]


def test_deciders_commands_come_before_outside_ones() -> None:
    class Decider(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            thread = threading.Thread(target=run.set_lr_nowait, args=(0.5,), kwargs={"by": "outside"})
            thread.start()
            thread.join()
            run.set_lr_nowait(0.25, by="first decider")

    class Second(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            run.set_lr_nowait(0.125, by="second decider")

    recorder = Recorder()
    tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[recorder, Decider(), Second()])
    assert [event.by for event in recorder.of(CommandApplied)] == [
        "first decider",
        "second decider",
        "outside",
    ]


def test_what_a_deciders_command_causes_is_not_decided_about_again() -> None:
    class Decider(Callback):
        def __init__(self) -> None:
            self.asked = 0

        @decides
        def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            self.asked += 1
            run.validate_nowait()

    decider, recorder = Decider(), Recorder()
    tiny_trainer().train(tiny_loader(1), tiny_loader(1), epochs=1, callbacks=[decider, recorder])
    assert decider.asked == 1
    assert len(recorder.of(ValidationEnd)) == 2


# Learning rates ----------------------------------------------------------------------------------


def two_groups(rates: tuple[float, float]) -> Trainer:
    model = tiny_model()
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": rates[0]}, {"params": rest, "lr": rates[1]}]
    return tiny_trainer(model=model, optimizer=SGD(groups, lr=1.0))


def rates_of(trainer: Trainer, optimizer: str = "optimizer") -> list[float]:
    return [group["lr"] for group in trainer.optimizers[optimizer].param_groups]


def test_set_lr_sets_the_largest_group_and_scales_the_others_alike() -> None:
    trainer, recorder = two_groups((0.5, 0.125)), Recorder()
    act = Act(step_1=lambda run: run.set_lr_nowait(0.25))
    trainer.train(tiny_loader(3), epochs=1, callbacks=[act, recorder])
    assert rates_of(trainer) == [0.25, 0.0625]
    assert [event.lr for event in recorder.of(StepEnd)] == [0.5, 0.25, 0.25]
    changes = recorder.of(LearningRateChanged)
    assert [(each.previous, each.lr, each.source, each.step) for each in changes] == [
        (0.5, 0.25, "command", 1)
    ]


def test_set_lr_of_one_group_leaves_the_others() -> None:
    trainer = two_groups((0.5, 0.125))
    act = Act(step_1=lambda run: run.set_lr_nowait(0.25, group=1))
    trainer.train(tiny_loader(2), epochs=1, callbacks=[act])
    assert rates_of(trainer) == [0.5, 0.25]


class TwoOptimizers(Trainer):
    automatic_optimization = False

    def training_step(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        loss = torch.nn.functional.cross_entropy(self.model(inputs), targets)
        self.backward(loss)
        self.optimizer_step("first")
        self.optimizer_step("second")
        return loss


def test_set_lr_of_one_of_several_optimizers() -> None:
    model = tiny_model()
    first, *rest = model.parameters()
    trainer = TwoOptimizers(
        model, {"first": SGD([first], lr=0.5), "second": SGD(rest, lr=0.25)}, device="cpu"
    )
    recorder, refused = Recorder(), []

    def act(run: Run) -> None:
        with pytest.raises(ConfigError, match="which optimizer"):
            run.set_lr_nowait(0.1)
        refused.append(True)
        run.set_lr_nowait(0.125, optimizer="second")

    trainer.train(tiny_loader(2), epochs=1, callbacks=[Act(step_1=act), recorder])
    assert refused
    assert (rates_of(trainer, "first"), rates_of(trainer, "second")) == ([0.5], [0.125])
    changes = [(each.optimizer, each.previous, each.lr) for each in recorder.of(LearningRateChanged)]
    assert changes == [("second", 0.25, 0.125)]


SCHEDULES: dict[str, Callable[[SGD], LRScheduler]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=8),
    "CosineAnnealingLR with a floor": lambda optimizer: CosineAnnealingLR(optimizer, T_max=8, eta_min=0.01),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.4, total_steps=9),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer,
        [LinearLR(optimizer, start_factor=0.25, total_iters=5), CosineAnnealingLR(optimizer, T_max=4)],
        milestones=[5],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step\\(\\)`:UserWarning")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_on_from_a_set_rate_multiplied(name: str, interval: str) -> None:
    def rates(callback: Callback) -> list[float]:
        model, recorder = tiny_model(), Recorder()
        optimizer = SGD(model.parameters(), lr=0.4)
        scheduler = SCHEDULES[name](optimizer)
        trainer = tiny_trainer(
            model=model, optimizer=optimizer, scheduler=scheduler, scheduler_interval=interval
        )
        batches, epochs = (8, 1) if interval == "step" else (1, 8)
        trainer.train(tiny_loader(batches), epochs=epochs, callbacks=[callback, recorder])
        return [event.lr for event in recorder.of(StepEnd)]

    class Halve(Callback):
        """Halves the rate after its third value was used, whatever it is by then."""

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 3:
                lr = point.optimizers["optimizer"].param_groups[0]["lr"]
                point.run.set_lr_nowait(lr / 2)

    plain = rates(Callback())
    changed = rates(Halve())
    assert changed[:3] == plain[:3]
    assert changed[3:] == pytest.approx([lr / 2 for lr in plain[3:]])
    assert len(set(plain)) > 3


def test_schedule_by_epochs_says_what_it_did_and_one_by_steps_shows_in_the_steps() -> None:
    def changes(interval: str) -> list[tuple[float, float, str, int]]:
        model, recorder = tiny_model(), Recorder()
        optimizer = SGD(model.parameters(), lr=0.5)
        trainer = tiny_trainer(
            model=model,
            optimizer=optimizer,
            scheduler=StepLR(optimizer, 1, gamma=0.5),
            scheduler_interval=interval,
        )
        trainer.train(tiny_loader(2), epochs=2, callbacks=[recorder])
        return [(each.previous, each.lr, each.source, each.step) for each in recorder.of(LearningRateChanged)]

    assert changes("epoch") == [(0.5, 0.25, "schedule", 2), (0.25, 0.125, "schedule", 4)]
    assert changes("step") == []


# Pause -------------------------------------------------------------------------------------------


class PauseInValidation(Callback):
    """Pauses when a validation is about to begin; resumes after a look at the state."""

    def __init__(self, then: Callable[[Run], Awaitable[object]]) -> None:
        self.then = then
        self.states: list[str] = []

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        if not self.states:
            self.states.append(point.run.state)
            point.run.pause_nowait()

    async def on_state_changed(self, event: StateChanged, run: Run) -> None:
        if event.state == "paused":
            self.states.append(run.state)
            await self.then(run)


def test_paused_validation_goes_on_to_its_end_for_a_command_that_applies_there() -> None:
    async def steer(run: Run) -> None:
        await run.set_lr(0.25)
        await run.call(lambda trainer: None)
        assert run.state == "paused"
        await run.resume()

    recorder = Recorder()
    pause = PauseInValidation(steer)
    tiny_trainer().train(tiny_loader(1), tiny_loader(2), epochs=2, callbacks=[recorder, pause])
    names = [
        event.state if isinstance(event, StateChanged) else getattr(event, "command", type(event).__name__)
        for event in recorder.events
    ]
    start = names.index("ValidationStart")
    assert names[start : start + 9] == [
        "ValidationStart",
        "paused",
        "pause",
        "ValidationEnd",
        "LearningRateChanged",
        "set_lr",
        "call",
        "running",
        "resume",
    ]
    assert pause.states[-1] == "paused"
    assert len(recorder.of(ValidationEnd)) == 2


def test_stop_ends_a_pause_in_a_validation() -> None:
    async def steer(run: Run) -> None:
        await run.stop("enough")

    recorder = Recorder()
    result = tiny_trainer().train(
        tiny_loader(1), tiny_loader(2), epochs=2, callbacks=[recorder, PauseInValidation(steer)]
    )
    assert (result.status, result.reason) == ("stopped", "enough")
    assert recorder.of(ValidationEnd) == []


@pytest.mark.anyio
async def test_stop_ends_a_pause_in_an_accumulation_window_after_finishing_it() -> None:
    gate, recorder = Gate(step=1), Recorder()
    trainer = tiny_trainer(accumulate_grad_batches=3)
    with anyio.fail_after(LONG):
        async with trainer.start(EndlessLoader(), max_steps=ENDLESS, callbacks=[gate, recorder]) as run:
            await gate.pass_by()
            pause = run.pause_nowait()
            gate.open.set()
            async with run.events(StateChanged) as events:
                await anext(events)
            await result_of(pause)
            assert (run.state, run.step) == ("paused", 1)  # in the middle of the second window
            await run.stop()
    assert [(event.step, event.batch) for event in recorder.of(StepEnd)] == [(1, 3), (2, 6)]
    assert recorder.of(TrainEnd)[0].batch == 6


@pytest.mark.anyio
async def test_paused_accumulation_window_is_finished_for_a_command_that_applies_at_its_end(
    tmp_path: Path,
) -> None:
    gate, recorder = Gate(step=1), Recorder()
    trainer = tiny_trainer(accumulate_grad_batches=3, run_dir=tmp_path)
    with anyio.fail_after(LONG):
        async with trainer.start(EndlessLoader(), max_steps=ENDLESS, callbacks=[gate, recorder]) as run:
            await gate.pass_by()
            pause = run.pause_nowait()
            gate.open.set()
            await anyio.to_thread.run_sync(pause.result)
            assert (run.state, run.step) == ("paused", 1)  # in the middle of the second window
            saved = await run.checkpoint()
            assert saved is not None and saved.saved_step == 2
            assert (run.state, run.step) == ("paused", 2)
            await run.set_lr(0.25)  # here it applies at once
            assert run.step == 2
            await run.resume()
            await run.stop()
    assert run.result.status == "stopped"


@pytest.mark.anyio
async def test_pause_and_resume_twice_over_are_harmless() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(EndlessLoader(), max_steps=ENDLESS, callbacks=[recorder]) as run:
            await run.resume()  # it is not paused
            await run.pause()
            await run.pause()
            await run.resume()
            assert run.state == "running"
            await run.stop()
    assert run.result.status == "stopped"
    assert recorder.of(StateChanged)[-1].state == "stopping"


# After the end -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_commands_after_the_end_say_so() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(tiny_loader(1), tiny_loader(1), epochs=1) as run:
            pass
        for command in (
            run.pause,
            run.resume,
            run.stop,
            partial(run.set_lr, 0.1),
            run.validate,
            partial(run.call, print),
        ):
            with pytest.raises(RunEndedError, match="the run is over"):
                await command()
        with pytest.raises(RunEndedError):
            run.stop_nowait()
        run.cancel()  # harmless
        run.cancel()
        assert (await run.wait()) is run.result
    assert run.result.status == "completed"


@pytest.mark.anyio
async def test_commands_that_wait_when_the_run_ends_fail() -> None:
    gate = Gate(step=1)
    errors: list[BaseException] = []
    with anyio.fail_after(LONG):
        async with tiny_trainer(accumulate_grad_batches=2).start(
            EndlessLoader(), tiny_loader(1), max_steps=ENDLESS, callbacks=[gate]
        ) as run:
            await gate.pass_by()
            waiting: list[Future[Any]] = [run.set_lr_nowait(0.1), run.validate_nowait()]
            waiting.append(run.call_nowait(print))

            async def await_one() -> None:
                try:
                    await run.set_lr(0.2)
                except RunEndedError as error:
                    errors.append(error)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(await_one)
                await anyio.wait_all_tasks_blocked()
                run.cancel()  # in the middle of a window: no step boundary comes any more
                gate.open.set()
    for future in waiting:
        with pytest.raises(RunEndedError, match="the run ended before"):
            future.result(0)
    assert len(errors) == 1


@pytest.mark.anyio
async def test_waiting_for_a_run_does_not_hold_it() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(EndlessLoader(), max_steps=ENDLESS) as run:
            with anyio.move_on_after(0.01):
                await run.wait()
            results = []

            async def wait() -> None:
                results.append(await run.wait())

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                tasks.start_soon(wait)
                await run.stop()
    assert [each.status for each in results] == ["stopped", "stopped"]


# Back-pressure -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_block_subscription_makes_training_wait_and_awaited_commands_return_on_acceptance() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer(flush_interval=0.001).start(EndlessLoader(), max_steps=ENDLESS) as run:
            with run.events(StepEnd, buffer=3, on_full="block", name="slow") as events:
                first = await anext(events)
                while True:  # it cannot end while training runs freely
                    before = run.step
                    await run.call(lambda trainer: None)
                    (statistics,) = [each for each in run.subscriptions if each.name == "slow"]
                    if statistics.waiting > 3 and run.step == before:
                        break
                assert await run.set_lr(0.1) is None  # type: ignore[func-returns-value]  # it returned at all
                seen = [first.step]
                async for event in events:
                    seen.append(event.step)
                    if len(seen) == 50:
                        break
                assert seen == list(range(first.step, first.step + 50))  # nothing was dropped
            await run.stop()
    assert run.result.status == "stopped"


@pytest.mark.anyio
async def test_leaving_the_iteration_frees_training_from_a_block_subscription() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer(flush_interval=0.001).start(EndlessLoader(), max_steps=ENDLESS) as run:
            async for _ in run.events(StepEnd, buffer=1, on_full="block"):
                while await run.call(lambda trainer: 1) == 1:  # None: it stands
                    pass
                break
            step = run.step
            while run.step < step + 10:
                await run.call(lambda trainer: None)
            await run.stop()
    assert run.result.status == "stopped"


@pytest.mark.anyio
async def test_cancel_frees_training_from_a_block_subscription() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer(flush_interval=0.001).start(EndlessLoader(), max_steps=ENDLESS) as run:
            events = run.events(StepEnd, buffer=1, on_full="block")
            await anext(events)
            while await run.call(lambda trainer: 1) == 1:  # None: it stands
                pass
            run.cancel()
    assert run.result.status == "cancelled"


# What a run tells --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_events_replay_milestones_filter_by_type_and_end_with_the_run() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(tiny_loader(2), tiny_loader(1), epochs=3) as run:
            epochs = [event.epoch async for event in run.events(EpochEnd)]
            mixed = [type(event).__name__ async for event in run.events(TrainStart, ValidationStart)]
        late = [type(event).__name__ async for event in run.events()]
    assert epochs == [0, 1, 2]
    assert mixed == ["TrainStart", *["ValidationStart"] * 3]
    assert late == [
        "TrainStart",
        *["EpochStart", "ValidationStart", "ValidationEnd", "EpochEnd"] * 3,
        "TrainEnd",
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((int,), {}, TypeError, "events takes event classes like EpochEnd, got <class 'int'>"),
        ((EpochStart(),), {}, TypeError, "events takes event classes"),
        ((), {"buffer": 0}, ConfigError, "buffer must be a whole number of at least 1, got 0"),
        ((), {"on_full": "drop"}, ConfigError, "on_full must be 'drop_oldest' or 'block', got 'drop'"),
    ],
)
def test_wrong_argument_of_events_is_named(
    arguments: Any, options: Any, error: type[Exception], text: str
) -> None:
    asked: list[str] = []

    class Subscribes(Callback):
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            with pytest.raises(error) as raised:
                run.events(*arguments, **options)
            asked.append(str(raised.value))

    tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Subscribes()])
    assert len(asked) == 1 and text in asked[0]


@pytest.mark.anyio
async def test_events_are_subscribed_at_the_call() -> None:
    gate = Gate(step=2)
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(tiny_loader(4), epochs=1, callbacks=[gate]) as run:
            await gate.pass_by()
            events = run.events(StepEnd)
            before = run.events(EpochStart)
            gate.open.set()
            await run.wait()
            steps = [event.step async for event in events]
            started = [event.epoch async for event in before]
    assert set(steps) >= {3, 4}
    assert started == [0]


@pytest.mark.anyio
async def test_leaving_the_iteration_leaves_nothing_behind() -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer(drain_timeout=3600.0).start(EndlessLoader(), max_steps=ENDLESS) as run:
            async with run.events(StepEnd) as events:
                async for _ in events:
                    break
            assert [each.name for each in run.subscriptions] == []
            async for _ in run.events(StepEnd):  # without `with` it stays until the run's end, which ...
                break
            await run.stop()
    assert run.result.status == "stopped"  # ... does not wait for it: that would be `drain_timeout`, an hour


def test_plain_thread_takes_events_without_an_event_loop() -> None:
    taken: list[Event] = []
    done = threading.Event()

    class HandOut(Callback):
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            threading.Thread(target=collect, args=(run.events(EpochEnd),)).start()

    def collect(events: Any) -> None:
        while not events.statistics.closed or events.statistics.waiting:
            taken.extend(events.take())
        done.set()

    tiny_trainer().train(tiny_loader(2), epochs=3, callbacks=[HandOut()])
    assert done.wait(LONG)
    assert [event.epoch for event in taken] == [0, 1, 2]


@pytest.mark.anyio
async def test_subscriptions_and_costs_are_shown_during_the_run_and_after() -> None:
    class Plain(Callback):
        def on_step_end(self, event: StepEnd, run: Run) -> None:
            sum(range(1000))

    class Decider(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            sum(range(1000))

    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer().start(
            tiny_loader(5), epochs=2, callbacks=[recorder, Plain(), Decider()]
        ) as run:
            events = run.events(EpochEnd, buffer=7, name="mine")
            (mine,) = [each for each in run.subscriptions if each.name == "mine"]
            assert (mine.buffer, mine.on_full, mine.dropped) == (7, "drop_oldest", 0)
            assert set(run.callback_costs) == {"Recorder", "Plain", "Decider"}
            assert len([event async for event in events]) == 2
    costs = run.result.callback_costs
    assert costs["Recorder"].events == len(recorder.events)
    assert costs["Plain"].events == 10
    assert costs["Recorder"].wall > 0 < costs["Recorder"].held
    assert costs["Plain"].cpu > 0 == costs["Plain"].held
    assert costs["Decider"].decided > 0 == costs["Decider"].events
    assert (costs["Plain"].dropped, costs["Plain"].failures) == (0, 0)


def test_run_without_a_directory_has_none(tmp_path: Path) -> None:
    class Look(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            seen.append(point.run)
            dirs.append(point.run.dir)

    seen: list[Run] = []
    dirs: list[Path | None] = []
    tiny_trainer(callbacks=[Look()]).train(tiny_loader(1), epochs=1)
    tiny_trainer(run_dir=tmp_path, callbacks=[Look()]).train(tiny_loader(1), epochs=1)
    assert dirs == [None, tmp_path / seen[1].id]
    assert [run.dir for run in seen] == dirs  # also after the end
    assert repr(seen[0]) == f"<Run {seen[0].id}: completed, epoch 1, step 1>"


def test_run_tells_the_latest_of_each_metric_at_any_time() -> None:
    class Look(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            seen.append(run.metrics)

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            seen.append(run.metrics)

    seen: list[Metrics] = []
    trainer = tiny_trainer(callbacks=[Look()])
    result = trainer.train(tiny_loader(2), tiny_loader(1), epochs=2, metrics=["accuracy"])
    assert seen[0] == {}
    with pytest.raises(MetricNotFoundError, match="no metric 'val_loss' here; there are: none yet"):
        seen[0]["val_loss"]
    assert [each["val_loss"] for each in seen[1:]] == [event.metrics["val_loss"] for event in result.history]
    assert seen[1] != seen[2]  # a copy: what came later is not in it
    assert trainer.last_run is not None
    assert trainer.last_run.metrics == result.metrics == seen[2]


@pytest.mark.anyio
async def test_pause_after_a_stop_does_not_hold_the_end_up() -> None:
    class StopThenPause(Callback):
        @decides
        def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            run.stop_nowait("enough")

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            run.pause_nowait()

    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(
            tiny_loader(2), tiny_loader(2), epochs=3, callbacks=[StopThenPause(), recorder]
        )
    assert (result.status, result.reason) == ("stopped", "enough")
    assert [event.state for event in recorder.of(StateChanged)] == ["stopping"]


@pytest.mark.anyio
async def test_whoever_awaits_a_call_that_leaves_the_program_hears_of_the_end() -> None:
    heard: list[str] = []

    async def ask(run: Run) -> None:
        with pytest.raises(RunEndedError, match="the run ended in call: SystemExit: 3"):
            await run.call(lambda trainer: sys.exit(3))
        heard.append("the end")

    trainer = tiny_trainer()
    async with anyio.create_task_group() as tasks:

        async def train(*, task_status: Any) -> None:
            with pytest.raises(SystemExit):
                await trainer.train_async(EndlessLoader(), max_steps=ENDLESS, task_status=task_status)

        with anyio.fail_after(LONG):
            run = await tasks.start(train)
            await ask(run)
    assert heard == ["the end"]
    assert trainer.last_run is not None and trainer.last_run.result.status == "failed"


class PausesInValidation(Trainer):
    def validation_step(self, batch: Any) -> Any:
        assert self.last_run is not None
        self.last_run.pause_nowait()
        return super().validation_step(batch)


class GivesAtOnce(Callback):
    """Asks for a validation in the first step, and beside it for something else: both are collected together."""

    def __init__(self, give: Callable[[Run], Any]) -> None:
        self.give = give

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        if point.step == 0:
            self.metrics = point.run.validate_nowait()
            self.given = self.give(point.run)


@pytest.mark.anyio
async def test_pause_in_a_validation_that_a_stop_waits_for_does_not_hold_it_up() -> None:
    """The stop is in the mailbox no more, and not applied yet."""
    gives = GivesAtOnce(lambda run: run.stop_nowait("enough"))
    with anyio.fail_after(LONG):
        result = await tiny_trainer(PausesInValidation).train_async(
            tiny_loader(2), tiny_loader(2), epochs=3, callbacks=[gives]
        )
    assert (result.status, result.reason, result.steps) == ("stopped", "enough", 1)
    assert "val_loss" in gives.metrics.result()


@pytest.mark.anyio
async def test_pause_in_a_validation_lets_what_was_asked_for_beside_it_be_done() -> None:
    class StopsAfterwards(Callback):
        async def on_command_applied(self, event: CommandApplied, run: Run) -> None:
            if event.command == "set_lr":
                states.append(run.state)
                await run.stop()

    states: list[str] = []
    gives = GivesAtOnce(lambda run: run.set_lr_nowait(0.25))
    with anyio.fail_after(LONG):
        result = await tiny_trainer(PausesInValidation).train_async(
            tiny_loader(2), tiny_loader(2), epochs=3, callbacks=[gives, StopsAfterwards()]
        )
    assert states == ["paused"]  # it holds training at the boundary, once that is done
    assert (result.status, result.steps) == ("stopped", 1)
    assert gives.given.done() and "val_loss" in gives.metrics.result()
