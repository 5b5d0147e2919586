"""Events to JSON or MessagePack and back.

Events of unknown types pass through unchanged. NaN and infinities, which JSON lacks, travel as strings.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from offloop.engine.errors import EventError
from offloop.engine.events import Event, Format, Metrics, Settings, UnknownEvent, event_class

# Defines their classes, so that logs with them can be read everywhere.
from offloop.engine.samples import events as _samples  # noqa: F401

_NOT_PLAIN: Final = (TypeError, OverflowError, UnicodeEncodeError, RecursionError)
"""Raised by the encoders for an unsupported type, an int above 64 bits, half a surrogate pair, or a cycle."""
_NON_FINITE: Final = {math.inf: "Infinity", -math.inf: "-Infinity"}

_json_encode = msgspec.json.Encoder().encode
_json_encode_lines = msgspec.json.Encoder().encode_lines
_msgpack_encode = msgspec.msgpack.Encoder().encode


class _Codec(msgspec.Struct):
    """Decoders of one event class, built on first use."""

    json: "msgspec.json.Decoder[Event]"
    msgpack: "msgspec.msgpack.Decoder[Event]"


_codecs: dict[type[Event], _Codec] = {}


class _Head(msgspec.Struct):
    """Fields read before the class is known: the tag, and the base fields for an `UnknownEvent`."""

    type: str
    run_id: str = ""
    seq: int = -1
    time: float = 0.0
    epoch: int = -1
    step: int = -1
    batch: int = -1


_json_head = msgspec.json.Decoder(_Head, strict=False)
_msgpack_head = msgspec.msgpack.Decoder(_Head, strict=False)


def encode(event: Event, format: Format = "json") -> bytes:
    """Encode an event. Any thread; does not block.

    Raises:
        EventError: A field holds something other than plain values; the text names the field and the type.
    """
    try:
        if isinstance(event, UnknownEvent):
            return event.raw if event.format == format else _transcode(event)
        if format == "msgpack":
            return _msgpack_encode(event)
        data = _json_encode(event)
        # msgspec writes null for NaN and infinities. Searching the bytes for "null" is far cheaper than checking
        # every value, and rarely hits: fields at their default, such as None, are not in the bytes at all.
        if b"null" in data:
            data = _json_encode(with_non_finite_as_text(msgspec.to_builtins(event)))
        return data
    except _NOT_PLAIN as error:
        raise _not_plain(event, error) from error


def encode_lines(events: Sequence[Event]) -> bytes:
    """Encode events in JSON, each in a line of its own: the same as `encode` of each, in one call of the encoder.

    Raises:
        EventError: As in `encode`, for the first such event.
    """
    if not any(isinstance(event, UnknownEvent) for event in events):
        with contextlib.suppress(*_NOT_PLAIN):
            lines = _json_encode_lines(events)
            if b"null" not in lines:
                return lines
    return b"".join(encode(event) + b"\n" for event in events)


def decode(data: bytes, format: Format = "json") -> Event:
    """Decode an event to an instance of its class, or to an `UnknownEvent` if the class is not defined here.

    Any thread; does not block.

    Raises:
        msgspec.DecodeError: The bytes are not an event.
    """
    head = (_json_head if format == "json" else _msgpack_head).decode(data)
    codec = _codec(head.type)
    if codec is None:
        position = {name: getattr(head, name) for name in Event.__struct_fields__}
        return UnknownEvent(type=head.type, raw=data, format=format, **position)
    return codec.json.decode(data) if format == "json" else codec.msgpack.decode(data)


def check(event: Event) -> None:
    """Raise `EventError` unless all fields hold plain values. Takes about a microsecond."""
    try:
        _msgpack_encode(event)
    except _NOT_PLAIN as error:
        raise _not_plain(event, error) from error


def check_new(event: Event) -> None:
    """Raise `EventError` unless this can be published: an event of plain values that was not published before."""
    if not isinstance(event, Event):
        if isinstance(event, type) and issubclass(event, Event):
            raise EventError(
                f"publish takes an event, got the class {event.__name__}: publish {event.__name__}(...)"
            )
        raise EventError(
            f"publish takes an event, got a {type(event).__name__}: numbers of a step go to log(name, value); else "
            "define class Mine(Event, frozen=True) with its fields, and publish Mine(...)"
        )
    if event.time:
        raise EventError(f"{type(event).__name__} was published before: make a new event for each publish")
    check(event)


def _codec(tag: str) -> _Codec | None:
    wanted = event_class(tag)
    if wanted is None:
        return None
    codec = _codecs.get(wanted)
    if codec is None:
        # strict=False accepts "NaN" and "Infinity" for a number.
        codec = _codecs[wanted] = _Codec(
            json=msgspec.json.Decoder(wanted, strict=False, dec_hook=_decode_mapping),
            msgpack=msgspec.msgpack.Decoder(wanted, strict=False, dec_hook=_decode_mapping),
        )
    return codec


def _decode_mapping(wanted: type, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping, got {type(value).__name__}")
    if wanted is Metrics:
        return Metrics({name: float(number) for name, number in value.items()})
    if wanted is Settings:
        return Settings(value)
    raise NotImplementedError(f"cannot decode {wanted}")


def with_non_finite_as_text(value: Any) -> Any:
    """Return plain values with NaN and infinities replaced by the strings that stand for them in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return _NON_FINITE.get(value, "NaN")
    if isinstance(value, Mapping):
        return {key: with_non_finite_as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_non_finite_as_text(item) for item in value]
    return value


def _transcode(event: UnknownEvent) -> bytes:
    if event.format == "json":
        return _msgpack_encode(msgspec.json.decode(event.raw))
    return _json_encode(with_non_finite_as_text(msgspec.msgpack.decode(event.raw)))


def _not_plain(event: Event, problem: Exception) -> EventError:
    """Return an error that names the field, and the place in it, that cannot be encoded."""
    for name in event.__struct_fields__:
        where, value = _first_not_plain(name, getattr(event, name)) or ("", None)
        if where:
            if not isinstance(problem, TypeError):
                return EventError(f"{type(event).__name__}.{where} cannot be encoded: {problem}")
            hint = " (for a tensor: value.item())" if type(value).__name__ == "Tensor" else ""
            return EventError(
                f"{type(event).__name__}.{where} holds a {type(value).__name__}; events hold only plain numbers, "
                f"strings and mappings of them{hint}"
            )
    return EventError(f"{type(event).__name__} cannot be encoded: {problem}")


def _first_not_plain(where: str, value: Any) -> tuple[str, Any] | None:
    try:
        _msgpack_encode(value)
    except RecursionError:
        # The value contains itself.
        return where, value
    except _NOT_PLAIN:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        for key, item in items:
            if found := _first_not_plain(f"{where}[{key!r}]", item):
                return found
        return where, value
    return None
