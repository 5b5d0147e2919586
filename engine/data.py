"""Batches: how big they are, how many there are, and bringing them to the device whole."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final

import msgspec
import torch

from offloop.engine.errors import ConfigError

_MAX_DEPTH: Final = 20  # deeper than any sane batch; a self-referencing one would recurse for ever


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with all its tensors on `device`; what is no tensor stays as it is.

    Takes tensors, tuples (also named), lists, mappings, dataclasses and msgspec structs, nested, and
    whatever has a `to(device)` of its own (`transformers.BatchEncoding`, packed sequences).
    Copies from pinned memory do not block.
    """
    return _to_device(batch, device, 0)


def _to_device(item: Any, device: torch.device, depth: int) -> Any:
    if isinstance(item, torch.Tensor):
        return item.to(device, non_blocking=True)
    if depth > _MAX_DEPTH or isinstance(item, str | bytes | int | float | None):
        return item
    if hasattr(item, "to") and not isinstance(item, type):
        return item.to(device)
    deeper = depth + 1
    if isinstance(item, tuple):
        parts = [_to_device(part, device, deeper) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    if isinstance(item, list):
        return [_to_device(part, device, deeper) for part in item]
    if isinstance(item, Mapping):
        moved = {key: _to_device(part, device, deeper) for key, part in item.items()}
        if type(item) is dict:
            return moved
        if isinstance(
            item, MutableMapping
        ):  # a copy keeps what its kind holds beside the items: a defaultdict
            twin = copy.copy(item)
            twin.update(moved)
            return twin
        return type(item)(moved)  # type: ignore[call-arg]  # a mapping of its kind
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        names = [field.name for field in dataclasses.fields(item) if field.init]
        return dataclasses.replace(item, **{n: _to_device(getattr(item, n), device, deeper) for n in names})
    if isinstance(item, msgspec.Struct):
        names = list(item.__struct_fields__)
        return msgspec.structs.replace(
            item, **{n: _to_device(getattr(item, n), device, deeper) for n in names}
        )
    return item


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch: the length of the first dimension of its first tensor.

    1 where there is no tensor with a dimension.
    """
    kind = type(batch)
    first = (
        batch[0] if (kind is tuple or kind is list) and batch else batch
    )  # the usual case, without a search
    if isinstance(first, torch.Tensor) and first.dim():
        return len(first)
    tensor = _first_tensor(batch, 0)
    return 1 if tensor is None else tensor.shape[0]


def _first_tensor(item: Any, depth: int) -> torch.Tensor | None:
    if isinstance(item, torch.Tensor):
        return item if item.dim() else None
    if depth > _MAX_DEPTH:
        return None
    if isinstance(item, Mapping):
        parts: Iterable[Any] = item.values()
    elif isinstance(item, tuple | list):
        parts = item
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        parts = (getattr(item, field.name) for field in dataclasses.fields(item))
    elif isinstance(item, msgspec.Struct):
        parts = (getattr(item, name) for name in item.__struct_fields__)
    else:
        return None
    for part in parts:
        found = _first_tensor(part, depth + 1)
        if found is not None:
            return found
    return None


def length_of(loader: Any) -> int | None:
    """Return how many batches a loader says it has, None where it has no length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None  # an iterable without one, or a DataLoader over an IterableDataset


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
