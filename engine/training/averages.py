"""Averages: weights that callbacks keep in addition to the model's, and the weights that a score belongs to.

A callback such as `WeightAverage` keeps an average of the model's weights, and validations may run with it. The score
then belongs to the average. A checkpoint therefore has the average under a key of its own next to `model`. Loading the
weights of a checkpoint, or restoring those of the best one, takes the weights that were measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from offloop.engine.callback import Callback
from offloop.engine.data.val_loaders import PREFIX, live_prefix
from offloop.engine.errors import ConfigError
from offloop.engine.monitor import EVALUATED

AVERAGE: Final = "average"
"""The key of an average in a checkpoint; further ones are `average_2`, ..."""
MEASURED: Final = "measured"
"""The entry of a checkpoint with the key of the weights that its scores belong to."""


def check_averages(callbacks: Iterable[Callback]) -> None:
    """Check that no two callbacks decide about the same weights.

    Raises:
        ConfigError: Two callbacks want validations to run with their average, or set the weights after the run.
    """
    validating = [each for each in callbacks if each.validates_average]
    if len(validating) > 1:
        raise ConfigError(
            f"{_names(validating)} both want to run validations with their average: give validate=False to one of them"
        )
    ending = [each for each in callbacks if each.sets_final_weights]
    if len(ending) > 1:
        raise ConfigError(
            f"{_names(ending)} both set the model's weights after the run (restore_best, apply_at_end): leave "
            "one of them out. If validations run with an average, restore_best restores the best average"
        )


def captured(callbacks: Iterable[Callback], model: torch.nn.Module) -> dict[str, Any]:
    """Return the current averages of the model by their keys in a checkpoint. Live tensors."""
    found = [each.averaged_weights() for each in callbacks]
    averages = [each for each in found if each]
    keys = [AVERAGE, *(f"{AVERAGE}_{number}" for number in range(2, len(averages) + 1))]
    return {key: _complete(model, each) for key, each in zip(keys, averages, strict=False)}


def measured_key(callbacks: Sequence[Callback], monitor: str) -> str:
    """Return the key of the weights that a metric computed now belongs to: `model`, or that of an average."""
    if not monitor.startswith(("val_", EVALUATED)) or (
        monitor.startswith(live_prefix(PREFIX)) and any(each.validates_live for each in callbacks)
    ):
        return "model"
    validates = [each.validates_average for each in callbacks if each.averaged_weights()]
    number = validates.index(True) + 1 if True in validates else 0
    return "model" if not number else AVERAGE if number == 1 else f"{AVERAGE}_{number}"


def measured_weights(callbacks: Sequence[Callback], model: torch.nn.Module, monitor: str) -> dict[str, Any]:
    """Return the state dict that a metric computed now belongs to. Live tensors."""
    key = measured_key(callbacks, monitor)
    return captured(callbacks, model)[key] if key != "model" else dict(model.state_dict())


def _complete(model: torch.nn.Module, averaged: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the model's state dict with the averaged tensors in place of its own."""
    return {name: averaged.get(name, own) for name, own in model.state_dict().items()}


def _names(callbacks: Sequence[Callback]) -> str:
    return " and ".join(type(each).__name__ for each in callbacks[:2])
