"""Best: the best moment of a run by one metric, and the checkpoint that holds it."""

import dataclasses
from collections.abc import Sequence

from offloop.engine.checkpoint import CheckpointInfo


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best moment of a run by one metric."""

    monitor: str
    """The metric that decides."""
    score: float
    """Its best value; always finite."""
    epoch: int
    """Where it was reached."""
    step: int
    """Where it was reached, in optimizer steps."""
    path: str | None = None
    """The checkpoint that holds it; None if none does."""

    def located(self, checkpoints: Sequence[CheckpointInfo]) -> "Best":
        """Return it with the path of the checkpoint that holds its step and score, whichever attempt has saved it.

        Args:
            checkpoints: Those of the run, oldest first. Where several hold it, it is the oldest of the newest
                attempt: other attempts may have left the path that this run took, and of equals retention keeps
                the oldest.
        """
        holders = [
            each
            for each in checkpoints
            if each.step == self.step and each.metrics.get(self.monitor) == self.score
        ]
        holders = [each for each in holders if each.manifest.attempt == holders[-1].manifest.attempt]
        return dataclasses.replace(self, path=str(holders[0].path) if holders else None)
