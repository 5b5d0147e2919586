"""State that a run carries from step to step and that its checkpoints do not hold.

A trainer, a loss, a module of the model, a wrapped optimizer or a callback may keep state in its attributes: a hidden
state, a generator, a counter, a second model. A resume loses what the checkpoint lacks. Each checkpoint therefore
compares the attributes with those at the start of the run, and names each that has changed and is in no `state_dict`.
Between checkpoints nothing is read.

    detected in attributes    changes of tensors, numpy arrays, generators, iterators, modules and optimizers that are
                              not the run's, and containers of these; of numbers and strings in classes of the user
    detected elsewhere        generators in closures and globals that methods refer to; tensors and generators in the
                              closure or the bound arguments of a loss that is a function
    skipped                   parameters, buffers and everything else in the checkpoint; loaders, samplers and data
                              sets (see `loader_doubts.py` and `loader_contents.py`); offloop's objects
    not detected              other values in closures and globals, objects without a `__dict__`

An object with a `state_dict` decides which of its numbers are state. Tensors and generators that its `state_dict`
lacks are named all the same.
"""

import functools
import io
import random
import sys
import sysconfig
import types
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from offloop.engine.data.random_state import global_generators
from offloop.engine.position.loader_doubts import closure_of, referred_to

MAX_DEPTH: Final = 4
"""Depth of nested objects; a hidden state is rarely deeper than a list in a helper object."""
MAX_NODES: Final = 20_000
"""Limit of values in one attribute. Arbitrary: enough for a list of losses, cheap compared with a checkpoint's copy."""
SAMPLED: Final = 64
"""Numbers of a tensor to compare, because torch does not count changes like `parameter.data.mul_()`."""

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS: Final = (list, tuple, set, frozenset, deque)
_OPAQUE: Final = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
    *(DataLoader, Dataset, Sampler, io.IOBase),
)


@dataclass(frozen=True)
class Owner:
    """An object whose attributes are compared."""

    name: str
    """Its name in reports: `Language`, `model.encoder`."""
    target: Any
    hint: str
    """Advice for state that is not saved."""
    skipped: frozenset[str] = frozenset()
    """Attributes that are saved already, or hold no state."""
    counts_plain: bool = True
    """Whether changed numbers and strings are state; False if the class defines `state_dict`."""
    saved: tuple[str, ...] = ()
    """Path in the checkpoint's state to the result of its `state_dict`."""


def owner_of_module(name: str, module: torch.nn.Module, saved: tuple[str, ...] = ()) -> Owner:
    """Return the owner for a module of the model or of the loss."""
    return Owner(
        name,
        module,
        hint="make it a buffer (register_buffer), or return it from get_extra_state()",
        skipped=_MODULE_ATTRIBUTES,
        counts_plain=is_of_user(type(module))
        and type(module).get_extra_state is torch.nn.Module.get_extra_state,
        saved=saved,
    )


def owners_in_module(name: str, module: torch.nn.Module, saved_in: str) -> Iterator[Owner]:
    """Yield owners for the modules inside that may hold more than parameters and buffers, as torch's own do not.

    Args:
        name: The module's name in reports.
        module: The model or the loss.
        saved_in: The key of its state dict in a checkpoint's state.
    """
    for path, each in module.named_modules():
        if type(each).__module__.partition(".")[0] != "torch":
            extra = f"{path}._extra_state" if path else "_extra_state"
            yield owner_of_module(f"{name}.{path}" if path else name, each, (saved_in, extra))


def owner_of_optimizer(name: str, optimizer: torch.optim.Optimizer) -> Owner:
    """Return the owner for an optimizer, which may wrap another one."""
    is_own = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
    return Owner(
        type(optimizer).__name__,
        optimizer,
        hint="return it from the optimizer's state_dict()",
        skipped=_OPTIMIZER_ATTRIBUTES,
        counts_plain=is_of_user(type(optimizer)) and not is_own,
        saved=("optimizers", name),
    )


class CarriedState:
    """Compares the attributes of objects at a checkpoint with those at the run's start. Training thread only."""

    def __init__(self, owners: Iterable[Owner], known: Iterable[Any]) -> None:
        """Record the current values. Keeps no tensor alive.

        Args:
            owners: The objects to compare.
            known: Modules, optimizers, schedules and generators that the checkpoint holds anyway.
        """
        self._owners = [(owner, _state_outside_attributes(owner.target)) for owner in owners]
        self._known = list(known)
        self._before: dict[tuple[str, str], _Contents] = {
            (owner.name, name): contents.without_values() for owner, name, contents in self._look()
        }
        self._named: dict[tuple[str, str], str] = {}

    def unsaved(self, state: Mapping[str, Any]) -> list[str]:
        """Return sentences about attributes that have changed since the start and are not in `state`.

        Args:
            state: The state of a checkpoint, with live tensors.
        """
        held: _Saved | None = None
        for owner, name, contents in self._look(skipped=self._named):
            key = owner.name, name
            before = self._before.get(key, _NOTHING)
            if not contents.differs(before, with_plain=owner.counts_plain):
                continue
            held = held or _Saved(state)
            if not held.has(owner, name, contents, plain_changed=contents.plain != before.plain):
                self._named[key] = f"{owner.name}.{name} is not saved: {owner.hint}"
        return list(self._named.values())

    def _look(
        self, skipped: Mapping[tuple[str, str], str] = types.MappingProxyType({})
    ) -> Iterator[tuple[Owner, str, "_Contents"]]:
        walk = _Walk(_Known(self._known), [owner.target for owner, _ in self._owners])
        for owner, of_class in self._owners:
            for name, value in (of_class | getattr(owner.target, "__dict__", {})).items():
                if name in owner.skipped or (owner.name, name) in skipped:
                    continue
                # The common case, without a walk.
                if type(value) in _PLAIN:
                    if owner.counts_plain:
                        yield owner, name, _Contents([_plain_mark(value)])
                    continue
                try:
                    contents = walk.through(value, is_plain_counted=owner.counts_plain)
                # A user's object may raise anything, or be changed by another thread. That must not end a run.
                except Exception:
                    continue
                if contents.plain or contents.heavy:
                    yield owner, name, contents


def _state_outside_attributes(target: Any) -> dict[str, Any]:
    """Return the tensors and generators of an object that are not in its `__dict__`.

    They are attributes of its class, generators that its methods refer to, or what a function holds.
    """
    if isinstance(target, types.FunctionType | types.MethodType | functools.partial):
        return _state_of_function(target)
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for each in reversed(type(target).__mro__):
        if is_of_user(each):
            for name, value in vars(each).items():
                if isinstance(value, torch.Tensor) or _is_generator(value):
                    found[name] = value
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                found |= _generators_behind(function, seen)
    return found


def _state_of_function(function: Any) -> dict[str, Any]:
    """Return tensors and generators in a function's closure and bound arguments, and generators it refers to."""
    if isinstance(function, types.MethodType):
        return _generators_behind(function.__func__, set())
    if isinstance(function, functools.partial):
        bound = {f"argument {number}": value for number, value in enumerate(function.args)}
        held, inner = bound | function.keywords, function.func
        found = _state_of_function(inner)
    elif isinstance(function, types.FunctionType):
        held, found = dict(closure_of(function)), _generators_behind(function, set())
    else:
        return {}
    return found | {
        name: value for name, value in held.items() if isinstance(value, torch.Tensor) or _is_generator(value)
    }


def _generators_behind(function: Any, seen: set[int], depth: int = 0) -> dict[str, Any]:
    """Return the generators that a function, or one that it refers to, takes from closures and global variables."""
    found: dict[str, Any] = {}
    if not isinstance(function, types.FunctionType) or id(function) in seen or depth > MAX_DEPTH:
        return found
    seen.add(id(function))
    for name, value in referred_to(function):
        if _is_generator(value):
            found[name] = value
        elif isinstance(value, types.FunctionType) and _is_users_package(value.__module__.partition(".")[0]):
            found |= _generators_behind(value, seen, depth + 1)
    return found


def _plain_mark(value: Any) -> Any:
    """Return a number or string for comparison, in which NaN equals itself."""
    return repr(value) if isinstance(value, float) else value


# What an attribute holds ---------------------------------------------------------------------------


class _Heavy(NamedTuple):
    """A tensor, an array, a generator or an iterator."""

    mark: object
    value: Any


@dataclass
class _Contents:
    """The content of one attribute."""

    plain: list[object] = field(default_factory=list)
    """Numbers, strings and lengths, in order."""
    heavy: list[_Heavy] = field(default_factory=list)

    def without_values(self) -> "_Contents":
        """Return the marks without values, which would keep tensors alive."""
        return _Contents(self.plain, [_Heavy(each.mark, None) for each in self.heavy])

    def differs(self, other: "_Contents", *, with_plain: bool) -> bool:
        """Return whether the content differs."""
        if with_plain and self.plain != other.plain:
            return True
        return [each.mark for each in self.heavy] != [each.mark for each in other.heavy]


_NOTHING: Final = _Contents()


class TensorMark:
    """Compares a tensor and its content with a later one, without keeping it alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = 0 if tensor.is_inference() else tensor._version
        self._sample = _sample(tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorMark):
            return False
        mine, theirs = self._tensor(), other._tensor()
        return (
            mine is not None
            and mine is theirs
            and self._version == other._version
            and self._sample == other._sample
        )

    __hash__ = None  # type: ignore[assignment]  # compared, never hashed


def _sample(tensor: torch.Tensor) -> bytes:
    """Return some of a tensor's numbers as bytes. Waits for its device."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel() or tensor.is_nested:
        return b""
    with torch.no_grad():
        flat = tensor.detach().as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor[:1]
        some = flat.reshape(-1)[:: max(1, flat.numel() // SAMPLED)]
        return repr(some.tolist()).encode()


def array_mark(array: Any) -> object:
    """Return a mark of a numpy array, which counts no changes: a checksum of up to a megabyte."""
    some = array if array.nbytes <= 2**20 else array.reshape(-1)[:: max(1, array.size // 2**12)]
    return id(array), array.shape, zlib.crc32(some.tobytes())


def _generator_state(generator: Any) -> object:
    """Return a generator's state in a form that can be compared."""
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    if isinstance(generator, random.Random):
        return generator.getstate()
    inner = getattr(generator, "bit_generator", None)
    return repr(inner.state if inner is not None else generator.get_state(legacy=False))


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


class _Known:
    """The objects that a checkpoint holds anyway."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self._modules = [each for each in objects if isinstance(each, torch.nn.Module)]
        self._ids = {id(part) for module in self._modules for part in module.modules()}
        self._ids |= {id(each) for each in objects}
        self._ids |= global_generators()

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._ids or (isinstance(value, torch.Tensor) and _memory(value) in self._memory)

    @functools.cached_property
    def _memory(self) -> set[object]:
        return {
            _memory(tensor)
            for module in self._modules
            for tensor in (*module.parameters(), *module.buffers())
        }


def _memory(tensor: torch.Tensor) -> object:
    """Return a key that tensors in the same memory share."""
    try:
        return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)
    # Sparse and uninitialized tensors have no storage.
    except (RuntimeError, NotImplementedError):
        return id(tensor)


class _Walk:
    """Walks through attributes and collects their contents. A shared object counts only where it is first met."""

    def __init__(self, known: _Known, roots: Iterable[Any]) -> None:
        self._known = known
        self._seen = {id(root) for root in roots}
        self._contents = _Contents()
        self._nodes = 0

    def through(self, value: Any, *, is_plain_counted: bool) -> _Contents:
        """Return the content of one attribute."""
        self._contents, self._nodes = _Contents(), 0
        self._into(value, is_plain_counted=is_plain_counted, depth=0)
        return self._contents

    def _into(self, value: Any, *, is_plain_counted: bool, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            return
        contents = self._contents
        if isinstance(value, _PLAIN):
            if is_plain_counted:
                contents.plain.append(_plain_mark(value))
            return
        if isinstance(value, _OPAQUE) or value in self._known or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            contents.heavy.append(_Heavy(TensorMark(value), value))
        elif _is_generator(value):
            contents.heavy.append(_Heavy(_generator_state(value), value))
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            contents.heavy.append(_Heavy(array_mark(value), value))
        else:
            for each, is_counted in self._inside(value, is_plain_counted):
                self._into(each, is_plain_counted=is_counted, depth=depth + 1)

    def _inside(self, value: Any, is_plain_counted: bool) -> Iterator[tuple[Any, bool]]:
        """Yield the values inside a value, with True if numbers and strings in them count."""
        if isinstance(value, Mapping):
            for key, each in list(value.items()):
                yield key, is_plain_counted
                yield each, is_plain_counted
        elif isinstance(value, _CONTAINERS):
            yield len(value), is_plain_counted
            for each in list(value):
                yield each, is_plain_counted
        elif isinstance(value, functools.partial):
            yield from ((each, is_plain_counted) for each in (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield value.__self__, is_plain_counted
        elif isinstance(value, torch.nn.Module):
            for module in value.modules():
                yield from ((each, False) for each in [*module.parameters(False), *module.buffers(False)])
                if type(module).__module__.partition(".")[0] != "torch":
                    for name, each in list(vars(module).items()):
                        if name not in _MODULE_ATTRIBUTES:
                            yield each, is_of_user(type(module))
        elif isinstance(value, torch.optim.Optimizer):
            yield from ((each, True) for each in list(value.state.values()))
            for group in value.param_groups:
                yield from ((each, True) for name, each in group.items() if name != "params")
        elif isinstance(value, LRScheduler):
            yield from ((each, True) for name, each in list(vars(value).items()) if name != "optimizer")
        elif hasattr(type(value), "__next__"):
            # The position of an iterator cannot be read, so it always counts as changed.
            self._contents.heavy.append(_Heavy(object(), None))
        elif not _is_of_offloop(type(value)):
            counts = is_of_user(type(value))
            yield from ((each, counts) for each in list(getattr(value, "__dict__", {}).values()))


# Origin of a class ----------------------------------------------------------------------------------


_MODULE_ATTRIBUTES: Final = frozenset(vars(torch.nn.Module()))
"""Attributes that every module has. `training` is saved with the modes of the model."""
# A list, because creating a first optimizer to ask imports torch._dynamo, which takes seconds.
_OPTIMIZER_ATTRIBUTES: Final = frozenset(
    {
        *("defaults", "state", "param_groups", "step", "_opt_called", "_zero_grad_profile_name"),
        *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    }
)
_INSTALLED: Final = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def is_of_user(cls: type) -> bool:
    """Return whether a class belongs to the user's program, not to a library, Python or offloop."""
    return _is_users_package(cls.__module__.partition(".")[0])


@functools.cache
def _is_users_package(name: str) -> bool:
    if name in sys.stdlib_module_names or name == "offloop":
        return False
    file: str | None = getattr(sys.modules.get(name), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)


def _is_of_offloop(cls: type) -> bool:
    """Return whether a class is or derives from one of offloop's; trainer and callbacks are owners themselves."""
    return any(each.__module__.startswith("offloop.") for each in cls.__mro__)


# What a checkpoint holds ---------------------------------------------------------------------------


class _Saved:
    """A checkpoint's state, to search for contents of attributes."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._memory = {_memory(each) for each in _leaves(state) if isinstance(each, torch.Tensor)}

    def has(self, owner: Owner, name: str, contents: _Contents, *, plain_changed: bool) -> bool:
        """Return whether it holds an attribute's state: under its name, in the same memory or with the same value."""
        own = self._own(owner)
        bare = name.lstrip("_")
        keys = [key.lstrip("_") for key in own if isinstance(key, str)]
        if bare in keys or any(key.startswith((f"{bare}_", f"{bare}.")) for key in keys):
            return True
        if f"{owner.name}.{name}" in self._state.get("trainer", {}):
            return True
        if owner.counts_plain and plain_changed:
            return False
        others = [*_leaves(own), *_leaves(self._state.get("loader"))]
        return all(self._has(each.value, others) for each in contents.heavy)

    def _own(self, owner: Owner) -> Mapping[Any, Any]:
        found: Any = self._state if owner.saved else {}
        for key in owner.saved:
            found = found.get(key, {}) if isinstance(found, Mapping) else {}
        return found if isinstance(found, Mapping) else {"": found}

    def _has(self, value: Any, others: list[Any]) -> bool:
        if isinstance(value, torch.Tensor):
            return _memory(value) in self._memory or any(_is_same(value, each) for each in others)
        if isinstance(value, torch.Generator):
            return any(_is_same(value.get_state(), each) for each in others)
        return False


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _is_same(tensor: torch.Tensor, other: Any) -> bool:
    if not isinstance(other, torch.Tensor) or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(tensor.detach().cpu(), other.detach().cpu())
