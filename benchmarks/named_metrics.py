"""What do metrics by name cost, beside torchmetrics called by hand?

Both add up the same batches and compute at the end of the pass. They take turns of one pass each, in another order
each round. By hand is what a careful user writes: `validate_args=False`, a `MetricCollection` with compute
groups where there are several, made once and reset before each pass. The numbers must agree, or the script fails.

By hand, counts of a binary or multilabel task are for logits only where a batch tells that they are, and errors are
summed in float32; offloop counts for both, because only the pass tells, and sums in float64.

    python benchmarks/named_metrics.py [--quick] [--rounds 150] [--json FILE]
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchmetrics.classification as tmc
from measure import HAND, HAND_AGAIN, OFFLOOP, Batch, Report, median_of, parse, ratio_of, take_turns, verdict
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from offloop.engine.metrics.metric_set import MetricSet

BATCHES = 40  # a pass
GOAL = 1.05
FAST = {"validate_args": False}


class Case(NamedTuple):
    """Metrics that both compute of the same batches."""

    name: str
    names: list[str]
    by_hand: Callable[[], list[Metric]]  # in the same order
    batch: Callable[[torch.Generator], Batch]
    rounds: float = 1.0  # a share of the usual ones


def classes(*shape: int) -> Callable[[torch.Generator], Batch]:
    """Return a maker of logits (B, C, ...) and classes (B, ...)."""
    B, C, *rest = shape
    return lambda g: (3 * torch.randn(shape, generator=g), torch.randint(0, C, (B, *rest), generator=g))


def labels(*shape: int) -> Callable[[torch.Generator], Batch]:
    """Return a maker of logits and labels, both (B,) or (B, L)."""
    return lambda g: (3 * torch.randn(shape, generator=g), torch.randint(0, 2, shape, generator=g))


def numbers(*shape: int) -> Callable[[torch.Generator], Batch]:
    """Return a maker of numbers, outputs and targets."""
    return lambda g: (torch.randn(shape, generator=g), torch.randn(shape, generator=g))


def errors() -> list[Metric]:
    """Return what errors are measured with."""
    return [MeanSquaredError(), MeanAbsoluteError(), R2Score()]


def by_class(size: int) -> list[Metric]:
    """Return the accuracy, and the F1 score as the mean over the classes."""
    return [tmc.MulticlassAccuracy(size, average="micro", **FAST), tmc.MulticlassF1Score(size, **FAST)]


CASES = [
    Case("binary, B 128: accuracy", ["accuracy"], lambda: [tmc.BinaryAccuracy(**FAST)], labels(128)),
    Case(
        "binary, B 128: accuracy, ROC AUC",
        ["accuracy", "roc_auc"],
        lambda: [tmc.BinaryAccuracy(**FAST), tmc.BinaryAUROC(**FAST)],
        labels(128),
    ),
    Case("10 classes, B 128: accuracy", ["accuracy"], lambda: by_class(10)[:1], classes(128, 10)),
    Case("10 classes, B 128: accuracy, F1", ["accuracy", "f1_score"], lambda: by_class(10), classes(128, 10)),
    Case(
        "10 classes, B 128: accuracy, F1, precision, recall",
        ["accuracy", "f1_score", "precision", "recall"],
        lambda: [*by_class(10), tmc.MulticlassPrecision(10, **FAST), tmc.MulticlassRecall(10, **FAST)],
        classes(128, 10),
    ),
    Case(
        "21 classes, 2 x 64 x 64 pixels: accuracy, F1",
        ["accuracy", "f1_score"],
        lambda: by_class(21),
        classes(2, 21, 64, 64),
        0.1,
    ),
    Case(
        "8 labels, B 128: accuracy, F1",
        ["accuracy", "f1_score"],
        lambda: [tmc.MultilabelExactMatch(8, **FAST), tmc.MultilabelF1Score(8, **FAST)],
        labels(128, 8),
    ),
    Case("numbers, B 128: MSE", ["mse"], lambda: errors()[:1], numbers(128)),
    Case("numbers, B 128: MSE, MAE, R2", ["mse", "mae", "r2"], errors, numbers(128)),
    Case("numbers, B 4096: MSE, MAE, R2", ["mse", "mae", "r2"], errors, numbers(4096)),
]


class ByHand:
    """Passes with torchmetrics."""

    def __init__(self, case: Case, batches: list[Batch]) -> None:
        made = case.by_hand()
        self.metric: Any = made[0] if len(made) == 1 else MetricCollection(list(made))
        self.batches = batches

    def __call__(self) -> list[float]:
        metric = self.metric
        metric.reset()
        for outputs, targets in self.batches:
            metric.update(outputs, targets)
        result = metric.compute()
        return [float(value) for value in (result.values() if isinstance(result, dict) else [result])]


class ByName:
    """Passes with offloop."""

    def __init__(self, case: Case, batches: list[Batch]) -> None:
        self.metrics = MetricSet(case.names, prefix="", device=torch.device("cpu"))
        self.batches = batches

    def __call__(self) -> list[float]:
        metrics = self.metrics
        metrics.reset()
        for outputs, targets in self.batches:
            metrics.update(outputs, targets)
        return list(metrics.compute().values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=150, help="passes of each contender")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 10 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    report = Report(
        f"Metrics by name against torchmetrics called by hand, {rounds} passes of {BATCHES} batches each",
        ["task and metrics", "ratio (95 %)", "A/A (95 %)", "by hand, us a batch", "goal"],
        packages=("torchmetrics",),
    )
    for case in CASES:
        generator = torch.Generator().manual_seed(0)
        batches = [case.batch(generator) for _ in range(BATCHES)]
        contenders = {
            OFFLOOP: ByName(case, batches),
            HAND: ByHand(case, batches),
            HAND_AGAIN: ByHand(case, batches),
        }
        first = {name: run() for name, run in contenders.items()}  # makes what it needs
        for mine, theirs in zip(first[OFFLOOP], first[HAND], strict=True):
            assert math.isclose(mine, theirs, rel_tol=1e-4, abs_tol=1e-5), (case.name, first)
        with report.measuring():
            times = take_turns(contenders, max(2, round(rounds * case.rounds)))
        ratio, a_a = ratio_of(times[OFFLOOP], times[HAND]), ratio_of(times[HAND_AGAIN], times[HAND])
        by_hand = median_of(times[HAND]).scaled(1e6 / BATCHES, 1)
        report.row(case.name, ratio, a_a, by_hand, verdict(ratio, GOAL, a_a))
        report.figure(case.name, {"ratio": ratio.median, "a_a": a_a.median})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
