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

Targets (B, C, ...) that are shares of classes, one-hot or soft, are a multiclass task where the trainer's `loss`
takes them as such (`cross_entropy`): the class is the largest share. More classes in a later batch are taken in.

(B, ..., C) is understood where (B, C, ...) does not fit. Positions behind the class dimension (pixels,
tokens) count as samples. Negative class indices are not counted, like the -100 of `cross_entropy`.
Outputs are probabilities if all outputs *of the pass* lie in [0, 1], else logits. One batch cannot tell:
a new network's first logits often lie in there, and those of a zero-initialised head always do.
(B = batch, C = classes, L = labels, N = samples or positions in a batch, D = numbers per sample.)

What needs torchmetrics stands in `named_metrics.py`, which the training thread imports before a run starts:
that takes as long as importing torch, where SciPy is installed, and must not hold up an event loop.
"""

import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from offloop.engine.lazy_imports import first_use
from offloop.engine.metrics.names import NAMES, ONE_NUMBER, MetricSpec, chosen_metrics

if TYPE_CHECKING:
    from torchmetrics import Metric

    from offloop.engine.metrics.named import Sums


logger = logging.getLogger("offloop")

Rows = Literal["classes", "labels"] | None
"""What targets of the outputs' shape hold: shares of classes, labels that count by themselves, or unknown."""

_OF_CLASSES: Final = (nn.functional.cross_entropy, nn.functional.kl_div)
_OF_LABELS: Final = (
    nn.functional.binary_cross_entropy,
    nn.functional.binary_cross_entropy_with_logits,
    nn.functional.multilabel_soft_margin_loss,
)


def rows_of(loss: object) -> Rows:
    """Return what a loss function takes targets of its outputs' shape for; None where that is not known."""
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
    task: str  # binary, multiclass, multilabel or regression
    size: int  # classes (2 of a binary task) or labels
    class_dim: int = 1  # where a multiclass task's outputs hold the classes: 1 or -1

    def in_words(self) -> str:
        """Return `multiclass with 3 classes`."""
        what = {"multiclass": "classes", "multilabel": "labels"}.get(self.task)
        return self.task if what is None else f"{self.task} with {self.size} {what}"


class MetricSet:
    """The metrics of one data set (train or validation), added up batch by batch.

    A user's metric is cloned, and named by its class in snake case or by the mapping's key. It gets outputs and
    targets as they are (half precision as float32); with its default `validate_args=True` most of torchmetrics
    waits for a CUDA device on each batch.

    Thread: one at a time; the training thread's. Only `compute` and the first `update` block.
    """

    names: tuple[str, ...]
    """The keys without prefix, aliases resolved, in the order given; known before any batch."""

    def __init__(self, metrics: MetricSpec, *, prefix: str, device: torch.device, rows: Rows = None) -> None:
        """Prepare a pass. Raises as `check_metrics`.

        Args:
            metrics: Names and instances.
            prefix: Comes before each key.
            device: Where batches are.
            rows: What targets of the outputs' shape hold, see `rows_of`.
        """
        self._chosen = chosen_metrics(metrics)
        self.names = tuple(self._chosen)
        self._kinds = [f"{name}: {type(metric).__name__}" for name, metric in self._chosen.items()]
        self._prefix, self._device, self._batches = prefix, device, 0
        self._shapes: tuple[torch.Size, torch.Size] | None = None  # of the last batch
        self._rows = rows
        self._problem: Problem | None = None  # read off the first batch, which makes the counters
        self._sums: list[Sums] = []  # of the names
        self._is_split = False  # True in a resumed pass with names that began later than others of their kind
        self._late: frozenset[str] = frozenset()  # names that began in the middle of this pass
        self._late_since = 0  # after so many batches; NaN until there is one
        self._own: dict[str, Metric] = {}  # the user's

    def load_packages(self) -> None:
        """Import what the metrics need. Blocks for seconds the first time; without it the first `update` does."""
        with first_use("torchmetrics"):
            import offloop.engine.metrics.named  # noqa: F401 - loads it

    def add(self, outputs: Any, targets: Any, step: str) -> None:
        """Add what a step returned for the metrics.

        Raises:
            ValueError: It returned none for the first batch, or what the metrics cannot judge; see `update`.
        """
        if outputs is not None and targets is not None:
            self.update(outputs, targets)
        elif self._problem is None:
            data_set = "val" if self._prefix == "train_" else "train"
            raise ValueError(
                f"metrics {', '.join(map(repr, self.names))} need outputs and targets: return {{'loss': loss, "
                f"'outputs': outputs, 'targets': targets}} from {step}, or compute metrics of the other data set "
                f"alone: metrics={{{data_set!r}: [...]}}"
            )

    @torch.inference_mode(False)  # here and below: sums made in inference mode could not grow outside
    def update(self, outputs: Any, targets: Any) -> None:
        """Add one batch; one without samples is ignored. Nothing of the autograd graph is kept.

        Args:
            outputs: A tensor, or what has one as `logits`. Where all metrics are the user's, anything they take.
            targets: Likewise.

        Raises:
            ValueError: The first batch fits no task, or a later one does not fit the first one's.
        """
        outputs = _logits(outputs)
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            if outputs.numel() == 0:
                return
            outputs, targets = outputs.detach(), targets.detach()
            if self._problem is None or self._shapes != (outputs.shape, targets.shape):
                problem = _problem(self._named(), outputs, targets, self._problem, self._rows)
                if self._problem is None:
                    self._build(problem)
                self._problem, self._shapes = problem, (outputs.shape, targets.shape)
            self._update_sums(self._problem, outputs, targets)
            if outputs.dtype in (torch.bfloat16, torch.float16):
                outputs = outputs.float()
        else:
            self._expect_tensors(outputs, targets)
            outputs, targets = _detached(outputs), _detached(targets)
            if self._problem is None:
                self._problem = Problem("regression", 1)
                self._build(self._problem)
        for name, metric in self._own.items():
            try:
                metric.update(outputs, targets)
            except Exception as error:
                error.add_note(
                    f"offloop: metric {name!r}, a {type(metric).__name__}, was given outputs "
                    f"{_describe(outputs)}, targets {_describe(targets)}"
                )
                raise
        self._batches += 1

    def _update_sums(self, problem: Problem, outputs: Tensor, targets: Tensor) -> None:
        # Shares of classes: the largest one is the class
        is_share = problem.task == "multiclass" and outputs.shape == targets.shape
        for sums in self._sums:
            wants_classes = is_share and not sums.takes_numbers
            sums.update(outputs, targets.argmax(problem.class_dim) if wants_classes else targets)

    def _expect_tensors(self, outputs: Any, targets: Any) -> None:
        """Raise where named metrics were given anything else."""
        named = self._named()
        if not named:
            return
        which, got = ("targets", targets) if isinstance(outputs, Tensor) else ("outputs", outputs)
        raise ValueError(
            f"metrics {', '.join(map(repr, named))} need a tensor of {which}, got {_describe(got)}: override "
            "training_step(self, batch) and return {'loss': loss, 'outputs': ..., 'targets': ...} with the tensors "
            "to compare"
        )

    def compute(self) -> dict[str, float]:
        """Return the metrics of the pass so far, by prefixed key; empty if there was no batch.

        Blocks until the device has caught up: here, and only here, metrics are read back. A user's metric that
        gives a mapping has a key for each entry, `<prefix><name>_<entry>`; one that gives no single numbers raises
        ValueError. Under torch.distributed each rank must call this, after a batch at least.
        """
        if self._batches == 0:
            return {}
        unfed = self._late if self._batches == self._late_since else frozenset()
        results: dict[str, object] = dict.fromkeys(unfed, math.nan)
        results |= {name: metric.compute() for name, metric in self._own.items() if name not in unfed}
        for sums in self._sums:
            if unfed.isdisjoint(sums.metrics):
                results.update(sums.compute())
        values = dict(pair for name in self.names for pair in _flat(name, results[name]))
        return {f"{self._prefix}{key}": float(value) for key, value in values.items()}  # synchronisation

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget the sums, keep the task. Call it before each pass; twice is fine."""
        self._batches, self._late = 0, frozenset()
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
            Names of metrics that the state lacks; they count from here on, and are NaN until there is a batch.
        """
        with first_use("torchmetrics"):
            from torchmetrics import Metric

        from offloop.engine.metrics.named import sums_of

        problem = state["problem"] and Problem(*state["problem"])
        named = self._named()
        if problem is None or (
            problem.task == "regression" and any(NAMES[n].view != "numbers" for n in named)
        ):
            # Nothing to go on with: an unstarted pass, or one whose task does not fit what is asked for now.
            self._problem, self._shapes, self._batches = None, None, 0
            self._sums, self._own, self._is_split, self._late = [], {}, False, frozenset()
            if problem is not None:
                return list(self.names)
            kinds = zip(self.names, self._kinds, strict=True)
            return [name for name, kind in kinds if kind not in state["metrics"]]
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
        self._late, self._late_since = frozenset(new), self._batches
        return [name for name in self.names if name in new]

    def _named(self) -> list[str]:
        return [name for name, own in self._chosen.items() if own is None]

    def _build(self, problem: Problem) -> None:
        with first_use("torchmetrics"):
            from torchmetrics import Metric

            from offloop.engine.metrics.named import sums_of

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


def _logits(outputs: Any) -> Any:
    """Return the tensor that outputs hold as `logits`, as those of Hugging Face models do; else the outputs."""
    if isinstance(outputs, Tensor | list | tuple):
        return getattr(outputs, "logits", outputs)  # a named tuple may have them
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) else outputs


def _detached(item: Any) -> Any:
    """Return an item without the graphs of its tensors, in lists and mappings too."""
    if isinstance(item, Tensor):
        return item.detach()
    if isinstance(item, list):
        return [_detached(each) for each in item]
    if type(item) is tuple:
        return tuple(_detached(each) for each in item)
    if isinstance(item, Mapping):
        return {key: _detached(each) for key, each in item.items()}
    return item


def _describe(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{tuple(item.shape)} {item.dtype}"
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)}"
    return f"a {type(item).__name__}"


def _problem(
    names: Sequence[str], outputs: Tensor, targets: Tensor, first: Problem | None, rows: Rows
) -> Problem:
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
        has_columns = shape == wanted and len(shape) > 1 and shape[1] > 1
        problem = Problem("multilabel", shape[1]) if has_columns else Problem("binary", 2)
        if has_columns and rows == "classes" and targets.is_floating_point():
            problem = Problem("multiclass", shape[1])
        elif first is None and not bool(((targets == 0) | (targets == 1)).all()):  # synchronisation
            why = (
                "targets must be 0 or 1; class indices need outputs (B, C), shares of classes are targets.argmax(1) "
                "for metrics, 'mse' and 'mae' take numbers"
            )
        elif first is None and has_columns and rows is None and bool((targets.sum(1) == 1).all()):  # likewise
            logger.warning(
                "metrics %s: each target of the first batch has one of %d labels, and each label is judged by itself; "
                "if these are one-hot classes, return targets.argmax(1) as the step's targets",
                ", ".join(map(repr, names)),
                shape[1],
            )
    elif fitting and outputs.is_floating_point() and not targets.is_floating_point():
        problem = Problem("multiclass", shape[fitting[0]], fitting[0])
        if first is None and int(targets.max()) >= problem.size:  # synchronisation
            why = f"class indices must be below {problem.size}, got {int(targets.max())} (-100 is ignored)"
    else:
        why = "they fit no task: outputs are floats, (B, C) for integers (B,) or of the targets' shape"
    if not why and first is not None and problem != first:
        is_other_count = problem.task == "multiclass" and problem._replace(size=first.size) == first
        if is_other_count and "scores" not in views:
            return problem._replace(size=max(problem.size, first.size))
        why = f"the first batch was {first.in_words()}, this one is {problem.in_words()}"
        if is_other_count:
            why += " (of the names, 'roc_auc' cannot take more classes in)"
    if why:
        raise ValueError(
            f"metrics {', '.join(map(repr, names))} cannot judge outputs {tuple(shape)} {outputs.dtype}, targets "
            f"{tuple(wanted)} {targets.dtype}: {why}. The step may return other outputs and targets for them; "
            "or pass a torchmetrics.Metric instance."
        )
    return problem
