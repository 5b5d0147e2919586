"""The order of samples, drawn from rank 0's random state on all ranks.

A sampler draws when its iterator is made, when the first item is asked for, or with every item. On rank 0 it draws
from the generators of training, as with one process. On the other ranks it draws from copies of rank 0's, sent just
before, and their own generators stay as they are. A sampler that may draw with every item does so from a copy on
rank 0 too, because training draws in between, on each rank something else.

    rank 0     iter(sampler)   first item   ... training draws ...   more items: from a copy of after the first item
                   │ state         │ state
    rank 1     iter(sampler)   first item                            more items: from the same copy
"""

import contextlib
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from offloop.engine.data.loader_parts import name_of, samplers_of
from offloop.engine.data.random_state import capture_on_host, restore_on_host
from offloop.engine.data.twin import unwrapped
from offloop.engine.errors import ConfigError
from offloop.engine.position.loader_doubts import generator_kinds, is_torchs_sampler

Gather = Callable[[Any], list[Any]]
"""Returns the values of all ranks. Each rank calls it, in the same order as its other collectives."""

_DRAW_NOTHING: Final = tuple(
    kind.__iter__ for kind in (BatchSampler, DistributedSampler, SequentialSampler, list, tuple, range)
)


def draws_order(loader: "DataLoader[Any]") -> bool:
    """Return False where the order of a loader's samples is certain to need no random numbers."""
    return not all(getattr(type(each), "__iter__", None) in _DRAW_NOTHING for each in samplers_of(loader))


class SharedOrder(Iterator[Any]):
    """Iterates over a sampler, or over a loader, such that all ranks get the same items. Training thread only."""

    def __init__(
        self,
        source: Iterable[Any],
        parts: Iterable[Any],
        *,
        rank: int,
        gather: Gather,
        gives_indices: bool,
        at_once: bool = False,
    ) -> None:
        """Make the iterator of the source; waits for the other ranks where that may draw.

        Args:
            source: What to iterate over.
            parts: Objects whose own generators decide the order too.
            rank: Number of this process.
            gather: See `Gather`.
            gives_indices: True for a sampler, whose items can be compared.
            at_once: True to take the first item now, so that no rank need ask for one.
        """
        self._parts = [unwrapped(each) for each in parts]
        self._rank = rank
        self._gather = gather
        is_torchs = gives_indices and all(map(is_torchs_sampler, self._parts))
        self._is_compared = gives_indices and not is_torchs
        self._draws_later = not is_torchs
        self._has_begun = False
        # Copies to draw from; None: from those of training
        self._copies: dict[str, Any] | None = None
        self._first: list[Any] = []
        if at_once or not is_torchs:
            self._take_state()
        with self._drawing():
            self._items = iter(source)
        if at_once:
            with contextlib.suppress(StopIteration):
                self._first.append(self._begin())

    def __next__(self) -> Any:
        if self._first:
            return self._first.pop()
        if not self._has_begun:
            self._take_state()
            return self._begin()
        if not self._draws_later:
            return next(self._items)
        with self._drawing():
            return next(self._items)

    def _take_state(self) -> None:
        """Take over rank 0's generators."""
        is_first = self._rank == 0
        own = [_state_of(each) for each in self._generators()] if is_first else None
        sent = self._gather({"host": capture_on_host(), "own": own} if is_first else None)[0]
        if not is_first:
            self._copies = sent["host"]
            for generator, state in zip(self._generators(), sent["own"], strict=False):
                _set_state(generator, state)

    def _begin(self) -> Any:
        """Return the first item."""
        self._has_begun = True
        with self._drawing():
            item = next(self._items)
        if self._draws_later and self._rank == 0:
            self._copies = capture_on_host()
        if self._is_compared:
            self._compare(item)
        return item

    def _compare(self, item: Any) -> None:
        """Check that a sampler of unknown kind gives the same first item on all ranks."""
        text = repr(item)
        # An address differs in any case
        marks = self._gather(0 if " at 0x" in text else zlib.crc32(text.encode()))
        others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if others:
            raise ConfigError(
                f"{', '.join(map(name_of, self._parts))} began with other samples on rank "
                f"{', '.join(map(str, others))} than on rank 0: seed its own generator alike on all ranks, or let it "
                "draw from torch's, Python's or NumPy's global generator"
            )

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Draw from the copies, if there are any."""
        if self._copies is None:
            yield
            return
        own = capture_on_host()
        restore_on_host(self._copies)
        try:
            yield
        finally:
            self._copies = capture_on_host()
            restore_on_host(own)

    def _generators(self) -> list[Any]:
        """Return the generators that the parts keep in attributes, in the same order on all ranks."""
        kinds = generator_kinds()
        found: list[Any] = []
        for part in self._parts:
            for _, value in sorted(getattr(part, "__dict__", {}).items()):
                if isinstance(value, kinds) and all(value is not each for each in found):
                    found.append(value)
        return found


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _bits(generator).state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        _bits(generator).state = state


def _bits(generator: Any) -> Any:
    """Return the bit generator of one of NumPy's."""
    if hasattr(generator, "_bit_generator"):
        return generator._bit_generator
    return getattr(generator, "bit_generator", generator)
