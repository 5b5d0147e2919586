"""What the training thread of a run does around the training loop, and what it does for the loop as its host.

run ── set up: packages, weights, directory, model, seed, frozen parameters, checkpoint to continue
    ── loop.run, with this object as its host: events out, deciders asked, checkpoints saved
    ── last checkpoint, `before_train_end` hooks
    ── clean up: loader workers, frozen parameters, mailbox, process
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.best import BestSoFar
from offloop.engine.bus import forked
from offloop.engine.bus.command_mailbox import Envelope, Mailbox, actor
from offloop.engine.bus.commands import Need, SetLearningRate
from offloop.engine.bus.event_bus import Bus
from offloop.engine.callback import StepHook
from offloop.engine.errors import ConfigError
from offloop.engine.events import EpochEnd, Event, Sample, TrainStart, ValidationEnd
from offloop.engine.monitor import Mode
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.observers.event_log import rewind
from offloop.engine.position.exactness import Doubt
from offloop.engine.recovery import run_state
from offloop.engine.recovery.resume_plan import Over, ResumePlan
from offloop.engine.recovery.saving import Saving
from offloop.engine.recovery.user_state import UserState, own_state
from offloop.engine.run import Run
from offloop.engine.session.callback_tasks import CallbackTasks
from offloop.engine.session.deciders import Deciders
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.session.process import leave_process
from offloop.engine.session.run_plan import RunPlan
from offloop.engine.session.storage import Storage
from offloop.engine.session.thread_state import caller_state
from offloop.engine.training.activation_checkpointing import checkpointed
from offloop.engine.training.averages import measured_weights
from offloop.engine.training.freezing import select_parameters
from offloop.engine.training.kept_state import cloned
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.occupancy import KeepRequest
from offloop.engine.training.placement import prepare_model
from offloop.engine.training.program_setup import make_run_loop

if TYPE_CHECKING:
    from offloop.engine.distributed.rank_run import RankRun

logger = logging.getLogger("offloop")


class Training:
    """The training of one run: the host of its loop, and what the run offers to the steps of its trainer.

    All methods belong to the training thread, unless they say otherwise. There are more than usual, since two
    protocols ask for most of them: `Host` and `RunServices`.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        bus: Bus,
        mailbox: Mailbox,
        lifetime: Lifetime,
        callbacks: CallbackTasks,
        logs: DurableLogs,
        best: BestSoFar,
        storage: Storage | None,
    ) -> None:
        """Prepare a training; nothing is touched before `run`. In the thread of the caller."""
        program, handlers = plan.program, plan.handlers
        self.run_id = plan.run_id
        self.clock_offset = bus.clock.offset
        self.emit_step = bus.emit
        self.callbacks = callbacks
        self.deciders = Deciders(bus, mailbox, lifetime)
        self._program = program
        self._config = plan.setup.config
        self._bus = bus
        self._mailbox = mailbox
        self._lifetime = lifetime
        self._logs = logs
        self._best = best
        self._monitors = plan.monitors
        self._handlers = handlers
        self._storage = storage
        self._resume = plan.resume
        self._directory = plan.directory
        # Dropped once loaded: a state dict may be large.
        self._initial_weights = plan.initial_weights
        # The state that torch keeps per thread, of the thread that started the run.
        self._caller_state = caller_state(used=plan.setup.device)
        # Written by the training thread as it begins, read by any thread that publishes.
        self._thread: threading.Thread | None = None
        # Last, with all that the loop may ask its host for. None once the run is over
        hooks = [hook for each in handlers for hook in each.hooks]
        # None where this process trains alone
        self._ranks = plan.ranks
        loop_mailbox, strategy = (
            (mailbox, None) if plan.ranks is None else plan.ranks.equip(mailbox, program, plan.setup)
        )
        self._loop: TrainingLoop | None = make_run_loop(
            program, plan.setup, self, mailbox=loop_mailbox, hooks=hooks, strategy=strategy
        )
        self._progress = self.loop.progress
        self._saving: Saving | None = None
        if storage is not None:
            self._saving = Saving(
                self.loop,
                storage.checkpoints,
                handlers=handlers,
                user_state=UserState(program, handlers),
                logs=logs,
                best=best,
                resume_lr=plan.resume_lr,
                fail=lifetime.fail,
                publish=bus.publish_or_log,
            )

    @property
    def loop(self) -> TrainingLoop:
        """The training loop, until the run is over."""
        assert self._loop is not None
        return self._loop

    def release(self) -> None:
        """Drop the loop when the run is over: it refers to its host, and a circle would keep model and data alive."""
        self._loop = self._saving = None

    # Around the loop -----------------------------------------------------------------------------

    def run(self, handle: Run) -> None:
        """Train, from the set-up to the last checkpoint, and clean up. Raises nothing: failures end the run.

        Args:
            handle: What step hooks see.
        """
        self._thread = threading.current_thread()
        self._mailbox.places.training_thread = threading.get_ident()
        forked.watch(self._mailbox)
        try:
            with self._caller_state, torch.enable_grad():
                self._train(handle)
        except BaseException as error:
            if self._mailbox.is_forked:
                forked.end_process(error)
            self._lifetime.fail(error if self._ranks is None else self._ranks.explained(error))
        finally:
            if self._mailbox.is_forked:
                forked.end_process(None)
            if self._ranks is not None:
                self._ranks.end_training()
            self._clean_up()

    def _train(self, handle: Run) -> None:
        self._set_up()
        self._lifetime.phase = "running"
        with checkpointed(self._program.model, self._config.activation_checkpointing):
            self.loop.run(handle)
        is_over = self._resume is not None and self._resume.over is not None
        # After a second signal, only a checkpoint that is being written is finished
        if (
            self._saving is not None
            and not is_over
            and self.loop.strategy.agree(self._lifetime.signal_count < 2)
        ):
            is_preempted = self.loop.strategy.agree(self._lifetime.signal_count > 0)
            with self._while_saving():
                self._saving.save_last("preempt" if is_preempted else "final")
        self.guard()
        if self._progress.ending != "cancelled" and self._lifetime.failure is None:
            self.loop.hooks.run_all("before_train_end")

    def _while_saving(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._ranks is None else self._ranks.saving()

    def _set_up(self) -> None:
        """Do what must be done before the first event and may block."""
        if self._ranks is not None:
            self._ranks.begin(self._config, fail=self._lifetime.fail, given=self._mailbox)
        for metrics in (self.loop.train_metrics, *self.loop.validator.metrics.values()):
            if metrics is not None:
                metrics.load_packages()
        try:
            if self._initial_weights is not None:
                # First: weights that do not fit leave no directory behind
                self._progress.init_from = self._initial_weights.load_into(self._program.model).origin
                self._initial_weights = None
            if self._storage is not None:
                if self._resume is not None:
                    self._progress.attempt = self._resume.attempt
                self._storage.open(self._progress.init_from)
        except BaseException:
            if self._storage is not None:
                self._storage.disown()
            raise
        model = self._program.model
        prepare_model(self._program)
        if self._config.seed is not None:
            seed = self._config.seed
            torch.manual_seed(seed if self._ranks is None else self._ranks.seed_of(seed))
        # `from_pretrained()` leaves the whole model in eval mode
        if not model.training:
            model.train()
        self.loop.frozen.freeze(select_parameters(model, self._config.freeze))
        if self._ranks is not None:
            self._join(self._ranks)
            if self._directory is not None:
                self._ranks.open_log(self._directory)
        if self._saving is not None:
            self._saving.begin()
        if self._resume is not None:
            self._continue(self._resume)

    def _join(self, ranks: "RankRun") -> None:
        """Join the other ranks of the run."""
        from offloop.engine.distributed.rank_strategy import RunHere

        run = RunHere(
            is_held=lambda: self._bus.is_blocked and not self._bus.loop_is_gone,
            cadences=lambda: [] if self._saving is None else self._saving.cadences,
            on_signal=self._lifetime.note_signal_elsewhere,
            failure=lambda: self._lifetime.failure,
            fail=self._lifetime.fail,
        )
        ranks.join(self.loop, self._program.device, run)
        if self._storage is not None:
            self._storage.find_out_what_is_shared(self.loop.strategy.agree)

    def _continue(self, resume: ResumePlan) -> None:
        """Restore the run that is continued, or begin it again under its name."""
        assert self._saving is not None and self._storage is not None
        if resume.which is None:
            assert self._storage.directory is not None
            rewind(self._storage.directory, attempt=resume.attempt, taken=None)
            return
        self._saving.load(resume.which)
        if resume.over is not None:
            self._stay_over(resume.over)

    def _stay_over(self, over: Over) -> None:
        """Train no further: a callback stopped this run in an earlier attempt."""
        logger.warning(
            'run %s is over, since %s has stopped it: %s. resume="last" continues it anyway',
            self.run_id,
            over.stopped_by,
            over.reason,
        )
        self._progress.ending, self._progress.reason = "stopped", over.reason
        self._progress.stopped_by = over.stopped_by

    def _clean_up(self) -> None:
        """Release what must not outlive training. Each step runs whatever the others raise."""
        steps: tuple[Callable[[], object], ...] = (
            # May wait some seconds for loader workers
            self.loop.source.release,
            self.loop.close,
            self.loop.frozen.thaw_all,
            self._mailbox.end,
            functools.partial(leave_process, self.run_id),
        )
        for step in steps:
            try:
                step()
            except BaseException as error:
                self._lifetime.fail(error)
        # The system gives this number to other threads later
        self._mailbox.places.training_thread = None

    # The host of the loop ------------------------------------------------------------------------

    @property
    def handles_signals(self) -> bool:
        """True if the run handles SIGINT and SIGTERM."""
        return self._lifetime.handles_signals

    def emit(self, event: Event) -> None:
        """Publish an event of the loop. A milestone may be the best moment, and is kept for the logs."""
        if isinstance(event, Sample):
            self._bus.emit(event)
            return
        if isinstance(event, ValidationEnd | EpochEnd):
            self._best.judge(event)
        if self._storage is not None:
            self._storage.note(event)
        self._lifetime.cancel_if_event_loop_is_gone()
        self._bus.emit(event)
        self._logs.note(event)

    def decide(self, event: Event) -> None:
        """Ask the deciders about an event, and wait for their answers."""
        if self.deciders.has_any_for(event):
            self.guard()
        if self._ranks is None:
            self.deciders.decide(event)
        else:
            self._ranks.decide(event, self.deciders.decide)
        if isinstance(event, TrainStart) and self._saving is not None:
            if self._saving.lr_to_set is not None:
                self._mailbox.give(SetLearningRate(self._saving.lr_to_set), by="train")
            # After the deciders: what they set up at the start, they set up in a resumed run too
            self._saving.watch()
        if self._ranks is not None:
            self._ranks.after_deciding(event)

    def is_blocked(self) -> bool:
        """Return True while a `block` subscriber with an event loop is full."""
        if self._ranks is not None:
            return self._ranks.is_held
        return self._bus.is_blocked and not self._bus.loop_is_gone

    def hook_failed(self, hook: StepHook, error: BaseException, is_off: bool) -> None:
        """Report what a step hook raised, or raise it again."""
        if hook.on_error == "raise":
            raise error
        observer = next(each for each in self.callbacks.observers if each.name == hook.callback)
        if self._ranks is not None and observer.handlers.callback.ranks != "first":
            self._ranks.hook_failed(f"{hook.callback}.{hook.point}", error)
        observer.failed(hook.point, error, is_off=is_off)

    def save_for(self, envelope: Envelope[Any]) -> None:
        """Save or tag a checkpoint for a command; its future completes when that is durable."""
        with self._while_saving():
            self._expect_saving().save_for(envelope)

    def guard(self) -> None:
        """Prepare for user code that may change model or optimizers: a checkpoint may still be copied from them.

        The device waits for a copy in progress; the host does not.
        """
        if self._storage is not None:
            self._storage.checkpoints.guard()

    def callback_states(self) -> dict[str, Any]:
        """Return the state of each callback that steers training."""
        return run_state.capture_callbacks(self._handlers, steering=True)

    def trainer_state(self) -> dict[str, Any]:
        """Return a copy of what a subclass of the trainer adds to checkpoints; empty where none are taken."""
        own: dict[str, Any] = {} if self._saving is None else cloned(own_state(self._program))
        return own

    def restore_schedule(self) -> None:
        """Restore the state of the schedule attached last, in a run that is being resumed."""
        if self._saving is not None:
            self._saving.restore_schedule()

    def finish_resuming(self, doubts: Iterable[Doubt]) -> Event:
        """Restore the random states, and return the event that tells how exact the resume is."""
        assert self._saving is not None
        return self._saving.finish_resuming(doubts)

    # What the run offers to its trainer ----------------------------------------------------------

    def is_current_thread(self) -> bool:
        """Return whether the caller is the training thread. Any thread."""
        return threading.current_thread() is self._thread

    def publish(self, event: Event) -> None:
        """Publish an event of the user's. Any thread.

        One from the training thread gets its position, and follows everything before it.
        """
        if self.is_current_thread():
            self._bus.prepare(event)
            for name, value in self.loop.reporter.position().items():
                msgspec.structs.force_setattr(event, name, value)
            self.loop.reporter.publish_in_turn(event)
        else:
            self._bus.publish(event)
            if actor.get() != "user":
                self.callbacks.reactions += 1

    def check_schedule(self, scheduler: LRScheduler, monitor: str | None, mode: Mode) -> None:
        """Raise where a plateau schedule would reduce the rate while its metric improves."""
        self._monitors.check_schedule(scheduler, monitor, mode)

    def keep_checkpoints(self, request: KeepRequest) -> str:
        """Keep the checkpoints that the acting callback wants, and return its name."""
        return self._expect_saving().keep(request, owner=actor.get())

    def measured_weights(self, monitor: str) -> dict[str, Any]:
        """Return the state dict to which the latest value of a metric belongs; its tensors are live."""
        callbacks = [each.callback for each in self._handlers]
        return measured_weights(callbacks, self._program.model, monitor)

    def _expect_saving(self) -> Saving:
        if self._saving is None:
            raise ConfigError(Need.DIRECTORY.value)
        return self._saving
