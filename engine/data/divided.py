"""Dividing a batch that is collated already: the samples of one part of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from torch import Tensor

from offloop.engine.data.batch_size import samples_of_list, tensors_in
from offloop.engine.data.batches import rebuilt
from offloop.engine.errors import BatchError

_CONSTANTS: Final = (str, bytes, int, float, type(None))
"""Values that belong to the batch as a whole."""


def divided(batch: Any, samples: int, part: slice) -> Any:
    """Return some samples of a collated batch, or of a list of samples.

    Tensors and arrays are divided along their first dimension, lists of samples by their items. Numbers, strings and
    tensors without dimensions stay.

    Args:
        batch: The whole batch.
        samples: How many samples it has.
        part: Those to return.

    Raises:
        BatchError: Something in the batch has another length, or nothing in it can be divided.
    """
    division = _Division(samples, part)
    share = division.of(batch)
    if not division.has_divided:
        raise BatchError(
            f"a {type(batch).__name__} has no tensor whose first dimension is that of its samples"
        )
    return share


class _Division:
    """One division of one batch."""

    def __init__(self, samples: int, part: slice) -> None:
        self._samples = samples
        self._part = part
        self.has_divided = False

    def of(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._rows(item).contiguous() if item.dim() else item
        if isinstance(item, _CONSTANTS):
            return item
        if isinstance(item, list | tuple) and not hasattr(item, "_fields") and self._are_samples(item):
            self.has_divided = True
            return item[self._part]
        if isinstance(item, list | tuple | Mapping | msgspec.Struct) or dataclasses.is_dataclass(item):
            return rebuilt(item, self.of)
        # A NumPy array
        if isinstance(getattr(item, "shape", None), tuple) and hasattr(item, "dtype"):
            return self._rows(item) if item.shape else item
        raise BatchError(f"it has a {type(item).__name__}")

    def _rows(self, array: Any) -> Any:
        if array.shape[0] != self._samples:
            raise BatchError(
                f"one of its parts has the shape {tuple(array.shape)}, but the batch has {self._samples} samples"
            )
        self.has_divided = True
        return array[self._part]

    def _are_samples(self, items: "list[Any] | tuple[Any, ...]") -> bool:
        """Return True for a list with one item per sample, False for one of several parts of the batch."""
        if len(items) != self._samples:
            return False
        # As many parts as samples, all of them collated
        tensors = list(tensors_in(items))
        is_collated = bool(tensors) and all(each.dim() and each.size(0) == self._samples for each in tensors)
        return not is_collated or samples_of_list(items) == self._samples
