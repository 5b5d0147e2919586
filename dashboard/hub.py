"""Hub: connects all runs of a process with all viewers. Lives on the dashboard's own event loop.

    training thread ── bus ──> subscription ──> follow ──> LiveRun ──> Viewer ──> link ──> browser
                       Run <── thread-safe commands ──── ViewerCommands <─────────┘

The hub reads a run's events from a bounded buffer, so nothing here can make a run wait. A viewer that does not keep
up receives fewer and larger frames, and is disconnected before it costs the other viewers anything.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

import anyio
import anyio.lowlevel

from offloop.dashboard.connection import Connection, Link, RefusedError, Visitor, receive_hi
from offloop.dashboard.live_run import LiveRun
from offloop.dashboard.milestones import KeptMilestone
from offloop.dashboard.protocol import (
    CLOSE_SLOW,
    MAX_OVERLAID,
    Bye,
    CommandRequest,
    Drawn,
    Hello,
    Hi,
    ListRuns,
    Overlay,
    Ping,
    Pong,
    ProtocolError,
    RangeQuery,
    Runs,
    Show,
    Visibility,
    Watch,
    decode_viewer_message,
    encode_message,
)
from offloop.dashboard.rows import RowCursor, RunList, row_of
from offloop.dashboard.viewer import Viewer, ViewerTooSlowError
from offloop.dashboard.viewer_commands import ViewerCommands
from offloop.engine import Event, SubscriberTooSlowError, Subscription

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


class Hub:
    """Distributes what runs publish to the viewers that watch them. Event loop of the dashboard only."""

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
        self._commands = ViewerCommands(self.runs, post)
        # One of the two is set: `_occupied` while there are viewers, `_empty` while there are none.
        self._occupied = anyio.Event()
        self._empty = anyio.Event()
        self._empty.set()

    def find(self, key: str) -> LiveRun | None:
        """Return a run; None if there is none with this key."""
        return self.runs.get(key)

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
        self._send_runs()
        for connection in self._watching(None):
            if connection.viewer.awaits in (None, live.key):
                self._watch(connection, live)
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
            self._send_runs()

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
        for connection in self._showing(live):
            try:
                connection.viewer.announce_series(live, revised)
                if connection.viewer.live is live:
                    connection.viewer.put_milestones(milestones)
            except ViewerTooSlowError as error:
                connection.end(CLOSE_SLOW, str(error))
            if connection.viewer.has_text:
                connection.wake()

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
            connection.wake()

    def _status(self, live: LiveRun, *, is_control: bool) -> bytes:
        return encode_message(live.status(viewers=len(self.connections), is_control=is_control))

    def _list_of_runs(self) -> bytes:
        return encode_message(Runs(runs=[live.summary for live in self.runs.values()]))

    def _send_runs(self) -> None:
        message = self._list_of_runs()
        for connection in self.connections:
            connection.viewer.put_latest("runs", message)
            connection.wake()

    def _send_rows(self) -> None:
        """Send what has changed in the list of runs to the viewers that asked for it."""
        listening = [each for each in self.connections if each.rows is not None]
        for live in self.runs.values() if listening else ():
            self.list.put(row_of(live))
        for connection in listening:
            if connection.rows is not None:
                connection.rows.allow()
            connection.wake()

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
            for key, live in self.runs.items():
                if is_slow_beat or key in self._changed:
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
        connection = Connection(Viewer(role, address), link, visitor)
        self.connections.append(connection)
        self._occupied.set()
        # Replace the event only when it is set: `wait_until_empty` may be waiting for the one that is not.
        if self._empty.is_set():
            self._empty = anyio.Event()
        try:
            self._greet(connection, hi)
            await connection.run(self._handle)
        finally:
            self.connections.remove(connection)
            if not self.connections:
                self._occupied = anyio.Event()
                self._empty.set()
            self._commands.forget(connection)
            # Every status contains the number of viewers.
            self._changed.update(self.runs)
        if connection.close is not None:
            await link.close(*connection.close)

    def _greet(self, connection: Connection, hi: Hi) -> None:
        live = None if hi.run is None else self.find(hi.run)
        if live is None and hi.run is not None and hi.only:
            connection.viewer.awaits = hi.run
        elif live is None:
            live = next(reversed(self.runs.values()), None)
        connection.viewer.put(
            Hello(
                server=self.id,
                page=self.page,
                role=connection.viewer.role,
                runs=[each.summary for each in self.runs.values()],
                run=None if live is None else live.key,
                time=time.time(),
                frame_interval=self._frame_interval,
            )
        )
        if live is not None:
            knows_it = hi.server == self.id and hi.run == live.key
            self._watch(connection, live, after=hi.after if knows_it else -1)
        self._changed.update(self.runs)
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
        connection.wake()

    def _overlay(self, connection: Connection, keys: Sequence[str]) -> None:
        if len(keys) > MAX_OVERLAID:
            raise ProtocolError(f"at most {MAX_OVERLAID} runs can be overlaid, got {len(keys)}")
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
            case CommandRequest():
                self._commands.request(connection, message)
            case ListRuns():
                if not message.on:
                    connection.rows = None
                elif connection.rows is None:
                    for live in self.runs.values():
                        self.list.put(row_of(live))
                    connection.rows = RowCursor(self.list)
            case Visibility():
                viewer.visible = message.visible
                # A hidden page draws nothing: its time to draw starts now.
                if viewer.waiting_since is not None:
                    viewer.waiting_since = time.monotonic()
            case Watch():
                if (wanted := self.find(message.run)) is not None:
                    self._watch(connection, wanted)
                else:
                    # The run was forgotten while the message was on its way.
                    viewer.put_latest("runs", self._list_of_runs())
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
