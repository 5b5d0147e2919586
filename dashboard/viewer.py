"""Viewer: one connection, without its socket. Says what is to be sent next; never holds more than it may.

A viewer is a cursor into the run's history, not a queue of points: a chart frame is made when there is credit
for it, out of what has come since the last one. Only milestones and answers wait in a queue, which is
bounded: who does not take them is cut off, and gets them when it comes back.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import numpy as np

from offloop.dashboard.live_run import KeptMilestone, LiveRun
from offloop.dashboard.protocol import (
    MAX_CHART_FRAME,
    MAX_POINTS,
    MAX_SERIES_SHOWN,
    ChartColumn,
    ChartFrame,
    ChartHeader,
    FromServer,
    MilestonesMissed,
    NonFinite,
    ProtocolError,
    RangeQuery,
    Role,
    Series,
    Show,
    encode_chart,
    encode_message,
)
from offloop.engine import OffloopError

MAX_WAITING_TEXTS: Final = 256
"""Milestones and answers that may wait for one viewer, beside those that it gets when it comes."""
MAX_WAITING_QUERIES: Final = 64
"""Questions of one viewer that may wait for their answer."""
DELTA_POINTS: Final = 2_000
"""New points of one curve in a chart frame; of more, the least and the greatest of neighbours."""


class ViewerTooSlowError(OffloopError):
    """A viewer has not taken what may not be left out."""


class Frames:
    """Chart frames of one run that several viewers can share: same curves, same stretch, encoded once."""

    def __init__(self) -> None:
        self._deltas: dict[tuple[int, int, tuple[int, ...]], bytes] = {}
        self._end = -1

    def delta(self, live: LiveRun, first: int, end: int, curves: tuple[int, ...]) -> bytes:
        """Return what is new in some curves from row `first` to before `end`."""
        if end != self._end:
            self._deltas.clear()
            self._end = end
        key = (first, end, curves)
        if key not in self._deltas:
            self._deltas[key] = encode_chart(chart_frame(live, "delta", curves, first, end, DELTA_POINTS))
        return self._deltas[key]


def chart_frame(
    live: LiveRun,
    kind: str,
    curves: Sequence[int],
    first: int,
    end: int,
    points: int | None,
    *,
    query: int | None = None,
    more: bool = False,
    margin: bool = False,
) -> ChartFrame:
    """Make a chart frame of a stretch of rows."""
    history = live.history
    axis, columns = history.columns(curves, first, end, points, margin=margin)
    steps = axis["step"]
    rows = len(steps)
    low, high = (float(steps[0]), float(steps[-1])) if rows else (0.0, -1.0)
    header = ChartHeader(
        run=live.key,
        kind=kind,  # type: ignore[arg-type]  # one of the protocol's words
        query=query,
        more=more,
        rows=rows,
        series=[
            ChartColumn(
                id=curve,
                points=len(values),
                dense=len(values) == rows,
                reduced=reduced,
                marks=_within(history.curves[curve].marks, low, high),
            )
            for curve, _, values, reduced in columns
        ],
        # A gap that ends where the frame begins belongs to it: the line must not go on from the last frame.
        gaps=[gap for gap in history.gaps if gap.before >= low and gap.after <= high],
        trimmed=history.trimmed,
    )
    return ChartFrame(
        header=header,
        step=steps,
        time=axis["time"],
        epoch=axis["epoch"],
        values=[values for _, _, values, _ in columns],
        indices=[indices for _, indices, _, _ in columns],
    )


def _within(marks: Sequence[NonFinite], low: float, high: float) -> list[NonFinite]:
    return [mark for mark in marks if mark.end >= low and mark.start <= high]


class Viewer:
    """What one connection has, shows and waits for."""

    def __init__(self, role: Role, address: str) -> None:
        self.role: Role = role
        self.address = address
        self.live: LiveRun | None = None
        self.visible = True
        self.credit = True
        self.waiting_since: float | None = None  # monotonic time of the chart frame that was not drawn yet
        self._texts: deque[bytes] = deque()
        self._texts_allowed = MAX_WAITING_TEXTS
        self._slots: dict[str, bytes] = {}  # what replaces its older self: status, latest, runs
        self._series_sent = 0
        self._has_shown = False  # True once it has said what is on its screen
        self._may_show = False  # True if it has heard of curves since then
        self._cursor = 0  # row up to which the curves that it shows are sent
        self._shown: tuple[int, ...] = ()
        self._points = 1_600
        self._snapshots: deque[int] = deque()  # curves that it shows and has nothing of yet
        self._queries: deque[RangeQuery] = deque()
        self._answer_row: int | None = None  # where an answer with all points goes on in its next frame
        self._answer_curves = 0  # how many curves of a reduced answer have been sent
        self._answered = False  # True if the last chart frame was an answer: what is new goes next

    @property
    def is_control(self) -> bool:
        """True if it may give commands."""
        return self.role == "control"

    # What it wants

    def watch(self, live: LiveRun | None, *, after: int = -1) -> None:
        """Begin with a run: everything but milestones up to `after` comes anew.

        Raises:
            ViewerTooSlowError: It has not taken yet what it asked for before.
        """
        self._check_room()
        self.live = live
        for name in ("status", "latest"):
            self._slots.pop(name, None)
        self._series_sent = 0
        self._shown = ()
        self._snapshots.clear()
        self._queries.clear()
        self._answer_row, self._answer_curves = None, 0
        if live is None:
            return
        texts = [encode_message(live.info)]
        missed = live.milestones_seen - len(live.milestones)
        kept_from = live.milestones[0].event.seq if live.milestones else 0
        if missed and after + 1 < kept_from:
            texts.append(encode_message(MilestonesMissed(run=live.key, count=missed)))
        texts += self._messages([each for each in live.milestones if each.event.seq > after])
        self._texts += texts
        self._texts_allowed = len(self._texts) + MAX_WAITING_TEXTS
        self.announce_series()

    def show(self, message: Show) -> None:
        """Note which curves are on its screen, unless it speaks of a run that it no longer watches.

        Raises:
            ProtocolError: There are no such curves, or too many.
        """
        if self._is_outdated(message):
            return
        if self.live is None:
            raise ProtocolError("show before there is a run to watch")
        wanted = self._known(message.series)
        if not 2 <= message.points <= MAX_POINTS:
            raise ProtocolError(f"points must be from 2 to {MAX_POINTS}, got {message.points}")
        self._has_shown, self._may_show = True, False
        self._points = message.points
        new = [curve for curve in wanted if curve not in self._shown or curve in self._snapshots]
        if not self._shown:
            self._cursor = self.live.history.axis.rows
        self._shown = wanted
        self._snapshots = deque(new)

    def ask(self, query: RangeQuery) -> None:
        """Note a question, unless it is about a run that it no longer watches.

        Raises:
            ProtocolError: There are no such curves, or too many questions wait.
        """
        if self._is_outdated(query):
            return
        if self.live is None:
            raise ProtocolError("range before there is a run to watch")
        series = list(self._known(query.series))  # each once: their number bounds the answer's size
        if query.points and not 2 <= query.points <= MAX_POINTS:
            raise ProtocolError(f"points must be 0 or from 2 to {MAX_POINTS}, got {query.points}")
        if not query.start <= query.end:
            raise ProtocolError(f"start must not be above end, got {query.start} and {query.end}")
        if len(self._queries) >= MAX_WAITING_QUERIES:
            raise ProtocolError(f"more than {MAX_WAITING_QUERIES} questions wait for their answer")
        self._queries.append(msgspec.structs.replace(query, series=series))

    def _is_outdated(self, message: Show | RangeQuery) -> bool:
        """True if it speaks of a run that the viewer watched when it said so: its ids are those of other curves."""
        return message.run is not None and (self.live is None or message.run != self.live.key)

    def _known(self, series: Sequence[int]) -> tuple[int, ...]:
        assert self.live is not None
        unique = tuple(dict.fromkeys(series))
        if len(unique) > MAX_SERIES_SHOWN:
            raise ProtocolError(f"at most {MAX_SERIES_SHOWN} curves at a time, got {len(unique)}")
        for curve in unique:
            if not 0 <= curve < self._series_sent:
                raise ProtocolError(f"there is no curve {curve}")
        return unique

    def drawn(self) -> None:
        """Note that the last chart frame is on its screen."""
        self.credit = True
        self.waiting_since = None

    # What is put down for it

    def put(self, message: FromServer) -> None:
        """Put down a message that must not be left out.

        Raises:
            ViewerTooSlowError: Too many wait.
        """
        self._check_room()
        self._texts.append(encode_message(message))

    def put_milestones(self, milestones: Sequence[KeptMilestone]) -> None:
        """Put down milestones that have come at once: a burst is no sign of a viewer that is slow.

        Raises:
            ViewerTooSlowError: It has not taken the burst before this one.
        """
        if messages := self._messages(milestones):
            self._check_room()
            self._texts += messages
            self._texts_allowed = max(self._texts_allowed, len(messages) + MAX_WAITING_TEXTS)

    def _messages(self, milestones: Sequence[KeptMilestone]) -> list[bytes]:
        told = (each.message(is_control=self.is_control) for each in milestones)
        return [message for message in told if message is not None]

    def _check_room(self) -> None:
        if len(self._texts) >= self._texts_allowed:
            raise ViewerTooSlowError(f"{len(self._texts)} messages wait for it")

    def put_latest(self, name: str, message: bytes) -> None:
        """Put down a message that replaces the one of that name, if that still waits."""
        self._slots[name] = message

    def announce_series(self) -> None:
        """Put down the curves that it has not heard of."""
        live = self.live
        if live is not None and self._series_sent < len(live.series):
            new = live.series[self._series_sent :]
            self._series_sent = len(live.series)
            self._may_show = self._has_shown
            self._texts.append(encode_message(Series(run=live.key, series=new)))

    # What is sent next

    def next_text(self) -> bytes | None:
        """Take out the next text message, None if there is none."""
        if self._texts:
            return self._texts.popleft()
        self._texts_allowed = MAX_WAITING_TEXTS
        for name in self._slots:
            return self._slots.pop(name)
        return None

    @property
    def has_text(self) -> bool:
        """True if a text message waits."""
        return bool(self._texts or self._slots)

    @property
    def has_chart(self) -> bool:
        """True if there is credit for a chart frame and something to put into it."""
        if not self.credit or self.live is None:
            return False
        return self.is_urgent or self.is_behind

    @property
    def is_behind(self) -> bool:
        """True if the curves that it shows go on beyond what it has."""
        live = self.live
        return live is not None and bool(self._shown) and self._cursor < live.history.axis.rows

    @property
    def is_waiting(self) -> bool:
        """True if it would miss something that it shows, or may want to, should the connection end now."""
        return self._may_show or bool(self._snapshots) or self.is_behind

    @property
    def is_urgent(self) -> bool:
        """True if something waits that need not wait for the pace of frames: answers and snapshots."""
        return bool(self._snapshots or self._queries)

    def next_chart(self, frames: Frames) -> bytes | None:
        """Make the next chart frame, if there is credit and something to send. Uses the credit up."""
        if not self.credit or self.live is None:
            return None
        frame = self._snapshot()
        if frame is None and self._answered:
            frame = self._delta(frames)  # a long answer does not hold up what is new
        was_answer = False
        if frame is None and (frame := self._answer()) is not None:
            was_answer = True
        if frame is None:
            frame = self._delta(frames)
        if frame is not None:
            self.credit = False
            self._answered = was_answer
        return frame

    def _snapshot(self) -> bytes | None:
        live = self.live
        assert live is not None
        if not self._snapshots:
            return None
        curves = self._fitting(self._snapshots, self._points)
        for _ in curves:
            self._snapshots.popleft()
        return encode_chart(chart_frame(live, "snapshot", curves, 0, self._cursor, self._points))

    def _fitting(self, curves: Iterable[int], points: int) -> list[int]:
        """Return as many curves, from the first on, as fit into a frame with so many points of each; at least one."""
        assert self.live is not None
        fitting: list[int] = []
        size = 0
        for curve in curves:
            known = self.live.history.curves[curve]
            # A point takes a row of the axis, a value and an index. Marks stand in the header.
            size += 36 * min(points, known.points) + 40 * len(known.marks)
            if fitting and size > MAX_CHART_FRAME:
                break
            fitting.append(curve)
        return fitting

    def _delta(self, frames: Frames) -> bytes | None:
        live = self.live
        assert live is not None
        end, count = live.history.axis.rows, len(self._shown)
        if not count or self._cursor >= end:
            return None
        if end - self._cursor <= DELTA_POINTS:
            rows = max(1, MAX_CHART_FRAME // (24 + 12 * count))  # that fit into a frame, all points of them
            end = min(end, self._cursor + rows)
        elif DELTA_POINTS * 36 * count > MAX_CHART_FRAME:
            # Far behind, with many curves: snapshots come in parts, one frame for all could be any size.
            self._cursor = end
            self._snapshots = deque(self._shown)
            return self._snapshot()
        first, self._cursor = self._cursor, end
        return frames.delta(live, first, end, self._shown)

    def _answer(self) -> bytes | None:
        """Answer the oldest question, or go on with an answer that does not fit into one frame."""
        live = self.live
        assert live is not None
        if not self._queries:
            return None
        query = self._queries[0]
        axis = live.history.axis
        first = axis.row_of(query.axis, query.start)
        end = axis.row_of(query.axis, float(np.nextafter(query.end, np.inf)))
        if query.points:  # some curves at a time
            curves = self._fitting(query.series[self._answer_curves :], min(query.points, end - first + 2))
            self._answer_curves += len(curves)
            more = self._answer_curves < len(query.series)
            if not more:
                self._queries.popleft()
                self._answer_curves = 0
            frame = chart_frame(
                live, "range", curves, first, end, query.points, query=query.query, more=more, margin=True
            )
            return encode_chart(frame)
        # All points: as many rows at a time as fit into a frame, should every curve have a point in each.
        first = max(first, self._answer_row or 0)
        rows = max(1, MAX_CHART_FRAME // (24 + 12 * max(1, len(query.series))))
        more = first + rows < end
        upto = min(first + rows, end)
        self._answer_row = upto if more else None
        if not more:
            self._queries.popleft()
        return encode_chart(
            chart_frame(live, "range", query.series, first, upto, None, query=query.query, more=more)
        )
