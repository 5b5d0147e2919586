"""Outcome: how a run ended, told alike in `TrainEnd`, in run.json and in the result."""

import time
from pathlib import Path
from typing import Any

from offloop.engine.best import BestSoFar
from offloop.engine.errors import LossError, describe
from offloop.engine.events import Metrics, TrainEnd
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.recovery.evaluations import Evaluations, with_evaluations
from offloop.engine.result import RunResult, Status
from offloop.engine.session.callback_tasks import CallbackTasks
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.training.progress import Progress
from offloop.engine.training.setup import Limits


class Outcome:
    """How a run ended. Complete once the training thread has ended; until then a failure may still come."""

    def __init__(
        self,
        run_id: str,
        *,
        limits: Limits,
        progress: Progress,
        lifetime: Lifetime,
        best: BestSoFar,
        evaluations: Evaluations,
    ) -> None:
        """Judge a run by what these say."""
        self._run_id = run_id
        self._limits = limits
        self._progress = progress
        self._lifetime = lifetime
        self._best = best
        self._evaluations = evaluations
        self._started = time.perf_counter()

    def status(self) -> tuple[Status, str]:
        """Return how the run ended, and why in words."""
        progress, failure = self._progress, self._lifetime.failure
        if failure is not None:
            return "failed", describe(failure)
        if progress.ending == "cancelled" or progress.ending == "stopped":
            return progress.ending, progress.reason
        return "completed", progress.reason or f"epochs={self._limits.epochs}"

    def train_end(self) -> TrainEnd:
        """Return the last event of the run."""
        status, reason = self.status()
        failure = self._lifetime.failure
        bad = failure if isinstance(failure, LossError) else None
        return TrainEnd(
            status=status,
            reason=reason,
            error=None if failure is None else describe(failure),
            failed_step=None if bad is None else bad.step,
            failed_loss=None if bad is None else bad.loss,
            metrics=Metrics({**self._progress.latest, **self._evaluations.latest()}),
            seconds=time.perf_counter() - self._started,
        )

    def ending(self) -> dict[str, Any]:
        """Return what run.json says about the end, besides the result."""
        status, reason = self.status()
        progress = self._progress
        failure = self._lifetime.failure
        ending = {
            "status": status,
            "reason": reason,
            "error": None if failure is None else describe(failure),
            "ended": time.time(),
            "steps": progress.step,
        }
        if status == "stopped" and progress.stopped_by is not None:
            ending["stopped_by"] = progress.stopped_by
        if status == "stopped" and reason == "SIGTERM" and self._lifetime.signal_count:
            # For schedulers: the exit code of torchrun does not tell it
            ending["preempted"] = True
        return ending

    def result(
        self, callbacks: CallbackTasks, costs: dict[str, CallbackCosts], directory: Path | None
    ) -> RunResult:
        """Return the result.

        Args:
            callbacks: Know what they raised.
            costs: What each callback cost, by name.
            directory: The run's; None if nothing was written.
        """
        status, reason = self.status()
        progress = self._progress
        return RunResult(
            run_id=self._run_id,
            status=status,
            reason=reason,
            epochs=progress.epoch,
            steps=progress.step,
            metrics=Metrics({**progress.latest, **self._evaluations.latest()}),
            best=self._best.moment,
            history=with_evaluations(progress.history, self._evaluations.of_run()),
            seconds=time.perf_counter() - self._started,
            callback_costs=costs,
            callback_errors=callbacks.errors(),
            dir=directory,
        )
