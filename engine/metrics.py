"""Named metrics over one whole pass of a data set, computed by torchmetrics.

Per batch only sums are kept, on the device; the arithmetic that turns the sums of a pass into a
number is torchmetrics' own. The counting is done here for two reasons: torchmetrics counts classes
with `torch.bincount`, which makes the host wait for a CUDA device on every batch, and it decides
batch by batch whether outputs are probabilities. One count also serves all names that need it:
accuracy, precision, recall and F1 together cost as much as one of them.

What a name means: the scikit-learn call it equals, on the concatenated data set and with
`zero_division=0`. Aliases in brackets; scikit-learn's function names are aliases, too.

    accuracy (acc)           accuracy_score; with several labels per sample, all must be right
    top5_accuracy (top5)     top_k_accuracy_score(k=5); needs at least 5 classes
    precision, recall        precision_score, recall_score with average="macro"
    f1_score (f1)            f1_score(average="macro")
    iou (jaccard)            jaccard_score(average="macro")
    hamming_loss             hamming_loss, the share of wrong labels
    cohen_kappa (kappa)      cohen_kappa_score; not for several labels per sample
    roc_auc (auroc, auc)     roc_auc_score(average="macro", multi_class="ovr")
    mse, rmse, mae, r2       mean_squared_error, its root, mean_absolute_error, r2_score

Macro is the mean over the classes, in binary tasks too (of "no" and "yes"); the score of "yes"
alone is `torchmetrics.classification.BinaryF1Score()`.
`roc_auc` leaves out classes and labels without a positive or without a negative sample, where
scikit-learn raises or returns NaN, and is NaN when none is left. **It keeps every output and target
of the pass on the device**: 1 million samples of 1000 classes take 4 GB.
`mse` to `r2` compare outputs and targets of one shape, where (B, 1) and (B,) are the same, and sum
in float64. `mse`, `rmse` and `mae` are means over all numbers; `r2` is the mean over the D columns
of (B, D), what is behind the first dimension being flattened.

The task of the other names is read off the first batch of a run, and stays:

    outputs (floats)     targets                                               task
    (B, C, ...), C >= 2  (B, ...), integers                                    multiclass
    (B,) or (B, 1, ...)  0 or 1 in any dtype; same shape, or without the 1     binary
    (B, L, ...), L >= 2  0 or 1 in any dtype; same shape                       multilabel

(B, ..., C) is understood where (B, C, ...) does not fit. Positions behind the class dimension
(pixels, tokens) count as samples. Negative class indices are not counted, like the -100 of
`cross_entropy`. Only the first batch's values are checked: looking means waiting for the device.

Logits or probabilities? For the largest of C outputs it does not matter. A yes-or-no output means
"yes" above 0.5 if all outputs *of the pass* lie in [0, 1], and above 0 if one does not: what
torchmetrics would say of the whole pass in one call, whatever the batch size. In `roc_auc`, outputs
of several classes are probabilities if they lie in [0, 1] and sum to one in every sample of the
pass; else softmax is applied.

Legend: B = batch, C = classes, L = labels (1 in a binary task), N = samples (B times positions),
D = numbers per sample.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
import torchmetrics
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCohenKappa,
    MulticlassF1Score,
    MulticlassHammingDistance,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelHammingDistance,
    MultilabelJaccardIndex,
    MultilabelPrecision,
    MultilabelRecall,
)
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.wrappers.abstract import WrapperMetric

Metrics: TypeAlias = Sequence[str | Metric] | Mapping[str, Metric]
"""What `metrics=` takes: names and instances, or a mapping that names the instances."""

_Task: TypeAlias = Literal["binary", "multiclass", "multilabel", "regression"]
_States: TypeAlias = dict[str, Tensor]
_Prepare: TypeAlias = "Callable[[Tensor, Tensor, _Problem], tuple[Tensor, Tensor]]"

_OWN = "own:"  # marks the keys of users' metrics among the accumulators
_SUM_TOLERANCE = 1e-2  # bfloat16 probabilities of one sample sum to one within about this


@dataclass(frozen=True, slots=True)
class _Problem:
    """What outputs and targets mean, for the names that need to know."""

    task: _Task
    size: int
    """Classes (2 of a binary task) or labels (of a multilabel one)."""
    class_dim: int = 1
    """The dimension of a multiclass task's outputs that holds the classes: 1 or -1."""

    def __str__(self) -> str:
        unit = "labels" if self.task == "multilabel" else "classes"
        return f"{self.task} task of {self.size} {unit}"


_COMPARISON = _Problem("regression", 1)


class MetricSet:
    """The metrics of one data set (train or validation), added up batch by batch.

    A user's metric is cloned, so the object that was passed in never changes, and named by its
    class in snake case (`MulticlassF1Score` -> `multiclass_f1_score`) or by the mapping's key.
    It gets the same outputs and targets as the names do, and is used as it is: with its default
    `validate_args=True` most of torchmetrics waits for a CUDA device on each batch.

    Thread: one at a time; the training thread's. Only `compute` and the first `update` block.
    """

    names: tuple[str, ...]
    """The keys without prefix, aliases resolved, in the order given; known before any batch."""

    def __init__(self, metrics: Metrics, *, prefix: str, device: torch.device) -> None:
        """Prepare an empty pass.

        Args:
            metrics: Names from the table above, `torchmetrics.Metric` instances, or a mapping from
                key to instance.
            prefix: Put before each key by `compute`: `"train_"` or `"val_"`.
            device: Where outputs and targets are; the sums are kept there.

        Raises:
            ValueError: As `check_metrics`.
            TypeError: As `check_metrics`.
        """
        chosen = _chosen(metrics)
        self.names = tuple(chosen)
        self._prefix = prefix
        self._device = device
        self._named = {name: _NAMED[name] for name, own in chosen.items() if own is None}
        self._problem: _Problem | None = None  # read off the first batch
        self._shapes: tuple[torch.Size, torch.Size] | None = None  # of the last batch
        self._batches = 0
        self._accumulators: dict[str, Metric] = {}
        self._plan: list[tuple[_Prepare | None, _Problem, list[Callable[..., None]]]] = []
        with torch.inference_mode(False):  # a tensor made inside could not be added to outside
            for name, own in chosen.items():
                if own is not None:
                    self._accumulators[f"{_OWN}{name}"] = own.clone().to(device)
        self._build()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Does not wait for the device, except to look at the values of the run's first batch if a
        name is judged by its task. A batch without samples is ignored. Outputs in half precision
        are converted to float32. Nothing of the autograd graph is kept.

        Args:
            outputs: What the model gave, on the device; the module's text has the shapes.
            targets: What was wanted, on the device.

        Raises:
            ValueError: The first batch fits no task, or a later one does not fit the first one's.
        """
        if outputs.requires_grad:
            outputs = outputs.detach()
        if targets.requires_grad:
            targets = targets.detach()
        if outputs.dtype is torch.bfloat16 or outputs.dtype is torch.float16:
            outputs = outputs.float()
        shapes = (outputs.shape, targets.shape)
        if shapes != self._shapes:
            if outputs.numel() == 0:
                return
            if self._named:
                self._look_at(outputs, targets)
            self._shapes = shapes
        for prepare, problem, updates in self._plan:
            if prepare is None:
                prepared = outputs, targets
            else:
                prepared = prepare(outputs, targets, problem)
            for update in updates:
                update(*prepared)
        self._batches += 1

    def compute(self) -> dict[str, float]:
        """Return the metrics of the pass so far, by prefixed key; empty if there was no batch.

        Blocks until the device has caught up: here, and only here, metrics are read back. The sums
        stay as they are; call `reset` before the next pass. A user's metric that gives a mapping
        has one key for each entry, `<prefix><name>_<entry>`. Where torch.distributed is in use,
        torchmetrics adds up the ranks: each must call this, with at least one batch.

        Raises:
            ValueError: A user's metric gives something else than single numbers.
        """
        if self._batches == 0:
            return {}
        values: dict[str, Tensor] = {}
        sums: dict[str, _States] = {}  # each accumulator is gathered from all ranks once
        for name in self.names:
            if name not in self._named:
                values.update(_flat(name, self._accumulators[f"{_OWN}{name}"].compute()))
                continue
            problem = self._problem_of(name)
            recipe = self._named[name].recipes[problem.task]
            if recipe.accumulator not in sums:
                sums[recipe.accumulator] = _summed(self._accumulators[recipe.accumulator])
            values[name] = recipe.finish(sums[recipe.accumulator], problem)
        if not values:
            return {}
        # Host-device synchronisation: all numbers in one copy. (Some of torchmetrics' compute
        # methods have looked at the device before.)
        stacked = torch.stack([v.to(_wide(v.device)).reshape(()) for v in values.values()])
        keys = (f"{self._prefix}{key}" for key in values)
        return dict(zip(keys, stacked.tolist(), strict=True))

    def reset(self) -> None:
        """Forget the sums, keep the task. Call it before each pass; twice is fine."""
        self._batches = 0
        with torch.inference_mode(False):
            for accumulator in self._accumulators.values():
                accumulator.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the pass so far: plain values and copies of tensors, on their device.

        Does not wait for the device. Holds what metrics declared with `add_state`, those inside
        wrappers included; not what a user's metric keeps elsewhere (attributes, buffers).
        """
        return {
            "names": list(self.names),
            "batches": self._batches,
            "problem": None if self._problem is None else asdict(self._problem),
            "accumulators": {key: _saved(metric) for key, metric in self._accumulators.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`: all that follows is bit for bit what it would have been.

        Raises:
            ValueError: The state was made by other metrics; nothing has been changed then.
        """
        saved = {key: values["class"] for key, values in state["accumulators"].items()}
        own = {key: m for key, m in self._accumulators.items() if key.startswith(_OWN)}
        saved_own = {key: kind for key, kind in saved.items() if key.startswith(_OWN)}
        if (
            tuple(state["names"]) != self.names
            or {key: type(metric).__name__ for key, metric in own.items()} != saved_own
        ):
            raise ValueError(
                f"the saved metrics are {_listed(state['names'])} {list(saved_own.values())}, not "
                f"{_listed(self.names)}: resume in mid-epoch with the metrics that it began with"
            )
        self._problem = None if state["problem"] is None else _Problem(**state["problem"])
        self._shapes = None
        self._accumulators = own
        self._build()
        self._batches = state["batches"]
        for key, values in state["accumulators"].items():
            _restore(self._accumulators[key], values, device=self._device)

    def _problem_of(self, name: str) -> _Problem:
        if not self._named[name].needs_task:
            return _COMPARISON
        assert self._problem is not None  # there was a batch
        return self._problem

    def _look_at(self, outputs: Tensor, targets: Tensor) -> None:
        """Check a batch of new shapes; read the task off it if it is the first."""
        if outputs.ndim == 0 or targets.ndim == 0 or len(outputs) != len(targets):
            seen = _seen(outputs, targets)
            raise ValueError(f"outputs and targets must have the same batch dimension, got {seen}")
        for name, known in self._named.items():
            if not known.needs_task and _squeezed(outputs.shape) != _squeezed(targets.shape):
                seen = _seen(outputs, targets)
                raise ValueError(f"{name!r} compares numbers of one shape, got {seen}")
        names = [name for name, known in self._named.items() if known.needs_task]
        if not names:
            return
        problem = _problem(names, outputs, targets, self._problem.class_dim if self._problem else 1)
        if self._problem is None:
            for name in names:
                known = self._named[name]
                if problem.task not in known.recipes or problem.size < known.min_size:
                    raise ValueError(f"{name!r} has no meaning for a {problem}; leave it out")
            _check_values(names, problem, outputs, targets)
            self._problem = problem
            self._build()
        elif problem != self._problem:
            seen = _seen(outputs, targets)
            raise ValueError(f"the first batch was a {self._problem}, this is a {problem}: {seen}")

    def _build(self) -> None:
        """Make the accumulators that can be made by now, and group them by what they are fed."""
        with torch.inference_mode(False):
            for name, known in self._named.items():
                if known.needs_task and self._problem is None:
                    continue  # until the first batch
                problem = self._problem_of(name)
                key = known.recipes[problem.task].accumulator
                if key not in self._accumulators:
                    metric = _ACCUMULATORS[key].make(problem, _wide(self._device))
                    self._accumulators[key] = metric.to(self._device)
        groups: dict[_Prepare | None, list[Callable[..., None]]] = {}
        for key, metric in self._accumulators.items():
            prepare = None if key.startswith(_OWN) else _ACCUMULATORS[key].prepare
            groups.setdefault(prepare, []).append(metric.update)
        problem = self._problem or _COMPARISON
        self._plan = [(prepare, problem, updates) for prepare, updates in groups.items()]


def check_metrics(metrics: Metrics) -> None:
    """Raise where `metrics` cannot be used, before a run starts. Touches no device.

    Raises:
        ValueError: An unknown name (the nearest known one is named), a key that is given twice or
            reserved, or a metric set up to give one value per class.
        TypeError: Something that is neither a name nor a `torchmetrics.Metric` instance.
    """
    _chosen(metrics)


def metric_direction(key: str, metrics: Metrics = ()) -> Literal["min", "max"] | None:
    """Say whether a metric should become small or large; None where that cannot be known.

    A metric object's own `higher_is_better` counts first, then the table of names, then the words
    of the key: `val_focal_loss` -> min. Where words disagree, a last word "loss" or "error" wins.

    Args:
        key: A metric's key, with or without `train_` or `val_`.
        metrics: The run's metrics, as `train` gets them.
    """
    name = re.sub("^(train|val)_", "", key)
    own = _chosen(metrics).get(name)
    if own is not None and own.higher_is_better is not None:
        return "max" if own.higher_is_better else "min"
    canonical = _ALIASES.get(_spelled(name))
    if canonical is not None:
        return "max" if _NAMED[canonical].higher_is_better else "min"
    return _direction_of(re.split(r"[^a-z0-9]+", name.lower()))


def _chosen(metrics: Metrics) -> dict[str, Metric | None]:
    """Return key -> the user's metric, or None for one of our names, in the order given."""
    if isinstance(metrics, str | Metric) or not isinstance(metrics, Sequence | Mapping):
        raise TypeError(f"metrics must be a list of {_WANTED}s, got {metrics!r}; write [...]")
    pairs: Iterator[tuple[str | None, object]] = (
        iter(metrics.items()) if isinstance(metrics, Mapping) else ((None, metric) for metric in metrics)
    )
    chosen: dict[str, Metric | None] = {}
    for key, metric in pairs:
        if isinstance(metric, str) and key is None:
            key = _canonical(metric)
        elif not isinstance(metric, Metric):
            raise TypeError(_not_a_metric(metric, "torchmetrics.Metric" if key else _WANTED))
        elif key is None:
            key = _snake_case(type(metric).__name__)
        if not isinstance(key, str) or not key or key == "loss":  # the loop makes train_loss
            raise ValueError(f"a metric cannot be called {key!r}; the key is a text, not 'loss'")
        if key in chosen:
            raise ValueError(f"metric {key!r} is given twice; a mapping can give each its own key")
        chosen[key] = metric if isinstance(metric, Metric) else None
        _check_gives_one_number(key, metric)
    return chosen


_WANTED = "name or torchmetrics.Metric"
_ONE_NUMBER = 'use average="macro" or torchmetrics.ClasswiseWrapper, which gives each class a key'


def _canonical(name: str) -> str:
    """Return the key of a name or alias."""
    spelled = _spelled(name)
    if spelled in _ALIASES:
        return _ALIASES[spelled]
    near = difflib.get_close_matches(spelled, _ALIASES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"metric {name!r} is not known; {hint}The names are {_listed(_NAMED)}; "
        "for anything else pass a torchmetrics.Metric instance."
    )


def _spelled(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _not_a_metric(value: object, wanted: str) -> str:
    hint = ""
    if isinstance(value, type) and issubclass(value, Metric):
        hint = f"; make an instance: {value.__name__}(...)"
    elif isinstance(value, torchmetrics.MetricCollection):
        hint = "; pass dict(collection.items()) as metrics"
    return f"a metric must be a {wanted}, got {value!r}{hint}"


def _check_gives_one_number(key: str, metric: object) -> None:
    # Found here, not at the end of the first epoch. Wrappers show the attributes of what they wrap.
    if isinstance(metric, WrapperMetric):
        return
    has_classes = hasattr(metric, "num_classes") or hasattr(metric, "num_labels")
    if has_classes and getattr(metric, "average", "macro") in (None, "none"):
        raise ValueError(f"metric {key!r} gives one value per class (average); {_ONE_NUMBER}")


def _flat(name: str, result: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the keys and numbers of one metric's result, which may be a mapping."""
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _flat(f"{name}_{key}", value)
        return
    if isinstance(result, int | float):
        result = torch.tensor(result)
    if not isinstance(result, Tensor) or result.numel() != 1:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(f"metric {name!r} gave {got}, not one number; {_ONE_NUMBER}")
    yield name, result.detach()


_SMALLER = frozenset(
    "loss error err mse rmse mae mape perplexity ppl nll wer cer fid hamming brier ece".split()
)
_LARGER = frozenset(
    "accuracy acc top1 top5 precision recall sensitivity specificity f1 fbeta auroc auc auprc map "
    "r2 iou miou jaccard dice kappa mcc corrcoef bleu rouge psnr ssim ndcg mrr".split()
)


def _direction_of(words: Sequence[str]) -> Literal["min", "max"] | None:
    is_smaller = any(word in _SMALLER or word.endswith(("loss", "error")) for word in words)
    is_larger = any(word in _LARGER for word in words)
    if is_smaller and is_larger:  # dice_loss is a loss; nobody can know what f1_at_loss_3 is
        return "min" if words[-1].endswith(("loss", "error")) else None
    if is_smaller:
        return "min"
    return "max" if is_larger else None


def _problem(names: Sequence[str], outputs: Tensor, targets: Tensor, class_dim: int = 1) -> _Problem:
    """Apply the module's table of tasks; of two class dimensions that fit take the given one."""
    if not outputs.is_floating_point():
        raise _unfit(names, outputs, targets, "outputs must be floats (logits or probabilities)")
    shape, wanted = outputs.shape, targets.shape
    if shape == wanted and len(shape) > 1 and shape[1] > 1:
        return _Problem("multilabel", shape[1])
    if _squeezed(shape) == _squeezed(wanted):
        return _Problem("binary", 2)
    for dim in (class_dim, -1 if class_dim == 1 else 1):
        rest = shape[:-1] if dim == -1 else shape[:1] + shape[2:]
        if len(shape) > 1 and rest == wanted and shape[dim] > 1:
            if targets.is_floating_point():
                raise _unfit(names, outputs, targets, "class indices are integers: targets.long()")
            return _Problem("multiclass", shape[dim], dim)
    raise _unfit(names, outputs, targets, "the shapes fit no task")


def _squeezed(shape: torch.Size) -> torch.Size:
    """Drop a class dimension of one: (B, 1, ...) -> (B, ...)."""
    return shape[:1] + shape[2:] if len(shape) > 1 and shape[1] == 1 else shape


def _check_values(names: Sequence[str], problem: _Problem, outputs: Tensor, targets: Tensor) -> None:
    """Check the values of the first batch. Blocks until the device has them."""
    if problem.task == "multiclass":
        largest = int(targets.max())  # host-device synchronisation, first batch only
        if largest >= problem.size:
            why = f"class indices must be below {problem.size}, got {largest} (-100 is ignored)"
            raise _unfit(names, outputs, targets, why)
        return
    is_legal = (targets == 0) | (targets == 1)
    if not bool(is_legal.all()):  # host-device synchronisation, first batch only
        found = float(targets[~is_legal][0])
        why = (
            f"targets must be 0 or 1, got {found:g}; class indices need outputs (B, C), "
            "and numbers are compared by 'mse', 'mae', 'r2'"
        )
        raise _unfit(names, outputs, targets, why)
    # Integers are meant as labels, since cross_entropy takes one-hot targets only as floats. No
    # error, because the first samples of multilabel data may have one label each by chance.
    if problem.task == "multilabel" and targets.is_floating_point():
        if bool((targets.sum(1) == 1).all()):  # host-device synchronisation, first batch only
            warnings.warn(
                f"{_listed(names)} take targets {tuple(targets.shape)} for {problem.size} "
                "yes-or-no labels, but each sample has exactly one. If these are one-hot classes, "
                "let the step return targets.argmax(1) for the metrics.",
                stacklevel=4,
            )


def _unfit(names: Sequence[str], outputs: Tensor, targets: Tensor, why: str) -> ValueError:
    return ValueError(
        f"metrics {_listed(names)} cannot judge {_seen(outputs, targets)}: {why}. The step may "
        "return other outputs and targets for the metrics; or pass a torchmetrics.Metric instance."
    )


def _seen(outputs: Tensor, targets: Tensor) -> str:
    return (
        f"outputs {tuple(outputs.shape)} {str(outputs.dtype).removeprefix('torch.')}, "
        f"targets {tuple(targets.shape)} {str(targets.dtype).removeprefix('torch.')}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


# From a batch to what is added up. None of these may wait for the device.


def _labels(outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Return predicted and true classes, (N,) int64 each."""
    return outputs.argmax(problem.class_dim).reshape(-1), targets.reshape(-1).long()


def _top5_labels(outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Return the true class where it is among the largest five, else the largest; true classes.

    That is how torchmetrics counts top-k; (N,) int64 each.
    """
    rows_NC = outputs.movedim(problem.class_dim, -1).reshape(-1, problem.size)
    best = rows_NC.topk(5).indices
    targets_N = targets.reshape(-1).long()
    is_among = (best == targets_N.unsqueeze(1)).any(1)
    return torch.where(is_among, targets_N, best[:, 0]), targets_N


def _columns(outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Return one column per label: values (N, L) floats, truths (N, L) bool."""
    if problem.task == "binary":
        return outputs.reshape(-1, 1), targets.reshape(-1, 1) == 1
    L = problem.size
    truths = targets.movedim(1, -1).reshape(-1, L) == 1
    return outputs.movedim(1, -1).reshape(-1, L), truths


def _samples(outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Return values (N, C) with true classes (N,) int64, or values and truths (N, L).

    Copies, since these live to the end of the pass: a view would keep its whole batch alive, and
    a model compiled with CUDA graphs writes its next outputs over the last ones.
    """
    if problem.task != "multiclass":
        values_NL, truths_NL = _columns(outputs, targets, problem)
        return values_NL.clone(), truths_NL  # the truths are new already
    values_NC = outputs.movedim(problem.class_dim, -1).reshape(-1, problem.size)
    return values_NC.clone(), targets.reshape(-1).long().clone()


def _numbers(outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Return both as (N,) in float64, where N counts numbers, not rows."""
    wide = _wide(outputs.device)
    if outputs.ndim > 1 or targets.ndim > 1:
        outputs, targets = outputs.reshape(-1), targets.reshape(-1)
    return outputs.to(wide), targets.to(wide)


def _rows(outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Return both as (B, D) in float64."""
    wide = _wide(outputs.device)
    B = len(outputs)
    return outputs.reshape(B, -1).to(wide), targets.reshape(B, -1).to(wide)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs lack float64


# What is added up. torchmetrics.Metric as a base gives moving, resetting and summing over ranks.


class _Sums(Metric):
    """Sums whose `compute` returns the states that torchmetrics' own metrics compute from."""

    full_state_update = False

    def _count(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_up(self, name: str, wide: torch.dtype) -> None:
        self.add_state(name, torch.zeros((), dtype=wide), dist_reduce_fx="sum")


class _ClassCounts(_Sums):
    """How often each class was predicted, wanted, and both: O(C) memory."""

    hits: Tensor
    predicted: Tensor
    wanted: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name in ("hits", "predicted", "wanted"):
            self._count(name, classes)

    def update(self, labels: Tensor, targets: Tensor) -> None:
        """Add classes (N,) int64."""
        # scatter_add_, because bincount waits for a CUDA device to tell the largest value.
        # Negative targets weigh 0 and are sent to class 0, where an index is legal.
        weight = (targets >= 0).long()
        self.hits.scatter_add_(0, labels, (labels == targets).long())
        self.predicted.scatter_add_(0, labels, weight)
        self.wanted.scatter_add_(0, targets.clamp(min=0), weight)

    def compute(self) -> _States:
        tp, fp, fn = self.hits, self.predicted - self.hits, self.wanted - self.hits
        return {"tp": tp, "fp": fp, "fn": fn, "tn": self.wanted.sum() - tp - fp - fn}


class _Confusion(_Sums):
    """How often each class was taken for each other: O(C * C) memory, rows are the true classes."""

    pairs: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self._count("pairs", classes * classes)

    def update(self, labels: Tensor, targets: Tensor) -> None:
        """Add classes (N,) int64; a target that is too large leaves the matrix, and raises."""
        self.pairs.scatter_add_(0, targets.clamp(min=0) * self.classes + labels, (targets >= 0).long())

    def compute(self) -> _States:
        return {"confmat": self.pairs.reshape(self.classes, self.classes)}


class _YesNoCounts(_Sums):
    """How often each label was said, was true, and both.

    The first dimension of two holds both readings of the outputs: logits and probabilities.
    """

    cuts: Tensor
    hits: Tensor
    said: Tensor
    exact: Tensor
    true: Tensor
    total: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.register_buffer("cuts", torch.tensor([0.0, 0.5]).reshape(2, 1, 1), persistent=False)
        self._count("hits", 2, labels)
        self._count("said", 2, labels)
        self._count("exact", 2)
        self._count("true", labels)
        self._count("total")
        self.add_state("low", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, values: Tensor, truths: Tensor) -> None:
        """Add values (N, L) floats and truths (N, L) bool."""
        said = values > self.cuts  # (2, N, L)
        self.hits.add_((said & truths).sum(1))
        self.said.add_(said.sum(1))
        if self.labels > 1:
            self.exact.add_((said == truths).all(2).sum(1))
        self.true.add_(truths.sum(0))
        self.total.add_(len(truths))
        low, high = values.aminmax()
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    def compute(self) -> _States:
        # False for NaN, which must not turn logits into probabilities.
        are_probabilities = (self.low >= 0) & (self.high <= 1)
        tp, said, exact = (
            torch.where(are_probabilities, both[1], both[0]) for both in (self.hits, self.said, self.exact)
        )
        fp, fn = said - tp, self.true - tp
        tn = self.total - tp - fp - fn
        if self.labels == 1:  # two classes, no and yes: what is right for one is right for both
            tp, fp, fn, tn = (torch.cat(pair) for pair in ((tn, tp), (fn, fp), (fp, fn), (tp, tn)))
            confmat = torch.stack([torch.stack([tp[0], fn[0]]), torch.stack([fp[0], tp[1]])])
        else:
            confmat = torch.stack([tn, fp, fn, tp], dim=1).reshape(-1, 2, 2)
        counts = {"tp": tp, "fp": fp, "fn": fn, "tn": tn, "confmat": confmat}
        return counts | {"correct": exact, "total": self.total}


class _SquaredErrors(_Sums):
    sum_squared_error: Tensor
    total: Tensor

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self._add_up("sum_squared_error", wide)
        self._count("total")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add numbers (N,) float64."""
        errors = outputs - targets
        self.sum_squared_error.add_(errors.dot(errors))
        self.total.add_(len(errors))

    def compute(self) -> _States:
        return {"sum_squared_error": self.sum_squared_error, "total": self.total}


class _AbsoluteErrors(_Sums):
    sum_abs_error: Tensor
    total: Tensor

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self._add_up("sum_abs_error", wide)
        self._count("total")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add numbers (N,) float64."""
        self.sum_abs_error.add_((outputs - targets).abs_().sum())
        self.total.add_(len(outputs))

    def compute(self) -> _States:
        return {"sum_abs_error": self.sum_abs_error, "total": self.total}


class _RocAuc(Metric):
    """All outputs and targets of the pass: ranking needs them all."""

    full_state_update = False
    values: list[Tensor]
    targets: list[Tensor]

    def __init__(self, task: _Task) -> None:
        super().__init__()
        self.is_multiclass = task == "multiclass"
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Keep values (N, C) with classes (N,), or values and truths (N, L)."""
        self.values.append(values)
        self.targets.append(targets)

    def compute(self) -> _States:
        """Return the mean area of the columns that hold both kinds of samples. Blocks."""
        values, targets = dim_zero_cat(self.values), dim_zero_cat(self.targets)
        if self.is_multiclass:
            is_counted = targets >= 0
            values, targets = _probabilities(values[is_counted]), targets[is_counted]
            truths_NC = targets.unsqueeze(1) == torch.arange(values.shape[1], device=values.device)
        else:
            truths_NC = targets
        # Host-device synchronisation. Of columns of one kind torchmetrics warns and says 0.
        positives = truths_NC.sum(0).tolist()
        columns = [c for c, count in enumerate(positives) if 0 < count < len(truths_NC)]
        if not columns or bool(values.isnan().any()):
            return {"area": values.new_tensor(torch.nan)}
        areas = [
            binary_auroc(_ranks(values[:, c]), truths_NC[:, c].long(), validate_args=False) for c in columns
        ]
        return {"area": torch.stack(areas).mean()}


def _probabilities(values_NC: Tensor) -> Tensor:
    """Apply softmax unless these are probabilities already. Synchronises."""
    values_NC = values_NC.to(_wide(values_NC.device))
    is_in_range = (values_NC >= 0) & (values_NC <= 1)
    is_one = (values_NC.sum(1, keepdim=True) - 1).abs() < _SUM_TOLERANCE
    return values_NC if bool((is_in_range & is_one).all()) else values_NC.softmax(1)


def _ranks(values_N: Tensor) -> Tensor:
    """Return numbers in [0, 1] in the same order, with the same ties.

    torchmetrics would apply a sigmoid to what leaves [0, 1], which makes large logits equal.
    """
    values_N = values_N.contiguous()  # else searchsorted warns
    ranks = torch.searchsorted(values_N.sort().values, values_N)
    return ranks.to(_wide(values_N.device)) / len(values_N)


def _summed(accumulator: Metric) -> _States:
    """Return the states of the whole pass, over all ranks, as floats of full precision."""
    if isinstance(accumulator, _Sums | _RocAuc):
        states = accumulator.compute()
    else:  # one of torchmetrics' own
        with accumulator.sync_context(dist_sync_fn=accumulator.dist_sync_fn):
            states = {name: cast(Tensor, s) for name, s in accumulator.metric_state.items()}
    return {name: state.to(_wide(state.device)) for name, state in states.items()}


# From sums to a number.


def _finish(metric: Metric, states: _States) -> Tensor:
    """Let a new torchmetrics metric compute from sums made elsewhere."""
    for name in metric.metric_state:
        setattr(metric, name, states[name])
    # Else it warns of compute before update. torchmetrics' own MetricCollection does the same.
    metric._update_count = 1
    return cast(Tensor, metric.compute())


def _finish_r2(states: _States) -> Tensor:
    """Return R2, NaN for fewer than two samples. Synchronises."""
    total = states["total"]
    if float(total) < 2:
        return torch.full_like(total, torch.nan)
    # torchmetrics takes a sum of squares below 1e-4 for zero, which is wrong for numbers in small
    # units. R2 has no unit: choose one in which the spread of the targets is 1e12. A spread that
    # is only the rounding of the difference it comes from is zero: the targets are constant.
    squares, mean = states["sum_squared_error"], states["sum_error"] / total
    spread = squares - states["sum_error"] * mean
    is_constant = spread <= 1e-13 * squares
    unit = torch.where(is_constant, 1.0, (1e12 / spread).sqrt())
    scaled = {
        "sum_squared_error": torch.where(is_constant, states["sum_error"] * mean, squares) * unit**2,
        "sum_error": states["sum_error"] * unit,
        "residual": states["residual"] * unit**2,
        "total": total,
    }
    return _finish(R2Score(sync_on_compute=False), scaled)


# What a checkpoint keeps.


def _saved(metric: Metric) -> dict[str, Any]:
    """Copy the states of a metric and of the metrics inside it."""
    modules = {
        path: {
            "updates": module.update_count,
            "states": {
                name: [_copy(item) for item in state] if isinstance(state, list) else _copy(state)
                for name, state in module.metric_state.items()
            },
        }
        for path, module in metric.named_modules()
        if isinstance(module, Metric)
    }
    return {"class": type(metric).__name__, "modules": modules}


def _restore(metric: Metric, saved: Mapping[str, Any], *, device: torch.device) -> None:
    modules = dict(metric.named_modules())
    with torch.inference_mode(False):
        for path, values in saved["modules"].items():
            module = cast(Metric, modules[path])
            module._update_count = values["updates"]  # torchmetrics itself does not save it
            module._computed = None
            for name, state in values["states"].items():
                is_list = isinstance(state, list)
                setattr(
                    module,
                    name,
                    [_copy(item, device) for item in state] if is_list else _copy(state, device),
                )


def _copy(value: object, device: torch.device | None = None) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device or value.device, copy=True)


@dataclass(frozen=True, slots=True)
class _Accumulator:
    prepare: _Prepare
    make: Callable[[_Problem, torch.dtype], Metric]


_ACCUMULATORS: dict[str, _Accumulator] = {
    "class_counts": _Accumulator(_labels, lambda problem, _: _ClassCounts(problem.size)),
    "top5_counts": _Accumulator(_top5_labels, lambda problem, _: _ClassCounts(problem.size)),
    "confusion": _Accumulator(_labels, lambda problem, _: _Confusion(problem.size)),
    "yes_no_counts": _Accumulator(
        _columns, lambda problem, _: _YesNoCounts(1 if problem.task == "binary" else problem.size)
    ),
    "roc_auc": _Accumulator(_samples, lambda problem, _: _RocAuc(problem.task)),
    "squared_errors": _Accumulator(_numbers, lambda _, wide: _SquaredErrors(wide)),
    "absolute_errors": _Accumulator(_numbers, lambda _, wide: _AbsoluteErrors(wide)),
    "r2": _Accumulator(_rows, lambda *_: R2Score()),
}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Which sums a number is made of, and how."""

    accumulator: str
    finish: Callable[[_States, _Problem], Tensor]


@dataclass(frozen=True, slots=True)
class _Named:
    aliases: str
    higher_is_better: bool
    recipes: Mapping[_Task, _Recipe]
    min_size: int = 2

    @property
    def needs_task(self) -> bool:
        return "regression" not in self.recipes


def _counted(
    multiclass: Callable[..., Metric],
    multilabel: Callable[..., Metric] | None,
    *,
    sums: str = "class_counts",
) -> dict[_Task, _Recipe]:
    """Make the recipes of a metric that is counted by class or label."""

    def by_class(states: _States, problem: _Problem) -> Tensor:
        metric = multiclass(num_classes=problem.size, validate_args=False, sync_on_compute=False)
        return _finish(metric, states)

    recipes: dict[_Task, _Recipe] = {"multiclass": _Recipe(sums, by_class)}
    if sums != "top5_counts":
        recipes["binary"] = _Recipe("yes_no_counts", by_class)
    if multilabel is not None:

        def by_label(states: _States, problem: _Problem) -> Tensor:
            metric = multilabel(num_labels=problem.size, validate_args=False, sync_on_compute=False)
            return _finish(metric, states)

        recipes["multilabel"] = _Recipe("yes_no_counts", by_label)
    return recipes


def _compared(accumulator: str, metric: Callable[..., Metric]) -> dict[_Task, _Recipe]:
    """Make the recipe of a metric that compares numbers."""

    def finish(states: _States, _: _Problem) -> Tensor:
        return _finish(metric(sync_on_compute=False), states)

    return {"regression": _Recipe(accumulator, finish)}


def _macro(multiclass: type[Metric], multilabel: type[Metric], **sums: str) -> dict[_Task, _Recipe]:
    return _counted(partial(multiclass, average="macro"), partial(multilabel, average="macro"), **sums)


_MICRO = partial(MulticlassAccuracy, average="micro")
_AREA = _Recipe("roc_auc", lambda states, _: states["area"])

_NAMED: dict[str, _Named] = {
    "accuracy": _Named("acc accuracy_score", True, _counted(_MICRO, MultilabelExactMatch)),
    "top5_accuracy": _Named(
        "top5 top_5_accuracy top_k_accuracy_score",
        True,
        _counted(_MICRO, None, sums="top5_counts"),
        min_size=5,
    ),
    "precision": _Named("precision_score", True, _macro(MulticlassPrecision, MultilabelPrecision)),
    "recall": _Named("recall_score", True, _macro(MulticlassRecall, MultilabelRecall)),
    "f1_score": _Named("f1 f1_macro", True, _macro(MulticlassF1Score, MultilabelF1Score)),
    "iou": _Named(
        "jaccard jaccard_score mean_iou miou",
        True,
        _macro(MulticlassJaccardIndex, MultilabelJaccardIndex, sums="confusion"),
    ),
    "hamming_loss": _Named(
        "hamming hamming_distance",
        False,
        _counted(
            partial(MulticlassHammingDistance, average="micro"),
            partial(MultilabelHammingDistance, average="micro"),
        ),
    ),
    "cohen_kappa": _Named(
        "kappa cohen_kappa_score", True, _counted(MulticlassCohenKappa, None, sums="confusion")
    ),
    "roc_auc": _Named(
        "auroc auc roc_auc_score roc_auc_ovr",
        True,
        {"binary": _AREA, "multiclass": _AREA, "multilabel": _AREA},
    ),
    "mse": _Named("mean_squared_error", False, _compared("squared_errors", MeanSquaredError)),
    "rmse": _Named(
        "root_mean_squared_error",
        False,
        _compared("squared_errors", partial(MeanSquaredError, squared=False)),
    ),
    "mae": _Named("mean_absolute_error", False, _compared("absolute_errors", MeanAbsoluteError)),
    "r2": _Named("r2_score", True, {"regression": _Recipe("r2", lambda states, _: _finish_r2(states))}),
}

_ALIASES = {name: name for name in _NAMED} | {
    alias: name for name, known in _NAMED.items() for alias in known.aliases.split()
}
