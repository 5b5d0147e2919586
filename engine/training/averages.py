"""Averages: weights that callbacks keep beside the model's, and to which weights a score belongs.

A callback such as `WeightAverage` has an average of the model's weights, and validations may run with it. What is
then measured is a score of the average. So the average is in checkpoints under a key of its own beside `model`, and
what loads "the weights" of a checkpoint, or puts those of the best check back, takes those that were measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from offloop.engine.callback import Callback
from offloop.engine.data.val_loaders import PREFIX, live_prefix
from offloop.engine.errors import ConfigError

AVERAGE: Final = "average"
"""The key of an average in a checkpoint; further ones are `average_2`, ..."""
MEASURED: Final = "measured"
"""The entry of a checkpoint that says which weights its scores belong to."""


def check_averages(callbacks: Iterable[Callback]) -> None:
    """Raise where two callbacks decide about the same weights.

    Raises:
        ConfigError: Validations cannot run with two averages, nor can two say what the model is to be after the run.
    """
    validating = [each for each in callbacks if each.validates_average]
    if len(validating) > 1:
        raise ConfigError(
            f"{_names(validating)} both want to run validations with their average: give validate=False to one of them"
        )
    ending = [each for each in callbacks if each.sets_final_weights]
    if len(ending) > 1:
        raise ConfigError(
            f"{_names(ending)} both say which weights the model has after the run (restore_best, apply_at_end): leave "
            "one of them out. With an average that validations run with, restore_best gives that of the best check back"
        )


def captured(callbacks: Iterable[Callback], model: torch.nn.Module) -> dict[str, Any]:
    """Return the averages of the model that there are now, by the keys that they have in a checkpoint. Live tensors."""
    found = [each.averaged_weights() for each in callbacks]
    averages = [each for each in found if each]
    keys = [AVERAGE, *(f"{AVERAGE}_{number}" for number in range(2, len(averages) + 1))]
    return {key: _complete(model, each) for key, each in zip(keys, averages, strict=False)}


def measured_key(callbacks: Sequence[Callback], monitor: str) -> str:
    """Return the key of the weights that a metric of now belongs to: `model`, or that of an average."""
    if not monitor.startswith("val_") or (
        monitor.startswith(live_prefix(PREFIX)) and any(each.validates_live for each in callbacks)
    ):
        return "model"
    validates = [each.validates_average for each in callbacks if each.averaged_weights()]
    number = validates.index(True) + 1 if True in validates else 0
    return "model" if not number else AVERAGE if number == 1 else f"{AVERAGE}_{number}"


def measured_weights(callbacks: Sequence[Callback], model: torch.nn.Module, monitor: str) -> dict[str, Any]:
    """Return the state dict that a metric of now belongs to. Live tensors."""
    key = measured_key(callbacks, monitor)
    return captured(callbacks, model)[key] if key != "model" else dict(model.state_dict())


def _complete(model: torch.nn.Module, averaged: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the model's state dict with what is averaged in the place of its own."""
    return {name: averaged.get(name, own) for name, own in model.state_dict().items()}


def _names(callbacks: Sequence[Callback]) -> str:
    return " and ".join(type(each).__name__ for each in callbacks[:2])
