"""The layout of a state: the file and offset of every tensor, and which tensors share bytes.

Tensors whose memory overlaps (tied weights, slices, transposes) are stored once. If one of such a group covers all
others, it is stored and the others become views of it. Otherwise their memory is stored as plain bytes, and all of
them become views. Adjacent tensors in one buffer (flattened RNN weights, FSDP) do not overlap and stay separate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from offloop.engine.checkpoint.errors import UnserializableStateError
from offloop.engine.checkpoint.format import ELEMENT_CODES, MAX_REPEATED_BYTES, repeated_bytes
from offloop.engine.checkpoint.manifest import StoredTensor, TensorView

DEFAULT_FILES: Mapping[str, str] = {
    "model": "model.safetensors",
    "average": "average.safetensors",
    "optimizer": "optimizer.safetensors",
    "optimizers": "optimizer.safetensors",
}
"""Files by top-level key of the state; other keys go to `aux.safetensors`. Names in `model.safetensors` lose the
leading `model.`, those in `average.safetensors` lose `average.`, so that other tools find the names they expect."""

OTHER_FILE = "aux.safetensors"

_FILE_START_ALIGNMENT = 64
_WIDEST = max(width for _, width in ELEMENT_CODES.values())
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True)
class Copy:
    """One copy of a snapshot: a live tensor, or the memory under it, to a place in the buffer."""

    source: int
    """Index into the tensors of the state."""
    start: int
    """First byte in the buffer."""
    stored: StoredTensor
    path: str
    span: tuple[int, int] | None = None
    """If not the tensor itself: first byte and number of bytes of its storage."""


@dataclass(frozen=True)
class FilePlan:
    """One file's part of the buffer."""

    name: str
    start: int
    size: int
    tensors: tuple[tuple[str, StoredTensor], ...]


@dataclass(frozen=True)
class Layout:
    """The layout of a state; valid as long as its tensors have the same kinds and places."""

    copies: tuple[Copy, ...]
    views: dict[str, TensorView]
    files: tuple[FilePlan, ...]
    size: int
    """Bytes of the buffer."""


def check_tensor(path: str, tensor: torch.Tensor) -> None:
    """Check that a tensor has plain memory to copy.

    Raises:
        UnserializableStateError: It is sparse, quantized, nested, on meta, or of a subclass.
    """
    if type(tensor) not in _PLAIN_TYPES:
        raise UnserializableStateError(path, tensor, "only plain tensors can be saved")
    if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        raise UnserializableStateError(path, tensor, "only dense tensors with data can be saved")
    if dtype_name(tensor.dtype) not in ELEMENT_CODES:
        raise UnserializableStateError(path, tensor, f"{tensor.dtype} cannot be saved")


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def plan_layout(
    tensors: Sequence[tuple[str, torch.Tensor]], files: Mapping[str, str] = DEFAULT_FILES
) -> Layout:
    """Plan the layout of tensors with distinct paths."""
    taken: set[tuple[str, str]] = set()
    drafts: list[tuple[int, str, StoredTensor, tuple[int, int] | None]] = []
    views: dict[str, TensorView] = {}
    repeated = 0
    for group in _overlapping(tensors):
        base = _covering(group, tensors)
        if base is None:
            first, stop = min(e.start for e in group), max(e.stop for e in group)
            first -= first % _WIDEST
            owner, base_path = group[0], f"{tensors[group[0].index][0]}#memory"
            dtype, shape, size = "uint8", [stop - first], stop - first
            span: tuple[int, int] | None = (first, size)
        else:
            owner, base_path, span = base, tensors[base.index][0], None
            tensor = tensors[base.index][1]
            dtype, shape = dtype_name(tensor.dtype), list(tensor.shape)
            first, size = base.start, tensor.numel() * tensor.element_size()
        file, name = _place(base_path, files, taken)
        stored = StoredTensor(file, name, dtype, shape, 0, size)
        drafts.append((owner.index, base_path, stored, span))
        for extent in group:
            if base is None or extent is not base:
                path, tensor = tensors[extent.index]
                views[path] = TensorView(
                    base_path,
                    dtype_name(tensor.dtype),
                    list(tensor.shape),
                    list(tensor.stride()),
                    extent.start - first,
                )
                repeated += repeated_bytes(views[path], size)
                if repeated > MAX_REPEATED_BYTES:
                    raise UnserializableStateError(
                        path,
                        tensor,
                        f"views like it repeat their elements to more than {MAX_REPEATED_BYTES:,} bytes: keep a "
                        "smaller tensor and expand it where it is used",
                    )
    return _arrange(drafts, views)


def _arrange(
    drafts: list[tuple[int, str, StoredTensor, tuple[int, int] | None]],
    views: dict[str, TensorView],
) -> Layout:
    copies: list[Copy] = []
    plans: list[FilePlan] = []
    position = 0
    for file in sorted({stored.file for _, _, stored, _ in drafts}):
        inside = [draft for draft in drafts if draft[2].file == file]
        # With wide elements first, every tensor is aligned without gaps.
        inside.sort(key=lambda draft: -ELEMENT_CODES[draft[2].dtype][1])
        position += -position % _FILE_START_ALIGNMENT
        start, offset = position, 0
        listed: list[tuple[str, StoredTensor]] = []
        for source, path, draft, span in inside:
            stored = StoredTensor(file, draft.name, draft.dtype, draft.shape, offset, draft.bytes)
            copies.append(Copy(source, start + offset, stored, path, span))
            listed.append((path, stored))
            offset += draft.bytes
        plans.append(FilePlan(file, start, offset, tuple(listed)))
        position = start + offset
    return Layout(tuple(copies), views, tuple(plans), position)


@dataclass(frozen=True, eq=False)
class _Extent:
    """The bytes of its storage that a tensor touches."""

    index: int
    start: int
    stop: int


def _overlapping(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[list[_Extent]]:
    """Group tensors that share memory, in the order of their first members."""
    groups: list[list[_Extent]] = []
    by_storage: dict[tuple[torch.device, int], list[_Extent]] = {}
    for index, (_, tensor) in enumerate(tensors):
        width = tensor.element_size()
        start = int(tensor.storage_offset()) * width
        if tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
            # No memory to share, or memory that does not hold the values.
            groups.append([_Extent(index, start, start)])
            continue
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        key = (tensor.device, tensor.untyped_storage().data_ptr())
        by_storage.setdefault(key, []).append(_Extent(index, start, start + (reach + 1) * width))
    for extents in by_storage.values():
        extents.sort(key=lambda e: (e.start, e.index))
        stop = -1
        for extent in extents:
            if extent.start >= stop:
                groups.append([])
            groups[-1].append(extent)
            stop = max(stop, extent.stop) if len(groups[-1]) > 1 else extent.stop
    for group in groups:
        group.sort(key=lambda e: e.index)
    groups.sort(key=lambda group: group[0].index)
    return groups


def _covering(group: list[_Extent], tensors: Sequence[tuple[str, torch.Tensor]]) -> _Extent | None:
    """Return the first member that covers the group's memory contiguously."""
    if len(group) == 1:
        return group[0]
    first, stop = min(e.start for e in group), max(e.stop for e in group)
    if any((e.start - first) % tensors[e.index][1].element_size() for e in group):
        # Views need aligned elements.
        return None
    for extent in group:
        is_whole = (extent.start, extent.stop) == (first, stop)
        if is_whole and tensors[extent.index][1].is_contiguous():
            return extent
    return None


def _place(path: str, files: Mapping[str, str], taken: set[tuple[str, str]]) -> tuple[str, str]:
    top, _, rest = path.partition(".")
    file = files.get(top, OTHER_FILE)
    name = rest if top in ("model", "average") and rest else path
    candidate, number = name, 1
    # "__metadata__" is the only key in a safetensors header that is not a tensor.
    while (file, candidate) in taken or candidate == "__metadata__":
        number += 1
        candidate = f"{name}~{number}"
    taken.add((file, candidate))
    return file, candidate
