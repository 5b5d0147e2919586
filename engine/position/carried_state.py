"""State that a run carries from step to step outside of what its checkpoints hold.

A trainer, a loss, a module of the model, a wrapped optimizer or a callback may keep anything in its attributes: a
hidden state, a generator, a counter, a second model. What of it a checkpoint lacks is lost at a resume, so the
attributes are compared between the start of the run and each checkpoint, and those that have changed and are in no
`state_dict` are named. Nothing is looked at in between.

    changes are seen in      tensors and numpy arrays, generators, iterators, modules and optimizers that are no part
                             of the run, containers of these; numbers and texts, where the class is the user's own
    not looked at            parameters, buffers and whatever else the checkpoint holds; loaders, samplers and data
                             sets, which `loader_position.py` judges; offloop's own objects
    seen also where they     generators in closures and global variables that methods refer to; tensors and generators
    are no attributes        in the closure or the bound arguments of a loss that is a function
    not seen                 what else is in closures and global variables, objects without a `__dict__`

An object with a `state_dict` of its own decides itself which numbers are state. Tensors and generators that its
`state_dict` leaves out are still named.
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

from offloop.engine.position.loader_doubts import closure_of, referred_to

MAX_DEPTH: Final = 4
"""Objects inside objects that are looked into; a hidden state is seldom deeper than a list in a helper object."""
MAX_NODES: Final = 20_000
"""Values looked at in one attribute. Arbitrary: enough for a list of losses, little beside a checkpoint's copy."""
SAMPLED: Final = 64
"""Numbers of a tensor that are compared where torch has not counted a change, as of `parameter.data.mul_()`."""

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS: Final = (list, tuple, set, frozenset, deque)
_OPAQUE: Final = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    DataLoader,
    Dataset,
    Sampler,
    io.IOBase,
)


@dataclass(frozen=True)
class Owner:
    """An object whose attributes are looked at."""

    name: str
    """How it is called in a report: `Language`, `model.encoder`."""
    target: Any
    hint: str
    """What its author can do about a state that is not saved."""
    skipped: frozenset[str] = frozenset()
    """Attributes that are known, or no state."""
    counts_plain: bool = True
    """Whether changed numbers and texts are state; False where the class has a `state_dict` of its own."""
    saved: tuple[str, ...] = ()
    """The path in the checkpoint's state to what its own `state_dict` has returned."""


def owner_of_module(name: str, module: torch.nn.Module, saved: tuple[str, ...] = ()) -> Owner:
    """Return how a module of the model or of the loss is looked at."""
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
    """Yield the modules in it that may hold more than parameters and buffers; torch's own do not.

    Args:
        name: How the module is called in a report.
        module: The model or the loss.
        saved_in: The key of its state dict in a checkpoint's state.
    """
    for path, each in module.named_modules():
        if type(each).__module__.partition(".")[0] != "torch":
            extra = f"{path}._extra_state" if path else "_extra_state"
            yield owner_of_module(f"{name}.{path}" if path else name, each, (saved_in, extra))


def owner_of_optimizer(name: str, optimizer: torch.optim.Optimizer) -> Owner:
    """Return how an optimizer, which may wrap another one, is looked at."""
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
    """Compares what objects hold at a checkpoint with what they held when the run began. Training thread only."""

    def __init__(self, owners: Iterable[Owner], known: Iterable[Any]) -> None:
        """Remember how things are now. Keeps no tensor alive.

        Args:
            owners: What is looked at.
            known: Modules, optimizers, schedules and generators that the checkpoint holds by itself.
        """
        self._owners = [(owner, _state_beside(owner.target)) for owner in owners]
        self._known = list(known)
        self._before: dict[tuple[str, str], _Contents] = {
            (owner.name, name): contents.without_values() for owner, name, contents in self._look()
        }
        self._named: dict[tuple[str, str], str] = {}

    def unsaved(self, state: Mapping[str, Any]) -> list[str]:
        """Return what has changed since the start and is not in `state`, each as a sentence.

        Args:
            state: Of a checkpoint, with live tensors.
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
                if type(value) in _PLAIN:  # most are: the short way
                    if owner.counts_plain:
                        yield owner, name, _Contents([_plain_mark(value)])
                    continue
                try:
                    contents = walk.through(value, is_plain_counted=owner.counts_plain)
                except (
                    Exception
                ):  # the user's object, maybe changed by another thread: no reason to end a run
                    continue
                if contents.plain or contents.heavy:
                    yield owner, name, contents


def _state_beside(target: Any) -> dict[str, Any]:
    """Return the tensors and generators that belong to an object and are none of its attributes.

    Those on a class of the user's, generators that its methods refer to, and what a function holds.
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
    """Return a number or text as it is compared: NaN equals itself."""
    return repr(value) if isinstance(value, float) else value


# What an attribute holds ---------------------------------------------------------------------------


class _Heavy(NamedTuple):
    """A tensor, an array, a generator or an iterator."""

    mark: object
    value: Any


@dataclass
class _Contents:
    """What was found in one attribute."""

    plain: list[object] = field(default_factory=list)
    """Numbers, texts and lengths, in order."""
    heavy: list[_Heavy] = field(default_factory=list)

    def without_values(self) -> "_Contents":
        """Return what is compared later, without what would keep a tensor alive."""
        return _Contents(self.plain, [_Heavy(each.mark, None) for each in self.heavy])

    def differs(self, other: "_Contents", *, with_plain: bool) -> bool:
        """Tell whether the state is another one."""
        if with_plain and self.plain != other.plain:
            return True
        return [each.mark for each in self.heavy] != [each.mark for each in other.heavy]


_NOTHING: Final = _Contents()


class TensorMark:
    """Tells a tensor, with its content, from another one; does not keep it alive."""

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

    __hash__ = None  # type: ignore[assignment]  # it is compared, never looked up


def _sample(tensor: torch.Tensor) -> bytes:
    """Return some of a tensor's numbers as bytes. Waits for its device."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel() or tensor.is_nested:
        return b""
    with torch.no_grad():
        flat = tensor.detach().as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor[:1]
        some = flat.reshape(-1)[:: max(1, flat.numel() // SAMPLED)]
        return repr(some.tolist()).encode()


def _array_mark(array: Any) -> object:
    """Likewise for a numpy array, which counts no changes: all of its bytes, up to a megabyte."""
    some = array if array.nbytes <= 2**20 else array.reshape(-1)[:: max(1, array.size // 2**12)]
    return id(array), array.shape, zlib.crc32(some.tobytes())


def _generator_state(generator: Any) -> object:
    """Return a generator's state as something that can be compared."""
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
    """What a checkpoint holds by itself, as of now."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self._modules = [each for each in objects if isinstance(each, torch.nn.Module)]
        self._ids = {id(part) for module in self._modules for part in module.modules()}
        self._ids |= {id(each) for each in objects}
        self._ids |= {id(torch.default_generator), id(getattr(random, "_inst", None))}
        if "numpy" in sys.modules:
            self._ids.add(id(getattr(sys.modules["numpy"].random.mtrand, "_rand", None)))

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
    """Return what tensors in the same memory have in common."""
    try:
        return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # sparse, uninitialized: no storage
        return id(tensor)


class _Walk:
    """Goes through attributes and notes what it finds, each object once: a shared one counts where it is met first."""

    def __init__(self, known: _Known, roots: Iterable[Any]) -> None:
        self._known = known
        self._seen = {id(root) for root in roots}
        self._contents = _Contents()
        self._nodes = 0

    def through(self, value: Any, *, is_plain_counted: bool) -> _Contents:
        """Return what is in one attribute."""
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
            contents.heavy.append(_Heavy(_array_mark(value), value))
        else:
            for each, is_counted in self._inside(value, is_plain_counted):
                self._into(each, is_plain_counted=is_counted, depth=depth + 1)

    def _inside(self, value: Any, is_plain_counted: bool) -> Iterator[tuple[Any, bool]]:
        """Yield what is in a value, each with whether numbers and texts in it count."""
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
            # Where it stands cannot be read.
            self._contents.heavy.append(_Heavy(object(), None))
        elif not _is_of_offloop(type(value)):
            counts = is_of_user(type(value))
            yield from ((each, counts) for each in list(getattr(value, "__dict__", {}).values()))


# Whose a class is ----------------------------------------------------------------------------------


_MODULE_ATTRIBUTES: Final = frozenset(vars(torch.nn.Module()))
"""What each module has. `training` is saved with the modes of the model."""
# Not read off an optimizer: the first one that is made imports torch._dynamo, which takes seconds.
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
    """True for a class of the user's program; False for one of an installed library, of Python or of offloop."""
    return _is_users_package(cls.__module__.partition(".")[0])


@functools.cache
def _is_users_package(name: str) -> bool:
    if name in sys.stdlib_module_names or name == "offloop":
        return False
    file: str | None = getattr(sys.modules.get(name), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)


def _is_of_offloop(cls: type) -> bool:
    """True for our classes and those derived from them: the trainer and callbacks are looked at by themselves."""
    return any(each.__module__.startswith("offloop.") for each in cls.__mro__)


# What a checkpoint holds ---------------------------------------------------------------------------


class _Saved:
    """The content of a checkpoint's state, to find things in."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._memory = {_memory(each) for each in _leaves(state) if isinstance(each, torch.Tensor)}

    def has(self, owner: Owner, name: str, contents: _Contents, *, plain_changed: bool) -> bool:
        """Tell whether an attribute's state is in it: under its name, in the same memory or with the same value."""
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
