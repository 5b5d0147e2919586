"""ViewerCommands: commands from viewers, from the request to the last `Ack`.

The hub's event loop owns them. A run completes a command's future in another thread, which posts the rest back here.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, Literal

import msgspec

from offloop.dashboard.protocol.encoding import number
from offloop.dashboard.protocol.from_server import Ack
from offloop.dashboard.protocol.from_viewer import CommandRequest, Publish, TakeBack
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.run_samples import SAMPLES
from offloop.dashboard.viewers.connection import READERS, Connection
from offloop.engine import (
    CheckpointSaved,
    Event,
    EventError,
    OffloopError,
    RunEndedError,
    SaveCheckpoint,
    Stop,
    UnknownEvent,
    decode,
    encode,
)

COMMANDS_REMEMBERED: Final = 1_000
OVER: Final = "the run is over"


class PendingCommand:
    """A viewer's command."""

    def __init__(self, request: CommandRequest, connection: Connection) -> None:
        self.request = request
        # The last connection that sent the request gets the answer. None once it has closed: a connection keeps a
        # run's whole history alive.
        self.connection: Connection | None = connection
        # None once it is done: its error holds the training thread's frames.
        self.future: Future[Any] | None = None
        self.deadline = time.monotonic() + request.ttl
        self.ack: Ack = Ack(id=request.id, name=request.name, state="accepted")

    def answer(self, **outcome: Any) -> None:
        """Record the outcome and send it to the viewer."""
        self.ack = Ack(id=self.request.id, name=self.request.name, **outcome)
        if self.connection is not None:
            self.connection.put(self.ack)


class ViewerCommands:
    """Gives viewers' commands to runs, each id once, and answers them."""

    def __init__(
        self,
        find: Callable[[str], LiveRun | None],
        post: Callable[[Callable[[], None]], object],
        send_status: Callable[[Connection, LiveRun], None],
    ) -> None:
        """Know of no command yet.

        Args:
            find: Returns a run, by its key.
            post: Calls a function on the hub's event loop. Any thread.
            send_status: Sends a viewer how a run stands now.
        """
        self._find = find
        self._post = post
        self._send_status = send_status
        self._known: OrderedDict[str, PendingCommand] = OrderedDict()

    def request(self, connection: Connection, request: CommandRequest) -> None:
        """Give a command to its run, or reject it. A repeated request gets the current answer again."""
        known = self._known.get(request.id)
        if known is not None and connection.viewer.is_control:
            known.connection = connection
            connection.viewer.put(known.ack)
            return
        command = PendingCommand(request, connection)
        why = self._rejection_reason(connection, request)
        if why is not None:
            command.answer(state="rejected", why=why, error=RunEndedError.__name__ if why == OVER else "")
            return
        self._known[request.id] = command
        while len(self._known) > COMMANDS_REMEMBERED:
            self._known.popitem(last=False)
        try:
            by = f": {request.by}" if request.by else ""
            command.future = self._give(request, f"viewer {connection.viewer.address}{by}")
        except (OffloopError, TypeError) as error:
            command.answer(state="rejected", why=str(error), error=type(error).__name__)
            return
        command.answer(state="accepted")
        command.future.add_done_callback(lambda _: self._post(lambda: self._done(command)))

    def take_back(self, connection: Connection, request: TakeBack) -> None:
        """Take a command back; nothing if it is being applied, or is unknown."""
        command = self._known.get(request.id)
        if command is not None and command.future is not None and connection.viewer.is_control:
            if command.future.cancel():
                command.answer(state="expired", why="taken back by the viewer")

    def publish(self, connection: Connection, request: Publish) -> None:
        """Publish an event of a viewer."""
        live = self._find(request.run)
        why, error = "", ""
        if not connection.viewer.is_control:
            why = READERS
        elif live is None or live.source is None or not live.source.is_here:
            why = f"there is no run {request.run!r} here that trains"
        else:
            try:
                live.source.publish(event_of(request.event))
            except (OffloopError, msgspec.DecodeError) as problem:
                why, error = str(problem), type(problem).__name__
        state: Literal["rejected", "applied"] = "rejected" if why else "applied"
        connection.put(Ack(id=request.id, name="publish", state=state, why=why, error=error))

    def expire(self, now: float) -> None:
        """Take back commands that were not applied within their time to live."""
        for command in self._known.values():
            if command.ack.state == "accepted" and now > command.deadline:
                if command.future is not None and command.future.cancel():
                    why = f"not applied within {command.request.ttl:g} s: taken back"
                    command.answer(state="expired", why=why)

    def forget(self, connection: Connection) -> None:
        """Drop the references to a closed connection; its commands stay in force."""
        for command in self._known.values():
            if command.connection is connection:
                command.connection = None

    def _rejection_reason(self, connection: Connection, request: CommandRequest) -> str | None:
        """Return why a request is rejected before the run receives it; None if it is not."""
        if why := connection.why_rejected(request.id, "a command"):
            return why
        live = self._find(request.run)
        if live is None:
            return f"there is no run {request.run!r}"
        if live.is_over:
            return OVER
        if len(request.by) > 64:
            return f"by has at most 64 characters, got {len(request.by)}"
        if not 0 < request.ttl <= 3600:
            return f"ttl must be above 0 and at most 3600 seconds, got {request.ttl}"
        return None

    def _give(self, request: CommandRequest, by: str) -> Future[Any]:
        live = self._find(request.run)
        assert live is not None and live.source is not None
        run = live.source
        command = request.command()
        if isinstance(command, Stop) and request.checkpoint and "checkpoint" not in run.refused:
            # Both apply at the same boundary, where stop comes last.
            run.give_nowait(SaveCheckpoint(), by=by)
        return run.give_nowait(command, by=by)

    def _done(self, command: PendingCommand) -> None:
        """Send the last `Ack` of a command, whose future is done."""
        future, request = command.future, command.request
        command.future = None
        assert future is not None
        if future.cancelled() or command.ack.state != "accepted":
            return
        error = future.exception()
        if error is not None:
            name = type(error).__name__
            command.answer(state="rejected", why=f"{name}: {error}", error=name)
            return
        live, result = self._find(request.run), future.result()
        why = ""
        if isinstance(result, CheckpointSaved):
            why = f"saved in {result.path}" if request.name == "checkpoint" else f"tagged {result.path}"
        elif request.name == "set_lr":
            why = f"learning rate {request.lr:g}"
        if live is not None and command.connection is not None:
            # First, so that a program whose command has applied knows what came of it.
            self._send_status(command.connection, live)
        step = None if live is None else live.step
        command.answer(state="applied", step=step, why=why, result=_plain(result))


def event_of(raw: msgspec.Raw) -> Event:
    """Return a viewer's event.

    Raises:
        EventError: It is not of a class that the program which trains defines, and no sample that people look at.
        msgspec.DecodeError: It is no event.
    """
    event = decode(bytes(raw))
    if isinstance(event, UnknownEvent):
        raise EventError(f"there is no event class {event.type} in the process that trains")
    if type(event).__module__.startswith("offloop.") and not isinstance(event, SAMPLES):
        raise EventError(f"{type(event).__name__} is published by offloop itself")
    return event


def _plain(result: object) -> dict[str, Any] | None:
    """Return the result of a command as JSON has it."""
    if isinstance(result, Event):
        return msgspec.json.decode(encode(result), type=dict[str, Any])
    if isinstance(result, Mapping):
        return {name: number(value) for name, value in result.items()}
    return None
