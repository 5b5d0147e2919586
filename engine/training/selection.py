"""Choosing parts of a model by name: for `freeze` and `activation_checkpointing`."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from offloop.engine.errors import ConfigError

_NAMES_IN_ERRORS: Final = 5


def matches(name: str, pattern: str) -> bool:
    """Return True if a pattern matches a dotted name: exactly, with `*` for any text, or as a module around it."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def nothing_matches(knob: str, pattern: str, what: str, names: Iterable[str]) -> ConfigError:
    """Return the error for a pattern without a match, with similar names.

    Args:
        knob: Name of the argument.
        pattern: What was given.
        what: What was looked for, in the singular.
        names: All names.
    """
    # A dict, to keep the order
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    near: Sequence[str] = difflib.get_close_matches(
        pattern.rstrip(".*"), known, n=_NAMES_IN_ERRORS, cutoff=0.5
    )
    if near:
        hint = f"did you mean {', '.join(map(repr, near))}?"
    else:
        top = list(dict.fromkeys(name.split(".")[0] for name in known))
        dots = ", ..." if len(top) > _NAMES_IN_ERRORS else ""
        hint = f"at the top there are {', '.join(map(repr, top[:_NAMES_IN_ERRORS]))}{dots}"
    return ConfigError(f"{knob}: {pattern!r} matches no {what}; {hint}")
