"""The best moment of a run by one metric, and the checkpoint that holds it."""

import dataclasses
from collections.abc import Sequence

from offloop.engine.checkpoint import CheckpointInfo, Retention
from offloop.engine.checkpoint.retention import rank
from offloop.engine.events import EpochEnd, ValidationEnd
from offloop.engine.monitor import EVALUATED, Direction, is_better


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

    @staticmethod
    def among(checkpoints: Sequence[CheckpointInfo], rules: Retention) -> "Best | None":
        """Return the best checkpoint by the metric of some rules, the oldest of equal ones; None if none has it.

        Args:
            checkpoints: Those of the run.
            rules: Name the metric. If they have an owner, the checkpoints that were saved for it or for no owner count.
        """
        heads = [each.manifest for each in checkpoints]
        if rules.owner:
            heads = [each for each in heads if not each.owners or rules.owner in each.owners]
        ranked = rank(heads, rules)
        if not ranked:
            return None
        found = next(each for each in checkpoints if each.name == ranked[0].name)
        assert rules.monitor is not None
        return Best(
            monitor=rules.monitor,
            score=found.metrics[rules.monitor],
            epoch=found.manifest.epoch_of_step,
            step=found.step,
            path=str(found.path),
        )


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
        # Then it is known only once checkpoints have been evaluated
        self._is_evaluated = monitor.startswith(EVALUATED)

    def judge(self, event: ValidationEnd | EpochEnd) -> None:
        """Record the moment of an event if it is the best so far. Training thread only."""
        if self._is_evaluated or isinstance(event, ValidationEnd) is not self.monitor.startswith("val_"):
            return
        score = event.metrics[self.monitor] if self._is_named else event.metrics.get(self.monitor)
        best = None if self.moment is None else self.moment.score
        if score is not None and is_better(score, best, self._direction):
            self.moment = Best(monitor=self.monitor, score=score, epoch=event.epoch, step=event.step)

    def locate(self, checkpoints: Sequence[CheckpointInfo]) -> None:
        """Find the checkpoint that holds the best moment, once training has ended.

        Args:
            checkpoints: Those of the run, of all attempts, oldest first.
        """
        if self._is_evaluated:
            self.moment = Best.among(checkpoints, Retention(monitor=self.monitor, mode=self._direction))
        elif self.moment is not None:
            self.moment = self.moment.located(checkpoints)
