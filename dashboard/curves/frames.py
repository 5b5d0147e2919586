"""Frames: chart frames of one run, made from its history and encoded."""

from collections.abc import Sequence
from typing import Final, Literal

from offloop.dashboard.curves.chart_frame import ChartColumn, ChartFrame, ChartHeader, encode_chart
from offloop.dashboard.curves.history import History

DELTA_POINTS: Final = 2_000
"""Most new points of one curve in a chart frame; beyond that, minima and maxima of neighbours."""


class Frames:
    """Encodes chart frames of one run. Viewers that need the same rows of the same curves share one encoding."""

    def __init__(self, run: str, history: History) -> None:
        self._run = run
        self._history = history
        self._deltas: dict[tuple[int, int, tuple[int, ...], bool], bytes] = {}
        self._end = -1

    def delta(self, first: int, end: int, curves: tuple[int, ...], *, samples: bool = False) -> bytes:
        """Return the new points of some curves, from row `first` up to but not including `end`."""
        if end != self._end:
            self._deltas.clear()
            self._end = end
        key = (first, end, curves, samples)
        if key not in self._deltas:
            self._deltas[key] = self.make("delta", curves, first, end, DELTA_POINTS, samples=samples)
        return self._deltas[key]

    def make(
        self,
        kind: Literal["snapshot", "delta", "range"],
        curves: Sequence[int],
        first: int,
        end: int,
        points: int | None,
        *,
        query: int | None = None,
        more: bool = False,
        margin: bool = False,
        samples: bool = False,
    ) -> bytes:
        """Return the frame of a range of rows; see `Curve.view` for `points` and `margin`.

        With `samples`, it has the samples seen, too.
        """
        history = self._history
        axis, columns = history.columns(curves, first, end, points, margin=margin)
        steps = axis["step"]
        rows = len(steps)
        low, high = (float(steps[0]), float(steps[-1])) if rows else (0.0, -1.0)
        header = ChartHeader(
            run=self._run,
            kind=kind,
            query=query,
            more=more,
            rows=rows,
            samples=samples,
            series=[
                ChartColumn(
                    id=curve,
                    points=len(values),
                    dense=len(values) == rows,
                    reduced=reduced,
                    marks=[
                        mark for mark in history.curves[curve].marks if mark.end >= low and mark.start <= high
                    ],
                )
                for curve, _, values, reduced in columns
            ],
            # Include a gap that ends where the frame starts: no line may connect this frame to the previous one.
            gaps=[gap for gap in history.gaps if gap.before >= low and gap.after <= high],
            trimmed=history.trimmed,
        )
        frame = ChartFrame(
            header=header,
            step=steps,
            time=axis["time"],
            epoch=axis["epoch"],
            samples=axis["samples"] if samples else None,
            values=[values for _, _, values, _ in columns],
            indices=[indices for _, indices, _, _ in columns],
        )
        return encode_chart(frame)
