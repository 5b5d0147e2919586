"""Weights into a model: read from a source, fitted by name and shape."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from offloop.engine import checks
from offloop.engine.checkpoint import CheckpointInfo
from offloop.engine.errors import ConfigError, WeightsError, WeightsMismatchError
from offloop.engine.training.wrappers import renamed
from offloop.engine.weights.registry_reader import DEFAULT_REGISTRY, ModelVersion
from offloop.engine.weights.source import Place, Source, Weights, listed, locate, read_weights, state_dict_in

logger = logging.getLogger("offloop")

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class WeightsReport:
    """Which weights were loaded into a model and which were not."""

    origin: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Names that only the model has."""
    unexpected: tuple[str, ...] = ()
    """Names that only the weights have."""
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """By name: the shape of the weights, then that of the model."""

    @property
    def is_exact(self) -> bool:
        """True if everything fits."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in self.mismatched.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "other shapes": shapes}
        lines = [f"{kind} ({len(names)}): {listed(names)}" for kind, names in kinds.items() if names]
        return "\n  ".join([f"{self.origin}: {len(self.loaded)} names fit the model", *lines])


@overload
def load_model(
    source: Source,
    *,
    into: None = None,
    strict: bool = True,
    key: str | None = None,
    prefix: str = "",
    registry: str | Path = DEFAULT_REGISTRY,
) -> dict[str, Any]: ...


@overload
def load_model(
    source: Source,
    *,
    into: M,
    strict: bool = True,
    key: str | None = None,
    prefix: str = "",
    registry: str | Path = DEFAULT_REGISTRY,
) -> M: ...


def load_model(
    source: Source,
    *,
    into: torch.nn.Module | None = None,
    strict: bool = True,
    key: str | None = None,
    prefix: str = "",
    registry: str | Path = DEFAULT_REGISTRY,
) -> Any:
    """Return a state dict on the CPU, or load it into a model and return the model. Blocks. Runs no code from a file.

    | `source` | |
    |---|---|
    | `"name:3"`, `"name@champion"`, `"name"` | a registered version, by number or alias; the newest |
    | `"runs/first"`, `"runs/first@best"`, `"runs/first:1200"` | a run's last checkpoint, best or tagged, of a step |
    | `"runs/first/checkpoints/step-..."` | a checkpoint |
    | `"x.safetensors"`, `"x.pt"`, `"x.pth"`, `"x.ckpt"`, `"x.bin"`, a folder with `model.safetensors` | plain weights |
    | a mapping, a `ModelVersion` | a state dict, a registered version |

    A checkpoint gives the weights that its validation metrics belong to: the model's, or those of a
    `WeightAverage` that validations ran with. `key="model"` gives the weights in training, `key="average"` the average.

    A string without a slash and without such a suffix is the name of a registered model. In our own formats
    every byte is checked against its checksum.

    Args:
        source: As above.
        into: A model on any device, with any dtypes; values are copied into its tensors.
        strict: With `into`: raise unless names and shapes are exactly the model's. False: load what fits
            and log what does not.
        key: For a file of `torch.save`: the entry that is the state dict, if there are several. For a
            checkpoint: `"model"` or `"average"`.
        prefix: Take only names that begin with it, and remove it: `"model."` for a Lightning module's `self.model`.
        registry: The directory of registered models.

    Raises:
        WeightsMismatchError: With `strict`, something does not fit; without, nothing fits. The model is unchanged.
        WeightsError: The file is missing or not plain weights, or the `key` or `prefix` is not in it.
        ModelNotFoundError: There is no such registered model, version or alias.
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    weights = read_weights(source, key=key, prefix=prefix, registry=registry)
    if into is None:
        return weights.tensors
    report = fit_weights(weights, into, strict=strict)
    if not report.is_exact:
        logger.warning("%s", report)
    return into


def fit_weights(
    weights: Weights,
    model: torch.nn.Module,
    *,
    strict: bool,
    partial: str = "strict=False loads what fits.",
) -> WeightsReport:
    """Copy weights into a model: all, or with `strict=False` those that fit. Blocks.

    Names of a wrapped model (`module.`, `_orig_mod.`) fit the bare one, and vice versa. A name is not missing if
    the model ties it to one that the weights have.

    Args:
        weights: Values are converted to the model's dtypes and devices.
        model: Changed in place; unchanged if this raises.
        strict: Raise unless everything fits.
        partial: Advice in the error where only a part fits.

    Raises:
        WeightsMismatchError: Something does not fit; without `strict`, nothing does.
    """
    own = model.state_dict()
    if any(isinstance(each, torch.Tensor) and each.is_meta for each in own.values()):
        raise WeightsError(
            'the model is on the "meta" device and has no memory: model.to_empty(device=...) first'
        )
    tensors = renamed(weights.tensors, own)
    mismatched = {
        name: (tuple(tensors[name].shape), tuple(mine.shape))
        for name, mine in own.items()
        if name in tensors and _differ_in_shape(tensors[name], mine)
    }
    fitting = [name for name in own if name in tensors and name not in mismatched]
    held = {_memory(own[name]) for name in fitting} - {None}
    report = WeightsReport(
        weights.origin,
        loaded=tuple(fitting),
        missing=tuple(n for n in own if n not in tensors and _memory(own[n]) not in held),
        unexpected=tuple(name for name in tensors if name not in own),
        mismatched=mismatched,
    )
    if not report.is_exact and (strict or not fitting):
        hint = _hint(report, own, tensors) or partial
        raise WeightsMismatchError(
            f"{report}\n  {hint}",
            missing=report.missing,
            unexpected=report.unexpected,
            mismatched=report.mismatched,
        )
    model.load_state_dict({name: tensors[name] for name in fitting}, strict=False)
    return report


def load_weights(model: torch.nn.Module, saved: Mapping[str, Any], origin: str) -> None:
    """Restore the model's state from a checkpoint, exactly. Blocks.

    Raises:
        WeightsMismatchError: It belongs to another model; the text says how to start from what fits.
    """
    try:
        model.load_state_dict(renamed(saved, model.state_dict()))
    except RuntimeError as error:
        partial = f'To begin a new run with the weights that fit: train(..., init_from="{origin}", init_strict=False)'
        fit_weights(Weights(dict(saved), origin), model, strict=True, partial=partial)
        raise ConfigError(f"the checkpoint {origin} does not fit the model: {error}") from error


def _differ_in_shape(theirs: object, mine: object) -> bool:
    if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
        # Extra state: the module itself decides.
        return False
    return not torch.nn.parameter.is_lazy(mine) and theirs.shape != mine.shape


def _memory(value: object) -> object:
    """Return a key that all names of one tied tensor share; None for a value without memory."""
    if not isinstance(value, torch.Tensor) or torch.nn.parameter.is_lazy(value) or not value.numel():
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _hint(report: WeightsReport, own: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Return what to do if only a prefix differs."""
    if not report.missing or not report.unexpected:
        return ""
    for prefix in _prefixes(report.unexpected[0]):
        if all(prefix + name in tensors for name in report.missing):
            return (
                f"Names begin with {prefix!r}: load_model(..., prefix={prefix!r}) takes it off, and init_from= takes "
                "the result."
            )
    for prefix in _prefixes(report.missing[0]):
        if all(prefix + name in own for name in report.unexpected):
            part = prefix.rstrip(".")
            return f"They are the weights of a part of the model: load_model(..., into=model.{part})."
    return ""


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]


@dataclass(frozen=True)
class InitialWeights:
    """A checked `init_from=`. It is read when the run starts."""

    source: Mapping[str, Any] | Place
    strict: bool

    def load_into(self, model: torch.nn.Module) -> Weights:
        """Read and fit the weights; log what did not fit. Blocks. Errors are those of `load_model`."""
        weights = read_weights(self.source)
        report = fit_weights(weights, model, strict=self.strict, partial="init_strict=False loads what fits.")
        logger.log(logging.INFO if report.is_exact else logging.WARNING, "init_from: %s", report)
        return weights


def plan_init(init_from: Source | None, strict: bool, *, will_resume: bool) -> InitialWeights | None:
    """Return the weights to start from, None for the model as it is. Blocks briefly: reads no tensor.

    Args:
        init_from: As given to `train()`.
        strict: Whether names and shapes must be exactly the model's.
        will_resume: Whether a checkpoint is continued. Then `init_from` may have been deleted.

    Raises:
        ConfigError: `init_from` is no source of weights.
        WeightsError, ModelNotFoundError, CheckpointError: The source does not exist.
    """
    checks.flag("init_strict", strict)
    if init_from is None:
        return None
    if isinstance(init_from, torch.nn.Module):
        raise ConfigError("init_from takes weights, not a model: give other_model.state_dict()")
    if not isinstance(init_from, str | Path | Mapping | CheckpointInfo | ModelVersion) or not init_from:
        raise ConfigError(
            "init_from must be a path, a registered model like 'name@alias' or 'name:3', or a state dict; got "
            f"{init_from!r}"
        )
    if will_resume:
        logger.info("init_from is not used: a run is resumed")
        return None
    if isinstance(init_from, Mapping):
        return InitialWeights(state_dict_in(init_from, None, "init_from"), strict)
    place = locate(init_from) if isinstance(init_from, str | Path) else init_from
    return InitialWeights(place, strict)
