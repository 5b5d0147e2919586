"""SentCommands: commands on their way to a server, from the request to its last answer."""

import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from offloop.dashboard.protocol.from_server import Ack
from offloop.dashboard.protocol.from_viewer import CommandRequest, FromViewer, TakeBack
from offloop.engine import (
    Command,
    CommandExpiredError,
    CommandLostError,
    CommandRejectedError,
    ConfigError,
    EventError,
    Metrics,
    Pause,
    RunEndedError,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    decode,
)

_ERRORS: Final[dict[str, type[Exception]]] = {
    each.__name__: each for each in (ConfigError, EventError, RunEndedError, TypeError, ValueError)
}
"""What a command raises here as it does in the process that trains, by name. Others become `CommandRejectedError`."""

Complete = Callable[[int, Any, BaseException | None], None]


class _Sent:
    """A command that has not been answered for good."""

    def __init__(self, request: CommandRequest) -> None:
        self.request = request
        self.is_sent = False
        self.deadline = time.monotonic() + request.ttl


class SentCommands:
    """Commands of one `Watch` without an answer. Any thread gives and takes back; the event loop does the rest."""

    def __init__(self, post: Callable[[FromViewer], None], complete: Complete, *, ttl: float) -> None:
        """Send none yet.

        Args:
            post: Sends a message. Any thread.
            complete: Called with the number of a command, and its result or error.
            ttl: Seconds after which a command that was not applied is taken back.
        """
        self._post = post
        self._complete = complete
        self._ttl = ttl
        # Another program must not get our ids.
        self._prefix = secrets.token_hex(12)
        # Any thread adds and removes single entries, which is atomic; the event loop iterates over copies.
        self._sent: dict[str, _Sent] = {}
        # Those to take back with the next connection.
        self._to_take_back: list[str] = []

    def give(self, number: int, command: Command[Any], run: str, by: str | None) -> None:
        """Send a command. Any thread."""
        request = _request(command, id=f"{self._prefix}-{number}", run=run, ttl=self._ttl, by=by or "")
        self._sent[request.id] = _Sent(request)
        self._post(request)

    def take_back(self, number: int) -> None:
        """Take a command back. Any thread."""
        id = f"{self._prefix}-{number}"
        sent = self._sent.pop(id, None)
        if sent is not None and sent.is_sent:
            self._to_take_back.append(id)
            self._post(TakeBack(id=id))

    def sending(self, id: str) -> bool:
        sent = self._sent.get(id)
        if sent is not None:
            sent.is_sent = True
        return sent is not None

    def answered(self, ack: Ack) -> None:
        sent = self._sent.get(ack.id)
        if sent is None or ack.state == "accepted":
            return
        self._finish(sent, *_outcome(ack))

    def unanswered(self) -> list[FromViewer]:
        """Return what a new connection to the same server has to send again."""
        taken_back, self._to_take_back = self._to_take_back, []
        return [
            *(TakeBack(id=id) for id in taken_back),
            *(sent.request for sent in list(self._sent.values())),
        ]

    def interrupted(self, why: str, *, for_good: bool) -> None:
        """Fail the commands that can have no answer any more.

        Args:
            why: What happened.
            for_good: True: no answer can come to any of them. False: only those whose time is over fail.
        """
        now = time.monotonic()
        for sent in list(self._sent.values()):
            if for_good or now > sent.deadline:
                is_applied = None if sent.is_sent else False
                self._finish(sent, None, CommandLostError(sent.request.name, is_applied, why))

    def _finish(self, sent: _Sent, result: Any, error: BaseException | None) -> None:
        if self._sent.pop(sent.request.id, None) is not None:
            self._complete(int(sent.request.id.rpartition("-")[2]), result, error)


def _request(command: Command[Any], *, id: str, run: str, ttl: float, by: str) -> CommandRequest:
    """Return a command as a message.

    Raises:
        ConfigError: It is not one that can be sent.
    """
    name: Any = command.name
    request = CommandRequest(id=id, name=name, run=run, ttl=ttl, by=by, checkpoint=False)
    match command:
        case Pause() | Stop() | SaveCheckpoint():
            return msgspec.structs.replace(request, reason=command.reason)
        case SetLearningRate():
            return msgspec.structs.replace(
                request, lr=command.lr, group=command.group, optimizer=command.optimizer
            )
        case TagCheckpoint():
            which = "" if command.checkpoint is None else command.checkpoint
            return msgspec.structs.replace(request, tag=command.tag, move=command.move, which=which)
        case _:
            return request


def _outcome(ack: Ack) -> tuple[Any, BaseException | None]:
    """Return the result of an answered command, and its error."""
    if ack.state == "expired":
        return None, CommandExpiredError(ack.name, ack.why)
    if ack.state == "rejected":
        kind = _ERRORS.get(ack.error)
        if kind is None:
            return None, CommandRejectedError(ack.name, ack.why)
        return None, kind(ack.why.removeprefix(f"{ack.error}: "))
    if ack.result is None:
        return None, None
    if "type" in ack.result:
        return decode(msgspec.json.encode(ack.result)), None
    return Metrics({name: float(value) for name, value in ack.result.items()}), None
