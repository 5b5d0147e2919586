"""What a run and the child process of a callback tell each other: MessagePack frames over a socket pair.

    process of the run                                          child process
    ──────────────────                                          ─────────────
    Load             the callback, once                    ──>
    Handle           a batch of events                     ──>  its handlers run
                     <──  Handled                               all of the batch is handled; costs and failures so far
    MakeDurable      write the log to disk                 ──>
                     <──  Durable
    Facts            what `run.state` and the like return  ──>
                     <──  Give, TakeBack                        a command of a handler
    Accepted         training waits for others meanwhile   ──>
    Applied          the result of the command             ──>
                     <──  Publish, Fail, LogRecord              an event, what ends the run, a log record
    Cancel, Close    the end                               ──>
                     <──  Cancelling, Closed

The run sends one batch at a time: whatever the child has not asked for waits in the bounded buffer of its
subscription. A frame is the length of its body in 8 bytes, least significant first, then the body.
"""

import struct
from typing import Any, Final

import msgspec

from offloop.engine.monitor import Direction
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.processes.errors import PackedError

_LENGTH: Final = struct.Struct("<Q")


class Message(msgspec.Struct, tag_field="kind", frozen=True):
    """Base of all messages."""


class Facts(Message, tag=True, kw_only=True, frozen=True):
    """What a run is doing: the values of the properties of `RunHandle` that change during a run."""

    state: str
    epoch: int
    step: int
    validation_batch: int
    is_over: bool
    is_saving: bool
    interrupted: bool
    metrics: dict[str, float]
    groups: dict[str, int]
    """How many parameter groups each optimizer has, by its name."""


class Load(Message, tag=True, kw_only=True, frozen=True):
    """First message to a child: everything that it needs."""

    callback: bytes
    """As of `pickling.dumps`."""
    name: str
    """The callback's, in log records and events."""
    backend: str
    """The event loop: `asyncio` or `trio`."""
    log_levels: dict[str, int]
    """Levels of the loggers of the parent, by name; `""` is the root logger."""
    run_id: str
    dir: str | None
    hyperparameters: dict[str, Any]
    monitor: str
    default_monitor: str
    directions: dict[str, Direction]
    """Whether less or more is better, of each metric that the run computes."""
    refused: dict[str, str]
    facts: Facts


class Handle(Message, tag=True, frozen=True):
    """Handle these events, in order."""

    events: list[msgspec.Raw]
    """In MessagePack, as `encode(event, "msgpack")` makes them."""
    facts: Facts
    has_ended: bool
    """True if no event can be published any more."""


class MakeDurable(Message, tag=True, frozen=True):
    """Call `make_durable`. Comes when all batches are handled."""


class Cancel(Message, tag=True, frozen=True):
    """Cancel the handlers."""

    swallowing: float
    """Seconds for which a coroutine may swallow its cancellation."""


class Cancelling(Message, tag=True, frozen=True):
    """`Cancel` has arrived: the interpreter of the child is not held by code of C that hangs."""


class Close(Message, tag=True, frozen=True):
    """Handle nothing more, call `close` and end."""


class Accepted(Message, tag=True, frozen=True):
    """A command was accepted; who awaits it must not wait until it applies, because training waits for others."""

    id: int
    is_held_up: bool
    """True if training waits for this very callback: its `block` subscription is full."""


class Applied(Message, tag=True, frozen=True):
    """A command has applied, or it failed."""

    id: int
    result: msgspec.Raw
    """None, a mapping of metrics, or an event."""
    is_event: bool
    error: PackedError | None
    facts: Facts


class Handled(Message, tag=True, frozen=True):
    """The batch is handled. All figures are totals."""

    costs: CallbackCosts
    errors: list[str]
    """What the callback raised: type and text of each."""
    is_disabled: bool


class Durable(Message, tag=True, frozen=True):
    """`make_durable` has returned."""

    error: PackedError | None


class Closed(Message, tag=True, frozen=True):
    """`close` has returned; the process ends."""

    costs: CallbackCosts
    errors: list[str]


class Give(Message, tag=True, frozen=True):
    """Give a command."""

    id: int
    command: msgspec.Raw
    by: str | None


class TakeBack(Message, tag=True, frozen=True):
    """Take a command back, unless it is being applied by now."""

    id: int


class Publish(Message, tag=True, frozen=True):
    """Publish an event."""

    event: msgspec.Raw


class Fail(Message, tag=True, frozen=True):
    """End the run with this failure."""

    error: PackedError


class Loaded(Message, tag=True, frozen=True):
    """The callback is there: from now on the child answers."""


class CannotLoad(Message, tag=True, frozen=True):
    """The callback cannot be made here."""

    error: PackedError


class LogRecord(Message, tag=True, frozen=True):
    """A record of the `logging` module."""

    logger: str
    level: int
    text: str
    created: float
    thread: str
    where: tuple[str, int, str]
    """File, line, function."""
    process: int


ToChild = Load | Handle | Facts | MakeDurable | Cancel | Close | Accepted | Applied
ToParent = (
    Loaded
    | CannotLoad
    | Handled
    | Durable
    | Cancelling
    | Closed
    | Give
    | TakeBack
    | Publish
    | Fail
    | LogRecord
)

_encode = msgspec.msgpack.Encoder().encode
_to_child: "msgspec.msgpack.Decoder[ToChild]" = msgspec.msgpack.Decoder(ToChild)
_to_parent: "msgspec.msgpack.Decoder[ToParent]" = msgspec.msgpack.Decoder(ToParent)


def frame(message: Message) -> bytes:
    """Return a message as it goes over the socket."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


def to_child(body: bytes | memoryview) -> ToChild:
    """Decode what a child got."""
    return _to_child.decode(body)


def to_parent(body: bytes | memoryview) -> ToParent:
    """Decode what a child sent."""
    return _to_parent.decode(body)


class Frames:
    """Splits what comes out of a socket into frames. One thread."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add data; return the bodies of the frames that are complete now."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        if start:
            del self._buffer[:start]
        return bodies
