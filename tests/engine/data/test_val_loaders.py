"""engine/data/val_loaders.py: validations on several loaders, whose metrics have the loader's name in their keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryF1Score

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    ConfigError,
    EmptyLoaderError,
    EpochEnd,
    Resumed,
    Run,
    StepEnd,
    StepPoint,
    Trainer,
    ValidationEnd,
    ValidationStart,
    decides,
    in_step,
)
from offloop.engine.data.val_loaders import bare_key, by_prefix, name_of
from offloop.engine.testing import Recorder, tiny_batches, tiny_loader, tiny_trainer

BATCHES = tiny_batches(4)
FIT, NEW = tiny_batches(2, seed=1), tiny_batches(3, seed=2)
BOTH = {"fit": FIT, "new": NEW}
KEYS = {"val_fit_loss", "val_fit_accuracy", "val_new_loss", "val_new_accuracy"}


def test_each_loader_has_metrics_of_its_own() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder])
    result = trainer.train(BATCHES, BOTH, epochs=1, metrics=["accuracy"])
    (start,), (end,) = recorder.of(ValidationStart), recorder.of(ValidationEnd)
    assert set(end.metrics) == KEYS
    assert set(result.metrics) == KEYS | {"train_loss", "train_accuracy", "lr"}
    assert (start.batches, end.samples) == (5, 20)
    for name, loader in BOTH.items():
        alone = trainer.evaluate(loader, metrics=["accuracy"], prefix=f"val_{name}_")
        assert dict(alone) == {key: end.metrics[key] for key in alone}


def test_evaluate_takes_several_too() -> None:
    trainer = tiny_trainer()
    made = trainer.evaluate(BOTH, metrics=["accuracy"], prefix="test_")
    assert set(made) == {key.replace("val_", "test_") for key in KEYS}
    assert made["test_new_loss"] == trainer.evaluate(NEW)["val_loss"]


@pytest.mark.anyio
async def test_a_validation_on_command_returns_the_metrics_of_all() -> None:
    class Ask(Callback):
        made: Any = None

        @decides
        def on_epoch_start(self, event: Any, run: Run) -> None:
            self.made = run.validate_nowait()

    ask = Ask()
    await tiny_trainer(callbacks=[ask]).train_async(BATCHES, BOTH, epochs=1)
    assert set(ask.made.result()) == {"val_fit_loss", "val_new_loss"}


def test_the_limit_of_batches_is_of_each_loader() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder], limit_val_batches=1).train(BATCHES, BOTH, epochs=1)
    assert recorder.of(ValidationStart)[0].batches == 2
    assert recorder.of(ValidationEnd)[0].samples == 8


def test_a_step_knows_which_loader_its_batch_is_from_and_what_it_logs_has_the_name() -> None:
    class Names(Trainer):
        def validation_step(self, batch: Any) -> Any:
            self.log("length", len(self.val_loader_name))
            seen.append(self.val_loader_name)
            return super().validation_step(batch)

    seen: list[str] = []
    made = tiny_trainer(Names).train(BATCHES, {"a": FIT, "long": NEW}, epochs=1).metrics
    assert seen == ["a"] * 2 + ["long"] * 3
    assert (made["val_a_length"], made["val_long_length"]) == (1.0, 4.0)
    seen.clear()
    tiny_trainer(Names).train(BATCHES, FIT, epochs=1)
    assert seen == [""] * 2


def test_what_a_hook_logs_beside_the_loaders_has_no_name() -> None:
    class After(Callback):
        @in_step
        def after_validation(self, point: StepPoint) -> None:
            point.log("norm", 3.0)

    result = tiny_trainer(callbacks=[After()]).train(BATCHES, BOTH, epochs=1)
    assert result.metrics["val_norm"] == 3.0


def test_the_first_loader_decides_what_is_best_unless_a_monitor_is_named() -> None:
    best = tiny_trainer().train(BATCHES, BOTH, epochs=1).best
    assert best is not None and best.monitor == "val_fit_loss"
    best = tiny_trainer(monitor="val_new_accuracy").train(BATCHES, BOTH, epochs=1, metrics=["acc"]).best
    assert best is not None and best.monitor == "val_new_accuracy"
    one_column = [(inputs, (targets > 0).long()) for inputs, targets in FIT]

    class Binary(Trainer):
        def validation_step(self, batch: Any) -> Any:
            outputs = self.model(batch[0])
            return {"loss": outputs.sum(), "outputs": outputs[:, 0], "targets": batch[1]}

    # The key says nothing about its direction; the metric does.
    trainer = tiny_trainer(Binary, monitor="val_fit_own")
    run = trainer.train(BATCHES, {"fit": one_column}, epochs=1, metrics={"val": {"own": BinaryF1Score()}})
    assert run.best is not None


@pytest.mark.parametrize(
    ("val_loader", "knobs", "text"),
    [
        ({}, {}, "val_loader is an empty mapping"),
        ({"fit loss": FIT}, {}, "val_loader has the name 'fit loss', which becomes part of keys like val_"),
        ({1: FIT}, {}, "val_loader has the name 1"),
        (
            {"a": FIT, "a_b": FIT},
            {},
            "names 'a' and 'a_b': the keys of their metrics could not be told apart",
        ),
        (
            BOTH,
            {"monitor": "val_loss"},
            "ambiguous with several val_loaders.*use one of val_fit_loss, val_new_loss",
        ),
        (BOTH, {"monitor": "val_blub"}, "train_loss, val_fit_loss, val_new_loss will be computed"),
        (
            None,
            {"validate_at_start": True},
            "validate_at_start=True needs a validation: give train.. a val_loader",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(val_loader: Any, knobs: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny_trainer(**knobs).train(BATCHES, val_loader, epochs=1)


def test_a_batch_that_is_given_as_loaders_is_told_apart() -> None:
    with pytest.raises(TypeError, match=r"val_loader\['inputs'\] must give batches, got a Tensor"):
        tiny_trainer().train(BATCHES, {"inputs": torch.zeros(2, 8)}, epochs=1)


def test_the_loader_that_gives_nothing_is_named() -> None:
    with pytest.raises(EmptyLoaderError, match="the val_loader new gave no batch"):
        tiny_trainer().train(BATCHES, {"fit": FIT, "new": iter(())}, epochs=1)


def test_a_stop_in_the_second_loader_leaves_no_half_validation() -> None:
    class StopInNew(Trainer):
        def validation_step(self, batch: Any) -> Any:
            if self.val_loader_name == "new":
                self.stop("enough")
            return super().validation_step(batch)

    recorder = Recorder()
    result = tiny_trainer(StopInNew, callbacks=[recorder]).train(BATCHES, BOTH, epochs=1)
    assert (result.status, recorder.of(ValidationEnd)) == ("stopped", [])


def test_a_resumed_run_reads_shuffled_loaders_as_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(name: str, max_steps: int, resume: Any = None) -> tuple[list[Any], list[Resumed]]:
        torch.manual_seed(3)
        recorder = Recorder()
        loaders = {name: tiny_loader(2, shuffle=True, seed=seed) for seed, name in enumerate(("fit", "new"))}
        trainer = tiny_trainer(run_dir=tmp_path, run_name=name, val_every_n_steps=2)
        trainer.train(
            tiny_loader(6, shuffle=True),
            loaders,
            max_steps=max_steps,
            callbacks=[recorder, ModelCheckpoint()],
            resume=resume,
        )
        steps = [event.loss for event in recorder.of(StepEnd)]
        return [*steps, *(event.metrics for event in recorder.of(ValidationEnd))], recorder.of(Resumed)

    whole, _ = run("whole", 16)
    first, _ = run("parts", 9)
    rest, (resumed,) = run("parts", 16, "must")
    assert (resumed.exactness, resumed.reasons) == ("bitwise", "")
    assert [each for each in whole if isinstance(each, float)] == [
        each for each in first + rest if isinstance(each, float)
    ]
    assert rest[-1] == whole[-1]


def test_loaders_of_torch_are_taken_as_they_are() -> None:
    loader: DataLoader[Any] = tiny_loader(2)
    assert by_prefix(loader) == {"val_": loader}
    assert by_prefix({"fit": loader}) == {"val_fit_": loader}
    assert by_prefix(None) == {}
    assert (name_of("val_"), name_of("val_fit_")) == ("", "fit")
    assert bare_key("val_fit_loss", ["val_fit_", "val_new_"]) == "val_loss"
    assert bare_key("val_other", ["val_fit_"]) == "val_other"
    assert bare_key("train_loss", ["val_fit_"]) == "train_loss"


# At the start --------------------------------------------------------------------------------------


def test_a_validation_at_the_start_is_a_baseline_of_no_epoch(tmp_path: Path) -> None:
    recorder = Recorder()
    knobs: dict[str, Any] = {"validate_at_start": True, "run_dir": tmp_path, "run_name": "run"}
    before = tiny_trainer().evaluate(FIT)["val_loss"]
    trainer = tiny_trainer(callbacks=[recorder, ModelCheckpoint()], val_every_n_epochs=2, **knobs)
    trainer.train(BATCHES, FIT, epochs=3)
    assert [event.step for event in recorder.of(ValidationEnd)] == [0, 8]
    assert recorder.of(ValidationEnd)[0].metrics["val_loss"] == before
    assert ["val_loss" in event.metrics for event in recorder.of(EpochEnd)] == [False, True, False]
    again = Recorder()
    trainer = tiny_trainer(callbacks=[again, ModelCheckpoint()], val_every_n_epochs=2, **knobs)
    trainer.train(BATCHES, FIT, epochs=4, resume="must")
    assert [event.step for event in again.of(ValidationEnd)] == [16]


def test_a_validation_at_the_start_does_not_stand_for_the_one_at_the_end() -> None:
    recorder = Recorder()
    knobs: dict[str, Any] = {"validate_at_start": True, "val_every_n_epochs": 9}
    tiny_trainer(callbacks=[recorder], **knobs).train(BATCHES, FIT, epochs=2)
    assert [event.step for event in recorder.of(ValidationEnd)] == [0, 8]


def test_a_stop_in_the_validation_at_the_start_trains_no_step() -> None:
    class StopAtOnce(Callback):
        @decides
        def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            run.stop_nowait("good already")

    result = tiny_trainer(validate_at_start=True, callbacks=[StopAtOnce()]).train(BATCHES, FIT, epochs=1)
    assert (result.status, result.steps) == ("stopped", 0)
    assert "val_loss" in result.metrics
