"""Batches: their number, and moving them to the device."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import msgspec
import torch

from offloop.engine.errors import ConfigError

_MAX_DEPTH: Final = 20
"""Deeper than any reasonable batch; a batch that contains itself would recurse forever."""


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = True) -> Any:
    """Return the batch with all its tensors on `device`; other values stay as they are.

    Accepts tensors, tuples (also named), lists, mappings, dataclasses and msgspec structs, nested, and objects with a
    method `to(device)` (`transformers.BatchEncoding`, packed sequences). Copies from pinned memory do not block.
    """
    return _moved(batch, device, lambda tensor: tensor.to(device, non_blocking=non_blocking), 0)


class DeviceTransfer:
    """Moves the batches of a run to the device. Training thread only.

    On CUDA the copies run on a separate stream. The host is ahead of the device, so the device copies the next batch
    while it still works on the current one. Batches are not prefetched from the loader, so its position and random
    draws are those of a plain loop. A copy from memory that is not pinned blocks the host for that copy only.
    """

    def __init__(self, device: torch.device, *, channels_last: bool = False) -> None:
        self.device = device
        self.is_needed = device.type != "cpu" or channels_last
        self._channels_last = channels_last
        # Made with the first batch, so that CUDA is not initialized before the run.
        self._stream: Any = None
        self._is_copying = False
        self._move = self._copy_in_own_stream if device.type == "cuda" else self._copy

    def __call__(self, batch: Any) -> Any:
        """Return the batch with all its tensors on the device, see `to_device`. Does not wait for the device."""
        if not self.is_needed:
            return batch
        batch = _moved(batch, self.device, self._move, 0)
        if self._is_copying:
            self._is_copying = False
            # The device waits, not the host.
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return batch

    def has_work(self) -> bool:
        """Return whether a CUDA device still has work to do, without waiting for it."""
        return self.device.type == "cuda" and not torch.cuda.current_stream(self.device).query()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self.device, non_blocking=True)
        layout = channels_last_of(moved) if self._channels_last else None
        return moved if layout is None else moved.contiguous(memory_format=layout)

    def _copy_in_own_stream(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return self._copy(tensor)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = self._copy(tensor)
        # The memory belongs to the copy stream, which must not reuse it before the compute stream has finished.
        moved.record_stream(torch.cuda.current_stream(self.device))
        self._is_copying = True
        return moved


def channels_last_of(tensor: torch.Tensor) -> torch.memory_format | None:
    """Return the layout with the channels innermost for images (N, C, H, W) and volumes (N, C, D, H, W), else None."""
    if tensor.layout != torch.strided:
        return None
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())


def use_channels_last(model: torch.nn.Module) -> None:
    """Convert weights of convolutions to a layout with the channels innermost."""
    for parameter in model.parameters():
        layout = channels_last_of(parameter)
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _moved(item: Any, device: torch.device, move: Callable[[torch.Tensor], torch.Tensor], depth: int) -> Any:
    """Return an item with all its tensors moved; an object with a method `to` moves itself."""
    if isinstance(item, torch.Tensor):
        return move(item)
    if depth > _MAX_DEPTH or isinstance(item, str | bytes | int | float | None):
        return item
    if hasattr(item, "to") and not isinstance(item, type):
        return item.to(device)
    return rebuilt(item, lambda part: _moved(part, device, move, depth + 1))


def rebuilt(item: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container of the same kind with changed parts; anything else is returned as it is.

    Containers are tuples, lists, mappings, dataclasses and msgspec structs.
    """
    if isinstance(item, tuple):
        parts = [change(part) for part in item]
        return item._make(parts) if hasattr(item, "_make") else type(item)(parts)
    if isinstance(item, list):
        return [change(part) for part in item]
    if isinstance(item, Mapping):
        changed = {key: change(part) for key, part in item.items()}
        if type(item) is dict:
            return changed
        # A copy keeps attributes of its kind, like a defaultdict's. Outputs of Hugging Face models refuse update().
        if isinstance(item, MutableMapping):
            twin = copy.copy(item)
            for key, part in changed.items():
                twin[key] = part
            return twin
        return type(item)(changed)  # type: ignore[call-arg]  # a mapping of its kind
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        names = [field.name for field in dataclasses.fields(item) if field.init]
        return dataclasses.replace(item, **{name: change(getattr(item, name)) for name in names})
    if isinstance(item, msgspec.Struct):
        names = list(item.__struct_fields__)
        return msgspec.structs.replace(item, **{name: change(getattr(item, name)) for name in names})
    return item


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader, None if it has no length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        # An iterable without a length, or a DataLoader over an IterableDataset.
        return None


def why_empty(loader: Any) -> str:
    """Return why a loader has no batch, and the remedy if known."""
    samples = length_of(getattr(loader, "dataset", None))
    size = getattr(loader, "batch_size", None)
    if samples and size and getattr(loader, "drop_last", False):
        return (
            f"drop_last=True drops incomplete batches, and its {samples} samples are fewer than batch_size={size}; "
            "give drop_last=False or a smaller batch_size"
        )
    return "its data set has no sample" if samples == 0 else "it has no batch"


def describe_empty(name: str, loader: Any, *, was_read: bool) -> str:
    """Return the error text for a loader without a batch; `was_read` is True if it gave some earlier in the run."""
    if was_read or hasattr(loader, "__next__"):
        again = " when it was read again" if was_read else ""
        return (
            f"the {name} gave no batch{again}: is it a generator, which can be read only once? Give a DataLoader, "
            "a list, or an object whose __iter__ starts over"
        )
    return f"the {name} gave no batch: {why_empty(loader)}"


def limited_length(loader: Any, limit: int | float | None, knob: str) -> int | None:
    """Return the number of batches to use under `limit`; None if unknown.

    Raises:
        ConfigError: `limit` is a share, but the loader has no length.
    """
    length = length_of(loader)
    if limit is None:
        return length
    if isinstance(limit, float):
        if length is None:
            raise ConfigError(
                f"{knob}={limit} is a share of the loader's length, but this loader has none: "
                "give a number of batches"
            )
        # Rounded first, because 0.29 of 100 is 28.999999999999996 in floating point.
        return max(1, int(round(length * limit, 6))) if length else 0
    return limit if length is None else min(limit, length)
