"""What is said about a resumed run: how exact it is and why, and which of two differing settings it uses."""

from typing import Any, Final

from offloop.engine.events import Resumed
from offloop.engine.position.exactness import Exactness

_FROM_BEST: Final[tuple[Exactness, ...]] = ("bitwise", "equivalent", "approximate")


class ResumeReport:
    """Collects what a resumed run has to say about itself, until `Resumed` is published. Training thread.

    It begins as bitwise. Each part of the run that could not be put back exactly lowers that.
    """

    def __init__(self, checkpoint: str) -> None:
        """Begin the report on the checkpoint at this path."""
        self.checkpoint = checkpoint
        self.exactness: Exactness = "bitwise"
        self.reasons: list[str] = []
        self.kept: list[str] = []
        self.from_script: list[str] = []

    def lower(self, exactness: Exactness, reason: str) -> None:
        """Say that the run is at most this exact, and why. `"bitwise"` and an empty reason change nothing."""
        if _FROM_BEST.index(exactness) > _FROM_BEST.index(self.exactness):
            self.exactness = exactness
        if reason and reason not in self.reasons:
            self.reasons.append(reason)

    def keep(self, what: str) -> None:
        """Say that the checkpoint's setting is used where the script has another one."""
        self.kept.append(what)

    def take(self, what: str) -> None:
        """Say that the script's setting is used where the checkpoint has another one, or none."""
        self.from_script.append(what)

    def event(self, position: dict[str, Any]) -> Resumed:
        """Return the event that says all of it."""
        return Resumed(
            checkpoint=self.checkpoint,
            exactness=self.exactness,
            reasons="; ".join(self.reasons),
            kept=tuple(self.kept),
            from_script=tuple(self.from_script),
            **position,
        )
