"""The loss of a model that computes it itself, the Hugging Face way."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from offloop.engine.errors import BatchError
from offloop.engine.training.setup import Batch
from offloop.engine.training.step_failures import describe, explain_call
from offloop.engine.training.step_output import StepOutput


class NextTokens:
    """Whether a model predicts the next token of each position, as a causal language model does.

    Such a model takes unshifted labels and shifts them itself, so metrics must compare its logits with the labels one
    position later. The first batch decides: both losses are computed from its logits and compared with the model's.
    """

    def __init__(self) -> None:
        # None before the first batch
        self._are_meant: bool | None = None

    def aligned(
        self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, T, V) and labels (B, T) that belong to the same positions. Others stay as they are."""
        if logits.dim() != 3 or labels.shape != logits.shape[:2] or labels.is_floating_point():
            return logits, labels
        if self._are_meant is None:
            self._are_meant = _is_about_next_tokens(loss, logits, labels, batch)
        return (logits[:, :-1], labels[:, 1:]) if self._are_meant else (logits, labels)


@torch.no_grad()
def _is_about_next_tokens(
    loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, batch: Batch
) -> bool:
    """Compare a loss with the two that it may be. Synchronises with the device."""
    here, behind = _cross_entropy(logits, labels), _cross_entropy(logits[:, :-1], labels[:, 1:])
    own = float(loss)
    near, far = sorted((abs(here - own), abs(behind - own)))
    if near <= 1e-3 * abs(own) and near <= far / 10:
        return abs(behind - own) == near
    # A loss with weights or smoothing equals neither. The labels of a causal language model are its inputs.
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    is_counted = labels >= 0
    return (
        isinstance(ids, torch.Tensor)
        and ids.shape == labels.shape
        and bool((ids == labels)[is_counted].all())
    )


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean over positions. Sequence by sequence: all at once would double the memory of the logits."""
    pairs = zip(logits, labels, strict=True)
    summed = sum(float(cross_entropy(each.float(), wanted, reduction="sum")) for each, wanted in pairs)
    count = int((labels != -100).sum())
    return summed / count if count else math.nan


def own_loss(model: torch.nn.Module, batch: Batch, next_tokens: NextTokens | None) -> StepOutput:
    """Return the loss that a model computes itself, with outputs and targets if there are any.

    Args:
        model: The model.
        batch: The batch, which it gets as its arguments.
        next_tokens: Aligns outputs and targets for metrics; None without metrics.

    Raises:
        BatchError: The batch cannot be passed to a model, or the model has returned no loss.
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
        if next_tokens is not None:
            logits, targets = next_tokens.aligned(loss, logits, targets, batch)
        return {"loss": loss, "outputs": logits, "targets": targets}
    return loss


def _part(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)
