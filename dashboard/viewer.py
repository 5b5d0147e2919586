"""Viewer: the state of one connection, without its socket. Decides what is sent next; its memory is bounded.

A viewer is a cursor into the run's history, not a queue of points: a chart frame is made when the viewer has credit
for it, from what is new since the last one. Only milestones and answers wait in a queue. It is bounded: a viewer
that does not take them is disconnected, and receives them when it reconnects.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np

from offloop.dashboard.frames import DELTA_POINTS
from offloop.dashboard.live_run import LiveRun
from offloop.dashboard.milestones import KeptMilestone
from offloop.dashboard.protocol import (
    MAX_CHART_FRAME,
    MAX_POINTS,
    MAX_SERIES_SHOWN,
    FromServer,
    ProtocolError,
    RangeQuery,
    Role,
    Series,
    Show,
    encode_message,
)
from offloop.engine import OffloopError

MAX_WAITING_TEXTS: Final = 256
"""Most milestones and answers that wait for one viewer, besides those that it receives when it connects."""
MAX_WAITING_QUERIES: Final = 64
"""Most unanswered queries of one viewer."""


class ViewerTooSlowError(OffloopError):
    """A viewer has not taken messages that must not be left out. Never leaves the dashboard."""


class Viewer:
    """What one connection has received, shows and waits for. Event loop of the dashboard only."""

    def __init__(self, role: Role, address: str) -> None:
        self.role: Role = role
        self.address = address
        self.live: LiveRun | None = None
        self.visible = True
        self.credit = True
        # Monotonic time at which the chart frame was sent that is not drawn yet.
        self.waiting_since: float | None = None
        # Milestones wait as what the run keeps: one that it drops takes no memory here either.
        self._texts: deque[bytes | KeptMilestone] = deque()
        self._texts_allowed = MAX_WAITING_TEXTS
        # Messages that replace their older version: status, latest, runs.
        self._slots: dict[str, bytes] = {}
        self._series_sent = 0
        # True once the viewer has named the curves on its screen ...
        self._has_shown = False
        # ... and true if new curves were announced since, which it may want to show.
        self._may_show = False
        # Row up to which the shown curves were sent.
        self._cursor = 0
        self._shown: tuple[int, ...] = ()
        self._points = 1_600
        # Shown curves of which nothing was sent yet.
        self._snapshots: deque[int] = deque()
        self._queries: deque[RangeQuery] = deque()
        # The next row of an answer with all points that takes several frames.
        self._answer_row: int | None = None
        # Number of curves of a reduced answer that were sent.
        self._answer_curves = 0
        # True if the last chart frame was an answer: new data has its turn.
        self._answered = False

    @property
    def is_control(self) -> bool:
        """True if the viewer may give commands."""
        return self.role == "control"

    # What the viewer asks for

    def watch(self, live: LiveRun, status: bytes, *, after: int = -1) -> None:
        """Switch to a run: send everything again, `status` and curves first, except milestones up to `after`.

        Raises:
            ViewerTooSlowError: Too many earlier messages still wait.
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
        # Milestones may be 64 MiB, and the viewer wants to see how the run stands before it has them all.
        self._texts += encode_message(live.info), status
        self.announce_series()
        milestones = live.milestones
        kept_from = next(iter(milestones)).seq if milestones else 0
        if milestones.dropped and after + 1 < kept_from:
            self._texts.append(milestones.missed())
        self._texts += self._visible([each for each in milestones if each.seq > after])
        self._texts_allowed = len(self._texts) + MAX_WAITING_TEXTS

    def show(self, message: Show) -> None:
        """Set which curves are on the screen; ignored if the message is about a run that is no longer watched.

        Raises:
            ProtocolError: The curves do not exist, or are too many.
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
        """Queue a query; ignored if it is about a run that is no longer watched.

        Raises:
            ProtocolError: The curves do not exist, or too many queries wait.
        """
        if self._is_outdated(query):
            return
        if self.live is None:
            raise ProtocolError("range before there is a run to watch")
        # Without duplicates: the number of curves bounds the size of the answer.
        series = list(self._known(query.series))
        if query.points and not 2 <= query.points <= MAX_POINTS:
            raise ProtocolError(f"points must be 0 or from 2 to {MAX_POINTS}, got {query.points}")
        if not query.start <= query.end:
            raise ProtocolError(f"start must not be above end, got {query.start} and {query.end}")
        if len(self._queries) >= MAX_WAITING_QUERIES:
            raise ProtocolError(f"more than {MAX_WAITING_QUERIES} queries wait for their answer")
        self._queries.append(msgspec.structs.replace(query, series=series))

    def _is_outdated(self, message: Show | RangeQuery) -> bool:
        """True if a message is about a run that the viewer watched before: its ids mean other curves."""
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
        """Note that the last chart frame is on the screen."""
        self.credit = True
        self.waiting_since = None

    # What waits for the viewer

    def put(self, message: FromServer) -> None:
        """Queue a message that must not be left out.

        Raises:
            ViewerTooSlowError: Too many messages wait.
        """
        self._check_room()
        self._texts.append(encode_message(message))

    def put_milestones(self, milestones: Sequence[KeptMilestone]) -> None:
        """Queue milestones that arrived together: one burst does not mean that the viewer is slow.

        Raises:
            ViewerTooSlowError: The burst before this one still waits.
        """
        if visible := self._visible(milestones):
            self._check_room()
            self._texts += visible
            self._texts_allowed = max(self._texts_allowed, len(visible) + MAX_WAITING_TEXTS)

    def _visible(self, milestones: Sequence[KeptMilestone]) -> list[KeptMilestone]:
        return [each for each in milestones if each.is_visible(is_control=self.is_control)]

    def _check_room(self) -> None:
        if len(self._texts) >= self._texts_allowed:
            raise ViewerTooSlowError(f"{len(self._texts)} messages wait for the viewer")

    def put_latest(self, name: str, message: bytes) -> None:
        """Queue a message, replacing the waiting one of that name."""
        self._slots[name] = message

    def announce_series(self, revised: Collection[int] = ()) -> None:
        """Queue the names of curves that are new to the viewer, and send again those that were `revised`.

        A revised curve has points before the newest row, which were not sent in their turn.
        """
        live = self.live
        self._snapshots += [each for each in self._shown if each in revised and each not in self._snapshots]
        if live is not None and self._series_sent < len(live.series):
            new = live.series[self._series_sent :]
            self._series_sent = len(live.series)
            self._may_show = self._has_shown
            self._texts.append(encode_message(Series(run=live.key, series=new)))

    # What is sent next

    def next_text(self) -> bytes | None:
        """Take the next text message; None if none waits."""
        if self._texts:
            text = self._texts.popleft()
            return text if isinstance(text, bytes) else self._milestone(text)
        self._texts_allowed = MAX_WAITING_TEXTS
        for name in self._slots:
            return self._slots.pop(name)
        return None

    def _milestone(self, milestone: KeptMilestone) -> bytes:
        """Return a milestone's message. If the run has dropped it, skip all that are dropped, and say so."""
        message = milestone.message(is_control=self.is_control)
        if message is not None:
            return message
        texts = self._texts
        while texts and isinstance(texts[0], KeptMilestone) and texts[0].is_dropped:
            texts.popleft()
        return milestone.keeper.missed()

    @property
    def has_text(self) -> bool:
        """True if a text message waits."""
        return bool(self._texts or self._slots)

    @property
    def has_chart(self) -> bool:
        """True if there is credit for a chart frame and data for it."""
        if not self.credit or self.live is None:
            return False
        return self.is_urgent or self.is_behind

    @property
    def is_behind(self) -> bool:
        """True if the shown curves have points that were not sent."""
        live = self.live
        return live is not None and bool(self._shown) and self._cursor < live.history.axis.rows

    @property
    def is_waiting(self) -> bool:
        """True if closing now would cut off curves that the viewer shows or may want to show."""
        return self._may_show or bool(self._snapshots) or self.is_behind

    @property
    def is_urgent(self) -> bool:
        """True if answers or snapshots wait: they are exempt from the rate limit of frames."""
        return bool(self._snapshots or self._queries)

    def next_chart(self) -> bytes | None:
        """Make the next chart frame and use up the credit; None without credit or data."""
        if not self.credit or self.live is None:
            return None
        frame = self._snapshot()
        # Alternate answers with new data: a long answer must not hold up the curves.
        if frame is None and self._answered:
            frame = self._delta()
        was_answer = False
        if frame is None and (frame := self._answer()) is not None:
            was_answer = True
        if frame is None:
            frame = self._delta()
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
        return live.frames.make("snapshot", curves, 0, self._cursor, self._points)

    def _fitting(self, curves: Iterable[int], points: int) -> list[int]:
        """Return as many of the first curves as fit into a frame with `points` points each; at least one."""
        assert self.live is not None
        fitting: list[int] = []
        size = 0
        for curve in curves:
            known = self.live.history.curves[curve]
            # A point takes a row of the axis, a value and an index; marks are part of the header.
            size += 36 * min(points, known.points) + 40 * len(known.marks)
            if fitting and size > MAX_CHART_FRAME:
                break
            fitting.append(curve)
        return fitting

    def _delta(self) -> bytes | None:
        live = self.live
        assert live is not None
        end, count = live.history.axis.rows, len(self._shown)
        if not count or self._cursor >= end:
            return None
        if end - self._cursor <= DELTA_POINTS:
            # As many rows as fit into a frame with all their points.
            rows = max(1, MAX_CHART_FRAME // (24 + 12 * count))
            end = min(end, self._cursor + rows)
        elif DELTA_POINTS * 36 * count > MAX_CHART_FRAME:
            # Far behind with many curves: send snapshots in parts, as a single frame could have any size.
            self._cursor = end
            self._snapshots = deque(self._shown)
            return self._snapshot()
        first, self._cursor = self._cursor, end
        return live.frames.delta(first, end, self._shown)

    def _answer(self) -> bytes | None:
        """Answer the oldest query, or continue an answer that takes several frames."""
        live = self.live
        assert live is not None
        if not self._queries:
            return None
        query = self._queries[0]
        axis = live.history.axis
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
            return live.frames.make(
                "range", curves, first, end, query.points, query=query.query, more=more, margin=True
            )
        # All points: as many rows at a time as fit into a frame if every curve has a point in every row.
        first = max(first, self._answer_row or 0)
        rows = max(1, MAX_CHART_FRAME // (24 + 12 * max(1, len(query.series))))
        more = first + rows < end
        upto = min(first + rows, end)
        self._answer_row = upto if more else None
        if not more:
            self._queries.popleft()
        return live.frames.make("range", query.series, first, upto, None, query=query.query, more=more)
