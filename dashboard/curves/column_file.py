"""Column files: curves as they were read from a run's log, so that they are not read from it again.

A cache of the user's, never the truth: without a file that is whole the log is read anew, and a log that has grown is
read on from where the columns end. It holds the columns of a `History` and of a `LayerHistory` as they lie in memory,
so a run of a million steps is there at once, and only the parts of the file that are looked at take memory:

    magic     16 bytes
    u64       length of the header
    header    JSON, then spaces up to a multiple of 8
    columns   f64, f32, u32 or u16, little-endian, each followed by zeros up to a multiple of 8
    u32       CRC-32 of everything before it
"""

import contextlib
import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
import numpy.typing as npt

from offloop.dashboard.curves.chart_frame import Gap
from offloop.dashboard.curves.column import Column
from offloop.dashboard.curves.history import Axis, AxisFacts, Curve, CurveFacts, History
from offloop.dashboard.curves.layer_history import LayerHistory, TableFacts

LEAST_LOG: Final = 8 * 1024 * 1024
"""Bytes of a log from which on its columns are kept: a smaller one is read within a second."""
MOST_BYTES: Final = 4 * 1024**3
"""Bytes of all column files of a user; beyond that, those go that were used the longest time ago."""
_MAGIC: Final = b"offloop columns3"
_PIECE: Final = 1024 * 1024


class _Header(msgspec.Struct, frozen=True):
    axis: AxisFacts
    curves: list[CurveFacts]
    gaps: list[Gap]
    layers: list[TableFacts]
    lengths: list[tuple[str, int]]
    """Type and length of each column: `f8`, `f4`, `u4` or `u2`."""
    state: msgspec.Raw
    """What else the reader of the log has to know; JSON."""


class Kept(msgspec.Struct):
    """What a column file holds."""

    history: History
    layers: LayerHistory
    state: bytes


def place_of(log: Path) -> Path:
    """Return where the column file of a log is, in the user's cache directory."""
    name = hashlib.sha256(os.fsencode(log.resolve())).hexdigest()[:32]
    return cache_directory() / f"{name}.columns"


def cache_directory() -> Path:
    """Return the directory of column files: `$XDG_CACHE_HOME/offloop`, usually `~/.cache/offloop`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offloop"


def keep(path: Path, history: History, layers: LayerHistory, state: bytes) -> None:
    """Write a column file, replacing an older one whole. Blocks for some seconds per GB.

    Args:
        path: The column file.
        history: The curves.
        layers: What was measured by layer.
        state: What the reader of the log has to know to go on where they end; JSON.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".columns-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, history, layers, state)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _remove_oldest(path)


def _write(file: BinaryIO, history: History, layers: LayerHistory, state: bytes) -> None:
    curves = history.curves
    columns = [
        *history.axis.columns(),
        *chain.from_iterable(curve.columns() for curve in curves),
        *layers.columns(),
    ]
    header = msgspec.json.encode(
        _Header(
            axis=history.axis.facts(),
            curves=[curve.facts() for curve in curves],
            gaps=history.gaps,
            layers=layers.facts(),
            lengths=[(column.dtype.str[1:], len(column)) for column in columns],
            state=msgspec.Raw(state),
        )
    )
    header += b" " * (-len(header) % 8)
    checksum = 0
    for part in chain([_MAGIC, struct.pack("<Q", len(header)), header], map(_padded, columns)):
        file.write(part)
        checksum = zlib.crc32(part, checksum)
    file.write(struct.pack("<I", checksum))


def _padded(column: npt.NDArray[Any] | Column) -> bytes:
    numbers = column.read() if isinstance(column, Column) else column
    content = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()
    return content + bytes(-len(content) % 8)


def find(path: Path, *, limit: int) -> Kept | None:
    """Return what a column file holds; None if it is missing or damaged. Blocks.

    The history grows in memory from there; what it takes from the file stays in the file until it is looked at.

    Args:
        path: The column file.
        limit: Limit of the memory for the history, in bytes.
    """
    try:
        if not _is_whole(path):
            return None
        with contextlib.suppress(OSError):
            # The oldest use decides which file goes first.
            os.utime(path)
        mapped: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        start = len(_MAGIC) + 8
        (length,) = struct.unpack("<Q", mapped[len(_MAGIC) : start].tobytes())
        header = msgspec.json.decode(mapped[start : start + length].tobytes(), type=_Header)
        columns = _columns(mapped, start + length, header.lengths)
        history = History(limit)
        history.axis = Axis.of(header.axis, columns)
        history.curves = [Curve.of(facts, columns) for facts in header.curves]
        history.gaps = header.gaps
        return Kept(history, LayerHistory.of(header.layers, columns), bytes(header.state))
    except (OSError, ValueError, struct.error, StopIteration):
        # A file of another version, too. `msgspec.DecodeError` is a ValueError.
        return None


def _columns(
    mapped: npt.NDArray[np.uint8], start: int, lengths: list[tuple[str, int]]
) -> Iterator[npt.NDArray[Any]]:
    for kind, count in lengths:
        dtype = np.dtype(f"<{kind}")
        stop = start + count * dtype.itemsize
        yield mapped[start:stop].view(dtype)
        start = stop + -(stop - start) % 8


def _is_whole(path: Path) -> bool:
    """Return whether a column file has its checksum at its end. Reads it all, and keeps nothing of it in memory."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - 4
        if left < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
            return False
        checksum = zlib.crc32(_MAGIC)
        left -= len(_MAGIC)
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                return False
            checksum = zlib.crc32(piece, checksum)
            left -= len(piece)
        return file.read(4) == struct.pack("<I", checksum)


def _remove_oldest(newest: Path) -> None:
    """Remove the column files that were used the longest time ago, until the others take at most `MOST_BYTES`."""
    with contextlib.suppress(OSError):
        files = [(each.stat(), each) for each in newest.parent.glob("*.columns")]
        total = sum(found.st_size for found, _ in files)
        for found, each in sorted(files, key=lambda item: item[0].st_mtime):
            if total <= MOST_BYTES or each == newest:
                return
            each.unlink(missing_ok=True)
            total -= found.st_size
