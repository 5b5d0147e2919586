"""Continuing a loader inside an epoch: in the user's order, without reading samples to skip them.

The random state just before `iter(loader)` decides the order of an epoch. To continue after n batches, that state is
restored, the sampler draws its order again, and n lists of indices are dropped before anything is loaded. Then the
random states of the checkpoint are restored.

Loaders, samplers and data sets with `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`, or classes
of the user) are saved too:

    a sampler       its state from before the epoch: it draws the epoch's order again
    a data set      its current state; inside workers only loaders like StatefulDataLoader can read it
    a loader        its current state, where this is the only way: iterable data sets, data sets with a state in
                    workers, loaders that are no DataLoader

An iterator given as a loader cannot start again: everything that it gave in the run is read again.
Functions return doubts about what may not be restored; `loader_doubts.py` has those that need no checkpoint.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from offloop.engine.data.loader_parts import name_of, parts_by_place
from offloop.engine.data.random_state import capture_random_state, differs_on_host, restore_random_state
from offloop.engine.data.twin import Twin, unwrapped
from offloop.engine.position.exactness import Doubt, approximate, equivalent
from offloop.engine.position.loader_doubts import (
    draws_nothing,
    generators_of,
    gives_its_sampler_order,
    is_sequence,
    is_stateful,
    restores_itself,
)

_IN_WORKERS = 'what data sets draw inside worker processes is not restored: sampling="seeded" makes it exact'
_IN_PERSISTENT_WORKERS = "what data sets draw inside persistent workers is not restored"
_READ_BY_ALL = "what is drawn while all ranks read all batches of {} is not restored"
_STATE_IN_WORKERS = (
    "the data set's state is inside worker processes, where torch's DataLoader cannot read it: "
    "torchdata.StatefulDataLoader can"
)
_SAMPLERS = ("sampler", "batch_sampler", "sampler of batches")


def capture_before_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return the state that decides the order of the epoch that `iter(loader)` will start."""
    return {"random": capture_random_state(), **_capture_parts(loader)}


def rewind_epoch(loader: Iterable[Any], before: Mapping[str, Any]) -> None:
    """Restore what `capture_before_epoch` returned, as if the epoch had not started."""
    restore_random_state(before["random"])
    _set_generators(loader, before)
    _set_samplers(loader, before)


def rewind_loader(loader: Iterable[Any], now: Mapping[str, Any]) -> None:
    """Restore what `capture_in_epoch` returned, in the same process. Workers stay as they are."""
    if "loader" in now:
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        return
    _set_generators(loader, now)
    _set_samplers(loader, now)
    if "dataset" in now:
        _set_dataset(loader, now)


def capture_in_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """Return the rest of the state to continue the epoch from here, or to start the next one."""
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
        # A copy, because samplers continue before the state is saved.
        state["samplers"] = copy.deepcopy(samplers)
    return state


def begin_epoch(loader: Iterable[Any], now: Mapping[str, Any], read: int = 0) -> list[Doubt]:
    """Restore the state from which a loader's next epoch starts, for a checkpoint between two epochs.

    Args:
        loader: Built as for the interrupted run.
        now: From `capture_in_epoch`.
        read: Batches that the run has read from it.

    Returns:
        Doubts about what may differ.
    """
    if "loader" in now and restores_itself(loader):
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        return [equivalent(_by_itself(loader))]
    user = unwrapped(loader)
    if isinstance(user, Iterator):
        return _read_again(loader, iter(loader), read)
    doubts: list[Doubt] = []
    if isinstance(user, DataLoader) and user.persistent_workers:
        if not now["has_workers"]:
            # Workers of another run in this process: this epoch starts without any.
            user._iterator = None
        elif gives_its_sampler_order(user):
            _start_workers(user)
            doubts += [] if draws_nothing(loader) else [equivalent(_IN_PERSISTENT_WORKERS)]
        else:
            doubts.append(approximate(f"the persistent workers of {name_of(loader)} were restarted"))
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
    """Return an iterator over the rest of an epoch, and the doubts about it.

    The caller restores the global random states afterwards.

    Args:
        loader: Built as for the interrupted run.
        done: Batches that the epoch has given.
        before: From `capture_before_epoch`.
        now: From `capture_in_epoch`.
        read: Batches that the run has read from it, in all epochs; None if this is its first.
    """
    restore_random_state(before["random"])
    _set_generators(loader, before)
    if "loader" in now and restores_itself(loader):
        loader.load_state_dict(now["loader"])  # type: ignore[attr-defined]  # it has one
        iterator = iter(loader)
        _set_generators(loader, now)
        return iterator, _of_stateful_loader(unwrapped(loader)) + _of_common_reading(loader)
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
        return iterator, doubts + _of_common_reading(loader)
    iterator = iter(loader)
    is_iterator = isinstance(unwrapped(loader), Iterator)
    doubts = _read_again(loader, iterator, done if read is None or not is_iterator else read)
    _set_generators(loader, now)
    return iterator, doubts


def _read_again(loader: Iterable[Any], iterator: Iterator[Any], count: int) -> list[Doubt]:
    """Skip batches by reading them, where there is no other way."""
    for _ in itertools.islice(iterator, count):
        pass
    if not count:
        return []
    return [approximate(f"{count} batches of {name_of(loader)} were read again to skip them")]


def _by_indices(
    loader: "DataLoader[Any]", done: int, before: Mapping[str, Any]
) -> tuple[Iterator[Any], bool]:
    """Start an epoch of `loader` after `done` batches, without loading these.

    Returns:
        An iterator over the rest, and whether the sampler drew from global generators after its first item. Training
        draws from the same, so the sampler's numbers were different.
    """
    if loader.num_workers:
        return _skipping_with_workers(loader, done, before)
    _set_samplers(loader, before)
    iterator: Any = iter(loader)
    # Something drew numbers between `iter(loader)` and the first batch.
    if "first" in before:
        restore_random_state(before["first"])
    draws = False
    with suppress(StopIteration):
        for number in range(done):
            # torch has no public name for it.
            iterator._next_index()
            if number == 0:
                first = capture_random_state()
    if done > 1:
        draws = differs_on_host(first, capture_random_state())
    return iterator, draws


def _skipping_with_workers(
    loader: "DataLoader[Any]", done: int, before: Mapping[str, Any]
) -> tuple[Iterator[Any], bool]:
    """Do the same with workers. They get batches as soon as there is an iterator, so its sampler must start later."""
    iterator: Any
    # Without batches, the sampler gives single indices.
    sampler = _Tail(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, done)
    if not loader.persistent_workers:
        _set_samplers(loader, before)
        return iter(_with_sampler(loader, sampler)), sampler.has_drawn()
    # With existing workers, the epoch did not start with a seed for new ones.
    if before["has_workers"]:
        iterator = _start_workers(loader)
        restore_random_state(before["random"])
        _set_generators(loader, before)
        _set_samplers(loader, before)
        # torch has no public name for it.
        iterator._index_sampler = sampler
        iterator._reset(loader)
    else:
        _set_samplers(loader, before)
        iterator = loader._iterator = iter(_with_sampler(loader, sampler))
    # For later epochs.
    iterator._index_sampler = loader._index_sampler
    return iterator, sampler.has_drawn()


def _start_workers(loader: "DataLoader[Any]") -> Any:
    """Start the workers that an earlier epoch of the interrupted run had started, without giving them batches."""
    loader._iterator = iterator = iter(_with_sampler(loader, ()))
    iterator._index_sampler = loader._index_sampler
    return iterator


def _with_sampler(loader: "DataLoader[Any]", sampler: Any) -> "DataLoader[Any]":
    twin = copy.copy(loader)
    # DataLoader forbids changing its sampler, because its batch sampler would not fit. In this copy it does.
    place = "sampler" if loader.batch_sampler is None else "batch_sampler"
    twin.__dict__.update({place: sampler, "_iterator": None})
    return twin


def has_workers(loader: Any) -> bool:
    """Return whether an earlier epoch has started workers that the next one will use."""
    loader = unwrapped(loader)
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
        # A sampler's draws for its iterator come before DataLoader draws the workers' seed, those for items after it.
        return itertools.islice(self._watched(iter(self._sampler)), self._skip, None)

    def _watched(self, items: Iterator[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 0:
                self._after_first = capture_random_state()
            yield item

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skip)  # type: ignore[arg-type]  # a sampler has a length or raises

    def has_drawn(self) -> bool:
        """Return whether global generators were drawn from after the first item."""
        # If no batch is skipped, the workers get the same items at the same moment as before.
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
            # A copy, because the sampler may keep it.
            sampler.load_state_dict(copy.deepcopy(saved))


def _set_dataset(loader: Any, now: Mapping[str, Any]) -> list[Doubt]:
    """Restore the state of a data set that has one and can be reached."""
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


def _of_common_reading(loader: Any) -> list[Doubt]:
    """Return the doubt about a loader of which each rank reads all batches, and the others' draws with them."""
    return [equivalent(_READ_BY_ALL.format(name_of(loader)))] if isinstance(loader, Twin) else []


def _by_itself(loader: Any) -> str:
    return f"{name_of(loader)} restored itself by its load_state_dict"


def _stateful(loader: Any, *places: str) -> dict[str, Any]:
    """Return the parts of a loader that have a state, by their places."""
    found: dict[str, Any] = {}
    for place, part in parts_by_place(loader).items():
        if place in places and is_stateful(part) and all(part is not each for each in found.values()):
            found[place] = part
    return found
