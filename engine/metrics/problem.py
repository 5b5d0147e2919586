"""The task of named metrics, by outputs and targets. The first batch of a run decides it:

    outputs (floats)     targets                                               task
    (B, C, ...), C >= 2  (B, ...), integers                                    multiclass
    (B,) or (B, 1, ...)  0 or 1 in any dtype; same shape, or without the 1     binary
    (B, L, ...), L >= 2  0 or 1 in any dtype; same shape                       multilabel

Targets (B, C, ...) that are shares of classes, one-hot or soft, are a multiclass task if the trainer's `loss` reads
them so (`cross_entropy`): the class is the one with the largest share. Later batches may have more classes.
(B, ..., C) is accepted where (B, C, ...) does not fit. For errors (`mse`, ...) the task is regression.
(B = batch, C = classes, L = labels.)
"""

import functools
import logging
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from torch import Tensor, nn

from offloop.engine.metrics.names import NAMES

logger = logging.getLogger("offloop")

Rows = Literal["classes", "labels"] | None
"""What targets of the outputs' shape hold: shares of classes, independent labels, or unknown."""

_OF_CLASSES: Final = (nn.functional.cross_entropy, nn.functional.kl_div)
_OF_LABELS: Final = (
    nn.functional.binary_cross_entropy,
    nn.functional.binary_cross_entropy_with_logits,
    nn.functional.multilabel_soft_margin_loss,
)


def rows_of(loss: object) -> Rows:
    """Return how a loss function reads targets of the outputs' shape; None if unknown."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    if loss in _OF_CLASSES or isinstance(loss, nn.CrossEntropyLoss | nn.KLDivLoss):
        return "classes"
    if loss in _OF_LABELS or isinstance(
        loss, nn.BCELoss | nn.BCEWithLogitsLoss | nn.MultiLabelSoftMarginLoss
    ):
        return "labels"
    return None


class Problem(NamedTuple):
    """A task and its size."""

    task: str
    """binary, multiclass, multilabel or regression."""
    size: int
    """Classes (2 of a binary task) or labels."""
    class_dim: int = 1
    """The dimension of a multiclass task's outputs that holds the classes: 1 or -1."""

    def in_words(self) -> str:
        """Return `multiclass with 3 classes`."""
        what = {"multiclass": "classes", "multilabel": "labels"}.get(self.task)
        return self.task if what is None else f"{self.task} with {self.size} {what}"


def problem_of(
    names: Sequence[str], outputs: Tensor, targets: Tensor, first: Problem | None, rows: Rows
) -> Problem:
    """Return the problem of a batch, by the module's table.

    Args:
        names: The named metrics.
        outputs: Outputs of the batch.
        targets: Targets of the batch.
        first: The problem of the first batch. None: read values, which waits for the device.
        rows: What targets of the outputs' shape hold.

    Raises:
        ValueError: The batch fits no task, or a different one than the first.
    """
    shape, wanted, views = outputs.shape, targets.shape, {NAMES[name].view for name in names}
    is_same = shape[:1] == wanted[:1] != () and [n for n in shape if n > 1] == [n for n in wanted if n > 1]
    dims = (1, -1) if first is None else (first.class_dim,)
    fitting = [d for d in dims if len(shape) > 1 and shape[d] > 1 and shape[:d] + shape[d:][1:] == wanted]
    problem, why = Problem("regression", 1), ""
    if "numbers" in views and not is_same:
        why = "errors are computed from numbers of one shape"
    elif views <= {"numbers"}:
        pass
    elif is_same and outputs.is_floating_point():
        has_columns = shape == wanted and len(shape) > 1 and shape[1] > 1
        problem = Problem("multilabel", shape[1]) if has_columns else Problem("binary", 2)
        if has_columns and rows == "classes" and targets.is_floating_point():
            problem = Problem("multiclass", shape[1])
        # Host sync
        elif first is None and not bool(((targets == 0) | (targets == 1)).all()):
            why = (
                "targets must be 0 or 1; class indices need outputs (B, C), shares of classes are targets.argmax(1) "
                "for metrics, 'mse' and 'mae' take numbers"
            )
        # Host sync
        elif first is None and has_columns and rows is None and bool((targets.sum(1) == 1).all()):
            logger.warning(
                "metrics %s: each target of the first batch has one of %d labels, which are judged independently; "
                "if these are one-hot classes, return targets.argmax(1) as the step's targets",
                ", ".join(map(repr, names)),
                shape[1],
            )
    elif fitting and outputs.is_floating_point() and not targets.is_floating_point():
        problem = Problem("multiclass", shape[fitting[0]], fitting[0])
        # Host sync
        if first is None and int(targets.max()) >= problem.size:
            why = f"class indices must be below {problem.size}, got {int(targets.max())} (-100 is ignored)"
    else:
        why = "they fit no task: outputs are floats, (B, C) for integers (B,) or of the targets' shape"
    if not why and first is not None and problem != first:
        is_other_count = problem.task == "multiclass" and problem._replace(size=first.size) == first
        if is_other_count and "scores" not in views:
            return problem._replace(size=max(problem.size, first.size))
        why = f"the first batch was {first.in_words()}, this one is {problem.in_words()}"
        if is_other_count:
            why += " ('roc_auc' cannot add classes)"
    if why:
        raise ValueError(
            f"metrics {', '.join(map(repr, names))} cannot judge outputs {tuple(shape)} {outputs.dtype}, targets "
            f"{tuple(wanted)} {targets.dtype}: {why}. Return other outputs and targets from the step, or pass a "
            "torchmetrics.Metric instance."
        )
    return problem
