"""Continuing a loader in the middle of an epoch: in the user's own order, without reading a sample to skip it.

What decides the order of an epoch is the random state from just before `iter(loader)`. To continue after n
batches, that state is put back, the sampler draws its order again, and n lists of indices are thrown away
before anything is loaded. The random states of the moment of the checkpoint are put back afterwards.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from offloop.engine.random_state import capture_random_state, restore_random_state

Exactness = Literal["bitwise", "equivalent", "approximate"]


def capture_before_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return what decides the order of the epoch that `iter(loader)` is about to begin."""
    state: dict[str, Any] = {"random": capture_random_state()}
    generators = {name: generator.get_state() for name, generator in _generators(loader).items()}
    if generators:
        state["generators"] = generators
    return state


def restore_before_epoch(loader: Iterable[Any], before: Mapping[str, Any]) -> None:
    """Put back what `capture_before_epoch` returned, as if the epoch had never begun."""
    restore_random_state(before["random"])
    _set_generators(loader, before)


def capture_in_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return what is needed beside it to continue the epoch from here."""
    state: dict[str, Any] = {}
    generators = {name: generator.get_state() for name, generator in _generators(loader).items()}
    if generators:
        state["generators"] = generators
    if hasattr(loader, "state_dict"):  # torchdata.StatefulDataLoader, or a loader of the user's
        state["loader"] = loader.state_dict()
    return state


def continue_epoch(
    loader: Iterable[Any], done: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[Iterator[Any], Exactness, str]:
    """Return an iterator over the rest of an epoch, and how exact it is.

    The caller restores the global random states afterwards.

    Args:
        loader: Made as it was for the run that is continued.
        done: Batches that the epoch has given already.
        before: From `capture_before_epoch`.
        now: From `capture_in_epoch`.
    """
    if "loader" in now and hasattr(loader, "load_state_dict"):
        loader.load_state_dict(now["loader"])
        return iter(loader), "equivalent", "the loader restored itself by its load_state_dict"
    restore_random_state(before["random"])
    _set_generators(loader, before)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        rest = _skipping(loader, done)
        _set_generators(loader, now)
        if loader.num_workers > 0:
            return rest, "equivalent", "what data sets draw inside worker processes is drawn anew"
        return rest, "bitwise", ""
    if isinstance(loader, list | tuple):
        return iter(loader[done:]), "bitwise", ""
    iterator = iter(loader)
    for _ in range(done):  # there is no other way into the middle of it
        next(iterator, None)
    _set_generators(loader, now)
    name = type(loader).__name__
    return iterator, "approximate", f"{done} batches of {name} were read again to skip them"


def _skipping(loader: "DataLoader[Any]", done: int) -> Iterator[Any]:
    """Begin an epoch of `loader` after `done` batches, loading none of them."""
    twin = copy.copy(loader)
    # DataLoader forbids changing its sampler, because its own would no longer fit; in a copy nothing is lost.
    if loader.batch_sampler is not None:
        twin.__dict__["batch_sampler"] = _Tail(loader.batch_sampler, done)
    else:  # batch_size=None: the sampler gives one index at a time
        twin.__dict__["sampler"] = _Tail(loader.sampler, done)
    iterator = iter(twin)
    if loader.num_workers == 0:
        # Without workers the sampler draws when it is first asked: let it draw now, before random states are
        # put back. The index list that it gives is kept for the first batch.
        sampler_iterator = iterator._sampler_iter  # torch has no public name for it
        first = next(sampler_iterator, None)
        iterator._sampler_iter = _chain(first, sampler_iterator)
    return iterator


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
    yield from rest


class _Tail:
    """A sampler without its first items."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self._sampler = sampler
        self._skip = skip

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that it draws when it is first asked: DataLoader draws its workers' seed before that.
        iterator = iter(self._sampler)
        for _ in range(self._skip):
            next(iterator, None)
        yield from iterator

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skip)  # type: ignore[arg-type]  # a sampler has a length or raises


def _generators(loader: Any) -> dict[str, torch.Generator]:
    """Return the generators of a loader's own, by where they are; a shared one once."""
    places = {
        "loader": getattr(loader, "generator", None),
        "sampler": getattr(getattr(loader, "sampler", None), "generator", None),
        "batch_sampler": getattr(getattr(loader, "batch_sampler", None), "generator", None),
    }
    found: dict[str, torch.Generator] = {}
    for place, generator in places.items():
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found.values()):
            found[place] = generator
    return found


def _set_generators(loader: Any, state: Mapping[str, Any]) -> None:
    for place, generator in _generators(loader).items():
        saved = state.get("generators", {}).get(place)
        if saved is not None:
            generator.set_state(saved)
