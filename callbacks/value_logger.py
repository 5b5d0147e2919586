"""ValueLogger: base of the loggers; it decides which values are written, and when.

Steps are written at an interval, and always the last step before a validation or the end of an epoch, so that short
runs are not empty. Validations and epochs are always written, and evaluations of checkpoints, at the step of theirs.
"""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from offloop.engine import (
    Callback,
    ConfigError,
    EpochEnd,
    Evaluated,
    RunHandle,
    StepEnd,
    ValidationEnd,
    checks,
)

EVERY_SECONDS: Final = 1.0
"""Default interval: a point a second makes 36,000 in ten hours, and shows each epoch of a short run."""


Measured = StepEnd | ValidationEnd | EpochEnd | Evaluated
"""Events with values to write."""


class ValueLogger(Callback):
    """Calls `write` with the values to write, in the callback's worker thread."""

    sample_interval = 0.5

    def __init__(
        self,
        *,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        runs_in: Literal["here", "process"] | None = None,
    ) -> None:
        """Choose the interval of steps: by time (a second by default) or by steps.

        Args:
            every_seconds: Seconds between written steps, above 0. The steps depend on the machine.
            every_n_steps: Steps between written steps, at least 1. The steps are the same on every machine.
            runs_in: `"process"` writes in a process of the callback's own. None: as the class says, `"here"`.

        Raises:
            ConfigError: A value is out of range, or both are given.
        """
        if every_seconds is not None and every_n_steps is not None:
            raise ConfigError("give every_seconds or every_n_steps, not both")
        checks.number("every_seconds", every_seconds, above=0, finite=False, optional=True, unit="seconds")
        checks.whole_number("every_n_steps", every_n_steps, optional=True)
        checks.choice("runs_in", runs_in, (None, "here", "process"))
        if runs_in is not None:
            self.runs_in = runs_in
        self.every_n_steps = every_n_steps
        self.every_seconds = EVERY_SECONDS if every_seconds is None else every_seconds
        self.reset()

    def reset(self) -> None:
        self._written_at = 0.0
        # The latest step, unless it is written already.
        self._unwritten: StepEnd | None = None

    def write(self, event: Measured, values: Mapping[str, float]) -> None:
        """Write the values of a step, a validation, an epoch or an evaluation, at its step. For subclasses."""
        raise NotImplementedError

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        if self.every_n_steps is not None:
            due = event.step % self.every_n_steps == 0
        else:
            due = event.time - self._written_at >= self.every_seconds
        if due:
            self._write_step(event)
        else:
            self._unwritten = event

    def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        self.write_latest_step()
        self.write(event, event.metrics)

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.write_latest_step()
        self.write(event, event.metrics)

    def on_evaluated(self, event: Evaluated, run: RunHandle) -> None:
        if event.metrics:
            at_its_step = msgspec.structs.replace(event, step=event.of_step, epoch=event.of_epoch)
            self.write(at_its_step, event.metrics)

    def write_latest_step(self) -> None:
        """Write the latest step, unless it is written already."""
        if self._unwritten is not None:
            self._write_step(self._unwritten)

    def _write_step(self, event: StepEnd) -> None:
        self._written_at = event.time
        self._unwritten = None
        values = {"lr": event.lr} if event.loss is None else {"loss": event.loss, "lr": event.lr}
        values.update({f"lr/{name}": rate for name, rate in event.lrs.items()})
        if event.grad_norm is not None:
            values["grad_norm"] = event.grad_norm
        self.write(event, {**values, **event.metrics})
