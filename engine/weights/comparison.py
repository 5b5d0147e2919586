"""Differences between two models: tensors, metrics, the configuration of their runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch

from offloop.engine.weights.registry_reader import DEFAULT_REGISTRY
from offloop.engine.weights.source import Source, Weights, read_weights

COMPARED_OF_RUN: Final = ("config", "hyperparameters", "versions", "git", "command", "init_from")
"""Entries of `run.json` that say how a model was made; run id, host and times always differ."""
NAMES_OF_RUN: Final = ("config.run_name", "config.run_dir")

Kind = Literal["values", "shape", "dtype", "only_in_a", "only_in_b"]


class TensorDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that differs between two models."""

    name: str
    kind: Kind
    """`values`, `dtype` (values are compared too), `shape`, or which model alone has it."""
    a: str | None
    """Type and shape in the first model, such as `float32[10, 64]`; None if it is not there."""
    b: str | None
    """Type and shape in the second model."""
    elements: int = 0
    """Elements of the tensor; 0 where values cannot be compared."""
    changed: int = 0
    """Elements that differ. Two NaN are equal."""
    max_abs: float = 0.0
    """The largest absolute difference; NaN if a number is compared with a NaN."""
    relative: float = 0.0
    """The norm of the difference, divided by the norm in the first; infinite if that is zero."""


class ModelComparison(msgspec.Struct, frozen=True, kw_only=True):
    """How two models differ."""

    a: str
    """The first, in words."""
    b: str
    """The second, in words."""
    same: int
    """Number of tensors that are equal, bit for bit or NaN for NaN."""
    tensors: list[TensorDifference]
    """The other tensors, in the order of the first model."""
    metrics: dict[str, tuple[float | None, float | None]]
    """Metrics of the two checkpoints that differ; None where one lacks it."""
    settings: dict[str, tuple[Any, Any]]
    """Differences in the configuration and the environment of the runs, like `config.seed`; None where one lacks it.
    Empty if nothing is known of the runs."""

    @property
    def is_equal(self) -> bool:
        """True if all tensors are equal; settings and metrics do not count."""
        return not self.tensors


def compare_models(a: Source, b: Source, *, registry: str | Path = DEFAULT_REGISTRY) -> ModelComparison:
    """Compare two models, given as for `load_model`. Blocks; holds both in memory.

    Raises:
        WeightsError, ModelNotFoundError, CheckpointError: One of them cannot be read.
    """
    first, second = read_weights(a, registry=registry), read_weights(b, registry=registry)
    tensors: list[TensorDifference] = []
    names = list(dict.fromkeys([*first.tensors, *second.tensors]))
    for name in names:
        difference = _compare(name, first.tensors.get(name), second.tensors.get(name))
        if difference is not None:
            tensors.append(difference)
    return ModelComparison(
        a=first.origin,
        b=second.origin,
        same=len(names) - len(tensors),
        tensors=tensors,
        metrics=_differing(_metrics(first), _metrics(second)),
        settings=_differing(_settings(first), _settings(second)),
    )


def _compare(name: str, a: object, b: object) -> TensorDifference | None:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        if type(a) is type(b) and a == b:
            return None
        kind: Kind = "only_in_b" if a is None else "only_in_a" if b is None else "values"
        return TensorDifference(name=name, kind=kind, a=_type_of(a), b=_type_of(b))
    if a.shape != b.shape:
        return TensorDifference(name=name, kind="shape", a=_type_of(a), b=_type_of(b))
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    differs = (x != y) & ~(x.isnan() & y.isnan())
    changed = int(differs.sum())
    if not changed and a.dtype == b.dtype:
        return None
    gap = torch.where(differs, x - y, torch.zeros((), dtype=wide)).abs()
    x_norm, gap_norm = float(torch.linalg.vector_norm(x)), float(torch.linalg.vector_norm(gap))
    return TensorDifference(
        name=name,
        kind="values" if a.dtype == b.dtype else "dtype",
        a=_type_of(a),
        b=_type_of(b),
        elements=a.numel(),
        changed=changed,
        max_abs=float(gap.max()) if gap.numel() else 0.0,
        relative=gap_norm / x_norm if x_norm else float("inf") if gap_norm else 0.0,
    )


def _type_of(value: object) -> str | None:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return None if value is None else type(value).__name__


def _metrics(weights: Weights) -> dict[str, float]:
    return {} if weights.info is None else weights.info.metrics


def _settings(weights: Weights) -> dict[str, Any]:
    """Return settings by their dotted names."""
    flat: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                walk(f"{name}.{key}", each)
        else:
            flat[name] = value

    for name in COMPARED_OF_RUN:
        walk(name, weights.description.get(name))
    # Knobs are among the hyperparameters, too
    again = [name for name in flat if f"config.{name.removeprefix('hyperparameters.')}" in flat]
    return {name: value for name, value in flat.items() if name not in (*NAMES_OF_RUN, *again)}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*a, *b])
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
