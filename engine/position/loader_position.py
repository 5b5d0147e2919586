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

An iterator given as a loader has no beginning to go back to: what it gave in the whole run is read again.
What is not known to be restored is returned as doubts; `loader_doubts.py` has those that need no checkpoint.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from offloop.engine.data.loader_parts import name_of
from offloop.engine.data.random_state import capture_random_state, differs_on_host, restore_random_state
from offloop.engine.position.exactness import Doubt, approximate, equivalent
from offloop.engine.position.loader_doubts import (
    draws_nothing,
    generators_of,
    gives_its_sampler_order,
    is_sequence,
    is_stateful,
    restores_itself,
)

_IN_WORKERS = 'what data sets draw inside worker processes is drawn anew: sampling="seeded" makes it exact'
_IN_LASTING_WORKERS = "what data sets draw inside persistent workers is drawn anew"
_STATE_IN_WORKERS = (
    "the data set's state is inside worker processes, where torch's DataLoader does not get at it: "
    "torchdata.StatefulDataLoader does"
)
_SAMPLERS = ("sampler", "batch_sampler", "sampler of batches")


def capture_before_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return what decides the order of the epoch that `iter(loader)` is about to begin."""
    return {"random": capture_random_state(), **_capture_parts(loader)}


def rewind_epoch(loader: Iterable[Any], before: Mapping[str, Any]) -> None:
    """Put back what `capture_before_epoch` returned, as if the epoch had not begun."""
    restore_random_state(before["random"])
    _set_generators(loader, before)
    _set_samplers(loader, before)


def rewind_loader(loader: Iterable[Any], now: Mapping[str, Any]) -> None:
    """Put back what `capture_in_epoch` returned, in the process that it was taken in; workers stay as they are."""
    if "loader" in now:
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        return
    _set_generators(loader, now)
    _set_samplers(loader, now)
    if "dataset" in now:
        _set_dataset(loader, now)


def capture_in_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return what is needed beside it to continue the epoch from here, or to begin the next one."""
    state = _capture_parts(loader)
    if restores_itself(loader):
        state["loader"] = loader.state_dict()  # type: ignore[attr-defined]  # it has one
    elif not getattr(loader, "num_workers", 0):
        state |= {place: each.state_dict() for place, each in _stateful(loader, "dataset").items()}
    return state


def _capture_parts(loader: Iterable[Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"has_workers": has_workers(loader)}
    generators = {name: generator.get_state() for name, generator in generators_of(loader).items()}
    if generators:
        state["generators"] = generators
    samplers = {place: each.state_dict() for place, each in _stateful(loader, *_SAMPLERS).items()}
    if samplers:
        state["samplers"] = copy.deepcopy(samplers)  # they go on before it is saved
    return state


def begin_epoch(loader: Iterable[Any], now: Mapping[str, Any], read: int = 0) -> list[Doubt]:
    """Put back what the next epoch of a loader begins with, for a checkpoint taken between two of its epochs.

    Args:
        loader: Made as it was for the run that is continued.
        now: From `capture_in_epoch`.
        read: Batches that the run has had from it.

    Returns:
        What is not known to be as it was.
    """
    if "loader" in now and restores_itself(loader):
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        return [equivalent(_by_itself(loader))]
    if isinstance(loader, Iterator):
        return _read_again(loader, loader, read)
    doubts: list[Doubt] = []
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        if not now["has_workers"]:
            loader._iterator = (
                None  # those of another run in this process: the epoch began, or begins, without
            )
        elif gives_its_sampler_order(loader):
            _start_workers(loader)
            doubts += [] if draws_nothing(loader) else [equivalent(_IN_LASTING_WORKERS)]
        else:
            doubts.append(approximate(f"the persistent workers of {name_of(loader)} are started anew"))
    _set_generators(loader, now)
    _set_samplers(loader, now)
    return doubts + _set_dataset(loader, now)


def continue_epoch(
    loader: Iterable[Any],
    done: int,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    read: int | None = None,
) -> tuple[Iterator[Any], list[Doubt]]:
    """Return an iterator over the rest of an epoch, and what is not known to be exact about it.

    The caller restores the global random states afterwards.

    Args:
        loader: Made as it was for the run that is continued.
        done: Batches that the epoch has given already.
        before: From `capture_before_epoch`.
        now: From `capture_in_epoch`.
        read: Batches that the run has had from it, in all epochs; None if this is its first.
    """
    restore_random_state(before["random"])
    _set_generators(loader, before)
    if "loader" in now and restores_itself(loader):
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        iterator = iter(loader)
        _set_generators(loader, now)
        return iterator, _of_stateful_loader(loader)
    if is_sequence(loader):
        return iter(loader[done:]), []  # type: ignore[index]  # it has indices
    doubts = _set_dataset(loader, now)
    if gives_its_sampler_order(loader) and not isinstance(loader.dataset, IterableDataset):  # type: ignore[attr-defined]
        iterator, draws = _by_indices(loader, done, before)  # type: ignore[arg-type]  # it is a DataLoader
        _set_generators(loader, now)
        if draws:
            doubts.append(
                approximate(
                    "the sampler draws from global generators as it goes, which gives another order now"
                )
            )
        elif not doubts and loader.num_workers > 0 and not draws_nothing(loader):  # type: ignore[attr-defined]
            doubts.append(equivalent(_IN_WORKERS))
        return iterator, doubts
    if "dataset" in now and _stateful(loader, "dataset"):
        iterator = iter(loader)
        _set_generators(loader, now)
        return iterator, doubts  # it goes on where it was
    iterator = iter(loader)
    is_iterator = isinstance(loader, Iterator)
    doubts = _read_again(loader, iterator, done if read is None or not is_iterator else read)
    _set_generators(loader, now)
    return iterator, doubts


def _read_again(loader: Iterable[Any], iterator: Iterator[Any], count: int) -> list[Doubt]:
    """Read batches to skip them, where there is no other way."""
    for _ in itertools.islice(iterator, count):
        pass
    if not count:
        return []
    return [approximate(f"{count} batches of {name_of(loader)} were read again to skip them")]


def _by_indices(
    loader: "DataLoader[Any]", done: int, before: Mapping[str, Any]
) -> tuple[Iterator[Any], bool]:
    """Begin an epoch of `loader` after `done` batches, loading none of them.

    Returns:
        An iterator over the rest, and whether the sampler has drawn from global generators after its first item:
        the numbers were others then, because training draws from the same.
    """
    if loader.num_workers:
        return _skipping_with_workers(loader, done, before)
    _set_samplers(loader, before)
    iterator: Any = iter(loader)
    if "first" in before:  # something drew between the loader's beginning and its first batch
        restore_random_state(before["first"])
    draws = False
    with suppress(StopIteration):
        for number in range(done):
            iterator._next_index()  # torch has no public name for it
            if number == 0:
                first = capture_random_state()
    if done > 1:
        draws = differs_on_host(first, capture_random_state())
    return iterator, draws


def _skipping_with_workers(
    loader: "DataLoader[Any]", done: int, before: Mapping[str, Any]
) -> tuple[Iterator[Any], bool]:
    """Likewise; workers are given batches as soon as there is an iterator, so its sampler begins later."""
    iterator: Any
    sampler = _Tail(loader.batch_sampler or loader.sampler, done)  # without batches, one index at a time
    if not loader.persistent_workers:
        _set_samplers(loader, before)
        return iter(_with_sampler(loader, sampler)), sampler.has_drawn()
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
    return iterator, sampler.has_drawn()


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


def has_workers(loader: Any) -> bool:
    """True if the next epoch finds workers that an earlier one has started."""
    return (
        bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None
    )


class _Tail:
    """A sampler without its first items."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self._sampler = sampler
        self._skip = skip
        self._after_first: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        # What a sampler draws when it is asked for an iterator comes before DataLoader draws its workers' seed,
        # what it draws when it is asked for an item comes after that.
        return itertools.islice(self._watched(iter(self._sampler)), self._skip, None)

    def _watched(self, items: Iterator[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 0:
                self._after_first = capture_random_state()
            yield item

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skip)  # type: ignore[arg-type]  # a sampler has a length or raises

    def has_drawn(self) -> bool:
        """True if global generators were drawn from after the first item, so far."""
        # Without a batch skipped, the workers were given the same items at the same moment as before.
        return bool(
            self._skip and self._after_first and differs_on_host(self._after_first, capture_random_state())
        )


def _set_generators(loader: Any, state: Mapping[str, Any]) -> None:
    for place, generator in generators_of(loader).items():
        saved = state.get("generators", {}).get(place)
        if saved is not None:
            generator.set_state(saved)


def _set_samplers(loader: Any, state: Mapping[str, Any]) -> None:
    for place, sampler in _stateful(loader, *_SAMPLERS).items():
        saved = state.get("samplers", {}).get(place)
        if saved is not None:
            sampler.load_state_dict(copy.deepcopy(saved))  # it may keep what it is given


def _set_dataset(loader: Any, now: Mapping[str, Any]) -> list[Doubt]:
    """Put back the state of a data set that has one, where there is a way to it."""
    for dataset in _stateful(loader, "dataset").values():
        if "dataset" not in now:
            return [approximate(_STATE_IN_WORKERS)]
        dataset.load_state_dict(now["dataset"])
    return []


def _of_stateful_loader(loader: Any) -> list[Doubt]:
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        return [equivalent(_by_itself(loader))]
    if not is_stateful(loader.dataset):
        return [approximate(f"{name_of(loader)} found its place in a data set that has no state_dict")]
    return [] if loader.num_workers == 0 else [equivalent(_by_itself(loader))]


def _by_itself(loader: Any) -> str:
    return f"{name_of(loader)} restored itself by its load_state_dict"


def _stateful(loader: Any, *places: str) -> dict[str, Any]:
    """Return the parts of a loader that have a state, by where they are."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = {
        place: getattr(batch_sampler, "sampler", None)
        if place == "sampler of batches"
        else getattr(loader, place, None)
        for place in places
    }
    found: dict[str, Any] = {}
    for place, part in parts.items():
        if is_stateful(part) and all(part is not each for each in found.values()):
            found[place] = part
    return found
