"""Where weights come from: a checkpoint, a registered model, a plain file, a state dict.

Nothing here runs code from a file. Our own formats cannot hold any; files of `torch.save` go through torch's
unpickler for weights only, which accepts tensors and plain values.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from offloop.engine.checkpoint import (
    CheckpointInfo,
    CheckpointNotFoundError,
    CheckpointReader,
    find_checkpoint,
)
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.checkpoint.reference import split_reference
from offloop.engine.errors import ModelNotFoundError, WeightsError
from offloop.engine.paths import meant_run
from offloop.engine.run_dir import read_run_json
from offloop.engine.training.averages import AVERAGE, MEASURED
from offloop.engine.weights.registry_reader import DEFAULT_REGISTRY, ModelVersion, RegistryReader

logger = logging.getLogger("offloop")

Place = Path | CheckpointInfo | ModelVersion
"""A source that exists: a file, a checkpoint, a registered version."""
Source = str | Mapping[str, Any] | Place
"""Where weights come from, see `load_model`."""

FILE_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
SAFE_TORCH: Final = (2, 10)
"""Earlier versions of torch could run code from a file in spite of `weights_only=True` (CVE-2025-32434,
CVE-2026-24747)."""
SAFETENSORS_FILE: Final = "model.safetensors"
SHARDS_INDEX: Final = "model.safetensors.index.json"
EXTRA_STATE: Final = "_extra_state"
"""The end of torch's name for a module's state that is not a tensor."""
SHOWN_NAMES: Final = 10


@dataclass(frozen=True)
class Weights:
    """A state dict on the CPU, and its origin."""

    tensors: dict[str, Any]
    origin: str
    """Where they come from, in words."""
    description: dict[str, Any] = field(default_factory=dict)
    """The `run.json` of the run that made them; empty if unknown."""
    info: CheckpointInfo | None = None
    """The checkpoint that they were read from."""
    version: ModelVersion | None = None
    """The registered version that they were read from."""


def locate(source: str | Path, *, registry: str | Path = DEFAULT_REGISTRY) -> Place:
    """Find a source without reading tensors. Blocks briefly.

    Raises:
        WeightsError, ModelNotFoundError, CheckpointError: It does not exist.
    """
    source = os.path.expanduser(source) if isinstance(source, str) else source.expanduser()
    text = str(source)
    path = Path(source)
    has_suffix = path.suffix in FILE_SUFFIXES
    if isinstance(source, str) and not (has_suffix or "/" in text or os.sep in text):
        try:
            return RegistryReader(registry).find(text)
        except ModelNotFoundError as error:
            name, which = split_reference(text)
            if error.wanted != name:
                # The model is there
                raise
            hint = meant_run(name, "" if which is None else text[len(name) :])
            if path.exists():
                hint = f". A path needs a slash: ./{text}"
            raise ModelNotFoundError(name, error.directory, error.known, hint) from None
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
    """Return the weights of a source. Blocks. Arguments and errors are those of `load_model`."""
    if isinstance(source, torch.nn.Module):
        raise WeightsError("a model is no source of weights: give its model.state_dict()")
    if isinstance(source, Mapping):
        weights = Weights(state_dict_in(source, key, "the mapping"), "a state dict")
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
                f"{weights.origin}: no name begins with {prefix!r}; there are {listed(weights.tensors)}"
            )
        weights = replace(weights, tensors=chosen)
    return weights


def _read_own(place: CheckpointInfo | ModelVersion, key: str | None) -> Weights:
    """Read the model of a checkpoint or of a registered version, and check every byte."""
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
    """Return the key of the weights that a checkpoint's scores belong to; `model` unless it says otherwise."""
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
    return state_dict_in(_unpickle_weights(path), key, str(path))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        # Not a memory map, because the file may be changed or shortened later.
        with safe_open(path, framework="pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def _read_shards(index: Path) -> dict[str, Any]:
    """Read a model that is spread over several files, as Hugging Face does with large ones."""

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
    """Read a file of `torch.save` that holds nothing but tensors and plain values."""
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
    # torch raises UnpicklingError, RuntimeError, EOFError, KeyError, ...
    except Exception as error:
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
    """Tell whether a value is a mapping of names to tensors; extra state of modules is allowed."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    tensors = [isinstance(each, torch.Tensor) or name.endswith(EXTRA_STATE) for name, each in value.items()]
    return bool(tensors) and all(tensors)


def state_dict_in(content: object, key: str | None, origin: str) -> dict[str, Any]:
    """Return the content if it is a state dict, else the entry `key`, or the only entry that is one."""
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
        return f"a mapping of {listed([repr(name) for name in value])}" if value else "an empty mapping"
    return f"a {type(value).__name__}"


def listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    rest = f", and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + rest
