"""The report on a resumed run: how exact it is and why, and which of two differing settings it uses."""

from typing import Any, Final

from offloop.engine.events import Resumed
from offloop.engine.position.exactness import Exactness

_FROM_BEST: Final[tuple[Exactness, ...]] = ("bitwise", "equivalent", "approximate")


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
        if _FROM_BEST.index(exactness) > _FROM_BEST.index(self.exactness):
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
