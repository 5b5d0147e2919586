"""Whether a run's state can be saved at all: checked once, at the first step, instead of at the first save."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from offloop.engine.checkpoint import CheckpointError, UnserializableStateError
from offloop.engine.checkpoint.layout import check_tensor
from offloop.engine.checkpoint.tree import TensorNode, encode, tensor_node

HINTS: Final = {
    "schedulers": "a schedule saves the attributes of an object that it calls: give it a plain function or a closure",
    "model": "return tensors, numbers and strings from get_extra_state(); bytes fit as torch.frombuffer(...)",
    "loss": "return tensors, numbers and strings from get_extra_state(); bytes fit as torch.frombuffer(...)",
    "optimizers": "change what the optimizer's state_dict() returns, numpy arrays to lists or tensors",
    "callbacks": "change what the callback's state_dict() returns, numpy arrays to lists or tensors",
    "trainer": "change what the trainer's state_dict() returns, numpy arrays to lists or tensors",
}
"""What to do about a value that cannot be saved, by the first part of its path."""


def check_saveable(state: Mapping[str, Any]) -> None:
    """Check a state as a checkpoint would, without copying tensors.

    Raises:
        CheckpointError: A value in it can never be saved; the text names its path and what to do.
    """
    try:
        encode(state, _checked_node)
    except UnserializableStateError as error:
        part = error.path.lstrip(".").partition(".")[0]
        hint = HINTS.get(part, "keep it out of the state")
        raise CheckpointError(
            f"no checkpoint of this run can be saved: {error}; {hint}. To train without checkpoints, "
            'set on_error = "isolate" on the ModelCheckpoint'
        ) from error


def _checked_node(path: str, value: object) -> TensorNode | None:
    if not isinstance(value, torch.Tensor):
        return None
    check_tensor(path, value)
    return tensor_node("")
