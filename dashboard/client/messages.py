"""Messages of a server, as a program reads them: kinds that it does not know are left out."""

import msgspec

from offloop.dashboard.protocol.from_server import (
    Ack,
    Bye,
    Hello,
    Latest,
    Milestone,
    MilestonesMissed,
    Pong,
    RunInfo,
    Runs,
    Series,
    Status,
    StreamDropped,
    Streamed,
)

ServerMessage = (
    Hello
    | Runs
    | RunInfo
    | Series
    | Latest
    | Status
    | Milestone
    | MilestonesMissed
    | Streamed
    | StreamDropped
    | Ack
    | Pong
    | Bye
)
_KINDS = frozenset(str(each.__struct_config__.tag) for each in ServerMessage.__args__)


class _Kind(msgspec.Struct):
    type: str


_messages: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage, strict=False)
_kind = msgspec.json.Decoder(_Kind)


def decode_server_message(text: bytes) -> ServerMessage | None:
    """Decode a message; None if its kind is not known here.

    Raises:
        ValueError: It is no message of this protocol. (`msgspec.DecodeError` is a ValueError.)
    """
    try:
        return _messages.decode(text)
    except msgspec.ValidationError:
        if _kind.decode(text).type in _KINDS:
            raise
        return None
