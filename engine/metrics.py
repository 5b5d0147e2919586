"""Named metrics over one whole pass of a data set, added up and computed by torchmetrics.

A name means the scikit-learn call it equals, on the concatenated data set, with `zero_division=0`
(aliases in brackets; scikit-learn's function names are aliases, too).

    accuracy (acc)           accuracy_score; with several labels per sample, all must be right
    precision, recall        precision_score, recall_score with average="macro"
    f1_score (f1)            f1_score(average="macro")
    roc_auc (auroc, auc)     roc_auc_score(average="macro", multi_class="ovr")
    mse, rmse, mae, r2       mean_squared_error, its root, mean_absolute_error, r2_score

Macro is the mean over the classes, in binary tasks too (of "no" and "yes"); the score of "yes" alone is
`torchmetrics.classification.BinaryF1Score()`. `roc_auc` leaves out classes and labels without a positive or
without a negative sample, and **keeps all outputs and targets of the pass on the device**. `mse` to `r2` take
outputs and targets of one shape, where (B, 1) and (B,) are the same, and sum in float64; `r2` is the mean over
the columns of (B, D). To torchmetrics squares that sum to less than 1e-4 are 0: beware of `r2` in small units.

The task of the other names is read off the first batch of a run, and stays:

    outputs (floats)     targets                                               task
    (B, C, ...), C >= 2  (B, ...), integers                                    multiclass
    (B,) or (B, 1, ...)  0 or 1 in any dtype; same shape, or without the 1     binary
    (B, L, ...), L >= 2  0 or 1 in any dtype; same shape                       multilabel

(B, ..., C) is understood where (B, C, ...) does not fit. Positions behind the class dimension (pixels,
tokens) count as samples. Negative class indices are not counted, like the -100 of `cross_entropy`.
Outputs are probabilities if all outputs *of the pass* lie in [0, 1], else logits. One batch cannot tell:
a new network's first logits often lie in there, and those of a zero-initialised head always do.
(B = batch, C = classes, L = labels, N = samples or positions in a batch, D = numbers per sample.)
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torchmetrics.classification as tmc
from torch import Tensor
from torchmetrics import MaxMetric, Metric
from torchmetrics.functional.classification import multilabel_auroc
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.utilities.compute import normalize_logits_if_needed
from torchmetrics.utilities.data import dim_zero_cat

Metrics: TypeAlias = Sequence[str | Metric] | Mapping[str, Metric]
"""What `metrics=` takes: names and instances, or a mapping that names the instances."""

_ONE_NUMBER = 'use average="macro" or torchmetrics.ClasswiseWrapper, which gives each class a key'


class _Problem(NamedTuple):
    task: str  # binary, multiclass, multilabel or regression
    size: int  # classes (2 of a binary task) or labels
    class_dim: int = 1  # where a multiclass task's outputs hold the classes: 1 or -1


class MetricSet:
    """The metrics of one data set (train or validation), added up batch by batch.

    A user's metric is cloned, and named by its class in snake case or by the mapping's key. It gets outputs and
    targets as they are (half precision as float32); with its default `validate_args=True` most of torchmetrics
    waits for a CUDA device on each batch.

    Thread: one at a time; the training thread's. Only `compute` and the first `update` block.
    """

    names: tuple[str, ...]
    """The keys without prefix, aliases resolved, in the order given; known before any batch."""

    def __init__(self, metrics: Metrics, *, prefix: str, device: torch.device) -> None:
        """Prepare a pass: `prefix` comes before each key, `device` is where batches are. Raises as `check_metrics`."""
        self._chosen = _chosen(metrics)
        self.names = tuple(self._chosen)
        self._kinds = [f"{name}: {type(metric).__name__}" for name, metric in self._chosen.items()]
        self._prefix, self._device, self._batches = prefix, device, 0
        self._shapes: tuple[torch.Size, torch.Size] | None = None  # of the last batch
        self._problem: _Problem | None = None  # read off the first batch, which makes the counters
        # What it is fed (see _view), the metric that is updated, and by name those that compute from its sums.
        self._counters: list[tuple[str, Metric, dict[str, Metric]]] = []

    @torch.inference_mode(False)  # here and below: sums made in inference mode could not grow outside
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add one batch; one without samples is ignored. Nothing of the autograd graph is kept.

        Raises ValueError if the first batch fits no task, or a later one does not fit the first one's.
        """
        if outputs.numel() == 0:
            return
        outputs, targets = outputs.detach(), targets.detach()
        if self._problem is None or self._shapes != (outputs.shape, targets.shape):
            named = [name for name, own in self._chosen.items() if own is None]
            problem = _problem(named, outputs, targets, self._problem)
            if self._problem is None:
                self._build(problem)
            self._problem, self._shapes = problem, (outputs.shape, targets.shape)
        fed: dict[str, tuple[Tensor, ...]] = {}
        for view, metric, _ in self._counters:
            if view not in fed:
                fed[view] = _view(view, outputs, targets, self._problem)
            metric.update(*fed[view])
        self._batches += 1

    def compute(self) -> dict[str, float]:
        """Return the metrics of the pass so far, by prefixed key; empty if there was no batch.

        Blocks until the device has caught up: here, and only here, metrics are read back. A user's metric that
        gives a mapping has a key for each entry, `<prefix><name>_<entry>`; one that gives no single numbers raises
        ValueError. Under torch.distributed each rank must call this, after a batch at least.
        """
        if self._batches == 0:
            return {}
        results: dict[str, Any] = {}
        wrong = ""
        for view, counter, users in reversed(self._counters):  # the reading of the outputs is found out first
            for name, metric in users.items() if view != wrong else ():
                for state in counter.metric_state:
                    setattr(metric, state, getattr(counter, state))
                metric._computed, metric._update_count = None, counter._update_count
                results[name] = metric.compute()
            if view == "how far outside":
                wrong = "above 0" if bool(results[""] <= 0) else "above 0.5"  # host-device synchronisation
        values = dict(pair for name in self.names for pair in _flat(name, results[name]))
        return {f"{self._prefix}{key}": float(value) for key, value in values.items()}  # synchronisation

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget the sums, keep the task. Call it before each pass; twice is fine."""
        self._batches = 0
        for _, metric, _ in self._counters:
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the pass so far: plain values and copies of tensors, on their device. Does not block."""
        return {
            "metrics": self._kinds,
            "batches": self._batches,
            "problem": self._problem and tuple(self._problem),
            "sums": [metric.state_dict() for _, metric, _ in self._counters],
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`: all that follows is bit for bit what it would have been.

        Raises ValueError, and changes nothing, if the state was made by other metrics.
        """
        if state["metrics"] != self._kinds:
            raise ValueError(f"the saved metrics are {state['metrics']}, those to resume are {self._kinds}")
        self._problem = state["problem"] and _Problem(*state["problem"])
        self._shapes, self._batches = None, state["batches"]
        self._counters = []
        if self._problem is not None:
            self._build(self._problem)
        for (_, metric, _), sums in zip(self._counters, state["sums"], strict=True):
            metric.load_state_dict(copy.deepcopy(sums))  # else it adds to the caller's tensors
            metric.to(self._device)
            for member in (module for module in metric.modules() if isinstance(module, Metric)):
                member._update_count = self._batches  # not in its state; at 0 `compute` warns

    def _build(self, problem: _Problem) -> None:
        readings = ["classes"] if problem.task == "multiclass" else ["above 0", "above 0.5"]
        for name, own in self._chosen.items():
            if own is not None:
                self._add("as given", name, own.clone())
                continue
            view = _NAMED[name].view
            for reading in readings if view == "labels" else [view]:
                self._add(reading, name, _NAMED[name].make(problem))
        if any(view == "above 0" for view, _, _ in self._counters):
            self._add("how far outside", "", MaxMetric(nan_strategy="disable"))

    def _add(self, view: str, name: str, metric: Metric) -> None:
        metric.reset()  # a user may have used it before
        metric.to(self._device)
        if view == "numbers":
            metric.set_dtype(_wide(self._device))
        for member in (module for module in metric.modules() if isinstance(module, Metric)):
            member.persistent(True)
        for fed, counter, users in self._counters:
            if fed == view != "as given" and counter.metric_state.keys() == metric.metric_state.keys():
                users[name] = metric
                return
        self._counters.append((view, metric, {name: metric}))


def check_metrics(metrics: Metrics) -> None:
    """Raise where `metrics` cannot be used, before a run starts. Touches no device.

    ValueError: an unknown name, a key that is reserved or given twice, a metric that gives one value per class.
    TypeError: something that is neither a name nor a `torchmetrics.Metric` instance.
    """
    _chosen(metrics)


def metric_direction(key: str, metrics: Metrics = ()) -> Literal["min", "max"] | None:
    """Say whether a metric should become small or large; None where that cannot be known.

    A metric object's own `higher_is_better` counts first, then the table of names, then the last word of
    the key that says something: `val_dice_loss` -> min. `metrics` are the run's, as `train` gets them.
    """
    name = re.sub("^(train|val)_", "", key)
    own = _chosen(metrics).get(name)
    if own is not None and own.higher_is_better is not None:
        return "max" if own.higher_is_better else "min"
    for word in (name.lower(), *reversed(re.split(r"[^a-z0-9]+", name.lower()))):
        if word in _ALIASES:
            return _NAMED[_ALIASES[word]].direction
        if re.fullmatch(r".*(loss|error)|err|mape|perplexity|ppl|nll|wer|cer|fid|hamming|brier|ece", word):
            return "min"
        if re.fullmatch(
            r"top\d|sensitivity|specificity|fbeta|auprc|map|m?iou|jaccard|dice|kappa|mcc|bleu|psnr", word
        ):
            return "max"
    return None


def _chosen(metrics: Metrics) -> dict[str, Metric | None]:
    """Return key -> the user's metric, or None for one of our names, in the order given."""
    if isinstance(metrics, str | Metric) or not isinstance(metrics, Sequence | Mapping):
        raise TypeError(f"metrics must be a list of names and torchmetrics.Metrics, got {metrics!r}")
    is_mapping = isinstance(metrics, Mapping)
    pairs = metrics.items() if isinstance(metrics, Mapping) else [(_key(item), item) for item in metrics]
    chosen: dict[str, Metric | None] = {}
    for key, metric in pairs:
        if not isinstance(metric, Metric if is_mapping else Metric | str):
            wanted = "an instance of torchmetrics.Metric" + " or a name" * (not is_mapping)
            raise TypeError(f"a metric must be {wanted}, got {metric!r}")
        if not isinstance(key, str) or not key or key == "loss":  # the loop makes train_loss
            raise ValueError(f"a metric cannot be called {key!r}; the key is a text, not 'loss'")
        if key in chosen:
            raise ValueError(f"metric {key!r} is given twice; a mapping can give each its own key")
        # Found here, not at the end of the first epoch. In `vars`, since wrappers show what they wrap.
        if isinstance(metric, Metric) and vars(metric).get("average", "macro") in (None, "none"):
            raise ValueError(f"metric {key!r} gives one value per class (average); {_ONE_NUMBER}")
        chosen[key] = metric if isinstance(metric, Metric) else None
    return chosen


def _key(metric: object) -> str:
    """Return the key of a metric in a list: its name, aliases resolved, or its class in snake case."""
    if not isinstance(metric, str):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(metric).__name__).lower()
    if (spelled := re.sub(r"[\s-]+", "_", metric.strip().lower())) in _ALIASES:
        return _ALIASES[spelled]
    near = "".join(f"did you mean {n!r}? " for n in difflib.get_close_matches(spelled, _ALIASES, n=1))
    known = ", ".join(map(repr, _NAMED))
    raise ValueError(
        f"metric {metric!r} is unknown; {near}the names are {known}; or pass a torchmetrics.Metric"
    )


def _flat(name: str, result: object) -> Iterator[tuple[str, Tensor | float]]:
    """Yield the keys and numbers of one metric's result, which may be a mapping."""
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _flat(f"{name}_{key}", value)
    elif isinstance(result, int | float) or (isinstance(result, Tensor) and result.numel() == 1):
        yield name, result
    else:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(f"metric {name!r} gave {got}, not one number; {_ONE_NUMBER}")


def _problem(names: Sequence[str], outputs: Tensor, targets: Tensor, first: _Problem | None) -> _Problem:
    """Apply the module's table of tasks. Looks at the values, and so blocks, where there is no first problem."""
    shape, wanted, views = outputs.shape, targets.shape, {_NAMED[name].view for name in names}
    is_same = shape[:1] == wanted[:1] != () and [n for n in shape if n > 1] == [n for n in wanted if n > 1]
    dims = (1, -1) if first is None else (first.class_dim,)
    fitting = [d for d in dims if len(shape) > 1 and shape[d] > 1 and shape[:d] + shape[d:][1:] == wanted]
    problem, why = _Problem("regression", 1), ""
    if "numbers" in views and not is_same:
        why = "errors are computed from numbers of one shape"
    elif views <= {"numbers"}:
        pass
    elif is_same and outputs.is_floating_point():
        is_multilabel = shape == wanted and len(shape) > 1 and shape[1] > 1
        problem = _Problem("multilabel", shape[1]) if is_multilabel else _Problem("binary", 2)
        if first is None and not bool(((targets == 0) | (targets == 1)).all()):  # synchronisation
            why = "targets must be 0 or 1; class indices need outputs (B, C), 'mse' and 'mae' take numbers"
    elif fitting and outputs.is_floating_point() and not targets.is_floating_point():
        problem = _Problem("multiclass", shape[fitting[0]], fitting[0])
        if first is None and int(targets.max()) >= problem.size:  # synchronisation
            why = f"class indices must be below {problem.size}, got {int(targets.max())} (-100 is ignored)"
    else:
        why = "they fit no task: outputs are floats, (B, C) for integers (B,) or of the targets' shape"
    if not why and first not in (None, problem):
        why = f"the first batch was a {first}, this is a {problem}"
    if why:
        raise ValueError(
            f"metrics {', '.join(map(repr, names))} cannot judge outputs {tuple(shape)} {outputs.dtype}, targets "
            f"{tuple(wanted)} {targets.dtype}: {why}. The step may return other outputs and targets for them; "
            "or pass a torchmetrics.Metric instance."
        )
    return problem


def _view(view: str, outputs: Tensor, targets: Tensor, problem: _Problem) -> tuple[Tensor, ...]:
    """Return what metrics are fed of a batch. Must not wait for the device."""
    if view == "classes":  # (N,) int64
        return outputs.argmax(problem.class_dim).reshape(-1), targets.reshape(-1).long()
    if view in ("above 0", "above 0.5"):  # what logits or probabilities say: (N,) or (N, L) int64
        said = _rows(outputs, problem) > float(view[6:])
        return said.squeeze(1).long(), _rows(targets, problem).squeeze(1).long()
    if view == "how far outside":  # of [0, 1]; more than 0 if they are
        return (torch.maximum(-outputs, outputs - 1).nan_to_num(nan=-1.0),)
    if view == "numbers":  # (B, D) float64
        rows = (values.reshape(len(values), -1) for values in (outputs, targets))
        return tuple(values.to(_wide(values.device)).contiguous() for values in rows)
    if view == "scores":  # (N, C) with classes (N,), or (N, L) with truths; copies, for they are kept
        truths = targets.reshape(-1) if problem.task == "multiclass" else _rows(targets, problem)
        return _rows(outputs, problem).clone(), truths.clone()
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs, targets  # users'


def _rows(values: Tensor, problem: _Problem) -> Tensor:
    if problem.task == "binary":
        return values.reshape(-1, 1)
    return values.movedim(problem.class_dim, -1).flatten(0, -2)  # (N, C or L)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs lack float64


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
        scores = scores.to(_wide(scores.device))
        if truths.ndim == 1:  # classes
            scores, classes = scores[truths >= 0], truths[truths >= 0]
            scores = normalize_logits_if_needed(scores, "softmax")
            truths = classes.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
        has_both = (truths == 1).any(0) & (truths == 0).any(0)
        if not bool(has_both.any()) or bool(scores.isnan().any()):
            return scores.new_tensor(torch.nan)
        scores, truths = scores[:, has_both], truths[:, has_both].long()
        return multilabel_auroc(scores, truths, scores.shape[1], validate_args=False)


def _count(kind: str, by_label: type[Metric], average: str = "macro") -> Callable[[_Problem], Metric]:
    by_class = getattr(tmc, f"Multiclass{kind}")
    on_device = type(by_class.__name__, (_OnDevice, by_class), {})

    def make(problem: _Problem) -> Metric:
        chosen = by_label if problem.task == "multilabel" else on_device
        metric: Metric = cast(Any, chosen)(problem.size, validate_args=False)
        metric.average = average  # only now, so that "micro" counts by class, too, and shares the counts
        return metric

    return make


class _Named(NamedTuple):
    aliases: str
    direction: Literal["min", "max"]
    view: Literal["labels", "scores", "numbers"]
    make: Callable[[_Problem], Metric]  # torchmetrics' default is average="macro"


_NAMED = {
    "accuracy": _Named("acc accuracy_score", "max", "labels", _count("Accuracy", _ExactMatch, "micro")),
    "precision": _Named("precision_score", "max", "labels", _count("Precision", tmc.MultilabelPrecision)),
    "recall": _Named("recall_score", "max", "labels", _count("Recall", tmc.MultilabelRecall)),
    "f1_score": _Named("f1 f1_macro", "max", "labels", _count("F1Score", tmc.MultilabelF1Score)),
    "roc_auc": _Named(
        "auroc auc roc_auc_score", "max", "scores", lambda p: _RocAuc(p.size, validate_args=False)
    ),
    "mse": _Named("mean_squared_error", "min", "numbers", lambda _: MeanSquaredError()),
    "rmse": _Named("root_mean_squared_error", "min", "numbers", lambda _: MeanSquaredError(squared=False)),
    "mae": _Named("mean_absolute_error", "min", "numbers", lambda _: MeanAbsoluteError()),
    "r2": _Named("r2_score", "max", "numbers", lambda _: _R2()),
}
_ALIASES = {alias: name for name, known in _NAMED.items() for alias in (name, *known.aliases.split())}
