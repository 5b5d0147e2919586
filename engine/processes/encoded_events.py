"""The events of a run in MessagePack, encoded once for all child processes."""

from collections.abc import Iterable
from typing import Final

import msgspec

from offloop.engine.encoding import encode
from offloop.engine.events import Event

KEPT: Final = 4096
"""Encoded events that are kept for other children; a child that is further behind has its events encoded anew."""


class EncodedEvents:
    """Encodes events; any thread, also several at once. An event that two threads ask for may be encoded twice."""

    def __init__(self) -> None:
        # By seq. Reading, setting and removing an item is atomic in CPython.
        self._encoded: dict[int, bytes] = {}
        self._children = 0

    def add_child(self) -> None:
        """Count a child. With a single one, nothing is kept. Before the run starts."""
        self._children += 1

    def of(self, events: Iterable[Event]) -> list[msgspec.Raw]:
        """Return events in MessagePack."""
        if self._children < 2:
            return [msgspec.Raw(encode(each, "msgpack")) for each in events]
        kept = self._encoded
        raw: list[msgspec.Raw] = []
        for event in events:
            data = kept.get(event.seq)
            if data is None:
                data = kept[event.seq] = encode(event, "msgpack")
            raw.append(msgspec.Raw(data))
        while len(kept) > KEPT:
            # Insertion order: the oldest first. Another thread may have removed it, or be adding one.
            try:
                kept.pop(next(iter(kept)), None)
            except (RuntimeError, StopIteration):
                break
        return raw
