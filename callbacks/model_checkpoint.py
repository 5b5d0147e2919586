"""ModelCheckpoint: when to save, which checkpoints to keep, which is best."""

import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from offloop.callbacks.checkpoint_name import CheckpointName
from offloop.engine import (
    Best,
    Callback,
    CheckpointReader,
    CheckpointSaved,
    ConfigError,
    EpochEnd,
    Retention,
    Run,
    StepPoint,
    TrainStart,
    ValidationEnd,
    checks,
    decides,
    in_step,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.monitor import EVALUATED, Mode, Monitor

DEFAULT_FILENAME: Final = "epoch={epoch}-step={step}"


class ModelCheckpoint(Callback):
    """Saves checkpoints of the whole run, from which it resumes bit for bit.

    Training waits for one copy in memory and continues while that is written. Older checkpoints are removed only once
    the new one is durable (`CheckpointSaved`). The best is chosen in the training thread, so the choice does not depend
    on the speed of the disk. If saving the best fails, the previous best counts again.

    A run can have several, each with its own best, retention and copies; a checkpoint that two of them want is saved
    once. `result.best` is that of the first one with a `monitor`, unless `Trainer(monitor=...)` is given.

    With several processes, rank 0 decides when to save, `every_seconds` by its clock, and all save at that step.
    """

    needs_run_dir = True
    steers = False
    # It touches no tensor: it asks for checkpoints, and the run's commands are rank 0's
    ranks = "first"

    @explains_arguments()
    def __init__(
        self,
        monitor: str | None = None,
        *,
        mode: Mode = "auto",
        save_best_only: bool = False,
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_seconds: float | None = None,
        keep_last: int | None = 2,
        keep_every_n_steps: int | None = None,
        save_dir: "str | Path | None" = None,
        filename: str | None = None,
    ) -> None:
        """Choose when to save and what to keep.

        Args:
            monitor: Key of the metric by which the best is chosen. `eval_...` is one of checkpoints that are evaluated
                beside training: each is kept until then, and the best is known later. None: that of
                `Trainer(monitor=...)`, else `val_loss`, or `train_loss` without a validation.
            mode: Whether less (`"min"`) or more (`"max"`) is better. `"auto"` takes it from the metric or its name.
            save_best_only: Save only when the metric improves, and at the end (`save_last`). With `eval_...` all are
                saved, for their evaluation, and only the best are copied to `save_dir`.
            save_top_k: Number of best checkpoints to keep, at least 1.
            save_last: Save when training ends: at a limit, a stop, a signal or a cancellation.
            every_n_epochs: Save after every n-th epoch, at least 1. None means 1, unless another option says when.
            every_n_steps: Save after every n-th optimizer step, at least 1.
            every_seconds: Save when so many seconds, above 0, have passed since the last save. The step depends on
                the machine.
            keep_last: Number of newest checkpoints to keep, at least 1; 1 keeps 2. None keeps all.
            keep_every_n_steps: Keep checkpoints at multiples of this for good, at least 1.
            save_dir: Directory for further copies of the checkpoints that are kept, under names of your own: hard links
                on the same disk, else copies. With `save_best_only` only the best ones. Several runs can share it.
            filename: Names of these copies, in Python's format language with `epoch`, `step`, `batch`, `attempt` and
                metrics: `"epoch={epoch}-val_loss={val_loss:.3f}"`. A metric that was not computed at the step of the
                checkpoint is `nan`. If several get one name, it belongs to the newest (with `save_best_only` the best)
                and the others get numbers: `"best"` is always the best one. None: `"epoch={epoch}-step={step}"`.

        Raises:
            ConfigError: A value is out of range, `save_best_only` comes with an interval, or `filename` has an unknown
                key.
        """
        for name, value in (
            ("save_top_k", save_top_k),
            ("every_n_epochs", every_n_epochs),
            ("every_n_steps", every_n_steps),
            ("keep_last", keep_last),
            ("keep_every_n_steps", keep_every_n_steps),
        ):
            hint = "; keep_last=None keeps all" if name in ("save_top_k", "keep_last") else ""
            checks.whole_number(name, value, optional=True, hint=hint)
        checks.flag("save_best_only", save_best_only)
        checks.flag("save_last", save_last)
        checks.number("every_seconds", every_seconds, above=0, finite=False, optional=True, unit="seconds")
        has_interval = not (every_n_epochs is None and every_n_steps is None and every_seconds is None)
        # Whether a checkpoint is the best is known only once it was saved and evaluated: then all are saved
        is_evaluated = isinstance(monitor, str) and monitor.startswith(EVALUATED)
        if save_best_only and has_interval and not is_evaluated:
            raise ConfigError("save_best_only saves when the metric improves: leave out every_...")
        if filename is not None and save_dir is None:
            raise ConfigError(
                "filename names copies in a directory of yours: give save_dir too. The run's own checkpoints are "
                "<run_dir>/<run_id>/checkpoints/step-..."
            )
        self.save_dir = None if save_dir is None else Path(save_dir).expanduser().absolute()
        self._name = CheckpointName(DEFAULT_FILENAME if filename is None else filename)
        self.mode: Mode = mode
        self.monitor = None if monitor is None else Monitor(monitor, mode, of_checkpoints=True)
        self.best_by = None if monitor is None else (monitor, mode)
        self.save_best_only = save_best_only
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.every_n_epochs = every_n_epochs if has_interval or (save_best_only and not is_evaluated) else 1
        self.every_n_steps = every_n_steps
        self.every_seconds = every_seconds
        # None where no option needs a step hook: steps then have no overhead.
        self.look_every_n_steps = every_n_steps if every_seconds is None else 1
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.reset()

    def reset(self) -> None:
        # The callback's own monitor, or from TrainStart on that of the run
        self._watched = self.monitor
        if self._watched is not None:
            self._watched.best = None
        # Written by the training thread, which replaces both objects and changes neither. Any thread reads `best`.
        self._best_on_disk: Best | None = None
        self._pending: list[tuple[Best, Future[CheckpointSaved]]] = []
        self._run_dir: Path | None = None
        # The engine's name for this callback as an owner of checkpoints
        self._owner = ""
        self._saved_at = 0.0
        # The step at which the latest best was saved
        self._best_step = -1

    @property
    def best(self) -> Best | None:
        """The best moment by this callback's metric that is on disk, with its path. Any thread, also after a run.

        Blocks on the file system where the metric is one of evaluated checkpoints.
        """
        watched = self._watched
        if watched is not None and watched.is_evaluated:
            if self._run_dir is None:
                return None
            rules = Retention(monitor=watched.key, mode=watched.direction, owner=self._owner)
            return Best.among(CheckpointReader(self._run_dir).checkpoints(), rules)
        for best, future in reversed(self._pending):
            if future.done() and not _has_failed(future):
                return dataclasses.replace(best, path=future.result().path)
        return self._best_on_disk

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        if self.monitor is None and (self._watched is None or self._watched.key != run.default_monitor):
            self._watched = Monitor(run.default_monitor, self.mode)
        assert self._watched is not None
        self._watched.begin(run)
        # `needs_run_dir` sees to it.
        assert run.dir is not None
        # The best of an earlier attempt is known without its path.
        if self._best_on_disk is not None:
            self._best_on_disk = self._best_on_disk.located(CheckpointReader(run.dir).checkpoints())
        self._run_dir = run.dir
        self._saved_at = time.monotonic()
        retention = Retention(
            keep_last=self.keep_last,
            save_top_k=self.save_top_k,
            monitor=self._watched.key,
            mode=self._watched.direction,
            keep_every_n_steps=self.keep_every_n_steps,
        )
        self._owner = run.trainer.keep_checkpoints(
            retention,
            save_at_end=self.save_last,
            save_dir=self.save_dir,
            name_of=self._name,
            copy_best_only=self.save_best_only,
            on_unsaveable=self.on_error or "raise",
            every_n_steps=self.every_n_steps,
        )

    @in_step(every_n_steps="look_every_n_steps")
    def after_step(self, point: StepPoint) -> None:
        due = self.every_n_steps is not None and point.step % self.every_n_steps == 0
        if self.every_seconds is not None and time.monotonic() - self._saved_at >= self.every_seconds:
            due = True
        if due:
            self._save(point.run, "interval")

    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self._name.check(event)
        self._judge(event, run)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._name.check(event)
        self._judge(event, run)
        due = self.every_n_epochs is not None and (event.epoch + 1) % self.every_n_epochs == 0
        # A best that was saved at the epoch's validation is the same state.
        if due and event.step != self._best_step:
            self._save(run, "interval")

    def state_dict(self) -> Mapping[str, Any]:
        if self._watched is None:
            return {}
        # A best that is still being written counts: it may be the checkpoint that this state is saved in.
        best = self._pending[-1][0] if self._pending else self._best_on_disk
        return {
            "monitor": self._watched.state_dict(),
            "best": None if best is None else dataclasses.asdict(dataclasses.replace(best, path=None)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "monitor" in state:
            if self._watched is None:
                self._watched = Monitor(state["monitor"]["key"], self.mode)
            self._watched.load_state_dict(state["monitor"])
            best = state.get("best")
            if best is not None and self._watched.best == best["score"]:
                self._best_on_disk = Best(**best)

    def _judge(self, event: ValidationEnd | EpochEnd, run: Run) -> None:
        """Save if the metric has improved."""
        watched = self._watched
        assert watched is not None
        if watched.is_evaluated:
            return
        self._settle(watched)
        if self.monitor is None and watched.key not in event.metrics:
            # The run's default metric was not asked for, so a run may not compute it.
            return
        value = watched.value_at(event)
        if value is not None and watched.improves(value):
            best = Best(monitor=watched.key, score=value, epoch=event.epoch, step=event.step)
            self._pending = [*self._pending, (best, self._save(run, "best"))]
            self._best_step = event.step

    def _settle(self, watched: Monitor) -> None:
        """Update the best after checkpoints have been written; one whose write failed is not the best."""
        if not any(future.done() for _, future in self._pending):
            return
        self._best_on_disk = self.best
        failed = any(_has_failed(future) for _, future in self._pending)
        self._pending = [(best, future) for best, future in self._pending if not future.done()]
        if failed:
            latest = self._pending[-1][0] if self._pending else self._best_on_disk
            watched.best = None if latest is None else latest.score

    def _save(self, run: Run, reason: str) -> "Future[CheckpointSaved]":
        self._saved_at = time.monotonic()
        return run.checkpoint_nowait(reason, by=self._owner)


def _has_failed(future: "Future[CheckpointSaved]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
