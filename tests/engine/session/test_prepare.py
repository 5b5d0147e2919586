"""engine/session/prepare.py: from arguments to a session, before anything starts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from offloop.engine import ConfigError, TrainerBusyError
from offloop.engine.session.prepare import prepare
from offloop.engine.session.run_arguments import RunArguments
from offloop.engine.testing import tiny_loader, tiny_trainer
from offloop.engine.training.setup import Limits


def arguments(**given: Any) -> RunArguments:
    """Return the arguments of a run, with the defaults of `train`."""
    defaults: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(RunArguments))
    defaults |= {"train_loader": tiny_loader(), "metrics": (), "callbacks": (), "init_strict": True}
    return RunArguments(**(defaults | given))


def test_a_prepared_run_has_taken_and_written_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=tmp_path / "runs", run_name="first")
    session = prepare(trainer, arguments(epochs=1))
    assert session.dir == tmp_path / "runs" / "first"
    assert session.thread.ident is None and trainer.last_run is None
    assert not (tmp_path / "runs").exists()
    assert trainer.train(tiny_loader(), epochs=1).status == "completed"


def test_limits_of_a_run_come_before_those_of_the_trainer() -> None:
    trainer = tiny_trainer(epochs=5, max_steps=100)
    training = prepare(trainer, arguments(epochs=2))._training
    assert training is not None
    assert training.loop.setup.limits == Limits(epochs=2, max_steps=100)


def test_a_run_without_anything_to_write_has_no_directory() -> None:
    assert prepare(tiny_trainer(), arguments(epochs=1)).dir is None


def test_arguments_of_a_run_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        arguments(epochs=1).epochs = 2  # type: ignore[misc]  # that is the test


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing says when to stop"):
        prepare(tiny_trainer(), arguments())


def test_a_trainer_in_use_prepares_no_run() -> None:
    trainer = tiny_trainer()
    with trainer._occupancy.use("evaluating"), pytest.raises(TrainerBusyError, match="is evaluating"):
        prepare(trainer, arguments(epochs=1))
