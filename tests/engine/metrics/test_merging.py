"""engine/metrics/merging.py: the metrics of several ranks against one process with all of their batches."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torchmetrics import CatMetric, ClasswiseWrapper, MaxMetric, MeanMetric, Metric, MinMaxMetric
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.regression import (
    CosineSimilarity,
    MeanSquaredError,
    PearsonCorrCoef,
    R2Score,
)
from torchmetrics.wrappers import Running

from offloop.engine.errors import ConfigError
from offloop.engine.metrics.merging import check_mergeable, merged
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.metrics.names import MetricSpec

# Small batches often lack a class
pytestmark = pytest.mark.filterwarnings("error", "ignore:No (positive|negative) samples in targets")

CPU = torch.device("cpu")
COUNTED = ["accuracy", "precision", "recall", "f1_score"]
COMPARED = ["mse", "rmse", "mae", "r2"]

Batch = tuple[Any, Any]
Batches = list[Batch]


def metric_set(metrics: MetricSpec, batches: Sequence[Batch]) -> MetricSet:
    result = MetricSet(metrics, prefix="val_", device=CPU)
    for batch in batches:
        result.update(*batch)
    return result


def dumped(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def sent(state: Any) -> Any:
    """A state as another process gets it."""
    return torch.load(io.BytesIO(dumped(state)), weights_only=False)


def on_ranks(metrics: MetricSpec, shares: Sequence[Sequence[Batch]]) -> list[dict[str, float]]:
    """What each rank computes, when its share has the batches of `shares[rank]`."""
    sets = [metric_set(metrics, share) for share in shares]
    before = [dumped(each.state_dict()) for each in sets]
    states = [sent(each.state_dict()) for each in sets]
    found = [merged(each, states).compute() for each in sets]
    assert [dumped(each.state_dict()) for each in sets] == before
    return found


def in_turn(batches: Sequence[Batch], ranks: int) -> list[Sequence[Batch]]:
    return [batches[rank::ranks] for rank in range(ranks)]


def compare(metrics: MetricSpec, batches: Sequence[Batch], ranks: int) -> None:
    """Compare ranks that take batches in turn with one process."""
    alone = metric_set(metrics, batches).compute()
    for found in on_ranks(metrics, in_turn(batches, ranks)):
        assert list(found) == list(alone)
        assert found == pytest.approx(alone, abs=1e-6, nan_ok=True)
        counted = [key for key in alone if key.removeprefix("val_") in COUNTED]
        assert [found[key] for key in counted] == [alone[key] for key in counted]


def multiclass(g: torch.Generator, size: int) -> Batch:
    return torch.randn(size, 5, generator=g), torch.randint(0, 5, (size,), generator=g)


def binary(g: torch.Generator, size: int) -> Batch:
    return torch.randn(size, generator=g), torch.randint(0, 2, (size,), generator=g).float()


def multilabel(g: torch.Generator, size: int) -> Batch:
    return torch.randn(size, 3, generator=g), torch.randint(0, 2, (size, 3), generator=g)


def numbers(g: torch.Generator, size: int) -> Batch:
    return torch.randn(size, 2, generator=g), torch.randn(size, 2, generator=g)


def batches_of(task: Callable[[torch.Generator, int], Batch], sizes: Sequence[int], seed: int = 0) -> Batches:
    g = torch.Generator().manual_seed(seed)
    return [task(g, size) for size in sizes]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    ranks=st.integers(1, 9),
    task=st.sampled_from([multiclass, binary, multilabel, numbers]),
    seed=st.integers(0, 99),
)
def test_named_metrics_are_those_of_one_process_whatever_the_shares(
    sizes: list[int], ranks: int, task: Callable[[torch.Generator, int], Batch], seed: int
) -> None:
    """Uneven ones, and ranks without a batch, included."""
    counted = [] if task is numbers else [*COUNTED, "roc_auc"]
    compared = [] if task is multiclass else COMPARED
    compare([*counted, *compared], batches_of(task, sizes, seed), ranks)


def test_one_rank_may_hold_probabilities_only_where_the_pass_has_logits() -> None:
    batches = [
        (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 1, 1])),
        (torch.tensor([-3.0, 5.0, 0.4]), torch.tensor([0, 1, 0])),
    ]
    compare(["accuracy", "f1"], batches, 2)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (2, 7, 4)])
def test_ranks_may_see_different_numbers_of_classes(sizes: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(9, size, generator=g), torch.randint(size, (9,), generator=g)) for size in sizes]
    compare(COUNTED, batches, len(sizes))
    compare(COUNTED, batches, 2)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        (multiclass, [MulticlassAccuracy(5), MulticlassAUROC(5), MulticlassF1Score(5)]),
        (multiclass, {"by_class": ClasswiseWrapper(MulticlassF1Score(5, average=None))}),
        (binary, [BinaryAUROC(), MeanSquaredError()]),
        (numbers, [CosineSimilarity()]),
        (
            binary,
            [
                R2Score(),
                PearsonCorrCoef(),
                PeakSignalNoiseRatio((0.0, 2.0)),
            ],
        ),
        (binary, {"auc_on_the_host": BinaryAUROC(compute_on_cpu=True), "auc": BinaryAUROC(thresholds=9)}),
    ],
)
def test_metrics_of_torchmetrics_are_those_of_one_process(
    task: Callable[[torch.Generator, int], Batch], metrics: Any, ranks: int
) -> None:
    compare(metrics, batches_of(task, [6, 8, 5, 7, 3]), ranks)


def test_a_mean_weighs_by_batches() -> None:
    """torchmetrics' own weighs all ranks the same."""

    class MeanOfBatches(Metric):
        value: Tensor
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")
            self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.value = (self.value * self.seen + outputs.mean()) / (self.seen + 1)
            self.seen = self.seen + 1

        def compute(self) -> Tensor:
            return self.value

    compare([MeanOfBatches()], batches_of(binary, [4, 4, 4, 4, 4]), 3)


class Longest(Metric):
    """Takes lists; keeps a maximum, a list, and what a function reduces."""

    longest: Tensor
    shortest: Tensor
    lengths: list[Tensor]
    starts: list[Tensor]
    product: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("longest", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("shortest", torch.tensor(99), dist_reduce_fx="min")
        self.add_state("lengths", [], dist_reduce_fx="cat")
        self.add_state("starts", [], dist_reduce_fx=None)
        self.add_state("product", torch.tensor(1.0), dist_reduce_fx=lambda stacked: stacked.prod(0))

    def update(self, outputs: list[str], targets: Any) -> None:
        lengths = torch.tensor([len(word) for word in outputs])
        self.longest = torch.maximum(self.longest, lengths.max())
        self.shortest = torch.minimum(self.shortest, lengths.min())
        self.lengths.append(lengths)
        self.starts.extend(torch.tensor(ord(word[0])) for word in outputs)
        self.product = self.product * len(outputs)

    def compute(self) -> dict[str, Any]:
        return {
            "longest": self.longest,
            "shortest": self.shortest,
            "mean": torch.cat(self.lengths).double().mean(),
            "starts": len({int(start) for start in self.starts}),
            "product": self.product,
        }


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_users_metric_is_merged_by_its_reductions(ranks: int) -> None:
    words = [["a", "bcd"], ["ab"], ["abcde", "a", "ab"], ["xyz", "bcd"]]
    compare([Longest()], [(each, None) for each in words], ranks)


def test_a_rank_without_a_batch_computes_what_the_others_do() -> None:
    batches = batches_of(multiclass, [6, 4])
    found = on_ranks([*COUNTED, "roc_auc", MulticlassAUROC(5)], [[], batches, []])
    assert (
        found[0]
        == found[1]
        == found[2]
        == metric_set([*COUNTED, "roc_auc", MulticlassAUROC(5)], batches).compute()
    )


def test_a_rank_without_a_batch_in_this_pass_keeps_nothing_of_the_pass_before() -> None:
    first, second = (
        metric_set(["accuracy", BinaryAUROC()], batches_of(binary, [5], seed)) for seed in (1, 2)
    )
    first.reset()
    found = merged(first, [first.state_dict(), second.state_dict()]).compute()
    assert found == second.compute()


def test_no_rank_with_a_batch_gives_no_key() -> None:
    assert on_ranks(["accuracy", BinaryAUROC()], [[], []]) == [{}, {}]


def test_the_pass_goes_on_after_a_merge() -> None:
    one, two = batches_of(binary, [5, 4]), batches_of(binary, [3, 6], 1)
    sets = [metric_set(["accuracy", "roc_auc", BinaryAUROC()], [part[0]]) for part in (one, two)]
    merged(sets[0], [each.state_dict() for each in sets])
    for each, part in zip(sets, (one, two), strict=True):
        each.update(*part[1])
    found = merged(sets[0], [each.state_dict() for each in sets]).compute()
    assert found == pytest.approx(metric_set(["accuracy", "roc_auc", BinaryAUROC()], [*one, *two]).compute())


def test_ranks_that_resumed_with_a_new_metric_join_it_where_they_have_a_batch() -> None:
    """One had no batch before: its names share their sums. One has none after it: its new metrics are unfed."""
    old, new = batches_of(binary, [5, 4]), batches_of(binary, [6], 1)

    def resumed(before: Batches, after: Batches) -> MetricSet:
        result = MetricSet(["accuracy", "recall", BinaryAUROC()], prefix="val_", device=CPU)
        result.load_state_dict(sent(metric_set(["accuracy"], before).state_dict()))
        for batch in after:
            result.update(*batch)
        return result

    whole = metric_set(["accuracy"], [*old, *new]).compute()
    late = metric_set(["recall", BinaryAUROC()], new).compute()
    for shares in ([(old[:1], new), (old[1:], [])], [([], new), (old, [])], [(old, []), ([], new)]):
        sets = [resumed(*share) for share in shares]
        for each in sets:
            assert merged(each, [sent(other.state_dict()) for other in sets]).compute() == whole | late
    unfed = [resumed(old, []), resumed(old, [])]
    found = merged(unfed[0], [each.state_dict() for each in unfed]).compute()
    assert [key for key, value in found.items() if value != value] == ["val_recall", "val_binary_auroc"]
    again = MetricSet(["accuracy", "recall", BinaryAUROC()], prefix="val_", device=CPU)
    again.load_state_dict(unfed[0].state_dict())
    assert [key for key, value in again.compute().items() if value != value] == [
        "val_recall",
        "val_binary_auroc",
    ]


def test_ranks_with_different_tasks_say_which_rank_has_which() -> None:
    batches = [batches_of(multiclass, [4])[0], batches_of(binary, [4])[0]]
    with pytest.raises(ValueError, match=r"rank 0: multiclass with 5 classes; rank 1: binary"):
        on_ranks(["accuracy"], [[batches[0]], [batches[1]]])
    with pytest.raises(
        ValueError, match=r"rank 0: multiclass with 5 classes; rank 2: multiclass with 3 classes"
    ):
        on_ranks(["roc_auc"], [[batches[0]], [], [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))]])


def test_ranks_with_different_metrics_say_so() -> None:
    sets = [metric_set([name], batches_of(binary, [4])) for name in ("accuracy", "recall")]
    with pytest.raises(
        ValueError, match=r"the metrics differ between ranks: rank 0: accuracy.*rank 1: recall"
    ):
        merged(sets[0], [each.state_dict() for each in sets])


# What cannot be merged ---------------------------------------------------------------------------------------


class Total(Metric):
    """Leaves out how its state is reduced."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total = self.total + outputs.sum()

    def compute(self) -> Tensor:
        return self.total


class Count(Metric):
    """Counts in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.count += len(outputs)

    def compute(self) -> Tensor:
        return torch.tensor(self.count)


class Odd(Metric):
    """Has a reduction that fails."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx=lambda stacked: stacked[7])

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total = self.total + outputs.sum()

    def compute(self) -> Tensor:
        return self.total


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (Total(), "metric 'own', a Total, cannot be merged .* its state 'total' .* dist_reduce_fx"),
        (ClasswiseWrapper(Total()), "metric 'own', a ClasswiseWrapper, .* its state 'total'"),
        (Running(MeanMetric(), window=3), "metric 'own', a Running, cannot be merged .* its window"),
        (MinMaxMetric(BinaryAUROC()), "metric 'own', a MinMaxMetric, cannot be merged .* earlier passes"),
    ],
)
def test_metrics_that_cannot_be_merged_are_refused_before_the_run(metric: Metric, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_mergeable(metric_set({"own": metric}, []))
    check_mergeable(
        metric_set(["accuracy", BinaryAUROC(), CatMetric(), MaxMetric(), MulticlassConfusionMatrix(3)], [])
    )


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (Total(), "metric 'own', a Total, cannot be merged"),
        (Count(), "metric 'own', a Count, cannot be merged .* changes self.count, which is no state"),
        (Odd(), "metric 'own', a Odd: its state 'total' cannot be merged .*IndexError.*dist_reduce_fx"),
    ],
)
def test_metrics_that_cannot_be_merged_are_refused_in_the_first_merge(metric: Metric, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        on_ranks({"own": metric}, in_turn(batches_of(binary, [4, 4]), 2))


# In a process group ------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A group, and the collectives that were called."""
    called: list[str] = []
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for name in ("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast"):
            monkeypatch.setattr(dist, name, lambda *_, name=name, **__: called.append(name))
        yield called
    finally:
        dist.destroy_process_group()


def test_nothing_synchronises_itself_in_a_process_group(process_group: list[str]) -> None:
    metrics: list[Any] = [*COUNTED, *COMPARED, "roc_auc", BinaryAUROC(), PearsonCorrCoef()]
    compare(metrics, batches_of(binary, [5, 4, 3]), 2)
    compare(
        [*COUNTED, ClasswiseWrapper(MulticlassF1Score(5, average=None))], batches_of(multiclass, [5, 4]), 2
    )
    assert process_group == []
