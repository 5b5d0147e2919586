"""Named metrics: sums over the batches of a pass, and the torchmetrics classes that compute values from them.

The `update` of torchmetrics is not used: it makes the host wait for CUDA (`torch.bincount`), decides between logits
and probabilities batch by batch, and repeats the same work for every name.

This module is imported before a run with metrics starts, because torchmetrics is slow to import.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeAlias

import torch
import torchmetrics.classification as tmc
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_auroc
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.utilities.compute import normalize_logits_if_needed
from torchmetrics.utilities.data import dim_zero_cat

from offloop.engine.metrics.names import NAMES
from offloop.engine.metrics.problem import Problem

State: TypeAlias = Tensor | list[Tensor] | int

_KINDS: Final = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1_score": "F1Score"}


class Sums(ABC):
    """The sums that names of one kind share, and their torchmetrics. Training thread only."""

    kept: ClassVar[tuple[str, ...]]
    """The attributes that hold the sums of the pass so far."""
    takes_numbers: ClassVar[bool] = False
    """True if targets are numbers, not classes or labels."""

    def __init__(self, names: Sequence[str], problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.metrics = {name: alone(self.metric(name)).to(device) for name in names}
        self.reset()

    @abstractmethod
    def metric(self, name: str) -> Metric:
        """Return the torchmetrics of a name."""

    @abstractmethod
    def reset(self) -> None:
        """Clear the sums."""

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add one batch. Must not keep its memory or wait for the device."""

    @abstractmethod
    def states(self, name: str) -> Mapping[str, State]:
        """Return the sums as states of this name's torchmetrics."""

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each name and its number. Blocks."""
        for name, metric in self.metrics.items():
            yield name, _compute(metric, self.states(name), self.device)

    def state_dict(self) -> dict[str, State]:
        """Return copies of the sums, on their device. Does not block."""
        return {name: _copy(getattr(self, name), self.device) for name in self.kept}

    def load_state_dict(self, state: Mapping[str, State]) -> None:
        """Continue from copies of these sums."""
        for name in self.kept:
            setattr(self, name, _copy(state[name], self.device))

    def zeros(self, *shape: int) -> Tensor:
        """Return counts at zero, int64."""
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


class ClassCounts(Sums):
    """Hits and misses of each class, in a multiclass task."""

    # No name needs true negatives
    kept = ("tp", "fp", "fn")

    def metric(self, name: str) -> Metric:
        return _by_class(name, self.problem.size)

    def reset(self) -> None:
        self.tp, self.fp, self.fn = (self.zeros(self.problem.size) for _ in self.kept)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add classes (N,); negative targets do not count.

        Raises:
            ValueError: A class is not among the outputs. On CUDA a device assertion fails instead.
        """
        if outputs.shape[self.problem.class_dim] > self.problem.size:
            self._grow(outputs.shape[self.problem.class_dim])
        predicted, truths = outputs.argmax(self.problem.class_dim).reshape(-1), targets.reshape(-1).long()
        hits = predicted == truths
        misses = (hits ^ (truths >= 0)).long()
        truths = truths.clamp(min=0)
        try:
            self.tp.scatter_add_(0, truths, hits.long())
        except RuntimeError as error:
            largest = int(truths.max())
            if largest < self.problem.size:
                raise
            raise ValueError(
                f"metrics {', '.join(map(repr, self.metrics))} cannot judge class {largest}: the outputs have "
                f"{self.problem.size} classes, 0 to {self.problem.size - 1}. Let the model give one output for each "
                "class, or pass a torchmetrics.Metric with its own num_classes="
            ) from error
        self.fp.scatter_add_(0, predicted, misses)
        self.fn.scatter_add_(0, truths, misses)

    def _grow(self, classes: int) -> None:
        """Add classes that no batch has had so far."""
        missing = self.zeros(classes - self.problem.size)
        self.tp, self.fp, self.fn = (torch.cat([each, missing]) for each in (self.tp, self.fp, self.fn))
        self.problem = self.problem._replace(size=classes)
        self.metrics = {name: alone(self.metric(name)).to(self.device) for name in self.metrics}

    def states(self, name: str) -> Mapping[str, State]:
        return {"tp": self.tp, "fp": self.fp, "fn": self.fn}


class LabelCounts(Sums):
    """Hits and misses of each label, in a binary or multilabel task, for logits and for probabilities.

    Only the end of the pass decides which of the two the outputs are.
    """

    kept = ("samples", "true", "below_0", "above", "hits", "exact")

    def __init__(self, names: Sequence[str], problem: Problem, device: torch.device) -> None:
        self._labels = problem.size if problem.task == "multilabel" else 1
        self._has_exact = problem.task == "multilabel" and "accuracy" in names
        self._thresholds = torch.tensor([0.0, 0.5, 1.0], device=device).view(3, 1, 1)
        # 0 if the outputs of the pass are logits, 1 if they are probabilities
        self._reading = 0
        super().__init__(names, problem, device)

    def metric(self, name: str) -> Metric:
        if self.problem.task == "binary":
            return _by_class(name, self.problem.size)
        kind = "ExactMatch" if name == "accuracy" else _KINDS[name]
        metric: Metric = getattr(tmc, f"Multilabel{kind}")(self.problem.size, validate_args=False)
        return metric

    def reset(self) -> None:
        self.samples = 0
        self.true, self.below_0 = self.zeros(self._labels), self.zeros(self._labels)
        # Above 0, 0.5 and 1
        self.above = self.zeros(3, self._labels)
        # True and above 0, true and above 0.5
        self.hits = self.zeros(2, self._labels)
        # Samples whose labels are all right, as logits and as probabilities
        self.exact = self.zeros(2)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add labels (N, L)."""
        rows, truths = _rows(outputs, self.problem), _rows(targets, self.problem) != 0
        # (3, N, L); NaN is above nothing
        above = rows > self._thresholds
        said = above[:2]
        self.samples += len(rows)
        self.true += truths.sum(0)
        self.below_0 += (rows < 0).sum(0)
        self.above += above.sum(1)
        self.hits += (said & truths).sum(1)
        if self._has_exact:
            self.exact += (said == truths).all(2).sum(1)

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Decide between logits and probabilities, then yield each name and its number. Blocks."""
        outside = self.below_0.sum() + self.above[2].sum()
        # Host sync
        self._reading = int(outside == 0)
        return super().compute()

    def states(self, name: str) -> Mapping[str, State]:
        said, tp = self.above[self._reading], self.hits[self._reading]
        fp, fn = said - tp, self.true - tp
        tn = self.samples - said - fn
        # The classes of a binary task are "no" and "yes"
        if self.problem.task == "binary":
            return {"tp": torch.cat([tn, tp]), "fp": torch.cat([fn, fp]), "fn": torch.cat([fp, fn])}
        if name == "accuracy":
            return {"correct": self.exact[self._reading], "total": self.samples}
        return {"tp": tp, "fp": fp, "tn": tn, "fn": fn}


class Scores(Sums):
    """All outputs and targets of the pass, for metrics that rank them."""

    kept = ("outputs", "targets")

    def metric(self, name: str) -> Metric:
        return _RocAuc(self.problem.size, validate_args=False)

    def reset(self) -> None:
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Keep scores (N, C) and classes (N,), or scores (N, L) and truths (N, L)."""
        is_multiclass = self.problem.task == "multiclass"
        self.outputs.append(_rows(outputs, self.problem).clone())
        self.targets.append((targets.reshape(-1) if is_multiclass else _rows(targets, self.problem)).clone())

    def states(self, name: str) -> Mapping[str, State]:
        return {"preds": self.outputs, "target": self.targets}


class Errors(Sums):
    """Sums of errors and of targets in float64, by column."""

    kept = ("samples", "numbers", "squares", "distances", "target_sum", "target_squares")
    takes_numbers = True

    def __init__(self, names: Sequence[str], problem: Problem, device: torch.device) -> None:
        self._wide = wide(device)
        self._has_squares = not {"mse", "rmse", "r2"}.isdisjoint(names)
        super().__init__(names, problem, device)

    def metric(self, name: str) -> Metric:
        classes = {"mse": MeanSquaredError, "mae": MeanAbsoluteError, "r2": _R2}
        return MeanSquaredError(squared=False) if name == "rmse" else classes[name]()

    def reset(self) -> None:
        self.samples = self.numbers = 0
        # One zero for all sums, because none is changed in place.
        nothing = torch.zeros((), dtype=self._wide, device=self.device)
        self.squares = self.distances = self.target_sum = self.target_squares = nothing

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add numbers (B,) or (B, D)."""
        truths = targets.to(self._wide)
        if truths.ndim > 2:
            truths = truths.flatten(1)
        # (B, 1) and (B,), or more than two dimensions
        if outputs.shape != truths.shape:
            outputs = outputs.reshape(truths.shape)
        if not outputs.is_floating_point():
            outputs = outputs.to(self._wide)
        # In the wider of the two dtypes.
        errors = outputs - truths
        self.samples += len(truths)
        self.numbers += truths.numel()
        if self._has_squares:
            self.squares = self.squares + (errors * errors).sum(0)
        if "mae" in self.metrics:
            self.distances = self.distances + errors.abs().sum(0)
        if "r2" in self.metrics:
            self.target_sum = self.target_sum + truths.sum(0)
            self.target_squares = self.target_squares + (truths * truths).sum(0)

    def states(self, name: str) -> Mapping[str, State]:
        if name == "r2":
            sums = {"sum_error": self.target_sum, "sum_squared_error": self.target_squares}
            return {**sums, "residual": self.squares, "total": self.samples}
        if name == "mae":
            return {"sum_abs_error": self.distances.sum(), "total": self.numbers}
        return {"sum_squared_error": self.squares.sum(), "total": self.numbers}


class _R2(R2Score):
    def compute(self) -> Tensor:
        """Return R2, NaN where torchmetrics raises: below two samples."""
        return super().compute() if self.total >= 2 else self.residual.new_tensor(torch.nan)


class _RocAuc(tmc.MultilabelAUROC):
    """Skips columns with one kind of target, and decides between logits and probabilities once per pass."""

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics differs from its base, too
        """Return the mean area. Blocks."""
        truths, scores = dim_zero_cat(self.target), dim_zero_cat(self.preds)
        scores = scores.to(wide(scores.device))
        # One dimension: classes
        if truths.ndim == 1:
            scores, classes = scores[truths >= 0], truths[truths >= 0]
            scores = normalize_logits_if_needed(scores, "softmax")
            truths = classes.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
        has_both = (truths == 1).any(0) & (truths == 0).any(0)
        if not bool(has_both.any()) or bool(scores.isnan().any()):
            return scores.new_tensor(torch.nan)
        scores, truths = scores[:, has_both], truths[:, has_both].long()
        return multilabel_auroc(scores, truths, scores.shape[1], validate_args=False)


def sums_of(names: Sequence[str], problem: Problem, device: torch.device) -> list[Sums]:
    """Return the sums that these names need; names of one view share them."""
    labels = ClassCounts if problem.task == "multiclass" else LabelCounts
    kinds: dict[str, type[Sums]] = {"labels": labels, "scores": Scores, "numbers": Errors}
    by_kind = {kind: [name for name in names if NAMES[name].view == kind] for kind in kinds}
    return [kinds[kind](chosen, problem, device) for kind, chosen in by_kind.items() if chosen]


def alone(metric: Metric) -> Metric:
    """Return a metric that never synchronises itself with other processes, whatever process group there is."""
    for member in metric.modules():
        if isinstance(member, Metric):
            member.distributed_available_fn = _nowhere
    return metric


def _nowhere() -> bool:
    return False


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of sums."""
    # Apple's GPUs lack float64
    return torch.float32 if device.type == "mps" else torch.float64


def _by_class(name: str, classes: int) -> Metric:
    """Return a torchmetrics with counts by class. The average is "macro", for the accuracy "micro"."""
    metric: Metric = getattr(tmc, f"Multiclass{_KINDS[name]}")(classes, validate_args=False)
    if name == "accuracy":
        # Not in the constructor, where it would give one count for all classes
        metric.average = "micro"
    return metric


def _rows(values: Tensor, problem: Problem) -> Tensor:
    """Return values (B, ...) as (N, 1) in a binary task, else as (N, C) or (N, L)."""
    if problem.task == "binary":
        return values.reshape(-1, 1)
    return values.movedim(problem.class_dim, -1).flatten(0, -2)


def _compute(metric: Metric, states: Mapping[str, State], device: torch.device) -> Any:
    """Return the number that torchmetrics computes from the sums. Blocks."""
    for name, value in states.items():
        if isinstance(value, int):
            value = torch.tensor(value, device=device)
        if isinstance(value, Tensor) and not value.is_floating_point():
            # torchmetrics would divide in float32, where 90 / 100 is less than 0.9
            value = value.to(wide(device))
        setattr(metric, name, value)
    # At a count of 0 torchmetrics warns
    metric._computed, metric._update_count = None, 1
    return metric.compute()


def _copy(value: State, device: torch.device) -> State:
    if isinstance(value, list):
        return [each.to(device, copy=True) for each in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
