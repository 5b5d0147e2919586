"""engine/metrics/metric_set.py against scikit-learn, against torchmetrics called by hand, and at its edges."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any

import pytest
import sklearn.metrics as sk  # type: ignore[import-untyped]  # it has no types
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import ClasswiseWrapper, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelExactMatch,
)
from torchmetrics.regression import MeanSquaredError, R2Score

from offloop.engine import Trainer
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.metrics.names import MetricSpec, RunMetrics, check_metrics, metric_direction, metrics_for
from offloop.engine.testing import tiny_batches, tiny_model, tiny_trainer

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
COUNTED = ["accuracy", "precision", "recall", "f1_score"]
COMPARED = ["mse", "rmse", "mae", "r2"]

seeds = st.integers(0, 999)
batch_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)  # uneven, with a short last one


def batches(outputs: Tensor, targets: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a data set into batches of these sizes, as often as needed; the last one is the rest."""
    start = 0
    for size in cycle(sizes):
        if start >= len(outputs):
            return
        yield outputs[start : start + size], targets[start : start + size]
        start += size


def metrics_of(
    metrics: MetricSpec, outputs: Tensor, targets: Tensor, sizes: Sequence[int] = (7,)
) -> dict[str, float]:
    """Run one pass over a data set."""
    metric_set = MetricSet(metrics, prefix="", device=CPU)
    for batch in batches(outputs, targets, sizes):
        metric_set.update(*batch)
    return metric_set.compute()


def by_sklearn(targets: Tensor, predicted: Tensor) -> dict[str, float]:
    """The counted metrics, as the module's table promises them."""
    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    t, p = targets.numpy(), predicted.numpy()
    return {
        "accuracy": sk.accuracy_score(t, p),
        "precision": sk.precision_score(t, p, **macro),
        "recall": sk.recall_score(t, p, **macro),
        "f1_score": sk.f1_score(t, p, **macro),
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50)
@given(sizes=batch_sizes, C=st.integers(2, 12), missing=st.integers(0, 3), seed=seeds)
def test_multiclass_names_equal_sklearn(sizes: list[int], C: int, missing: int, seed: int) -> None:
    g = generator(seed)
    outputs = torch.randn(sum(sizes), C, generator=g)
    targets = torch.randint(0, max(1, C - missing), (sum(sizes),), generator=g)
    outputs[:, : missing // 2] = -9.0  # a class that is never predicted
    found = metrics_of(COUNTED, outputs, targets, sizes)
    assert found == pytest.approx(by_sklearn(targets, outputs.argmax(1)), abs=1e-6)


@settings(max_examples=50)
@given(
    sizes=batch_sizes, is_column=st.booleans(), is_float=st.booleans(), scale=st.floats(0.1, 6), seed=seeds
)
def test_binary_names_equal_sklearn(
    sizes: list[int], is_column: bool, is_float: bool, scale: float, seed: int
) -> None:
    g = generator(seed)
    outputs = scale * torch.randn((sum(sizes), 1) if is_column else (sum(sizes),), generator=g)
    assume(bool((outputs < 0).any()))
    targets = torch.randint(0, 2, (sum(sizes),), generator=g)
    given_targets = targets.float().reshape(outputs.shape) if is_float else targets
    found = metrics_of(COUNTED, outputs, given_targets, sizes)
    assert found == pytest.approx(by_sklearn(targets, (outputs > 0).reshape(-1)), abs=1e-6)
    if 0 < int(targets.sum()) < len(targets):
        area = metrics_of(["roc_auc"], outputs, given_targets, sizes)["roc_auc"]
        assert area == pytest.approx(sk.roc_auc_score(targets, outputs.reshape(-1)), abs=1e-6)


@settings(max_examples=50)
@given(sizes=batch_sizes, L=st.integers(2, 6), dtype=st.sampled_from(["long", "bool", "float"]), seed=seeds)
def test_multilabel_names_equal_sklearn(sizes: list[int], L: int, dtype: str, seed: int) -> None:
    g = generator(seed)
    outputs = torch.randn(sum(sizes), L, generator=g)
    targets = torch.randint(0, 2, (sum(sizes), L), generator=g)
    targets[:, 0] = 0  # a label that no sample has
    assume(bool((outputs < 0).any()))
    found = metrics_of(COUNTED, outputs, getattr(targets, dtype)(), sizes)
    assert found == pytest.approx(by_sklearn(targets, (outputs > 0).long()), abs=1e-6)
    defined = [c for c in range(L) if 0 < int(targets[:, c].sum()) < len(targets)]
    if defined:
        area = metrics_of(["roc_auc"], outputs, getattr(targets, dtype)(), sizes)["roc_auc"]
        columns = [sk.roc_auc_score(targets[:, c], outputs[:, c]) for c in defined]
        assert area == pytest.approx(sum(columns) / len(columns), abs=1e-6)


@settings(max_examples=50)
@given(sizes=batch_sizes, D=st.sampled_from([None, 1, 3]), offset=st.sampled_from([0.0, 1e3]), seed=seeds)
def test_regression_names_equal_sklearn(sizes: list[int], D: int | None, offset: float, seed: int) -> None:
    """Large offsets included, where sums in float32 go wrong."""
    assume(sum(sizes) > 1)
    g = generator(seed)
    shape = (sum(sizes),) if D is None else (sum(sizes), D)
    t = offset + torch.randn(shape, generator=g, dtype=torch.float64)
    o = t + torch.randn(shape, generator=g, dtype=torch.float64)
    assume(
        bool(((t - t.mean(dim=0)).square().sum(dim=0) > 1e-3).all())
    )  # below 1e-4, torchmetrics takes it for 0
    found = metrics_of(COMPARED, o, t, sizes)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(t, o), rel=1e-9)
    assert found["rmse"] == pytest.approx(sk.mean_squared_error(t, o) ** 0.5, rel=1e-9)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(t, o), rel=1e-9)
    assert found["r2"] == pytest.approx(sk.r2_score(t, o), rel=1e-5)


@settings(max_examples=50)
@given(sizes=batch_sizes, C=st.integers(2, 6), is_logit=st.booleans(), seed=seeds)
def test_multiclass_roc_auc_equals_sklearn(sizes: list[int], C: int, is_logit: bool, seed: int) -> None:
    g = generator(seed)
    logits = 3 * torch.randn(sum(sizes), C, generator=g, dtype=torch.float64)
    targets = torch.randint(0, C, (sum(sizes),), generator=g)
    classes = sorted(set(targets.tolist()))
    assume(len(classes) > 1)
    found = metrics_of(["roc_auc"], logits if is_logit else logits.softmax(1), targets, sizes)
    p = logits.softmax(1)
    by_class = [sk.roc_auc_score(targets == c, p[:, c]) for c in classes]
    assert found["roc_auc"] == pytest.approx(sum(by_class) / len(by_class), abs=1e-6)
    if len(classes) == C > 2:
        whole = sk.roc_auc_score(targets, p, multi_class="ovr", average="macro")
        assert found["roc_auc"] == pytest.approx(whole, abs=1e-6)


def test_batch_of_logits_within_0_and_1_is_judged_like_the_rest_of_the_pass() -> None:
    outputs = torch.tensor([0.1, 0.2, 0.3, 0.4, -3.0, 5.0])  # the first batch looks like probabilities
    targets = torch.tensor([1, 1, 1, 1, 0, 1])
    for sizes in ([4, 2], [2, 2, 2], [6]):
        assert metrics_of(["accuracy"], outputs, targets, sizes) == {"accuracy": 1.0}
    by_hand = BinaryAccuracy()
    for batch in batches(outputs, targets, [2]):
        by_hand.update(*batch)
    assert float(by_hand.compute()) == pytest.approx(1 / 3)  # the trap


def test_probabilities_are_cut_at_one_half() -> None:
    outputs, targets = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 0, 1, 1])
    assert metrics_of(["accuracy"], outputs, targets, [1, 3]) == {"accuracy": 1.0}


@pytest.mark.parametrize("values", [[0.1, 0.2, -3.0, torch.nan], [0.6, 0.7, 0.4, torch.nan]])
def test_nan_outputs_do_not_decide_between_logits_and_probabilities(values: list[float]) -> None:
    targets = torch.tensor([1, 1, 0, 0])
    assert metrics_of(["accuracy"], torch.tensor(values), targets, [4]) == {"accuracy": 1.0}


def test_roc_auc_tells_large_logits_apart() -> None:
    """torchmetrics' sigmoid makes these equal in float32, which gives 0.5."""
    outputs, targets = torch.tensor([18.0, 24.0, 30.0, 36.0]), torch.tensor([0, 0, 1, 1])
    assert metrics_of(["roc_auc"], outputs, targets, [2, 2]) == {"roc_auc": 1.0}


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.randn(4), torch.ones(4)),
        (torch.randn(4, 3), torch.full((4,), 2)),
        (torch.tensor([0.0, torch.nan]), torch.tensor([0, 1])),
        (torch.randn(4, 3), torch.full((4,), -100)),
    ],
)
def test_roc_auc_of_nothing_to_rank_is_nan(outputs: Tensor, targets: Tensor) -> None:
    area = metrics_of(["roc_auc"], outputs, targets, [len(outputs)])["roc_auc"]
    assert area != area


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_of_outputs_does_not_matter(dtype: torch.dtype) -> None:
    outputs = torch.randn(20, 4, generator=generator(0)).to(dtype)
    targets = torch.randint(0, 4, (20,), generator=generator(1))
    names = [*COUNTED, "roc_auc"]
    wide = metrics_of(names, outputs.double(), targets)
    assert metrics_of(names, outputs, targets) == pytest.approx(wide, abs=1e-6)


def test_class_last_outputs_are_understood_and_stay_so_when_both_readings_fit() -> None:
    outputs = torch.randn(6, 9, 5, generator=generator(0))  # tokens: (B, T, C)
    targets = torch.randint(0, 5, (6, 9), generator=generator(1)).int()
    flat = by_sklearn(targets.reshape(-1), outputs.argmax(-1).reshape(-1))
    assert metrics_of(COUNTED, outputs, targets, [4, 2]) == pytest.approx(flat, abs=1e-6)
    metrics = MetricSet(["accuracy"], prefix="", device=CPU)
    classes = torch.arange(5).expand(2, 5)
    metrics.update(torch.nn.functional.one_hot(classes[:, :3], 5).float(), classes[:, :3])
    metrics.update(torch.nn.functional.one_hot(classes, 5).float(), classes)  # (2, 5, 5)
    assert metrics.compute() == {"accuracy": 1.0}


def test_positions_count_as_samples() -> None:
    outputs, targets = torch.randn(8, 3, 5, 4), torch.randint(0, 3, (8, 5, 4))
    wanted = by_sklearn(targets.reshape(-1), outputs.argmax(1).reshape(-1))
    assert metrics_of(COUNTED, outputs, targets, [3]) == pytest.approx(wanted, abs=1e-6)
    truths = targets > 0  # binary: (B, 1, ...) with (B, ...)
    wanted = by_sklearn(truths.reshape(-1).long(), (outputs[:, 0] > 0).reshape(-1).long())
    assert metrics_of(COUNTED, outputs[:, :1], truths, [3]) == pytest.approx(wanted, abs=1e-6)
    labels = (outputs + torch.randn(8, 3, 5, 4) > 0).long()
    rows = [t.movedim(1, -1).reshape(-1, 3) for t in (labels, (outputs > 0).long())]
    assert metrics_of(COUNTED, outputs, labels, [3]) == pytest.approx(by_sklearn(*rows), abs=1e-6)


@pytest.mark.parametrize("names", [COUNTED, ["roc_auc"]])
def test_negative_class_indices_are_not_counted(names: list[str]) -> None:
    outputs = torch.randn(30, 6, generator=generator(0))
    targets = torch.randint(0, 6, (30,), generator=generator(1))
    is_counted = torch.arange(30) % 4 != 0
    ignored = targets.where(is_counted, torch.tensor(-100))
    assert metrics_of(names, outputs, ignored) == pytest.approx(
        metrics_of(names, outputs[is_counted], targets[is_counted])
    )


def test_column_of_outputs_is_not_broadcast_over_targets() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 3.0])
    assert metrics_of(["mse", "mae", "r2"], outputs, targets, [3]) == {"mse": 0.0, "mae": 0.0, "r2": 1.0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_numbers_of_any_dtype_are_taken(dtype: torch.dtype) -> None:
    outputs, targets = torch.tensor([0, 1, 1, 0]).to(dtype), torch.tensor([1, 1, 0, 0]).to(dtype)
    wanted = {"mse": 0.5, "rmse": 0.5**0.5, "mae": 0.5, "r2": -1.0}
    assert metrics_of(COMPARED, outputs, targets, [3]) == pytest.approx(wanted)


def test_outputs_in_any_memory_layout_are_taken() -> None:
    outputs = torch.randn(9, 3, 4, 5).to(memory_format=torch.channels_last)
    found = metrics_of(COMPARED, outputs, torch.zeros(9, 3, 4, 5), [2])
    assert found["mse"] == pytest.approx(float(outputs.double().square().mean()))


def test_r2_at_its_edges() -> None:
    """One sample has none; constant targets give 1 if hit exactly, else 0, as in scikit-learn."""
    one = metrics_of(["r2"], torch.tensor([1.0]), torch.tensor([1.0]))["r2"]
    assert one != one
    assert metrics_of(["r2"], torch.tensor([5.0, 5.0]), torch.tensor([5.0, 5.0])) == {"r2": 1.0}
    assert metrics_of(["r2"], torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.1])) == {"r2": 0.0}


def test_regression_and_classification_names_work_side_by_side() -> None:
    outputs, targets = torch.tensor([0.2, 0.9]), torch.tensor([0.0, 1.0])
    found = metrics_of(["mse", "accuracy"], outputs, targets, [2])
    assert found == pytest.approx({"mse": 0.025, "accuracy": 1.0})


@pytest.mark.parametrize(
    ("names", "outputs", "targets", "words"),
    [
        (["accuracy"], torch.randn(4, 3), torch.randn(4, 3), ["0 or 1", "'mse'"]),
        (["accuracy"], torch.randn(4), torch.tensor([0, 1, 2, 1]), ["0 or 1"]),
        (["accuracy"], torch.randn(4, 3), torch.tensor([0, 1, 2, 3]), ["below 3, got 3"]),
        (["accuracy"], torch.randn(4, 3), torch.tensor([0.0, 1, 2, 1]), ["fit no task", "integers"]),
        (["f1"], torch.ones(4).long(), torch.ones(4).long(), ["'f1_score'", "fit no task", "floats"]),
        (["f1"], torch.randn(4, 3), torch.zeros(4, 2), ["(4, 3) torch.float32", "(4, 2)", "Metric"]),
        (["accuracy"], torch.randn(4, 3), torch.zeros(5).long(), ["fit no task"]),
        (["accuracy"], torch.tensor(1.0), torch.tensor(1.0), ["fit no task"]),
        (["mse"], torch.randn(4, 3), torch.zeros(4), ["'mse'", "numbers of one shape"]),
    ],
)
def test_first_batch_that_fits_nothing_says_why(
    names: list[str], outputs: Tensor, targets: Tensor, words: list[str]
) -> None:
    metrics = MetricSet(names, prefix="", device=CPU)
    with pytest.raises(ValueError) as error:
        metrics.update(outputs, targets)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_later_batch_of_another_task_is_refused() -> None:
    metrics = MetricSet(["accuracy"], prefix="", device=CPU)
    metrics.update(torch.randn(4, 3), torch.zeros(4).long())
    with pytest.raises(
        ValueError, match=r"the first batch was multiclass with 3 classes, this one is binary"
    ):
        metrics.update(torch.randn(4), torch.zeros(4).long())


def test_ranking_takes_no_other_number_of_classes() -> None:
    metrics = MetricSet(["accuracy", "roc_auc"], prefix="", device=CPU)
    metrics.update(torch.randn(4, 3), torch.zeros(4).long())
    with pytest.raises(
        ValueError, match=r"3 classes, this one is multiclass with 4 classes \('roc_auc' cannot"
    ):
        metrics.update(torch.randn(4, 4), torch.zeros(4).long())


@pytest.mark.parametrize("sizes", [(3, 5, 4), (5, 3, 3), (2, 3, 7)])
def test_counts_take_in_classes_that_come_later(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    metrics = MetricSet(COUNTED, prefix="", device=CPU)
    for run in range(2):
        metrics.reset()
        all_outputs, all_targets = [], []
        for size in sizes:
            outputs = torch.randn(20, size, generator=generator)
            targets = torch.randint(size, (20,), generator=generator)
            metrics.update(outputs, targets)
            all_outputs.append(outputs.argmax(1))
            all_targets.append(targets)
        assert metrics.compute() == pytest.approx(
            by_sklearn(torch.cat(all_targets), torch.cat(all_outputs))
        ), run


def test_class_index_that_is_too_large_raises_in_any_batch() -> None:
    metrics = MetricSet(["accuracy"], prefix="", device=CPU)
    metrics.update(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"cannot judge class 3: the outputs have 3 classes, 0 to 2.*num_classes="
    ):
        metrics.update(torch.randn(2, 3), torch.tensor([0, 3]))


def test_users_metric_is_cloned_and_named_by_its_class() -> None:
    own = MulticlassF1Score(3, average="macro")
    outputs, targets = torch.randn(20, 3), torch.randint(0, 3, (20,))
    found = metrics_of([own, "f1"], outputs, targets)
    assert list(found) == ["multiclass_f1_score", "f1_score"]
    assert found["multiclass_f1_score"] == pytest.approx(found["f1_score"])
    assert not own.update_called


def test_mapping_names_the_metrics() -> None:
    metrics = {"a": BinaryF1Score(), "b": BinaryF1Score(threshold=0.9)}
    outputs, targets = torch.tensor([0.8, 0.95]), torch.tensor([1, 1])
    assert metrics_of(metrics, outputs, targets, [2]) == pytest.approx({"a": 1.0, "b": 2 / 3})


def test_result_that_is_a_mapping_gives_one_key_each() -> None:
    own = {"f1": ClasswiseWrapper(MulticlassF1Score(2, average=None), labels=["cat", "dog"])}
    found = metrics_of(own, torch.eye(2), torch.tensor([0, 1]), [2])
    assert found == {"f1_multiclassf1score_cat": 1.0, "f1_multiclassf1score_dog": 1.0}


def test_result_that_is_a_vector_is_refused() -> None:
    metrics = MetricSet([R2Score(multioutput="raw_values")], prefix="", device=CPU)
    metrics.update(torch.randn(5, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"'r2_score' gave shape \(3,\), not one number"):
        metrics.compute()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["f1", "Accuracy", "AUROC", "Mean squared-error"], ("f1_score", "accuracy", "roc_auc", "mse")),
        (["r2_score", "mean_squared_error"], ("r2", "mse")),
        ([MeanSquaredError(), "mse", R2Score()], ("mean_squared_error", "mse", "r2_score")),
        ([], ()),
    ],
)
def test_names_are_known_before_the_first_batch(given: list[str | Metric], names: tuple[str, ...]) -> None:
    assert MetricSet(given, prefix="val_", device=CPU).names == names


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        (["acuracy"], ValueError, "did you mean 'accuracy'.*'roc_auc'.*torchmetrics.Metric"),
        (["zzz"], ValueError, "'zzz' is unknown; the names are"),
        (["f1", "f1_score"], ValueError, "'f1_score' is given twice"),
        ([MeanSquaredError(), MeanSquaredError()], ValueError, "given twice; use a mapping"),
        ({"loss": MeanSquaredError()}, ValueError, "cannot be called 'loss'"),
        ({"": MeanSquaredError()}, ValueError, "cannot be called ''"),
        ({1: MeanSquaredError()}, ValueError, "cannot be called 1"),
        ([MulticlassF1Score(3, average=None)], ValueError, "one value per class"),
        ("accuracy", TypeError, "must be a list"),
        (MeanSquaredError(), TypeError, "must be a list"),
        (None, TypeError, "must be a list"),
        ([3], TypeError, "got 3"),
        ([MeanSquaredError], TypeError, "must be an instance of torchmetrics.Metric or a name"),
        ([MetricCollection([MeanSquaredError()])], TypeError, "must be an instance"),
        ({"a": "accuracy"}, TypeError, "must be an instance of torchmetrics.Metric, got 'accuracy'"),
    ],
)
def test_unusable_metrics_are_refused_before_the_run(
    metrics: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_metrics(metrics)


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        ({"train": ["acc"], "valid": ["acc"]}, ValueError, 'its keys are "train" and "val"; got \'valid\''),
        ({"val": ["acc"], "train": "acc"}, TypeError, r"metrics\['train'\] must be a list"),
        ({"val": ["acc"], "train": MeanSquaredError()}, TypeError, r"metrics\['train'\] must be a list"),
    ],
)
def test_metrics_by_data_set_are_checked(metrics: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        metrics_for("val", metrics)


def test_each_data_set_may_have_metrics_of_its_own() -> None:
    error = MeanSquaredError()
    named: MetricSpec = {"train": error}
    metrics: RunMetrics = {"train": ["acc"], "val": named}
    assert metrics_for("train", metrics) == ["acc"]
    assert metrics_for("val", metrics) == named
    assert metrics_for("train", {"val": ["acc"]}) == ()
    assert metrics_for("val", named) == named  # one metric, which is called train
    assert metric_direction("val_train", metrics) == "min"


def test_direction_by_name() -> None:
    smaller = "train_loss loss val_rmse val_perplexity val_focal_loss val_dice_loss val_top5_error".split()
    larger = "val_accuracy val_f1 val_roc_auc val_r2 val_my_dice val/accuracy val_Accuracy".split()
    directions = dict.fromkeys(smaller, "min") | dict.fromkeys(larger, "max")
    assert {key: metric_direction(key) for key in directions} == directions
    assert {metric_direction(key) for key in ("lr", "val_score", "")} == {None}


def test_direction_of_a_metric_object_comes_first() -> None:
    assert metric_direction("val_accuracy", {"accuracy": MeanSquaredError()}) == "min"
    assert metric_direction("val_binary_f1_score", [BinaryF1Score()]) == "max"
    assert metric_direction("val_mean_metric", [MeanMetric()]) is None


def test_empty_pass_gives_no_key() -> None:
    metrics = MetricSet(["accuracy", "mse", MeanSquaredError()], prefix="val_", device=CPU)
    metrics.update(torch.randn(0), torch.randn(0))
    assert metrics.compute() == {}


def test_reset_starts_the_next_pass_from_nothing() -> None:
    metrics = MetricSet(["accuracy", "mse"], prefix="val_", device=CPU)
    for wanted, output in ((0.0, -5.0), (1.0, 5.0)):
        metrics.reset()
        metrics.update(torch.tensor([output, output]), torch.tensor([1.0, 1.0]))
        assert metrics.compute()["val_accuracy"] == wanted
    metrics.reset()
    assert metrics.compute() == {}


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.randn(12, 6), torch.randint(0, 6, (12,))),
        (torch.randn(12), torch.randint(0, 2, (12,))),
        (torch.randn(12, 3), torch.randint(0, 2, (12, 3))),
    ],
)
def test_pass_goes_on_from_its_state_bit_for_bit(outputs: Tensor, targets: Tensor) -> None:
    is_multiclass = targets.shape != outputs.shape
    names = ["accuracy", "f1", "roc_auc", *([] if is_multiclass else COMPARED)]
    wrapped = ClasswiseWrapper(MulticlassF1Score(6, average=None))
    own: list[Metric] = [wrapped] if is_multiclass else [MeanSquaredError(), BinaryAUROC()]
    first = MetricSet([*names, *own], prefix="", device=CPU)
    first.update(outputs[:5], targets[:5])
    state = first.state_dict()
    second = MetricSet([*names, *own], prefix="", device=CPU)
    second.update(outputs[7:], targets[7:])  # what loading must forget
    second.load_state_dict(state)
    for metrics in (first, second):
        metrics.update(outputs[5:], targets[5:])
    assert second.compute() == first.compute()
    third = MetricSet([*names, *own], prefix="", device=CPU)  # the state itself has not moved
    third.load_state_dict(state)
    third.update(outputs[5:], targets[5:])
    assert third.compute() == first.compute()


def test_state_of_an_unstarted_pass_can_be_loaded() -> None:
    first, second = (MetricSet(["accuracy"], prefix="", device=CPU) for _ in range(2))
    first.load_state_dict(second.state_dict())
    first.update(torch.eye(2), torch.tensor([0, 1]))
    assert first.compute() == {"accuracy": 1.0}


def test_metrics_that_the_state_lacks_count_from_there_and_the_others_go_on() -> None:
    outputs, targets = torch.randn(12, 2), torch.randint(0, 2, (12, 2))

    def made(names: list[Any], *parts: slice) -> dict[str, float]:
        metrics = MetricSet(names, prefix="", device=CPU)
        for part in parts:
            metrics.update(outputs[part], targets[part])
        return metrics.compute()

    first = MetricSet(["f1", "accuracy", MeanSquaredError()], prefix="", device=CPU)
    first.update(outputs[:5], targets[:5])
    second = MetricSet(["accuracy", "recall", "f1", BinaryAUROC()], prefix="", device=CPU)
    assert second.load_state_dict(first.state_dict()) == ["recall", "binary_auroc"]
    assert [name for name, value in second.compute().items() if value != value] == ["recall", "binary_auroc"]
    third = MetricSet(["recall", "f1", "precision"], prefix="", device=CPU)
    second.update(outputs[5:8], targets[5:8])
    assert third.load_state_dict(second.state_dict()) == [
        "precision"
    ]  # the state of a pass that was continued
    for metrics in (second, third):
        metrics.update(outputs[8:], targets[8:])
    whole, rest = (slice(0, 5), slice(5, 8), slice(8, 12)), (slice(5, 8), slice(8, 12))
    assert {key: second.compute()[key] for key in ("accuracy", "f1_score")} == made(
        ["accuracy", "f1"], *whole
    )
    assert {key: second.compute()[key] for key in ("recall",)} == made(["recall"], *rest)
    assert third.compute() == {
        **made(["f1"], *whole),
        **made(["recall"], *rest),
        **made(["precision"], slice(8, 12)),
    }
    for metrics, names in ((second, ["accuracy", "recall", "f1"]), (third, ["recall", "f1", "precision"])):
        metrics.reset()  # the next pass is a whole one for all of them
        metrics.update(outputs[:5], targets[:5])
        expected = made(names, slice(0, 5))
        assert {key: metrics.compute()[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("other", "new"),
    [
        (["f1"], ["f1_score"]),
        ({"a": MeanSquaredError()}, ["a"]),
        (["mse", "r2"], ["mse"]),
        (["r2", "f1"], ["r2", "f1_score"]),  # of another task: what r2 had counted is left out
    ],
)
def test_metrics_of_another_task_or_kind_begin_anew(other: Any, new: list[str]) -> None:
    first = MetricSet({"a": R2Score()} if isinstance(other, dict) else ["r2"], prefix="", device=CPU)
    first.update(torch.randn(8), torch.randn(8))
    second = MetricSet(other, prefix="", device=CPU)
    assert second.load_state_dict(first.state_dict()) == new
    second.update(torch.randn(8), torch.randint(0, 2, (8,)).float())
    assert set(second.compute()) == set(second.names)


def test_inference_mode_may_come_and_go() -> None:
    """A set made, reset or restored in inference mode can be updated outside, and the reverse."""
    names = [*COUNTED, *COMPARED, "roc_auc"]
    outputs, targets = torch.randn(8), torch.arange(8) % 2
    with torch.inference_mode():
        metrics = MetricSet(names, prefix="", device=CPU)
        metrics.update(outputs, targets)
        metrics.load_state_dict(metrics.state_dict())
    metrics.update(outputs, targets)
    whole = metrics.compute()
    with torch.inference_mode():
        metrics.reset()
        metrics.update(outputs, targets)
    metrics.update(outputs, targets)
    assert metrics.compute() == whole


def test_nothing_of_the_graph_or_of_the_callers_memory_is_kept() -> None:
    metrics = MetricSet(["roc_auc", "mse"], prefix="", device=CPU)
    outputs = torch.randn(4, requires_grad=True)
    targets = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    metrics.update(outputs * 1.0, targets)
    before = metrics.compute()
    with torch.no_grad():
        outputs.zero_()
        targets.zero_()
    metrics.update(torch.zeros(0), torch.zeros(0))
    assert metrics.compute() == before
    states = [state for sums in metrics.state_dict()["sums"] for state in sums.values()]
    tensors = [t for state in states for t in (state if isinstance(state, list) else [state])]
    assert not any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


# Operators whose result, or its size, the host reads back from a CUDA device: `index` with a mask (nothing here
# may index with a tensor), and `lift_fresh` for torch.tensor(number, device=...), a copy that is waited for.
WAITING = (
    "_local_scalar_dense _unique2 bincount equal index is_nonzero lift_fresh masked_select nonzero unique_dim"
)


class NoWaiting(TorchDispatchMode):
    """Refuse what makes the host wait, so that a machine without a GPU can test for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITING.split():
            raise AssertionError(f"{func._schema.name} waits for the device")
        return func(*args, **(kwargs or {}))


def no_waiting() -> AbstractContextManager[object]:
    return NoWaiting()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def multiclass(B: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 6, requires_grad=True), torch.randint(0, 6, (B,))


def binary(B: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B), torch.randint(0, 2, (B,)).float()


def multilabel(B: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 3).bfloat16(), torch.randint(0, 2, (B, 3))


@pytest.mark.parametrize(
    ("names", "batch"),
    [
        ([*COUNTED, "roc_auc"], multiclass),
        ([*COUNTED, *COMPARED, "roc_auc"], binary),
        ([*COUNTED, *COMPARED, "roc_auc"], multilabel),
    ],
)
def test_update_never_waits_for_the_device_after_the_first_batch(
    names: list[str], batch: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    metrics = MetricSet(names, prefix="", device=CPU)
    metrics.update(*batch(4))
    later = [batch(B) for B in (4, 4, 3)]
    with no_waiting():
        for outputs, targets in later:
            metrics.update(outputs, targets)
        metrics.state_dict()
        metrics.reset()
        for outputs, targets in later:
            metrics.update(outputs, targets)
    assert len(metrics.compute()) == len(names)


def test_the_check_for_waiting_finds_it() -> None:
    by_hand = MulticlassF1Score(6, validate_args=False)
    with pytest.raises(AssertionError, match="bincount"), no_waiting():
        by_hand.update(*multiclass(4))
    with pytest.raises(AssertionError, match="lift_fresh"), no_waiting():
        MultilabelExactMatch(3, validate_args=False).update(torch.ones(4, 3).long(), torch.ones(4, 3).long())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), no_waiting():
        torch.ones(()).item()


def test_a_metric_that_cannot_judge_a_batch_says_which_and_what_it_was_given() -> None:
    metrics = MetricSet([MulticlassAccuracy(num_classes=2)], prefix="val_", device=CPU)
    with pytest.raises(ValueError, match="number of classes") as caught:
        metrics.update(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert caught.value.__notes__ == [
        "offloop: metric 'multiclass_accuracy', a MulticlassAccuracy, was given outputs (4, 3) torch.float32, "
        "targets (4,) torch.int64"
    ]


# In a run: what steps return ----------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "total"), [(90, 100), (95, 100), (7, 10), (1, 3)])
@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_accuracy_is_the_very_number_that_python_divides(right: int, total: int, task: str) -> None:
    hits = torch.tensor([1.0] * right + [-1.0] * (total - right))
    outputs, targets = hits, torch.ones(total).long()
    if task == "multiclass":
        outputs = torch.stack([-hits, hits], dim=1)
    elif task == "multilabel":
        outputs, targets = torch.stack([hits, torch.ones(total)], dim=1), torch.ones(total, 2).long()
    assert metrics_of(["accuracy"], outputs, targets)["accuracy"] == right / total


def one_hot_batches() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    inputs, classes = (torch.cat(parts) for parts in zip(*tiny_batches(8), strict=True))
    shares = one_hot(classes, 3).float()
    return classes, list(zip(inputs.split(4), shares.split(4), strict=True))


@pytest.mark.parametrize("softness", [0.0, 0.3])
@pytest.mark.parametrize(
    "loss", [cross_entropy, nn.CrossEntropyLoss(), functools.partial(cross_entropy, label_smoothing=0.1)]
)
def test_shares_of_classes_are_classes_where_the_loss_takes_them_so(loss: Any, softness: float) -> None:
    classes, batches = one_hot_batches()
    soft = [(inputs, (1 - softness) * shares + softness / 3) for inputs, shares in batches]
    trainer = tiny_trainer(loss=loss)
    predicted = torch.cat(trainer.predict(soft)).argmax(1)
    made = trainer.evaluate(soft, metrics=["accuracy", "f1_score", "mse"])
    expected = by_sklearn(classes, predicted)
    assert (made["val_accuracy"], made["val_f1_score"]) == pytest.approx(
        (expected["accuracy"], expected["f1_score"])
    )
    assert made["val_mse"] > 0


def test_one_hot_targets_of_another_loss_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    _, batches = one_hot_batches()
    tiny_trainer(loss=nn.functional.mse_loss).evaluate(batches, metrics=["accuracy"])
    (text,) = caplog.messages
    assert text.startswith("metrics 'accuracy': each target of the first batch has one of 3 labels")
    assert "return targets.argmax(1)" in text


def test_labels_are_labels_where_the_loss_takes_them_so(caplog: pytest.LogCaptureFixture) -> None:
    _, batches = one_hot_batches()
    trainer = tiny_trainer(loss=nn.BCEWithLogitsLoss())
    said = torch.cat(trainer.predict(batches)) > 0
    truths = torch.cat([shares for _, shares in batches]) > 0
    made = trainer.evaluate(batches, metrics=["accuracy"])
    assert made["val_accuracy"] == (said == truths).all(1).double().mean().item()
    assert caplog.messages == []


class Outputs(OrderedDict[str, Any]):
    """Like those of Hugging Face models: attributes too, and no `update()`."""

    def update(self, *arguments: Any, **values: Any) -> None:
        raise Exception("You cannot use ``update`` on these.")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclasses.dataclass
class Record:
    logits: Tensor
    hidden: Tensor


class Wrapped(nn.Module):
    """A model whose outputs are `wrap(logits)`."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = tiny_model(), wrap

    def forward(self, inputs: Tensor) -> Any:
        return self.wrap(self.inner(inputs))


WITH_LOGITS: dict[str, Callable[[Tensor], Any]] = {
    "a mapping": lambda logits: {"hidden": logits[:0], "logits": logits},
    "a model output": lambda logits: Outputs(logits=logits),
    "a dataclass": lambda logits: Record(logits, logits[:0]),
}


def wrapped_trainer(wrap: Callable[[Tensor], Any], loss: Callable[[Any, Tensor], Tensor]) -> Trainer:
    model = Wrapped(wrap)
    return tiny_trainer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), loss=loss)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_outputs_that_hold_logits_are_judged_by_them(name: str) -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs.logits, targets)

    batches = tiny_batches(4)
    made = wrapped_trainer(WITH_LOGITS[name], loss).train(batches, batches, epochs=1, metrics=["accuracy"])
    expected = tiny_trainer().train(batches, batches, epochs=1, metrics=["accuracy"])
    assert made.metrics["val_accuracy"] == expected.metrics["val_accuracy"]


@pytest.mark.parametrize(
    "wrap", [lambda logits: (logits, logits), lambda logits: [logits], lambda logits: {0: logits}]
)
def test_outputs_that_are_no_tensor_are_refused_in_the_first_step_with_what_to_return(
    wrap: Callable[[Tensor], Any],
) -> None:
    trainer = wrapped_trainer(wrap, lambda outputs, targets: cross_entropy(outputs[0], targets))
    with pytest.raises(
        ValueError, match=r"metrics 'accuracy' need a tensor of outputs, got a .* return \{'loss'"
    ):
        trainer.train(tiny_batches(1), epochs=1, metrics=["accuracy"])


class Longest(Metric):
    """Takes lists of mappings, as metrics of detection do."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("longest", torch.tensor(0))

    def update(self, outputs: list[dict[str, Tensor]], targets: list[str]) -> None:
        assert not any(each["boxes"].requires_grad for each in outputs)
        self.longest = torch.tensor(max(len(each["boxes"]) for each in outputs))

    def compute(self) -> Tensor:
        return self.longest


def test_a_users_metric_is_given_whatever_the_step_returns() -> None:
    class Detection(Trainer):
        def training_step(self, batch: Any) -> Any:
            outputs = self.model(batch[0])
            boxes = [{"boxes": each.expand(number + 1, 3)} for number, each in enumerate(outputs)]
            return {"loss": outputs.sum(), "outputs": boxes, "targets": ["a"] * len(boxes)}

    batches = tiny_batches(2)
    made = tiny_trainer(Detection).train(batches, batches, epochs=1, metrics=[Longest()]).metrics
    assert (made["train_longest"], made["val_longest"]) == (4, 4)


class LossOnly(Trainer):
    def training_step(self, batch: Any) -> Any:
        return cross_entropy(self.model(batch[0]), batch[1])


class LossOnlyInTraining(LossOnly):
    def validation_step(self, batch: Any) -> Any:
        return Trainer.training_step(self, batch)


def test_metrics_of_a_step_that_returns_only_its_loss_are_refused_in_the_first_step() -> None:
    batches = tiny_batches(1)
    text = r"metrics 'accuracy' need outputs and targets: return \{'loss': loss, .*\} from training_step"
    with pytest.raises(ValueError, match=text):
        tiny_trainer(LossOnly).train(batches, epochs=1, metrics=["accuracy"])
    with pytest.raises(ValueError, match="from validation_step"):
        tiny_trainer(LossOnly).evaluate(batches, metrics=["accuracy"])
    made = (
        tiny_trainer(LossOnlyInTraining)
        .train(batches, batches, epochs=1, metrics={"val": ["accuracy"]})
        .metrics
    )
    assert "val_accuracy" in made and "train_accuracy" not in made


# Tokens -------------------------------------------------------------------------------------------------

WORDS = 7
TEXTS = torch.randint(WORDS, (6, 9), generator=generator(3))


class LanguageModel(nn.Module):
    """Makes its own loss of the tokens, shifted or not, plain or otherwise."""

    def __init__(self, *, shifts: bool, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.shifts, self.weight = shifts, weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.body(input_ids))
        pairs = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        return Outputs(
            loss=self.weight * cross_entropy(pairs[0].flatten(0, 1), pairs[1].flatten()), logits=logits
        )


def labels_of(texts: Tensor, kind: str) -> Tensor:
    labels = texts.clone()
    if kind == "others":
        labels = (texts * 3 + 1) % WORDS
    elif kind == "without the prompt":
        labels[:, :4] = -100
    return labels


@pytest.mark.parametrize(
    ("shifts", "weight", "kind"),
    [
        (True, 1.0, "the same"),
        (True, 1.0, "without the prompt"),
        (True, 3.0, "without the prompt"),  # another loss: the labels are the inputs
        (False, 1.0, "the same"),
        (False, 1.0, "others"),
        (False, 3.0, "others"),
    ],
)
def test_accuracy_is_that_of_the_tokens_that_the_loss_is_about(
    shifts: bool, weight: float, kind: str
) -> None:
    model = LanguageModel(shifts=shifts, weight=weight)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    batches = [{"input_ids": part, "labels": labels_of(part, kind)} for part in TEXTS.split(2)]
    made = trainer.evaluate(batches, metrics=["accuracy"])
    said = model(TEXTS, TEXTS).logits.argmax(2)
    labels = labels_of(TEXTS, kind)
    if shifts:
        said, labels = said[:, :-1], labels[:, 1:]
    assert made["val_accuracy"] == (said == labels)[labels >= 0].double().mean().item()
    trained = trainer.train(batches, epochs=1, metrics=["accuracy"])
    assert "train_accuracy" in trained.metrics
