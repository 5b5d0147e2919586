"""How exactly a resumed run continues, and doubts: reasons why it may not be bit for bit."""

from typing import Literal, NamedTuple

Exactness = Literal["bitwise", "equivalent", "approximate"]


class Doubt(NamedTuple):
    """Something that may not be restored bit for bit."""

    exactness: Exactness
    """What the run still is: `equivalent` or `approximate`."""
    reason: str
    """What was not restored, and the remedy if there is one."""


def approximate(reason: str) -> Doubt:
    """Return a doubt that makes the resumed run an approximate one."""
    return Doubt("approximate", reason)


def equivalent(reason: str) -> Doubt:
    """Return a doubt that concerns only random draws in the data, not order or arithmetic."""
    return Doubt("equivalent", reason)
