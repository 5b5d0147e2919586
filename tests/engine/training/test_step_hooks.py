"""engine/training/step_hooks.py: where hooks run, what they see, what they say."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    CallbackFailed,
    CommandApplied,
    ConfigError,
    EpochEnd,
    Event,
    EventError,
    Run,
    Sample,
    StepEnd,
    StepPoint,
    Trainer,
    ValidationEnd,
    in_step,
)
from offloop.engine.callback import POINTS
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)


class Points(Callback):
    """Notes which points it came by, and where the run stood."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def note(self, point: StepPoint) -> None:
        self.seen.append((point.name, point.epoch, point.step))


class AllPoints(Points):
    @in_step
    def before_batch(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def before_backward(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def after_validation(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def after_training(self, point: StepPoint) -> None:
        self.note(point)

    @in_step
    def before_train_end(self, point: StepPoint) -> None:
        self.note(point)


def test_hooks_run_at_the_closed_list_of_points_in_order() -> None:
    hooks = AllPoints()
    tiny_trainer(accumulate_grad_batches=2, callbacks=[hooks]).train(BATCHES, BATCHES, epochs=1)

    def batch(step: int) -> list[tuple[str, int, int]]:
        names = ("before_batch", "before_forward", "before_backward", "after_backward")
        return [(name, 0, step) for name in names]

    def step(done: int) -> list[tuple[str, int, int]]:
        return [*batch(done), *batch(done), ("before_optimizer_step", 0, done), ("after_step", 0, done + 1)]

    validation = [("before_validation", 0, 2), ("after_validation", 0, 2)]
    end = [("after_training", 1, 2), ("before_train_end", 1, 2)]
    assert hooks.seen == [*step(0), *step(1), *validation, *end]
    assert {name for name, _, _ in hooks.seen} == set(POINTS)


def test_the_last_window_of_an_epoch_that_was_left_has_all_its_points() -> None:
    class NoLength:
        def __iter__(self) -> Any:
            return iter(BATCHES[:3])

    hooks = AllPoints()
    tiny_trainer(accumulate_grad_batches=2, callbacks=[hooks]).train(NoLength(), epochs=1)
    names = [name for name, _, _ in hooks.seen]
    assert (names.count("before_optimizer_step"), names.count("after_step")) == (2, 2)


def test_a_hook_runs_only_in_the_steps_that_it_asked_for() -> None:
    class EveryThird(Points):
        @in_step(every_n_steps=3)
        def before_batch(self, point: StepPoint) -> None:
            self.note(point)

        @in_step(every_n_steps=3)
        def after_step(self, point: StepPoint) -> None:
            self.note(point)

        @in_step(every_n_steps=3)
        def after_validation(self, point: StepPoint) -> None:
            self.note(point)

    hooks = EveryThird()
    tiny_trainer(callbacks=[hooks]).train(BATCHES, BATCHES[:1], epochs=2)
    assert hooks.seen == [
        *(("before_batch", 0, 2), ("after_step", 0, 3)),
        ("after_validation", 0, 4),
        *(("before_batch", 1, 5), ("after_step", 1, 6)),
        ("after_validation", 1, 8),
    ]


def test_a_phase_moves_the_steps_of_a_hook() -> None:
    class Phases(Points):
        @in_step(every_n_steps=4, phase=1)
        def before_forward(self, point: StepPoint) -> None:
            self.note(point)

        @in_step(every_n_steps=6)
        def after_step(self, point: StepPoint) -> None:
            self.note(point)

    hooks = Phases()
    tiny_trainer(callbacks=[hooks]).train(BATCHES, max_steps=13)
    numbers = [step if name == "after_step" else step + 1 for name, _, step in hooks.seen]
    assert numbers == [1, 5, 6, 9, 12, 13]


@pytest.mark.parametrize("phase", [-1, 4, 1.0, True])
def test_a_phase_outside_of_its_cadence_is_refused(phase: Any) -> None:
    with pytest.raises(ValueError, match="phase must be"):
        in_step(every_n_steps=4, phase=phase)


def test_a_phase_outside_of_a_cadence_that_the_instance_names_is_refused_before_the_run() -> None:
    class Named(Callback):
        every = 2

        @in_step(every_n_steps="every", phase=2)
        def after_step(self, point: StepPoint) -> None: ...

    with pytest.raises(ConfigError, match="after_step has phase=2, which must be below every_n_steps=2"):
        tiny_trainer(callbacks=[Named()])


def test_hooks_run_in_declared_order() -> None:
    order: list[str] = []

    class First(Callback):
        name = "first"

        @in_step
        def after_step(self, point: StepPoint) -> None:
            order.append(self.name)

    class Second(First):
        name = "second"

    tiny_trainer(callbacks=[First()]).train(BATCHES[:1], epochs=1, callbacks=[Second()])
    assert order == ["first", "second"]


def test_gradients_are_scaled_after_backward_and_plain_and_whole_before_the_optimizer_step() -> None:
    scale = 2.0**16  # GradScaler's first
    seen: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}

    class Look(Callback):
        @in_step
        def after_backward(self, point: StepPoint) -> None:
            self.keep(point)

        @in_step
        def before_optimizer_step(self, point: StepPoint) -> None:
            self.keep(point)
            weights["before"] = next(point.model.parameters()).detach().clone()

        @in_step
        def after_step(self, point: StepPoint) -> None:
            weights["after"] = next(point.model.parameters()).detach().clone()

        def keep(self, point: StepPoint) -> None:
            gradient = next(point.model.parameters()).grad
            assert gradient is not None
            seen.setdefault(point.name, []).append(gradient.clone())

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = tiny_trainer(
        model=model,
        optimizer=optimizer,
        precision="16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
        callbacks=[Look()],
    )
    trainer.train(BATCHES[:2], epochs=1)

    expected = tiny_model()
    parameter = next(expected.parameters())
    by_hand: list[Tensor] = []
    for inputs, targets in BATCHES[:2]:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = cross_entropy(expected(inputs), targets)
        (loss / 2 * scale).backward()
        assert parameter.grad is not None
        by_hand.append(parameter.grad.clone())
    assert torch.equal(torch.stack(seen["after_backward"]), torch.stack(by_hand))
    assert torch.equal(seen["before_optimizer_step"][0], by_hand[1] / scale)
    change = (weights["before"] - weights["after"]).norm()
    assert 0 < change <= 1e-3 < seen["before_optimizer_step"][0].norm()


def test_a_point_shows_the_step_it_belongs_to() -> None:
    shown: list[tuple[str, Any, Any]] = []

    class Look(Callback):
        @in_step
        def before_batch(self, point: StepPoint) -> None:
            shown.append((point.name, point.batch is BATCHES[0], point.loss))

        @in_step
        def after_step(self, point: StepPoint) -> None:
            assert point.loss is not None
            assert point.trainer.model is point.model
            assert list(point.optimizers) == ["optimizer"]
            assert not torch.is_grad_enabled()
            shown.append((point.name, point.loss.requires_grad, point.loss.item()))

    recorder = Recorder()
    tiny_trainer(callbacks=[Look(), recorder]).train(BATCHES[:1], epochs=1)
    (end,) = recorder.of(StepEnd)
    assert shown == [("before_batch", True, None), ("after_step", False, end.loss)]


def test_what_a_hook_logs_goes_where_it_was_logged() -> None:
    class Log(Callback):
        @in_step
        def before_optimizer_step(self, point: StepPoint) -> None:
            point.log("answer", torch.tensor([float(point.step)]))
            point.log("plain", 7)

        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.log("answer", float(point.step + 1))

        @in_step
        def before_validation(self, point: StepPoint) -> None:
            point.log("before", torch.tensor(1.0))

        @in_step
        def after_validation(self, point: StepPoint) -> None:
            point.log("after", 2.0)

    recorder = Recorder()
    tiny_trainer(callbacks=[Log(), recorder]).train(BATCHES[:2], BATCHES, epochs=1)
    assert [dict(end.metrics) for end in recorder.of(StepEnd)] == [
        {"answer": 1.0, "plain": 7.0},
        {"answer": 2.0, "plain": 7.0},
    ]
    (validation,) = recorder.of(ValidationEnd)
    assert set(validation.metrics) == {"val_loss", "val_before", "val_after"}
    assert (validation.metrics["val_before"], validation.metrics["val_after"]) == (1.0, 2.0)
    (end,) = recorder.of(EpochEnd)
    assert (end.metrics["train_answer"], end.metrics["train_plain"]) == (1.5, 7.0)


class GradientSeen(Sample, frozen=True, kw_only=True):
    norm: float
    name: str = ""


class Noticed(Event, frozen=True, kw_only=True):
    value: Any = 0.0


def test_a_hook_publishes_events_whose_numbers_are_read_late() -> None:
    class Publish(Callback):
        @in_step(every_n_steps=2)
        def after_backward(self, point: StepPoint) -> None:
            point.publish(GradientSeen, norm=torch.tensor(2.5), name="all")
            point.publish(Noticed, value=1)

    recorder = Recorder()
    tiny_trainer(callbacks=[Publish(), recorder]).train(BATCHES[:2], epochs=1)
    names = [name for name in recorder.names() if name in ("GradientSeen", "Noticed", "StepEnd")]
    assert names == ["StepEnd", "GradientSeen", "Noticed", "StepEnd"]
    (event,) = recorder.of(GradientSeen)
    assert (event.norm, event.name, event.epoch, event.step, event.batch) == (2.5, "all", 0, 1, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), r"tensors of one dimension, got one of shape \(2, 3\)"),
        ([torch.zeros(1)], r"Noticed"),
        (object(), r"Noticed"),
    ],
    ids=["a large tensor", "a tensor inside", "an object"],
)
def test_an_event_that_cannot_ride_the_bus_is_refused_where_it_is_published(value: Any, text: str) -> None:
    class Publish(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.publish(Noticed, value=value)

    with pytest.raises(EventError, match=text):
        tiny_trainer(callbacks=[Publish()]).train(BATCHES[:1], epochs=1)


def test_after_validation_runs_although_the_validation_was_stopped_or_failed() -> None:
    """It may put back the weights that `before_validation` has swapped."""

    class StopsInside(Trainer):
        def validation_step(self, batch: Any) -> Any:
            assert self.last_run is not None
            self.last_run.stop_nowait("enough")
            return super().validation_step(batch)

    class FailsInside(Trainer):
        def validation_step(self, batch: Any) -> Any:
            raise ValueError("in validation")

    hooks = AllPoints()
    result = tiny_trainer(StopsInside, callbacks=[hooks]).train(BATCHES, BATCHES, epochs=1)
    assert result.status == "stopped"
    assert [name for name, _, _ in hooks.seen[-3:-1]] == ["after_validation", "after_training"]
    hooks = AllPoints()
    with pytest.raises(ValueError, match="in validation"):
        tiny_trainer(FailsInside, callbacks=[hooks]).train(BATCHES, BATCHES, epochs=1)
    assert [name for name, _, _ in hooks.seen[-2:]] == ["after_validation", "after_training"]


def test_an_isolated_hook_is_off_after_ten_failures_in_a_row_and_its_observers_are_not() -> None:
    class Fails(Callback):
        on_error = "isolate"

        def __init__(self, every: int) -> None:
            self.every = every
            self.calls = self.events = 0

        @in_step
        def after_step(self, point: StepPoint) -> None:
            self.calls += 1
            if self.calls % self.every == 0:
                raise RuntimeError("the hook broke")

        def on_step_end(self, event: StepEnd, run: Run) -> None:
            self.events += 1

    always, often, recorder = Fails(1), Fails(2), Recorder()
    tiny_trainer(callbacks=[always, often, recorder]).train(tiny_batches(25), epochs=1)
    assert (always.calls, often.calls) == (10, 25)
    assert (always.events, often.events) == (25, 25)
    offs = [(each.callback, each.failures) for each in recorder.of(CallbackFailed) if each.disabled]
    assert offs == [("Fails", 10)]


def test_a_hook_that_raises_ends_the_run_unless_it_is_isolated() -> None:
    class Fails(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            raise ValueError("in a hook")

    class Isolated(Fails):
        on_error = "isolate"

    with pytest.raises(ValueError, match="in a hook"):
        tiny_trainer(callbacks=[Fails()]).train(BATCHES, epochs=1)
    result = tiny_trainer(callbacks=[Isolated()]).train(BATCHES, epochs=1)
    assert result.status == "completed"
    assert "in a hook" in result.callback_errors["Isolated"][0]


def test_averaging_weights_in_a_hook_and_validating_with_them() -> None:
    class Average(Callback):
        def __init__(self, model: nn.Module) -> None:
            self.average = torch.optim.swa_utils.AveragedModel(model)
            self.kept: dict[str, Tensor] = {}

        @in_step
        def after_step(self, point: StepPoint) -> None:
            self.average.update_parameters(point.model)

        @in_step
        def before_validation(self, point: StepPoint) -> None:
            self.kept = {name: value.clone() for name, value in point.model.state_dict().items()}
            point.model.load_state_dict(self.average.module.state_dict())

        @in_step
        def after_validation(self, point: StepPoint) -> None:
            point.model.load_state_dict(self.kept)

    trainer = tiny_trainer(lr=0.5)
    average = Average(trainer.model)
    result = trainer.train(BATCHES, BATCHES, epochs=2, callbacks=[average])
    averaged = tiny_trainer(model=average.average.module).evaluate(BATCHES)
    assert result.metrics["val_loss"] == averaged["val_loss"]
    assert trainer.evaluate(BATCHES)["val_loss"] != averaged["val_loss"]


@pytest.mark.parametrize("how", ["completed", "cancelled", "failed"])
def test_after_training_runs_last_however_training_ends(how: str) -> None:
    class Ends(Points):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            self.note(point)
            if how == "cancelled":
                point.run.cancel()
            elif how == "failed":
                raise ZeroDivisionError

        @in_step
        def after_training(self, point: StepPoint) -> None:
            self.note(point)
            if how == "failed":
                raise RuntimeError("must not hide the first one")

    hooks = Ends()
    trainer = tiny_trainer(callbacks=[hooks])
    if how == "failed":
        with pytest.raises(ZeroDivisionError):
            trainer.train(BATCHES[:1], epochs=1)
    else:
        assert trainer.train(BATCHES[:1], epochs=1).status == how
    assert [name for name, _, _ in hooks.seen] == ["after_step", "after_training"]


@pytest.mark.parametrize("how", ["completed", "stopped", "cancelled", "failed"])
def test_before_train_end_runs_in_order_after_the_last_checkpoint_of_a_run_that_ended_in_order(
    how: str, tmp_path: Path
) -> None:
    said: list[str] = []

    class Ends(Callback):
        def __init__(self, value: float) -> None:
            self.value = value

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if how == "stopped":
                point.run.stop_nowait()
            elif how == "cancelled":
                point.run.cancel()
            elif how == "failed":
                raise ZeroDivisionError

        @in_step
        def before_train_end(self, point: StepPoint) -> None:
            assert threading.current_thread() is not threading.main_thread()
            said.append(f"{self.value}, state {point.run.state}")
            for parameter in point.model.parameters():
                parameter.fill_(self.value)

    trainer = tiny_trainer(
        run_dir=tmp_path, run_name="a", callbacks=[Ends(1.0), ModelCheckpoint(), Ends(2.0)]
    )
    with pytest.raises(ZeroDivisionError) if how == "failed" else contextlib.nullcontext():
        assert trainer.train(BATCHES[:1], epochs=1).status == how
    is_called = how in ("completed", "stopped")
    state = "running" if how == "completed" else "stopping"
    assert said == ([f"1.0, state {state}", f"2.0, state {state}"] if is_called else [])
    assert all(bool((each == 2.0).all()) is is_called for each in trainer.model.parameters())
    if is_called:
        saved: Any = CheckpointReader(tmp_path / "a").load("last").state
        assert not any(bool((each == 2.0).all()) for each in saved["model"].values())


def test_failing_before_train_end_fails_the_run() -> None:
    class Fails(Callback):
        @in_step
        def before_train_end(self, point: StepPoint) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny_trainer(callbacks=[Fails()]).train(BATCHES, epochs=1)


def test_a_hook_outside_of_steps_leaves_the_steps_as_they_are() -> None:
    class Last(Callback):
        @in_step
        def after_training(self, point: StepPoint) -> None:
            assert not point._hooks.any

    assert tiny_trainer(callbacks=[Last()]).train(BATCHES, epochs=1).status == "completed"


def test_the_costs_of_a_callback_hold_the_time_of_its_hooks() -> None:
    class Computes(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            sum(range(10_000))

    class Idle(Callback):
        pass

    result = tiny_trainer().train(BATCHES, epochs=1, callbacks=[Computes(), Idle()])
    assert 0 < result.callback_costs["Computes"].in_step < result.seconds
    assert result.callback_costs["Idle"].in_step == 0


def test_a_point_shows_the_optimizer_about_to_step() -> None:
    class Two(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> None:
            for name in ("first", "second"):
                self.backward(cross_entropy(self.model(batch[0]), batch[1]))
                self.optimizer_step(name)

    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.optim.Optimizer] = []

        @in_step
        def before_optimizer_step(self, point: StepPoint) -> None:
            self.seen.append(point.optimizer)

        @in_step
        def after_step(self, point: StepPoint) -> None:
            self.seen.append(point.optimizer)

    model = tiny_model()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    look = Look()
    tiny_trainer(Two, model=model, optimizer={"first": first, "second": second}, callbacks=[look]).train(
        BATCHES[:1], epochs=1
    )
    assert look.seen == [first, second, first]


def test_gradients_take_no_memory_between_steps() -> None:
    class Look(Callback):
        looks = 0

        @in_step
        def before_batch(self, point: StepPoint) -> None:
            assert all(parameter.grad is None for parameter in point.model.parameters())
            self.looks += 1

    look = Look()
    tiny_trainer(callbacks=[look]).train(BATCHES, epochs=2)
    assert look.looks == 2 * len(BATCHES)


class LeavesAfter(AllPoints):
    """Has seen enough when a step is done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.last = step

    @in_step
    def after_step(self, point: StepPoint) -> None:
        super().after_step(point)
        if point.step == self.last:
            point.leave()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_callback_that_leaves_is_not_called_any_more_and_others_are(accumulated: int) -> None:
    leaving, staying = LeavesAfter(2), AllPoints()
    trainer = tiny_trainer(accumulate_grad_batches=accumulated)
    trainer.train(tiny_batches(4 * accumulated), BATCHES, epochs=1, callbacks=[leaving, staying])
    assert leaving.seen == staying.seen[: len(leaving.seen)]
    assert leaving.seen[-1] == ("after_step", 0, 2)
    assert staying.seen[-1] == ("before_train_end", 1, 4)
    trainer.train(BATCHES, epochs=1, callbacks=[leaving])  # a new run, in which it has not left
    assert leaving.seen.count(("after_step", 0, 1)) == 2


def test_commands_of_step_hooks_name_their_callback(tmp_path: Path) -> None:
    class Tires(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 3:
                point.run.stop_nowait("tired")

    recorder = Recorder()
    callbacks = [recorder, ModelCheckpoint(every_n_steps=2, save_last=False), Tires()]
    tiny_trainer(run_dir=str(tmp_path)).train(BATCHES, epochs=1, callbacks=callbacks)
    given = [(each.step, each.command, each.by) for each in recorder.of(CommandApplied)]
    assert given == [(2, "checkpoint", "ModelCheckpoint"), (3, "stop", "Tires")]
