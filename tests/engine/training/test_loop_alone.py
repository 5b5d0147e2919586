"""training/loop.py without a run: a program, a setup, and a list as the host."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.commands import Pause, Resume, Stop, Validate
from offloop.engine.config import TrainerConfig
from offloop.engine.errors import EmptyLoaderError, LossError
from offloop.engine.events import (
    EpochEnd,
    EpochStart,
    Event,
    StateChanged,
    StepEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.setup import Batch, Limits, Setup, SilentHost
from offloop.engine.training.step_output import StepOutput

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class ListHost(SilentHost):
    """Keeps every event in a list, and gives commands where a test wants them."""

    run_id = "alone"

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.events: list[Event] = []
        self.asked: list[Event] = []
        self.stop_at: type[Event] | None = None
        self.stop_step = 0

    def emit(self, event: Event, /) -> None:
        self.events.append(event)
        is_there = self.stop_at is not None and isinstance(event, self.stop_at)
        if is_there and event.step >= self.stop_step:
            self.stop_at = None
            self.mailbox.give(Stop(reason=f"at {type(event).__name__}"), by="test")

    def emit_step(self, event: Event, /) -> None:
        self.emit(event)

    def decide(self, event: Event, /) -> None:
        self.asked.append(event)

    @property
    def names(self) -> list[str]:
        """Return the classes of the events, samples included."""
        return [type(event).__name__ for event in self.events]

    def of(self, event_class: type[Any]) -> list[Any]:
        """Return the events of one class."""
        return [event for event in self.events if isinstance(event, event_class)]


class Program:
    """A linear model, trained batch by batch."""

    automatic_optimization = True

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: torch.nn.Module = torch.nn.Linear(3, 1)
        self.loss: Any = torch.nn.functional.mse_loss
        self.loop: TrainingLoop

    def training_step(self, batch: Batch, /) -> StepOutput:
        inputs, targets = batch
        loss: torch.Tensor = self.loss(self.model(inputs), targets)
        return loss

    def validation_step(self, batch: Batch, /) -> StepOutput:
        return self.training_step(batch)

    def train_epoch(self, loader: Iterable[Batch], /) -> None:
        for batch in self.loop.batches(loader):
            self.loop.train_batch(batch)

    def validate_epoch(self, loader: Iterable[Batch], /) -> None:
        for batch in self.loop.batches(loader):
            self.loop.validator.validate_batch(batch)


class ManualProgram(Program):
    """Steps every second batch by itself."""

    automatic_optimization = False
    batches_seen = 0

    def training_step(self, batch: Batch, /) -> StepOutput:
        loss = super().training_step(batch)
        assert isinstance(loss, torch.Tensor)
        self.loop.manual.backward(loss / 2)
        self.batches_seen += 1
        if self.batches_seen % 2 == 0:
            self.loop.manual.step("optimizer", None)
        return loss


def some_batches(count: int = 4, seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, 3, generator=generator), torch.randn(2, 1, generator=generator)) for _ in range(count)
    ]


class Alone:
    """A loop on its own, with everything that a test looks at."""

    def __init__(
        self,
        program: Program | None = None,
        *,
        batches: Batches | None = None,
        val_loader: Batches | None = None,
        limits: Limits | None = None,
        **knobs: Any,
    ) -> None:
        self.program = program or Program()
        self.optimizer = torch.optim.SGD(self.program.model.parameters(), lr=0.1)
        self.mailbox = Mailbox()
        self.host = ListHost(self.mailbox)
        setup = Setup(
            config=TrainerConfig(device="cpu", **knobs),
            limits=limits or Limits(epochs=1),
            device=torch.device("cpu"),
            optimizers={"optimizer": self.optimizer},
            train_loader=some_batches() if batches is None else batches,
            val_loader=val_loader,
            monitor="train_loss",
        )
        self.loop = TrainingLoop(self.program, setup, self.host, mailbox=self.mailbox)
        self.program.loop = self.loop

    def run(self) -> "Alone":
        self.loop.run()
        return self

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([each.detach().flatten() for each in self.program.model.parameters()])


def by_hand(batches: Batches, *, epochs: int = 1, window: int = 1) -> torch.Tensor:
    """Return the weights after a loop written by hand."""
    program = Program()
    optimizer = torch.optim.SGD(program.model.parameters(), lr=0.1)
    for _ in range(epochs):
        for start in range(0, len(batches), window):
            part = batches[start : start + window]
            for inputs, targets in part:
                (torch.nn.functional.mse_loss(program.model(inputs), targets) / len(part)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([each.detach().flatten() for each in program.model.parameters()])


def test_a_plain_epoch_publishes_its_events_and_trains_as_by_hand() -> None:
    alone = Alone(limits=Limits(epochs=2)).run()
    epoch = ["EpochStart", *["StepEnd"] * 4, "EpochEnd"]
    assert alone.host.names == ["TrainStart", *epoch, *epoch]
    assert [type(event) for event in alone.host.asked] == [
        TrainStart,
        EpochStart,
        EpochEnd,
        EpochStart,
        EpochEnd,
    ]
    assert torch.equal(alone.weights, by_hand(some_batches(), epochs=2))
    progress = alone.loop.progress
    assert (progress.epoch, progress.step, progress.batch, progress.epoch_samples) == (2, 8, 8, 8)
    assert progress.ending is None and [end.epoch for end in progress.history] == [0, 1]
    assert progress.latest.keys() == {"train_loss", "lr"}
    assert {event.run_id for event in alone.host.events} == {"alone"}


def test_accumulation_steps_once_a_window_and_closes_a_short_one() -> None:
    batches = some_batches(5)
    alone = Alone(batches=batches, accumulate_grad_batches=2).run()
    assert [event.batch for event in alone.host.of(StepEnd)] == [2, 4, 5]
    assert [event.samples for event in alone.host.of(StepEnd)] == [4, 4, 2]
    assert torch.allclose(alone.weights, by_hand(batches, window=2), rtol=1e-6)


def test_validation_runs_after_the_epoch_in_eval_mode_and_leaves_the_weights() -> None:
    modes: list[bool] = []

    class Watches(Program):
        def validation_step(self, batch: Batch, /) -> StepOutput:
            modes.append(self.model.training)
            return super().validation_step(batch)

    alone = Alone(Watches(), val_loader=some_batches(2, seed=2)).run()
    assert alone.host.names[-4:] == ["StepEnd", "ValidationStart", "ValidationEnd", "EpochEnd"]
    assert modes == [False, False] and alone.program.model.training
    assert torch.equal(alone.weights, by_hand(some_batches()))
    end = alone.host.of(ValidationEnd)[0]
    assert end.samples == 4 and end.metrics.keys() == {"val_loss"}
    assert alone.host.of(EpochEnd)[0].metrics["val_loss"] == end.metrics["val_loss"]
    assert alone.loop.progress.validated_step == 4 and alone.loop.progress.val_batches == 2


def test_validation_every_few_steps() -> None:
    alone = Alone(val_loader=some_batches(1), val_every_n_steps=2).run()
    assert [event.step for event in alone.host.of(ValidationEnd)] == [2, 4]


def test_manual_steps_are_counted_when_an_optimizer_stepped() -> None:
    batches = some_batches(4)
    alone = Alone(ManualProgram(), batches=batches).run()
    assert [event.batch for event in alone.host.of(StepEnd)] == [2, 4]
    assert alone.loop.progress.steps_of == {"optimizer": 2}
    assert torch.allclose(alone.weights, by_hand(batches, window=2), rtol=1e-6)


def test_a_limit_of_steps_ends_the_run_in_the_middle_of_an_epoch() -> None:
    alone = Alone(limits=Limits(max_steps=3)).run()
    assert len(alone.host.of(StepEnd)) == 3
    end = alone.host.of(EpochEnd)[0]
    assert not end.complete and end.final
    assert alone.loop.progress.ending == "limit" and alone.loop.progress.reason == "max_steps=3"
    assert alone.loop.progress.epoch == 0


def test_a_limit_of_batches_makes_epochs_shorter() -> None:
    alone = Alone(limits=Limits(epochs=2), limit_train_batches=3).run()
    assert [event.step for event in alone.host.of(EpochEnd)] == [3, 6]


def test_a_limit_of_time_ends_the_run_where_it_is_looked_at() -> None:
    alone = Alone(limits=Limits(epochs=5, max_time=1e-9)).run()
    assert alone.loop.progress.ending == "limit" and not alone.host.of(StepEnd)


@pytest.mark.parametrize(
    ("where", "step", "steps_done", "last"),
    [
        (TrainStart, 0, 0, "StateChanged"),
        (EpochStart, 0, 0, "StateChanged"),
        (StepEnd, 2, 2, "CommandApplied"),
        (ValidationStart, 0, 4, "CommandApplied"),
        (ValidationEnd, 0, 4, "EpochEnd"),
        (EpochEnd, 0, 4, "CommandApplied"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_stop_takes_effect_in_each_place(where: type[Event], step: int, steps_done: int, last: str) -> None:
    alone = Alone(val_loader=some_batches(1), limits=Limits(epochs=3))
    alone.host.stop_at, alone.host.stop_step = where, step
    alone.run()
    progress = alone.loop.progress
    assert progress.ending == "stopped" and progress.reason == f"at {where.__name__}"
    assert progress.step == steps_done == len(alone.host.of(StepEnd))
    assert any(isinstance(event, StateChanged) and event.state == "stopping" for event in alone.host.events)
    assert bool(alone.host.of(EpochEnd)) == (where in (ValidationEnd, EpochEnd))


def test_a_stop_in_a_window_waits_for_its_end() -> None:
    class Stops(Program):
        def training_step(self, batch: Batch, /) -> StepOutput:
            if self.loop.progress.batch == 1:
                self.loop.mailbox.give(Stop(reason="now"), by="test")
            return super().training_step(batch)

    alone = Alone(Stops(), accumulate_grad_batches=2).run()
    assert [event.batch for event in alone.host.of(StepEnd)] == [2]
    assert alone.loop.progress.ending == "stopped"


def test_a_cancellation_leaves_a_window_unfinished() -> None:
    class Cancels(Program):
        def training_step(self, batch: Batch, /) -> StepOutput:
            if self.loop.progress.batch == 3:
                self.loop.mailbox.cancel("gone")
            return super().training_step(batch)

    alone = Alone(Cancels(), accumulate_grad_batches=2).run()
    assert len(alone.host.of(StepEnd)) == 1
    assert alone.loop.progress.ending == "cancelled" and alone.loop.progress.reason == "gone"
    assert not alone.loop.has_whole_steps


def test_a_pause_ends_with_a_resume() -> None:
    alone = Alone()
    given = [alone.mailbox.give(each, by="test") for each in (Pause(), Resume())]
    alone.run()
    assert [event.state for event in alone.host.of(StateChanged)] == ["paused", "running"]
    assert all(future.done() for future in given) and len(alone.host.of(StepEnd)) == 4


def test_a_command_validates_at_the_next_step() -> None:
    alone = Alone(val_loader=some_batches(1))
    future = alone.mailbox.give(Validate(), by="test")
    alone.run()
    assert future.result().keys() == {"val_loss"}
    assert [event.step for event in alone.host.of(ValidationEnd)] == [0, 4]


def test_what_fails_is_raised_after_the_events_before_it() -> None:
    class Fails(Program):
        def training_step(self, batch: Batch, /) -> StepOutput:
            if self.loop.progress.batch == 3:
                raise ZeroDivisionError("in the step")
            return super().training_step(batch)

    alone = Alone(Fails())
    with pytest.raises(ZeroDivisionError, match="in the step"):
        alone.run()
    assert len(alone.host.of(StepEnd)) == 2


def test_a_loss_that_is_not_finite_ends_the_run_before_it_changes_the_weights() -> None:
    batches = some_batches(2)
    batches[1][1].fill_(float("nan"))
    alone = Alone(batches=batches)
    with pytest.raises(LossError, match="step 2"):
        alone.run()
    assert torch.equal(alone.weights, by_hand(batches[:1]))


def test_an_empty_loader_is_named() -> None:
    with pytest.raises(EmptyLoaderError, match="train_loader gave no batch"):
        Alone(batches=[]).run()


def test_nothing_is_kept_of_a_run_that_was_closed() -> None:
    alone = Alone(val_loader=some_batches(1)).run()
    alone.loop.close()
    progress = alone.loop.progress
    assert progress.step == 4 and progress.history and progress.latest
    assert not alone.loop.window.losses and not alone.loop.validator.metrics
