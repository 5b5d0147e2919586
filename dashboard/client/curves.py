"""MetricCurve: all points of a metric, as arrays; and the queries by which a program gets them."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio
import msgspec
import numpy as np
import numpy.typing as npt

from offloop.dashboard.curves.chart_frame import ChartFrame, decode_chart
from offloop.dashboard.protocol.from_server import SeriesInfo
from offloop.dashboard.protocol.from_viewer import Drawn, FromViewer, RangeQuery
from offloop.engine import MetricNotFoundError, OffloopError

AT_ONCE: Final = 16
"""Queries that are on their way at the same time; a server takes 64."""
LAST_STEP: Final = 1e300


class MetricCurve(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """All points of one metric of a run. The arrays are of one length, in the order of the steps."""

    metric: str
    """Its name."""
    step: npt.NDArray[np.int64]
    """Optimizer steps done."""
    time: npt.NDArray[np.float64]
    """Unix time in seconds."""
    epoch: npt.NDArray[np.float64]
    """Epochs done, with a fraction."""
    value: npt.NDArray[np.float64]
    """Values; NaN where one is not finite."""
    reduced_before: int | None = None
    """Step before which only minima and maxima of neighbouring points are left, because the server's memory for curves
    (`Dashboard(history_bytes=)`) was used up; None if all points are there."""
    unit: str = ""
    """`bytes`, `seconds`, `percent`, ...; empty if the metric has none."""

    def __len__(self) -> int:
        return len(self.value)


class _Query:
    """A query that waits for its answer."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.number = -1
        self.frames: list[ChartFrame] = []
        self.done = anyio.Event()
        self.error: OffloopError | None = None


class CurveQueries:
    """Asks for curves, again after each new connection, and puts their parts together. The client's event loop."""

    def __init__(
        self, post: Callable[[FromViewer], None], curves: Callable[[], Mapping[str, SeriesInfo]]
    ) -> None:
        """Ask nothing yet.

        Args:
            post: Sends a message.
            curves: Returns the curves of the run, by the name of their metric.
        """
        self._post = post
        self._curves = curves
        self._waiting: list[_Query] = []
        self._places = anyio.Semaphore(AT_ONCE)
        self._number = 0
        self._end: OffloopError | None = None

    async def ask(self, metric: str, run: str) -> MetricCurve:
        """Return all points of a metric. Cancellation: the answer is ignored.

        Raises:
            MetricNotFoundError: The run has no such curve so far.
            WatchLostError: There is no connection any more.
        """
        if self._end is not None:
            raise self._end
        if metric not in self._curves():
            raise MetricNotFoundError(metric, sorted(self._curves()))
        async with self._places:
            query = _Query(metric)
            self._waiting.append(query)
            try:
                if self._end is not None:
                    raise self._end
                self._send(query, run)
                await query.done.wait()
            finally:
                self._waiting.remove(query)
        if query.error is not None:
            raise query.error
        known = self._curves().get(metric)
        return _joined(metric, query.frames, "" if known is None else known.unit)

    def ask_again(self, run: str) -> None:
        """Send all queries again: the connection, or the curves, are new."""
        for query in self._waiting:
            query.frames.clear()
            self._send(query, run)

    def _send(self, query: _Query, run: str) -> None:
        known = self._curves().get(query.metric)
        if known is None:
            # Not here yet: `ask_again` follows.
            return
        self._number += 1
        query.number = self._number
        self._post(
            RangeQuery(query=query.number, run=run, series=[known.id], start=-1.0, end=LAST_STEP, points=0)
        )

    def take(self, data: bytes) -> None:
        """Take a chart frame in.

        Raises:
            ValueError: It is none.
        """
        frame = decode_chart(data)
        self._post(Drawn())
        for query in self._waiting:
            if query.number == frame.header.query:
                query.frames.append(frame)
                if not frame.header.more:
                    query.done.set()

    def end(self, error: OffloopError) -> None:
        """Answer no query any more: they raise this."""
        self._end = error
        for query in self._waiting:
            query.error = self._end
            query.done.set()


def _joined(metric: str, frames: list[ChartFrame], unit: str) -> MetricCurve:
    columns: list[tuple[Any, ...]] = []
    trimmed: float | None = None
    for frame in frames:
        if frame.header.trimmed is not None:
            trimmed = frame.header.trimmed
        for values, rows in zip(frame.values, frame.indices, strict=True):
            columns.append((frame.step[rows], frame.time[rows], frame.epoch[rows], values))
    step, time, epoch, value = (
        (np.concatenate(parts) if parts else np.empty(0))
        for parts in (zip(*columns, strict=True) if columns else ((), (), (), ()))
    )
    return MetricCurve(
        metric=metric,
        step=step.astype(np.int64),
        time=np.array(time),
        epoch=np.array(epoch),
        value=np.array(value),
        reduced_before=None if trimmed is None else int(trimmed),
        unit=unit,
    )
