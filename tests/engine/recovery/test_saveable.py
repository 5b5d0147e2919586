"""A state that can never be saved ends the run at its first step, and says where it is."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, CheckpointFailed, StepEnd, StepPoint, Trainer, in_step
from offloop.engine.checkpoint import CheckpointError, CheckpointReader
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)


class Table:
    """A schedule that looks its factors up."""

    def __init__(self) -> None:
        self.rates = numpy.linspace(1, 0.1, 50)

    def __call__(self, step: int) -> float:
        return float(self.rates[step])


class Bytes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.inner(inputs)

    def get_extra_state(self) -> Any:
        return b"vocabulary"

    def set_extra_state(self, state: Any) -> None:
        pass


class Sparse(Trainer):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": torch.eye(2).to_sparse()}


class Counts(Callback):
    @in_step
    def after_step(self, point: StepPoint) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"counts": numpy.zeros(2)}


class LogsOnly(ModelCheckpoint):
    on_error = "isolate"


def with_table(**knobs: Any) -> Trainer:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Table())
    return tiny_trainer(model=model, optimizer=optimizer, scheduler=schedule, **knobs)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (with_table, r"state\.schedulers\.0\.lr_lambdas\.0\.rates is a numpy\.ndarray.*plain function"),
        (
            lambda **knobs: tiny_trainer(model=Bytes(), **knobs),
            r"state\.model\._extra_state is a builtins\.bytes.*get_extra_state",
        ),
        (
            lambda **knobs: tiny_trainer(Sparse, **knobs),
            r"state\.trainer\.seen.*the trainer's state_dict",
        ),
    ],
)
def test_run_ends_at_its_first_step(make: Any, text: str, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make(run_dir=tmp_path, run_name="run")
    with pytest.raises(CheckpointError, match=text) as raised:
        trainer.train(BATCHES, epochs=2, callbacks=[ModelCheckpoint(), recorder])
    assert 'on_error = "isolate"' in str(raised.value)
    assert len(recorder.of(StepEnd)) <= 1
    assert trainer.last_run.result.status == "failed"


def test_callbacks_are_asked_when_the_first_checkpoint_is_taken_and_the_run_ends_there(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    text = r"callbacks\.Counts\.counts is a numpy\.ndarray.*callback's state_dict"
    with pytest.raises(CheckpointError, match=text):
        callbacks = [ModelCheckpoint(every_n_steps=2), Counts(), recorder]
        tiny_trainer(run_dir=tmp_path).train(BATCHES, epochs=2, callbacks=callbacks)
    assert len(recorder.of(StepEnd)) == 2
    assert recorder.of(CheckpointFailed)


def test_a_callbacks_state_dict_that_fails_ends_it_too(tmp_path: Path) -> None:
    class Fails(Counts):
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("what was it")

    with pytest.raises(KeyError, match="what was it"):
        tiny_trainer(run_dir=tmp_path).train(BATCHES, epochs=1, callbacks=[ModelCheckpoint(), Fails()])


def test_run_goes_on_without_checkpoints_if_asked_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    result = with_table(run_dir=tmp_path).train(BATCHES, epochs=2, callbacks=[LogsOnly(), recorder])
    assert (result.status, result.steps) == ("completed", 8)
    assert recorder.of(CheckpointFailed)
    assert caplog.text.count("no checkpoint of this run can be saved") == 1
    assert result.dir is not None and CheckpointReader(result.dir).checkpoints() == []


def test_run_that_takes_no_checkpoints_is_not_looked_at(tmp_path: Path) -> None:
    assert with_table(run_dir=tmp_path).train(BATCHES, epochs=1).status == "completed"


def test_looking_changes_no_bit(tmp_path: Path) -> None:
    def losses(*callbacks: Callback) -> list[float | None]:
        recorder = Recorder()
        torch.manual_seed(1)
        trainer = tiny_trainer(model=tiny_model(dropout=0.3), run_dir=tmp_path)
        trainer.train(BATCHES, epochs=2, callbacks=[*callbacks, recorder])
        return [event.loss for event in recorder.of(StepEnd)]

    assert losses() == losses(ModelCheckpoint())
