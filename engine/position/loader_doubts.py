"""Doubts about a loader: parts that a resume may not have restored, with the remedy.

Order is judged strictly, because few places decide it: a list, a loader with `state_dict`, or a DataLoader whose
samplers are torch's, have `state_dict`, or use `set_epoch`. Any other code that decides the order may carry state
from epoch to epoch, and is named.

Data sets are unknown code. They are searched for signs of state: random generators and iterators that they hold or
that their methods refer to, and counters that have changed during the run.
"""

import functools
import itertools
import random
import sys
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from offloop.engine import checks
from offloop.engine.data.batches import length_of
from offloop.engine.data.loader_parts import datasets_of, name_of, parts_by_place, samplers_of
from offloop.engine.data.random_state import global_generators
from offloop.engine.data.seeded_sampling import SeededDataset
from offloop.engine.data.twin import unwrapped
from offloop.engine.data.workers import users_init_fn
from offloop.engine.position.exactness import Doubt, approximate

_KNOWN_SAMPLERS: Final = tuple(
    kind.__iter__
    for kind in (
        BatchSampler,
        DistributedSampler,
        RandomSampler,
        SequentialSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
        list,
        tuple,
        range,
    )
)
"""Methods whose order depends only on the sampler's arguments, the epoch and a saved generator."""
_MOST_OBJECTS: Final = 2_000
"""Limit of objects in a search for generators: data sets may be large trees of objects."""
_MOST_ITEMS: Final = 50
"""Limit of items searched in a container: a list of a million file names holds no generator."""
_LIBRARIES: Final = frozenset({"torch", "torchdata", "numpy"})
"""Packages whose functions are not searched: they draw from global generators or from attributes of objects."""
_ELSEWHERE: Final = frozenset({*sys.stdlib_module_names, "offloop"})
"""Packages whose objects are not searched either: they lead to loggers, threads and the run itself."""


def doubts_about(loader: Iterable[Any]) -> list[Doubt]:
    """Return the doubts about a loader that hold for any checkpoint."""
    loader = unwrapped(loader)
    if is_sequence(loader) or restores_itself(loader):
        return []
    if not isinstance(loader, DataLoader):
        if isinstance(loader, Iterator):
            return [approximate(f"{name_of(loader)} continues from epoch to epoch: its state is not saved")]
        return [
            approximate(
                f"the state of {name_of(loader)} is not saved: give it state_dict and load_state_dict, or take a "
                "DataLoader"
            )
        ]
    doubts = [approximate(text) for text in _order_of(loader)]
    hidden = hidden_sources(loader)
    if hidden:
        doubts.append(
            approximate(
                f"{', '.join(hidden)}, which is not saved: draw from a global generator, or give its owner "
                "state_dict and load_state_dict"
            )
        )
    return doubts


def _order_of(loader: "DataLoader[Any]") -> Iterator[str]:
    """Yield descriptions of what decides the order of a loader's batches and may not be restored."""
    if not gives_its_sampler_order(loader):
        yield (
            f"{name_of(loader)} overrides __iter__, whose state is not saved: give it state_dict and "
            "load_state_dict"
        )
    if isinstance(loader.dataset, IterableDataset):
        if not is_stateful(loader.dataset):
            yield f"the state of {name_of(loader.dataset)} is not saved: give it state_dict and load_state_dict"
        return
    sampler = unwrapped(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    while sampler is not None and not is_stateful(sampler):
        if not _is_known(sampler) and not hasattr(sampler, "set_epoch"):
            yield (
                f"the state of {name_of(sampler)} is not saved: give it state_dict and load_state_dict, or set_epoch"
            )
            return
        sampler = getattr(sampler, "sampler", None)


def _is_known(sampler: Any) -> bool:
    return is_torchs_sampler(sampler) or type(sampler).__module__.startswith("torchdata.")


def is_torchs_sampler(sampler: Any) -> bool:
    """Return whether a sampler draws from global generators at most when its first item is asked for."""
    return getattr(type(sampler), "__iter__", None) in _KNOWN_SAMPLERS


def is_sequence(loader: Any) -> bool:
    """Return whether this is a list or tuple of batches, whose order never changes."""
    return getattr(type(unwrapped(loader)), "__iter__", None) in (list.__iter__, tuple.__iter__)


def is_stateful(part: Any) -> bool:
    """Return whether a part has `state_dict` and `load_state_dict`."""
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def restores_itself(loader: Any) -> bool:
    """Return whether the loader's own `state_dict` is the only or the best way to its position."""
    if not is_stateful(loader):
        return False
    if not gives_its_sampler_order(loader) or isinstance(loader.dataset, IterableDataset):
        return True
    return loader.num_workers > 0 and is_stateful(loader.dataset)


def gives_its_sampler_order(loader: Any) -> bool:
    """Return whether this is a DataLoader with the order of its sampler: its iterator is torch's or torchdata's."""
    if not isinstance(loader, DataLoader):
        return False
    return type(loader).__iter__ is DataLoader.__iter__ or type(loader).__module__.startswith("torchdata.")


def draws_nothing(loader: Any) -> bool:
    """Return whether loading samples draws no random numbers: tensors, collated by torch."""
    # All its draws are seeded.
    if isinstance(getattr(loader, "dataset", None), SeededDataset):
        return True
    if getattr(loader, "collate_fn", None) is not default_collate or users_init_fn(loader) is not None:
        return False
    leaves = [each for each in datasets_of(loader) if type(each) is not Subset]
    return all(type(each) in (TensorDataset, list, tuple) for each in leaves)


# Comparison with the interrupted run ----------------------------------------------------------------------------


def describe(loader: Iterable[Any]) -> dict[str, Any]:
    """Return plain values of a loader that must be the same for a run to continue in its order."""
    described: dict[str, Any] = {"loader": name_of(loader), "batches": length_of(loader)}
    loader = unwrapped(loader)
    if isinstance(loader, DataLoader):
        described["data set"] = name_of(unwrapped(loader.dataset))
        described["samplers"] = ", ".join(name_of(each) for each in samplers_of(loader))
        # With seeded samples the number of workers does not matter.
        if not isinstance(loader.dataset, SeededDataset):
            described["num_workers"] = loader.num_workers
            described["persistent_workers"] = loader.persistent_workers
        for part in (*samplers_of(loader), *datasets_of(loader)):
            chosen = _fingerprint(part)
            if chosen is not None:
                described.setdefault("samples chosen by " + name_of(part), chosen)
    return described


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Doubt]:
    """Return the differences between two descriptions of a loader, as doubts."""
    doubts = []
    for key, value in before.items():
        here = now.get(key)
        if key in now and here != value:
            text = (
                f"{key} are others than before: is the split seeded?"
                if key.startswith("samples chosen")
                else f"{key} was {value}, now it is {here}"
            )
            doubts.append(approximate(text))
    return doubts


def _fingerprint(part: Any) -> int | None:
    """Return a checksum of the indices or weights by which torch's classes choose samples; None without any."""
    if isinstance(part, Subset | SubsetRandomSampler):
        chosen: Any = part.indices
    elif isinstance(part, WeightedRandomSampler):
        chosen = part.weights
    else:
        return None
    try:
        values = torch.as_tensor(chosen)
        return zlib.crc32(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    except (TypeError, ValueError, RuntimeError):
        # Indices of another kind, such as names.
        return None


class Counters:
    """Numbers in attributes of a loader's parts that change during a run."""

    def __init__(self, loader: Iterable[Any]) -> None:
        """Record the current numbers."""
        self._before = _numbers(loader)

    def changed(self, loader: Iterable[Any]) -> dict[str, float]:
        """Return the numbers that have changed."""
        return {name: value for name, value in _numbers(loader).items() if self._before.get(name) != value}


def counter_doubts(loader: Iterable[Any], saved: Mapping[str, float]) -> list[Doubt]:
    """Return a doubt for every number that changed during the run and differs from the checkpoint's."""
    numbers = _numbers(loader)
    return [
        approximate(
            f"{name} was {value}, now it is {numbers.get(name, 'not set')}: give its owner state_dict and "
            "load_state_dict"
        )
        for name, value in saved.items()
        if numbers.get(name) != value
    ]


def _numbers(loader: Iterable[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in unsaved_parts(loader):
        for name, value in (*_defaults(type(part)), *_attributes(part)):
            if checks.is_number(value):
                found[f"{name_of(part)}.{name}"] = value
    return found


# Generators and iterators ----------------------------------------------------------------------------


def hidden_sources(loader: Iterable[Any]) -> list[str]:
    """Return descriptions of the random generators and iterators behind a loader whose state is not saved.

    Follows attributes, containers, closures and the globals that methods refer to, within limits. Anything deeper,
    or in code that is not Python, is not found.
    """
    parts = [*samplers_of(loader), *datasets_of(loader)]
    answered = [*generators_of(loader).values(), *(each for each in parts if is_stateful(each))]
    saved = {id(each) for each in answered} | global_generators()
    seen: set[int] = set()
    found: list[str] = []
    waiting: list[tuple[str, str, Any]] = [(name_of(part), "", part) for part in unsaved_parts(loader)]
    while waiting and len(seen) < _MOST_OBJECTS:
        owner, name, value = waiting.pop(0)
        if id(value) in seen or id(value) in saved:
            continue
        seen.add(id(value))
        kind = "a generator" if isinstance(value, generator_kinds()) else ""
        if isinstance(value, types.GeneratorType | itertools.count | itertools.cycle):
            kind = "an iterator"
        if kind:
            found.append(f"{owner} has {kind} ({name})")
        else:
            waiting.extend(_within(owner, name, value))
    return list(dict.fromkeys(found))


def _within(owner: str, name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the objects that an object refers to: owner, name there, and object."""
    if isinstance(value, torch.Tensor | str | bytes | int | float | type | types.ModuleType | None):
        return
    if isinstance(value, list | tuple | set | frozenset | dict):
        items = value.values() if isinstance(value, dict) else value
        for item in itertools.islice(items, _MOST_ITEMS):
            yield owner, name, item
    elif isinstance(value, functools.partial):
        for item in (value.func, *value.args, *value.keywords.values()):
            yield owner, name, item
    elif isinstance(value, types.MethodType):
        yield owner, name, value.__self__
        yield owner, name, value.__func__
    elif isinstance(value, types.FunctionType):
        for inner, item in referred_to(value):
            yield owner if name else value.__name__, inner, item
    elif isinstance(value, staticmethod | classmethod | property):
        yield owner, name, value.fget if isinstance(value, property) else value.__func__
    elif _package(type(value)) not in _ELSEWHERE:
        yield from ((name_of(value), inner, item) for inner, item in _attributes(value))
        for kind in type(value).__mro__:
            if _package(kind) not in _LIBRARIES | _ELSEWHERE:
                yield from ((name_of(value), inner, item) for inner, item in vars(kind).items())


def closure_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables of a function's closure, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            # The cell is empty.
            continue


def referred_to(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the objects that a function refers to: its closure, its defaults, and the globals in its code."""
    yield from closure_of(function)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield function.__name__, value
    if _package(function) in _LIBRARIES | _ELSEWHERE:
        return
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        waiting.extend(each for each in code.co_consts if isinstance(each, types.CodeType))
        for name in code.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]


def _package(part: Any) -> str:
    return (getattr(part, "__module__", None) or "").partition(".")[0]


def _attributes(part: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(part, "__dict__", {}).items())


def _defaults(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a class, which are values of an object until it sets its own."""
    for each in reversed(kind.__mro__):
        if _package(each) not in _LIBRARIES | _ELSEWHERE:
            yield from ((name, value) for name, value in vars(each).items() if not name.startswith("__"))


def unsaved_parts(loader: Any) -> Iterator[Any]:
    """Yield the parts of a DataLoader whose attributes no called `state_dict` covers."""
    loader = unwrapped(loader)
    if not isinstance(loader, DataLoader):
        return
    for sampler in samplers_of(loader):
        if is_stateful(sampler):
            # It covers the samplers that it draws from, too.
            break
        yield sampler
    for dataset in datasets_of(loader):
        if is_stateful(dataset):
            break
        yield dataset
    yield loader.dataset.collate if isinstance(loader.dataset, SeededDataset) else loader.collate_fn


def generators_of(loader: Any) -> dict[str, torch.Generator]:
    """Return the loader's own generators that are saved, by their places; a shared one only once."""
    found: dict[str, torch.Generator] = {}
    for place, part in parts_by_place(loader).items():
        generator = None if place == "dataset" else getattr(part, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found.values()):
            found[place] = generator
    return found


def generator_kinds() -> tuple[type, ...]:
    """Return the classes of random generators."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator)
    return kinds
