"""Hub: connects all runs of a process with all viewers. Lives on the dashboard's own event loop.

    training thread ── bus ──> subscription ──> follow ──> LiveRun ──> Viewer ──> link ──> browser
                       Run <── thread-safe commands ──── ViewerCommands <─────────┘

The hub reads a run's events from a bounded buffer, so nothing here can make a run wait. A viewer that does not keep
up receives fewer and larger frames, and is disconnected before it costs the other viewers anything.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import anyio
import anyio.lowlevel

from offloop.dashboard.curves.history import HISTORY_BYTES
from offloop.dashboard.protocol.encoding import ProtocolError, decode_viewer_message, encode_message
from offloop.dashboard.protocol.from_server import Bye, Hello, Pong, Runs, RunSummary
from offloop.dashboard.protocol.from_viewer import (
    CommandRequest,
    Drawn,
    Edit,
    EditCheckpoint,
    Hi,
    LayersQuery,
    ListCheckpoints,
    ListRuns,
    Overlay,
    Ping,
    Publish,
    RangeQuery,
    SampleQuery,
    Show,
    Stream,
    TakeBack,
    Visibility,
    Watch,
)
from offloop.dashboard.protocol.limits import CLOSE_SLOW, MAX_OVERLAID
from offloop.dashboard.runs.disk_calls import DiskCalls
from offloop.dashboard.runs.followed_runs import FollowedRuns
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.milestones import MILESTONE_BYTES, KeptMilestone
from offloop.dashboard.runs.rows import RowCursor, RunList, row_of
from offloop.dashboard.runs.run_source import ReplaySource
from offloop.dashboard.runs.sample_batch import SampleBatch
from offloop.dashboard.viewers.connection import Connection, Link, RefusedError, Visitor, receive_hi
from offloop.dashboard.viewers.followed_audience import FollowedAudience
from offloop.dashboard.viewers.run_checkpoints import RunCheckpoints
from offloop.dashboard.viewers.run_edits import RunEdits
from offloop.dashboard.viewers.sample_answers import SampleAnswers
from offloop.dashboard.viewers.viewer import Viewer, ViewerTooSlowError
from offloop.dashboard.viewers.viewer_commands import ViewerCommands
from offloop.engine import Event, RunRecord, SubscriberTooSlowError, Subscription

FRAME_INTERVAL: Final = 0.1
"""Seconds between two chart frames: 20 a second cost a page a third of a core and training 7 %, 10 half of that."""
VIEWERS_AT_FULL_PACE: Final = 5
"""More viewers share the frames of this many: ten at full pace cost training 6 % on two cores. A viewer counts once for
each run that goes on and that it shows."""
STATUS_INTERVAL: Final = 0.25
"""Seconds between two status messages without a milestone: people cannot read numbers that change more often."""
UNWATCHED_INTERVAL: Final = 0.25
"""Seconds between two reads of a run without viewers; a new viewer sees data at most this old."""
SLOW_INTERVAL: Final = 1.0
"""Seconds between two checks of what changes without an event: clocks, stalls, slow viewers."""
ENDED_RUNS_KEPT: Final = 3
"""Runs that have ended and can still be viewed."""
EVENTS_AT_ONCE: Final = 4_096
LISTING: Final = 1.0
"""Seconds that a new viewer waits for the first look at a directory of runs."""


class Hub:
    """Distributes what runs publish to the viewers that watch them. Event loop of the dashboard only.

    All that viewers share is here, so the class has many methods, most of a few lines.
    """

    def __init__(
        self,
        *,
        post: Callable[[Callable[[], None]], object],
        page: str | None = None,
        frame_interval: float = FRAME_INTERVAL,
    ) -> None:
        """Make a hub without runs and viewers.

        Args:
            post: Calls a function on the hub's event loop. Any thread; never waits.
            page: Hash of the page that is served.
            frame_interval: Least seconds between two chart frames of a viewer; more when there are many viewers.
        """
        self.id = secrets.token_hex(8)
        # By key, oldest first.
        self.runs: dict[str, LiveRun] = {}
        self.list = RunList()
        self.page = page
        self.connections: list[Connection] = []
        self._frame_interval = frame_interval
        # Keys of runs whose status is sent at the next beat.
        self._changed: set[str] = set()
        self._commands = ViewerCommands(self.find, post, self._send_status_to)
        self._calls = DiskCalls(post)
        self._edits = RunEdits(self._calls, self._directory_of, self._ask_followed)
        self._checkpoints = RunCheckpoints(self._calls, self._directory_of, self.find, post)
        # Runs of a directory besides those of this process, if there are any.
        self.followed: FollowedRuns | None = None
        self._audience: FollowedAudience | None = None
        self._names_all = False
        # One of the two is set: `_occupied` while there are viewers, `_empty` while there are none.
        self._occupied = anyio.Event()
        self._empty = anyio.Event()
        self._empty.set()

    def find(self, key: str) -> LiveRun | None:
        """Return a run of this process, or of the directory if it is open; None if there is none with this key."""
        live = self.runs.get(key)
        return self.followed.live.get(key) if live is None and self.followed is not None else live

    @property
    def _all(self) -> list[LiveRun]:
        """The runs that viewers may have: those of this process, and those of the directory that are open."""
        return [*self.runs.values(), *([] if self.followed is None else self.followed.live.values())]

    def _watching(self, live: LiveRun | None) -> list[Connection]:
        """Return the connections that watch a run; None: those that wait for one."""
        return [connection for connection in self.connections if connection.viewer.live is live]

    def _showing(self, live: LiveRun) -> list[Connection]:
        """Return the connections that watch a run or lay it over another one."""
        return [connection for connection in self.connections if connection.viewer.has(live)]

    # What a run publishes

    async def follow(self, live: LiveRun, subscription: Subscription[Event]) -> None:
        """Distribute a run's events until it ends."""
        self.runs[live.key] = live
        self._forget_old_runs()
        self.send_runs()
        for connection in self._watching(None):
            if connection.viewer.awaits in (None, live.key):
                self._watch(connection, live)
        if isinstance(live.source, ReplaySource):
            self._go_on_to_attempt(live)
        try:
            with subscription:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._take_at_pace, live, subscription)
                    while await subscription.wait(samples=False):
                        self._take(live, subscription)
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
        finally:
            # Also after a bug in here: viewers must not wait for events that cannot come.
            live.finish()
            self._tick(live)
            self._send_status(live)
            self.send_runs()

    def _go_on_to_attempt(self, live: LiveRun) -> None:
        """Show the next attempt of a replay to the viewers that have seen the one before it."""
        for before in list(self.runs.values()):
            if before is not live and before.name == live.name and before.is_over:
                for connection in self._watching(before):
                    self._watch(connection, live)

    def follow_directory(
        self,
        runs_dir: Path,
        *,
        history_bytes: int = HISTORY_BYTES,
        milestone_bytes: int = MILESTONE_BYTES,
        names_all: bool = False,
    ) -> FollowedRuns:
        """Show the runs of a directory, too, whichever processes write them; `run` of what is returned does it.

        Args:
            runs_dir: The directory. It need not exist.
            history_bytes: Limit of the memory for the curves of one run.
            milestone_bytes: Limit of the memory for its milestones.
            names_all: Name these runs to all viewers. False: only to those that ask for the list.
        """
        self._names_all = names_all
        self._audience = FollowedAudience(self, self._changed.add, is_eager=names_all)
        self.followed = FollowedRuns(
            runs_dir,
            self._audience,
            self._calls,
            history_bytes=history_bytes,
            milestone_bytes=milestone_bytes,
        )
        return self.followed

    def _ask_followed(self) -> None:
        if self.followed is not None:
            self.followed.ask()

    def _directory_of(self, key: str) -> str | None:
        if key in self.runs:
            return self.runs[key].info.directory
        record = None if self.followed is None else self.followed.records.get(key)
        return None if record is None else record.directory

    # What followed runs have to tell: see `Screens`

    def begin_anew(self, live: LiveRun, *, is_new_attempt: bool = False) -> None:
        """Have the viewers that want a run, or have an earlier version of it, begin with this one."""
        # Its milestones are all sent again.
        live.stream = None
        for connection in self.connections:
            viewer, awaited = connection.viewer, connection.viewer.awaits
            is_watched = viewer.live is not None and viewer.live.key == live.key
            if is_watched or awaited == live.key or (viewer.live is None and awaited is None):
                self._watch(connection, live, after=-1 if is_new_attempt else _known_of(viewer.live, live))
                if awaited != live.key:
                    viewer.awaits = awaited
            elif live.key in connection.overlaid:
                self._overlay(connection, connection.overlaid)
                connection.wake()

    def distribute(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        """Send what a run has taken in to its viewers."""
        self._send_milestones(live, milestones)
        if milestones:
            self._send_status(live)
        else:
            self._changed.add(live.key)
        self._tick(live)

    def send_rows(self) -> None:
        """Send the first rows of a directory at once."""
        self._send_rows()

    def tell_missing(self, key: str) -> None:
        """Tell the viewers that want a run that there is none."""
        for connection in self.connections:
            if connection.viewer.awaits == key and connection.viewer.live is not None:
                connection.viewer.awaits = None
                connection.viewer.put_latest("runs", self._list_of_runs())
                connection.wake()

    async def _take_at_pace(self, live: LiveRun, subscription: Subscription[Event]) -> None:
        """Take samples at the rate of the frames that show them."""
        while True:
            while self._take(live, subscription) == EVENTS_AT_ONCE:
                await anyio.lowlevel.checkpoint()
            self._tick(live)
            await anyio.sleep(self.pace if self._showing(live) else UNWATCHED_INTERVAL)

    def _take(self, live: LiveRun, subscription: Subscription[Event]) -> int:
        """Take the waiting events of a run and return their number."""
        try:
            events = subscription.take(EVENTS_AT_ONCE)
        except SubscriberTooSlowError:
            # The bus has logged it, and the page reports that the run is silent.
            return 0
        if events:
            milestones = live.take_in(events)
            self._send_milestones(live, milestones)
            if milestones:
                self._send_status(live)
            else:
                self._changed.add(live.key)
        return len(events)

    def _tick(self, live: LiveRun) -> None:
        """Allow every viewer of a run a chart frame: all at once, so that they share one encoding."""
        for connection in self._showing(live):
            connection.viewer.allow_frame(live)
            if connection.gets_chart:
                connection.wake()

    def _send_milestones(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        """Send new curves to the viewers of a run, and milestones to those that watch it."""
        revised = live.take_revised()
        news: Sequence[KeptMilestone | SampleBatch] = milestones
        if live.stream is not None:
            news, live.stream = live.stream, None
            self._stream(live)
        for connection in self._showing(live):
            try:
                connection.viewer.announce_series(live, revised)
                connection.viewer.announce_samples(live)
                if connection.viewer.live is live:
                    connection.viewer.put_news(news if connection.viewer.streams else milestones)
            except ViewerTooSlowError as error:
                connection.end(CLOSE_SLOW, str(error))
            if connection.viewer.has_text:
                connection.wake()

    def _stream(self, live: LiveRun) -> None:
        """Have a run keep samples for the viewers that want them, if there are any."""
        if live.stream is None and any(each.viewer.streams for each in self._watching(live)):
            live.stream = []

    def _send_status(self, live: LiveRun, *, with_latest: bool = False) -> None:
        self._changed.discard(live.key)
        if not (connections := self._showing(live)):
            return
        encoded: dict[bool, bytes] = {}
        latest = encode_message(live.latest()) if with_latest else None
        for connection in connections:
            is_control = connection.viewer.is_control
            if is_control not in encoded:
                encoded[is_control] = self._status(live, is_control=is_control)
            connection.viewer.put_latest("status", encoded[is_control], live.key)
            if latest is not None:
                connection.viewer.put_latest("latest", latest, live.key)
                connection.viewer.allow_layers(live)
            connection.wake()

    def _send_status_to(self, connection: Connection, live: LiveRun) -> None:
        """Send a viewer the status of a run in turn with its milestones and answers."""
        if connection.viewer.has(live):
            connection.viewer.put_status(live, self._status(live, is_control=connection.viewer.is_control))

    def _status(self, live: LiveRun, *, is_control: bool) -> bytes:
        return encode_message(live.status(viewers=len(self.connections), is_control=is_control))

    def _list_of_runs(self) -> bytes:
        return encode_message(Runs(runs=self._names))

    @property
    def _names(self) -> list[RunSummary]:
        followed = self.followed.summaries if self.followed is not None and self._names_all else []
        return [*followed, *(live.summary for live in self.runs.values())]

    def send_runs(self) -> None:
        """Send the names of all runs to all viewers."""
        message = self._list_of_runs()
        for connection in self.connections:
            connection.viewer.put_latest("runs", message)
            connection.wake()

    def _send_rows(self) -> None:
        """Send what has changed in the list of runs to the viewers that asked for it."""
        listening = [each for each in self.connections if each.rows is not None]
        if listening:
            self._list_own_runs()
        for connection in listening:
            if connection.rows is not None:
                connection.rows.allow()
            connection.wake()

    def _list_own_runs(self) -> None:
        """Bring the rows of the runs of this process up to date."""
        if self._audience is not None:
            self._audience.hide_runs_of_this_process()
        for live in self.runs.values():
            self.list.put(row_of(live, self._record_of(live)))

    def _record_of(self, live: LiveRun) -> RunRecord | None:
        if self.followed is None or live.info.directory is None:
            return None
        return self.followed.record_in(live.info.directory)

    def _forget_old_runs(self) -> None:
        ended = [live for live in self.runs.values() if live.is_over]
        for live in ended[: max(0, len(ended) - ENDED_RUNS_KEPT)]:
            del self.runs[live.key]
            self.list.remove(live.key)
            newest = next(reversed(self.runs.values()))
            for connection in self._watching(live):
                self._watch(connection, newest)
            for connection in self._showing(live):
                connection.viewer.forget(live)

    async def beat(self) -> None:
        """Send what changes without an event while there are viewers. Runs until cancelled."""
        slow_at = 0.0
        while True:
            await self._occupied.wait()
            now = time.monotonic()
            is_slow_beat = now - slow_at >= SLOW_INTERVAL
            if is_slow_beat:
                slow_at = now
                for connection in self.connections:
                    connection.end_if_stuck(now)
                    connection.end_if_logged_out()
                self._commands.expire(now)
            for live in self._all:
                if is_slow_beat or live.key in self._changed:
                    self._send_status(live, with_latest=is_slow_beat)
            if is_slow_beat:
                self._send_rows()
            await anyio.sleep(min(STATUS_INTERVAL * self._share, SLOW_INTERVAL))

    @property
    def pace(self) -> float:
        """Least seconds between two chart frames of a viewer."""
        return self._frame_interval * self._share

    @property
    def _share(self) -> float:
        """Factor by which intervals grow with the number of viewers, so that many cost no more than a few."""
        going = [live for live in self.runs.values() if not live.is_over]
        shown = sum(connection.viewer.has(live) for connection in self.connections for live in going)
        return max(1.0, max(shown, len(self.connections)) / VIEWERS_AT_FULL_PACE)

    # Who is connected

    async def serve(self, link: Link, *, visitor: Visitor, address: str) -> None:
        """Serve one viewer until its connection ends."""
        hi = await receive_hi(link)
        if hi is None:
            return
        try:
            role = visitor.admit(hi)
        except RefusedError as error:
            await link.close(error.code, error.reason)
            return
        viewer = Viewer(role, address, has_index=hi.samples == "index")
        connection = Connection(viewer, link, visitor)
        viewer.samples = SampleAnswers(self._calls.begin, connection.wake)
        self.connections.append(connection)
        self._occupied.set()
        # Replace the event only when it is set: `wait_until_empty` may be waiting for the one that is not.
        if self._empty.is_set():
            self._empty = anyio.Event()
        try:
            if self.followed is not None and self._names_all:
                with anyio.move_on_after(LISTING):
                    self.followed.ask()
                    await self.followed.ready.wait()
            self._greet(connection, hi)
            await connection.run(self._handle)
        finally:
            self.connections.remove(connection)
            if not self.connections:
                self._occupied = anyio.Event()
                self._empty.set()
            self._commands.forget(connection)
            self._checkpoints.forget(connection)
            # Every status contains the number of viewers.
            self._changed.update(live.key for live in self._all)
            self._ask_followed()
        if connection.close is not None:
            await link.close(*connection.close)

    def _greet(self, connection: Connection, hi: Hi) -> None:
        live = None if hi.run is None else self.find(hi.run)
        viewer, followed = connection.viewer, self.followed
        if live is None and hi.run is not None:
            if hi.only or (followed is not None and followed.may_have(hi.run)):
                viewer.awaits = hi.run
        if live is None and viewer.awaits is None:
            live = next(reversed(self.runs.values()), None)
            if live is None and followed is not None and followed.newest is not None:
                viewer.awaits = followed.newest
                live = self.find(followed.newest)
        watched = viewer.awaits if live is None else live.key
        if live is None and (followed is None or viewer.awaits not in followed.records):
            watched = None
        connection.viewer.put(
            Hello(
                server=self.id,
                page=self.page,
                role=connection.viewer.role,
                runs=self._names,
                run=watched,
                time=time.time(),
                frame_interval=self._frame_interval,
            )
        )
        if live is not None:
            knows_it = hi.server == self.id and hi.run == live.key
            self._watch(connection, live, after=hi.after if knows_it else -1)
        self._changed.update(live.key for live in self._all)
        self._ask_followed()
        connection.wake()

    def _watch(self, connection: Connection, live: LiveRun, *, after: int = -1) -> None:
        viewer = connection.viewer
        status = self._status(live, is_control=viewer.is_control)
        try:
            viewer.watch(live, status, after=after)
        except ViewerTooSlowError as error:
            connection.end(CLOSE_SLOW, str(error))
            return
        viewer.put_latest("status", status, live.key)
        viewer.put_latest("latest", encode_message(live.latest()), live.key)
        self._stream(live)
        connection.wake()

    def _overlay(self, connection: Connection, keys: Sequence[str]) -> None:
        if len(keys) > MAX_OVERLAID:
            raise ProtocolError(f"at most {MAX_OVERLAID} runs can be overlaid, got {len(keys)}")
        connection.overlaid = keys
        self._ask_followed()
        viewer = connection.viewer
        lives = [live for key in keys if (live := self.find(key)) is not None]
        for live in viewer.overlay(lives, lambda live: self._status(live, is_control=viewer.is_control)):
            viewer.put_latest("latest", encode_message(live.latest()), live.key)

    def _handle(self, connection: Connection, data: str | bytes) -> None:
        """Handle a viewer's message."""
        viewer = connection.viewer
        message = decode_viewer_message(data)
        match message:
            case Drawn():
                viewer.drawn()
                if connection.gets_chart:
                    connection.wake()
                return
            case Ping():
                viewer.put(Pong(sent=message.sent, time=time.time()))
            case Show():
                viewer.show(message)
            case RangeQuery():
                viewer.ask(message)
            case SampleQuery():
                viewer.ask_sample(message)
            case LayersQuery():
                viewer.ask_layers(message)
            case CommandRequest():
                self._commands.request(connection, message)
            case TakeBack():
                self._commands.take_back(connection, message)
            case Publish():
                self._commands.publish(connection, message)
            case ListRuns():
                if not message.on:
                    connection.rows = None
                elif connection.rows is None:
                    self._list_own_runs()
                    connection.rows = RowCursor(self.list)
                    self._ask_followed()
            case Stream():
                viewer.streams = message.on
                if viewer.live is not None:
                    self._stream(viewer.live)
            case Visibility():
                viewer.visible = message.visible
                # A hidden page draws nothing: its time to draw starts now.
                if viewer.waiting_since is not None:
                    viewer.waiting_since = time.monotonic()
            case Watch():
                if (wanted := self.find(message.run)) is not None:
                    self._watch(connection, wanted)
                elif self.followed is not None and self.followed.may_have(message.run):
                    viewer.awaits = message.run
                else:
                    # The run was forgotten while the message was on its way.
                    viewer.put_latest("runs", self._list_of_runs())
                self._ask_followed()
            case Edit():
                self._edits.request(connection, message)
            case ListCheckpoints():
                self._checkpoints.send(connection, message)
            case EditCheckpoint():
                self._checkpoints.edit(connection, message)
            case Overlay():
                self._overlay(connection, message.runs)
            case Hi():
                raise ProtocolError("hi was said before")
        connection.wake()

    async def wait_until_empty(self) -> None:
        """Wait until the last viewer has disconnected."""
        await self._empty.wait()

    def say_goodbye(self, code: int, reason: str) -> None:
        """Notify all viewers; close each once its queue is sent. `wait_until_empty` waits for that."""
        for connection in self.connections:
            connection.may_finish = connection.viewer.visible and connection.close is None
            connection.end(code, reason)
            connection.put(Bye(reason=reason))


def _known_of(before: LiveRun | None, live: LiveRun) -> int:
    """Return `seq` of the last milestone that a viewer of an earlier version of a run keeps; -1 for none."""
    if before is None or before.milestones.last is None:
        return -1
    same = all(
        getattr(before.info, name) == getattr(live.info, name) for name in ("key", "attempt", "started")
    )
    return before.milestones.last.seq if same else -1
