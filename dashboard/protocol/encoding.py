"""Messages as bytes: JSON, the head of binary frames, and what JSON has no words for."""

import math
import struct
from typing import Any

import msgspec

from offloop.dashboard.protocol.from_server import FromServer
from offloop.dashboard.protocol.from_viewer import FromViewer, ViewerMessage
from offloop.engine import Event, EventError, OffloopError, encode

_viewer_messages: msgspec.json.Decoder[ViewerMessage] = msgspec.json.Decoder(ViewerMessage)
_encode = msgspec.json.Encoder().encode


class ProtocolError(OffloopError):
    """A viewer violated the protocol; the text says how. Never leaves the dashboard."""


def decode_viewer_message(text: str | bytes) -> ViewerMessage:
    """Decode a viewer's message.

    Raises:
        ProtocolError: It is no message of this protocol.
    """
    try:
        return _viewer_messages.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(str(error)) from None


def encode_message(message: FromServer | FromViewer) -> bytes:
    """Encode a message as JSON. Convert numbers that may be NaN with `number` first."""
    return encode_json(message)


def encode_event(event: Event) -> bytes:
    """Encode an event as in `events.jsonl`, whatever its texts hold."""
    try:
        return encode(event)
    except EventError:
        return encode_json(event)


def encode_head(header: msgspec.Struct, *, multiple: int = 1) -> bytes:
    """Encode what a binary frame begins with: the length of the header, u32 little-endian, and the header as JSON.

    Args:
        header: The header.
        multiple: The header is padded with spaces, so that the rest of the frame begins at a multiple of it.
    """
    encoded = encode_json(header)
    encoded += b" " * (-(4 + len(encoded)) % multiple)
    return struct.pack("<I", len(encoded)) + encoded


def encode_json(value: msgspec.Struct) -> bytes:
    """Encode a struct as JSON, with lone surrogates as escapes."""
    try:
        return _encode(value)
    except UnicodeEncodeError:
        # The name of a file that is not UTF-8, in a command line, a path or an error.
        return _encode(printable(msgspec.to_builtins(value)))


def printable(value: Any) -> Any:
    """Return a JSON value with lone surrogates in its strings replaced by escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def number(value: float) -> float | str:
    """Return a number for JSON: `"NaN"`, `"Infinity"` or `"-Infinity"` if it is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
