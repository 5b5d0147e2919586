"""Values that a step logs: what they count in means, beside a loss that counts as much."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from offloop.engine import Callback, EpochEnd, Metrics, StepEnd, StepPoint, Trainer, ValidationEnd, in_step
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer

INPUTS, TARGETS = tiny_batches(1, batch_size=10)[0]
UNEVEN = list(zip(INPUTS.split([6, 3, 1]), TARGETS.split([6, 3, 1]), strict=True))


class Logging(Trainer):
    """Logs its loss under another name."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        self.log("same", loss)
        return loss


class Weighted(Logging):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        return {"loss": super().training_step(batch), "weight": 2.0 * len(batch[0]) ** 2}


class Twice(Trainer):
    """Logs a name several times in a batch: their mean counts."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        for factor in (0.5, 1.5) if len(batch[0]) > 1 else (1.0,):
            self.log("same", factor * loss)
        return loss


class Manual(Logging):
    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        loss = super().training_step(batch)
        self.backward(loss)
        self.optimizer_step()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        return super().training_step(batch)


class InHook(Callback):
    """Logs the loss from inside the step."""

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        assert point.loss is not None
        point.log("same", point.loss)


def means(trainer: Trainer) -> Metrics:
    recorder = Recorder()
    trainer.train(UNEVEN, UNEVEN, epochs=1, callbacks=[recorder])
    for event in recorder.of(StepEnd):
        assert event.metrics["same"] == pytest.approx(event.loss)
    return recorder.of(EpochEnd)[0].metrics


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (Logging, {}),
        (Logging, {"accumulate_grad_batches": 2}),
        (Weighted, {}),
        (Weighted, {"accumulate_grad_batches": 2}),
        (Twice, {}),
        (Twice, {"accumulate_grad_batches": 2}),
        (Manual, {}),
        (Logging, {"precision": "bf16-mixed"}),
    ],
)
def test_the_loss_logged_under_another_name_has_the_mean_of_the_loss(
    kind: type[Trainer], knobs: dict[str, Any]
) -> None:
    made = means(tiny_trainer(kind, **knobs))
    assert made["train_same"] == pytest.approx(made["train_loss"])
    assert made["val_same"] == pytest.approx(made["val_loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_hook_logs_for_a_batch_counts_as_its_loss(accumulate: int) -> None:
    trainer = tiny_trainer(accumulate_grad_batches=accumulate, callbacks=[InHook()])
    made = means(trainer)
    assert made["train_same"] == pytest.approx(made["train_loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_hook_logs_for_a_step_counts_as_all_its_batches(accumulate: int) -> None:
    class Number(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.log("number", float(point.step))

    trainer = tiny_trainer(accumulate_grad_batches=accumulate, callbacks=[Number()])
    made = trainer.train(UNEVEN, epochs=1).metrics
    weights = [6, 3, 1] if accumulate == 1 else [9, 1]
    expected = sum(number * weight for number, weight in enumerate(weights, start=1)) / 10
    assert made["train_number"] == pytest.approx(expected)


class Tokens(Trainer):
    """Logs a mean over tokens, of which each batch has its own number."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        count = len(batch[0]) ** 2
        self.log("tokens", float(count), weight=torch.tensor(count) if count > 1 else 1)
        return cross_entropy(self.model(batch[0]), batch[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_value_with_a_weight_of_its_own_counts_that_much(accumulate: int) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(Tokens, accumulate_grad_batches=accumulate, callbacks=[recorder])
    made = trainer.train(UNEVEN, UNEVEN, epochs=1).metrics
    expected = (36 * 36 + 9 * 9 + 1) / (36 + 9 + 1)
    assert made["train_tokens"] == pytest.approx(expected)
    assert made["val_tokens"] == pytest.approx(expected)
    first = recorder.of(StepEnd)[0].metrics["tokens"]
    assert first == (36 if accumulate == 1 else pytest.approx((36 * 36 + 9 * 9) / 45))


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, True, "much", torch.zeros(2)])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    class Odd(Trainer):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            self.log("odd", 1.0, weight=weight)
            return cross_entropy(self.model(batch[0]), batch[1])

    with pytest.raises(
        ValueError, match=r"the weight of log\('odd'\) must be a finite number of at least 0, got"
    ):
        tiny_trainer(Odd).train(UNEVEN, epochs=1)


def test_the_loss_of_a_weighted_window_is_the_mean_that_the_step_was_made_for() -> None:
    recorder = Recorder()
    tiny_trainer(Weighted, accumulate_grad_batches=3, callbacks=[recorder]).train(UNEVEN, epochs=1)
    (step,), (end,) = recorder.of(StepEnd), recorder.of(EpochEnd)
    assert step.loss == pytest.approx(end.metrics["train_loss"])


def test_what_an_own_epoch_logs_beside_its_batches_is_in_the_means() -> None:
    class Own(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for batch in self.batches(loader):
                self.train_batch(batch)
            self.log("beside", 1.0)
            self.log("beside", 2.0)

        def validate_epoch(self, loader: Any) -> None:
            super().validate_epoch(loader)
            self.log("beside", 3.0)

    made = tiny_trainer(Own).train(UNEVEN, UNEVEN, epochs=1).metrics
    assert (made["train_beside"], made["val_beside"]) == (1.5, 3.0)


# Steps without a loss -----------------------------------------------------------------------------------


class Silent(Trainer):
    """Logs what it minimizes, and returns nothing."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        loss = mse_loss(self.model(batch[0]), torch.zeros(len(batch[0]), 3))
        self.backward(loss)
        self.optimizer_step()
        self.log("judge", loss)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("judge", mse_loss(self.model(batch[0]), torch.zeros(len(batch[0]), 3)))


def test_a_manual_step_that_returns_nothing_has_no_loss_anywhere() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(Silent, monitor="val_judge", mode="min", callbacks=[recorder])
    result = trainer.train(UNEVEN, UNEVEN, epochs=2)
    assert [event.loss for event in recorder.of(StepEnd)] == [None] * 6
    made = [event.metrics for event in recorder.of(EpochEnd)]
    made += [event.metrics for event in recorder.of(ValidationEnd)]
    assert not any(name.endswith("loss") for metrics in made for name in metrics)
    assert not any(math.isnan(value) for value in result.metrics.values())
    assert result.best is not None
    assert result.best.monitor == "val_judge"
