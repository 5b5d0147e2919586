"""Weights that are not finite: no checkpoint is made of them, so the newest one can be continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offloop.callbacks import EarlyStopping, ModelCheckpoint
from offloop.engine import Callback, CheckpointFailed, EpochEnd, LossError, Run, RunResult, Trainer, decides
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer

BATCHES = tiny_batches(2)


class Spoils(Trainer):
    """In its fourth step the loss is finite, and its gradient is not."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        if self.step == 3:
            loss = loss + (next(self.model.parameters()) * 0.0).sqrt().sum()
        return loss


def a_run(directory: Path, *callbacks: Callback, kind: type[Trainer] = Spoils, **arguments: Any) -> RunResult:
    knobs = {key: arguments.pop(key) for key in ("on_nonfinite",) if key in arguments}
    trainer = tiny_trainer(kind, run_dir=directory, run_name="one", **knobs)
    return trainer.train(BATCHES, BATCHES, callbacks=callbacks, **arguments)


def steps_saved(directory: Path) -> list[int]:
    return sorted(info.step for info in CheckpointReader(directory / "one").checkpoints())


def test_a_run_that_ends_with_such_weights_keeps_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = a_run(tmp_path, ModelCheckpoint(), epochs=2)
    assert result.status == "completed"
    assert steps_saved(tmp_path) == [2]
    assert any(
        "there is no last checkpoint: the weights of step 4 are not finite" in text
        for text in caplog.messages
    )
    again = a_run(tmp_path, ModelCheckpoint(), kind=Trainer, epochs=3, resume="must")
    assert again.steps == 6
    assert steps_saved(tmp_path)[-1] == 6


def test_a_run_that_early_stopping_ends_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    result = a_run(tmp_path, ModelCheckpoint(), EarlyStopping(monitor="val_loss"), epochs=9)
    assert result.status == "stopped"
    assert steps_saved(tmp_path) == [2]


def test_a_checkpoint_that_was_asked_for_is_refused_and_said(tmp_path: Path) -> None:
    errors: list[BaseException | None] = []

    class Saves(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            run.checkpoint_nowait("mine").add_done_callback(lambda future: errors.append(future.exception()))

    recorder = Recorder()
    a_run(tmp_path, Saves(), recorder, epochs=2)
    (failed,) = recorder.of(CheckpointFailed)
    assert failed.saved_step == 4 and "LossError: the weights of step 4 are not finite" in failed.error
    assert {type(error) for error in errors} == {type(None), LossError}


def test_who_asks_for_no_end_has_the_checkpoint(tmp_path: Path) -> None:
    a_run(tmp_path, ModelCheckpoint(), epochs=2, on_nonfinite="warn")
    assert steps_saved(tmp_path)[-1] == 4


def test_buffers_and_frozen_parameters_may_hold_infinities(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=tmp_path, run_name="one")
    trainer.model.register_buffer("mask", torch.full((2,), -torch.inf))
    trainer.model.register_parameter(
        "fixed", torch.nn.Parameter(torch.full((2,), torch.inf), requires_grad=False)
    )
    trainer.train(BATCHES, epochs=1, callbacks=[ModelCheckpoint()])
    assert steps_saved(tmp_path) == [2]
