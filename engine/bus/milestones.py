"""Milestones: the latest of a run, bounded in number and in bytes."""

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from offloop.engine.events import Event

MILESTONES_KEPT: Final = 100_000
"""Milestones that are kept for replay."""
MILESTONE_BYTES: Final = 64 * 1024 * 1024
"""Bytes of memory that they may take together."""
SAMPLE: Final = 1_000
"""Items above which the size of a list or mapping is estimated from about this many of them."""
NUMBER_BYTES: Final = 28
"""A float or an int."""
PLACE_BYTES: Final = 8
"""Place of an item in a list; a mapping has room for about six of them in each entry."""


class Milestones:
    """The latest events, oldest first. Beyond a bound the oldest go and are counted; the newest always stays."""

    def __init__(self, *, most: int = MILESTONES_KEPT, most_bytes: int = MILESTONE_BYTES) -> None:
        self.dropped = 0
        """Events that are no longer kept."""
        self.bytes = 0
        """Estimated memory of those that are."""
        self._most = most
        self._most_bytes = most_bytes
        self._kept: deque[tuple[Event, int]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def extend(self, events: Iterable[Event]) -> None:
        """Add events."""
        kept = self._kept
        for event in events:
            size = size_of(event)
            kept.append((event, size))
            self.bytes += size
            while len(kept) > self._most or (self.bytes > self._most_bytes and len(kept) > 1):
                self.bytes -= kept.popleft()[1]
                self.dropped += 1

    def forget(self, count: int) -> None:
        """Remove the oldest `count` events, without counting them as dropped."""
        for _ in range(min(count, len(self._kept))):
            self.bytes -= self._kept.popleft()[1]

    def events(self) -> list[Event]:
        """Return the kept events."""
        return [event for event, _ in self._kept]


def size_of(value: Any) -> int:
    """Estimate the memory of an event or a plain value in bytes. Takes microseconds, and does not encode anything."""
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return _size_of_items(len(value), itertools.chain.from_iterable(value.items()), 2)
    if isinstance(value, list | tuple | set | frozenset):
        return _size_of_items(len(value), value, 1)
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        return PLACE_BYTES * len(names) + sum([size_of(getattr(value, name)) for name in names])
    if isinstance(value, bool) or value is None:
        return 0
    return NUMBER_BYTES


def _size_of_items(count: int, items: Iterable[Any], each: int) -> int:
    """Estimate a container of `count` entries with `each` items, from items at even distances if they are many."""
    # Odd, so that keys and values of a mapping are met alike
    stride = count * each // SAMPLE | 1
    sizes = sum(map(size_of, itertools.islice(items, 0, None, stride))) * stride
    return 64 + PLACE_BYTES * count * (6 if each == 2 else 1) + sizes
