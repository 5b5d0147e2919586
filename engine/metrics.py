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

What needs torchmetrics stands in `named_metrics.py`, which is imported with the first batch, in the training thread:
that takes as long as importing torch, where SciPy is installed, and must not hold up an event loop.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from offloop.engine.metric_names import NAMES, ONE_NUMBER, MetricSpec, chosen_metrics

if TYPE_CHECKING:
    from torchmetrics import Metric


class Problem(NamedTuple):
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

    def __init__(self, metrics: MetricSpec, *, prefix: str, device: torch.device) -> None:
        """Prepare a pass: `prefix` comes before each key, `device` is where batches are. Raises as `check_metrics`."""
        self._chosen = chosen_metrics(metrics)
        self.names = tuple(self._chosen)
        self._kinds = [f"{name}: {type(metric).__name__}" for name, metric in self._chosen.items()]
        self._prefix, self._device, self._batches = prefix, device, 0
        self._shapes: tuple[torch.Size, torch.Size] | None = None  # of the last batch
        self._problem: Problem | None = None  # read off the first batch, which makes the counters
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
        from torchmetrics import Metric

        if state["metrics"] != self._kinds:
            raise ValueError(f"the saved metrics are {state['metrics']}, those to resume are {self._kinds}")
        self._problem = state["problem"] and Problem(*state["problem"])
        self._shapes, self._batches = None, state["batches"]
        self._counters = []
        if self._problem is not None:
            self._build(self._problem)
        for (_, metric, _), sums in zip(self._counters, state["sums"], strict=True):
            metric.load_state_dict(copy.deepcopy(sums))  # else it adds to the caller's tensors
            metric.to(self._device)
            for member in (module for module in metric.modules() if isinstance(module, Metric)):
                member._update_count = self._batches  # not in its state; at 0 `compute` warns

    def _build(self, problem: Problem) -> None:
        from torchmetrics import MaxMetric

        from offloop.engine.named_metrics import MAKERS

        readings = ["classes"] if problem.task == "multiclass" else ["above 0", "above 0.5"]
        for name, own in self._chosen.items():
            if own is not None:
                self._add("as given", name, own.clone())
                continue
            view = NAMES[name].view
            for reading in readings if view == "labels" else [view]:
                self._add(reading, name, MAKERS[name](problem))
        if any(view == "above 0" for view, _, _ in self._counters):
            self._add("how far outside", "", MaxMetric(nan_strategy="disable"))

    def _add(self, view: str, name: str, metric: "Metric") -> None:
        from torchmetrics import Metric

        metric.reset()  # a user may have used it before
        metric.to(self._device)
        if view == "numbers":
            metric.set_dtype(wide(self._device))
        for member in (module for module in metric.modules() if isinstance(module, Metric)):
            member.persistent(True)
        for fed, counter, users in self._counters:
            if fed == view != "as given" and counter.metric_state.keys() == metric.metric_state.keys():
                users[name] = metric
                return
        self._counters.append((view, metric, {name: metric}))


def _flat(name: str, result: object) -> Iterator[tuple[str, Tensor | float]]:
    """Yield the keys and numbers of one metric's result, which may be a mapping."""
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _flat(f"{name}_{key}", value)
    elif isinstance(result, int | float) or (isinstance(result, Tensor) and result.numel() == 1):
        yield name, result
    else:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(f"metric {name!r} gave {got}, not one number; {ONE_NUMBER}")


def _problem(names: Sequence[str], outputs: Tensor, targets: Tensor, first: Problem | None) -> Problem:
    """Apply the module's table of tasks. Looks at the values, and so blocks, where there is no first problem."""
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
        is_multilabel = shape == wanted and len(shape) > 1 and shape[1] > 1
        problem = Problem("multilabel", shape[1]) if is_multilabel else Problem("binary", 2)
        if first is None and not bool(((targets == 0) | (targets == 1)).all()):  # synchronisation
            why = "targets must be 0 or 1; class indices need outputs (B, C), 'mse' and 'mae' take numbers"
    elif fitting and outputs.is_floating_point() and not targets.is_floating_point():
        problem = Problem("multiclass", shape[fitting[0]], fitting[0])
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


def _view(view: str, outputs: Tensor, targets: Tensor, problem: Problem) -> tuple[Tensor, ...]:
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
        return tuple(values.to(wide(values.device)).contiguous() for values in rows)
    if view == "scores":  # (N, C) with classes (N,), or (N, L) with truths; copies, for they are kept
        truths = targets.reshape(-1) if problem.task == "multiclass" else _rows(targets, problem)
        return _rows(outputs, problem).clone(), truths.clone()
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs, targets  # users'


def _rows(values: Tensor, problem: Problem) -> Tensor:
    if problem.task == "binary":
        return values.reshape(-1, 1)
    return values.movedim(problem.class_dim, -1).flatten(0, -2)  # (N, C or L)


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are kept in."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs lack float64
