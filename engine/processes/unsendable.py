"""Which part of an object cannot be pickled, or takes most of the room, named as its owner would name it.

The pickler written in C does not tell where it was. So the object is walked afterwards, breadth first, and each part is
taken apart once, as the pickler does it: the first one for which that fails is at fault, by the shortest way to it.
"""

import copyreg
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pickle import PickleBuffer
from typing import IO, Any, Final, Literal, Protocol

from offloop.engine.errors import OffloopError, describe

LOOKED_AT: Final = 250_000
"""Parts that are looked at, besides numbers, text and bytes. Arbitrary: it bounds what an error takes to explain."""
_LABELS: Final = 12
"""Labels that a path shows, such as `.settings` or `[0]`; of a longer one, its beginning and its end."""

_TEXT: Final = (str, bytes, bytearray)
_ATOMS: Final = frozenset((type(None), bool, int, float, complex, PickleBuffer, *_TEXT))
"""Types of values that have no parts. Taking bytes apart would copy them."""
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


class _Sink:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


_Relation = Literal["attribute", "item", "element", "key", "default", "global", "variable", "class", "same"]
"""What a part is to the one that holds it; `same` has no name of its own."""
_Labelled = tuple[Any, _Relation, Any]
"""A part, its relation, and its name, index or key."""


class _Part:
    """A part of the object, and how it was found."""

    __slots__ = ("biggest", "key", "parent", "relation", "size", "value")

    def __init__(
        self, value: Any, relation: _Relation, key: Any, parent: "_Part | None", size: int = 32
    ) -> None:
        self.value, self.relation, self.key, self.parent = value, relation, key, parent
        self.size = size
        """Bytes in a pickle, about; with all parts that were found through it, once these are added."""
        self.biggest: _Part | None = None
        """The biggest of these."""

    def chain(self) -> "list[_Part]":
        """Return all parts from the whole object to this one."""
        parts: list[_Part] = []
        part: _Part | None = self
        while part is not None:
            parts.append(part)
            part = part.parent
        return parts[::-1]

    @property
    def label(self) -> str:
        """What it adds to the path of its parent, or stands in its place."""
        match self.relation:
            case "attribute":
                return f".{self.key}"
            case "item":
                return f"[{self.key!r}]" if isinstance(self.key, str | int) else f"[{self.key!r:.40}]"
            case "key":
                return f" (key {self.value!r:.40})"
            case "element" | "default":
                return f" ({'an element' if self.relation == 'element' else 'a default'})"
            case "global" | "variable":
                return f"the {self.relation} {self.key!r}"
            case "class":
                return str(self.value.__name__)
        return str(self.key or "")

    @property
    def is_used(self) -> bool:
        """Whether a function uses it by its name."""
        return self.relation in ("global", "variable")

    def path(self) -> "tuple[str, _Part | None]":
        """Return its name, `Notify.settings['log']` or `the global 'log'`, and the function that uses that."""
        labels: list[str] = []
        part, user = self, None
        while True:
            labels.append(part.label)
            if part.is_used:
                user = part.parent
            if part.parent is None or part.is_used or part.relation == "class":
                break
            part = part.parent
            if isinstance(part.value, type):
                labels.append(part.value.__name__)
                break
        return _joined(labels[::-1]), user

    def text(self) -> str:
        """Return its name and that of the function that uses it."""
        path, user = self.path()
        return f"{path}, used by {user.path()[0]}," if user else path


class Parts:
    """Takes one object apart, to find the part that matters."""

    def __init__(self, make_pickler: Callable[[IO[bytes]], _Pickler], root: Any, name: str) -> None:
        """Look into `root`, which messages call `name`."""
        self._make_pickler = make_pickler
        self._root = _Part(root, "same", name, None)
        self._name = name
        self._last = self._root
        """The part that was looked at last: none is deeper."""
        self._is_complete = True

    def explain(self, error: Exception, *, destination: str, hint: str, hint_for_used: str) -> str:
        """Return a sentence on what could not be pickled, and what to do instead.

        Args:
            error: What pickling the whole object raised.
            destination: Where it should have gone.
            hint: What to do about an attribute, unless the error knows better.
            hint_for_used: What to do about a global, or a variable of a function around.
        """
        found = None
        for part, problem in self._walk():
            if problem is not None:
                found, error = part, problem
                break
        if found is None or found is self._root:
            return self._explain_whole(error, destination, hint)
        refused = error if isinstance(error, RefusedError) else None
        what = refused.what if refused else _kind(found.value)
        why = (refused and refused.why) or f"which cannot be sent to {destination}"
        owner, inner = self._owner(found)
        user = owner.path()[1]
        hint = (refused and refused.hint) or (hint_for_used if user else hint)
        detail = "" if refused or str(error).startswith("cannot pickle") else f" ({describe(error)})"
        verb = "is" if user else "holds"
        if found is owner:
            return f"{owner.text()} {verb} {what}, {why}{detail}: {hint}"
        if any(each.is_used or each.relation == "class" for each in inner):
            where = f"and with it {found.text()} {what}"
        else:
            name = _joined([each.label for each in inner]).removeprefix(".")
            where = f"whose {name} is {what}" if name else f"made of {what}"
        return f"{owner.text()} {verb} {_kind(owner.value)}, {where}, {why}{detail}: {hint}"

    def biggest(self) -> str:
        """Return a clause on what takes most of the room, `, most of it in Mine.rows`; empty if nothing does."""
        parts = [part for part, _ in self._walk()]
        # Each was found after its parent.
        for part in reversed(parts):
            if (parent := part.parent) is not None:
                parent.size += part.size
                if parent.biggest is None or part.size > parent.biggest.size:
                    parent.biggest = part
        place = self._root
        while place.biggest is not None and place.biggest.size * 2 >= place.size:
            place = place.biggest
        if place is self._root:
            return ""
        of = "of it" if self._is_complete else f"of its first {LOOKED_AT:,} parts"
        return f", most {of} in {place.text().rstrip(',')}"

    def _explain_whole(self, error: Exception, destination: str, hint: str) -> str:
        """Explain an error that no part has alone."""
        chain = self._last.chain()
        if isinstance(error.__cause__, RecursionError) and len(chain) > 1:
            return (
                f"{chain[1].text()} is nested too deeply to be sent to {destination}, {len(chain) - 1:,} levels: "
                f"flatten it, or {hint}"
            )
        if not self._is_complete:
            for value, relation, key in self._parts(self._root.value):
                if self._fails(value):
                    place = _Part(value, relation, key, self._root).text()
                    return (
                        f"{place} holds, beyond the first {LOOKED_AT:,} parts of {self._name}, what cannot be sent to "
                        f"{destination} ({describe(error)}): {hint}"
                    )
        return f"{self._name} cannot be sent to {destination}: {describe(error)}"

    def _owner(self, found: _Part) -> tuple[_Part, list[_Part]]:
        """Return the last part on the way that a user knows, and the parts inside of it.

        Inside an object of another library, its attribute is what the user knows.
        """
        root, *chain = found.chain()
        owner = root
        for index, part in enumerate(chain):
            if owner is not root and not self._is_transparent(owner.value):
                return owner, chain[index:]
            owner = part
        return owner, []

    def _walk(self) -> Iterator[tuple[_Part, Exception | None]]:
        """Iterate over all parts, breadth first, each with the error of taking it apart."""
        waiting = deque([self._root])
        # By id. Keeps temporary objects alive: their ids stay theirs.
        seen = {id(self._root.value): self._root.value}
        while waiting:
            self._last = part = waiting.popleft()
            problem = None
            try:
                for value, relation, key in self._parts(part.value):
                    if type(value) in _ATOMS:
                        size = _size(value)
                        part.size += size
                        if part.biggest is None or size > part.biggest.size:
                            part.biggest = _Part(value, relation, key, part, size)
                    elif id(value) not in seen:
                        if len(seen) == LOOKED_AT:
                            self._is_complete = False
                            break
                        seen[id(value)] = value
                        waiting.append(_Part(value, relation, key, part))
            except Exception as error:
                problem = error
            yield part, problem

    def _fails(self, value: Any) -> bool:
        try:
            self._make_pickler(_Sink()).dump(value)  # type: ignore[arg-type]  # all that a pickler needs of a file
        except Exception:
            return True
        return False

    def _is_transparent(self, value: Any) -> bool:
        """Return whether a user looks into such a value: a container, a function, an object of a class of their own."""
        if type(value) in _CONTAINERS or isinstance(
            value, type | types.FunctionType | types.MethodType | functools.partial
        ):
            return True
        return self._make_pickler(_Sink()).reducer_override(type(value)) is not NotImplemented  # type: ignore[arg-type]

    def _parts(self, value: Any) -> Iterator[_Labelled]:
        """Iterate over the parts that the pickler would come to.

        Raises:
            Exception: The value itself cannot be pickled.
        """
        if type(value) is dict:
            yield from ((item, "item", key) for key, item in value.items())
            yield from ((key, "key", None) for key in value)
        elif type(value) in (list, tuple):
            yield from ((item, "item", index) for index, item in enumerate(value))
        elif type(value) in (set, frozenset):
            yield from ((item, "element", None) for item in value)
        elif isinstance(value, types.MethodType):
            yield value.__self__, "attribute", "__self__"
            yield value.__func__, "same", None
        elif type(value) is functools.partial:
            for name in ("func", "args", "keywords"):
                yield getattr(value, name), "attribute", name
        else:
            reduced = self._reduce(value)
            if isinstance(reduced, str):
                # By its name, which may be wrong.
                self._make_pickler(_Sink()).dump(value)  # type: ignore[arg-type]
            elif isinstance(reduced, tuple):
                of = _of_function if isinstance(value, types.FunctionType) else _of_reduced
                yield from of(value, reduced)

    def _reduce(self, value: Any) -> Any:
        pickler = self._make_pickler(_Sink())  # type: ignore[arg-type]
        reduced = pickler.reducer_override(value)
        if reduced is not NotImplemented or isinstance(value, type | types.FunctionType):
            return reduced
        if reduce := pickler.dispatch_table.get(type(value)):
            return reduce(value)
        return value.__reduce_ex__(5)


def _of_function(function: types.FunctionType, reduced: tuple[Any, ...]) -> Iterator[_Labelled]:
    yield from ((each, "global", name) for name, each in reduced[2][1]["__globals__"].items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, "variable", name
        except ValueError:  # not assigned yet
            continue
    for each in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield each, "default", None
    yield from ((each, "attribute", name) for name, each in vars(function).items())


def _of_reduced(value: Any, reduced: tuple[Any, ...]) -> Iterator[_Labelled]:
    function, args, state, items, pairs, *_ = (*reduced, None, None, None)[:6]
    if isinstance(value, type):
        yield from ((base, "class", None) for base in value.__bases__)
    for each in state if isinstance(state, tuple) else (state,):
        if not isinstance(each, dict):
            yield each, "same", None
            continue
        for name, item in each.items():
            if name in _OF_MODULES and isinstance(item, dict):
                yield from ((inner, "attribute", key) for key, inner in item.items())
            else:
                yield item, "attribute", name
    yield from ((item, "item", index) for index, item in enumerate(items or ()))
    yield from ((item, "item", key) for key, item in pairs or ())
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # typeshed lacks it
        yield args[0], "class", None
        args = args[1:]
    else:
        yield function, "same", None
    yield from ((each, "same", None) for each in args)


def _size(atom: Any) -> int:
    """Return about how many bytes an atom takes in a pickle."""
    if type(atom) is PickleBuffer:
        return atom.raw().nbytes
    return len(atom) if type(atom) in _TEXT else 4


def _joined(labels: list[str]) -> str:
    if len(labels) > _LABELS:
        labels = [*labels[: _LABELS - 2], "...", labels[-1]]
    return "".join(labels)


def _kind(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__.replace("<locals>.", "")
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    if isinstance(value, type):
        return f"the class {name}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
