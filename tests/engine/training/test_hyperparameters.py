"""What a run is made with is told once, alike in run.json, in `TrainStart` and in records."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.engine import TrainStart, read_events, read_run
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_model, tiny_trainer


def made_with(
    directory: Path, *, loader: Any = None, limits: dict[str, Any] | None = None, **knobs: Any
) -> Any:
    """Train, and return what all three say."""
    trainer = tiny_trainer(run_dir=str(directory), run_name="r", **knobs)
    result = trainer.train(tiny_loader(2) if loader is None else loader, **(limits or {"epochs": 1}))
    assert result.dir is not None
    found = json.loads((result.dir / "run.json").read_text())["hyperparameters"]
    start = next(event for event in read_events(result.dir) if isinstance(event, TrainStart))
    assert start.hyperparameters == found == read_run(result.dir).hyperparameters
    return found


def test_model_loss_optimizer_data_limits_and_precision(tmp_path: Path) -> None:
    assert made_with(tmp_path, limits={"epochs": 2, "max_steps": 3}, seed=7) == {
        "model": "Sequential",
        "parameters": 195,
        "loss": "cross_entropy",
        "optimizer": "SGD",
        "optimizer.lr": 0.05,
        "optimizer.momentum": 0,
        "optimizer.dampening": 0,
        "optimizer.weight_decay": 0,
        "optimizer.nesterov": False,
        "optimizer.maximize": False,
        "batch_size": 4,
        "precision": "32-true",
        "seed": 7,
        "epochs": 2,
        "max_steps": 3,
    }


def test_knobs_at_their_default_and_those_around_training_are_none(tmp_path: Path) -> None:
    found = made_with(tmp_path, gradient_clip_val=1.0, drain_timeout=9.0, accumulate_grad_batches=2)
    assert (found["gradient_clip_val"], found["accumulate_grad_batches"]) == (1.0, 2)
    assert not found.keys() & {"drain_timeout", "run_dir", "run_name", "device", "deterministic", "max_time"}


def test_the_users_own_are_flat_and_come_last(tmp_path: Path) -> None:
    own = {"data": {"name": "tiny", "folds": [1, 2]}, "model": "mine", "note": None}
    found = made_with(tmp_path, hyperparameters=own)
    assert found["data.name"] == "tiny" and found["data.folds"] == [1, 2]
    assert found["model"] == "mine" and found["note"] is None
    config = json.loads((tmp_path / "r" / "run.json").read_text())["config"]
    assert "hyperparameters" not in config


def test_groups_of_an_optimizer_that_differ_are_lists(tmp_path: Path) -> None:
    model = tiny_model()
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.5), foreach=False)
    found = made_with(tmp_path, model=model, optimizer=optimizer)
    assert found["optimizer"] == "AdamW"
    assert found["optimizer.lr"] == [0.1, 0.5]
    assert found["optimizer.betas"] == [0.9, 0.999]
    assert not found.keys() & {"optimizer.foreach", "optimizer.fused", "optimizer.capturable"}


def test_a_schedule_is_named_and_its_first_rate_is_not_taken_for_the_optimizers(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)
    found = made_with(tmp_path, model=model, optimizer=optimizer, scheduler=warmup)
    assert (found["scheduler"], found["optimizer.lr"]) == ("LinearLR", 0.5)


def test_frozen_parameters_do_not_count(tmp_path: Path) -> None:
    found = made_with(tmp_path, freeze="0")
    start = next(event for event in read_events(tmp_path / "r") if isinstance(event, TrainStart))
    assert found["parameters"] == start.parameters == 51
    assert found["freeze"] == "0"


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (torch.nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.1), "cross_entropy"),
    ],
)
def test_losses_have_names(tmp_path: Path, loss: Any, name: str) -> None:
    assert made_with(tmp_path, loss=loss)["loss"] == name


def test_batches_of_unknown_size_leave_it_out(tmp_path: Path) -> None:
    assert "batch_size" not in made_with(tmp_path, loader=tiny_batches(2))
