"""The argument `metrics=`: known names, whether less or more is better, and the check before a run starts.

`metric_set.py` defines the names, and explains why this module does not import torchmetrics.
"""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast

from offloop.engine.monitor import Direction

__all__ = [
    "check_metrics",
    "chosen_metrics",
    "metric_direction",
    "metrics_for",
]

if TYPE_CHECKING:
    from torchmetrics import Metric

MetricSpec: TypeAlias = "Sequence[str | Metric] | Mapping[str, Metric]"
"""Metrics of one data set: names and instances, or a mapping that names the instances."""

RunMetrics: TypeAlias = "MetricSpec | Mapping[str, MetricSpec]"
"""What `train(metrics=)` takes: metrics of both data sets, or a mapping `{"train": [...], "val": [...]}`."""

_DATA_SETS: Final = ("train", "val")

ONE_NUMBER: Final = 'use average="macro" or torchmetrics.ClasswiseWrapper, which gives each class a key'


class _Name(NamedTuple):
    aliases: str
    direction: Direction
    view: Literal["labels", "scores", "numbers"]
    """How the metric reads outputs and targets."""


NAMES: Final = {
    "accuracy": _Name("acc accuracy_score", "max", "labels"),
    "precision": _Name("precision_score", "max", "labels"),
    "recall": _Name("recall_score", "max", "labels"),
    "f1_score": _Name("f1 f1_macro", "max", "labels"),
    "roc_auc": _Name("auroc auc roc_auc_score", "max", "scores"),
    "mse": _Name("mean_squared_error", "min", "numbers"),
    "rmse": _Name("root_mean_squared_error", "min", "numbers"),
    "mae": _Name("mean_absolute_error", "min", "numbers"),
    "r2": _Name("r2_score", "max", "numbers"),
}
ALIASES: Final = {alias: name for name, known in NAMES.items() for alias in (name, *known.aliases.split())}


def metrics_for(data_set: Literal["train", "val"], metrics: RunMetrics) -> MetricSpec:
    """Return the metrics of one data set, out of the argument `metrics=` of `train()`.

    A mapping with a list or a mapping among its values is by data set, because a metric is neither.

    Raises:
        ValueError, TypeError: As `check_metrics`.
    """
    if not isinstance(metrics, Mapping):
        return metrics
    by_data_set = [
        key
        for key, each in metrics.items()
        if isinstance(each, Sequence | Mapping) and not isinstance(each, str)
    ]
    if not by_data_set:
        return cast("Mapping[str, Metric]", metrics)
    for key, each in metrics.items():
        if key not in _DATA_SETS:
            raise ValueError(
                f'metrics has a list under {by_data_set[0]!r}, so its keys are "train" and "val"; got {key!r}'
            )
        if key not in by_data_set:
            raise TypeError(
                f"metrics[{key!r}] must be a list of names and torchmetrics.Metrics, got {each!r}"
            )
    return cast("Mapping[str, MetricSpec]", metrics).get(data_set, ())


def check_metrics(metrics: MetricSpec) -> None:
    """Check metrics before a run starts. Touches no device.

    Raises:
        ValueError: An unknown name, a reserved or repeated key, a metric that gives one value per class.
        TypeError: A value that is neither a name nor a `torchmetrics.Metric`.
    """
    chosen_metrics(metrics)


def metric_direction(key: str, metrics: RunMetrics = ()) -> Direction | None:
    """Return whether less or more of a metric is better; None if unknown.

    The metric's `higher_is_better` decides first, then the table of names, then the last known word of the key:
    `val_dice_loss` -> min.

    Args:
        key: Prefixed key of the metric.
        metrics: The argument `metrics=` of `train()`.
    """
    name = re.sub("^(train|val|eval)_", "", key)
    own = chosen_metrics(metrics_for("train" if key.startswith("train_") else "val", metrics)).get(name)
    if own is not None and own.higher_is_better is not None:
        return "max" if own.higher_is_better else "min"
    for word in (name.lower(), *reversed(re.split(r"[^a-z0-9]+", name.lower()))):
        if word in ALIASES:
            return NAMES[ALIASES[word]].direction
        if re.fullmatch(r".*(loss|error)|err|mape|perplexity|ppl|nll|wer|cer|fid|hamming|brier|ece", word):
            return "min"
        if re.fullmatch(
            r"top\d|sensitivity|specificity|fbeta|auprc|map|m?iou|jaccard|dice|kappa|mcc|bleu|psnr", word
        ):
            return "max"
    return None


def chosen_metrics(metrics: MetricSpec) -> "dict[str, Metric | None]":
    """Return the user's metric, or None for a name, by key in the given order. Raises as `check_metrics`."""
    metric_class = _metric_class()
    if isinstance(metrics, str | metric_class) or not isinstance(metrics, Sequence | Mapping):
        hint = f": write metrics=[{metrics!r}]" if isinstance(metrics, str | metric_class) else ""
        raise TypeError(f"metrics must be a list of names and torchmetrics.Metrics, got {metrics!r}{hint}")
    is_mapping = isinstance(metrics, Mapping)
    pairs = metrics.items() if isinstance(metrics, Mapping) else [(_key(item), item) for item in metrics]
    chosen: dict[str, Metric | None] = {}
    for key, metric in pairs:
        if not isinstance(metric, metric_class if is_mapping else metric_class | str):
            wanted = "an instance of torchmetrics.Metric" + " or a name" * (not is_mapping)
            names = (
                ": names go into a list, like ['accuracy']" if is_mapping and isinstance(metric, str) else ""
            )
            raise TypeError(f"a metric must be {wanted}, got {metric!r}{names}")
        # The loop computes train_loss
        if not isinstance(key, str) or not key or key == "loss":
            raise ValueError(f"a metric cannot be called {key!r}; the key is a string, not 'loss'")
        if key in chosen:
            raise ValueError(f"metric {key!r} is given twice; use a mapping with different keys")
        # Refused here, not at the end of the first epoch. `vars`, because wrappers forward attributes
        if isinstance(metric, metric_class) and vars(metric).get("average", "macro") in (None, "none"):
            raise ValueError(f"metric {key!r} gives one value per class (average); {ONE_NUMBER}")
        chosen[key] = metric if isinstance(metric, metric_class) else None
    return chosen


def _key(metric: object) -> str:
    """Return the key of a metric in a list: its name, aliases resolved, or its class in snake case."""
    if not isinstance(metric, str):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(metric).__name__).lower()
    if (spelled := re.sub(r"[\s-]+", "_", metric.strip().lower())) in ALIASES:
        return ALIASES[spelled]
    near = "".join(f"did you mean {n!r}? " for n in difflib.get_close_matches(spelled, ALIASES, n=1))
    known = ", ".join(map(repr, NAMES))
    raise ValueError(
        f"metric {metric!r} is unknown; {near}the names are {known}; or pass a torchmetrics.Metric"
    )


class _Nothing:
    """A class without instances."""


def _metric_class() -> "type[Metric]":
    """Return torchmetrics' base class; until it exists, a class without instances.

    Neither imports nor waits for an import, because event loops call this too. Reads the module that defines the class,
    because the package has no `Metric` while another thread imports it.
    """
    metric_class: Any = getattr(sys.modules.get("torchmetrics.metric"), "Metric", _Nothing)
    return metric_class  # type: ignore[no-any-return]  # of a module found by name
