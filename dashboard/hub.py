"""Hub: all runs of a process on one side, all viewers on the other. Lives on the dashboard's own event loop.

    training thread ── bus ──> subscription ──> follow ──> LiveRun ──> Viewer ──> link ──> browser
                       Run <── thread-safe commands ──────── serve <──────────────┘

A run's events are taken from its bounded buffer; nothing here can make a run wait. A viewer that does not
keep up gets fewer and larger frames, and is cut off before it costs the others anything.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import anyio
import anyio.abc
import anyio.lowlevel

from offloop.dashboard.live_run import KeptMilestone, LiveRun
from offloop.dashboard.protocol import (
    CLOSE_PROTOCOL,
    CLOSE_SLOW,
    Ack,
    Bye,
    CommandRequest,
    Drawn,
    FromServer,
    Hello,
    Hi,
    Ping,
    Pong,
    ProtocolError,
    RangeQuery,
    Role,
    Runs,
    Show,
    Visibility,
    Watch,
    decode_viewer_message,
    encode_message,
)
from offloop.dashboard.viewer import Frames, Viewer, ViewerTooSlowError
from offloop.engine import Event, OffloopError, SaveCheckpoint, Stop, SubscriberTooSlowError, Subscription

FRAME_INTERVAL: Final = 0.1
"""Seconds between two chart frames: 20 a second cost a page a third of a core and training 7 %, 10 half of that."""
VIEWERS_AT_FULL_PACE: Final = 5
"""Beyond so many each gets fewer frames, the same number in all: ten at full pace cost training 6 % on two cores."""
STATUS_INTERVAL: Final = 0.25
"""Seconds between two words on where a run is, milestones apart: nobody reads numbers that change more often."""
UNWATCHED_INTERVAL: Final = 0.25
"""Seconds between two looks at what a run has said that nobody watches; who comes then sees nothing older."""
SLOW_INTERVAL: Final = 1.0
"""Seconds between two looks at what changes without an event: clocks, stalls, slow viewers."""
HI_TIMEOUT: Final = 5.0
"""Seconds for a viewer's first message."""
SEND_TIMEOUT: Final = 10.0
"""Seconds for one message to leave; a viewer that takes longer has stopped reading."""
DRAW_TIMEOUT: Final = 30.0
"""Seconds for a visible page to draw a frame."""
COMMANDS_PER_SECOND: Final = 10
COMMANDS_REMEMBERED: Final = 1_000
ENDED_RUNS_KEPT: Final = 3
"""Runs that are over and can still be looked at, beside those that go on."""
EVENTS_AT_ONCE: Final = 4_096


class Link(Protocol):
    """A connection to one viewer, whatever carries it."""

    async def receive(self) -> str | bytes | None:
        """Wait for the next message; None when the connection is over."""

    async def send(self, data: bytes, *, text: bool) -> bool:
        """Send a message, waiting until there is room for it; False when the connection is over."""

    async def close(self, code: int, reason: str) -> None:
        """Close it; does nothing if it is over."""


class _Session:
    """A viewer and its link."""

    def __init__(self, viewer: Viewer, link: Link) -> None:
        self.viewer = viewer
        self.link = link
        self.close: tuple[int, str] | None = None  # set to have it closed after what waits was sent
        self.may_finish = False  # before it is closed, it gets its curves to their end
        self.is_due = True  # the pace allows it a chart frame
        self.sending_since: float | None = None
        self.scope = anyio.CancelScope()
        self.allowance = float(COMMANDS_PER_SECOND)
        self.allowance_at = time.monotonic()
        self._wake = anyio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def wait(self) -> None:
        await self._wake.wait()
        self._wake = anyio.Event()

    @property
    def gets_chart(self) -> bool:
        """True if a chart frame is to be sent now: there is credit and something new, and no pace to keep."""
        viewer = self.viewer
        if not viewer.has_chart or viewer.live is None:
            return False
        return self.is_due or viewer.is_urgent or self.may_finish or viewer.live.is_over

    def end(self, code: int, reason: str) -> None:
        """Have it closed, after what waits for it."""
        if self.close is None:
            self.close = (code, reason)
        self.wake()


class PendingCommand:
    """A viewer's command, from its request to its last `Ack`."""

    def __init__(self, request: CommandRequest, session: _Session) -> None:
        self.request = request
        # Where the answer goes: the last connection that sent the request. None once that has closed, because a
        # session holds a run's whole history.
        self.session: _Session | None = session
        # None once it is done, because its error holds the training thread's frames.
        self.future: Future[Any] | None = None
        self.deadline = time.monotonic() + request.ttl
        self.ack: Ack = Ack(id=request.id, name=request.name, state="accepted")


class Hub:
    """Brings runs and viewers together. All methods belong to its event loop."""

    def __init__(
        self,
        *,
        post: Callable[[Callable[[], None]], object],
        page: str | None = None,
        frame_interval: float = FRAME_INTERVAL,
    ) -> None:
        """Make a hub without runs and viewers.

        Args:
            post: Has a function called on the hub's event loop. Any thread; never waits.
            page: Hash of the page that is served.
            frame_interval: Seconds between two chart frames of a viewer, at least; longer where there are many.
        """
        self.id = secrets.token_hex(8)
        self.runs: dict[str, LiveRun] = {}  # by key, oldest first
        self.page = page
        self._post = post
        self._frame_interval = frame_interval
        self._sessions: list[_Session] = []
        self._frames: WeakKeyDictionary[LiveRun, Frames] = WeakKeyDictionary()
        self._changed: set[str] = set()  # keys of runs whose status is to be sent at the next beat
        self._commands: OrderedDict[str, PendingCommand] = OrderedDict()
        self._somebody = anyio.Event()  # set while there are viewers
        self._nobody = anyio.Event()  # set while there are none
        self._nobody.set()

    @property
    def viewers(self) -> int:
        """Connections that have said hi."""
        return len(self._sessions)

    def _watching(self, live: LiveRun | None) -> list[_Session]:
        """Return the sessions that watch a run; None: those that wait for one."""
        return [session for session in self._sessions if session.viewer.live is live]

    # Runs

    async def follow(self, live: LiveRun, subscription: Subscription[Event]) -> None:
        """Take a run's events until it ends."""
        self.runs[live.key] = live
        self._frames[live] = Frames()
        self._forget_old_runs()
        self._tell_runs()
        for session in self._watching(None):
            self._watch(session, live)
        try:
            with subscription:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._take_at_pace, live, subscription)
                    while await subscription.wait(samples=False):
                        self._take(live, subscription)
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
        finally:  # also after a defect: nobody must wait for what will not come
            live.finish()
            self._tick(live)
            self._send_status(live)
            self._tell_runs()

    async def _take_at_pace(self, live: LiveRun, subscription: Subscription[Event]) -> None:
        """Take samples at the pace of the frames that show them."""
        while True:
            while self._take(live, subscription) == EVENTS_AT_ONCE:
                await anyio.lowlevel.checkpoint()
            self._tick(live)
            await anyio.sleep(self.pace if self._watching(live) else UNWATCHED_INTERVAL)

    def _take(self, live: LiveRun, subscription: Subscription[Event]) -> int:
        """Take what a run has said, and return how many events that were."""
        try:
            events = subscription.take(EVENTS_AT_ONCE)
        except SubscriberTooSlowError:  # the bus has logged it; the page says that the run is silent
            return 0
        if events:
            milestones = live.take_in(events)
            self._hand_on(live, milestones)
            if milestones:
                self._send_status(live)
            else:
                self._changed.add(live.key)
        return len(events)

    def _tick(self, live: LiveRun) -> None:
        """Let the viewers of a run have a chart frame each: all at once, so that one encoding serves them."""
        for session in self._watching(live):
            session.is_due = True
            if session.gets_chart:
                session.wake()

    def _hand_on(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        """Tell the viewers of a run what is new."""
        for session in self._watching(live):
            try:
                session.viewer.announce_series()
                session.viewer.put_milestones(milestones)
            except ViewerTooSlowError as error:
                session.end(CLOSE_SLOW, str(error))
            if session.viewer.has_text:
                session.wake()

    def _send_status(self, live: LiveRun, *, with_latest: bool = False) -> None:
        self._changed.discard(live.key)
        if not (sessions := self._watching(live)):
            return
        encoded: dict[bool, bytes] = {}
        latest = encode_message(live.latest()) if with_latest else None
        for session in sessions:
            is_control = session.viewer.is_control
            if is_control not in encoded:
                status = live.status(viewers=self.viewers, is_control=is_control)
                encoded[is_control] = encode_message(status)
            session.viewer.put_latest("status", encoded[is_control])
            if latest is not None:
                session.viewer.put_latest("latest", latest)
            session.wake()

    def _list_of_runs(self) -> bytes:
        return encode_message(Runs(runs=[live.summary for live in self.runs.values()]))

    def _tell_runs(self) -> None:
        message = self._list_of_runs()
        for session in self._sessions:
            session.viewer.put_latest("runs", message)
            session.wake()

    def _forget_old_runs(self) -> None:
        ended = [live for live in self.runs.values() if live.is_over]
        for live in ended[: max(0, len(ended) - ENDED_RUNS_KEPT)]:
            del self.runs[live.key]
            newest = next(reversed(self.runs.values()))
            for session in self._watching(live):
                self._watch(session, newest)

    # The beat

    async def beat(self) -> None:
        """Send what changes without an event, for as long as there are viewers. Runs until it is cancelled."""
        slow_at = 0.0
        while True:
            await self._somebody.wait()
            now = time.monotonic()
            is_slow_beat = now - slow_at >= SLOW_INTERVAL
            if is_slow_beat:
                slow_at = now
                self._look_at_slow_viewers(now)
                self._expire_commands(now)
            for key, live in self.runs.items():
                if is_slow_beat or key in self._changed:
                    self._send_status(live, with_latest=is_slow_beat)
            await anyio.sleep(min(STATUS_INTERVAL * self._share, SLOW_INTERVAL))

    @property
    def pace(self) -> float:
        """Seconds between two chart frames of a viewer, at least."""
        return self._frame_interval * self._share

    @property
    def _share(self) -> float:
        """How many times longer than alone a viewer waits for what is paced, so that many cost no more than a few."""
        return max(1.0, len(self._sessions) / VIEWERS_AT_FULL_PACE)

    def _look_at_slow_viewers(self, now: float) -> None:
        for session in self._sessions:
            viewer = session.viewer
            if session.sending_since is not None and now - session.sending_since > SEND_TIMEOUT:
                session.end(CLOSE_SLOW, f"a message did not leave within {SEND_TIMEOUT:g} s")
                session.scope.cancel()
            if viewer.visible and viewer.waiting_since is not None:
                if now - viewer.waiting_since > DRAW_TIMEOUT:
                    session.end(CLOSE_SLOW, f"no frame was drawn in {DRAW_TIMEOUT:g} s")

    # Viewers

    async def serve(self, link: Link, *, role: Role, address: str) -> None:
        """Serve one viewer until its connection ends."""
        session = _Session(Viewer(role, address), link)
        try:
            with anyio.fail_after(HI_TIMEOUT):
                hi = await self._hi(link)
        except TimeoutError:
            await link.close(CLOSE_PROTOCOL, f"no hi within {HI_TIMEOUT:g} s")
            return
        except ProtocolError as error:
            await link.close(CLOSE_PROTOCOL, short(str(error)))
            return
        if hi is None:
            return
        self._sessions.append(session)
        self._somebody.set()
        if self._nobody.is_set():  # else somebody may be waiting for this very one
            self._nobody = anyio.Event()
        try:
            self._greet(session, hi)
            async with anyio.create_task_group() as tasks:
                session.scope = tasks.cancel_scope
                tasks.start_soon(self._write, session)
                await self._read(session)
                tasks.cancel_scope.cancel()
        finally:
            self._sessions.remove(session)
            if not self._sessions:
                self._somebody = anyio.Event()
                self._nobody.set()
            for given in self._commands.values():
                if given.session is session:
                    given.session = None
            for live in self.runs.values():
                self._changed.add(live.key)  # one viewer less
        if session.close is not None:
            await link.close(*session.close)

    async def _hi(self, link: Link) -> Hi | None:
        message = await link.receive()
        if message is None:
            return None
        hi = decode_viewer_message(message)
        if not isinstance(hi, Hi):
            raise ProtocolError("the first message must be hi")
        if hi.protocol != 1:
            raise ProtocolError(f"this server speaks protocol 1, got {hi.protocol}")
        return hi

    def _greet(self, session: _Session, hi: Hi) -> None:
        live = self.runs.get(hi.run or "") or next(reversed(self.runs.values()), None)
        session.viewer.put(
            Hello(
                server=self.id,
                page=self.page,
                role=session.viewer.role,
                runs=[each.summary for each in self.runs.values()],
                run=None if live is None else live.key,
                time=time.time(),
                frame_interval=self._frame_interval,
            )
        )
        if live is not None:
            knows_it = hi.server == self.id and hi.run == live.key
            self._watch(session, live, after=hi.after if knows_it else -1)
        for each in self.runs.values():
            self._changed.add(each.key)  # one viewer more
        session.wake()

    def _watch(self, session: _Session, live: LiveRun, *, after: int = -1) -> None:
        try:
            session.viewer.watch(live, after=after)
        except ViewerTooSlowError as error:
            session.end(CLOSE_SLOW, str(error))
            return
        status = live.status(viewers=self.viewers, is_control=session.viewer.is_control)
        session.viewer.put_latest("status", encode_message(status))
        session.viewer.put_latest("latest", encode_message(live.latest()))
        session.wake()

    async def _write(self, session: _Session) -> None:
        """Send what there is for a viewer, as it comes and at its pace."""
        viewer = session.viewer
        while True:
            while (text := viewer.next_text()) is not None:
                if not await self._send(session, text, text=True):
                    return
            if session.close is not None and not (session.may_finish and viewer.is_waiting):
                session.scope.cancel()
                return
            if not session.gets_chart:
                await session.wait()
                continue
            assert viewer.live is not None  # else there would be no chart
            session.is_due = session.is_due and viewer.is_urgent  # what is urgent is beside the pace
            chart = viewer.next_chart(self._frames[viewer.live])
            if chart is not None:
                viewer.waiting_since = time.monotonic()
                if not await self._send(session, chart, text=False):
                    return

    async def _send(self, session: _Session, data: bytes, *, text: bool) -> bool:
        """Send a message; False, and the session ends, when the connection is over."""
        session.sending_since = time.monotonic()
        is_open = await session.link.send(data, text=text)
        session.sending_since = None
        if not is_open:
            session.scope.cancel()
        return is_open

    async def _read(self, session: _Session) -> None:
        while (message := await session.link.receive()) is not None:
            try:
                self._handle(session, message)
            except ProtocolError as error:
                session.end(CLOSE_PROTOCOL, short(str(error)))
                return
            except ViewerTooSlowError as error:
                session.end(CLOSE_SLOW, str(error))
                return

    def _handle(self, session: _Session, data: str | bytes) -> None:
        """Handle a viewer's message."""
        viewer = session.viewer
        message = decode_viewer_message(data)
        match message:
            case Drawn():
                viewer.drawn()
                if session.gets_chart:
                    session.wake()
                return
            case Ping():
                viewer.put(Pong(sent=message.sent, time=time.time()))
            case Show():
                viewer.show(message)
            case RangeQuery():
                viewer.ask(message)
            case CommandRequest():
                self._command(session, message)
            case Visibility():
                viewer.visible = message.visible
                if viewer.waiting_since is not None:
                    viewer.waiting_since = time.monotonic()  # it has had no time to draw
            case Watch():
                if message.run in self.runs:
                    self._watch(session, self.runs[message.run])
                else:  # it was let go while this was on its way
                    viewer.put_latest("runs", self._list_of_runs())
            case Hi():
                raise ProtocolError("hi was said before")
        session.wake()

    # Commands

    def _command(self, session: _Session, request: CommandRequest) -> None:
        known = self._commands.get(request.id)
        if known is not None and session.viewer.is_control:  # sent again after a reconnect
            known.session = session
            session.viewer.put(known.ack)
            return
        given = PendingCommand(request, session)
        why = self._rejection_reason(session, request)
        if why is not None:
            self._answer(given, state="rejected", why=why)
            return
        self._commands[request.id] = given
        while len(self._commands) > COMMANDS_REMEMBERED:
            self._commands.popitem(last=False)
        try:
            given.future = self._give(request, f"viewer {session.viewer.address}")
        except OffloopError as error:
            self._answer(given, state="rejected", why=str(error))
            return
        self._answer(given, state="accepted")
        given.future.add_done_callback(lambda _: self._post(lambda: self._done(given)))

    def _rejection_reason(self, session: _Session, request: CommandRequest) -> str | None:
        """Return why a request is rejected before the run sees it; None if it is not."""
        if not session.viewer.is_control:
            return "this address may only read"
        if not 0 < len(request.id) <= 64:
            return "a command's id has 1 to 64 characters"
        now = time.monotonic()
        session.allowance += (now - session.allowance_at) * COMMANDS_PER_SECOND
        session.allowance = min(session.allowance, float(COMMANDS_PER_SECOND))
        session.allowance_at = now
        if session.allowance < 1:
            return f"more than {COMMANDS_PER_SECOND} commands a second"
        session.allowance -= 1
        live = self.runs.get(request.run)
        if live is None:
            return f"there is no run {request.run!r}"
        if live.is_over:
            return "the run is over"
        if not 0 < request.ttl <= 3600:
            return f"ttl must be above 0 and at most 3600 seconds, got {request.ttl}"
        return None

    def _give(self, request: CommandRequest, by: str) -> Future[Any]:
        run = self.runs[request.run].run
        assert run is not None
        command = request.command()
        if isinstance(command, Stop) and request.checkpoint and "checkpoint" not in run.refused:
            run.give_nowait(SaveCheckpoint(), by=by)  # at the same boundary: stop comes last there
        return run.give_nowait(command, by=by)

    def _done(self, given: PendingCommand) -> None:
        """Send the last `Ack` of a command. Called when its future is done."""
        future, request = given.future, given.request
        given.future = None
        assert future is not None
        if future.cancelled() or given.ack.state != "accepted":
            return
        error = future.exception()
        if error is not None:
            self._answer(given, state="rejected", why=f"{type(error).__name__}: {error}")
            return
        live, result = self.runs.get(request.run), future.result()
        why = ""
        if request.name == "checkpoint" and result is not None:
            why = f"saved in {result.path}"
        elif request.name == "set_lr":
            why = f"learning rate {request.lr:g}"
        self._answer(given, state="applied", step=None if live is None else live.step, why=why)

    def _expire_commands(self, now: float) -> None:
        for given in list(self._commands.values()):
            if given.ack.state == "accepted" and now > given.deadline:
                if given.future is not None and given.future.cancel():
                    why = f"not applied within {given.request.ttl:g} s: taken back"
                    self._answer(given, state="expired", why=why)

    def _answer(self, given: PendingCommand, **outcome: Any) -> None:
        given.ack = Ack(id=given.request.id, name=given.request.name, **outcome)
        if given.session is not None:
            try:
                given.session.viewer.put(given.ack)
            except ViewerTooSlowError as error:
                given.session.end(CLOSE_SLOW, str(error))
            given.session.wake()

    # The end

    async def wait_for_nobody(self) -> None:
        """Wait until the last viewer has gone."""
        await self._nobody.wait()

    def say_goodbye(self, code: int, reason: str) -> None:
        """Have all viewers told, and closed when they have what waits for them; `wait_for_nobody` waits."""
        for session in list(self._sessions):
            self._put_quietly(session, Bye(reason=reason))
            session.may_finish = session.viewer.visible and session.close is None
            session.end(code, reason)

    def _put_quietly(self, session: _Session, message: FromServer) -> None:
        try:
            session.viewer.put(message)
        except ViewerTooSlowError:
            pass  # it is being closed anyway


def short(reason: str) -> str:
    """Cut a reason to what fits into a close frame: 123 bytes."""
    return reason.encode()[:120].decode(errors="ignore")
