"""loop.py and reporter.py: what a run says, step by step; own epochs, logged values, losses gone wrong."""

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR

from offloop.engine import (
    EpochEnd,
    EpochStart,
    LearningRateChanged,
    LossError,
    MetricNotFoundError,
    StepEnd,
    TrainEnd,
    Trainer,
    TrainStart,
    ValidationEnd,
)
from offloop.engine.testing import Recorder, reproducible, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)


# The story ------------------------------------------------------------------------------------------------


def test_a_run_is_told_from_start_to_end() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder])
    trainer.train(BATCHES[:2], BATCHES[2:], epochs=2, metrics=["accuracy"])
    epoch = [
        *("EpochStart", "StepEnd", "StepEnd"),
        *("ValidationStart", "ValidationEnd", "EpochEnd"),
    ]
    assert recorder.names() == ["TrainStart", *epoch, *epoch, "TrainEnd"]
    assert [event.seq for event in recorder.events] == list(range(14))
    positions = [(event.epoch, event.step, event.batch) for event in recorder.events]
    first = [(0, 0, 0), (0, 1, 1), (0, 2, 2), *[(0, 2, 2)] * 3]
    second = [(1, 2, 2), (1, 3, 3), (1, 4, 4), *[(1, 4, 4)] * 3]
    assert positions[:-1] == [(0, 0, 0), *first, *second]
    times = [event.time for event in recorder.events]
    assert times == sorted(times)


def test_the_start_says_what_will_be_done() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(accumulate_grad_batches=3, callbacks=[recorder])
    next(trainer.model.parameters()).requires_grad_(False)
    trainer.train(BATCHES, epochs=2, max_steps=100, max_time=1e6)
    (start,) = recorder.of(TrainStart)
    assert (start.batches_per_epoch, start.steps_per_epoch) == (4, 2)
    assert (start.epochs, start.max_steps, start.max_time) == (2, 100, 1e6)
    assert (start.device, start.parameters) == ("cpu", 16 + 16 * 3 + 3)
    assert start.config["accumulate_grad_batches"] == 3


def test_a_lazy_model_learns_its_shapes_in_the_first_step() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 3))
    recorder = Recorder()
    tiny_trainer(model=model, callbacks=[recorder]).train(BATCHES, epochs=1)
    assert recorder.of(TrainStart)[0].parameters == 12  # of those that have a shape
    assert sum(parameter.numel() for parameter in model.parameters()) == 39


def test_a_step_says_what_it_used_and_took() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(gradient_clip_val=1e-3, accumulate_grad_batches=2, lr=0.25, callbacks=[recorder])
    trainer.train(BATCHES, epochs=1)
    for end in recorder.of(StepEnd):
        assert (end.lr, end.samples, end.skipped, dict(end.metrics)) == (0.25, 8, False, {})
        assert end.grad_norm is not None and end.grad_norm > 1e-3  # before clipping
        assert end.step_time > 0 and end.data_time > 0
    unclipped = Recorder()
    tiny_trainer(callbacks=[unclipped]).train(BATCHES, epochs=1)
    assert {end.grad_norm for end in unclipped.of(StepEnd)} == {None}


def test_a_schedule_by_epochs_is_told_as_a_change_and_one_by_steps_is_not() -> None:
    def run(interval: str) -> Recorder:
        recorder = Recorder()
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = tiny_trainer(
            model=model,
            optimizer=optimizer,
            scheduler=ExponentialLR(optimizer, gamma=0.5),
            scheduler_interval=interval,
            callbacks=[recorder],
        )
        trainer.train(BATCHES[:2], epochs=2)
        return recorder

    by_epoch, by_step = run("epoch"), run("step")
    assert [(change.previous, change.lr, change.source) for change in by_epoch.of(LearningRateChanged)] == [
        (1.0, 0.5, "schedule"),
        (0.5, 0.25, "schedule"),
    ]
    assert [end.lr for end in by_epoch.of(StepEnd)] == [1.0, 1.0, 0.5, 0.5]
    assert [end.metrics["lr"] for end in by_epoch.of(EpochEnd)] == [1.0, 0.5]
    assert by_step.of(LearningRateChanged) == []
    assert [end.lr for end in by_step.of(StepEnd)] == [1.0, 0.5, 0.25, 0.125]


def test_a_missing_metric_raises_and_lists_those_there_are() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder]).train(BATCHES, epochs=1)
    (end,) = recorder.of(EpochEnd)
    with pytest.raises(MetricNotFoundError, match="no metric 'val_loss' here; there are: train_loss, lr"):
        end.metrics["val_loss"]


def test_same_seed_and_data_give_the_same_story() -> None:
    def story() -> Any:
        recorder = Recorder()
        trainer = tiny_trainer(
            model=tiny_model(dropout=0.5), seed=1, gradient_clip_val=0.1, callbacks=[recorder]
        )
        trainer.train(BATCHES, BATCHES, epochs=2, metrics=["accuracy"])
        return reproducible(recorder.events)

    assert story() == story()


# Own epochs -----------------------------------------------------------------------------------------------


def test_an_own_epoch_like_the_default_one_changes_nothing() -> None:
    class Own(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for batch in self.batches(loader):
                self.train_batch(batch)

    own, default = Recorder(), Recorder()
    tiny_trainer(Own, callbacks=[own], accumulate_grad_batches=3).train(BATCHES, epochs=2)
    tiny_trainer(callbacks=[default], accumulate_grad_batches=3).train(BATCHES, epochs=2)
    assert reproducible(own.events) == reproducible(default.events)


def test_an_own_epoch_may_leave_early_in_the_middle_of_a_window() -> None:
    class Own(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for number, batch in enumerate(self.batches(loader), 1):
                self.train_batch(batch)
                if number == 3:
                    break

    recorder = Recorder()
    trainer = tiny_trainer(Own, callbacks=[recorder], accumulate_grad_batches=2)
    result = trainer.train(BATCHES, epochs=2)
    assert [end.samples for end in recorder.of(StepEnd)] == [8, 4, 8, 4]
    assert [end.complete for end in recorder.of(EpochEnd)] == [True, True]
    assert (result.epochs, result.steps) == (2, 4)

    expected = tiny_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    for window in (BATCHES[:2], BATCHES[2:3]) * 2:
        for x, y in window:
            (cross_entropy(expected(x), y) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dict(trainer.model.state_dict()), dict(expected.state_dict()))


def test_an_own_epoch_may_use_two_loaders() -> None:
    class Own(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for each in (loader, BATCHES[3:]):
                for batch in self.batches(each):
                    self.train_batch(batch)

    recorder = Recorder()
    tiny_trainer(Own, callbacks=[recorder], accumulate_grad_batches=2).train(BATCHES[:3], epochs=1)
    assert [(end.step, end.batch, end.samples) for end in recorder.of(StepEnd)] == [
        (1, 2, 8),
        (2, 3, 4),  # a window ends with its loader
        (3, 4, 4),
    ]


def test_an_own_epoch_may_leave_batches_out() -> None:
    class Own(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for number, batch in enumerate(self.batches(loader)):
                if number != 1:
                    self.train_batch(batch)

    recorder = Recorder()
    tiny_trainer(Own, callbacks=[recorder]).train(BATCHES, epochs=1)
    assert [(end.step, end.batch) for end in recorder.of(StepEnd)] == [(1, 1), (2, 3), (3, 4)]


def test_batches_of_somewhere_else_are_refused() -> None:
    class Own(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for batch in loader:
                self.train_batch(batch)

    with pytest.raises(RuntimeError, match=r"takes the batches of `for batch in self.batches\(loader\)`"):
        tiny_trainer(Own).train(BATCHES, epochs=1)


def test_a_loader_that_fails_ends_the_run_with_its_own_exception() -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield BATCHES[0]
            raise OSError("disk gone")

    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder])
    with pytest.raises(OSError, match="disk gone") as caught:
        trainer.train(Broken(), epochs=1)
    assert recorder.names() == ["TrainStart", "EpochStart", "StepEnd", "StateChanged", "TrainEnd"] or (
        recorder.names() == ["TrainStart", "EpochStart", "StepEnd", "TrainEnd"]
    )
    assert "epoch 0, step 1" in caught.value.__notes__[0]


# Logged values --------------------------------------------------------------------------------------------


def test_logged_values_are_on_the_step_and_in_the_means_of_the_epoch() -> None:
    class Logs(Trainer):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            self.log("number", self.step)
            value = torch.tensor(float(self.step))
            self.log("tensor", value)
            value.fill_(-1.0)  # what was logged is the value as it was
            self.log("twice", 1.0)
            self.log("twice", 3.0)
            return super().training_step(batch)

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            self.log("tensor", torch.tensor([5.0]))
            return cross_entropy(self.model(batch[0]), batch[1])

    recorder = Recorder()
    tiny_trainer(Logs, callbacks=[recorder]).train(BATCHES[:3], BATCHES, epochs=1)
    assert [dict(end.metrics) for end in recorder.of(StepEnd)] == [
        {"number": float(step), "tensor": float(step), "twice": 2.0} for step in range(3)
    ]
    (end,) = recorder.of(EpochEnd)
    assert {name: value for name, value in end.metrics.items() if "loss" not in name} == {
        "lr": 0.05,
        "train_number": 1.0,
        "train_tensor": 1.0,
        "train_twice": 2.0,
        "val_tensor": 5.0,
    }
    (validation,) = recorder.of(ValidationEnd)
    assert set(validation.metrics) == {"val_tensor", "val_loss"}


def test_a_value_logged_in_each_batch_of_a_window_is_the_mean_of_it() -> None:
    class Logs(Trainer):
        seen = 0

        def training_step(self, batch: Any) -> Any:
            self.seen += 1
            self.log("seen", self.seen)
            return super().training_step(batch)

    recorder = Recorder()
    tiny_trainer(Logs, callbacks=[recorder], accumulate_grad_batches=2).train(BATCHES, epochs=1)
    assert [end.metrics["seen"] for end in recorder.of(StepEnd)] == [1.5, 3.5]
    assert recorder.of(EpochEnd)[0].metrics["train_seen"] == 2.5


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.zeros(2), ValueError, r"log\('x'\) takes one number, got a tensor of shape \(2,\)"),
        ("1.0", TypeError, r"log\('x'\) takes a number or a tensor of one element, got '1.0'"),
        (True, TypeError, r"log\('x'\) takes a number or a tensor of one element, got True"),
    ],
    ids=["vector", "text", "boolean"],
)
def test_what_is_no_number_is_not_logged(value: Any, error: type[Exception], text: str) -> None:
    class Logs(Trainer):
        def training_step(self, batch: Any) -> Any:
            self.log("x", value)

    with pytest.raises(error, match=text):
        tiny_trainer(Logs).train(BATCHES, epochs=1)


# Losses gone wrong ----------------------------------------------------------------------------------------


class Spoiled(Trainer):
    """Its second step has a loss that is not finite."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        return loss * float("inf") if self.step == 1 else loss


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(Spoiled, callbacks=[recorder])
    with pytest.raises(LossError, match=r"the loss of step 2 is inf; on_nonfinite=\"warn\" continues"):
        trainer.train(BATCHES, epochs=1)
    assert [end.step for end in recorder.of(StepEnd)] == [1]
    (end,) = recorder.of(TrainEnd)
    assert (end.failed_step, end.failed_loss) == (2, float("inf"))


def test_a_run_that_fails_otherwise_has_no_failed_loss() -> None:
    class Fails(Trainer):
        def training_step(self, batch: Any) -> Any:
            raise ValueError("no")

    recorder = Recorder()
    with pytest.raises(ValueError, match="no"):
        tiny_trainer(Fails, callbacks=[recorder]).train(BATCHES, epochs=1)
    (end,) = recorder.of(TrainEnd)
    assert (end.failed_step, end.failed_loss) == (None, None)


class SpoiledManually(Spoiled):
    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        self.backward(loss)
        self.optimizer_step()
        return loss


class SpoiledInClosure(Spoiled):
    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = Spoiled.training_step(self, batch)
            self.backward(loss)
            return loss

        loss: Tensor = self.optimizer_step(closure=closure)
        return loss


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (Spoiled, {}),
        (Spoiled, {"accumulate_grad_batches": 2}),
        (Spoiled, {"precision": "bf16-mixed"}),
        (SpoiledManually, {}),
        (SpoiledInClosure, {}),
    ],
)
def test_a_loss_that_is_not_finite_changes_no_weight_on_the_cpu(
    kind: type[Trainer], knobs: dict[str, Any]
) -> None:
    model = tiny_model()
    optimizer = torch.optim.LBFGS(model.parameters()) if kind is SpoiledInClosure else None
    with pytest.raises(LossError, match="the loss of step 2 is"):
        tiny_trainer(kind, model=model, optimizer=optimizer, **knobs).train(BATCHES, epochs=1)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_line_search_may_try_weights_without_a_finite_loss() -> None:
    class Searching(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            calls = 0

            def closure() -> Tensor:
                nonlocal calls
                calls += 1
                self.optimizer.zero_grad()
                loss = cross_entropy(self.model(batch[0]), batch[1])
                self.backward(loss * float("nan") if calls == 2 else loss)
                for parameter in self.model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.nan_to_num_()
                return loss

            loss: Tensor = self.optimizer_step(closure=closure)
            return loss

    model = tiny_model()
    trainer = tiny_trainer(
        Searching, model=model, optimizer=torch.optim.LBFGS(model.parameters(), max_iter=3)
    )
    assert trainer.train(BATCHES, max_steps=2).steps == 2


def test_on_nonfinite_warn_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="offloop"):
        result = tiny_trainer(Spoiled, on_nonfinite="warn").train(BATCHES[:2], epochs=1)
    assert result.status == "completed"
    assert [record.getMessage() for record in caplog.records] == ["the loss of step 2 is inf"]


def test_on_nonfinite_warn_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="offloop"):
        tiny_trainer(lr=1e30, on_nonfinite="warn").train(BATCHES * 5, epochs=1)
    messages = [record.getMessage() for record in caplog.records if "is nan" in record.getMessage()]
    assert [re.findall(r"\((\d+) so far\)", each) for each in messages] == [[], ["2"], ["4"], ["8"], ["16"]]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_on_nonfinite_skip_step_leaves_such_updates_out(precision: str) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(Spoiled, on_nonfinite="skip_step", precision=precision, callbacks=[recorder])
    trainer.train(BATCHES, epochs=1)
    assert [end.skipped for end in recorder.of(StepEnd)] == [False, True, False, False]
    assert [end.loss is not None and math.isfinite(end.loss) for end in recorder.of(StepEnd)] == [
        True,
        False,
        True,
        True,
    ]

    expected = tiny_trainer(precision=precision)
    expected.train([BATCHES[0], *BATCHES[2:]], epochs=1)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_skip_step_looks_at_gradients_too() -> None:
    class HugeGradient(Trainer):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            if self.step == 1:
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss

    recorder = Recorder()
    trainer = tiny_trainer(HugeGradient, on_nonfinite="skip_step", callbacks=[recorder])
    trainer.train(BATCHES[:3], epochs=1)
    assert [end.skipped for end in recorder.of(StepEnd)] == [False, True, False]
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


def test_a_step_that_the_scaler_left_out_counts_and_is_reported_from_the_first_on() -> None:
    class Overflow(Trainer):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            if self.step in (0, 2):
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss

    recorder = Recorder()
    trainer = tiny_trainer(Overflow, precision="16-mixed", callbacks=[recorder])
    result = trainer.train(BATCHES, epochs=1)
    ends = recorder.of(StepEnd)
    assert [end.skipped for end in ends] == [True, False, True, False]
    assert [end.metrics["loss_scale"] for end in ends] == [2.0**15, 2.0**15, 2.0**14, 2.0**14]
    assert result.steps == 4


def test_epochs_start_where_the_last_one_ended() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder]).train(BATCHES, epochs=3)
    assert [(start.epoch, start.step) for start in recorder.of(EpochStart)] == [(0, 0), (1, 4), (2, 8)]
