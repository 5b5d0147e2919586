"""Weights as a plain file that other tools read."""

import errno
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from offloop.engine.errors import WeightsError
from offloop.engine.weights.registry_reader import DEFAULT_REGISTRY
from offloop.engine.weights.source import Source, Weights, read_weights


def export_model(
    source: Source,
    path: str | Path,
    *,
    key: str | None = None,
    registry: str | Path = DEFAULT_REGISTRY,
    overwrite: bool = False,
) -> Path:
    """Write a model's weights as a plain file that other tools read, and return its path. Blocks until it is durable.

    Tied tensors are written once per name, so that the file loads strictly anywhere. The metadata of a
    safetensors file hold `format: pt`, which Hugging Face's readers require, and the run, step and registered
    version of the weights.

    Args:
        source: As for `load_model`.
        path: Ends in `.safetensors`, or in `.pt` or `.pth` for `torch.save`.
        key: As for `load_model`.
        registry: As for `load_model`.
        overwrite: Replace an existing file, atomically.

    Raises:
        WeightsError: The file exists, cannot be written, or cannot hold a value of the state dict.
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
        # Only a new file: an existing link would be written through.
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        if target.suffix == ".safetensors":
            save_file(_separate(weights), temporary, _metadata(weights))
            # safetensors makes it readable by its owner only.
            os.chmod(temporary, mode)
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
    """Return the origin of weights without paths of this machine, because such files are given away."""
    known = {"format": "pt"}
    if weights.version is not None:
        known |= {"offloop.model": str(weights.version), "offloop.identity": weights.version.identity}
    if weights.info is not None:
        manifest = weights.info.manifest
        known |= {"offloop.run_id": manifest.run_id, "offloop.step": str(manifest.step)}
    return known
