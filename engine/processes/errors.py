"""Exceptions between a run and the child process of a callback: each arrives as an instance of its own class."""

import contextlib
import importlib
import pickle
import sys
import traceback
from typing import Any

import msgspec

from offloop.engine.errors import describe, encodable


class PackedError(msgspec.Struct, frozen=True):
    """An exception on its way to another process."""

    module: str
    name: str
    """Qualified name of the class in its module."""
    made_of: bytes
    """Pickled: arguments and attributes, those that can be pickled."""
    text: str
    """`Type: text`."""
    traceback: str
    """As Python prints it."""


def pack_error(error: BaseException) -> PackedError:
    """Pack an exception. An argument that cannot be pickled goes as its `repr`, such an attribute stays here."""
    arguments = tuple(each if _can_go(each) else _shown(each) for each in error.args)
    attributes = {name: value for name, value in vars(error).items() if _can_go(value)}
    # The traceback is printed with the notes.
    attributes.pop("__notes__", None)
    made_of = pickle.dumps((arguments, attributes))
    text = encodable("".join(traceback.format_exception(error)))
    kind = type(error)
    return PackedError(kind.__module__, kind.__qualname__, made_of, describe(error), text)


def unpack_error(packed: PackedError, where: str = "") -> BaseException:
    """Return the exception as its own class; as a `RuntimeError` if that class cannot be made here.

    Args:
        packed: From the other process.
        where: If given, a note names it and adds the traceback from there.
    """
    error: BaseException | None = None
    with contextlib.suppress(Exception):
        error = _made_again(packed)
    if error is None:
        error = RuntimeError(packed.text)
    if where:
        error.add_note(f"{where}:\n{packed.traceback}".rstrip())
    return error


def _can_go(value: object) -> bool:
    """Return whether a value can be pickled, and what comes out of it made again."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return object.__repr__(value)


def _made_again(packed: PackedError) -> BaseException | None:
    module = sys.modules.get(packed.module)
    if module is None and packed.module.partition(".")[0] == "offloop":
        module = importlib.import_module(packed.module)
    kind: Any = module
    for name in packed.name.split("."):
        kind = getattr(kind, name)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return None
    arguments, attributes = pickle.loads(packed.made_of)
    # Only by the constructor of Python's own base: that of the class may take other arguments than it passes on.
    error = kind.__new__(kind, *arguments)
    base = next(each for each in kind.__mro__ if each.__module__ == "builtins")
    base.__init__(error, *arguments)  # type: ignore[misc]  # made by this very base
    vars(error).update(attributes)
    return error
