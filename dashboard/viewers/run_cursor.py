"""RunCursor: what one viewer has received of one run's curves, and what it is due next.

It is a position in the run's history and not a queue of points: a chart frame is made when the viewer has credit for
it, from what is new since the last one.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np

from offloop.dashboard.curves.frames import DELTA_POINTS
from offloop.dashboard.curves.history import AXIS_BYTES, POINT_BYTES
from offloop.dashboard.protocol.encoding import ProtocolError, encode_message
from offloop.dashboard.protocol.from_server import Series
from offloop.dashboard.protocol.from_viewer import RangeQuery, Show
from offloop.dashboard.protocol.limits import MAX_CHART_FRAME, MAX_POINTS, MAX_SERIES_SHOWN
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.viewers.layer_cursor import LayerCursor

MAX_WAITING_QUERIES: Final = 64
"""Most unanswered queries of one viewer about one run."""


class RunCursor:
    """A viewer's place in one run. Event loop of the dashboard only."""

    def __init__(self, live: LiveRun) -> None:
        self.live = live
        self.layers = LayerCursor(live)
        # The rate limit allows a frame with new points.
        self.is_due = True
        self._series_sent = 0
        self._index_sent = 0
        # True once the viewer has named the curves on its screen ...
        self._has_shown = False
        # ... and true if new curves were announced since, which it may want to show.
        self._may_show = False
        # Row up to which the shown curves were sent.
        self._row = 0
        self._shown: tuple[int, ...] = ()
        self._points = 1_600
        self._samples = False
        # Shown curves of which nothing was sent yet.
        self._snapshots: deque[int] = deque()
        self._queries: deque[RangeQuery] = deque()
        # The next row of an answer with all points that takes several frames.
        self._answer_row: int | None = None
        # Number of curves of a reduced answer that were sent.
        self._answer_curves = 0
        # True if the last chart frame was an answer: new data has its turn.
        self._answered = False

    # What the viewer asks for

    def show(self, message: Show) -> None:
        """Set which curves are on the screen.

        Raises:
            ProtocolError: The curves do not exist, or are too many.
        """
        wanted = self._known(message.series)
        if not 2 <= message.points <= MAX_POINTS:
            raise ProtocolError(f"points must be from 2 to {MAX_POINTS}, got {message.points}")
        self._has_shown, self._may_show = True, False
        self._points = message.points
        self._samples = message.samples
        new = [curve for curve in wanted if curve not in self._shown or curve in self._snapshots]
        if not self._shown:
            self._row = self.live.history.axis.rows
        self._shown = wanted
        self._snapshots = deque(new)

    def ask(self, query: RangeQuery) -> None:
        """Queue a query.

        Raises:
            ProtocolError: The curves do not exist, or too many queries wait.
        """
        # Without duplicates: the number of curves bounds the size of the answer.
        series = list(self._known(query.series))
        if query.points and not 2 <= query.points <= MAX_POINTS:
            raise ProtocolError(f"points must be 0 or from 2 to {MAX_POINTS}, got {query.points}")
        if not query.start <= query.end:
            raise ProtocolError(f"start must not be above end, got {query.start} and {query.end}")
        if len(self._queries) >= MAX_WAITING_QUERIES:
            raise ProtocolError(f"more than {MAX_WAITING_QUERIES} queries wait for their answer")
        self._queries.append(msgspec.structs.replace(query, series=series))

    def _known(self, series: Sequence[int]) -> tuple[int, ...]:
        unique = tuple(dict.fromkeys(series))
        if len(unique) > MAX_SERIES_SHOWN:
            raise ProtocolError(f"at most {MAX_SERIES_SHOWN} curves at a time, got {len(unique)}")
        for curve in unique:
            if not 0 <= curve < self._series_sent:
                raise ProtocolError(f"there is no curve {curve}")
        return unique

    def new_series(self, revised: Collection[int] = ()) -> bytes | None:
        """Return the message with the curves that are new to the viewer, and send again those that were `revised`.

        A revised curve has points before the newest row, which were not sent in their turn.
        """
        live = self.live
        self._snapshots += [each for each in self._shown if each in revised and each not in self._snapshots]
        if self._series_sent >= len(live.series):
            return None
        new = live.series[self._series_sent :]
        self._series_sent = len(live.series)
        self._may_show = self._has_shown
        return encode_message(Series(run=live.key, series=new))

    def new_samples(self) -> bytes | None:
        """Return the message with the samples that are new to the viewer; None if there are none."""
        samples = self.live.samples
        message, self._index_sent = samples.since(self._index_sent), samples.count
        return message

    # What is sent next

    def wants_frame(self, *, at_once: bool = False) -> bool:
        """Return whether there is data for a chart frame that may go now; `at_once`: whatever the rate limit says."""
        if self.is_urgent or self.layers.wants_frame(at_once=at_once):
            return True
        return self.is_behind and (self.is_due or at_once or self.live.is_over)

    @property
    def is_behind(self) -> bool:
        """True if the shown curves have points that were not sent."""
        return bool(self._shown) and self._row < self.live.history.axis.rows

    @property
    def is_waiting(self) -> bool:
        """True if closing now would cut off curves that the viewer shows or may want to show."""
        return self._may_show or bool(self._snapshots) or self.is_behind

    @property
    def is_urgent(self) -> bool:
        """True if answers or snapshots wait: they are exempt from the rate limit of frames."""
        return bool(self._snapshots or self._queries)

    def next_frame(self) -> bytes | None:
        """Make the next frame; None without data for one."""
        if self.layers.wants_frame():
            return self.layers.next_frame()
        # Urgent frames do not count against the rate limit.
        self.is_due = self.is_due and self.is_urgent
        frame = self._snapshot()
        # Alternate answers with new data: a long answer must not hold up the curves.
        if frame is None and self._answered:
            frame = self._delta()
        was_answer = False
        if frame is None and (frame := self._answer()) is not None:
            was_answer = True
        if frame is None:
            frame = self._delta()
        if frame is None:
            return self.layers.next_frame()
        self._answered = was_answer
        return frame

    def _snapshot(self) -> bytes | None:
        if not self._snapshots:
            return None
        curves = self._fitting(self._snapshots, self._points)
        for _ in curves:
            self._snapshots.popleft()
        return self.live.frames.make("snapshot", curves, 0, self._row, self._points, samples=self._samples)

    def _fitting(self, curves: Iterable[int], points: int) -> list[int]:
        """Return as many of the first curves as fit into a frame with `points` points each; at least one."""
        fitting: list[int] = []
        size = 0
        for curve in curves:
            known = self.live.history.curves[curve]
            # A point takes a row of the axis, a value and an index; marks are part of the header.
            size += (AXIS_BYTES + POINT_BYTES) * min(points, known.points) + 40 * len(known.marks)
            if fitting and size > MAX_CHART_FRAME:
                break
            fitting.append(curve)
        return fitting

    def _delta(self) -> bytes | None:
        end, count = self.live.history.axis.rows, len(self._shown)
        if not count or self._row >= end:
            return None
        if end - self._row <= DELTA_POINTS:
            # As many rows as fit into a frame with all their points.
            rows = max(1, MAX_CHART_FRAME // (AXIS_BYTES + POINT_BYTES * count))
            end = min(end, self._row + rows)
        elif DELTA_POINTS * (AXIS_BYTES + POINT_BYTES) * count > MAX_CHART_FRAME:
            # Far behind with many curves: send snapshots in parts, as a single frame could have any size.
            self._row = end
            self._snapshots = deque(self._shown)
            return self._snapshot()
        first, self._row = self._row, end
        return self.live.frames.delta(first, end, self._shown, samples=self._samples)

    def _answer(self) -> bytes | None:
        """Answer the oldest query, or continue an answer that takes several frames."""
        if not self._queries:
            return None
        query, frames = self._queries[0], self.live.frames
        axis = self.live.history.axis
        first = axis.row_of(query.axis, query.start)
        end = axis.row_of(query.axis, float(np.nextafter(query.end, np.inf)))
        if query.points:
            # A reduced answer: some curves at a time.
            curves = self._fitting(query.series[self._answer_curves :], min(query.points, end - first + 2))
            self._answer_curves += len(curves)
            more = self._answer_curves < len(query.series)
            if not more:
                self._queries.popleft()
                self._answer_curves = 0
            return frames.make(
                "range",
                curves,
                first,
                end,
                query.points,
                query=query.query,
                more=more,
                margin=True,
                samples=query.samples,
            )
        # All points: as many rows at a time as fit into a frame if every curve has a point in every row.
        first = max(first, self._answer_row or 0)
        rows = max(1, MAX_CHART_FRAME // (AXIS_BYTES + POINT_BYTES * max(1, len(query.series))))
        more = first + rows < end
        upto = min(first + rows, end)
        self._answer_row = upto if more else None
        if not more:
            self._queries.popleft()
        return frames.make(
            "range", query.series, first, upto, None, query=query.query, more=more, samples=query.samples
        )
