"""The numbers of samples, which are drawn and exported, by name.

Those of a class that is defined in this process come from its fields, others from their JSON.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from offloop.engine.events import Event, UnknownEvent

__all__ = ["numbers_in", "numbers_in_fields", "numbers_of"]

_BASE_FIELDS: Final = frozenset({*Event.__struct_fields__, "type"})


def numbers_of(event: Event, prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the names and numbers of an event, including those in mappings and in tuples of structs."""
    for name in event.__struct_fields__:
        if name not in _BASE_FIELDS:
            yield from _numbers(f"{prefix}/{name}", getattr(event, name))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, int | float):
                yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, tuple):
        for place, item in enumerate(value):
            if isinstance(item, msgspec.Struct):
                for field in item.__struct_fields__:
                    yield from _numbers(f"{name}/{place}/{field}", getattr(item, field))


def numbers_in(event: UnknownEvent) -> Iterator[tuple[str, float]]:
    """Yield the names and numbers of an event whose class is not defined in this process."""
    try:
        fields = msgspec.json.decode(event.raw, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return
    yield from numbers_in_fields(event.type, fields)


def numbers_in_fields(type_name: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the names and numbers of an event that was read from JSON.

    Args:
        type_name: What the event calls its class, with or without the module.
        fields: The event.
    """
    name = type_name.rpartition(".")[2]
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    if isinstance(fields.get("kind"), str) and fields["kind"]:
        prefix = f"{prefix}/{fields['kind']}"
    for field, value in fields.items():
        if field not in _BASE_FIELDS:
            yield from _json_numbers(f"{prefix}/{field}", value, depth=2)


def _json_numbers(name: str, value: object, depth: int) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, float(value)
    elif value in ("NaN", "Infinity", "-Infinity"):
        yield name, float(str(value))
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _json_numbers(f"{name}/{key}", item, depth - 1)
    elif depth and isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, dict):
                yield from _json_numbers(f"{name}/{place}", item, depth - 1)
