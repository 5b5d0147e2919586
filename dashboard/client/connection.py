"""Connection: keeps a program connected to a server, and hands on what it tells.

    Watch ── post ──> outbox ──> writer ──> websocket ──> server
    feed, facts, commands, curves <── reader <── websocket

Reader and writer live as long as one websocket. When it is lost, the connection opens the next one and says which
milestones it has: the server sends those after them. Commands without an answer go out again under their ids, which the
server recognises, and so do queries of curves.
"""

import logging
import random
import ssl
import time
from collections import deque
from typing import Final

import anyio
import msgspec
from anyio.abc import TaskStatus

from offloop.dashboard.client.address import Address
from offloop.dashboard.client.commands import Complete, SentCommands
from offloop.dashboard.client.curves import CurveQueries
from offloop.dashboard.client.facts import FINAL_STATES, RunFacts
from offloop.dashboard.client.messages import ServerMessage, decode_server_message
from offloop.dashboard.client.websocket import PING_INTERVAL, ClosedError, Websocket
from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_server import (
    Ack,
    Bye,
    Hello,
    Milestone,
    MilestonesMissed,
    Pong,
    RunInfo,
    Runs,
    RunSummary,
    Series,
    Status,
    StreamDropped,
    Streamed,
)
from offloop.dashboard.protocol.from_viewer import CommandRequest, FromViewer, Hi, Ping, Stream, Watch
from offloop.dashboard.protocol.limits import CLOSE_PROTOCOL, CLOSE_SLOW, CLOSE_UNAUTHORISED
from offloop.engine import (
    Event,
    OffloopError,
    RunNotFoundError,
    WatchError,
    WatchLostError,
    WatchRefusedError,
    decode,
)
from offloop.engine.bus.waker import Waker
from offloop.engine.remote_run import Feed

logger = logging.getLogger("offloop")

FIRST_PAUSE: Final = 0.1
"""Seconds before the first attempt to reconnect; each further one waits up to twice as long as the one before."""
LONGEST_PAUSE: Final = 3.0
CLOSE_GARBLED: Final = 1007
"""Close code for a message that is none."""
COMMANDS_AT_ONCE: Final = 5
COMMANDS_PER_SECOND: Final = 9
"""Pace of commands: a server rejects more than ten a second."""
PASSING: Final = frozenset({404, 429, 500, 502, 503, 504})
"""HTTP statuses that a proxy or a full server may give for a while."""


class Connection:
    """The connection of one `Watch`. One event loop, besides `post`."""

    def __init__(
        self,
        address: Address,
        context: ssl.SSLContext | None,
        *,
        run: str | None,
        give_up_after: float,
        ttl: float,
        complete: Complete,
    ) -> None:
        """Connect to nothing yet.

        Args:
            address: Of the server.
            context: For https.
            run: Name or key of the run; None for the newest.
            give_up_after: Seconds to try to reconnect.
            ttl: Seconds after which a command that was not applied is taken back.
            complete: Called with the number of a command, and its result or error.
        """
        self.address = address
        self.facts = RunFacts()
        self.feed = Feed()
        self.curves = CurveQueries(self.post, lambda: self.facts.curves)
        self.is_connected = False
        # Why there will be no connection any more; None while there may be.
        self.error: OffloopError | None = None
        self.commands = SentCommands(self.post, complete, ttl=ttl)
        self.wants_samples = False
        self._context = context
        self._wanted = run
        self._give_up_after = give_up_after
        # Any thread appends, the writer takes out.
        self._outbox: deque[FromViewer] = deque()
        self._waker = Waker()
        self._goodbye = ""
        # Samples that the server has dropped on this connection.
        self._dropped = 0
        # Number of the last ping that asks whether all that came before it is here, and of its answer.
        self._asked = self._caught_up = 0
        self._has_begun = False
        self._allowance = float(COMMANDS_AT_ONCE)
        self._allowance_at = 0.0

    def post(self, message: FromViewer) -> None:
        """Send a message soon. Any thread; without a connection it is dropped, see `_begin`."""
        self._outbox.append(message)
        self._waker.wake()

    def stream(self) -> None:
        """Ask for samples, on this connection and later ones. Any thread."""
        if not self.wants_samples:
            self.wants_samples = True
            self.post(Stream())

    # Its life

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Stay connected. Started once the run is there and all that has happened so far is known.

        Raises:
            WatchError: There is no first connection.
            RunNotFoundError: The server has no such run.
        """
        error: OffloopError = WatchLostError("the connection was closed")
        try:
            error = await self._stay_connected(task_status)
        finally:
            self.is_connected, self.error = False, error
            self.curves.end(error)
            self.feed.end(None if self.facts.is_over else error)
            self.commands.interrupted(str(error), for_good=True)

    async def _stay_connected(self, task_status: TaskStatus[None]) -> OffloopError:
        lost_at, attempt, why = time.monotonic(), 0, ""
        while True:
            code = 1006
            try:
                websocket = await Websocket.open(self.address, self._context)
                try:
                    code, why = await self._serve(websocket, task_status)
                finally:
                    is_first, self.is_connected = not self.is_connected, False
                    await websocket.aclose()
                if not is_first:
                    lost_at, attempt = time.monotonic(), 0
                if code in (CLOSE_PROTOCOL, CLOSE_UNAUTHORISED):
                    raise WatchRefusedError(code, f"{self.address.shown} has closed the connection: {why}")
            except (WatchError, RunNotFoundError) as error:
                if not self._has_begun:
                    raise
                if not isinstance(error, WatchLostError) and not (
                    isinstance(error, WatchRefusedError) and error.status in PASSING
                ):
                    return error
                why = str(error)
            if not self._has_begun:
                raise WatchLostError(f"{self.address.shown} cannot be watched: {why}")
            self.commands.interrupted(f"the connection was lost ({why})", for_good=False)
            if time.monotonic() - lost_at >= self._give_up_after:
                return WatchLostError(
                    f"the connection to {self.address.shown} was lost and could not be made again within "
                    f"{self._give_up_after:g} s: {why}"
                )
            if code != CLOSE_SLOW:
                pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
                await anyio.sleep(random.uniform(pause / 2, pause))
            attempt += 1

    async def _serve(self, websocket: Websocket, task_status: TaskStatus[None]) -> tuple[int, str]:
        """Serve one websocket until it closes; return code and reason."""
        self._goodbye = ""
        try:
            await self._greet(websocket)
            self._begin()
            self.is_connected = True
            if not self._has_begun:
                self._has_begun = True
                task_status.started()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, websocket)
                try:
                    while True:
                        await self._read(websocket)
                except ClosedError as closed:
                    return closed.code, self._goodbye or closed.reason
                finally:
                    tasks.cancel_scope.cancel()
        except ClosedError as closed:
            return closed.code, self._goodbye or closed.reason
        raise AssertionError("unreachable")

    async def _greet(self, websocket: Websocket) -> None:
        """Say which run is wanted and what is known of it; wait until it and all that has happened is here."""
        facts = self.facts
        wanted = facts.key or self._wanted
        hi = Hi(protocol=1, run=wanted, only=wanted is not None, server=facts.server, after=facts.last_seq)
        await websocket.send(encode_message(hi))
        hello = await self._read(websocket)
        if not isinstance(hello, Hello):
            raise WatchLostError(f"what answers at {self.address.shown} is no live page of offloop")
        if hello.protocol != 1:
            raise WatchRefusedError(
                CLOSE_PROTOCOL,
                f"{self.address.shown} speaks protocol {hello.protocol}, and this program protocol 1: use the same "
                "version of offloop",
            )
        if facts.server is not None and hello.server != facts.server:
            self.commands.interrupted("the process that trained has ended", for_good=True)
        facts.hello(hello)
        key = self._choose(hello)
        if key is not None and key != hello.run:
            await websocket.send(encode_message(Watch(run=key)))
        message: ServerMessage | None = hello
        while not (isinstance(message, RunInfo) and not message.overlaid and key in (None, message.key)):
            message = await self._receive(websocket)
            if (
                isinstance(message, Runs)
                and key is not None
                and all(key != each.key for each in message.runs)
            ):
                raise self._no_such_run(message.runs)
            if not isinstance(message, RunInfo):
                self._take(message)
        facts.key = message.key
        self._take(message)
        self._asked += 1
        await websocket.send(encode_message(Ping(sent=self._asked)))
        while self._caught_up < self._asked:
            await self._read(websocket)

    def _choose(self, hello: Hello) -> str | None:
        """Return the key of the run to watch; None if any will do, once there is one."""
        wanted = self.facts.key or self._wanted
        if wanted is None or wanted == hello.run:
            return hello.run
        name = self._wanted if self.facts.info is None else self.facts.info.name
        # The name of a run may have been given, and a resumed run has another key in another process.
        named = [each.key for each in hello.runs if wanted == each.key or name == each.name]
        if not named:
            raise self._no_such_run(hello.runs)
        return wanted if wanted in named else named[-1]

    def _no_such_run(self, runs: list[RunSummary]) -> OffloopError:
        if self.facts.key is not None:
            return WatchRefusedError(404, f"{self.address.shown} no longer has the run {self.facts.key}")
        error = RunNotFoundError(str(self._wanted))
        error.add_note(f"{self.address.shown} has: {', '.join(each.name for each in runs) or 'no run'}")
        return error

    def _begin(self) -> None:
        """Send what earlier connections have left open."""
        self._outbox.clear()
        self._dropped = 0
        if self.wants_samples:
            self.post(Stream())
        for message in self.commands.unanswered():
            self.post(message)
        assert self.facts.key is not None
        self.curves.ask_again(self.facts.key)

    async def _write(self, websocket: Websocket) -> None:
        try:
            while True:
                while self._outbox:
                    message = self._outbox.popleft()
                    if isinstance(message, CommandRequest):
                        await self._keep_pace()
                        if not self.commands.sending(message.id):
                            continue
                    await websocket.send(encode_message(message))
                with anyio.move_on_after(PING_INTERVAL) as waiting:
                    await self._waker.wait()
                if waiting.cancelled_caught:
                    await websocket.send(encode_message(Ping(sent=0)))
        except ClosedError:
            # The reader knows, too.
            return

    async def _keep_pace(self) -> None:
        """Wait until the server allows another command."""
        while True:
            now = time.monotonic()
            earned = (now - self._allowance_at) * COMMANDS_PER_SECOND
            self._allowance = min(self._allowance + earned, float(COMMANDS_AT_ONCE))
            self._allowance_at = now
            if self._allowance >= 1:
                self._allowance -= 1
                return
            await anyio.sleep((1 - self._allowance) / COMMANDS_PER_SECOND)

    # What the server says

    async def _receive(self, websocket: Websocket) -> ServerMessage | None:
        """Return the next message; None for a kind that is not known here, and for curves."""
        data, is_text = await websocket.receive()
        try:
            if is_text:
                return decode_server_message(data)
            self.curves.take(data)
        except ValueError as error:
            # Not a `WatchError`: the task group would wrap it.
            raise ClosedError(CLOSE_GARBLED, f"it sent what is no message: {error}") from None
        return None

    async def _read(self, websocket: Websocket) -> ServerMessage | None:
        """Take the next message in and return it."""
        message = await self._receive(websocket)
        self._take(message)
        return message

    def _take(self, message: ServerMessage | None) -> None:
        facts = self.facts
        match message:
            case Milestone() if message.run == facts.key:
                self._milestone(message.event)
            case Streamed() if message.run == facts.key:
                events = [each for raw in message.events if (each := _decoded(raw)) is not None]
                self.feed.put(events, ())
                facts.step = max(facts.step, events[-1].step if events else 0)
            case Status() if message.run == facts.key:
                facts.tell(message)
                self._end_with_the_run(is_told=True)
            case RunInfo() if not message.overlaid:
                self._describe(message)
            case Series() if message.run == facts.key:
                facts.add_curves(message)
            case MilestonesMissed() if message.run == facts.key:
                self._missed(message.count)
            case StreamDropped() if message.run == facts.key:
                self.feed.note_dropped(message.count - self._dropped)
                self._dropped = message.count
            case Runs():
                facts.runs = tuple(message.runs)
            case Ack(name="publish"):
                if message.state == "rejected":
                    logger.warning("an event was not published: %s", message.why)
            case Ack():
                # Ahead of the step's own event
                facts.step = max(facts.step, message.step or 0)
                self.commands.answered(message)
            case Pong():
                self._pong(message)
            case Bye():
                self._goodbye = message.reason
            case _:
                pass

    def _describe(self, message: RunInfo) -> None:
        if message.key == self.facts.key:
            self.facts.describe(message)
            if self.is_connected:
                # The server has begun again, and forgotten our queries.
                self._asked += 1
                self.post(Ping(sent=self._asked))
        else:
            # The server has let go of ours, and goes on with another one.
            self.facts.is_gone = True
            self.curves.end(WatchLostError(f"{self.address.shown} no longer keeps the run {self.facts.key}"))

    def _pong(self, message: Pong) -> None:
        if message.sent > self._caught_up:
            self._caught_up = int(message.sent)
            self._end_with_the_run()
            if self.is_connected and self.facts.key is not None:
                self.curves.ask_again(self.facts.key)

    def _milestone(self, raw: msgspec.Raw) -> None:
        event = _decoded(raw)
        if event is not None and self.facts.is_new(event):
            self.facts.follow(event)
            self.feed.put([event], [event])

    def _missed(self, count: int) -> None:
        facts = self.facts
        missed = facts.newly_missed(count)
        if missed:
            self.feed.note_missed(missed)
            logger.warning(
                "%d milestones of run %s did not come: %s no longer keeps them",
                missed,
                facts.key,
                self.address.shown,
            )

    def _end_with_the_run(self, *, is_told: bool = False) -> None:
        """End the subscriptions once the run is over and its last event has come.

        Args:
            is_told: True if the server has just said how the run stands, having sent all events before.
        """
        facts = self.facts
        if facts.state not in FINAL_STATES or self._caught_up < self._asked or not self._asked:
            return
        # A run that was killed has no last event.
        if facts.has_ended or (is_told and facts.state == "lost" and facts.received):
            self.feed.end()


def _decoded(raw: msgspec.Raw) -> Event | None:
    """Decode an event; None if it is none, as one of a class whose fields are others here."""
    try:
        return decode(bytes(raw))
    except msgspec.DecodeError as error:
        logger.warning("an event of the watched run cannot be read here: %s", error)
        return None
