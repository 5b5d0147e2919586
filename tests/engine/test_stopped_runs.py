"""A run that a callback has stopped is over: the same script, run again, trains no further; see resume_plan.py."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from offloop.callbacks import EarlyStopping, ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointReader,
    Resumed,
    Run,
    RunResult,
    StepPoint,
    Trainer,
    TrainStart,
    ValidationEnd,
    decides,
    in_step,
)
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = 4
REASON = "val_loss did not improve in 2 checks (best 1 at step 4)"


class Worsening(Trainer):
    """Validates with more loss from epoch to epoch."""

    def validation_step(self, batch: Any) -> torch.Tensor:
        return torch.tensor(1.0 + self.epoch)


class StopAt(Callback):
    """Stops the run after a step, not as a decision."""

    def __init__(self, step: int) -> None:
        self.step = step

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.step:
            point.run.stop_nowait("preempted")


def script(
    tmp_path: Path, *more: Callback, resume: Any = "auto", **arguments: Any
) -> tuple[RunResult, Recorder]:
    """Train as a script does that is run again and again."""
    knobs = {"run_name": "early", **arguments.pop("knobs", {})}
    stopping = EarlyStopping(patience=arguments.pop("patience", 2), restore_best=True)
    recorder = Recorder()
    checkpoint = ModelCheckpoint(save_last=arguments.pop("save_last", True))
    trainer = tiny_trainer(
        Worsening, run_dir=str(tmp_path), callbacks=[recorder, checkpoint, stopping], **knobs
    )
    arguments.setdefault("epochs", 20)
    result = trainer.train(tiny_batches(BATCHES), tiny_batches(1), resume=resume, callbacks=more, **arguments)
    return result, recorder


def names_on_disk(tmp_path: Path) -> list[str]:
    return [info.name for info in CheckpointReader(tmp_path / "early").checkpoints()]


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_stopped_run_trains_no_step_more(
    tmp_path: Path, resume: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = script(tmp_path)
    assert (first.status, first.reason, first.steps) == ("stopped", REASON, 12)
    before = names_on_disk(tmp_path)
    for attempt in (1, 2):
        with caplog.at_level(logging.WARNING):
            again, recorder = script(tmp_path, resume=resume, epochs=30)
        assert (again.status, again.reason, again.steps) == ("stopped", REASON, 12)
        assert (again.best, again.metrics) == (first.best, first.metrics)
        assert [end.metrics for end in again.history] == [end.metrics for end in first.history]
        assert [start.attempt for start in recorder.of(TrainStart)] == [attempt]
        assert len(recorder.of(Resumed)) == 1 and "StepEnd" not in recorder.names()
        assert names_on_disk(tmp_path) == before
    assert "run early is over, since EarlyStopping has stopped it" in caplog.text
    assert 'resume="last" continues it anyway' in caplog.text


def test_model_is_then_what_it_was_in_the_end(tmp_path: Path) -> None:
    models = tiny_model(seed=1), tiny_model(seed=2)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        script(tmp_path, knobs={"model": model, "optimizer": optimizer})
    first, again = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("resume", ["last", 12, "path"])
def test_what_is_named_goes_on_all_the_same(tmp_path: Path, resume: Any) -> None:
    script(tmp_path)
    result, _ = script(tmp_path, resume=str(tmp_path / "early") if resume == "path" else resume, patience=4)
    assert (result.status, result.steps) == ("stopped", 20)
    assert result.reason.startswith("val_loss did not improve in 4 checks")
    assert script(tmp_path, patience=4)[0].steps == 20  # it is over again


def test_run_that_was_stopped_from_outside_goes_on(tmp_path: Path) -> None:
    assert script(tmp_path, StopAt(6))[0].steps == 6
    assert script(tmp_path)[0].steps == 12


def test_run_that_goes_on_and_is_then_stopped_from_outside_goes_on(tmp_path: Path) -> None:
    script(tmp_path)
    assert script(tmp_path, StopAt(14), resume="last", patience=9)[0].steps == 14
    assert script(tmp_path, patience=4)[0].steps == 20


def test_any_decider_ends_a_run(tmp_path: Path) -> None:
    class Target(Callback):
        @decides
        async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            await run.stop("reached")

    for _ in range(2):
        result, _ = script(tmp_path, Target())
        assert (result.status, result.reason, result.steps) == ("stopped", "reached", BATCHES)


def test_stop_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class Target(Callback):
        @decides
        def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            if event.step == 6:
                run.stop_nowait("reached")

    for _ in range(3):
        result, _ = script(tmp_path, Target(), knobs={"val_every_n_steps": 3}, patience=9)
        assert (result.status, result.reason, result.steps) == ("stopped", "reached", 6)
    result, recorder = script(tmp_path, resume="last", epochs=2, patience=9)
    assert (result.status, result.steps) == ("completed", 8)
    assert [event.exactness for event in recorder.of(Resumed)] == ["bitwise"]


def test_newest_unfinished_run_is_not_one_that_is_over(tmp_path: Path) -> None:
    first, _ = script(tmp_path, knobs={"run_name": None})
    second, _ = script(tmp_path, knobs={"run_name": None})
    assert first.run_id != second.run_id and second.steps == 12


def test_it_is_over_from_the_moment_on_in_which_its_last_checkpoint_is_durable(tmp_path: Path) -> None:
    """And stays so if a later attempt, which trains nothing, is killed."""
    found: list[Any] = []

    class Look(Callback):
        def close(self) -> None:
            found.append(msgspec.json.decode((tmp_path / "early" / "run.json").read_bytes()))

    script(tmp_path, Look())
    script(tmp_path, Look())
    assert [each["stopped_by"] for each in found] == ["EarlyStopping"] * 2

    class LookEarly(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            found.append(msgspec.json.decode((tmp_path / "early" / "run.json").read_bytes()))

    script(tmp_path, LookEarly())
    assert (found[-1]["status"], found[-1]["stopped_by"]) == ("running", "EarlyStopping")
    script(tmp_path, LookEarly(), resume="last")
    assert "stopped_by" not in found[-1]
