"""Which part of an object cannot be pickled, or is the biggest, named as its owner would name it.

The pickler written in C does not tell where it was. So after a failure the parts of the object are pickled one by one,
and the parts of the part that fails, until one is left.
"""

import copyreg
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, Final, Protocol

from offloop.engine.errors import OffloopError, describe

_ATOMS: Final = (type(None), int, float, complex)
_CONTAINERS: Final = (dict, list, tuple, set, frozenset, types.MappingProxyType)
_OF_MODULES: Final = ("_modules", "_parameters", "_buffers")
"""Where `torch.nn.Module` keeps what its attributes are."""


class RefusedError(OffloopError):
    """Something that could be pickled and must not be."""

    def __init__(self, what: str, why: str | None, hint: str | None) -> None:
        super().__init__(what, why, hint)
        self.what = what
        """What it is: `a tensor on cuda:0`."""
        self.why = why
        """A clause on what is wrong, in place of the usual one."""
        self.hint = hint
        """What to do instead, in place of the usual hint."""


class _Pickler(Protocol):
    dispatch_table: Mapping[type, Callable[[Any], Any]]

    def reducer_override(self, obj: Any, /) -> Any: ...

    def dump(self, obj: Any, /) -> None: ...


class Sink:
    """A file that counts what is written, and keeps nothing."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.size += count
        return count


@dataclass(frozen=True)
class _Place:
    path: str
    """`Notify.settings['log']`, or `the global 'log'`."""
    user: str = ""
    """The function that uses the global, or the variable."""

    def then(self, label: str) -> "_Place":
        return replace(self, path=self.path + label)

    @property
    def text(self) -> str:
        return f"{self.path}, used by {self.user}," if self.user else self.path


@dataclass(frozen=True)
class _Found:
    place: _Place
    value: Any


class Parts:
    """Pickles the parts of one object, to find the one that matters."""

    def __init__(self, make_pickler: Callable[[IO[bytes]], _Pickler], root: Any, name: str) -> None:
        """Look into `root`, which messages call `name`."""
        self._make_pickler = make_pickler
        self._root = root
        self._name = name

    def explain(self, error: Exception, *, destination: str, hint: str, hint_for_used: str) -> str:
        """Return a sentence on what could not be pickled, and what to do instead.

        Args:
            error: What pickling the whole object raised.
            destination: Where it should have gone.
            hint: What to do about an attribute, unless the error knows better.
            hint_for_used: What to do about a global, or a variable of a function around.
        """
        owner = found = _Found(_Place(self._name), self._root)
        is_inside = False
        for each, problem in self._descend(error):
            # Inside an object of another library, its attribute is what the user knows.
            is_inside = is_inside or not (found.value is self._root or self._is_transparent(found.value))
            found, error = each, problem
            if not is_inside:
                owner = each
        refused = error if isinstance(error, RefusedError) else None
        what = refused.what if refused else _kind(found.value)
        why = (refused and refused.why) or f"which cannot be sent to {destination}"
        hint = (refused and refused.hint) or (hint_for_used if owner.place.user else hint)
        detail = ""
        if refused is None and not str(error).startswith("cannot pickle"):
            detail = f" ({describe(error)})"
        verb = "is" if owner.place.user else "holds"
        if found.value is self._root:
            return f"{self._name} cannot be sent to {destination}: {describe(error)}"
        if found is owner:
            return f"{owner.place.text} {verb} {what}, {why}{detail}: {hint}"
        inner = found.place.path.removeprefix(owner.place.path).removeprefix(".")
        where = (
            f"whose {inner} is {what}"
            if found.place.path.startswith(owner.place.path)
            else (f"and with it {found.place.text} {what}")
        )
        return f"{owner.place.text} {verb} {_kind(owner.value)}, {where}, {why}{detail}: {hint}"

    def biggest(self) -> tuple[str, int]:
        """Return the place of what takes most of the room, and its bytes."""
        place, value = _Place(self._name), self._root
        size = self._size(value)
        seen: list[Any] = [value]
        while True:
            sizes = [(self._size(each.value), each) for each in self._fresh(_Found(place, value), seen)]
            largest, part = max(sizes, key=lambda pair: pair[0], default=(0, None))
            if part is None or largest * 2 < size:
                return place.text.rstrip(","), size
            place, value, size = part.place, part.value, largest

    def _descend(self, error: Exception) -> Iterator[tuple[_Found, Exception]]:
        """Iterate over ever smaller parts that cannot be pickled, each with its error."""
        current = _Found(_Place(self._name), self._root)
        seen: list[Any] = [self._root]
        while not isinstance(error, RefusedError) or self._refusal(current.value) is None:
            for part in self._fresh(current, seen):
                problem = self._problem(part.value)
                if problem is not None:
                    current, error = part, problem
                    break
            else:
                return
            yield current, error

    def _fresh(self, found: _Found, seen: list[Any]) -> Iterator[_Found]:
        for part in self._parts(found.place, found.value):
            # `seen` keeps temporary objects alive: their ids stay theirs.
            if not isinstance(part.value, _ATOMS) and not any(part.value is each for each in seen):
                seen.append(part.value)
                yield part

    def _problem(self, value: Any) -> Exception | None:
        try:
            self._make_pickler(Sink()).dump(value)  # type: ignore[arg-type]  # all that a pickler needs of a file
        except Exception as error:
            return error
        return None

    def _refusal(self, value: Any) -> Exception | None:
        """Return why a value itself, not a part of it, is refused."""
        try:
            self._make_pickler(Sink()).reducer_override(value)  # type: ignore[arg-type]
        except Exception as error:
            return error
        return None

    def _size(self, value: Any) -> int:
        sink = Sink()
        try:
            self._make_pickler(sink).dump(value)  # type: ignore[arg-type]
        except Exception:  # a part that goes only with the whole
            return 0
        return sink.size

    def _is_transparent(self, value: Any) -> bool:
        """Return whether a user looks into such a value: a container, a function, an object of a class of their own."""
        if type(value) in _CONTAINERS or isinstance(
            value, type | types.FunctionType | types.MethodType | functools.partial
        ):
            return True
        return self._make_pickler(Sink()).reducer_override(type(value)) is not NotImplemented  # type: ignore[arg-type]

    def _parts(self, place: _Place, value: Any) -> Iterator[_Found]:
        if isinstance(value, dict) and type(value) is dict:
            for key, item in value.items():
                yield _Found(place.then(_index(key)), item)
            yield from (_Found(place.then(f" (key {key!r:.40})"), key) for key in value)
        elif type(value) in (list, tuple):
            for index, item in enumerate(value):
                yield _Found(place.then(f"[{index}]"), item)
        elif type(value) in (set, frozenset):
            yield from (_Found(place.then(" (element)"), item) for item in value)
        elif isinstance(value, types.MethodType):
            yield _Found(place.then(".__self__"), value.__self__)
            yield _Found(place, value.__func__)
        elif isinstance(value, functools.partial):
            yield _Found(place.then(".func"), value.func)
            yield _Found(place.then(".args"), value.args)
            yield _Found(place.then(".keywords"), value.keywords)
        elif isinstance(value, staticmethod | classmethod):
            yield _Found(place, value.__func__)
        elif isinstance(value, property):
            yield from (_Found(place, each) for each in (value.fget, value.fset, value.fdel))
        else:
            yield from self._reduced_parts(place, value)

    def _reduced_parts(self, place: _Place, value: Any) -> Iterator[_Found]:
        try:
            reduced = self._reduce(value)
        except Exception:
            return
        if not isinstance(reduced, tuple):
            return
        if isinstance(value, types.FunctionType):
            yield from _of_function(place, value, reduced)
            return
        if isinstance(value, type):
            own = _Place(value.__name__)
            yield from (_Found(_Place(base.__name__), base) for base in value.__bases__)
            yield from (_Found(own.then(f".{name}"), each) for name, each in vars(value).items())
            return
        function, args, state, items, pairs, *_ = (*reduced, None, None, None)[:6]
        for each in state if isinstance(state, tuple) else (state,):
            if isinstance(each, dict):
                yield from _of_state(place, each)
            elif each is not None:
                yield _Found(place, each)
        yield from (_Found(place.then(f"[{index}]"), item) for index, item in enumerate(items or ()))
        for key, item in pairs or ():
            yield _Found(place.then(_index(key)), item)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # typeshed lacks it
            yield _Found(_Place(args[0].__name__), args[0])
            args = args[1:]
        else:
            yield _Found(place, function)
        yield from (_Found(place, each) for each in args)

    def _reduce(self, value: Any) -> Any:
        pickler = self._make_pickler(Sink())  # type: ignore[arg-type]
        reduced = pickler.reducer_override(value)
        if reduced is not NotImplemented or isinstance(value, type | types.FunctionType):
            return reduced
        if reduce := pickler.dispatch_table.get(type(value)):
            return reduce(value)
        return value.__reduce_ex__(5)


def _of_function(place: _Place, function: types.FunctionType, reduced: tuple[Any, ...]) -> Iterator[_Found]:
    used = reduced[2][1].get("__globals__", {})
    for name, each in used.items():
        yield _Found(_Place(f"the global {name!r}", place.text), each)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            each = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield _Found(_Place(f"the variable {name!r}", place.text), each)
    yield from (_Found(place.then(" (a default)"), each) for each in function.__defaults__ or ())
    yield from (_Found(place.then(" (a default)"), each) for each in (function.__kwdefaults__ or {}).values())
    yield from (_Found(place.then(f".{name}"), each) for name, each in vars(function).items())


def _of_state(place: _Place, state: dict[Any, Any]) -> Iterator[_Found]:
    for name, each in state.items():
        if name in _OF_MODULES and isinstance(each, dict):
            yield from (_Found(place.then(f".{key}"), item) for key, item in each.items())
        else:
            yield _Found(place.then(f".{name}"), each)


def _index(key: object) -> str:
    return f"[{key!r}]" if isinstance(key, str | int) else f"[{key!r:.40}]"


def _kind(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__.replace("<locals>.", "")
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    if isinstance(value, type):
        return f"the class {name}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
