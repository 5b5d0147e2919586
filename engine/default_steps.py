"""Default steps: what a batch must be where nobody has written a step of their own."""

from collections.abc import Mapping
from typing import Any

import torch

from offloop.engine.errors import BatchError
from offloop.engine.loop import Batch, StepOutput
from offloop.engine.step_failures import describe, explain_call


def inputs_and_targets(batch: Batch) -> tuple[Any, Any]:
    """Return the two parts of a batch for a model and a loss function.

    Raises:
        BatchError: It has other parts.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "inputs" in batch and "targets" in batch:
        return batch["inputs"], batch["targets"]
    whole = (
        "; if the loader is a list of whole tensors or arrays: "
        "DataLoader(TensorDataset(inputs, targets), batch_size=32)"
        if hasattr(batch, "__array__")
        else ""
    )
    raise BatchError(
        f"with loss= a batch must be (inputs, targets) or a mapping with those keys, got {describe(batch)}: "
        f"override training_step(self, batch){whole}"
    )


def own_loss(model: torch.nn.Module, batch: Batch) -> StepOutput:
    """Return the loss that a model makes itself, the Hugging Face way, with outputs and targets if there are any.

    Raises:
        BatchError: The batch cannot be given to a model, or the model has returned no loss.
    """
    if isinstance(batch, Mapping):
        try:
            outputs = model(**batch)
        except TypeError as error:
            explain_call(model, batch, error)
        targets = batch.get("labels", batch.get("targets"))
    elif isinstance(batch, tuple | list):
        try:
            outputs = model(*batch)
        except TypeError as error:
            explain_call(model, batch, error)
        targets = batch[-1] if batch else None
    elif isinstance(batch, torch.Tensor):
        outputs, targets = model(batch), None
    else:
        raise BatchError(
            f"a batch must be a tensor, a tuple, a list or a mapping, got {describe(batch)}: "
            "override training_step(self, batch)"
        )
    loss = outputs if isinstance(outputs, torch.Tensor) else _part(outputs, "loss")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise BatchError(
            f"the model returned {describe(outputs)} for a batch of {describe(batch)}, which is no loss: give "
            "Trainer(loss=...), let the model return its loss, or override training_step(self, batch)"
        )
    logits = _part(outputs, "logits")
    if isinstance(logits, torch.Tensor) and isinstance(targets, torch.Tensor):
        return {"loss": loss, "outputs": logits, "targets": targets}
    return loss


def _part(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)
