"""Saving: the content of a run's checkpoints, when one is taken, and how a run is restored from one.

training thread                     Saving                                Checkpoints
───────────────                     ──────                                ───────────
a command, a decider, the end ────> is there a new state? ───state──────> copy, then the writer's thread
resume                        ────> restore the state     <──state─────── read
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from offloop.engine.best import Best, BestSoFar
from offloop.engine.bus.command_mailbox import Envelope
from offloop.engine.bus.commands import SaveCheckpoint, TagCheckpoint
from offloop.engine.callback import Handlers, OnError
from offloop.engine.checkpoint import NamedCopies
from offloop.engine.checkpoint.evaluations import EvaluationRecord
from offloop.engine.checkpoint.memory import is_out_of_memory
from offloop.engine.encoding import decode, encode
from offloop.engine.errors import ConfigError, LossError, as_failure, describe
from offloop.engine.events import CheckpointFailed, CheckpointSaved, EpochEnd, Event
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.observers.event_log import rewind
from offloop.engine.paths import absolute_path
from offloop.engine.position.exactness import Doubt, ResumeReport
from offloop.engine.recovery import run_state
from offloop.engine.recovery.keepers import Keeper
from offloop.engine.recovery.rank_states import load_together, own_part, state_of_rank
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.recovery.saved_state import check_saveable, check_state, restoring
from offloop.engine.recovery.user_state import UserState
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.occupancy import KeepRequest

logger = logging.getLogger("offloop")


class Saving:
    """Takes the checkpoints of one run, and restores it from one. Training thread only."""

    def __init__(
        self,
        loop: TrainingLoop,
        checkpoints: Checkpoints,
        *,
        handlers: Sequence[Handlers],
        user_state: UserState,
        logs: DurableLogs,
        best: BestSoFar,
        resume_lr: float | None,
        fail: Callable[[BaseException], None],
        publish: Callable[[Event], None],
    ) -> None:
        """Save the run of `loop`.

        Args:
            loop, handlers, user_state, best: Have the state that is saved.
            checkpoints: Writes and reads it.
            logs: Knows the milestones that the logs on disk may lack.
            resume_lr: The learning rate that a resumed run is to continue with; None for that of the checkpoint.
            fail: Ends the run as failed.
            publish: For `CheckpointFailed`.
        """
        self.lr_to_set: float | None = None
        """The learning rate to set once the schedules are attached; None for none."""
        self.cadences: list[int] = []
        """Numbers of steps at whose multiples callbacks ask for checkpoints."""
        self._loop = loop
        self._progress = loop.progress
        self._checkpoints = checkpoints
        self._handlers = handlers
        self._user_state = user_state
        self._logs = logs
        self._best = best
        self._resume_lr = resume_lr
        self._fail = fail
        self._publish = publish
        # What happens where the state cannot be saved; None: that is not checked.
        self._on_unsaveable: OnError | None = None
        # The state of callbacks is checked with the first checkpoint: only then are they asked for it.
        self._are_callbacks_checked = False
        # Of the last checkpoint.
        self._saved_moment = (-1, 0, False)
        # The checkpoint that is being restored; None again once the random states are.
        self._continuation: run_state.Continuation | None = None

    # Taking checkpoints --------------------------------------------------------------------------

    def save_for(self, envelope: Envelope[Any]) -> None:
        """Save or tag a checkpoint for a command; its future completes when that is durable."""
        command = envelope.command
        if isinstance(command, SaveCheckpoint):
            owners = self._checkpoints.owners_among(envelope.givers)
            self.save(command.reason, envelope.future, owners=owners)
            return
        assert isinstance(command, TagCheckpoint)
        tag = functools.partial(self._checkpoints.tag, command.tag, move=command.move, future=envelope.future)
        step = self._progress.step
        if command.checkpoint is not None:
            tag(step=step, which=command.checkpoint)
            return
        # A checkpoint that was just taken is of this very state
        is_taken = self._saved_moment == self._moment() and self._checkpoints.failed_step != step
        # Only rank 0 knows whether it has failed
        if not self._loop.strategy.agree(is_taken):
            try:
                self.save("manual")
            except BaseException as error:
                # The other ranks, which may have saved, count the tag that follows
                self._checkpoints.refuse(error)
                raise
        tag(step=step)

    def save_last(self, reason: str) -> None:
        """Take the last checkpoint of a run, if a callback wants one and there is something to save.

        None is taken of a run that was cancelled between two batches of a step: it has lost the gradients of the
        first batch, and the checkpoint before is complete.
        """
        # Rank 0 has the owners, and knows what is durable
        if self._loop.strategy.agree(self._wants_last()):
            self.save(reason, owners=self._checkpoints.save_at_end)

    def _wants_last(self) -> bool:
        """Return whether a last checkpoint is to be taken. Waits for the writer."""
        if not self._checkpoints.save_at_end or not self._loop.has_whole_steps or self._is_saved():
            return False
        if not self._loop.can_be_continued():
            logger.warning(
                "there is no last checkpoint: the weights of step %d are not finite, and a run cannot continue "
                "from them",
                self._progress.step,
            )
            return False
        return True

    def save(
        self,
        reason: str,
        future: Future[CheckpointSaved] | None = None,
        *,
        owners: tuple[str, ...] = (),
    ) -> None:
        """Take a checkpoint of this moment. At a step boundary.

        Args:
            reason: Why, for the manifest and the events.
            future: Completed when the checkpoint is durable or has failed.
            owners: The callbacks whose retention counts it; none: that of every callback.
        """
        loop, progress = self._loop, self._progress
        # Host sync: the sums of the epoch are part of the state
        loop.reporter.flush()
        try:
            if not loop.can_be_continued():
                raise LossError(
                    f"the weights of step {progress.step} are not finite, and a run cannot continue from them: the "
                    'checkpoint before stays the newest. on_nonfinite="warn" saves them'
                )
            state = self._state_to_save()
        except BaseException as error:
            # An exception of a `state_dict()`, perhaps: no future may be waiting for it
            logger.exception("the checkpoint of step %d was not saved", progress.step)
            described = describe(as_failure(error))
            self._checkpoints.refuse(error)
            self._publish(CheckpointFailed(saved_step=progress.step, reason=reason, error=described))
            if not is_out_of_memory(error):
                raise
            if future is not None:
                future.set_exception(error)
            return
        # A rank that finds no free snapshot, or cannot write, tells the others from its writer's thread
        is_accepted = self._checkpoints.save(
            own_part(state, self._handlers) if loop.strategy.rank else state,
            position={"epoch": progress.epoch, "step": progress.step, "batch": progress.batch},
            metrics=self._metrics_of_now(),
            reason=reason,
            owners=owners,
            future=future,
        )
        if is_accepted:
            self._saved_moment = self._moment()

    def _is_saved(self) -> bool:
        """Return whether this very moment is on disk already. Waits for the writer."""
        if self._saved_moment != self._moment():
            return False
        if not self._checkpoints.flush():
            return True  # it is still being written, or nothing can be written any more
        return self._progress.step in self._checkpoints.saved

    def _moment(self) -> tuple[int, int, bool]:
        """Return steps, epochs and whether an epoch has begun: equal only for moments with the same state."""
        progress = self._progress
        epochs = progress.epoch + (progress.phase == "after_epoch")
        return progress.step, epochs, progress.phase == "in_epoch"

    def _metrics_of_now(self) -> dict[str, float]:
        """Return the metrics that were computed at this very step: only they may say which checkpoint is best."""
        progress = self._progress
        is_validated = progress.validated_step == progress.step
        is_epoch_over = progress.phase == "after_epoch"
        return {
            name: value
            for name, value in {**progress.latest, **progress.epoch_metrics}.items()
            if (is_validated if name.startswith("val_") else is_epoch_over)
        }

    def keep(self, request: KeepRequest, *, owner: str) -> str:
        """Keep the checkpoints that a callback, the owner, wants; return its name.

        Raises:
            ConfigError: Another callback has copies under the same names in `save_dir`.
        """
        copies = None
        if request.save_dir is not None:
            save_dir = absolute_path(request.save_dir)
            copies = NamedCopies(save_dir, self._checkpoints.directory, request.name_of)
        retention = msgspec.structs.replace(request.retention, owner=owner)
        try:
            self._checkpoints.keep(Keeper(retention, request.save_at_end, copies, request.copy_best_only))
        except ValueError as error:
            raise ConfigError(f"{error}: give one of them another save_dir or filename") from None
        self._check_at_first_step(request.on_unsaveable)
        if request.every_n_steps is not None:
            self.cadences.append(request.every_n_steps)
        return owner

    # The state -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note the tensors that the script has made, on their device and before a checkpoint is restored."""
        self._user_state.begin()

    def watch(self) -> None:
        """Watch for state that checkpoints do not hold. After the deciders of `TrainStart`.

        What deciders set up at the start, they set up in a resumed run too.
        """
        loop = self._loop
        schedulers = [each.scheduler for each in loop.schedules.all]
        self._user_state.watch([*schedulers, loop.setup.train_loader, *loop.validator.loaders.values()])

    def _state_to_save(self) -> dict[str, Any]:
        """Return the state of this moment. The first time, check that the state of callbacks can be saved.

        A callback that fails to return its state ends the run, as one whose state cannot be saved does, unless
        `on_error` of the `ModelCheckpoint` says otherwise.
        """
        try:
            state = self._capture(self._handlers)
        except BaseException as error:
            if self._on_unsaveable == "raise" and not is_out_of_memory(error):
                # Here, or the command that asked for the checkpoint would take the error for its own
                self._fail(error)
            raise
        if self._on_unsaveable is not None and not self._are_callbacks_checked:
            self._are_callbacks_checked = True
            self._check_saveable({"callbacks": state["callbacks"]})
        return state

    def _capture(self, handlers: Sequence[Handlers]) -> dict[str, Any]:
        """Return the state of this moment, with that of these callbacks. Tensors are live, not copied."""
        state = run_state.capture(self._loop, handlers, self._best.monitor)
        self._user_state.capture(state)
        if self._resume_lr is not None:
            # It has been set. An attempt that continues this one does not set it again
            state["resume_lr"] = self._resume_lr
        best = self._best.moment
        state["best"] = None if best is None else dataclasses.asdict(best)
        state["history"] = [encode(event).decode() for event in self._progress.history]
        state["milestones"] = [encode(event).decode() for event in self._logs.pending()]
        return state

    def _check_at_first_step(self, on_error: OnError) -> None:
        """Check at the first step whether a checkpoint can be saved. Before that step.

        Callbacks are asked for their state only when a checkpoint is taken, so theirs is checked with the first one.

        Args:
            on_error: `"raise"` ends the run if a checkpoint cannot be saved, `"isolate"` logs it.
        """
        if self._on_unsaveable is None:
            self._loop.hooks.once("after_step", lambda: self._check_saveable(None))
        # Of several callbacks that save, one is enough to end the run
        if self._on_unsaveable != "raise":
            self._on_unsaveable = on_error

    def _check_saveable(self, state: Mapping[str, Any] | None) -> None:
        """Raise, or log, what can never be saved in a state; None: in that of this moment without callbacks."""
        try:
            check_saveable(self._capture(()) if state is None else state)
        except Exception as error:
            # Memory that is missing now may be there for the next checkpoint
            is_certain = not is_out_of_memory(error)
            if self._on_unsaveable == "raise" and is_certain:
                self._fail(error)
                raise
            logger.error("%s", error)

    # Resuming ------------------------------------------------------------------------------------

    def load(self, which: str | int | Path) -> None:
        """Restore a checkpoint, and rewind the logs to it. Blocks.

        Random states and the loader follow when the loop gets there.

        Args:
            which: As `CheckpointReader.find` takes it.

        Raises:
            CheckpointError: There is none, or it is damaged.
            ConfigError, WeightsError: It is of another model or other optimizers.
        """
        strategy = self._loop.strategy
        loaded = load_together(self._checkpoints, which, strategy)
        with restoring(loaded.info.path, "ranks"):
            own = state_of_rank(loaded, rank=strategy.rank, world_size=strategy.world_size)
        state = check_state(own.state, loaded.info.path)
        report = ResumeReport(str(loaded.info.path))
        resumed = run_state.Continuation(state, report, loaded.info.manifest.attempt, own.metrics)
        resumed.restore(self._loop, self._handlers)
        with restoring(resumed.path, "trainer"):
            self._user_state.restore(state, report)
        if self._resume_lr is not None and state.get("resume_lr") != self._resume_lr:
            self.lr_to_set = self._resume_lr
            report.take(f"the learning rate, {self._resume_lr}")
            report.lower("approximate", f"the learning rate is set to {self._resume_lr}")
        with restoring(resumed.path, "best"):
            self._best.moment = msgspec.convert(state["best"], Best | None)
        with restoring(resumed.path, "history"):
            history = [decode(each.encode()) for each in state["history"]]
        self._progress.history = [event for event in history if isinstance(event, EpochEnd)]
        self._loop.resumed, self._continuation = resumed.point, resumed
        self._checkpoints.parent = loaded.info.name
        self._checkpoints.evaluations.resume(
            EvaluationRecord(self._checkpoints.directory).read().values(),
            attempt=self._checkpoints.attempt,
            step=self._progress.step,
        )
        if strategy.rank:
            # The logs are rank 0's
            return
        with restoring(resumed.path, "milestones"):
            rewind(
                self._checkpoints.directory,
                attempt=resumed.attempt,
                taken=state["taken"],
                milestones=state.get("milestones", []),
            )

    def restore_schedule(self) -> None:
        """Restore the state of the schedule attached last, while a run is being resumed."""
        if self._continuation is not None:
            self._continuation.restore_schedule(self._loop)

    def finish_resuming(self, doubts: Iterable[Doubt]) -> Event:
        """Restore the random states, the last thing before training continues.

        Args:
            doubts: What may differ in how the loaders continue.

        Returns:
            The event that tells how exact the resume is.
        """
        assert self._continuation is not None
        continuation, self._continuation = self._continuation, None
        continuation.restore_random(self._loop, doubts)
        report, strategy = continuation.report, self._loop.strategy
        # Rank 0's report is that of the run
        for rank, (exactness, reasons) in enumerate(strategy.gather((report.exactness, report.reasons))):
            if rank != strategy.rank:
                for reason in reasons:
                    report.lower(exactness, reason)
        return report.event(self._loop.reporter.position())
