"""Counting the samples of a batch: the weight of its loss in means, and `samples` of events.

The parts of a collated batch share their first dimension, which is the number of samples. If the parts differ or hold
no tensor, known kinds of batches are recognized:

    graph batches                           `num_graphs` (PyTorch Geometric), `batch_size` (DGL, TensorDict)
    packed sequences                        sequences, not time steps
    ([image, image, ...], [target, ...])    the length of a part that is a list of samples
    [(image, target), ...], [{...}, ...]    the length of the batch, if it is a list of samples itself
    (inputs (T, B, ...), targets (B,))      B: most parts agree, or a part of one dimension does (time steps first)

Any other batch counts as one sample. `Trainer(batch_size=function)` replaces the guess, and the key `samples` of a
step's mapping replaces both.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from offloop.engine.errors import BatchError

BatchSize = Callable[[Any], int]

_MAX_DEPTH: Final = 20
"""Deeper than any reasonable batch; a batch that contains itself would recurse forever."""
_CHANNELS: Final = (1, 3, 4)
"""First dimension of an image: grey, RGB, RGBA."""


def guess_batch_size(batch: Any) -> int:
    """Return the number of samples in a batch, 1 if unknown. Looks at shapes, never at values."""
    kind = type(batch)
    # The usual case, without a search: two parts of the same length.
    if (kind is tuple or kind is list) and len(batch) == 2:
        first, second = batch
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            shape, other = first.shape, second.shape
            if shape and other and shape[0] == other[0]:
                return shape[0]
    elif kind is dict:
        leading: int | None = None
        for part in batch.values():
            if isinstance(part, Tensor) and (shape := part.shape):
                if leading is None:
                    leading = shape[0]
                elif leading == shape[0]:
                    return leading
                else:
                    break
    elif isinstance(batch, Tensor) and batch.shape:
        return batch.shape[0]
    count = samples_of_list(batch) if isinstance(batch, list | tuple) else known_size(batch)
    if count is None:
        count = _size(batch, 0)
    return 1 if count is None else count


def checked_batch_size(function: BatchSize) -> BatchSize:
    """Return a user's function with a check of its result."""

    def count(batch: Any) -> int:
        samples = function(batch)
        if type(samples) is not int or samples < 0:
            raise BatchError(f"batch_size must return a number of samples, an int; it returned {samples!r}")
        return samples

    return count


def known_size(item: Any) -> int | None:
    """Return the count that an object has as an attribute."""
    if isinstance(item, PackedSequence):
        # Always on the host.
        return int(item.batch_sizes[0])
    for name in ("num_graphs", "batch_size"):
        value = getattr(item, name, None)
        # TensorDict's shape of a batch.
        if isinstance(value, tuple) and value:
            value = value[0]
        if type(value) is int:
            return value
    return None


def _size(item: Any, depth: int) -> int | None:
    """Return the number of samples in a part of a batch; None if unknown."""
    if isinstance(item, Tensor):
        return item.size(0) if item.dim() else None
    if isinstance(item, str | bytes | int | float | None) or depth > _MAX_DEPTH:
        return None
    known = known_size(item)
    if known is not None:
        return known
    parts = _parts(item)
    if parts is None:
        # A NumPy array.
        shape = getattr(item, "shape", None)
        return shape[0] if isinstance(shape, tuple) and shape and type(shape[0]) is int else None
    return _agreed(parts, depth + 1)


def _parts(item: Any) -> list[Any] | None:
    """Return the parts of a container, None for anything else."""
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, tuple | list):
        return list(item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, field.name) for field in dataclasses.fields(item)]
    if isinstance(item, msgspec.Struct):
        return [getattr(item, name) for name in item.__struct_fields__]
    return None


def _agreed(parts: list[Any], depth: int) -> int | None:
    """Return the number of samples that the parts of a batch indicate."""
    sizes: list[int] = []
    # Lists of samples, or of the inputs of one model.
    lists: list[list[Any]] = []
    for part in parts:
        is_list = isinstance(part, list | tuple) and not hasattr(part, "_fields") and len(part) > 0
        if is_list:
            lists.append(list(part))
        elif (size := _size(part, depth)) is not None:
            sizes.append(size)
    if sizes:
        # Lists of tensors that agree with the rest are inputs of one model, others are samples.
        for part in lists:
            inner = [each.size(0) for each in part if isinstance(each, Tensor) and each.dim()]
            sizes.append(len(part) if len(part) == sizes[0] or set(inner) != {sizes[0]} else sizes[0])
        return _most(sizes, [part for part in parts if isinstance(part, Tensor) and part.dim()])
    # Strings and numbers are the weakest indication.
    for part in sorted(lists, key=_is_plain):
        size = _size_of_list(part, depth)
        if size is not None:
            return size
    return None


def _most(sizes: list[int], tensors: list[Tensor]) -> int:
    """Return the size that most parts have; the first one's if no two of the others agree."""
    first, others = sizes[0], sizes[1:]
    if not others or first in others:
        return first
    common = max(set(others), key=others.count)
    if others.count(common) > 1:
        return common
    # Time steps first, as in recurrent networks: (T, B, ...) and (B,).
    leading = tensors[0] if tensors else None
    if leading is not None and leading.size(0) == first and leading.dim() > 1:
        is_sequence = leading.dim() > 2 or not leading.is_floating_point()
        second = leading.size(1)
        if is_sequence and any(each.dim() == 1 and each.size(0) == second for each in tensors):
            return second
    return first


def _size_of_list(part: list[Any], depth: int) -> int | None:
    """Return the number of samples of a list that is the only indication."""
    if all(isinstance(each, Tensor) for each in part):
        leading = {each.size(0) for each in part if each.dim()}
        is_collated = len(leading) == 1 and all(each.dim() for each in part) and not _are_images(part)
        return leading.pop() if is_collated else len(part)
    if _is_plain(part) or _are_alike(part):
        return len(part)
    return _agreed(part, depth + 1) if depth <= _MAX_DEPTH else None


def samples_of_list(batch: list[Any] | tuple[Any, ...]) -> int | None:
    """Return the length of a batch that is a list of samples, None if its items are parts of a batch."""
    # A named tuple has parts.
    if hasattr(batch, "_fields"):
        return None
    if all(isinstance(each, Tensor) for each in batch):
        # Two tensors are inputs and targets, and so are some of one shape.
        is_list = len(batch) > 2 and _are_images(batch) and len({each.shape for each in batch}) > 1
        return len(batch) if is_list else None
    if isinstance(batch, list) and len(batch) > 0:
        if _is_plain(batch):
            return len(batch)
        if _are_alike(batch) and not isinstance(batch[0], list):
            # The same mappings twice may also be two collated parts: then all their tensors agree.
            tensors = [tensor for each in batch for tensor in tensors_in(each)]
            leading = {tensor.size(0) for tensor in tensors if tensor.dim()}
            is_collated = len(leading) == 1 and all(tensor.dim() for tensor in tensors)
            if not is_collated or _are_images(tensors):
                return len(batch)
    return None


def _is_plain(part: list[Any]) -> bool:
    """Return whether all items are strings or numbers."""
    return all(isinstance(each, str | bytes | int | float | None) for each in part)


def _are_alike(items: list[Any]) -> bool:
    """Return whether items look like samples: of one type, with the same keys or items of the same types."""
    first = items[0]
    if isinstance(first, Tensor) or any(type(each) is not type(first) for each in items):
        return False
    if isinstance(first, Mapping):
        return all(each.keys() == first.keys() for each in items)
    if isinstance(first, tuple | list):
        kinds = [type(each) for each in first]
        return all([type(each) for each in item] == kinds for item in items)
    return True


def _are_images(tensors: "list[Any] | tuple[Any, ...]") -> bool:
    """Return whether all tensors are (C, H, W) with the channels of images."""
    channels = {tensor.size(0) if tensor.dim() == 3 else 0 for tensor in tensors}
    return len(channels) == 1 and channels <= set(_CHANNELS)


def tensors_in(item: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors in an item, nested."""
    if isinstance(item, Tensor):
        yield item
    elif depth <= _MAX_DEPTH:
        for part in _parts(item) or ():
            yield from tensors_in(part, depth + 1)
