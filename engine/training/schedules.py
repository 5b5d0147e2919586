"""The learning rate schedules at work in a run, and changes of learning rates by hand."""

from collections.abc import Collection

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from offloop.engine.events import LearningRateChanged, Metrics
from offloop.engine.training.given_rates import GivenRates
from offloop.engine.training.learning_rate import (
    Schedule,
    check_length,
    largest_lr,
    mark_stepped,
    scale_lr,
)
from offloop.engine.training.progress import Progress
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.setup import Setup


class Schedules:
    """Steps the schedules of a run. Training thread only."""

    def __init__(self, setup: Setup, progress: Progress, reporter: Reporter, *, is_manual: bool) -> None:
        """Begin with the schedules of the trainer. They outlive the run; those attached later end with it.

        Args:
            setup: Of the run.
            progress: Of the run.
            reporter: Publishes changes of learning rates.
            is_manual: True if not every step of the run steps every optimizer.
        """
        self.all = list(setup.schedules)
        self.given_rates = GivenRates(list(setup.optimizers.values()))
        self._lasting = len(self.all)
        self._optimizers = setup.optimizers
        self._limits = setup.limits
        self._monitor = setup.monitor
        self._progress = progress
        self._reporter = reporter
        self._is_manual = is_manual

    def begin(self, steps_per_epoch: int | None) -> None:
        """Check that each schedule is long enough for the run.

        Raises:
            ConfigError: One would end before the run does.
        """
        for schedule in self.all:
            mark_stepped(schedule.scheduler.optimizer)
            check_length(schedule, self._steps_left(schedule, steps_per_epoch))

    def attach(self, schedule: Schedule) -> None:
        """Step one more, from here to the end of the run."""
        mark_stepped(schedule.scheduler.optimizer)
        self.all.append(schedule)

    def step(self, stepped: Collection[str]) -> None:
        """Step those that go by steps, after an optimizer step.

        Args:
            stepped: Names of the optimizers that a manual step has stepped.
        """
        for schedule in self.all:
            if schedule.interval == "step":
                optimizer = schedule.scheduler.optimizer
                has_stepped = not self._is_manual or self._name_of(optimizer) in stepped
                if has_stepped and self._steps_by(optimizer) > schedule.after_steps:
                    schedule.step()

    def end_epoch(self, *, is_extra: bool) -> None:
        """Step those that go by epochs, and publish the rates that they have changed.

        Args:
            is_extra: True if the epoch was validated only because the run ends: a plateau ignores that.
        """
        for schedule in self.all:
            if schedule.interval == "epoch":
                self._end_epoch_of(schedule, is_extra=is_extra)

    def _end_epoch_of(self, schedule: Schedule, *, is_extra: bool) -> None:
        progress, optimizer = self._progress, schedule.scheduler.optimizer
        # Still warming up
        if self._steps_by(optimizer) <= schedule.after_steps:
            return
        previous = largest_lr(optimizer)
        if isinstance(schedule.scheduler, ReduceLROnPlateau):
            monitor = schedule.monitor or self._monitor
            is_unvalidated = is_extra or progress.validated_step < progress.epoch_first_step
            if monitor.startswith("val_") and is_unvalidated:
                return
            schedule.scheduler.step(Metrics(progress.epoch_metrics)[monitor])
        else:
            schedule.step()
        if largest_lr(optimizer) != previous:
            self._publish_change(previous, "schedule", self._name_of(optimizer))

    def set_lr(self, lr: float, group: int | None, name: str | None) -> None:
        """Set a learning rate by hand; schedules continue from it, multiplied. See `scale_lr`.

        Args:
            lr: Of the largest group, the others are scaled alike; or of `group` alone.
            group: Index of one parameter group.
            name: Of the optimizer; None for the first.
        """
        name = name or next(iter(self._optimizers))
        optimizer = self._optimizers[name]
        previous = largest_lr(optimizer)
        scale_lr(optimizer, lr, group=group, schedulers=[each.scheduler for each in self.all])
        self._publish_change(previous, "command", name)

    def close(self) -> None:
        """Note the rates that the attached schedules leave behind, for the next run to undo."""
        schedulers = [each.scheduler for each in self.all]
        self.given_rates.end(schedulers[self._lasting :], schedulers[: self._lasting])

    def _publish_change(self, previous: float, source: str, name: str) -> None:
        self._reporter.publish(
            LearningRateChanged(
                lr=largest_lr(self._optimizers[name]),
                previous=previous,
                source=source,
                optimizer=name if len(self._optimizers) > 1 else "",
                **self._reporter.position(),
            )
        )

    def _name_of(self, optimizer: torch.optim.Optimizer) -> str:
        return next(name for name, each in self._optimizers.items() if each is optimizer)

    def _steps_by(self, optimizer: torch.optim.Optimizer) -> int:
        """Return how many of the run's steps have stepped an optimizer."""
        progress = self._progress
        return progress.steps_of[self._name_of(optimizer)] if self._is_manual else progress.step

    def _steps_left(self, schedule: Schedule, steps_per_epoch: int | None) -> int | None:
        """Return how often a schedule will step until the run is complete; None where that is unknown."""
        progress, epochs, max_steps = self._progress, self._limits.epochs, self._limits.max_steps
        # Not every step is one of its optimizer
        if schedule.interval == "step" and len(self._optimizers) > 1:
            return None
        if schedule.interval == "epoch":
            return None if epochs is None or max_steps is not None else epochs - progress.epoch
        totals = [] if max_steps is None else [max_steps]
        if epochs is not None and steps_per_epoch is not None:
            totals.append(epochs * steps_per_epoch)
        return min(totals) - max(progress.step, schedule.after_steps) if totals else None
