"""What a step returns: taken apart and checked."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from offloop.engine.errors import LossError

StepOutput = torch.Tensor | Mapping[str, Any] | None

_NO_NUMBER: Final = ": return the tensor itself, without .item()"
"""What an error adds where a step returns its loss as a number."""


def read_output(
    output: StepOutput, method: str
) -> tuple[torch.Tensor | None, Any, Any, float | None, int | None]:
    """Return the loss, outputs, targets, weight and samples of a step's return value.

    Raises:
        LossError: It is neither a tensor nor a mapping.
        ValueError: Its weight or samples are no such number.
    """
    if output is None or isinstance(output, torch.Tensor):
        return output, None, None, None, None
    # The type is compared first: the check against an abstract class is slow.
    if type(output) is not dict and not isinstance(output, Mapping):
        raise LossError(
            f"{method} must return the loss or a mapping with 'loss' and optionally 'outputs', 'targets', "
            f"'weight', 'samples'; got {type(output).__name__}{_NO_NUMBER if isinstance(output, float) else ''}"
        )
    weight, samples = output.get("weight"), output.get("samples")
    return (
        output.get("loss"),
        output.get("outputs"),
        output.get("targets"),
        None if weight is None else checked_weight(weight, method),
        None if samples is None else checked_samples(samples, method),
    )


def checked_weight(weight: Any, where: str) -> float:
    """Return the weight of a value in means. Host sync if it is a tensor on a device: prefer a number."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number or (isinstance(weight, torch.Tensor) and weight.numel() == 1):
        number = float(weight)
        if 0.0 <= number < math.inf:
            return number
    raise ValueError(f"the weight of {where} must be a finite number of at least 0, got {weight!r}")


def checked_samples(samples: Any, where: str) -> int:
    """Return the number of samples that a step reports. Host sync if it is a tensor on a device."""
    is_whole = isinstance(samples, int) and not isinstance(samples, bool)
    if is_whole or (isinstance(samples, torch.Tensor) and samples.numel() == 1):
        number = int(samples)
        if number >= 0 and number == samples:
            return number
    raise ValueError(f"the samples of {where} must be a whole number of at least 0, got {samples!r}")


def check_loss(loss: object) -> None:
    """Raise `LossError` unless the loss is a scalar that gradients can flow from."""
    if not isinstance(loss, torch.Tensor):
        hint = {type(None): ": write return loss, or return {'loss': loss, ...}", float: _NO_NUMBER}.get(
            type(loss), ""
        )
        raise LossError(
            f"training_step must give a loss, a tensor of one element; got {type(loss).__name__}{hint}"
        )
    if loss.numel() != 1:
        raise LossError(f"the loss must be a scalar, got shape {tuple(loss.shape)}: take its mean() or sum()")
    if not loss.requires_grad:
        raise LossError(
            "the loss has no gradient: was it detached, or computed under torch.no_grad, "
            "or are all parameters frozen?"
        )
