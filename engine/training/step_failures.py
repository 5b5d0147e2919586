"""Explanations of what went wrong in a step, and what to write instead.

Everything here runs after a step has failed and costs a step that works nothing. An exception of torch or of the user's
code is kept and gets a note with the facts that its text lacks. One that follows only from how the trainer was set up
is replaced by an error of offloop.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from offloop.engine.errors import BatchError


def describe(value: Any) -> str:
    """Return a description of a value for an error text: its type, and shape and dtype of a tensor."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {_dtype(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def explain_model(error: Exception, inputs: Any) -> None:
    """Add a note with the model's inputs when it raised, and the fix if they are no tensor or have the wrong dtype."""
    note = f"offloop: the model was given inputs: {describe(inputs)}"
    is_of_another_type = "same dtype" in str(error) or "should be the same" in str(error)
    if isinstance(inputs, torch.Tensor) and inputs.dtype != torch.float32 and is_of_another_type:
        note += ". Weights are float32 by default: give inputs.float()"
    if hasattr(inputs, "__array__") and not isinstance(inputs, torch.Tensor):
        note += ". Models take tensors: torch.from_numpy makes them, and DataLoader does of what a Dataset returns"
    elif isinstance(inputs, tuple | list) and inputs and isinstance(inputs[0], str):
        note += ". Models take tensors: give the DataLoader a collate_fn that makes them of texts"
    error.add_note(note)


def explain_failure(error: BaseException) -> None:
    """Add a note with the likely cause of a failure of training, where torch's text is misleading."""
    if isinstance(error, RuntimeError) and "backward through the graph a second time" in str(error):
        error.add_note(
            "offloop: has training_step called loss.backward() itself? It returns the loss, and the trainer does the "
            "rest; for backward and optimizer steps of your own set automatic_optimization = False and call "
            "self.backward(loss) and self.optimizer_step()"
        )
    if isinstance(error, RuntimeError) and "Expected to have finished reduction" in str(error):
        error.add_note(
            "offloop: some parameters had no part in the loss of the step before: freeze them "
            "(Trainer(freeze=...)), or let DDP look for such parameters in each step: "
            "Trainer(find_unused_parameters=True)"
        )
    if isinstance(error, TypeError) and "'dict' object is not callable" in str(error):
        error.add_note(
            "offloop: in a trainer self.optimizers is a mapping, no method: self.optimizers['name'], and "
            "self.optimizer_step('name') steps it"
        )


def explain_loss(error: Exception, outputs: Any, targets: Any) -> None:
    """Add a note with the arguments of a loss function that raised, and the usual mistake if it is one."""
    note = f"offloop: loss(outputs, targets) was given outputs: {describe(outputs)}; targets: {describe(targets)}"
    if isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor):
        note += _usual_mistake(outputs, targets)
    elif not isinstance(outputs, torch.Tensor):
        note += (
            ". The model's outputs are no tensor: override training_step(self, batch) and take from them what the "
            "loss needs"
        )
    error.add_note(note)


def _usual_mistake(outputs: torch.Tensor, targets: torch.Tensor) -> str:
    """Return what is probably wrong with outputs and targets, empty if unknown."""
    shape, wanted = outputs.shape, targets.shape
    are_classes = outputs.dim() > 1 and shape[:1] + shape[2:] == wanted
    are_classes = are_classes and (shape[1] > 1 or not targets.is_floating_point())
    if are_classes and (targets.is_floating_point() or targets.dtype not in (torch.int64, torch.uint8)):
        return ". Class indices are integers of 64 bits: give targets.long()"
    # On a CUDA device that has failed, reading the targets could fail again
    if are_classes and targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if high >= shape[1] or low < 0:
            return (
                f". The targets reach from {low} to {high}, and {shape[1]} outputs stand for the classes 0 to "
                f"{shape[1] - 1}: does the model's last layer have as many outputs as there are classes?"
            )
    if shape != wanted and outputs.numel() == targets.numel():
        return (
            f". They differ by a dimension of size 1: give targets.view{tuple(shape)}, or outputs.squeeze(-1)"
        )
    if outputs.dim() > 1 and shape[1] > 1 and wanted == (*shape[:1], 1, *shape[2:]):
        return ". Class indices have no dimension of classes: give targets.squeeze(1)"
    if shape == wanted and not targets.is_floating_point() and outputs.is_floating_point():
        return ". Losses of numbers take floats: give targets.float()"
    return ""


def explain_call(model: torch.nn.Module, batch: Any, error: TypeError) -> NoReturn:
    """Raise what explains a failed call of a model that was to return its loss.

    Raises:
        BatchError: The batch does not fit the arguments of the model.
        TypeError: It does fit: `error` comes from inside the model.
    """
    positional = batch if isinstance(batch, tuple | list) else ()
    named = batch if isinstance(batch, Mapping) else {}
    try:
        signature = inspect.signature(model.forward)
        signature.bind(*positional, **named)
    except TypeError:
        names = ", ".join(signature.parameters)
        raise BatchError(
            f"{type(model).__name__}.forward({names}) cannot take {describe(batch)}: without loss= the model is "
            "given the whole batch and returns its loss. Give Trainer(loss=...), like "
            "torch.nn.functional.cross_entropy, or override training_step(self, batch)"
        ) from error
    except ValueError:
        # This forward has no signature
        pass
    raise error


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
