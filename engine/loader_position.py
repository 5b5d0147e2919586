"""Continuing a loader in the middle of an epoch: in the user's own order, without reading a sample to skip it.

What decides the order of an epoch is the random state from just before `iter(loader)`. To continue after n
batches, that state is put back, the sampler draws its order again, and n lists of indices are thrown away
before anything is loaded. The random states of the moment of the checkpoint are put back afterwards.

Loaders, samplers and data sets with `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`, or the
user's own) are asked for what they know beside that:

    a sampler       its state from before the epoch: it draws the epoch's order again
    a data set      its state of now; with workers it lives in them, where only a loader of its own kind gets at it
    a loader        its state of now, where its own position is the only way: iterable data sets, data sets with a
                    state in workers, loaders that are no DataLoader
"""

import copy
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from offloop.engine.exactness import Doubt, approximate, equivalent
from offloop.engine.random_state import capture_random_state, restore_random_state
from offloop.engine.seeded_sampling import SeededDataset

_IN_WORKERS = 'what data sets draw inside worker processes is drawn anew: sampling="seeded" makes it exact'
_STATE_IN_WORKERS = (
    "the data set's state is inside worker processes, where torch's DataLoader does not get at it: "
    "torchdata.StatefulDataLoader does"
)
_SAMPLERS = ("sampler", "batch_sampler")


def capture_before_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return what decides the order of the epoch that `iter(loader)` is about to begin."""
    state: dict[str, Any] = {"random": capture_random_state(), "has_workers": _has_workers(loader)}
    generators = {name: generator.get_state() for name, generator in _generators(loader).items()}
    if generators:
        state["generators"] = generators
    samplers = {place: each.state_dict() for place, each in _stateful(loader, *_SAMPLERS).items()}
    if samplers:
        state["samplers"] = copy.deepcopy(samplers)  # they go on before it is saved
    return state


def rewind_epoch(loader: Iterable[Any], before: Mapping[str, Any]) -> None:
    """Put back what `capture_before_epoch` returned, as if the epoch had not begun."""
    restore_random_state(before["random"])
    _set_generators(loader, before)


def capture_in_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return what is needed beside it to continue the epoch from here, or to begin the next one."""
    state: dict[str, Any] = {"has_workers": _has_workers(loader)}
    generators = {name: generator.get_state() for name, generator in _generators(loader).items()}
    if generators:
        state["generators"] = generators
    samplers = {place: each.state_dict() for place, each in _stateful(loader, *_SAMPLERS).items()}
    if samplers:
        state["samplers"] = samplers
    if _restores_itself(loader):
        state["loader"] = loader.state_dict()  # type: ignore[attr-defined]  # it has one
    elif not getattr(loader, "num_workers", 0):
        state |= {place: each.state_dict() for place, each in _stateful(loader, "dataset").items()}
    return state


def begin_epoch(loader: Iterable[Any], now: Mapping[str, Any]) -> list[Doubt]:
    """Put back what the next epoch of a loader begins with, for a checkpoint taken between two epochs.

    Args:
        loader: Made as it was for the run that is continued.
        now: From `capture_in_epoch`.
    """
    if "loader" in now and _restores_itself(loader):
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        return [equivalent(_by_itself(loader))]
    if now["has_workers"] and isinstance(loader, DataLoader) and loader.persistent_workers:
        _start_workers(loader)
    _set_generators(loader, now)
    _set_samplers(loader, now)
    return _set_dataset(loader, now)


def continue_epoch(
    loader: Iterable[Any], done: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[Iterator[Any], list[Doubt]]:
    """Return an iterator over the rest of an epoch, and what is not known to be exact about it.

    The caller restores the global random states afterwards.

    Args:
        loader: Made as it was for the run that is continued.
        done: Batches that the epoch has given already.
        before: From `capture_before_epoch`.
        now: From `capture_in_epoch`.
    """
    restore_random_state(before["random"])
    _set_generators(loader, before)
    if "loader" in now and _restores_itself(loader):
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        iterator = iter(loader)
        _set_generators(loader, now)
        return iterator, _of_stateful_loader(loader)
    doubts = _set_dataset(loader, now)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        if loader.num_workers == 0:
            _set_samplers(loader, before)
            rest = _skipping(loader, done)
        else:
            rest = _skipping_with_workers(loader, done, before)
        _set_generators(loader, now)
        if loader.num_workers > 0 and not doubts and not isinstance(loader.dataset, SeededDataset):
            doubts = [equivalent(_IN_WORKERS)]
        return rest, doubts
    if isinstance(loader, list | tuple):
        return iter(loader[done:]), []
    iterator = iter(loader)
    if "dataset" in now and _stateful(loader, "dataset"):
        _set_generators(loader, now)
        return iterator, doubts  # it goes on where it was
    for _ in range(done):  # there is no other way into the middle of it
        next(iterator, None)
    _set_generators(loader, now)
    name = type(loader).__name__
    return iterator, [approximate(f"{done} batches of {name} were read again to skip them")]


def _skipping(loader: "DataLoader[Any]", done: int) -> Iterator[Any]:
    """Begin an epoch of `loader` after `done` batches, loading none of them."""
    iterator = iter(loader)
    with suppress(StopIteration):
        for _ in range(done):
            iterator._next_index()  # torch has no public name for it
    return iterator


def _skipping_with_workers(loader: "DataLoader[Any]", done: int, before: Mapping[str, Any]) -> Iterator[Any]:
    """Likewise; workers are given batches as soon as there is an iterator, so its sampler begins later."""
    iterator: Any
    sampler = _Tail(loader.batch_sampler or loader.sampler, done)  # without batches, one index at a time
    if not loader.persistent_workers:
        _set_samplers(loader, before)
        return iter(_with_sampler(loader, sampler))
    if before["has_workers"]:  # then this epoch did not begin with a seed for new ones
        iterator = _start_workers(loader)
        restore_random_state(before["random"])
        _set_generators(loader, before)
        _set_samplers(loader, before)
        iterator._index_sampler = sampler  # torch has no public name for it
        iterator._reset(loader)
    else:
        _set_samplers(loader, before)
        iterator = loader._iterator = iter(_with_sampler(loader, sampler))
    iterator._index_sampler = loader._index_sampler  # of the epochs to come
    rest: Iterator[Any] = iterator
    return rest


def _start_workers(loader: "DataLoader[Any]") -> Any:
    """Start the workers that an earlier epoch of the interrupted run had started; gives them nothing yet."""
    loader._iterator = iterator = iter(_with_sampler(loader, ()))
    iterator._index_sampler = loader._index_sampler
    return iterator


def _with_sampler(loader: "DataLoader[Any]", sampler: Any) -> "DataLoader[Any]":
    twin = copy.copy(loader)
    # DataLoader forbids changing its sampler, because its own would no longer fit; in a copy nothing is lost.
    place = "sampler" if loader.batch_sampler is None else "batch_sampler"
    twin.__dict__.update({place: sampler, "_iterator": None})
    return twin


def _has_workers(loader: Any) -> bool:
    """True if the next epoch finds workers that an earlier one has started."""
    return (
        bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None
    )


class _Tail:
    """A sampler without its first items."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self._sampler = sampler
        self._skip = skip

    def __iter__(self) -> Iterator[Any]:
        # What a sampler draws when it is asked for an iterator comes before DataLoader draws its workers' seed,
        # what it draws when it is asked for an item comes after that.
        return itertools.islice(iter(self._sampler), self._skip, None)

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skip)  # type: ignore[arg-type]  # a sampler has a length or raises


def _generators(loader: Any) -> dict[str, torch.Generator]:
    """Return the generators of a loader's own, by where they are; a shared one once."""
    places = {
        "loader": getattr(loader, "generator", None),
        "sampler": getattr(getattr(loader, "sampler", None), "generator", None),
        "batch_sampler": getattr(getattr(loader, "batch_sampler", None), "generator", None),
        "sampler of batches": getattr(
            getattr(getattr(loader, "batch_sampler", None), "sampler", None), "generator", None
        ),
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


def _set_samplers(loader: Any, state: Mapping[str, Any]) -> None:
    for place, sampler in _stateful(loader, *_SAMPLERS).items():
        saved = state.get("samplers", {}).get(place)
        if saved is not None:
            sampler.load_state_dict(saved)


def _set_dataset(loader: Any, now: Mapping[str, Any]) -> list[Doubt]:
    """Put back the state of a data set that has one, where there is a way to it."""
    for dataset in _stateful(loader, "dataset").values():
        if "dataset" not in now:
            return [approximate(_STATE_IN_WORKERS)]
        dataset.load_state_dict(now["dataset"])
    unseen = _unseen_generators(loader)
    if unseen:
        return [
            approximate(f"{', '.join(unseen)}: nobody saved it, draw from a global one or give state_dict")
        ]
    return []


def _unseen_generators(loader: Any) -> list[str]:
    """Return the generators that parts of a loader hold as attributes and that nobody saves; looks no deeper."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    data = getattr(loader, "dataset", None)
    inner = data.unseeded if isinstance(data, SeededDataset) else data
    batches = getattr(loader, "batch_sampler", None)
    parts = [inner, getattr(inner, "dataset", None), getattr(inner, "transform", None)]
    parts += [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    saved = list(_generators(loader).values())
    found: list[str] = []
    for part in parts:
        if part is None or _is_stateful(part):
            continue
        for name, value in {**vars(type(part)), **getattr(part, "__dict__", {})}.items():
            if isinstance(value, kinds) and all(value is not each for each in saved):
                text = f"{type(part).__name__} has a generator of its own ({name})"
                if text not in found:
                    found.append(text)
    return found


def _restores_itself(loader: Any) -> bool:
    """True if the loader's own `state_dict` is the only way to its position, or the best."""
    if not _is_stateful(loader):
        return False
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return True
    return loader.num_workers > 0 and _is_stateful(loader.dataset)


def _of_stateful_loader(loader: Any) -> list[Doubt]:
    if not isinstance(loader, DataLoader):
        return [equivalent(_by_itself(loader))]
    if not _is_stateful(loader.dataset):
        return [approximate(f"{type(loader).__name__} found its place in a data set that has no state_dict")]
    return [] if loader.num_workers == 0 else [equivalent(_by_itself(loader))]


def _by_itself(loader: Any) -> str:
    return f"{type(loader).__name__} restored itself by its load_state_dict"


def _stateful(loader: Any, *places: str) -> dict[str, Any]:
    """Return the parts of a loader that have a state, by where they are."""
    parts = {place: getattr(loader, place, None) for place in places}
    return {place: part for place, part in parts.items() if _is_stateful(part)}


def _is_stateful(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
