"""Column: numbers that are appended at the end and dropped at the start, in blocks that never move.

A growing array is reallocated again and again. With dozens of them, the holes left in the heap reached 40 % of their
contents within an hour.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

BLOCK: Final = 4096
"""Numbers in a block: small enough that the growing last block is negligible."""
UNSEALED: Final = 16
"""Numbers at the end that `extend` and `of` leave for `last`."""


class Column:
    """A sequence of float64 ("d") or uint32 ("I")."""

    __slots__ = ("_blocks", "_gone", "_tail", "append")

    append: Callable[[Any], None]
    """Add a number at the end, directly to the last block. Call `seal` from time to time."""

    def __init__(self, kind: Literal["d", "I"]) -> None:
        # Full blocks.
        self._blocks: list[npt.NDArray[Any]] = []
        self._tail = array(kind)
        # Dropped numbers at the start of the first block.
        self._gone = 0
        self.append = self._tail.append

    @classmethod
    def of(cls, kind: Literal["d", "I"], numbers: npt.NDArray[Any]) -> Self:
        """Return a column of these numbers, shape (n,). Full blocks are views of them: they must not change."""
        column = cls(kind)
        full = _sealed(len(numbers))
        column._blocks = [numbers[start : start + BLOCK] for start in range(0, full, BLOCK)]
        column._tail.frombytes(numbers[full:].tobytes())
        return column

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Type of the numbers."""
        return np.dtype(self._tail.typecode)

    def __len__(self) -> int:
        return BLOCK * len(self._blocks) + len(self._tail) - self._gone

    def __getitem__(self, index: int) -> Any:
        """Return one number; a negative index counts from the end."""
        block, place = divmod(index + (len(self) if index < 0 else 0) + self._gone, BLOCK)
        if block < len(self._blocks):
            return self._blocks[block][place]
        return self._tail[place + BLOCK * (block - len(self._blocks))]

    def last(self, count: int) -> "array[Any]":
        """Return the last numbers: at most those that were added since the last `seal`, or `UNSEALED`."""
        assert count <= len(self._tail)
        return self._tail[len(self._tail) - count :]

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return a copy of the numbers from index `start` up to but not including `stop`; shape (stop - start,)."""
        start, stop = start + self._gone, (len(self) if stop is None else stop) + self._gone
        full = len(self._blocks)
        # Copy this part as well: an array that exports its buffer to numpy cannot grow.
        newest = np.array(self._tail[max(0, start - full * BLOCK) : max(0, stop - full * BLOCK)])
        if start >= full * BLOCK:
            return newest
        parts = [
            self._blocks[number][max(0, start - number * BLOCK) : stop - number * BLOCK]
            for number in range(start // BLOCK, min(full, -(-stop // BLOCK)))
        ]
        return np.concatenate([*parts, newest])

    def search(self, value: float) -> int:
        """Return the index of the first number of at least `value`, else the length. The numbers must ascend."""
        blocks = self._blocks
        if blocks and value <= blocks[-1][-1]:
            number = bisect_left(blocks, value, key=lambda block: block[-1])
            return max(0, number * BLOCK + bisect_left(blocks[number], value) - self._gone)
        return len(blocks) * BLOCK + bisect_left(self._tail, value) - self._gone

    def seal(self) -> None:
        """Move the numbers of a full block out of the tail."""
        if len(self._tail) >= BLOCK:
            self._blocks.append(np.array(self._tail[:BLOCK]))
            del self._tail[:BLOCK]

    def extend(self, numbers: npt.NDArray[Any]) -> None:
        """Add many numbers at the end, shape (n,), and seal the full blocks among them."""
        joined = np.concatenate((np.array(self._tail), numbers), dtype=self._tail.typecode)
        full = _sealed(len(joined))
        self._blocks += [joined[start : start + BLOCK].copy() for start in range(0, full, BLOCK)]
        # The same array, because `append` is bound to it.
        del self._tail[:]
        self._tail.frombytes(joined[full:].tobytes())

    def drop(self, count: int) -> None:
        """Drop the first `count` numbers."""
        whole, rest = divmod(count + self._gone, BLOCK)
        if whole >= len(self._blocks):
            del self._tail[: count + self._gone - BLOCK * len(self._blocks)]
            whole, rest = len(self._blocks), 0
        del self._blocks[:whole]
        self._gone = rest


def _sealed(count: int) -> int:
    """Return how many of `count` numbers are in full blocks."""
    return max(0, count - UNSEALED) // BLOCK * BLOCK
