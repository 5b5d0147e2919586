"""Pickling of what another interpreter cannot import: classes and functions of a script, a notebook or a function.

`cloudpickle` does most of it. Added are:

- msgspec structs, which cloudpickle would rebuild without fields. A rebuilt event class is registered under the tag
  that it has here, so that its events can be decoded there.
- What `functools` makes of functions: `lru_cache`, `singledispatch`, `cached_property`. They hold locks or caches.
- Modules that are not on `sys.path`, as those of pytest and of `runpy.run_path`, go by value.
- Annotations of functions go as strings: `run: Run` must not make the other interpreter import torch.

Thread: any. Blocks while it pickles.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import cloudpickle
import msgspec
from cloudpickle.cloudpickle import (
    _is_registered_pickle_by_value,
    _lookup_module_and_qualname,
    list_registry_pickle_by_value,
)

from offloop.engine.callback import Callback
from offloop.engine.events import Event, event_class

_StructMeta: Final[type[type]] = type(msgspec.Struct)
_CONFIG: Final = (
    "frozen",
    "eq",
    "order",
    "array_like",
    "gc",
    "repr_omit_defaults",
    "omit_defaults",
    "forbid_unknown_fields",
    "weakref",
    "dict",
    "cache_hash",
)
"""Options of a struct that `__struct_config__` tells as they were given."""
_MADE_BY_PYTHON: Final = frozenset(
    "__dict__ __weakref__ __slots__ __module__ __qualname__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __orig_bases__ __parameters__ _abc_impl".split()
)
"""Entries of a class's namespace that are made anew, or are given when it is created."""

# cloudpickle's list of modules that go by value is global: one thread at a time adds to it.
_one_at_a_time = threading.RLock()
_unfinished: set[type] = set()
"""Structs that have been created and whose methods are still to come."""


class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles whatever another interpreter cannot import by value, the rest by reference.

    Use it inside `modules_by_value()`.
    """

    imports_late = False
    """Whether a module is imported there only when a function uses it."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how to rebuild `obj`; NotImplemented for the usual way."""
        if isinstance(obj, types.ModuleType):
            _go_by_value_unless_importable(obj.__name__)
            is_late = self.imports_late and not _is_registered_pickle_by_value(obj)
            # Python's own load fast, and may have been imported for a submodule.
            if is_late and obj.__name__.partition(".")[0] not in sys.stdlib_module_names:
                return _LateModule, (obj.__name__,)
            return NotImplemented
        if isinstance(obj, functools.cached_property):
            state = {name: value for name, value in vars(obj).items() if name != "lock"}
            return type(obj), (obj.func,), state
        if isinstance(obj, functools._lru_cache_wrapper):
            _go_by_value_unless_importable(obj.__module__)
            named = _lookup_module_and_qualname(obj)
            if named and not _is_registered_pickle_by_value(named[0]):
                return NotImplemented
            return _reduce_wrapper(obj, _cached, obj.cache_parameters())
        if isinstance(obj, typing.NewType):
            return typing.NewType, (obj.__name__, obj.__supertype__)
        if isinstance(obj, typing.ParamSpec | typing.TypeVarTuple):
            return type(obj), (obj.__name__,)
        if obj is dataclasses.MISSING:
            # Fields are compared with it by identity.
            return getattr, (dataclasses, "MISSING")
        if isinstance(obj, msgspec.Meta):
            return functools.partial(msgspec.Meta, **dict(obj.__rich_repr__())), ()
        if isinstance(obj, type | types.FunctionType):
            _go_by_value_unless_importable(obj.__module__)
        reduced = super().reducer_override(obj)
        if isinstance(obj, _StructMeta) and reduced is not NotImplemented:
            return _reduce_struct(obj)
        if isinstance(reduced, tuple):
            if isinstance(obj, types.FunctionType) and hasattr(obj, "dispatch") and hasattr(obj, "registry"):
                return _reduce_wrapper(obj, functools.singledispatch, functions=dict(obj.registry))
            _adapt_annotations(obj, reduced)
        return reduced


class _LateModule(types.ModuleType):
    """A module that is imported when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def modules_by_value(*names: str) -> Iterator[None]:
    """Let modules go by value for a while: these, and those that cannot be imported elsewhere."""
    with _one_at_a_time:
        before = list_registry_pickle_by_value()
        try:
            for name in names:
                cloudpickle.register_pickle_by_value(sys.modules[name])
            yield
        finally:
            for name in list_registry_pickle_by_value() - before:
                if name in sys.modules:
                    cloudpickle.unregister_pickle_by_value(sys.modules[name])


def _go_by_value_unless_importable(name: str | None) -> None:
    module = sys.modules.get(name or "")
    # Only plain modules of Python files: extensions and objects in the place of modules, such as torch.ops, cannot go.
    if type(module) is not types.ModuleType or not os.path.isfile(getattr(module, "__file__", None) or ""):
        return
    if module.__name__ != "__main__" and not _is_importable(module.__name__.partition(".")[0]):
        cloudpickle.register_pickle_by_value(module)


def _is_importable(top: str) -> bool:
    """Return whether a fresh interpreter with the same `sys.path` finds a top-level module."""
    for finder in sys.meta_path:
        try:
            if finder.find_spec(top, None) is not None:
                return True
        except Exception:  # an own finder's trouble says nothing about the others
            continue
    return False


def _adapt_annotations(obj: Any, reduced: tuple[Any, ...]) -> None:
    """Change the annotations of a function or class in what cloudpickle made of it."""
    state = reduced[2] if len(reduced) > 2 else None
    if not isinstance(state, tuple) or len(state) != 2:
        return
    of_class, of_function = state
    if isinstance(obj, types.FunctionType):
        hints = of_function.get("__annotations__") or {}
        of_function["__annotations__"] = _as_text(hints)
    elif isinstance(of_class, dict) and of_class.get("__annotations__"):
        if issubclass(obj, Callback):
            of_class["__annotations__"] = _as_text(of_class["__annotations__"])
        elif any(hasattr(obj, mark) for mark in ("__dataclass_fields__", "_fields", "__total__")):
            # msgspec decodes into these, and looks their types up in a module that may not be there.
            of_class["__annotations__"] = _resolved(obj)


def _as_text(annotations: dict[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else inspect.formatannotation(value)
        for name, value in annotations.items()
    }


def _resolved(owner: type) -> dict[str, Any]:
    """Return the annotations of a class, strings replaced by what they mean; `Any` where they mean nothing."""
    names = vars(sys.modules.get(owner.__module__, types)) | vars(owner) | {owner.__name__: owner}
    found = {}
    for name, value in inspect.get_annotations(owner).items():
        # In a class, where a ClassVar may be.
        alone = type("alone", (), {"__annotations__": {name: value}})
        try:
            found[name] = typing.get_type_hints(alone, names, names, include_extras=True)[name]
        except Exception:
            found[name] = Any
    return found


# Functions with a wrapper ------------------------------------------------------------------------


class _Late:
    """Stands for a function that is known only later: it may refer to what is made with it."""

    def __init__(self) -> None:
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.function is not None
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Late, ()


def _reduce_wrapper(
    wrapper: Any, make: Callable[..., Any], *args: Any, functions: dict[type, Any] | None = None
) -> tuple[Any, ...]:
    late = _Late()
    return make, (late, *args), (late, wrapper.__wrapped__, functions or {}), None, None, _finish_wrapper


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _finish_wrapper(made: Any, state: tuple[_Late, Callable[..., Any], dict[type, Any]]) -> None:
    late, function, functions = state
    late.function = function
    functools.update_wrapper(made, function)
    for kind, each in functions.items():
        made.register(kind, each)


# Structs ------------------------------------------------------------------------------------------


class _Recipe(typing.NamedTuple):
    """What a struct is created with."""

    metaclass: type[type]
    module: str
    name: str
    qualname: str
    bases: tuple[Any, ...]
    """As written: `Generic[T]`, not `Generic`."""
    fields: dict[str, tuple[Any, ...]]
    """Own fields in order: with no default, a default, or a factory, as a `_Late`."""
    options: dict[str, Any]
    post_init: _Late | None
    all_fields: tuple[str, ...]


def _reduce_struct(owner: Any) -> tuple[Any, ...]:
    late: list[tuple[_Late, Callable[..., Any]]] = []

    def later(function: Callable[..., Any]) -> _Late:
        late.append((_Late(), function))
        return late[-1][0]

    own = vars(owner)
    annotations = inspect.get_annotations(owner)
    all_fields: tuple[str, ...] = owner.__struct_fields__
    given = (msgspec.NODEFAULT,) * (len(all_fields) - len(owner.__struct_defaults__))
    defaults = dict(zip(all_fields, (*given, *owner.__struct_defaults__), strict=True))
    fields: dict[str, tuple[Any, ...]] = {}
    for name in annotations:
        if name not in defaults:  # a ClassVar
            continue
        default = defaults[name]
        if default is msgspec.NODEFAULT:
            fields[name] = ()
        elif type(default).__module__ == "msgspec._core" and hasattr(default, "factory"):
            fields[name] = (later(default.factory),)
        else:
            fields[name] = (default,)
    recipe = _Recipe(
        metaclass=type(owner),
        module=owner.__module__,
        name=owner.__name__,
        qualname=owner.__qualname__,
        bases=own.get("__orig_bases__", owner.__bases__),
        fields=fields,
        options=_options(owner, fields),
        post_init=later(own["__post_init__"]) if "__post_init__" in own else None,
        all_fields=all_fields,
    )
    rest = {
        name: value
        for name, value in own.items()
        if name not in _MADE_BY_PYTHON and not isinstance(value, types.MemberDescriptorType)
    }
    state = (_resolved(owner), rest, late)
    return _make_struct, tuple(recipe), state, None, None, _finish_struct


def _options(owner: Any, fields: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    config = owner.__struct_config__
    options = {name: getattr(config, name) for name in _CONFIG if hasattr(config, name)}
    positional = owner.__match_args__
    options["kw_only"] = bool(fields) and not any(name in positional for name in fields)
    renamed = {
        name: encoded
        for name, encoded in zip(owner.__struct_fields__, owner.__struct_encode_fields__, strict=True)
        if name != encoded
    }
    if renamed:
        options["rename"] = renamed
    # An event's tag follows from its module and name, also in classes that derive from it there.
    if not (issubclass(owner, Event) and config.tag == _tag(owner.__module__, owner.__name__)):
        options["tag"] = config.tag
        options["tag_field"] = config.tag_field
    return options


def _tag(module: str, name: str) -> str:
    return name if module.startswith("offloop.") else f"{module}.{name}"


def _make_struct(*args: Any) -> type:
    """Create a struct with its fields, in the other process; `_finish_struct` adds the rest."""
    recipe = _Recipe(*args)
    known = event_class(_tag(recipe.module, recipe.name))
    if (
        known is not None
        and known.__qualname__ == recipe.qualname
        and known.__struct_fields__ == recipe.all_fields
    ):
        # It has come already, or was imported: there must be only one.
        return known
    bases = types.resolve_bases(recipe.bases)
    namespace: dict[str, Any] = {
        "__module__": recipe.module,
        "__qualname__": recipe.qualname,
        # Types are looked up when something is decoded. They may refer to this class.
        "__annotations__": dict.fromkeys(recipe.fields, Any),
    }
    if bases != recipe.bases:
        namespace["__orig_bases__"] = recipe.bases
    for name, default in recipe.fields.items():
        if default:
            is_late = isinstance(default[0], _Late)
            kind = "default_factory" if is_late else "default"
            namespace[name] = msgspec.field(**{kind: default[0]})
    if recipe.post_init is not None:
        namespace["__post_init__"] = recipe.post_init
    # The tag of an event is made from the module of the calling frame.
    calling = {"__name__": recipe.module, "make": recipe.metaclass}
    arguments = {"name": recipe.name, "bases": bases, "namespace": namespace, "options": recipe.options}
    made: type = eval("make(name, bases, namespace, **options)", calling, arguments)
    _unfinished.add(made)
    return made


def _finish_struct(
    made: Any, state: tuple[dict[str, Any], dict[str, Any], list[tuple[_Late, Callable[..., Any]]]]
) -> None:
    if made not in _unfinished:
        return
    _unfinished.discard(made)
    annotations, rest, late = state
    made.__annotations__ = annotations
    for name, value in rest.items():
        setattr(made, name, value)
    for stand_in, function in late:
        stand_in.function = function
