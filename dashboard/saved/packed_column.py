"""Packed columns: numbers as bytes that compress well. The page takes them apart in `saved/columns.ts`.

The bytes of a column lie in planes: all lowest bytes first, then all next ones. Most planes of real columns are
nearly constant, and cost nothing once compressed.
"""

import zlib
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from offloop.dashboard.curves.chart_frame import Float64s

MOST_WHOLE: Final = 2**51
"""Differences of smaller numbers are exact in a browser, whose numbers are float64."""
NO_VALUE: Final = 255
"""Byte of an exponent that stands for NaN."""
MOST_EXPONENT: Final = 120

Int64s = npt.NDArray[np.int64]


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """How a column is packed, `[kind, count, bytes, delta, first, scale]` in the file."""

    kind: Literal["float", "whole", "decimal"]
    """`float`: float64. `whole`: whole numbers divided by `scale`. `decimal`: whole numbers, then the power of ten
    that each is multiplied by, one byte each."""
    count: int
    """Numbers."""
    bytes: int
    """Planes of the whole numbers, each `count` bytes; without that of the powers of ten."""
    delta: bool = False
    """True: of each whole number the difference to the one before it, of the first one to `first`."""
    first: int = 0
    scale: int = 1


class PackedColumn(NamedTuple):
    """A column and its planes."""

    layout: Layout
    planes: list[bytes]


def pack_floats(values: Float64s) -> PackedColumn:
    """Pack numbers as they are; shape (n,)."""
    return PackedColumn(Layout("float", len(values), 8), _planes(values.astype("<f8"), 8))


def pack_whole(values: Float64s, scale: int = 1, *, is_exact: bool = True) -> PackedColumn:
    """Pack numbers as whole ones where they can be; shape (n,).

    Args:
        values: The numbers.
        scale: What they are multiplied by first.
        is_exact: False: round them, rather than packing them as they are if one is not whole.
    """
    scaled = values * scale
    with np.errstate(invalid="ignore"):
        rounded = np.rint(scaled)
        fits = bool(np.all(np.abs(rounded) < MOST_WHOLE))
    if not fits or (is_exact and not np.array_equal(rounded, scaled)):
        return pack_floats(values)
    return _shorter("whole", rounded.astype(np.int64), scale=scale)


def pack_decimals(values: Float64s, digits: int) -> PackedColumn:
    """Pack numbers rounded to some significant digits, at most 9; shape (n,). NaN stays, infinities may not come."""
    is_known = np.isfinite(values) & (values != 0)
    known = np.where(is_known, values, 1.0)
    powers = np.floor(np.log10(np.abs(known))).astype(np.int64) - (digits - 1)
    if np.any(np.abs(powers) > MOST_EXPONENT):
        return pack_floats(values)
    whole = np.rint(_times_ten_to(known, -powers))
    # Of 9.9996 and four digits 10.00
    carried = np.abs(whole) >= 10**digits
    powers += carried
    whole = np.where(carried, np.rint(_times_ten_to(known, -powers)), whole)
    whole = np.where(is_known, whole, 0.0).astype(np.int64)
    signs = _zigzag(np.where(is_known, powers, 0)).astype(np.uint8)
    exponents = np.where(np.isnan(values), np.uint8(NO_VALUE), signs)
    column = _shorter("decimal", whole)
    return PackedColumn(column.layout, [*column.planes, exponents.tobytes()])


def _times_ten_to(values: Float64s, powers: Int64s) -> Float64s:
    """Return values times powers of ten, each power exact where it can be."""
    ten: Float64s = np.power(10.0, np.abs(powers).astype(float))
    moved: Float64s = np.where(powers < 0, values / ten, values * ten)
    return moved


def _shorter(kind: Literal["whole", "decimal"], whole: Int64s, *, scale: int = 1) -> PackedColumn:
    """Return whole numbers or their differences, whichever is shorter once compressed."""
    packed: list[PackedColumn] = []
    for delta in (False, True):
        first = int(whole[0]) if delta and len(whole) else 0
        numbers = _zigzag(np.diff(whole, prepend=first) if delta else whole)
        width = max(1, -(-int(numbers.max(initial=0)).bit_length() // 8))
        planes = _planes(numbers.astype("<u8"), width)
        packed.append(PackedColumn(Layout(kind, len(whole), width, delta, first, scale), planes))
    return min(packed, key=lambda each: sum(len(zlib.compress(plane)) for plane in each.planes))


def _zigzag(numbers: Int64s) -> npt.NDArray[np.uint64]:
    """Return numbers without signs: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return ((numbers << 1) ^ (numbers >> 63)).astype(np.uint64)


def _planes(numbers: npt.NDArray[Any], width: int) -> list[bytes]:
    """Return the lowest bytes of all numbers, then the next ones."""
    table = numbers.view(np.uint8).reshape(len(numbers), 8)
    return [table[:, place].tobytes() for place in range(width)]
