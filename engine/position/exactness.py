"""How exactly a resumed run continues: the doubts about it, and the report that `Resumed` publishes."""

from typing import Any, Final, Literal, NamedTuple

from offloop.engine.events import Resumed

Exactness = Literal["bitwise", "equivalent", "approximate"]

_BEST_FIRST: Final[tuple[Exactness, ...]] = ("bitwise", "equivalent", "approximate")


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


class ResumeReport:
    """Collects the content of `Resumed` while a run is restored. Training thread.

    The report starts as bitwise. Parts of the run that could not be restored exactly lower it.
    """

    def __init__(self, checkpoint: str) -> None:
        """Start the report on the checkpoint at this path."""
        self.checkpoint = checkpoint
        self.exactness: Exactness = "bitwise"
        self.reasons: list[str] = []
        self.kept: list[str] = []
        self.from_script: list[str] = []

    def lower(self, exactness: Exactness, reason: str) -> None:
        """Lower the exactness to at most this, with a reason. `"bitwise"` and an empty reason change nothing."""
        if _BEST_FIRST.index(exactness) > _BEST_FIRST.index(self.exactness):
            self.exactness = exactness
        if reason and reason not in self.reasons:
            self.reasons.append(reason)

    def keep(self, what: str) -> None:
        """Record a setting of the checkpoint that overrides the script's."""
        self.kept.append(what)

    def take(self, what: str) -> None:
        """Record a setting of the script that overrides the checkpoint's, or that the checkpoint lacks."""
        self.from_script.append(what)

    def event(self, position: dict[str, Any]) -> Resumed:
        """Return the report as an event."""
        return Resumed(
            checkpoint=self.checkpoint,
            exactness=self.exactness,
            reasons="; ".join(self.reasons),
            kept=tuple(self.kept),
            from_script=tuple(self.from_script),
            **position,
        )
