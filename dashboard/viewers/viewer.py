"""Viewer: the state of one connection, without its socket. Decides what is sent next; its memory is bounded.

A viewer watches one run: its milestones, its status, its curves. Of further runs that it lays over this one it gets
all but the milestones. Each run has its own place in the viewer, a `RunCursor`; the credit for chart frames is one
for all, and the runs take turns. Only milestones and answers wait in a queue. It is bounded: a viewer that does not
take them is disconnected, and receives them when it reconnects.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

import msgspec

from offloop.dashboard.protocol.encoding import ProtocolError, encode_message
from offloop.dashboard.protocol.from_server import FromServer, StreamDropped
from offloop.dashboard.protocol.from_viewer import LayersQuery, RangeQuery, SampleQuery, Show
from offloop.dashboard.protocol.limits import Role
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.dashboard.runs.sample_batch import SampleBatch
from offloop.dashboard.viewers.run_cursor import RunCursor
from offloop.dashboard.viewers.sample_answers import SampleAnswers
from offloop.engine import OffloopError

MAX_WAITING_TEXTS: Final = 256
"""Most milestones and answers that wait for one viewer, besides those that it receives when it connects."""

MAX_WAITING_SAMPLES: Final = 50_000
"""Most samples that wait for one viewer that streams them, as many as for the page; beyond that the oldest are dropped.
Those of several viewers share their memory."""


class ViewerTooSlowError(OffloopError):
    """A viewer has not taken messages that must not be left out. Never leaves the dashboard."""


class _WaitingSamples:
    """A place in a viewer's queue, empty once its samples were dropped: other viewers may still get them."""

    __slots__ = ("batch",)

    def __init__(self, batch: SampleBatch) -> None:
        self.batch: SampleBatch | None = batch


class Viewer:
    """What one connection has received, shows and waits for. Event loop of the dashboard only.

    All that is sent to a viewer goes through here, so the class has many methods, most of a few lines.
    """

    def __init__(self, role: Role, address: str, *, has_index: bool = False) -> None:
        """Nothing is watched yet.

        Args:
            role: What it may do.
            address: Where it is.
            has_index: It asks for samples by an index, see `Hi.samples`.
        """
        self.role: Role = role
        self.address = address
        self.has_index = has_index
        # What it has asked about samples; None before its connection is there.
        self.samples: SampleAnswers | None = None
        self._had_sample = False
        # The watched run; None while there is none.
        self.live: LiveRun | None = None
        # Key of the one run that the viewer wants to watch and that is not here; None if any will do.
        self.awaits: str | None = None
        # The viewer wants samples as events, beside the milestones.
        self.streams = False
        self.visible = True
        self.credit = True
        # Monotonic time at which the chart frame was sent that is not drawn yet.
        self.waiting_since: float | None = None
        # Of the watched and the overlaid runs, by key. The first one has the next turn.
        self._cursors: dict[str, RunCursor] = {}
        # Milestones wait as what the run keeps: one that it drops takes no memory here either.
        self._texts: deque[bytes | KeptMilestone | _WaitingSamples] = deque()
        self._texts_allowed = MAX_WAITING_TEXTS
        # Those places in the queue that have samples, which are bounded by their own number.
        self._batches: deque[_WaitingSamples] = deque()
        self._samples_waiting = 0
        self._samples_dropped = 0
        # Messages that replace their older version, by their kind and the run's key: status, latest, runs.
        self._slots: dict[tuple[str, str], bytes] = {}

    @property
    def is_control(self) -> bool:
        """True if the viewer may give commands."""
        return self.role == "control"

    def has(self, live: LiveRun) -> bool:
        """Return whether the viewer watches a run or lays it over the one that it watches."""
        cursor = self._cursors.get(live.key)
        return cursor is not None and cursor.live is live

    # What the viewer asks for

    def watch(self, live: LiveRun, status: bytes, *, after: int = -1) -> None:
        """Switch to a run: send everything again, `status` and curves first, except milestones up to `after`.

        Raises:
            ViewerTooSlowError: Too many earlier messages still wait.
        """
        self._check_room()
        if self.live is not None:
            self._leave(self.live.key)
        self._leave(live.key)
        self._drop_samples(0)
        self._samples_dropped = 0
        self.live, self.awaits = live, None
        self._enter(live, status, is_overlaid=False)
        milestones = live.milestones
        kept_from = next(iter(milestones)).seq if milestones else 0
        if milestones.dropped and after + 1 < kept_from:
            self._texts.append(milestones.missed())
        self._texts += [
            each for each in milestones if each.seq > after and each.is_visible(is_control=self.is_control)
        ]
        self._texts_allowed = len(self._texts) + MAX_WAITING_TEXTS

    def overlay(self, lives: Sequence[LiveRun], status_of: Callable[[LiveRun], bytes]) -> list[LiveRun]:
        """Lay exactly these runs over the watched one, and return those that are new.

        Raises:
            ViewerTooSlowError: Too many earlier messages still wait.
        """
        self._check_room()
        wanted = {live.key: live for live in lives if live is not self.live}
        for cursor in list(self._cursors.values()):
            if cursor.live is not self.live and wanted.get(cursor.live.key) is not cursor.live:
                self._leave(cursor.live.key)
        new = [live for live in wanted.values() if not self.has(live)]
        for live in new:
            self._enter(live, status_of(live), is_overlaid=True)
        return new

    def _enter(self, live: LiveRun, status: bytes, *, is_overlaid: bool) -> None:
        # Milestones may be 64 MiB, and the viewer wants to see how the run stands before it has them all.
        info = msgspec.structs.replace(live.info, overlaid=True) if is_overlaid else live.info
        self._texts += encode_message(info), status
        self._cursors[live.key] = RunCursor(live)
        self.announce_series(live)
        self.announce_samples(live)

    def _leave(self, key: str) -> None:
        self._cursors.pop(key, None)
        for kind in ("status", "latest", "dropped"):
            self._slots.pop((kind, key), None)

    def forget(self, live: LiveRun) -> None:
        """Lay a run that the server lets go no longer over the watched one."""
        if live is not self.live and self.has(live):
            self._leave(live.key)

    def show(self, message: Show) -> None:
        """Set which curves are on the screen; ignored if the message is about a run that is no longer here.

        Raises:
            ProtocolError: The curves do not exist, or are too many.
        """
        cursor = self._cursor_of(message)
        if cursor is not None:
            cursor.show(message)

    def ask(self, query: RangeQuery) -> None:
        """Queue a query; ignored if it is about a run that is no longer here.

        Raises:
            ProtocolError: The curves do not exist, or too many queries wait.
        """
        cursor = self._cursor_of(query)
        if cursor is not None:
            cursor.ask(query)

    def ask_sample(self, query: SampleQuery) -> None:
        """Queue a query; ignored if it is about a run that is no longer here.

        Raises:
            ProtocolError: Too many queries wait.
        """
        cursor = self._cursor_of(query)
        if cursor is not None and self.samples is not None:
            self.samples.ask(cursor.live, query)

    def ask_layers(self, query: LayersQuery) -> None:
        """Set what of a run's layers is looked at; ignored if the run is no longer here.

        Raises:
            ProtocolError: There is no run to watch yet.
        """
        cursor = self._cursor_of(query)
        if cursor is not None:
            cursor.layers.ask(query)

    def _cursor_of(self, message: Show | RangeQuery | SampleQuery | LayersQuery) -> RunCursor | None:
        """Return the run's cursor; None for a run that the viewer had before: its ids mean other curves."""
        if message.run is not None:
            return self._cursors.get(message.run)
        if self.live is None:
            raise ProtocolError(f"{message.__struct_config__.tag} before there is a run to watch")
        return self._cursors[self.live.key]

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

    def put_status(self, live: LiveRun, status: bytes) -> None:
        """Queue the status of a run in order with other messages; an older one that waits is not sent behind it."""
        self._slots.pop(("status", live.key), None)
        self._texts.append(status)

    def put_news(self, news: Sequence[KeptMilestone | SampleBatch]) -> None:
        """Queue milestones that arrived together, and the samples between them: one burst does not mean slowness.

        Raises:
            ViewerTooSlowError: The burst before this one still waits.
        """
        milestones = 0
        for each in news:
            if isinstance(each, SampleBatch):
                waiting = _WaitingSamples(each)
                self._texts.append(waiting)
                self._batches.append(waiting)
                self._samples_waiting += each.count
            elif each.is_visible(is_control=self.is_control):
                if not milestones:
                    self._check_room()
                milestones += 1
                self._texts.append(each)
        if milestones:
            self._texts_allowed = max(self._texts_allowed, milestones + MAX_WAITING_TEXTS)
        self._drop_samples(MAX_WAITING_SAMPLES)

    def _drop_samples(self, most: int) -> None:
        """Drop the oldest samples that wait, until they are no more than `most`."""
        dropped = self._samples_dropped
        while self._samples_waiting > most:
            batch = self._batches.popleft()
            assert batch.batch is not None
            self._samples_waiting -= batch.batch.count
            self._samples_dropped += batch.batch.count
            batch.batch = None
        if self._samples_dropped > dropped and self.live is not None:
            message = StreamDropped(run=self.live.key, count=self._samples_dropped)
            self.put_latest("dropped", encode_message(message), self.live.key)

    def _check_room(self) -> None:
        waiting = len(self._texts) - len(self._batches)
        if waiting >= self._texts_allowed:
            raise ViewerTooSlowError(f"{waiting} messages wait for the viewer")

    def put_latest(self, kind: str, message: bytes, run: str = "") -> None:
        """Queue a message, replacing the waiting one of that kind about that run."""
        self._slots[kind, run] = message

    def announce_series(self, live: LiveRun, revised: Collection[int] = ()) -> None:
        """Queue the names of a run's curves that are new to the viewer, and send again those that were `revised`."""
        message = self._cursors[live.key].new_series(revised)
        if message is not None:
            self._texts.append(message)

    def announce_samples(self, live: LiveRun) -> None:
        """Queue the names of a run's samples that are new to the viewer, if it wants them."""
        if self.has_index and (message := self._cursors[live.key].new_samples()) is not None:
            self._texts.append(message)

    # What is sent next

    def next_text(self) -> bytes | None:
        """Take the next text message; None if none waits."""
        while self._texts:
            text = self._texts.popleft()
            if isinstance(text, bytes):
                return text
            if isinstance(text, KeptMilestone):
                return self._milestone(text)
            if text.batch is not None:
                self._batches.popleft()
                self._samples_waiting -= text.batch.count
                return text.batch.message()
        self._texts_allowed = MAX_WAITING_TEXTS
        for name in self._slots:
            return self._slots.pop(name)
        return None

    def _milestone(self, milestone: KeptMilestone) -> bytes:
        """Return a milestone's message. If the run has dropped it, skip all that are dropped, and say so."""
        message = milestone.message(is_control=self.is_control, is_brief=self.has_index)
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

    def allow_frame(self, live: LiveRun) -> None:
        """Note that the rate limit allows a frame with new points of a run."""
        self._cursors[live.key].is_due = True

    def allow_layers(self, live: LiveRun) -> None:
        """Note that the rate limit allows a frame with new measurements of a run's layers."""
        self._cursors[live.key].layers.is_due = True

    def gets_chart(self, *, at_once: bool = False) -> bool:
        """Return whether there is credit for a chart frame and data that may go now.

        Args:
            at_once: New points may go whatever the rate limit says.
        """
        return self.credit and (self._has_sample or self._wants_chart(at_once=at_once))

    @property
    def _has_sample(self) -> bool:
        return self.samples is not None and self.samples.has_frame

    def _wants_chart(self, *, at_once: bool) -> bool:
        return any(each.wants_frame(at_once=at_once) for each in self._cursors.values())

    @property
    def is_waiting(self) -> bool:
        """True if closing now would cut off curves that the viewer shows or may want to show."""
        return any(cursor.is_waiting for cursor in self._cursors.values())

    def next_chart(self, *, at_once: bool = False) -> bytes | None:
        """Make the next binary frame and use up the credit; None without credit or data. See `gets_chart`."""
        if not self.credit:
            return None
        # In turn: a long text must not hold up the curves.
        if self._has_sample and not (self._had_sample and self._wants_chart(at_once=at_once)):
            assert self.samples is not None
            self._had_sample, self.credit = True, False
            return self.samples.next_frame()
        self._had_sample = False
        for key, cursor in list(self._cursors.items()):
            if not cursor.wants_frame(at_once=at_once):
                continue
            # To the end of the line
            self._cursors[key] = self._cursors.pop(key)
            frame = cursor.next_frame()
            if frame is not None:
                self.credit = False
                return frame
        return None
