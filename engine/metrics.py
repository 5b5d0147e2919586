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

What needs torchmetrics stands in `named_metrics.py`, which the training thread imports before a run starts:
that takes as long as importing torch, where SciPy is installed, and must not hold up an event loop.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from offloop.engine.lazy_imports import first_use
from offloop.engine.metric_names import NAMES, ONE_NUMBER, MetricSpec, chosen_metrics

if TYPE_CHECKING:
    from torchmetrics import Metric

    from offloop.engine.named_metrics import Sums


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
        self._sums: list[Sums] = []  # of the names
        self._is_split = False  # True in a resumed pass with names that began later than others of their kind
        self._own: dict[str, Metric] = {}  # the user's

    def load_packages(self) -> None:
        """Import what the metrics need. Blocks for seconds the first time; without it the first `update` does."""
        with first_use("torchmetrics"):
            import offloop.engine.named_metrics  # noqa: F401 - loads it

    @torch.inference_mode(False)  # here and below: sums made in inference mode could not grow outside
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add one batch; one without samples is ignored. Nothing of the autograd graph is kept.

        Raises ValueError if the first batch fits no task, or a later one does not fit the first one's.
        """
        if outputs.numel() == 0:
            return
        outputs, targets = outputs.detach(), targets.detach()
        if self._problem is None or self._shapes != (outputs.shape, targets.shape):
            problem = _problem(self._named(), outputs, targets, self._problem)
            if self._problem is None:
                self._build(problem)
            self._problem, self._shapes = problem, (outputs.shape, targets.shape)
        for sums in self._sums:
            sums.update(outputs, targets)
        if self._own:
            if outputs.dtype in (torch.bfloat16, torch.float16):
                outputs = outputs.float()
            for name, metric in self._own.items():
                try:
                    metric.update(outputs, targets)
                except Exception as error:
                    error.add_note(
                        f"offloop: metric {name!r}, a {type(metric).__name__}, was given outputs "
                        f"{tuple(outputs.shape)} {outputs.dtype}, targets {tuple(targets.shape)} {targets.dtype}"
                    )
                    raise
        self._batches += 1

    def compute(self) -> dict[str, float]:
        """Return the metrics of the pass so far, by prefixed key; empty if there was no batch.

        Blocks until the device has caught up: here, and only here, metrics are read back. A user's metric that
        gives a mapping has a key for each entry, `<prefix><name>_<entry>`; one that gives no single numbers raises
        ValueError. Under torch.distributed each rank must call this, after a batch at least.
        """
        if self._batches == 0:
            return {}
        results: dict[str, object] = {name: metric.compute() for name, metric in self._own.items()}
        for sums in self._sums:
            results.update(sums.compute())
        values = dict(pair for name in self.names for pair in _flat(name, results[name]))
        return {f"{self._prefix}{key}": float(value) for key, value in values.items()}  # synchronisation

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget the sums, keep the task. Call it before each pass; twice is fine."""
        self._batches = 0
        if self._is_split:
            assert self._problem is not None
            self._build(self._problem)
        for sums in self._sums:
            sums.reset()
        for metric in self._own.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the pass so far: plain values and copies of tensors, on their device. Does not block."""
        return {
            "metrics": self._kinds,
            "batches": self._batches,
            "problem": self._problem and tuple(self._problem),
            "names": [list(sums.metrics) for sums in self._sums],
            "sums": [sums.state_dict() for sums in self._sums],
            "own": {name: metric.state_dict() for name, metric in self._own.items()},
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a `state_dict`: all that follows is bit for bit what it would have been.

        Returns:
            Names of metrics that the state lacks; they count from here on.
        """
        with first_use("torchmetrics"):
            from torchmetrics import Metric

        from offloop.engine.named_metrics import sums_of

        problem = state["problem"] and Problem(*state["problem"])
        named = self._named()
        if problem is None or (
            problem.task == "regression" and any(NAMES[n].view != "numbers" for n in named)
        ):
            # Nothing to go on with: an unstarted pass, or one whose task does not fit what is asked for now.
            self._problem, self._shapes, self._batches = None, None, 0
            self._sums, self._own, self._is_split = [], {}, False
            return [
                name
                for name, kind in zip(self.names, self._kinds, strict=True)
                if kind not in state["metrics"]
            ]
        self._problem, self._shapes, self._batches = problem, None, state["batches"]
        self._build(problem)
        saved_names = state.get("names")
        if saved_names is None:  # of an earlier version
            of_state = [each.partition(": ")[0] for each in state["metrics"] if each.endswith(": NoneType")]
            saved_names = [list(sums.metrics) for sums in sums_of(of_state, problem, self._device)]
        whole, self._sums, new = len(self._sums), [], set(named)
        for names, saved in zip(saved_names, state["sums"], strict=True):
            kept = [name for name in names if name in new]
            for sums in sums_of(kept, problem, self._device):  # one: they look at the same thing
                sums.load_state_dict(saved)
                self._sums.append(sums)
            new -= set(kept)
        self._sums += sums_of([name for name in named if name in new], problem, self._device)
        self._is_split = len(self._sums) > whole
        for name, metric in self._own.items():
            if f"{name}: {type(metric).__name__}" not in state["metrics"]:
                new.add(name)
                continue
            metric.load_state_dict(copy.deepcopy(state["own"][name]))  # else it adds to the caller's tensors
            metric.to(self._device)
            for member in (module for module in metric.modules() if isinstance(module, Metric)):
                member._update_count = self._batches  # not in its state; at 0 `compute` warns
        return [name for name in self.names if name in new]

    def _named(self) -> list[str]:
        return [name for name, own in self._chosen.items() if own is None]

    def _build(self, problem: Problem) -> None:
        with first_use("torchmetrics"):
            from torchmetrics import Metric

            from offloop.engine.named_metrics import sums_of

        self._sums, self._is_split = sums_of(self._named(), problem, self._device), False
        for name, own in self._chosen.items():
            if own is None:
                continue
            metric = self._own[name] = own.clone().to(self._device)
            metric.reset()  # the user may have used it before
            for member in (module for module in metric.modules() if isinstance(module, Metric)):
                member.persistent(True)


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
