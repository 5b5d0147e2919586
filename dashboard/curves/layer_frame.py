"""Layer frames of protocol `offloop.v1`: the binary messages that hold what was measured by layer. No socket."""

import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from offloop.dashboard.curves.layer_history import STATISTICS, SUMMARY, Float32s, Levels
from offloop.dashboard.protocol.encoding import encode_head


class LayerHeader(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="layers"):
    """Header of a layer frame."""

    run: str
    kind: str
    kinds: list[str] = []
    """Kinds of tensors that the run has."""
    statistic: str = ""
    """The statistic of all layers that the frame has; empty in a frame about one layer."""
    layer: str = ""
    """The layer that the frame is about; empty in one about all."""
    statistics: list[str] = []
    """Statistics that are known of this kind."""
    names: list[str] = []
    """Names of the layers in the order of the model; only where `first` is 0."""
    layers: int
    """Number of layers of this kind."""
    first: int
    """Number of the first row in this frame. It and all after it take the place of those from before."""
    rows: int
    """Number of rows."""
    bins: int = 0
    """Most bins of a histogram in this frame."""
    spacing: float = 0.0
    """Least steps between two rows; 0 if every measurement is there."""
    more: bool = False
    """True: further rows follow at once."""


class LayerFrame(msgspec.Struct, kw_only=True):
    """A decoded layer frame: of all layers, or of one."""

    header: LayerHeader
    steps: npt.NDArray[np.float64]
    """Steps done when it was measured, (rows,)."""
    values: Float32s
    """Of all layers: the statistic, (rows, layers). Of one: each of `STATISTICS`, (statistics, rows). NaN where it was
    not measured, infinite where its value is not finite."""
    summary: Float32s | None = None
    """Of all layers: each of `SUMMARY` now, (statistics, layers)."""
    bins: npt.NDArray[np.uint16] | None = None
    """Of one layer: number of bins by row, (rows,); 0 without a histogram."""
    histogram: Levels | None = None
    """Of one layer: levels by row, (rows, most bins), see `levels_of`."""


_decode_header: Final = msgspec.json.Decoder(LayerHeader).decode


def encode_layers(frame: LayerFrame) -> bytes:
    """Encode a layer frame, all little-endian.

    u32         length of the header
    header      JSON, padded with spaces so that the rest starts at a multiple of 8
    f64 x rows  steps
    f32         values, row by row; then the summary, if it is about all layers
    u16         if it is about one layer: bins by row, then the histograms, row by row
    """
    head = encode_head(frame.header, multiple=8)
    parts = [head, _bytes(frame.steps, "<f8"), _bytes(frame.values, "<f4")]
    if frame.summary is not None:
        parts.append(_bytes(frame.summary, "<f4"))
    if frame.bins is not None and frame.histogram is not None:
        parts += _bytes(frame.bins, "<u2"), _bytes(frame.histogram, "<u2")
    return b"".join(parts)


def decode_layers(data: bytes) -> LayerFrame:
    """Decode a layer frame.

    Raises:
        ValueError: The bytes are no layer frame. (`msgspec.DecodeError` is a ValueError.)
    """
    if len(data) < 4:
        raise ValueError(f"a layer frame has at least 4 bytes, got {len(data)}")
    (length,) = struct.unpack_from("<I", data)
    header = _decode_header(data[4 : 4 + length])
    is_of_one = not header.statistic
    shape = (len(STATISTICS), header.rows) if is_of_one else (header.rows, header.layers)
    shapes: Sequence[tuple[str, tuple[int, ...]]] = [("<f8", (header.rows,)), ("<f4", shape)]
    if is_of_one:
        shapes = [*shapes, ("<u2", (header.rows,)), ("<u2", (header.rows, header.bins))]
    else:
        shapes = [*shapes, ("<f4", (len(SUMMARY), header.layers))]
    columns: list[Any] = []
    offset = 4 + length
    for dtype, each in shapes:
        count = int(np.prod(each))
        columns.append(np.frombuffer(data, dtype, count, offset).reshape(each))
        offset += count * np.dtype(dtype).itemsize
    if offset != len(data):
        raise ValueError(f"the layer frame has {len(data)} bytes, its header implies {offset}")
    steps, values, *others = columns
    if is_of_one:
        return LayerFrame(header=header, steps=steps, values=values, bins=others[0], histogram=others[1])
    return LayerFrame(header=header, steps=steps, values=values, summary=others[0])


def _bytes(column: npt.NDArray[Any], dtype: str) -> bytes:
    return column.astype(dtype, copy=False).tobytes()
