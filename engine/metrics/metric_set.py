"""Metrics over one whole pass of a data set, computed by torchmetrics.

A name gives the same value as this scikit-learn call on the concatenated data set with `zero_division=0` (aliases in
brackets; scikit-learn's function names are aliases, too).

    accuracy (acc)           accuracy_score; with several labels per sample, all must be right
    precision, recall        precision_score, recall_score with average="macro"
    f1_score (f1)            f1_score(average="macro")
    roc_auc (auroc, auc)     roc_auc_score(average="macro", multi_class="ovr")
    mse, rmse, mae, r2       mean_squared_error, its root, mean_absolute_error, r2_score

Macro is the mean over the classes, in binary tasks too (of "no" and "yes"); the score of "yes" alone is
`torchmetrics.classification.BinaryF1Score()`. `roc_auc` skips classes and labels without a positive or without a
negative sample, and **keeps all outputs and targets of the pass on the device**. `mse` to `r2` take outputs and
targets of one shape, where (B, 1) and (B,) are the same, and sum in float64; `r2` is the mean over the columns of
(B, D). torchmetrics treats sums of squares below 1e-4 as 0, so `r2` is wrong for targets in small units.

The first batch decides the task of the other names (binary, multiclass, multilabel); see `problem.py`. Positions
after the class dimension (pixels, tokens) count as samples. Negative class indices, like the -100 of
`cross_entropy`, do not count. Outputs are probabilities if all outputs *of the pass* lie in [0, 1], else logits. One
batch cannot decide that: the first logits of a new network often lie in [0, 1], and those of a zero-initialised head
always do. (B = batch, D = numbers per sample.)

Code that needs torchmetrics is in `named.py`. The training thread imports it before a run starts: with SciPy
installed the import can take as long as torch's, and must not block an event loop.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offloop.engine.lazy_imports import first_use
from offloop.engine.metrics.names import NAMES, ONE_NUMBER, MetricSpec, chosen_metrics
from offloop.engine.metrics.problem import Problem, Rows, problem_of

if TYPE_CHECKING:
    from torchmetrics import Metric

    from offloop.engine.metrics.named import Sums


logger = logging.getLogger("offloop")


class MetricSet:
    """The metrics of one data set (train or validation), added up batch by batch.

    A user's metric is cloned, and named by its class in snake case or by the mapping's key. It gets outputs and
    targets unchanged (half precision as float32). With the default `validate_args=True` most torchmetrics classes wait
    for a CUDA device on every batch.

    Thread: training thread only. Only `compute` and the first `update` block.
    """

    names: tuple[str, ...]
    """The keys without prefix, aliases resolved, in the given order; known before the first batch."""

    def __init__(self, metrics: MetricSpec, *, prefix: str, device: torch.device, rows: Rows = None) -> None:
        """Prepare a pass. Raises as `check_metrics`.

        Args:
            metrics: Names and instances.
            prefix: Prefix of each key.
            device: Device of the batches.
            rows: What targets of the outputs' shape hold; see `rows_of`.
        """
        self._spec = metrics
        self._chosen = chosen_metrics(metrics)
        self.names = tuple(self._chosen)
        self._kinds = [f"{name}: {type(metric).__name__}" for name, metric in self._chosen.items()]
        self._prefix, self._device, self._batches = prefix, device, 0
        # Shapes of the last batch
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        self._rows = rows
        # Decided by the first batch, which also creates the sums
        self._problem: Problem | None = None
        # The sums of the named metrics, and the user's metrics
        self._sums: list[Sums] = []
        self._own: dict[str, Metric] = {}
        # True in a resumed pass with names that started later than others of their kind
        self._is_split = False
        # Names that started in the middle of this pass, after so many batches; NaN until the next batch
        self._late: frozenset[str] = frozenset()
        self._late_since = 0

    def load_packages(self) -> None:
        """Import torchmetrics. Blocks for seconds the first time; otherwise the first `update` would."""
        with first_use("torchmetrics"):
            import offloop.engine.metrics.named  # noqa: F401 - the import is the purpose

    def add(self, outputs: Any, targets: Any, step: str) -> None:
        """Add the outputs and targets that a step returned.

        Raises:
            ValueError: The first batch has none, or they do not fit; see `update`.
        """
        if outputs is not None and targets is not None:
            self.update(outputs, targets)
        elif self._problem is None:
            data_set = "val" if self._prefix == "train_" else "train"
            raise ValueError(
                f"metrics {', '.join(map(repr, self.names))} need outputs and targets: return {{'loss': loss, "
                f"'outputs': outputs, 'targets': targets}} from {step}, or compute metrics of the other data set "
                f"only: metrics={{{data_set!r}: [...]}}"
            )

    # Here and below: sums created in inference mode could not change outside of it
    @torch.inference_mode(False)
    def update(self, outputs: Any, targets: Any) -> None:
        """Add one batch; an empty one is ignored. Does not keep the autograd graph alive.

        Args:
            outputs: A tensor, or an object with a tensor as `logits`. Without named metrics, anything that the
                user's metrics accept.
            targets: A tensor; without named metrics, anything.

        Raises:
            ValueError: The first batch fits no task, or a later one a different task.
        """
        outputs = _logits(outputs)
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            if outputs.numel() == 0:
                return
            outputs, targets = outputs.detach(), targets.detach()
            if self._problem is None or self._shapes != (outputs.shape, targets.shape):
                problem = problem_of(self.named(), outputs, targets, self._problem, self._rows)
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
        # With shares of classes, the class is that with the largest share
        is_share = problem.task == "multiclass" and outputs.shape == targets.shape
        for sums in self._sums:
            wants_classes = is_share and not sums.takes_numbers
            sums.update(outputs, targets.argmax(problem.class_dim) if wants_classes else targets)

    def _expect_tensors(self, outputs: Any, targets: Any) -> None:
        """Raise if named metrics got anything but tensors."""
        named = self.named()
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

        Blocks until the device has finished its work: only here are metrics read back. A user's metric that returns a
        mapping has a key per entry, `<prefix><name>_<entry>`. No process waits for another one: those of several are
        merged first, see `merging.py`.

        Raises:
            ValueError: A user's metric did not return a single number.
        """
        if self._batches == 0:
            return {}
        unfed = self._unfed()
        results: dict[str, object] = dict.fromkeys(unfed, math.nan)
        results |= {name: metric.compute() for name, metric in self._own.items() if name not in unfed}
        for sums in self._sums:
            if unfed.isdisjoint(sums.metrics):
                results.update(sums.compute())
        values = dict(pair for name in self.names for pair in _flat(name, results[name]))
        # Host sync
        return {f"{self._prefix}{key}": float(value) for key, value in values.items()}

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Clear the sums and keep the task. Called before every pass; calling twice is fine."""
        self._batches, self._late = 0, frozenset()
        if self._is_split:
            assert self._problem is not None
            self._build(self._problem)
        for sums in self._sums:
            sums.reset()
        for metric in self._own.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the pass: plain values and copies of tensors, on their device. Does not block."""
        state = {
            "metrics": self._kinds,
            "batches": self._batches,
            "problem": self._problem and tuple(self._problem),
            "names": [list(sums.metrics) for sums in self._sums],
            "sums": [sums.state_dict() for sums in self._sums],
            "own": {name: metric.state_dict() for name, metric in self._own.items()},
        }
        if unfed := self._unfed():
            state["unfed"] = sorted(unfed)
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from a `state_dict`; results are bit for bit those of an uninterrupted pass.

        Returns:
            Names of metrics that the state lacks. They start here, and are NaN until the next batch.
        """
        with first_use("torchmetrics"):
            from torchmetrics import Metric

        from offloop.engine.metrics.named import sums_of

        problem = state["problem"] and Problem(*state["problem"])
        named = self.named()
        if problem is None or (
            problem.task == "regression" and any(NAMES[n].view != "numbers" for n in named)
        ):
            # The pass had not started, or its task does not fit the current metrics
            self._problem, self._shapes, self._batches = None, None, 0
            self._sums, self._own, self._is_split, self._late = [], {}, False, frozenset()
            if problem is not None:
                return list(self.names)
            kinds = zip(self.names, self._kinds, strict=True)
            return [name for name, kind in kinds if kind not in state["metrics"]]
        self._problem, self._shapes, self._batches = problem, None, state["batches"]
        self._build(problem)
        saved_names = state.get("names")
        # Early versions did not save the names
        if saved_names is None:
            of_state = [each.partition(": ")[0] for each in state["metrics"] if each.endswith(": NoneType")]
            saved_names = [list(sums.metrics) for sums in sums_of(of_state, problem, self._device)]
        whole, self._sums, new = len(self._sums), [], set(named)
        for names, saved in zip(saved_names, state["sums"], strict=True):
            kept = [name for name in names if name in new]
            # At most one, because these names share their sums
            for sums in sums_of(kept, problem, self._device):
                sums.load_state_dict(saved)
                self._sums.append(sums)
            new -= set(kept)
        self._sums += sums_of([name for name in named if name in new], problem, self._device)
        self._is_split = len(self._sums) > whole
        for name, metric in self._own.items():
            if f"{name}: {type(metric).__name__}" not in state["metrics"]:
                new.add(name)
                continue
            # A copy, because the metric adds to these tensors in place
            metric.load_state_dict(copy.deepcopy(state["own"][name]))
            metric.to(self._device)
            for member in (module for module in metric.modules() if isinstance(module, Metric)):
                # Not part of the state; at 0 `compute` warns
                member._update_count = self._batches
        self._late = frozenset(new).union(name for name in state.get("unfed", ()) if name in self.names)
        self._late_since = self._batches
        return [name for name in self.names if name in new]

    def anew(self) -> "MetricSet":
        """Return a set of the same metrics, before its first batch."""
        return MetricSet(self._spec, prefix=self._prefix, device=self._device, rows=self._rows)

    def of_the_user(self) -> "dict[str, Metric]":
        """Return the user's own metrics, as given, by name."""
        return {name: own for name, own in self._chosen.items() if own is not None}

    def of_the_user_in_use(self) -> "Iterator[tuple[str, Metric, Metric]]":
        """Yield the name of each user's metric, the clone that is given batches, and the user's own."""
        for name, own in self.of_the_user().items():
            if name in self._own:
                yield name, self._own[name], own

    def _unfed(self) -> frozenset[str]:
        """Return the names that started in the middle of this pass and had no batch since."""
        return self._late if self._batches == self._late_since else frozenset()

    def named(self) -> list[str]:
        """Return the names without the user's own metrics."""
        return [name for name, own in self._chosen.items() if own is None]

    def _build(self, problem: Problem) -> None:
        with first_use("torchmetrics"):
            from torchmetrics import Metric

            from offloop.engine.metrics.named import alone, sums_of

        self._sums, self._is_split = sums_of(self.named(), problem, self._device), False
        for name, own in self._chosen.items():
            if own is None:
                continue
            metric = self._own[name] = alone(own.clone()).to(self._device)
            # The user may have used it before
            metric.reset()
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
    """Return the `logits` of outputs that have them, as in Hugging Face models; else the outputs."""
    if isinstance(outputs, Tensor | list | tuple):
        # A named tuple may have `logits`
        return getattr(outputs, "logits", outputs)
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) else outputs


def _detached(item: Any) -> Any:
    """Return an item with its tensors detached, also in lists and mappings."""
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
