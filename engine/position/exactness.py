"""How exactly a resumed run goes on, and doubts: what speaks against bit for bit."""

from typing import Literal, NamedTuple

Exactness = Literal["bitwise", "equivalent", "approximate"]


class Doubt(NamedTuple):
    """One thing that is not known to be restored bit for bit."""

    exactness: Exactness
    """What can still be said of the run: `equivalent` or `approximate`."""
    reason: str
    """Why, in words; it names what was not restored and, where there is one, the remedy."""


def approximate(reason: str) -> Doubt:
    """Return a doubt after which a run is only approximately the one that it continues."""
    return Doubt("approximate", reason)


def equivalent(reason: str) -> Doubt:
    """Return a doubt that leaves order and arithmetic alone: other random draws in the data, no more."""
    return Doubt("equivalent", reason)
