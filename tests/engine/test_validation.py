"""Validations: when they come, what they make, and that they leave the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from offloop.engine import EpochEnd, StepEnd, Trainer, ValidationEnd, ValidationStart
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [
        ({}, [4, 8, 12]),
        ({"val_every_n_epochs": 2}, [8]),
        ({"val_every_n_epochs": 3}, [12]),
        ({"val_every_n_epochs": 9}, [12]),  # at the end, where there was none before
        ({"val_every_n_steps": 99}, [12]),
        ({"val_every_n_steps": 3}, [3, 6, 9, 12]),
        ({"val_every_n_steps": 4}, [4, 8, 12]),  # not twice at the end of an epoch
        ({"val_every_n_steps": 5, "val_every_n_epochs": 1}, [4, 5, 8, 10, 12]),
        ({"val_every_n_steps": 6, "val_every_n_epochs": 2}, [6, 8, 12]),
        ({"val_every_n_steps": 1, "accumulate_grad_batches": 2}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_validations_come_when_the_knobs_say(knobs: dict[str, Any], steps: list[int]) -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder], **knobs).train(BATCHES, BATCHES[:1], epochs=3)
    assert [start.step for start in recorder.of(ValidationStart)] == steps
    assert [end.step for end in recorder.of(ValidationEnd)] == steps


def test_an_epochs_end_holds_what_was_made_since_the_last_one_and_nothing_stale() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder], val_every_n_epochs=2)
    result = trainer.train(BATCHES, BATCHES, epochs=3, metrics=["accuracy"])
    training = {"train_loss", "train_accuracy", "lr"}
    validation = {"val_loss", "val_accuracy"}
    assert [set(end.metrics) for end in recorder.of(EpochEnd)] == [training, training | validation, training]
    assert set(result.metrics) == training | validation
    assert result.metrics["val_loss"] == result.history[1].metrics["val_loss"]


def test_a_validation_in_an_epoch_is_in_its_end() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder], val_every_n_steps=3).train(BATCHES, BATCHES, epochs=1)
    (validation,) = recorder.of(ValidationEnd)
    (end,) = recorder.of(EpochEnd)
    assert end.metrics["val_loss"] == validation.metrics["val_loss"]
    assert validation.samples == 16


def test_means_begin_anew_in_each_validation() -> None:
    class Counts(Trainer):
        number = 0

        def validation_step(self, batch: Any) -> Any:
            self.number += 1
            self.log("number", self.number)

    recorder = Recorder()
    tiny_trainer(Counts, callbacks=[recorder]).train(BATCHES, BATCHES[:2], epochs=2)
    assert [end.metrics["val_number"] for end in recorder.of(ValidationEnd)] == [1.5, 3.5]


class Modes(nn.Module):
    """Notes in which mode it and its part were, at each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.net = tiny_model()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append((self.training, self.norm.training))
        return self.net(self.norm(inputs))  # type: ignore[no-any-return]  # modules are untyped


def train(model: Modes) -> list[tuple[bool, bool]]:
    tiny_trainer(model=model).train(BATCHES[:1], BATCHES[:1], epochs=2)
    return model.seen


def test_a_part_that_is_frozen_in_eval_mode_stays_so() -> None:
    model = Modes()
    model.norm.eval()
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]  # it has one
    assert train(model) == [(True, False), (False, False)] * 2
    assert torch.equal(before, model.norm.running_mean)  # type: ignore[arg-type]  # likewise


def test_a_model_left_in_eval_mode_as_a_whole_is_trained_in_train_mode() -> None:
    model = Modes()
    model.eval()
    assert train(model) == [(True, True), (False, False)] * 2


def test_a_model_is_validated_in_eval_mode_without_gradients_and_goes_back() -> None:
    class Look(Trainer):
        def validation_step(self, batch: Any) -> Any:
            assert not torch.is_grad_enabled()
            return super().validation_step(batch)

    model = Modes()
    assert train(model) == [(True, True), (False, False)] * 2
    assert model.training and model.norm.training
    tiny_trainer(Look).train(BATCHES[:1], BATCHES[:1], epochs=1)


def test_a_failing_validation_gives_the_modes_back() -> None:
    class Fails(Trainer):
        def validation_step(self, batch: Any) -> Any:
            raise ValueError("in validation")

    model = Modes()
    trainer = tiny_trainer(Fails, model=model)
    with pytest.raises(ValueError, match="in validation"):
        trainer.train(BATCHES, BATCHES, epochs=1)
    assert model.training and model.norm.training


def test_an_own_validation_epoch_may_leave_early_and_may_use_several_loaders() -> None:
    class Own(Trainer):
        def validate_epoch(self, loader: Any) -> None:
            for each in (loader, BATCHES[2:]):
                for number, batch in enumerate(self.batches(each)):
                    if number == 1:
                        break
                    self.validate_batch(batch)

    recorder = Recorder()
    trainer = tiny_trainer(Own, callbacks=[recorder])
    trainer.train(BATCHES, BATCHES, epochs=1)
    (end,) = recorder.of(ValidationEnd)
    model = trainer.model.eval()
    with torch.no_grad():
        mean = sum(cross_entropy(model(x), y).item() for x, y in (BATCHES[0], BATCHES[2])) / 2
    assert end.metrics["val_loss"] == pytest.approx(mean)
    assert end.samples == 8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_validation_computes_in_the_precision_of_the_run(precision: str) -> None:
    dtypes: list[torch.dtype] = []

    class Look(Trainer):
        def validation_step(self, batch: Any) -> Any:
            output = super().validation_step(batch)
            dtypes.append(output["outputs"].dtype)  # type: ignore[index]  # a mapping
            return output

    tiny_trainer(Look, precision=precision).train(BATCHES, BATCHES[:1], epochs=1)
    assert dtypes == [torch.float32 if precision == "32-true" else torch.bfloat16]


def plateau_lrs(**knobs: Any) -> list[float]:
    """Return the learning rates of each epoch's first step, under a plateau that is never content."""
    recorder = Recorder()
    model = tiny_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs")
    trainer = tiny_trainer(
        model=model, optimizer=optimizer, scheduler=scheduler, callbacks=[recorder], **knobs
    )
    trainer.train(BATCHES[:1], BATCHES[:1], epochs=5)
    return [end.lr for end in recorder.of(StepEnd)]


def test_a_plateau_is_asked_where_its_metric_was_made() -> None:
    assert plateau_lrs() == [1.0, 1.0, 0.5, 0.25, 0.125]
    assert plateau_lrs(val_every_n_epochs=2) == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert plateau_lrs(monitor="train_loss", val_every_n_epochs=2) == [1.0, 1.0, 0.5, 0.25, 0.125]


def test_length_of_a_validation_is_known_before_it_and_its_position_during_it() -> None:
    positions: list[int] = []

    class Look(Trainer):
        def validation_step(self, batch: Any) -> Any:
            assert self.last_run is not None
            positions.append(self.last_run.validation_batch)
            return super().validation_step(batch)

    recorder = Recorder()
    trainer = tiny_trainer(Look, limit_val_batches=3)
    trainer.train(tiny_batches(2), tiny_batches(5), epochs=2, callbacks=[recorder])
    assert [event.batches for event in recorder.of(ValidationStart)] == [3, 3]
    assert positions == [1, 2, 3, 1, 2, 3]
