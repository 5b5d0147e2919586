"""Chart frames of protocol `offloop.v1`: the binary messages that hold points of curves. Types and bytes; no socket."""

import struct
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from offloop.dashboard.protocol.encoding import encode_head


class NonFinite(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive points of one curve without a finite value, `[start, end, kind, count]` on the wire."""

    start: float
    """Step of the first point."""
    end: float
    """Step of the last point."""
    kind: Literal["nan", "inf", "-inf", "mixed"]
    count: int


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive steps whose samples were dropped, `[after, before, count]`: no line is drawn across."""

    after: float
    """Last step before the gap."""
    before: float
    """First step after the gap."""
    count: int
    """Missing steps."""


class ChartColumn(msgspec.Struct, frozen=True, kw_only=True):
    """One curve in the header of a chart frame."""

    id: int
    points: int
    """Length of its columns."""
    dense: bool = False
    """True: the curve has a point in every row of the axis, and no column of indices."""
    reduced: bool = False
    """True: neighbouring points are reduced to their minimum and maximum."""
    marks: list[NonFinite] = []
    """Where the curve is not finite; its column has NaN there. An entry that has grown is sent again, with the same
    `start`."""


class ChartHeader(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="chart"):
    """Header of a chart frame."""

    run: str
    kind: Literal["snapshot", "delta", "range"]
    """`snapshot` replaces the curves it names, `delta` is appended to them, `range` answers a query."""
    query: int | None = None
    """Number of the answered query."""
    more: bool = False
    """True: the answer continues in another chart frame, whose points are appended."""
    rows: int
    """Length of the axis columns `step`, `time`, `epoch`, and `samples` if there is one."""
    samples: bool = False
    """True: there is a column of the samples seen, because the viewer asked for it."""
    series: list[ChartColumn]
    gaps: list[Gap] = []
    """Gaps that touch this frame, identified by `after`."""
    trimmed: float | None = None
    """Step before which the history holds only minima and maxima."""


Float64s = npt.NDArray[np.float64]


class ChartFrame(msgspec.Struct, kw_only=True):
    """A decoded chart frame."""

    header: ChartHeader
    step: Float64s
    """Steps, shape (rows,)."""
    time: Float64s
    """Unix time in seconds, shape (rows,)."""
    epoch: Float64s
    """Number of epochs done with a fraction, shape (rows,)."""
    samples: Float64s | None = None
    """Samples that the model was trained on so far, shape (rows,)."""
    values: list[Float64s]
    """Values by curve, shape (points,)."""
    indices: list[npt.NDArray[np.uint32]]
    """Row of every point by curve, shape (points,)."""


_decode_header = msgspec.json.Decoder(ChartHeader).decode


def encode_chart(frame: ChartFrame) -> bytes:
    """Encode a chart frame, all little-endian.

    u32         length of the header
    header      JSON, padded with spaces so that the rest starts at a multiple of 8
    f64 x rows  step, then time, then epoch; then the samples seen, if the header has `samples`
    f64 x n     values, curve after curve in the order of the header
    u32 x n     rows of the points, curve after curve, without dense curves
    """
    parts = [encode_head(frame.header, multiple=8)]
    axis = [frame.step, frame.time, frame.epoch, *([] if frame.samples is None else [frame.samples])]
    parts += [column.astype("<f8", copy=False).tobytes() for column in axis]
    parts += [values.astype("<f8", copy=False).tobytes() for values in frame.values]
    for column, indices in zip(frame.header.series, frame.indices, strict=True):
        if not column.dense:
            parts.append(indices.astype("<u4", copy=False).tobytes())
    return b"".join(parts)


def decode_chart(data: bytes) -> ChartFrame:
    """Decode a chart frame.

    Raises:
        ValueError: The bytes are no chart frame. (`msgspec.DecodeError` is a ValueError.)
    """
    if len(data) < 4:
        raise ValueError(f"a chart frame has at least 4 bytes, got {len(data)}")
    (length,) = struct.unpack_from("<I", data)
    header = _decode_header(data[4 : 4 + length])
    counts = [header.rows] * (4 if header.samples else 3) + [column.points for column in header.series]
    sparse = [0 if column.dense else column.points for column in header.series]
    if len(data) != 4 + length + 8 * sum(counts) + 4 * sum(sparse):
        raise ValueError(f"the chart frame has {len(data)} bytes, its header implies another length")
    offset = 4 + length
    columns = []
    for count in counts:
        columns.append(np.frombuffer(data, "<f8", count, offset))
        offset += 8 * count
    indices = []
    for column in header.series:
        if column.dense:
            indices.append(np.arange(header.rows, dtype=np.uint32))
        else:
            indices.append(np.frombuffer(data, "<u4", column.points, offset))
            offset += 4 * column.points
    step, time, epoch, *values = columns
    samples = values.pop(0) if header.samples else None
    return ChartFrame(
        header=header, step=step, time=time, epoch=epoch, samples=samples, values=values, indices=indices
    )
