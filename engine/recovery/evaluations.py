"""Evaluations: which checkpoints of a run are evaluated beside training, which of them wait, what came of the others.

    writer's thread         durable ── is it due? ──> it waits, and is kept
    any thread              Evaluated ──────────────> to the writer's thread: recorded, and no longer kept for this
    a thread at the end     what still waits is given up: it is chosen among the others

Which one is best depends on figures and steps only, never on when they came.
"""

import logging
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from offloop.engine.checkpoint.evaluations import Evaluation, is_to_evaluate, of_this_run
from offloop.engine.checkpoint.manifest import ManifestHead
from offloop.engine.events import EpochEnd, Metrics

logger = logging.getLogger("offloop")

MANY_WAITING: Final = 8
"""Waiting checkpoints that are worth a word, and again at each doubling: they take room on the disk."""


class Evaluations:
    """The evaluations of one run. Any thread, unless a method says otherwise."""

    def __init__(self, every: int | None) -> None:
        """Expect an evaluation of every so many checkpoints; None expects none."""
        self.every = every
        self._lock = threading.Lock()
        # The next two are guarded by _lock. Steps of the checkpoints that wait, by name, oldest first:
        self._waiting: dict[str, int] = {}
        self._is_over = False
        # Replaced as a whole by the training thread (of earlier attempts) and by the writer's thread.
        self._found: tuple[Evaluation, ...] = ()
        # Written by the training thread before the first checkpoint.
        self._attempt = self._resumed_step = 0

    def expect(self, head: ManifestHead) -> bool:
        """Have a durable checkpoint wait if it is due; return whether it is. Writer's thread, or as the store opens."""
        if self.every is None or not is_to_evaluate(head.serial, self.every):
            return False
        with self._lock:
            if self._is_over:
                return False
            self._waiting[head.name] = head.step
            count = len(self._waiting)
        if count >= MANY_WAITING and not count & (count - 1):
            logger.warning(
                "%d checkpoints wait for their evaluation, and are kept until then: evaluate fewer of them (every=), "
                "or give the evaluation a device of its own",
                count,
            )
        return True

    def forget(self, name: str, evaluation: Evaluation | None) -> None:
        """Note what came of a checkpoint; None if it could not be evaluated. Writer's thread."""
        with self._lock:
            self._waiting.pop(name, None)
        if evaluation is not None:
            self._found = (*(each for each in self._found if each.checkpoint != name), evaluation)

    def give_up(self) -> dict[str, int]:
        """Expect no evaluation any more, and return the steps of the checkpoints that waited, by name."""
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting, {}
            return waiting

    def resume(self, found: Iterable[Evaluation], *, attempt: int, step: int) -> None:
        """Take over what earlier attempts have found out. Training thread.

        Args:
            found: The record of the run.
            attempt: The new attempt.
            step: The step at which it continues.
        """
        self._found, self._attempt, self._resumed_step = tuple(found), attempt, step

    def of_run(self) -> list[Evaluation]:
        """Return the evaluations of the steps of this run, by step."""
        return of_this_run(self._found, attempt=self._attempt, resumed_step=self._resumed_step)

    def latest(self) -> dict[str, float]:
        """Return the value of each metric at the last checkpoint that has it."""
        return latest_of(self.of_run())


def latest_of(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """Return the last value of each metric; the evaluations are in the order of their steps."""
    values: dict[str, float] = {}
    for each in evaluations:
        values |= each.values
    return values


def with_evaluations(
    history: Collection[EpochEnd], evaluations: Sequence[Evaluation]
) -> tuple[EpochEnd, ...]:
    """Return the ends of epochs with the metrics of the checkpoints that were taken in them, the last of each."""
    by_epoch: dict[int, dict[str, float]] = {}
    for each in evaluations:
        by_epoch.setdefault(each.epoch, {}).update(each.values)
    return tuple(
        msgspec.structs.replace(end, metrics=Metrics({**end.metrics, **by_epoch[end.epoch]}))
        if end.epoch in by_epoch
        else end
        for end in history
    )
