"""Batches: how many there are, and bringing them to the device whole."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import msgspec
import torch

from offloop.engine.errors import ConfigError

_MAX_DEPTH: Final = 20  # deeper than any sane batch; a self-referencing one would recurse for ever


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = True) -> Any:
    """Return the batch with all its tensors on `device`; what is no tensor stays as it is.

    Takes tensors, tuples (also named), lists, mappings, dataclasses and msgspec structs, nested, and
    whatever has a `to(device)` of its own (`transformers.BatchEncoding`, packed sequences).
    Copies from pinned memory do not block.
    """
    return _moved(batch, device, lambda tensor: tensor.to(device, non_blocking=non_blocking), 0)


class DeviceTransfer:
    """Brings the batches of a run to the device. Training thread only.

    On CUDA the copies have a stream of their own, so that the device copies the next batch while it still works on
    this one: the host, which is ahead of the device, asks for it as soon as the loader has given it. Nothing is
    read ahead of the loader, so its position and its random draws are those of a loop without it. A copy from
    memory that is not pinned makes the host wait for that copy, not for the device's work.
    """

    def __init__(self, device: torch.device, *, channels_last: bool = False) -> None:
        self.device = device
        self.is_needed = device.type != "cpu" or channels_last
        self._channels_last = channels_last
        self._stream: Any = None  # made with the first batch: CUDA is not touched before the run
        self._is_copying = False
        self._move = self._copy_beside if device.type == "cuda" else self._copy

    def __call__(self, batch: Any) -> Any:
        """Return the batch with all its tensors on the device, see `to_device`. Does not wait for the device."""
        if not self.is_needed:
            return batch
        batch = _moved(batch, self.device, self._move, 0)
        if self._is_copying:
            self._is_copying = False
            torch.cuda.current_stream(self.device).wait_stream(self._stream)  # the device waits, not the host
        return batch

    def has_work(self) -> bool:
        """True if the device has not done all that it was given. Does not wait for it; False where it is the host."""
        return self.device.type == "cuda" and not torch.cuda.current_stream(self.device).query()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self.device, non_blocking=True)
        layout = channels_last_of(moved) if self._channels_last else None
        return moved if layout is None else moved.contiguous(memory_format=layout)

    def _copy_beside(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return self._copy(tensor)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = self._copy(tensor)
        # Its memory belongs to that stream: it must not be used again there before the training's is done with it.
        moved.record_stream(torch.cuda.current_stream(self.device))
        self._is_copying = True
        return moved


def channels_last_of(tensor: torch.Tensor) -> torch.memory_format | None:
    """Return the layout with the channels innermost for images (N, C, H, W) and volumes (N, C, D, H, W), else None."""
    if tensor.layout != torch.strided:
        return None
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())


def use_channels_last(model: torch.nn.Module) -> None:
    """Lay the weights of convolutions out with the channels innermost."""
    for parameter in model.parameters():
        layout = channels_last_of(parameter)
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _moved(item: Any, device: torch.device, move: Callable[[torch.Tensor], torch.Tensor], depth: int) -> Any:
    """Return an item with all its tensors moved; what has a `to` of its own moves itself."""
    if isinstance(item, torch.Tensor):
        return move(item)
    if depth > _MAX_DEPTH or isinstance(item, str | bytes | int | float | None):
        return item
    if hasattr(item, "to") and not isinstance(item, type):
        return item.to(device)
    deeper = depth + 1
    if isinstance(item, tuple):
        parts = [_moved(part, device, move, deeper) for part in item]
        return item._make(parts) if hasattr(item, "_make") else type(item)(parts)
    if isinstance(item, list):
        return [_moved(part, device, move, deeper) for part in item]
    if isinstance(item, Mapping):
        moved = {key: _moved(part, device, move, deeper) for key, part in item.items()}
        if type(item) is dict:
            return moved
        if isinstance(
            item, MutableMapping
        ):  # a copy keeps what its kind holds beside the items: a defaultdict
            twin = copy.copy(item)
            for key, part in moved.items():
                twin[key] = part  # one by one: outputs of Hugging Face models refuse update()
            return twin
        return type(item)(moved)  # type: ignore[call-arg]  # a mapping of its kind
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        names = [field.name for field in dataclasses.fields(item) if field.init]
        return dataclasses.replace(item, **{n: _moved(getattr(item, n), device, move, deeper) for n in names})
    if isinstance(item, msgspec.Struct):
        names = list(item.__struct_fields__)
        return msgspec.structs.replace(
            item, **{n: _moved(getattr(item, n), device, move, deeper) for n in names}
        )
    return item


def length_of(loader: Any) -> int | None:
    """Return how many batches a loader says it has, None where it has no length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None  # an iterable without one, or a DataLoader over an IterableDataset


def why_empty(loader: Any) -> str:
    """Return why a loader has no batch, and what helps, as far as that can be told."""
    samples = length_of(getattr(loader, "dataset", None))
    size = getattr(loader, "batch_size", None)
    if samples and size and getattr(loader, "drop_last", False):
        return (
            f"drop_last=True leaves out what fills no batch, and its {samples} samples are fewer than "
            f"batch_size={size}; give drop_last=False or a smaller batch_size"
        )
    return "its data set has no sample" if samples == 0 else "it has no batch"


def describe_empty(name: str, loader: Any, *, was_read: bool) -> str:
    """Return the error text for a loader without a batch; `was_read` is True if it gave some earlier in the run."""
    if was_read or hasattr(loader, "__next__"):
        again = " when it was read again" if was_read else ""
        return (
            f"the {name} gave no batch{again}: is it a generator, which can be read only once? Give a DataLoader, "
            "a list, or an object whose __iter__ begins anew"
        )
    return f"the {name} gave no batch: {why_empty(loader)}"


def limited_length(loader: Any, limit: int | float | None, knob: str) -> int | None:
    """Return how many batches will be used under `limit`; None where nothing says so.

    Raises:
        ConfigError: `limit` is a share, and the loader has no length to take a share of.
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
        # rounded first: 0.29 of 100 is 28.999999999999996 in floating point
        return max(1, int(round(length * limit, 6))) if length else 0
    return limit if length is None else min(limit, length)
