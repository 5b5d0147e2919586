"""Occupancy: one use of a trainer at a time, and what a run offers to the steps of its trainer."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.callback import OnError
from offloop.engine.checkpoint import CheckpointInfo, Retention
from offloop.engine.errors import TrainerBusyError
from offloop.engine.events import Event
from offloop.engine.monitor import Mode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeepRequest:
    """The arguments of `TrainingProgram.keep_checkpoints`, which documents them."""

    retention: Retention
    save_at_end: bool
    save_dir: Path | None
    name_of: Callable[[CheckpointInfo], str]
    copy_best_only: bool
    on_unsaveable: OnError
    every_n_steps: int | None


class RunServices(Protocol):
    """What a run offers to its trainer. Unless they say otherwise, methods belong to the training thread."""

    @property
    def run_id(self) -> str:
        """Identity of the run."""

    def is_current_thread(self) -> bool:
        """Return whether the caller is the training thread. Any thread."""

    def publish(self, event: Event, /) -> None:
        """Publish an event of the user's. Any thread."""

    def check_schedule(self, scheduler: LRScheduler, monitor: str | None, mode: Mode, /) -> None:
        """Raise where a plateau schedule would reduce the rate while its metric improves."""

    def keep_checkpoints(self, request: KeepRequest, /) -> str:
        """Keep the checkpoints that the acting callback wants, and return its name."""

    def measured_weights(self, monitor: str, /) -> dict[str, Any]:
        """Return the state dict to which the latest value of a metric belongs."""


class Occupancy:
    """Who uses a trainer: a run, or a search, an evaluation or a prediction. At most one of them at a time."""

    def __init__(self) -> None:
        # Guards changes of the next two, which several threads and tasks may attempt at once.
        self._lock = threading.Lock()
        # Written before the training thread starts and after it has ended, so that thread reads it without the lock.
        self.run: RunServices | None = None
        self._use = ""

    def check_free(self) -> None:
        """Raise `TrainerBusyError` if the trainer is in use."""
        if self.run is not None:
            raise TrainerBusyError(_busy(self.run))
        if self._use:
            raise TrainerBusyError(
                f"this trainer is {self._use}: one thing at a time, or make another Trainer"
            )

    def check_thread(self) -> None:
        """Raise `TrainerBusyError` if a run uses the trainer and this is not its training thread."""
        run = self.run
        if run is not None and not run.is_current_thread():
            raise TrainerBusyError(
                f"{_busy(run)}; in its training thread it works: "
                "await run.call(lambda trainer: trainer.state_dict())"
            )

    def claim(self, run: RunServices) -> None:
        """Take the trainer for a run, until `release`.

        Raises:
            TrainerBusyError: It is in use.
        """
        with self._lock:
            self.check_free()
            self.run = run

    def release(self) -> None:
        """Give the trainer back."""
        with self._lock:
            self.run = None

    @contextlib.contextmanager
    def use(self, what: str, *, in_a_run: str = "await run.call(...) gets at its model") -> Iterator[None]:
        """Take the trainer for something that no run may disturb.

        Args:
            what: What that is, for the error of others.
            in_a_run: What to do instead if a run uses the trainer.

        Raises:
            TrainerBusyError: It is in use.
        """
        with self._lock:
            if self.run is not None:
                raise TrainerBusyError(f"{_busy(self.run)}; {in_a_run}")
            self.check_free()
            self._use = what
        try:
            yield
        finally:
            self._use = ""


def _busy(run: RunServices) -> str:
    return f"this trainer has run {run.run_id!r} in progress: one run at a time, or make another Trainer"
