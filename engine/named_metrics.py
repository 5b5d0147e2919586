"""The torchmetrics behind each name, changed where theirs would make the host wait for CUDA or judge by batches.

Imported with the first batch of a run that has metrics: torchmetrics is slow to import.
"""

from collections.abc import Callable
from typing import Any, Final, cast

import torch
import torchmetrics.classification as tmc
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_auroc
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.utilities.compute import normalize_logits_if_needed
from torchmetrics.utilities.data import dim_zero_cat

from offloop.engine.metrics import Problem, wide


class _OnDevice(tmc.MulticlassStatScores):
    """Counts without `torch.bincount`, which makes the host wait for CUDA; `compute` is torchmetrics'."""

    tp: Tensor
    fp: Tensor
    fn: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add classes (N,) int64; negative targets do not count."""
        hits = preds == target
        misses = (hits ^ (target >= 0)).long()
        target = target.clamp(min=0)
        self.tp.scatter_add_(0, target, hits.long())
        self.fp.scatter_add_(0, preds, misses)
        self.fn.scatter_add_(0, target, misses)  # no name here is made from true negatives


class _ExactMatch(tmc.MultilabelExactMatch):
    correct: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add labels (N, L) without `torch.tensor(N, device=...)`, which makes the host wait for CUDA."""
        self.correct += (preds == target).all(1).sum()
        self.total += len(preds)


class _R2(R2Score):
    def compute(self) -> Tensor:
        """Return R2, NaN where torchmetrics raises: below two samples."""
        return super().compute() if self.total >= 2 else self.residual.new_tensor(torch.nan)


class _RocAuc(tmc.MultilabelAUROC):
    """Leaves out columns of one kind, and decides about logits by the pass, not batch by batch."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep scores with classes or truths, which must be copies."""
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics itself differs from its base
        """Return the mean area. Blocks."""
        truths, scores = dim_zero_cat(self.target), dim_zero_cat(self.preds)
        scores = scores.to(wide(scores.device))
        if truths.ndim == 1:  # classes
            scores, classes = scores[truths >= 0], truths[truths >= 0]
            scores = normalize_logits_if_needed(scores, "softmax")
            truths = classes.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
        has_both = (truths == 1).any(0) & (truths == 0).any(0)
        if not bool(has_both.any()) or bool(scores.isnan().any()):
            return scores.new_tensor(torch.nan)
        scores, truths = scores[:, has_both], truths[:, has_both].long()
        return multilabel_auroc(scores, truths, scores.shape[1], validate_args=False)


def _count(kind: str, by_label: type[Metric], average: str = "macro") -> Callable[[Problem], Metric]:
    by_class = getattr(tmc, f"Multiclass{kind}")
    on_device = type(by_class.__name__, (_OnDevice, by_class), {})

    def make(problem: Problem) -> Metric:
        chosen = by_label if problem.task == "multilabel" else on_device
        metric: Metric = cast(Any, chosen)(problem.size, validate_args=False)
        metric.average = average  # only now, so that "micro" counts by class, too, and shares the counts
        return metric

    return make


MAKERS: Final[dict[str, Callable[[Problem], Metric]]] = {  # torchmetrics' default is average="macro"
    "accuracy": _count("Accuracy", _ExactMatch, "micro"),
    "precision": _count("Precision", tmc.MultilabelPrecision),
    "recall": _count("Recall", tmc.MultilabelRecall),
    "f1_score": _count("F1Score", tmc.MultilabelF1Score),
    "roc_auc": lambda problem: _RocAuc(problem.size, validate_args=False),
    "mse": lambda _: MeanSquaredError(),
    "rmse": lambda _: MeanSquaredError(squared=False),
    "mae": lambda _: MeanAbsoluteError(),
    "r2": lambda _: _R2(),
}
