"""Attributes of samplers, data sets and collate functions, compared between a run's start, checkpoints and a resume.

A curriculum, an order that is shuffled in place, weights that follow the losses or a cache of augmented samples are
state that no `state_dict` covers. At every checkpoint, attributes are compared with those when the run first read the
loader. Checksums of the changed ones are saved, and a resume names those that differ. Nothing happens between
checkpoints.

    changes are seen in      tensors and numpy arrays, numbers, strings, the length and items of containers, and these
                             within objects of the user's classes, partial functions and closures
    not seen                 global variables, memory maps, objects of libraries, values beyond the limits, state in
                             workers
"""

import functools
import itertools
import sys
import types
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from offloop.engine import checks
from offloop.engine.data.loader_parts import name_of
from offloop.engine.position.carried_state import TensorMark, array_mark, is_of_user
from offloop.engine.position.exactness import Doubt, approximate
from offloop.engine.position.loader_doubts import closure_of, unsaved_parts

_MAX_DEPTH: Final = 4
_MAX_VALUES: Final = 2_000
"""Limit of values compared in one attribute, which may be a list of a million file names."""
_MAX_ITEMS: Final = 1_000
"""Limit of items compared in one list, evenly spread."""
_PLAIN: Final = (bool, int, float, complex, str, bytes)
_JUDGED_ELSEWHERE: Final = (type, types.ModuleType, DataLoader, Dataset, Sampler, torch.Generator)


class Contents:
    """The attributes of a loader's parts. Training thread only."""

    def __init__(self, loader: Iterable[Any]) -> None:
        """Record the current values. Keeps no tensor alive."""
        self._before = {name: _marks(leaves) for name, leaves in _held(loader)}

    def changed(self, loader: Iterable[Any]) -> dict[str, int]:
        """Return the checksums of attributes that have changed, by name."""
        return {
            name: _checksum(leaves)
            for name, leaves in _held(loader)
            if self._before.get(name, []) != _marks(leaves)
        }


def content_doubts(loader: Iterable[Any], saved: Mapping[str, int]) -> list[Doubt]:
    """Return a doubt for every attribute that changed during the run and differs from the checkpoint's."""
    if not saved:
        return []
    now = {name: leaves for name, leaves in _held(loader) if name in saved}
    return [
        approximate(
            f"{name} has changed during the run and is not what it was: give its owner state_dict and load_state_dict"
        )
        for name, checksum in saved.items()
        if _checksum(now.get(name, [])) != checksum
    ]


def _held(loader: Iterable[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the values in attributes of the parts, by name; an object's own numbers are `Counters`."""
    names: set[str] = set()
    for part in unsaved_parts(loader):
        owner = _unique(getattr(part, "__name__", name_of(part)), names)
        if isinstance(part, types.FunctionType | types.MethodType | functools.partial):
            attributes = {"closure": part}
        else:
            attributes = _attributes(part)
        for name, value in attributes.items():
            if checks.is_number(value):
                continue
            try:
                leaves = list(itertools.islice(_leaves(value), _MAX_VALUES))
            # A user's object may raise anything, which must not end a run.
            except Exception:
                continue
            yield f"{owner}.{name}", leaves


def _unique(name: str, taken: set[str]) -> str:
    """Return the name, with a number if another part of the loader has the same."""
    found = next(each for number in itertools.count(1) if (each := f"{name} {number}") not in taken)
    taken.add(found)
    return name if found == f"{name} 1" else found


def _attributes(part: Any) -> dict[str, Any]:
    of_class = {
        name: value
        for kind in reversed(type(part).__mro__)
        if is_of_user(kind)
        for name, value in vars(kind).items()
        if not name.startswith("__") and isinstance(value, (*_PLAIN, list, dict, deque, torch.Tensor))
    }
    return of_class | getattr(part, "__dict__", {})


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the numbers, strings, tensors and arrays in a value, in order, and the lengths of containers."""
    if isinstance(value, (*_PLAIN, torch.Tensor)) or _is_array(value):
        yield value
    elif depth > _MAX_DEPTH or isinstance(value, _JUDGED_ELSEWHERE):
        return
    elif isinstance(value, list | tuple | deque):
        yield len(value)
        for item in itertools.islice(value, 0, None, max(1, len(value) // _MAX_ITEMS)):
            yield from _leaves(item, depth + 1)
    elif isinstance(value, Mapping):
        yield len(value)
        for key, item in itertools.islice(value.items(), _MAX_ITEMS):
            yield from _leaves(key, depth + 1)
            yield from _leaves(item, depth + 1)
    elif isinstance(value, set | frozenset):
        # The order of its items differs between processes.
        yield len(value)
    elif isinstance(value, functools.partial):
        for each in (value.func, value.args, value.keywords):
            yield from _leaves(each, depth + 1)
    elif isinstance(value, types.MethodType):
        yield from _leaves(value.__self__, depth + 1)
    elif isinstance(value, types.FunctionType):
        for _, inside in closure_of(value):
            yield from _leaves(inside, depth + 1)
    elif is_of_user(type(value)):
        for each in _attributes(value).values():
            yield from _leaves(each, depth + 1)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and not isinstance(value, numpy.memmap)


def _marks(leaves: Iterable[Any]) -> list[object]:
    """Return cheap marks, which differ if the values change."""
    return [_mark(each) for each in leaves]


def _mark(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return TensorMark(value)
    if isinstance(value, _PLAIN):
        # As text, NaN equals itself.
        return repr(value)
    return array_mark(value)


def _checksum(leaves: Iterable[Any]) -> int:
    """Return a checksum of values, whole tensors included."""
    checksum = 0
    for each in leaves:
        if isinstance(each, _PLAIN):
            content = repr(each).encode()
        elif isinstance(each, torch.Tensor):
            content = _bytes_of(each)
        else:
            content = repr(each.shape).encode() + each.tobytes()
        checksum = zlib.crc32(content, checksum)
    return checksum


def _bytes_of(tensor: torch.Tensor) -> bytes:
    shape = repr((tensor.dtype, tuple(tensor.shape))).encode()
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return shape
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return shape + flat.view(torch.uint8).numpy().tobytes() if flat.numel() else shape
