"""Tensors from safetensors files, checked against their checksums.

Files are read through the safetensors package, with `pread` instead of a memory map, so that the bytes that were
checked are those that are returned, even if the file changes.
"""

import ctypes
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from offloop.engine.checkpoint.errors import (
    CheckpointCorruptError,
    CheckpointReadError,
    UnsafeCheckpointError,
)
from offloop.engine.checkpoint.format import (
    ELEMENT_CODES,
    MAX_REPEATED_BYTES,
    PAIRS,
    checksum_error,
    repeated_bytes,
)
from offloop.engine.checkpoint.manifest import MANIFEST, Manifest, StoredTensor, TensorView


def read_tensors(
    directory: Path, manifest: Manifest, *, only: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Return all tensors by their paths in the state, on the CPU. Blocks.

    Check lengths and headers of the files first (`format.check_header`).

    Args:
        directory: The checkpoint's directory.
        manifest: The checkpoint's manifest.
        only: Paths of tensors to read; None for all.

    Raises:
        CheckpointCorruptError: At the first tensor that is not what was saved.
    """
    tensors: dict[str, torch.Tensor] = {}
    stored_tensors = manifest.tensors if only is None else manifest.tensors_under(only)
    views = {path: view for path, view in manifest.views.items() if only is None or path in only}
    for name in sorted({stored.file for stored in stored_tensors.values()}):
        inside = {p: stored for p, stored in manifest.tensors.items() if stored.file == name}
        try:
            with safe_open(directory / name, framework="pt", backend="pread") as file:
                if sorted(file.keys()) != sorted(stored.name for stored in inside.values()):
                    raise UnsafeCheckpointError(
                        directory, name, "header", "its tensors are not those of the manifest"
                    )
                for path, stored in inside.items():
                    if path not in stored_tensors:
                        continue
                    with _within(directory, f"{stored.file}:{stored.name}"):
                        tensors[path] = _checked(directory, file.get_tensor(stored.name), stored)
        except SafetensorError as error:
            raise CheckpointCorruptError(directory, name, "header", str(error)) from error
        except OSError as error:
            raise CheckpointReadError(directory / name, error.errno, str(error)) from error
    return tensors | _views(directory, stored_tensors, views, tensors)


def _checked(directory: Path, raw: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    size = raw.numel() * raw.element_size()
    shape = [*stored.shape, 2] if stored.dtype in PAIRS else stored.shape
    if size != stored.bytes or list(raw.shape) != shape:
        raise UnsafeCheckpointError(
            directory, f"{stored.file}:{stored.name}", "header", "its shape is not the manifest's"
        )
    if zlib.crc32(tensor_bytes(raw)) != stored.crc32:
        raise checksum_error(directory, stored)
    dtype = _dtype(stored.dtype)
    if stored.dtype not in PAIRS and raw.dtype != dtype:
        raise UnsafeCheckpointError(
            directory, f"{stored.file}:{stored.name}", "header", "its type is not the manifest's"
        )
    if not size:
        return torch.empty(stored.shape, dtype=dtype, device="cpu")
    return raw.reshape(-1).view(dtype).reshape(stored.shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor without a copy; valid as long as the tensor."""
    size = tensor.numel() * tensor.element_size()
    assert tensor.is_contiguous()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def _dtype(name: str) -> torch.dtype:
    assert name in ELEMENT_CODES, "check_header lets no other pass"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _views(
    directory: Path,
    stored_tensors: Mapping[str, StoredTensor],
    wanted: Mapping[str, TensorView],
    tensors: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Create views of their bases; equal views become one tensor, as tied weights are.

    The total size of views that repeat elements of their base is limited: copies of such a view take its full size.
    """
    _bound_repetition(directory, stored_tensors, wanted)
    views: dict[str, torch.Tensor] = {}
    made: dict[tuple[object, ...], torch.Tensor] = {}
    for path, stored in stored_tensors.items():
        base = tensors[path]
        made[(path, stored.dtype, *base.shape, None, *base.stride(), 0)] = base
    for path, view in wanted.items():
        key = (view.base, view.dtype, *view.shape, None, *view.stride, view.offset)
        if key not in made:
            with _within(directory, f"{MANIFEST}:{path}"):
                made[key] = _lay(directory, path, view, tensors.get(view.base))
        views[path] = made[key]
    return views


def _bound_repetition(
    directory: Path, stored_tensors: Mapping[str, StoredTensor], wanted: Mapping[str, TensorView]
) -> None:
    repeated = 0
    for path, view in wanted.items():
        base = stored_tensors.get(view.base)
        repeated += repeated_bytes(view, 0 if base is None else base.bytes)
        if repeated > MAX_REPEATED_BYTES:
            raise UnsafeCheckpointError(
                directory,
                f"{MANIFEST}:{path}",
                "manifest",
                f"views repeat their bases to more than {MAX_REPEATED_BYTES:,} bytes",
            )


@contextmanager
def _within(directory: Path, item: str) -> Iterator[None]:
    """Turn torch's errors into one that names the tensor."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise UnsafeCheckpointError(directory, item, "manifest", str(error)) from error


def _lay(directory: Path, path: str, view: TensorView, base: torch.Tensor | None) -> torch.Tensor:
    width = ELEMENT_CODES[view.dtype][1] if view.dtype in ELEMENT_CODES else 0
    size = 0 if base is None else base.numel() * base.element_size()
    reach = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=False))
    if (
        base is None
        or not width
        or len(view.shape) != len(view.stride)
        or 0 in view.shape
        or view.offset % width
        or view.offset + (reach + 1) * width > size
    ):
        # set_() would enlarge the storage to what a lying manifest asks for.
        raise UnsafeCheckpointError(
            directory, f"{MANIFEST}:{path}", "manifest", f"no such part of {view.base!r}"
        )
    empty = torch.empty(0, dtype=_dtype(view.dtype), device="cpu")
    storage = base.untyped_storage()
    start = base.storage_offset() * base.element_size() + view.offset
    return empty.set_(storage, start // width, view.shape, view.stride)
