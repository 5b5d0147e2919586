"""The best moment of a run by one metric, and the checkpoint that holds it."""

import dataclasses
from collections.abc import Sequence

from offloop.engine.checkpoint import CheckpointInfo
from offloop.engine.events import EpochEnd, ValidationEnd
from offloop.engine.monitor import Direction, is_better


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
        """Return a copy with the path of the checkpoint that holds this step and score.

        Of several such checkpoints, choose the oldest of the newest attempt: earlier attempts may have trained other
        steps, and retention keeps the oldest of equal checkpoints.

        Args:
            checkpoints: Those of the run, of all attempts, oldest first.
        """
        holders = [
            each
            for each in checkpoints
            if each.step == self.step and each.metrics.get(self.monitor) == self.score
        ]
        holders = [each for each in holders if each.manifest.attempt == holders[-1].manifest.attempt]
        return dataclasses.replace(self, path=str(holders[0].path) if holders else None)


class BestSoFar:
    """Watches a run for its best moment."""

    def __init__(self, monitor: str, direction: Direction, *, is_named: bool) -> None:
        """Watch one metric.

        Args:
            monitor: Key of the metric.
            direction: Whether less or more of it is better.
            is_named: True if the user named the metric: then a run that does not compute it fails.
        """
        self.monitor = monitor
        # Written by the training thread, then by the supervisor once that thread has ended. Read by any thread, which
        # is safe because the frozen value is replaced as a whole.
        self.moment: Best | None = None
        self._direction: Direction = direction
        self._is_named = is_named

    def judge(self, event: ValidationEnd | EpochEnd) -> None:
        """Record the moment of an event if it is the best so far. Training thread only."""
        if isinstance(event, ValidationEnd) is not self.monitor.startswith("val_"):
            return
        score = event.metrics[self.monitor] if self._is_named else event.metrics.get(self.monitor)
        best = None if self.moment is None else self.moment.score
        if score is not None and is_better(score, best, self._direction):
            self.moment = Best(monitor=self.monitor, score=score, epoch=event.epoch, step=event.step)
