"""Checks of arguments. They know nothing of the engine except its errors.

A check takes the argument's name and value and raises `ConfigError` with the name, what is legal and what was given:
"patience must be a whole number of at least 1, got 0".
"""

import math
from typing import Final, TypeGuard

from offloop.engine.errors import ConfigError
from offloop.engine.visible_text import is_hidden

MOST_TAGS: Final = 50
LONGEST_TAG: Final = 100
LONGEST_NOTE: Final = 16_384


def is_whole_number(value: object) -> TypeGuard[int]:
    """Tell whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is an int or a float and not a bool. Infinities and NaN are numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(
    name: str,
    value: object,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    optional: bool = False,
    hint: str = "",
) -> None:
    """Check for an int within bounds.

    Args:
        name: The argument's name.
        value: What it is.
        at_least: The smallest legal number.
        at_most: The largest legal number; None for no bound.
        optional: Whether None is legal, too.
        hint: Appended to the error's text.

    Raises:
        ConfigError: It is something else, or out of bounds.
    """
    if (value is None and optional) or (
        is_whole_number(value) and value >= at_least and (at_most is None or value <= at_most)
    ):
        return
    legal = f"of at least {at_least:,}" if at_most is None else f"from {at_least} to {at_most}"
    raise ConfigError(f"{name} must be a whole number {legal}, got {value!r}{hint}")


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    finite: bool = True,
    optional: bool = False,
    unit: str = "",
    hint: str = "",
) -> None:
    """Check for an int or a float within bounds. NaN is never legal.

    Args:
        name: The argument's name.
        value: What it is.
        above: Lower bound that is not legal itself.
        at_least: Lower bound that is legal itself.
        below: Upper bound that is not legal itself.
        at_most: Upper bound that is legal itself.
        finite: Whether infinities are illegal.
        optional: Whether None is legal, too.
        unit: What the number counts, like `"seconds"`.
        hint: Appended to the error's text.

    Raises:
        ConfigError: It is something else, or out of bounds.
    """
    if (value is None and optional) or (
        is_number(value)
        # Only NaN differs from itself. math.isnan and isinf would fail for an int beyond the largest float.
        and value == value
        and not (finite and abs(value) == math.inf)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    ):
        return
    bounds = ((above, "above"), (at_least, "of at least"), (below, "below"), (at_most, "at most"))
    legal = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
    kind = f"a {'finite ' if finite else ''}number{unit and f' of {unit}'}{legal and f' {legal}'}"
    raise ConfigError(f"{name} must be {kind}, got {value!r}{hint}")


def flag(name: str, value: object) -> None:
    """Check for True or False.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def choice(name: str, value: object, legal: tuple[object, ...], *, hint: str = "") -> None:
    """Check for one of several values.

    Raises:
        ConfigError: It is none of them.
    """
    if value not in legal:
        *others, last = map(repr, legal)
        raise ConfigError(f"{name} must be {', '.join(others)} or {last}, got {value!r}{hint}")


def visible_text(name: str, value: object, *, at_most: int, keep: str = "") -> str:
    """Check for a text without hidden characters, and return it.

    Args:
        name: The argument's name.
        value: What it is.
        at_most: Its most characters.
        keep: Hidden characters that are legal, like a newline.

    Raises:
        ConfigError: It is something else, or has others.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {value!r}")
    if len(value) > at_most:
        raise ConfigError(f"{name} must have at most {at_most:,} characters, got {len(value):,}")
    for place, each in enumerate(value):
        if is_hidden(each) and each not in keep:
            what = "one line" if each in "\r\n" else "text"
            start = max(0, place - 20)
            raise ConfigError(
                f"{name} must be {what} without invisible characters, got U+{ord(each):04X} in "
                f"{value[start : place + 20]!r}"
            )
    return value


def tags(value: object) -> tuple[str, ...]:
    """Check for the tags of a run, and return them without spaces around them; repeated ones count once.

    Raises:
        ConfigError: They are no list of strings, too many, too long, empty, or have hidden characters.
    """
    if not isinstance(value, list | tuple):
        hint = f": write [{value!r}]" if isinstance(value, str) else ""
        raise ConfigError(f"tags must be a list of strings, got {value!r}{hint}")
    checked = [visible_text("tags", each, at_most=LONGEST_TAG) for each in value]
    kept = tuple(dict.fromkeys(each.strip() for each in checked))
    if "" in kept:
        raise ConfigError("tags must not be empty: leave an empty tag out")
    if len(kept) > MOST_TAGS:
        raise ConfigError(f"tags must be at most {MOST_TAGS}, got {len(kept)}")
    return kept


def note(value: object) -> str:
    """Check for the note of a run, and return it.

    Raises:
        ConfigError: It is no string, too long, or has hidden characters.
    """
    return visible_text("note", value, at_most=LONGEST_NOTE, keep="\t\r\n")


def instance(name: str, value: object, arguments: str = "...") -> None:
    """Check that a value is no class.

    Args:
        name: The argument's name.
        value: What it is.
        arguments: How the class is called, for the error's text.

    Raises:
        TypeError: It is a class.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an instance: write {value.__name__}({arguments}) instead of {value.__name__}"
        )
