"""Best: the best moment of a run by one metric, and the checkpoint that holds it."""

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


class BestSoFar:
    """Watches a run for its best moment."""

    def __init__(self, monitor: str, direction: Direction, *, is_named: bool) -> None:
        """Judge by one metric.

        Args:
            monitor: Its key.
            direction: Whether less or more of it is better.
            is_named: True if the user has named the metric: a run that does not compute it fails.
        """
        self.monitor = monitor
        # Replaced as a whole: by the training thread, and by the supervisor after that thread has ended.
        # Read by any thread.
        self.moment: Best | None = None
        self._direction: Direction = direction
        self._is_named = is_named

    def judge(self, event: ValidationEnd | EpochEnd) -> None:
        """Note the moment of an event if it is the best so far. Training thread."""
        if isinstance(event, ValidationEnd) is not self.monitor.startswith("val_"):
            return
        score = event.metrics[self.monitor] if self._is_named else event.metrics.get(self.monitor)
        best = None if self.moment is None else self.moment.score
        if score is not None and is_better(score, best, self._direction):
            self.moment = Best(monitor=self.monitor, score=score, epoch=event.epoch, step=event.step)
