"""Weights in and out: read from a checkpoint, a registered model or a plain file, fitted to a model, exported.

Nothing here runs code from a file. Our own formats cannot hold any; files of `torch.save` go through torch's
unpickler for weights only, which knows tensors and plain values.
"""

import errno
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offloop.engine.checkpoint import (
    CheckpointInfo,
    CheckpointNotFoundError,
    CheckpointReader,
    find_checkpoint,
)
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.errors import ConfigError, WeightsError, WeightsMismatchError
from offloop.engine.recovery.resume_plan import read_run_json
from offloop.engine.training.averages import AVERAGE, MEASURED
from offloop.engine.training.wrappers import renamed
from offloop.engine.weights.registry import DEFAULT_REGISTRY, ModelRegistry, ModelVersion

logger = logging.getLogger("offloop")

Place = Path | CheckpointInfo | ModelVersion
"""A source that was found: a file, a checkpoint, a registered version."""
Source = str | Mapping[str, Any] | Place
"""Where weights come from, see `load_model`."""
M = TypeVar("M", bound=torch.nn.Module)

FILE_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
SAFE_TORCH: Final = (2, 10)
"""Before this, a file made for it could run code in spite of `weights_only=True` (CVE-2025-32434, CVE-2026-24747)."""
SAFETENSORS_FILE: Final = "model.safetensors"
SHARDS_INDEX: Final = "model.safetensors.index.json"
EXTRA_STATE: Final = "_extra_state"
"""The end of torch's name for what a module keeps beside tensors."""
SHOWN_NAMES: Final = 10


@dataclass(frozen=True)
class Weights:
    """A state dict, on the CPU, and where it is from."""

    tensors: dict[str, Any]
    origin: str
    """In words, for messages and records."""
    description: dict[str, Any] = field(default_factory=dict)
    """What is known of the run that made them: the content of its `run.json`; empty if it is not known."""
    info: CheckpointInfo | None = None
    """The checkpoint that they were read from."""
    version: ModelVersion | None = None
    """The registered version that they were read from."""


@dataclass(frozen=True)
class WeightsReport:
    """What went into a model and what did not."""

    origin: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Names that the model has and the weights have not."""
    unexpected: tuple[str, ...] = ()
    """Names that the weights have and the model has not."""
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """By name: the shape of the weights, the shape of the model."""

    @property
    def is_exact(self) -> bool:
        """True if everything fitted."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in self.mismatched.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "other shapes": shapes}
        lines = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names]
        return "\n  ".join([f"{self.origin}: {len(self.loaded)} names fit the model", *lines])


# In ------------------------------------------------------------------------------------------------


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
    """Return a state dict, on the CPU; or put it into a model and return that. Blocks. Runs no code from a file.

    | `source` | |
    |---|---|
    | `"name:3"`, `"name@champion"`, `"name"` | a registered version, by number or alias; the newest |
    | `"runs/first"`, `"runs/first@best"`, `"runs/first:1200"` | a run's last checkpoint, best or tagged, of a step |
    | `"runs/first/checkpoints/step-..."` | a checkpoint |
    | `"x.safetensors"`, `"x.pt"`, `"x.pth"`, `"x.ckpt"`, `"x.bin"`, a folder with `model.safetensors` | plain weights |
    | a mapping, a `ModelVersion` | a state dict, a registered version that was found before |

    Of a checkpoint it is the weights that its validation metrics belong to: the model's, or those of a
    `WeightAverage` that validations ran with. `key="model"` gives the weights in training, `key="average"` the average.

    A string without a slash and without such a suffix is the name of a registered model. Of our own formats
    every byte is checked against its checksum.

    Args:
        source: As above.
        into: A model, whatever its device and dtypes: values are copied into its tensors.
        strict: With `into`: raise unless names and shapes are exactly the model's. False: load what fits
            and log what does not.
        key: In a file of `torch.save`: which entry is the state dict. Not needed where only one can be. Of a
            checkpoint: `"model"` or `"average"`.
        prefix: Take only names that begin with it, without it: `"model."` for a Lightning module's `self.model`.
        registry: The directory of registered models.

    Raises:
        WeightsMismatchError: With `strict`, the model is another one, and is unchanged; without, nothing fits.
        WeightsError: The file is missing, is no plain weights, or the `key` or `prefix` is not in it.
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


def locate(source: str | Path, *, registry: str | Path = DEFAULT_REGISTRY) -> Place:
    """Return what a source means, without reading tensors. Blocks, shortly.

    Raises:
        WeightsError, ModelNotFoundError, CheckpointError: There is none.
    """
    source = os.path.expanduser(source) if isinstance(source, str) else source.expanduser()
    text = str(source)
    path = Path(source)
    has_suffix = path.suffix in FILE_SUFFIXES
    if isinstance(source, str) and not (has_suffix or "/" in text or os.sep in text):
        hint = ""
        if path.exists():
            hint = f". A path needs a slash: ./{text}"
        return ModelRegistry(registry).find(text, hint=hint)
    if path.is_file():
        return path
    if path.is_dir() and not (path / MANIFEST).is_file():
        for name in (SAFETENSORS_FILE, SHARDS_INDEX):
            if (path / name).is_file():
                return path / name
    if has_suffix and not path.exists():
        raise WeightsError(f"there is no file {path}")
    return find_checkpoint(source)


def read_weights(
    source: Source,
    *,
    key: str | None = None,
    prefix: str = "",
    registry: str | Path = DEFAULT_REGISTRY,
) -> Weights:
    """Return the weights that a source means. Blocks. Errors and arguments as for `load_model`."""
    if isinstance(source, torch.nn.Module):
        raise WeightsError("a model is no source of weights: give its model.state_dict()")
    if isinstance(source, Mapping):
        weights = Weights(_state_dict_in(source, key, "the mapping"), "a state dict")
    elif isinstance(source, CheckpointInfo | ModelVersion):
        weights = _read_own(source, key)
    elif isinstance(source, str | Path):
        place = locate(source, registry=registry)
        if isinstance(place, Path):
            weights = Weights(_read_file(place, key), str(place))
        else:
            weights = _read_own(place, key)
    else:
        raise TypeError(f"weights come from a name, a path or a state dict, got {type(source).__name__}")
    if prefix:
        chosen = {
            name[len(prefix) :]: each for name, each in weights.tensors.items() if name.startswith(prefix)
        }
        if not chosen:
            raise WeightsError(
                f"{weights.origin}: no name begins with {prefix!r}; there are {_listed(weights.tensors)}"
            )
        weights = Weights(chosen, weights.origin, weights.description, weights.info, weights.version)
    return weights


def _read_own(place: CheckpointInfo | ModelVersion, key: str | None) -> Weights:
    """Read the model of a checkpoint or of a registered version, every byte checked."""
    info = place.info if isinstance(place, ModelVersion) else place
    reader = CheckpointReader(info.path.parent.parent)
    if key is None:
        key = _measured_key(reader, info)
    elif not re.fullmatch(rf"model|{AVERAGE}(_\d+)?", key):
        raise WeightsError(
            f"{info.path} has no weights under key={key!r}: there are 'model' and, with a WeightAverage, {AVERAGE!r}"
        )
    try:
        state = reader.load_part(info, key)
    except CheckpointNotFoundError as error:
        if error.wanted != key:
            raise
        raise WeightsError(f"{info.path} holds no {key}: its weights are those of key='model'") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{info.path} holds no state dict as its {key}")
    which = "" if key == "model" else f" ({key})"
    if isinstance(place, ModelVersion):
        return Weights(dict(state), f"{place} ({place.identity[:19]}){which}", dict(place.run), info, place)
    return Weights(dict(state), f"{info.path}{which}", read_run_json(info.path.parent.parent), info)


def _measured_key(reader: CheckpointReader, info: CheckpointInfo) -> str:
    """Return the key of the weights that the scores of a checkpoint belong to; `model` where it does not say so."""
    try:
        key = reader.load_part(info, MEASURED)
    except CheckpointNotFoundError as error:
        if error.wanted != MEASURED:
            raise
        return "model"
    return key if isinstance(key, str) else "model"


def _read_file(path: Path, key: str | None) -> dict[str, Any]:
    if path.suffix == ".safetensors" or path.name == SHARDS_INDEX:
        if key is not None:
            raise WeightsError(f"{path} has no entries to choose from: leave key={key!r} out")
        return _read_shards(path) if path.name == SHARDS_INDEX else _read_safetensors(path)
    return _state_dict_in(_unpickle_weights(path), key, str(path))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        # Not a memory map: somebody may change or shorten the file later.
        with safe_open(path, framework="pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def _read_shards(index: Path) -> dict[str, Any]:
    """Read a model that is spread over several files, as large ones of Hugging Face are."""

    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    try:
        shards = sorted(set(msgspec.json.decode(index.read_bytes(), type=Index).weight_map.values()))
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightsError(f"{index} cannot be read: {error}") from error
    if strange := [name for name in shards if Path(name).name != name]:
        raise WeightsError(f"{index} names a file elsewhere: {strange[0]!r}")
    tensors: dict[str, Any] = {}
    for name in shards:
        tensors |= _read_safetensors(index.with_name(name))
    return tensors


def _unpickle_weights(path: Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain values, and nothing else."""
    version = tuple(int(number) for number in re.findall(r"\d+", str(torch.__version__))[:2])
    if version < SAFE_TORCH:
        raise WeightsError(
            f"torch {torch.__version__} cannot read {path} safely (CVE-2026-24747): update torch to 2.10, or have "
            "the weights as .safetensors. If you trust the file, torch.load it yourself and give the state dict"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except (
        Exception
    ) as error:  # torch raises what comes: UnpicklingError, RuntimeError, EOFError, KeyError, ...
        strange = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if strange is None:
            first = (str(error).splitlines() or [""])[0]
            raise WeightsError(
                f"{path} is no file of torch.save that holds weights: {type(error).__name__}: {first[:200]}"
            ) from error
        raise WeightsError(
            f"{path} holds more than tensors and plain values ({strange[1]}), which only running code from the "
            "file could read. Save the weights alone, in the program that wrote it: "
            "torch.save(model.state_dict(), path)"
        ) from error


def is_state_dict(value: object) -> bool:
    """Tell whether this is names and tensors, and what modules keep beside them."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    tensors = [isinstance(each, torch.Tensor) or name.endswith(EXTRA_STATE) for name, each in value.items()]
    return bool(tensors) and all(tensors)


def _state_dict_in(content: object, key: str | None, origin: str) -> dict[str, Any]:
    """Return the state dict itself, or the only one inside of what it was wrapped in."""
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise WeightsError(f"{origin} has no entry {key!r}: it is {_described(content)}")
        if not is_state_dict(content[key]):
            raise WeightsError(f"entry {key!r} of {origin} is no state dict, but {_described(content[key])}")
        return dict(content[key])
    if is_state_dict(content):
        return dict(content)  # type: ignore[call-overload, no-any-return]  # a mapping, as was just checked
    found = (
        [name for name, each in content.items() if is_state_dict(each)]
        if isinstance(content, Mapping)
        else []
    )
    if len(found) == 1 and isinstance(content, Mapping):
        logger.info("%s: the state dict is its entry %r", origin, found[0])
        return dict(content[found[0]])
    if found:
        raise WeightsError(
            f"{origin} holds several state dicts, {', '.join(map(repr, found))}: say which, as in "
            f"load_model(..., key={found[0]!r}), whose result init_from= takes"
        )
    raise WeightsError(f"{origin} holds no state dict: it is {_described(content)}")


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping of {_listed([repr(name) for name in value])}" if value else "an empty mapping"
    return f"a {type(value).__name__}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f", and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + rest


# Into a model --------------------------------------------------------------------------------------


def fit_weights(
    weights: Weights,
    model: torch.nn.Module,
    *,
    strict: bool,
    partial: str = "strict=False loads what fits.",
) -> WeightsReport:
    """Copy weights into a model: all, or with `strict=False` those that fit. Blocks.

    Names of a wrapped model (`module.`, `_orig_mod.`) fit the bare one, and the other way round. A name that the
    weights leave out is not missing if the model ties it to one that they have.

    Args:
        weights: Values are converted to the model's dtypes and devices.
        model: Changed in place; not at all if this raises.
        strict: Raise unless everything fits.
        partial: What to do where only a part fits, for the error.

    Raises:
        WeightsMismatchError: Something does not fit; or nothing does.
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
    """Put the model's state of a checkpoint back, exactly. Blocks.

    Raises:
        WeightsMismatchError: It is of another model; the text says how to begin from what fits.
    """
    try:
        model.load_state_dict(renamed(saved, model.state_dict()))
    except RuntimeError as error:
        partial = f'To begin a new run with the weights that fit: train(..., init_from="{origin}", init_strict=False)'
        fit_weights(Weights(dict(saved), origin), model, strict=True, partial=partial)
        raise ConfigError(f"the checkpoint {origin} does not fit the model: {error}") from error


def _differ_in_shape(theirs: object, mine: object) -> bool:
    if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
        return False  # extra state: the module itself says what it takes
    return not torch.nn.parameter.is_lazy(mine) and theirs.shape != mine.shape


def _memory(value: object) -> object:
    """Return what two names of one tied tensor have in common; None for what has no memory."""
    if not isinstance(value, torch.Tensor) or torch.nn.parameter.is_lazy(value) or not value.numel():
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _hint(report: WeightsReport, own: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Say what to do if all that differs is a prefix."""
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


# What a run begins from ----------------------------------------------------------------------------


@dataclass(frozen=True)
class InitialWeights:
    """A checked `init_from=`, to be read when the run starts."""

    source: Mapping[str, Any] | Place
    strict: bool

    def load_into(self, model: torch.nn.Module) -> Weights:
        """Read and fit the weights; say in the log what did not fit. Blocks. Errors as for `load_model`."""
        weights = read_weights(self.source)
        report = fit_weights(weights, model, strict=self.strict, partial="init_strict=False loads what fits.")
        logger.log(logging.INFO if report.is_exact else logging.WARNING, "init_from: %s", report)
        return weights


def plan_init(init_from: Source | None, strict: bool, *, will_resume: bool) -> InitialWeights | None:
    """Return what to begin from, None for the model as it is. Blocks, shortly: no tensor is read.

    Args:
        init_from: As given to `train()`.
        strict: Whether names and shapes must be exactly the model's.
        will_resume: A checkpoint is continued. What `init_from` names need not be there any more then.

    Raises:
        ConfigError: It is nothing that weights could be read from.
        WeightsError, ModelNotFoundError, CheckpointError: There is nothing of that name.
    """
    if not isinstance(strict, bool):
        raise ConfigError(f"init_strict must be True or False, got {strict!r}")
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
        return InitialWeights(_state_dict_in(init_from, None, "init_from"), strict)
    place = locate(init_from) if isinstance(init_from, str | Path) else init_from
    return InitialWeights(place, strict)


# Out -----------------------------------------------------------------------------------------------


def export_model(
    source: Source,
    path: str | Path,
    *,
    key: str | None = None,
    registry: str | Path = DEFAULT_REGISTRY,
    overwrite: bool = False,
) -> Path:
    """Write a model's weights as a plain file that other tools read, and return its path. Blocks until it is durable.

    Every name of the state dict is in the file: tied tensors are written once for each name, so that the file
    loads strictly anywhere. The metadata of a safetensors file say `format: pt`, which Hugging Face's readers
    ask for, and which run, step and registered version the weights are from.

    Args:
        source: As for `load_model`.
        path: Ends in `.safetensors`, or in `.pt` or `.pth` for `torch.save`.
        key: As for `load_model`.
        registry: As for `load_model`.
        overwrite: Replace a file that is there; it is whole at any time.

    Raises:
        WeightsError: The file exists, or cannot hold something that is in the state dict.
    """
    target = Path(path).expanduser()
    if target.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsError(f"path must end in .safetensors, .pt or .pth, got {target.name!r}")
    if not target.parent.is_dir():
        raise WeightsError(f"there is no directory {target.parent}")
    if target.exists() and not overwrite:
        raise WeightsError(f"{target} exists: overwrite=True replaces it")
    weights = read_weights(source, key=key, registry=registry)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # anew: a link that stands there would be written through
            mode = os.fstat(file.fileno()).st_mode
        if target.suffix == ".safetensors":
            save_file(_separate(weights), temporary, _metadata(weights))
            os.chmod(temporary, mode)  # safetensors leaves it readable by nobody else
        else:
            torch.save(weights.tensors, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise WeightsError(f"{target} cannot be written: {'the disk is full' if full else error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _separate(weights: Weights) -> dict[str, torch.Tensor]:
    """Return tensors that safetensors can hold: contiguous, and no two in the same memory."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in weights.tensors.items():
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"safetensors cannot hold {name!r}, a {type(value).__name__}: export to .pt")
        if value.dtype in (torch.complex32, torch.complex128):
            raise WeightsError(f"safetensors cannot hold {name!r}, of {value.dtype}: export to .pt")
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        memory = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if memory in seen else plain
        if plain.numel():
            seen.add(memory)
    return tensors


def _metadata(weights: Weights) -> dict[str, str]:
    """Return where weights are from, without the paths of this machine: files are given away."""
    known = {"format": "pt"}
    if weights.version is not None:
        known |= {"offloop.model": str(weights.version), "offloop.identity": weights.version.identity}
    if weights.info is not None:
        manifest = weights.info.manifest
        known |= {"offloop.run_id": manifest.run_id, "offloop.step": str(manifest.step)}
    return known
