"""Dividing a batch that is collated already: the samples of one part of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from torch import Tensor

from offloop.engine.data.batch_size import known_size, samples_of_list
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
    share = division.of(batch, is_batch=True)
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

    def of(self, item: Any, *, is_batch: bool = False) -> Any:
        if isinstance(item, Tensor):
            return self._rows(item).contiguous() if item.dim() else item
        if isinstance(item, _CONSTANTS):
            return item
        if known_size(item) is not None:
            raise BatchError(f"it has a {type(item).__name__}")
        if (
            isinstance(item, list | tuple)
            and not hasattr(item, "_fields")
            and self._are_samples(item, is_batch)
        ):
            if len(item) != self._samples:
                raise BatchError(
                    f"a list of {len(item)} items that look like samples counts as {self._samples}: give "
                    "batch_size=len to the trainer if they are"
                )
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

    def _are_samples(self, items: "list[Any] | tuple[Any, ...]", is_batch: bool) -> bool:
        """Return True for a list of samples, False for one of parts of the batch."""
        kinds = set(map(type, items))
        if all(issubclass(each, Tensor) for each in kinds):
            # Images differ in shape; as many inputs of a model as samples have all of them
            is_collated = all(each.dim() and each.size(0) == self._samples for each in items)
            is_list = not is_batch and not is_collated and len(items) == self._samples
            return is_list or samples_of_list(items) == self._samples
        if is_batch:
            return isinstance(items, list) and len(kinds) == 1
        return len(kinds) == 1 and len(items) == self._samples
