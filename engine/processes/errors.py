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
    """Pickled: arguments and attributes. Empty if they cannot be pickled."""
    text: str
    """`Type: text`."""
    traceback: str
    """As Python prints it."""


def pack_error(error: BaseException) -> PackedError:
    """Pack an exception, whatever it holds."""
    made_of = b""
    with contextlib.suppress(Exception):
        made_of = pickle.dumps((error.args, _attributes(error)))
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


def _attributes(error: BaseException) -> dict[str, Any]:
    attributes = dict(vars(error))
    # The traceback is printed with the notes.
    attributes.pop("__notes__", None)
    return attributes


def _made_again(packed: PackedError) -> BaseException | None:
    module = sys.modules.get(packed.module)
    if module is None and packed.module.partition(".")[0] == "offloop":
        module = importlib.import_module(packed.module)
    kind: Any = module
    for name in packed.name.split("."):
        kind = getattr(kind, name)
    if not packed.made_of or not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return None
    arguments, attributes = pickle.loads(packed.made_of)
    # Only by the constructor of Python's own base: that of the class may take other arguments than it passes on.
    error = kind.__new__(kind, *arguments)
    base = next(each for each in kind.__mro__ if each.__module__ == "builtins")
    base.__init__(error, *arguments)  # type: ignore[misc]  # made by this very base
    vars(error).update(attributes)
    return error
