"""monitors.py: which metric decides what, and that the choice of one callback changes no decision of another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from offloop.callbacks import EarlyStopping, LearningRateScheduler, ModelCheckpoint, WeightAverage
from offloop.engine import (
    Callback,
    ConfigError,
    Run,
    StepPoint,
    Trainer,
    TrainerConfig,
    TrainStart,
    decides,
    in_step,
)
from offloop.engine.session.monitors import Monitors
from offloop.engine.testing import tiny_batches, tiny_model, tiny_trainer


class Wish(Callback):
    """Names a metric of its own."""

    def __init__(self, key: str, mode: Any = "auto") -> None:
        self.best_by = (key, mode)


def monitors(*callbacks: Callback, val_loader: Any = (), **knobs: Any) -> Monitors:
    return Monitors(TrainerConfig(**knobs), callbacks, ["accuracy"], val_loader)


@pytest.mark.parametrize(
    ("knobs", "wishes", "default", "best", "direction"),
    [
        ({}, [], "val_loss", "val_loss", "min"),
        ({"val_loader": None}, [], "train_loss", "train_loss", "min"),
        ({}, ["val_accuracy"], "val_loss", "val_accuracy", "max"),
        ({}, ["val_accuracy", "train_loss"], "val_loss", "val_accuracy", "max"),
        ({"monitor": "train_accuracy"}, ["val_loss"], "train_accuracy", "train_accuracy", "max"),
        ({"monitor": "val_loss", "mode": "max"}, ["val_accuracy"], "val_loss", "val_loss", "max"),
    ],
    ids=str,
)
def test_each_has_one_owner(knobs: Any, wishes: list[str], default: str, best: str, direction: str) -> None:
    found = monitors(*map(Wish, wishes), **knobs)
    assert (found.default, found.best, found.best_direction) == (default, best, direction)
    assert found.is_best_named == bool(wishes or "monitor" in knobs)


def test_direction_comes_from_the_trainer_then_from_the_metric_then_from_the_callback() -> None:
    said = monitors(monitor="val_loss", mode="max")
    assert (said.direction_of("val_loss"), said.direction_of("train_loss")) == ("max", "min")
    assert monitors(Wish("val_accuracy", "min")).direction_of("val_accuracy") == "max"
    wished = monitors(Wish("val_blub", "max"))
    assert (wished.direction_of("val_blub"), wished.direction_of("val_other")) == ("max", None)


def test_wish_that_cannot_be_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="monitor='val_blub' is no known metric: train_loss, "):
        monitors(Wish("val_blub"))
    with pytest.raises(ConfigError, match="needs a validation"):
        monitors(Wish("val_accuracy"), val_loader=None)


FORGOTTEN = "will not be computed, but train_loss, val_loss will be computed: "


@pytest.mark.parametrize(
    ("monitor", "metrics", "text"),
    [
        ("val_accuracy", [], FORGOTTEN + r"give train\(\) metrics=\['accuracy'\]"),
        ("val_acc", [], FORGOTTEN + r"give train\(\) metrics=\['accuracy'\] and monitor val_accuracy"),
        ("val_acc", ["accuracy"], "did you mean val_accuracy"),
        ("val_acuracy", ["accuracy"], "did you mean val_accuracy"),
        ("val_own", ["accuracy"], "name it in metrics= of train"),
    ],
)
def test_a_metric_that_nothing_computes_is_found_before_the_run(
    tmp_path: Path, monitor: str, metrics: list[str], text: str
) -> None:
    """Whatever names it; the steps of `Trainer` log nothing."""
    loaders: Any = (tiny_batches(2), tiny_batches(2))
    cases: list[tuple[Callback | None, dict[str, Any]]] = [
        (ModelCheckpoint(monitor, mode="max"), {}),
        (EarlyStopping(monitor, mode="max"), {}),
        (LearningRateScheduler("reduce_on_plateau", monitor=monitor, mode="max"), {}),
        (None, {"monitor": monitor, "mode": "max"}),
    ]
    for callback, knobs in cases:
        trainer = tiny_trainer(run_dir=str(tmp_path / "runs"), **knobs)
        callbacks = [] if callback is None else [callback]
        with pytest.raises(ConfigError, match=text):
            trainer.train(*loaders, epochs=1, metrics=metrics, callbacks=callbacks)
    assert not (tmp_path / "runs").exists()


def test_a_callback_that_needs_a_validation_says_so_before_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path / "runs"))
    with pytest.raises(ConfigError, match="monitor='val_loss' needs a validation"):
        trainer.train(tiny_batches(2), epochs=1, callbacks=[EarlyStopping("val_loss")])
    assert not (tmp_path / "runs").exists()


class Logs(Callback):
    """Logs a value in a step hook."""

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        point.log("own", 1.0)


class LogsInSteps(Trainer):
    def training_step(self, batch: Any) -> Any:
        self.log("own", 1.0)
        return super().training_step(batch)


def test_a_metric_that_a_step_or_a_hook_may_log_is_awaited() -> None:
    stopping = EarlyStopping("train_own", mode="max", patience=1)
    result = tiny_trainer().train(tiny_batches(2), epochs=3, callbacks=[stopping, Logs()])
    assert (result.status, result.epochs) == ("stopped", 2)
    stopping = EarlyStopping("train_own", mode="max", patience=1)
    assert tiny_trainer(LogsInSteps).train(tiny_batches(2), epochs=3, callbacks=[stopping]).epochs == 2


def test_a_metric_of_the_weights_in_training_is_computed_beside_an_average() -> None:
    callbacks = [WeightAverage(validate="both"), EarlyStopping("val_live_loss")]
    result = tiny_trainer().train(tiny_batches(2), tiny_batches(2), epochs=2, callbacks=callbacks)
    assert result.status == "completed"


# Plateaus --------------------------------------------------------------------------------------------


class Improving(Trainer):
    """Validates with less loss and more right answers from epoch to epoch."""

    def validation_step(self, batch: Any) -> Any:
        targets, right = batch[1], self.epoch + 1
        outputs = torch.nn.functional.one_hot((targets + 1) % 3, 3).float()
        outputs[:right] = torch.nn.functional.one_hot(targets[:right], 3).float()
        return {"loss": torch.tensor(1 / right), "outputs": outputs, "targets": targets}


def rates(plateau_mode: Any, *callbacks: Callback, **knobs: Any) -> list[float]:
    """Return the rate of each epoch under a plateau that loses patience at once."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer, mode=plateau_mode, patience=0)
    trainer = tiny_trainer(Improving, model=model, optimizer=optimizer, scheduler=plateau, **knobs)
    result = trainer.train(
        tiny_batches(1), tiny_batches(1), epochs=4, metrics=["accuracy"], callbacks=callbacks
    )
    return [end.metrics["lr"] for end in result.history]


@pytest.mark.parametrize("wish", ["val_accuracy", "val_loss", "train_accuracy"])
def test_plateau_of_the_trainer_keeps_its_metric_beside_callbacks_of_another(wish: str) -> None:
    assert rates("min", Wish(wish)) == [0.1] * 4


def test_plateau_of_the_trainer_watches_the_trainers_monitor() -> None:
    assert rates("max", Wish("val_loss"), monitor="val_accuracy") == [0.1] * 4


@pytest.mark.parametrize(
    ("mode", "knobs", "text"),
    [
        ("max", {}, "has mode='max', but less of its metric 'val_loss' is better"),
        (
            "min",
            {"monitor": "val_accuracy"},
            "has mode='min', but more of its metric 'val_accuracy' is better: create it with mode='max'",
        ),
        ("min", {"monitor": "val_loss", "mode": "max"}, "more of its metric 'val_loss' is better"),
    ],
)
def test_plateau_for_the_other_direction_is_refused_before_the_run(mode: Any, knobs: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        rates(mode, **knobs)


@pytest.mark.parametrize("monitor", [None, "val_accuracy"])
def test_plateau_that_a_callback_attaches_is_checked_too(monitor: str | None) -> None:
    class Attaches(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            plateau = ReduceLROnPlateau(run.trainer.optimizer, mode="min" if monitor else "max")
            run.trainer.attach_scheduler(plateau, monitor=monitor)

    with pytest.raises(ConfigError, match="the plateau schedule has mode"):
        tiny_trainer(callbacks=[Attaches()]).train(tiny_batches(1), tiny_batches(1), epochs=1)


def test_callbacks_are_told_both() -> None:
    told: list[str] = []

    class Asks(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            told.extend([run.monitor, run.default_monitor])

    tiny_trainer(callbacks=[Wish("train_accuracy"), Asks()]).train(
        tiny_batches(1), tiny_batches(1), epochs=1, metrics=["accuracy"]
    )
    assert told == ["train_accuracy", "val_loss"]
