"""Session: one run's lifetime, from checked arguments to the result; owns its thread and its shutdown.

    caller's task                 supervisor (shielded)                  training thread
    ─────────────                 ─────────────────────                  ───────────────
    starts the supervisor ──────> drainer, observers ──starts──────────> set-up, loop.run()
    waits for "done"              waits for the thread                        │
       │ cancelled?               <───────────────────────── ends ────────────┘
       └─> tells the mailbox      checkpoints durable, observers drain
           and re-raises          TrainEnd, close() of each
                                  result, "done"

A native asyncio cancellation goes through any shield, so nothing that must run to its end waits in the
caller's task: that one only tells the mailbox. The supervisor waits for the thread through any number of
cancellations. In `asyncio.run`'s final sweep, where every task is cancelled, only this is promised: the
thread has stopped and `close()` was called.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import math
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.best import Best
from offloop.engine.bus import forked
from offloop.engine.bus.command_mailbox import Envelope, Mailbox, actor
from offloop.engine.bus.commands import Need, SaveCheckpoint, Stop, TagCheckpoint
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker, result_of
from offloop.engine.callback import Handlers, OnError, StepHook, close_unused
from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    NamedCopies,
    RemoteError,
    RemoteRun,
    Retention,
)
from offloop.engine.checkpoint.memory import is_out_of_memory
from offloop.engine.config import TrainerConfig
from offloop.engine.encoding import decode, encode
from offloop.engine.errors import (
    BusClosedError,
    ConfigError,
    LossError,
    RunEndedError,
    RunNameTakenError,
    as_failure,
    describe,
    note_cancellation,
)
from offloop.engine.events import (
    CheckpointFailed,
    CheckpointSaved,
    EpochEnd,
    Event,
    Metrics,
    Sample,
    TrainEnd,
    TrainStart,
    UploadFailed,
    ValidationEnd,
)
from offloop.engine.monitor import Mode, is_better
from offloop.engine.observers.event_log import rewind
from offloop.engine.observers.observer import CallbackCosts, Worker
from offloop.engine.observers.records import Records
from offloop.engine.paths import absolute_path
from offloop.engine.position.exactness import Doubt
from offloop.engine.position.resume_report import ResumeReport
from offloop.engine.recovery import run_state
from offloop.engine.recovery.keepers import Keeper
from offloop.engine.recovery.resume_plan import Over, ResumePlan, read_run_json
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.recovery.run_dir import create_run_dir, describe_environment, write_run_json
from offloop.engine.recovery.saveable import check_saveable
from offloop.engine.recovery.saved_state import check_state, restoring
from offloop.engine.recovery.uploads import Uploads, claim_remote
from offloop.engine.recovery.user_state import UserState, own_state
from offloop.engine.result import RunResult, Status
from offloop.engine.run import Run
from offloop.engine.session.callback_tasks import CallbackTasks
from offloop.engine.session.deciders import Deciders
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.session.ownership import Monitors
from offloop.engine.session.process import enter_process, leave_process
from offloop.engine.session.thread_state import caller_state
from offloop.engine.training.activation_checkpointing import checkpointed
from offloop.engine.training.averages import measured_weights
from offloop.engine.training.freezing import select_parameters
from offloop.engine.training.kept_state import cloned
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.placement import prepare_model
from offloop.engine.training.program import TrainingProgram
from offloop.engine.weights.loading import InitialWeights

logger = logging.getLogger("offloop")

STACK_INTERVAL: Final = 10.0
"""Seconds after which the stack of a training thread that does not end is logged, and again."""


class Session:
    """One run. Made by the trainer with checked arguments, used once."""

    def __init__(
        self,
        trainer: TrainingProgram,
        *,
        run_id: str,
        config: TrainerConfig,
        base_dir: Path | None,
        resume: ResumePlan | None,
        resume_lr: float | None,
        initial_weights: InitialWeights | None,
        remote: RemoteRun | None,
        handlers: Sequence[Handlers],
        monitors: Monitors,
        make_loop: Callable[["Session"], TrainingLoop],
        claim: Callable[["Session"], None],
        release: Callable[["Session"], None],
    ) -> None:
        self.trainer = trainer  # until the end: a trainer keeps its last run, and must not be kept by it
        self.weak_trainer = weakref.ref(trainer)
        self.run_id = run_id
        self.config = config
        self.dir = None if base_dir is None else base_dir / run_id
        self.resume = resume
        self._resume_lr = resume_lr
        self._new_lr: float | None = None  # to be set when the schedules are attached
        self.initial_weights = initial_weights
        self.remote = remote
        self.uploads: Uploads | None = None  # made by the training thread before the first event
        self.monitors = monitors
        self.mailbox = Mailbox()
        self.bus = Bus(run_id=run_id, flush_interval=config.flush_interval, attention=self.mailbox.poke)
        self.lifetime = Lifetime(self.mailbox, self.bus)
        self.callbacks = CallbackTasks(
            self.bus, self.mailbox, self.lifetime, drain_timeout=config.drain_timeout
        )
        self.deciders = Deciders(self.bus, self.mailbox, self.lifetime)
        self.result: RunResult | None = None  # written by the supervisor at the end, read by everybody
        self.finished: Future[RunResult] = Future()
        self.best: Best | None = None  # written by the training thread
        self._claim, self._release = claim, release
        self._handlers = handlers
        self._started = time.perf_counter()
        self._description: dict[str, Any] = {}
        self._thread_ended = Waker()
        self._hand_over = (
            threading.Lock()
        )  # guards the next two: who ends the run, the supervisor or the thread
        self.is_abandoned = (
            False  # set on the event loop: the supervisor does not wait for the thread any more
        )
        self._has_ended_training = False  # set by the training thread as it leaves the end to the supervisor
        self.handles_signals = False  # set before the run by who takes them
        self.clock_offset = self.bus.clock.offset
        self.emit_step = self.bus.emit
        self._continuation: run_state.Continuation | None = None
        self.loop = make_loop(self)
        self.progress = self.loop.progress
        self.has_validation = bool(self.loop.validator.loaders)
        self.user_state = UserState(trainer, handlers)
        self.checkpoints: Checkpoints | None = None
        self._on_unsaveable: OnError | None = None  # what then happens; None: it is not looked for
        self._callbacks_are_unknown = True  # False once the state of callbacks was looked at
        self._upload_deadline = math.inf  # until when the end of the run waits for the remote directory
        self._saved_moment = (-1, 0, False)  # of the last checkpoint, by the training thread
        self.records = Records(self.bus, in_haste=self.lifetime.is_in_haste)
        if self.dir is not None:
            self.checkpoints = Checkpoints(
                self.dir,
                run_id=run_id,
                optimizers=self.loop.setup.optimizers,
                model=trainer.model,
                publish=self.bus.publish_or_log,
                retention=Retention(monitor=monitors.best, mode=monitors.best_direction),
                patience=self.lifetime.wait,
                records=self.records,
            )
        self.run = Run(self)
        for each in handlers:
            self.deciders.add(self.callbacks.add(each, self.run))
        self.records.watch(self.callbacks.observers)
        context = contextvars.copy_context()
        self._caller_state = caller_state()
        self.thread = Thread(context.run, self._train, name=f"offloop-training-{run_id}", daemon=False)

    # The training thread's side ------------------------------------------------------------------

    def _train(self) -> None:
        """Body of the training thread."""
        self.mailbox.places.training_thread = threading.get_ident()
        forked.watch(self.mailbox)
        try:
            with self._caller_state, torch.enable_grad():
                if self.loop.setup.device.type == "cuda":
                    torch.cuda.set_device(self.loop.setup.device)
                self._set_up()
                self.lifetime.phase = "running"
                with checkpointed(self.trainer.model, self.config.activation_checkpointing):
                    self.loop.run(self.run)
                if self._is_worth_saving() and not self._is_saved() and self._can_be_continued():
                    assert self.checkpoints is not None
                    reason = "preempt" if self.lifetime.signal_count else "final"
                    self.save(reason, owners=self.checkpoints.save_at_end)
                self.guard()
                if self.progress.ending != "cancelled" and self.lifetime.failure is None:
                    self.loop.hooks.run_all("before_train_end")
        except BaseException as error:
            if self.mailbox.is_forked:
                forked.end_process(error)
            self.lifetime.fail(error)
        finally:
            if self.mailbox.is_forked:
                forked.end_process(None)
            self._end_training()

    def _end_training(self) -> None:
        """Let go of what must not outlive training, and tell the supervisor. Nothing here may keep it waiting."""
        steps = (
            self.loop.source.release,  # may wait some seconds for loader workers
            self.loop.close,
            self.loop.frozen.thaw_all,
            self.mailbox.end,
            functools.partial(leave_process, self.run_id),
        )
        for step in steps:
            try:
                step()
            except BaseException as error:
                self.lifetime.fail(error)
        self.mailbox.places.training_thread = None  # the system gives this number to other threads later
        if self._is_alone():
            try:
                # In an empty context: the one of this thread may say that an event loop runs here, the caller's.
                contextvars.Context().run(anyio.run, self._end_alone)
            except BaseException:
                logger.exception("run %s could not close its callbacks", self.run_id)
        else:
            self._thread_ended.wake()

    def _is_alone(self) -> bool:
        """True if the training thread has to end the run itself, because the event loop or the supervisor is gone."""
        with self._hand_over:
            self._has_ended_training = not self.is_abandoned
            return self.is_abandoned or self.lifetime.event_loop_is_dead

    def _set_up(self) -> None:
        """Do what must be done before the first event and may block."""
        for metrics in (self.loop.train_metrics, *self.loop.validator.metrics.values()):
            if metrics is not None:
                metrics.load_packages()
        try:
            if self.initial_weights is not None:  # first: what does not fit leaves no directory behind
                weights = self.initial_weights.load_into(self.trainer.model)
                self.progress.init_from = weights.origin
                self.initial_weights = (
                    None  # a state dict may be large, and the session is kept for its result
                )
            if self.dir is not None:
                self._open_dir(self.dir)
        except BaseException:
            if not self._description:  # it was not made, or is another run's: nothing may be written there
                self.dir = None
            raise
        prepare_model(self.trainer)
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed)
        if not self.trainer.model.training:
            self.trainer.model.train()  # left in eval mode as a whole, as from_pretrained() does
        self.loop.frozen.freeze(select_parameters(self.trainer.model, self.config.freeze))
        self.user_state.begin()
        if self.resume is not None:
            if self.resume.which is not None:
                self._load(self.resume.which)
                if self.resume.over is not None:
                    self._stay_over(self.resume.over)
            else:  # it begins afresh under its name
                assert self.dir is not None
                rewind(self.dir, attempt=self.progress.attempt, taken=None)

    def _stay_over(self, over: Over) -> None:
        """Train no further: a callback has ended this run in an earlier attempt."""
        logger.warning(
            'run %s is over, since %s has stopped it: %s. resume="last" goes on all the same',
            self.run_id,
            over.stopped_by,
            over.reason,
        )
        self.progress.ending, self.progress.reason = "stopped", over.reason
        self.progress.stopped_by = over.stopped_by

    def _open_dir(self, directory: Path) -> None:
        """Make the run's directory, or enter that of the run that is continued."""
        attempt = 0 if self.resume is None else self.resume.attempt
        description = {
            "run_id": self.run_id,
            "attempt": attempt,
            "created": time.time(),
            "status": "running",
            "config": self.config.as_settings(),
            "init_from": self.progress.init_from,
            **describe_environment(),
        }
        assert self.checkpoints is not None
        if self.resume is not None:
            self.checkpoints.claim()
            self.checkpoints.open()  # takes the lock: a run that is going on elsewhere is left alone
            self.checkpoints.attempt = self.progress.attempt = attempt
            if self.resume.over is not None:  # so it stays, even if this attempt is killed
                description |= self.resume.over._asdict()
            before = read_run_json(directory)
            description["created"] = before.get("created", description["created"])
            description["init_from"] = self.progress.init_from or before.get("init_from")
        if self.remote is not None:
            claim_remote(self.remote, description, is_new=self.resume is None, until=self._is_cancelled)
        if self.resume is None:
            create_run_dir(directory, description)
            self.checkpoints.claim()
        else:
            write_run_json(directory, description)
        self._description = description
        if self.remote is not None:
            uploads = Uploads(
                self.remote,
                directory,
                self.checkpoints,
                publish=self.bus.publish_or_log,
                failed=self._upload_failed,
            )
            uploads.start()  # fails where the system gives no thread: then there is nothing to wait for
            self.uploads, self.checkpoints.on_saved = uploads, uploads.wake

    def _is_cancelled(self) -> bool:
        return self.mailbox.cancelled

    def _upload_failed(self, error: CheckpointError) -> None:
        """End the run if that was asked for. Upload thread, or the event loop at the end."""
        assert self.config.remote is not None
        if self.config.remote.on_error == "raise":
            self._upload_deadline = 0.0  # nobody waits for a store that has ended the run
            self.lifetime.fail(error)

    def _load(self, which: str | int | Path) -> None:
        """Put back what a checkpoint holds; random states and the loader follow when the loop gets there."""
        assert self.checkpoints is not None
        loaded = self.checkpoints.load(which)
        state = check_state(loaded.state, loaded.info.path)
        attempt = loaded.info.manifest.attempt
        resumed = run_state.Continuation(state, ResumeReport(str(loaded.info.path)), attempt)
        resumed.restore(self.loop, self._handlers)
        with restoring(resumed.path, "trainer"):
            self.user_state.restore(state, resumed.report)
        if self._resume_lr is not None and state.get("resume_lr") != self._resume_lr:
            self._new_lr = self._resume_lr
            resumed.report.take(f"the learning rate, {self._new_lr}")
            resumed.report.lower("approximate", f"the learning rate is set to {self._new_lr}")
        with restoring(resumed.path, "best"):
            self.best = msgspec.convert(state["best"], Best | None)
        with restoring(resumed.path, "history"):
            history = [decode(each.encode()) for each in state["history"]]
        self.progress.history = [event for event in history if isinstance(event, EpochEnd)]
        self.loop.resumed, self._continuation = resumed.point, resumed
        self.checkpoints.parent = loaded.info.name
        assert self.dir is not None
        with restoring(loaded.info.path, "milestones"):
            missing = state.get("milestones", [])
            rewind(self.dir, attempt=attempt, taken=state["taken"], milestones=missing)

    def save(
        self,
        reason: str,
        future: "Future[CheckpointSaved] | None" = None,
        *,
        owners: tuple[str, ...] = (),
    ) -> None:
        """Take a checkpoint of this moment, for `owners`. Training thread, at a step boundary.

        Raises:
            ConfigError: The run has no directory to save into.
        """
        if self.checkpoints is None:
            raise ConfigError(Need.DIRECTORY.value)
        loop = self.loop
        loop.reporter.readback.flush()  # host sync: what the epoch has summed up must be here
        try:
            if not loop.can_be_continued():
                raise LossError(
                    f"the weights of step {loop.progress.step} are not finite, and a run cannot go on from them: "
                    'the checkpoint before stays the newest. on_nonfinite="warn" saves them'
                )
            state = self._state_to_save()
        except BaseException as error:  # out of a state_dict; no giver of a command may be waiting for it
            logger.exception("the checkpoint of step %d was not saved", loop.progress.step)
            described = describe(as_failure(error))
            self.bus.publish_or_log(
                CheckpointFailed(saved_step=loop.progress.step, reason=reason, error=described)
            )
            if not is_out_of_memory(error):
                raise
            if future is not None:
                future.set_exception(error)
            return
        is_accepted = self.checkpoints.save(
            state,
            position={"epoch": loop.progress.epoch, "step": loop.progress.step, "batch": loop.progress.batch},
            metrics=self._metrics_of_now(),
            reason=reason,
            owners=owners,
            future=future,
        )

        if is_accepted:
            self._saved_moment = self._moment()

    def _state_to_save(self) -> dict[str, Any]:
        """Return the state of this moment; the first time it is looked at whether that of callbacks can be saved.

        A callback that cannot say its state ends the run, as one whose state cannot be saved does, unless
        `on_error` of the `ModelCheckpoint` says otherwise.
        """
        try:
            state = self._capture(self._handlers)
        except BaseException as error:
            if self._on_unsaveable == "raise" and not is_out_of_memory(error):
                self.lifetime.fail(
                    error
                )  # a command that asked for the checkpoint would take the error for its own
            raise
        if self._on_unsaveable is not None and self._callbacks_are_unknown:
            self._callbacks_are_unknown = False
            self._check_saveable({"callbacks": state["callbacks"]})
        return state

    def _capture(self, handlers: Sequence[Handlers]) -> dict[str, Any]:
        """Return the state of this moment, with that of these callbacks. Tensors are live, not copied."""
        state = run_state.capture(self.loop, handlers, self.monitors.best)
        self.user_state.capture(state)
        if self._resume_lr is not None:
            state["resume_lr"] = self._resume_lr  # it has been set, and is not set again
        state["best"] = None if self.best is None else dataclasses.asdict(self.best)
        state["history"] = [encode(event).decode() for event in self.progress.history]
        state["milestones"] = [encode(event).decode() for event in self.records.unsettled()]
        return state

    def check_state_at_first_step(self, on_error: OnError) -> None:
        """Find out at the first step whether a checkpoint can be saved. Training thread, before that step.

        Callbacks are asked for their state only when a checkpoint is taken, so theirs is looked at with the first one.

        Args:
            on_error: Whether the run ends if not, or the log says so.
        """

        if self._on_unsaveable is None:
            self.loop.hooks.once("after_step", lambda: self._check_saveable(None))
        if self._on_unsaveable != "raise":  # of several that save, one is enough to end the run
            self._on_unsaveable = on_error

    def _check_saveable(self, state: Mapping[str, Any] | None) -> None:
        """Raise, or log, what can never be saved in a state; None: in that of this moment without callbacks."""
        try:
            check_saveable(self._capture(()) if state is None else state)
        except Exception as error:
            is_certain = not is_out_of_memory(error)  # memory may be there at the next one
            if self._on_unsaveable == "raise" and is_certain:
                self.lifetime.fail(
                    error
                )  # a command that asked for the checkpoint would take the error for its own
                raise
            logger.error("%s", error)

    def measured_weights(self, monitor: str) -> dict[str, Any]:
        """Return the state dict that a metric made just now belongs to. Training thread; live tensors."""
        callbacks = [each.callback for each in self._handlers]
        return measured_weights(callbacks, self.trainer.model, monitor)

    def guard(self) -> None:
        """Call before somebody's code that may change model or optimizers: a checkpoint may still be copied from them.

        Training thread. The device waits, if there is a copy on its way; the host does not.
        """
        if self.checkpoints is not None:
            self.checkpoints.guard()

    def _is_worth_saving(self) -> bool:
        """True if a last checkpoint is wanted, and this moment is one that a run can go on from."""
        # After a second signal only what is being written already is waited for. A run that was cancelled between two
        # batches of a step has lost the gradients of the first: the checkpoint before has everything.
        is_over = self.resume is not None and self.resume.over is not None  # nothing was trained
        wanted = self.checkpoints is not None and self.checkpoints.save_at_end and not is_over
        return bool(wanted) and self.lifetime.signal_count < 2 and self.loop.has_whole_steps

    def _can_be_continued(self) -> bool:
        """True if a run can go on from the weights of now; else the log says that no checkpoint is taken of them."""
        is_usable = self.loop.can_be_continued()
        if not is_usable:
            logger.warning(
                "there is no last checkpoint: the weights of step %d are not finite, and a run cannot go on from them",
                self.progress.step,
            )
        return is_usable

    def _is_saved(self) -> bool:
        """True if this very moment is on disk already; waits for the writer to know."""
        if self.checkpoints is None or self._saved_moment != self._moment():
            return False
        if not self.checkpoints.flush():
            return True  # it is on its way still, or nothing can be written any more
        return self.progress.step in self.checkpoints.saved

    def _moment(self) -> tuple[int, int, bool]:
        """Return what tells this moment's state from another's: steps and epochs done, and whether one has begun."""
        progress = self.progress
        epochs = progress.epoch + (progress.phase == "after_epoch")
        return progress.step, epochs, progress.phase == "in_epoch"

    def _metrics_of_now(self) -> dict[str, float]:
        """Return the metrics that were made at this very step: only they may say which checkpoint is best."""
        progress = self.progress
        made: dict[str, float] = {}
        for name, value in {**progress.latest, **progress.epoch_metrics}.items():
            is_of_validation = name.startswith("val_")
            is_fresh = (
                progress.validated_step == progress.step
                if is_of_validation
                else progress.phase == "after_epoch"
            )
            if is_fresh:
                made[name] = value
        return made

    def emit(self, event: Event) -> None:
        """Publish an event of the training loop, and keep the best moment up to date."""
        if not isinstance(event, Sample):
            if isinstance(event, (ValidationEnd, EpochEnd)):
                self._judge(event)
            self.lifetime.cancel_if_event_loop_is_gone()
        self.bus.emit(event)
        if not isinstance(event, Sample):
            self.records.note(event)

    def publish(self, event: Event) -> None:
        """Publish somebody's event; in the training thread with its position and after all before it."""
        if threading.current_thread() is self.thread:
            self.bus.prepare(event)
            for name, value in self.loop.reporter.position().items():
                msgspec.structs.force_setattr(event, name, value)
            self.loop.reporter.publish(event)
        else:
            self.bus.publish(event)
            if actor.get() != "user":
                self.callbacks.reactions += 1

    def is_blocked(self) -> bool:
        """Return True while a `block` subscriber with an event loop is full."""
        return self.bus.is_blocked and not self.bus.loop_is_gone

    def callback_states(self) -> dict[str, Any]:
        """Return the state of each callback that steers training."""
        return run_state.capture_callbacks(self._handlers, steering=True)

    def trainer_state(self) -> dict[str, Any]:
        """Return a copy of what a subclass of the trainer adds to checkpoints; empty where none are taken."""
        own: dict[str, Any] = {} if self.dir is None else cloned(own_state(self.trainer))
        return own

    def restore_schedule(self) -> None:
        """Restore the state of the schedule attached last, in a run that is being resumed."""
        if self._continuation is not None:
            self._continuation.restore_schedule(self.loop)

    def finish_resuming(self, doubts: Iterable[Doubt]) -> Event:
        """Restore the random states and return the event that tells how exact the resume is."""
        assert self._continuation is not None
        continuation, self._continuation = self._continuation, None
        return continuation.finish(self.loop, doubts)

    def decide(self, event: Event) -> None:
        """Ask the deciders about an event, in declared order."""
        if self.deciders.has_any_for(event):
            self.guard()
        self.deciders.decide(event)
        if isinstance(event, TrainStart) and self._new_lr is not None:
            self.run.set_lr_nowait(self._new_lr, by="train")
        if isinstance(event, TrainStart) and self.checkpoints is not None:
            # Only from here on: what deciders set up at the start, they set up in a resumed run too.
            loop = self.loop
            schedulers = [each.scheduler for each in loop.schedules.all]
            self.user_state.watch([*schedulers, loop.setup.train_loader, *loop.validator.loaders.values()])

    def check_schedule(self, scheduler: LRScheduler, monitor: str | None, mode: Mode) -> None:
        """Raise where a plateau schedule would reduce the rate while its metric improves."""
        self.monitors.check_schedule(scheduler, monitor, mode)

    def keep_checkpoints(
        self,
        retention: Retention,
        *,
        save_at_end: bool,
        save_dir: Path | None,
        name_of: Callable[[CheckpointInfo], str],
        copy_best_only: bool,
        on_unsaveable: OnError,
    ) -> str:
        """Keep the checkpoints that a callback wants, see `TrainingProgram.keep_checkpoints`."""
        if self.checkpoints is None or self.dir is None:
            raise ConfigError(Need.DIRECTORY.value)
        owner = actor.get()
        copies = None if save_dir is None else NamedCopies(absolute_path(save_dir), self.dir, name_of)
        keeper = Keeper(msgspec.structs.replace(retention, owner=owner), save_at_end, copies, copy_best_only)
        try:
            self.checkpoints.keep(keeper)
        except ValueError as error:
            raise ConfigError(f"{error}: give one of them another save_dir or filename") from None
        self.check_state_at_first_step(on_unsaveable)
        return owner

    def hook_failed(self, hook: StepHook, error: BaseException, is_off: bool) -> None:
        """Hold or pass on what a step hook raised. Training thread."""
        if hook.on_error == "raise":
            raise error
        observer = next(each for each in self.callbacks.observers if each.name == hook.callback)
        observer.failed(hook.point, error, is_off=is_off)

    def save_for(self, envelope: Envelope[Any]) -> None:
        """Save or tag a checkpoint for a command; its future is completed when that is durable. Training thread."""
        command = envelope.command
        if self.checkpoints is None:
            raise ConfigError(Need.DIRECTORY.value)
        if isinstance(command, SaveCheckpoint):
            owners = self.checkpoints.owners_among(envelope.givers)
            self.save(command.reason, envelope.future, owners=owners)
            return
        assert isinstance(command, TagCheckpoint)
        is_taken = self._saved_moment == self._moment() and self.checkpoints.failed_step != self.progress.step
        if not is_taken:  # else the checkpoint just taken is of this very state
            self.save("manual")
        self.checkpoints.tag(command.tag, step=self.progress.step, move=command.move, future=envelope.future)

    def _judge(self, event: ValidationEnd | EpochEnd) -> None:
        """Note the moment if it is the best so far."""
        monitors = self.monitors
        by_validation = monitors.best.startswith("val_")
        if isinstance(event, ValidationEnd) is not by_validation:
            return
        if monitors.best not in event.metrics:
            if monitors.is_best_named:
                event.metrics[monitors.best]  # raises and lists what there is
            return
        score = event.metrics[monitors.best]
        if is_better(score, None if self.best is None else self.best.score, monitors.best_direction):
            self.best = Best(monitor=monitors.best, score=score, epoch=event.epoch, step=event.step)

    # Anybody's side ------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """What the run is doing, in a word."""
        if self.lifetime.phase != "running":
            return self.lifetime.phase
        state = self.loop.boundary.state
        return "validating" if state == "running" and self.progress.is_validating else state

    @property
    def callback_costs(self) -> dict[str, CallbackCosts]:
        """What each callback has cost so far."""
        if self.result is not None:
            return dict(self.result.callback_costs)
        return self.callbacks.costs(self.loop.hooks.seconds)

    def abandon(self) -> bool:
        """Stop waiting for a training thread that hangs; it ends the run by itself if it ever gets there. Event loop.

        Returns:
            False if training has ended: the supervisor is about to end the run.
        """
        with self._hand_over:
            if self._has_ended_training:
                return False
            self.is_abandoned = True
        self._thread_ended.wake()
        return True

    # The event loop's side -----------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Take the trainer, the callbacks and the process for this run; raises if somebody has them.

        They are given back by the supervisor; here only if it never came to run, because the run was refused
        or `asyncio.run`'s sweep cancelled the supervisor before its first line. On the event loop.
        """
        self.mailbox.places.event_loop_thread = threading.get_ident()
        try:
            if self.dir is not None and self.resume is None and self.dir.exists():
                raise RunNameTakenError(str(self.dir))
            self._claim(self)
            try:
                config = self.config
                enter_process(
                    self.run_id,
                    deterministic=config.deterministic,
                    tf32=config.tf32,
                    seed=config.seed,
                    switch_interval=config.switch_interval,
                )
                try:
                    yield
                finally:
                    if self._never_ran():
                        leave_process(self.run_id)
            finally:
                if self._never_ran():
                    if self.thread.ident is None:
                        close_unused([handlers.callback for handlers in self._handlers])
                    self._release(self)
        finally:
            if self._never_ran():
                self.lifetime.phase = "cancelled"
                self.mailbox.end()
                self.finished.cancel()

    def _never_ran(self) -> bool:
        return self.result is None and not self.is_abandoned

    async def run_to_end(self, started: Callable[[Run], None]) -> None:
        """Run in the caller's task: wait for the end; if cancelled, tell the mailbox and re-raise.

        What has come of it is told by `outcome`.

        Args:
            started: Called when the run goes on by itself.
        """
        # The waker before the supervisor: with no descriptors left, nothing has begun yet.
        with self.claimed(), Waker() as ended:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.supervise)
                try:
                    started(self.run)
                    await result_of(self.finished, ended)
                except BaseException:
                    self.lifetime.cancel("the task that awaited it was cancelled")
                    raise

    @contextlib.asynccontextmanager
    async def run_beside(self) -> AsyncIterator[Run]:
        """Run beside the body of `async with`, and wait for the end after it.

        An exception in the body stops the run, a failing run cancels the body; neither is wrapped in a group.
        """
        in_body: BaseException | None = None
        with self.claimed(), Waker() as ended:
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as body:
                    tasks.start_soon(self.supervise, body.cancel)
                    try:
                        try:
                            yield self.run
                        except (anyio.get_cancelled_exc_class(), GeneratorExit):
                            raise
                        except BaseException as error:
                            in_body = error
                            with contextlib.suppress(RunEndedError):
                                reason = f"{type(error).__name__} beside the run"
                                self.mailbox.give(Stop(reason), by="user")
                        await result_of(self.finished, ended)
                    except BaseException:
                        if not body.cancel_called:
                            self.lifetime.cancel("the task beside it was cancelled")
                        raise
        if in_body is None or in_body in (self.lifetime.failure, self.lifetime.late_exit):
            self.outcome()
        elif self.lifetime.failure is None:
            raise in_body
        elif isinstance(in_body, RunEndedError | BusClosedError):
            self.outcome()  # the body only ran into the run's failure
        else:
            both = [in_body, self.lifetime.failure]
            raise BaseExceptionGroup("the run failed, and so did the code beside it", both)

    async def supervise(self, on_failure: Callable[[], None] | None = None) -> None:
        """Host the run on this event loop, from the thread's start to the result. Shielded; never raises.

        Args:
            on_failure: Called on the event loop when the run has failed, before its callbacks drain.
        """
        swept = False
        with anyio.CancelScope(shield=True):
            note_cancellation(anyio.get_cancelled_exc_class())
            self.lifetime.begin_on_event_loop()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.bus.drain)
                    self.callbacks.start(tasks)
                    self._start_thread()
                    swept = await self._thread_is_over()
                    if self.is_abandoned:
                        self.bus.close()
                        self.callbacks.cancel()
                        return
                    if self.lifetime.failure is not None and on_failure is not None:
                        on_failure()
                    await self._finish_checkpoints()
                    if not swept:
                        await self.callbacks.settle()
                    if self.lifetime.failure is not None and on_failure is not None:
                        on_failure()
                    self._end_bus()
                    if not swept:
                        await self.callbacks.drain()
                    self.callbacks.cancel()
            except GeneratorExit:  # the event loop was closed under us: the training thread does the rest
                raise
            except BaseException as error:
                # A cancellation that pierced the shield while draining (asyncio.run's sweep), or a defect of ours
                swept = True
                if not isinstance(error, anyio.get_cancelled_exc_class()):
                    self.lifetime.fail(error)
            finally:
                self._abandon_thread()
            await self._thread_is_over()  # after a defect of ours it may still be on its way
            await self.callbacks.close()
            await self._finish()

    def _start_thread(self) -> None:
        try:
            self.thread.start()
        except RuntimeError as error:  # the system gives no more of them, or the interpreter is about to end
            self.lifetime.fail(error)
            self.mailbox.end()  # what the thread does at its end
            leave_process(self.run_id)

    async def _thread_is_over(self) -> bool:
        """Wait for the training thread through all cancellations; True if there was one."""
        cancelled = False
        warned = time.perf_counter()
        while self._is_training() and not self.is_abandoned:
            try:
                with anyio.move_on_after(STACK_INTERVAL):
                    await self._thread_ended.wait()
                    if not self.is_abandoned:
                        self.thread.join()  # returns immediately: the thread is already exiting
            except anyio.get_cancelled_exc_class():
                cancelled = True
                self.lifetime.cancel("the event loop is ending")
            except KeyboardInterrupt as error:  # a signal handler of the host's
                self.lifetime.fail(error)
            now = time.perf_counter()
            if self.mailbox.cancelled and self._is_training() and now - warned >= STACK_INTERVAL:
                warned = now
                self._log_stack()
        return cancelled

    def _is_training(self) -> bool:
        return self.thread.ident is not None and not self.thread.is_over

    def _log_stack(self) -> None:
        frame = sys._current_frames().get(self.thread.ident or 0)
        if frame is not None:
            stack = "".join(traceback.format_stack(frame))
            logger.warning("the training thread has not reached its next batch yet; it is here:\n%s", stack)

    def _end_bus(self) -> None:
        """Publish `TrainEnd` after everything else, and close the bus behind it."""
        self.lifetime.phase = "closing"
        status, reason = self._status()
        error = self.lifetime.failure
        self.bus.close(
            TrainEnd(
                status=status,
                reason=reason,
                error=None if error is None else describe(error),
                metrics=Metrics(self.progress.latest),
                seconds=time.perf_counter() - self._started,
            )
        )

    async def _end_alone(self) -> None:
        """Close the callbacks and write the result from the training thread, on an event loop of its own."""
        await self._finish_checkpoints()
        self.bus.end()
        await self.callbacks.close()
        await self._finish()

    def _abandon_thread(self) -> None:
        """Make sure that the thread knows, if this coroutine is torn down without having waited for it."""
        if self._is_training():
            self.lifetime.cancel("the event loop is gone")

    def _status(self) -> tuple[Status, str]:
        if self.lifetime.failure is not None:
            return "failed", describe(self.lifetime.failure)
        if self.progress.ending == "cancelled":
            return "cancelled", self.progress.reason
        if self.progress.ending == "stopped":
            return "stopped", self.progress.reason
        return "completed", self.progress.reason or f"epochs={self.loop.setup.limits.epochs}"

    def _ending(self) -> dict[str, Any]:
        """Return what `run.json` says about how the run ended."""
        status, reason = self._status()
        ending = {"status": status, "reason": reason, "ended": time.time(), "steps": self.progress.step}
        stopped_by = self.progress.stopped_by
        return ending | ({"stopped_by": stopped_by} if status == "stopped" and stopped_by is not None else {})

    async def _finish(self) -> None:
        status, reason = self._status()
        self.result = RunResult(
            run_id=self.run_id,
            status=status,
            reason=reason,
            epochs=self.progress.epoch,
            steps=self.progress.step,
            metrics=Metrics(self.progress.latest),
            best=self.best,
            history=tuple(self.progress.history),
            seconds=time.perf_counter() - self._started,
            callback_costs=self.callback_costs,
            callback_errors=self.callbacks.errors(),
            dir=self.dir if self._description else None,
        )
        if self._description:
            assert self.dir is not None
            ending = {**self.result.to_run_json(), **self._ending()}
            write = functools.partial(self._write_ending, self.dir, self._description | ending)
            # The run has its result; a directory that is gone by now, or a sweep, is no reason to lose it.
            try:
                await _in_thread("offloop-run-json", write)
            except (OSError, anyio.get_cancelled_exc_class()):
                logger.warning("%s does not say how the run ended", self.dir)
            except BaseException:
                logger.exception("%s does not say how the run ended", self.dir)
        self.lifetime.phase = status
        self._thread_ended.close()
        self._release(self)
        self._let_go()
        self.finished.set_result(self.result)

    def _let_go(self) -> None:
        """Keep what a `Run` tells after its end, and nothing by which it would keep model, data and callbacks alive.

        Who drops a trainer wants its memory back at once, not at the next garbage collection: all of these are
        tied to each other.
        """
        self.records.let_go()
        self.callbacks.clear()
        self.deciders.clear()
        self._handlers = []
        self.initial_weights = None
        del self.loop, self.trainer, self.user_state, self._claim, self._release

    async def _finish_checkpoints(self) -> None:
        """Wait until accepted checkpoints are durable, then uploaded, and give the directory back."""
        if self.checkpoints is None:
            return
        try:
            await _in_thread("offloop-finish-checkpoints", self._settle_checkpoints)
        except anyio.get_cancelled_exc_class():
            pass  # the sweep: the writer goes on by itself
        except BaseException as error:
            self.lifetime.fail(error)

    def _settle_checkpoints(self) -> None:
        assert self.checkpoints is not None
        self.checkpoints.flush()
        ending = self._ending()
        if "stopped_by" in ending and self._description:
            # Already here: a process that is killed while its callbacks drain must not train on when it runs again
            assert self.dir is not None
            with contextlib.suppress(OSError):
                write_run_json(self.dir, self._description | ending)
        if self.best is not None:
            self.best = self.checkpoints.located(self.best)
        if self.uploads is not None:
            assert self.config.remote is not None
            seconds = self.config.remote.timeout
            if self.mailbox.cancelled and self.lifetime.failure is None:  # somebody waits for it to be over
                seconds = min(seconds, self.config.drain_timeout)
            self._upload_deadline = min(self._upload_deadline, time.perf_counter() + seconds)
            if not self._await_uploads(self.uploads):
                self._report_missing(self.uploads)
        self.checkpoints.close()

    def _report_missing(self, uploads: Uploads) -> None:
        """Say what the remote directory lacks at the end of the run."""
        assert self.remote is not None
        missing = uploads.missing()
        what = f"checkpoints {', '.join(missing)}" if missing else "the logs"
        error = RemoteError(self.remote.url, f"at the end of the run, {what} were not uploaded in time")
        logger.error("%s; they are in %s", error, self.dir)
        self.bus.publish_or_log(UploadFailed(url=self.remote.url, error=f"RemoteError: {error}"))
        self._upload_failed(error)

    def _await_uploads(self, uploads: Uploads) -> bool:
        """Wait until everything is uploaded, or the time for it is up; a second signal ends it at once. Blocks."""
        return uploads.finish(
            functools.partial(self.lifetime.wait, deadline=self._upload_deadline, haste=0.0)
        )

    def _write_ending(self, directory: Path, description: dict[str, Any]) -> None:
        """Write how the run ended, here and there. Blocks."""
        write_run_json(directory, description)
        if self.uploads is not None:
            if not self._await_uploads(self.uploads):
                logger.warning("%s does not say how the run ended", self.remote and self.remote.url)
            self.uploads.close()

    def outcome(self) -> RunResult:
        """Return the result, or raise what the run failed with, once, with a note on where it was."""
        assert self.result is not None
        # Taken from here: whoever catches it decides how long its frames are kept, with all the tensors in them.
        failure = self.lifetime.take_failure()
        if failure is None:
            return self.result
        self.note_where(failure)
        try:
            raise failure
        finally:
            del failure  # else this frame, which the exception holds, would hold the exception

    def note_where(self, failure: BaseException) -> None:
        """Add to what the run failed with where that was."""
        note = f"offloop: run {self.run_id}, epoch {self.progress.epoch}, step {self.progress.step}"
        if self.checkpoints is not None and self.checkpoints.last is not None:
            note += f", last checkpoint {self.checkpoints.last}"
        failure.add_note(note)


async def _in_thread(name: str, function: Callable[[], None]) -> None:
    """Run a function that blocks in a thread of its own; on the event loop where the system gives no thread.

    Cancellation: the thread ends by itself.
    """
    try:
        worker = Worker(name)
    except OSError:  # no descriptors for its waker
        function()
        return
    try:
        await worker.run(function, else_here=True)
    finally:
        worker.close()
