"""engine/metrics/logged_names.py: a logged value never takes the place of another, nor the other way round."""

from typing import Any

import pytest
import torch
from torchmetrics import MeanSquaredError

from offloop.engine import Callback, StepPoint, Trainer, in_step
from offloop.engine.metrics.logged_names import COLUMNS
from offloop.engine.testing import tiny_batches, tiny_trainer


class Logging(Trainer):
    """Logs a value in each step."""

    name: Any

    def training_step(self, batch: Any) -> Any:
        self.log(self.name, 0.123)
        return super().training_step(batch)


class LoggingInValidation(Logging):
    """Logs it in validations only."""

    def training_step(self, batch: Any) -> Any:
        return Trainer.training_step(self, batch)

    def validation_step(self, batch: Any) -> Any:
        self.log(self.name, 0.123)
        return Trainer.training_step(self, batch)


def trainer_that_logs(name: Any, kind: type[Logging] = Logging) -> Logging:
    trainer = tiny_trainer(kind)
    assert isinstance(trainer, Logging)
    trainer.name = name
    return trainer


@pytest.mark.parametrize("kind", [Logging, LoggingInValidation])
@pytest.mark.parametrize("metrics", [["accuracy"], ["acc"], ["f1_score", "accuracy"]])
def test_the_name_of_a_metric_is_refused_at_the_first_step(kind: type[Logging], metrics: list[str]) -> None:
    trainer = trainer_that_logs("accuracy", kind)
    with pytest.raises(
        ValueError, match=r"log\('accuracy'\): metrics= has 'accuracy' already.*'batch_accuracy'"
    ):
        trainer.train(tiny_batches(2), tiny_batches(1), epochs=1, metrics=metrics)
    assert trainer.last_run is not None and trainer.last_run.result.epochs == 0


def test_without_that_metric_the_name_is_free() -> None:
    result = trainer_that_logs("accuracy").train(tiny_batches(2), epochs=1)
    assert result.metrics["train_accuracy"] == pytest.approx(0.123)


@pytest.mark.parametrize(
    "name", ["step", "epoch", "batch", "time", "attempt", "lr", "grad_norm", "samples", "type"]
)
def test_the_name_of_a_column_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"the run writes its '{name}'.*'my_{name}'"):
        trainer_that_logs(name).train(tiny_batches(2), epochs=1)


def test_what_loggers_write_for_a_step_is_among_the_columns() -> None:
    assert {"time", "attempt", "epoch", "step", "batch", "loss", "lr", "grad_norm", "loss_scale"} <= COLUMNS


def test_step_hooks_are_held_to_the_same_names() -> None:
    class Hook(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.log("lr", 1.0)

    with pytest.raises(ValueError, match="the run writes its 'lr'"):
        tiny_trainer().train(tiny_batches(2), epochs=1, callbacks=[Hook()])


class Several(MeanSquaredError):
    """Gives several values, whose names are known when it is read only."""

    def compute(self) -> Any:
        return {"first": super().compute(), "second": torch.tensor(2.0)}

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        super().update(preds[:, 0], target.float())


@pytest.mark.parametrize("kind", [Logging, LoggingInValidation])
def test_one_of_several_values_of_a_metric_does_not_take_the_place_of_what_was_logged(
    kind: type[Logging],
) -> None:
    trainer = trainer_that_logs("own_second", kind)
    with pytest.raises(ValueError, match=r"_own_second was logged, and metrics= computes it too"):
        trainer.train(tiny_batches(2), tiny_batches(1), epochs=1, metrics={"own": Several()})
