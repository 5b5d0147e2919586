"""The training loop: plain synchronous PyTorch, from the first batch to the last, in the training thread.

It is given a program to run (the user's `Trainer`: steps and epochs), a function to publish with, a mailbox
to look at, deciders to ask and a table of step hooks. It knows no callback and no event loop.

    run ── run_epoch ─┬─ program.train_epoch ── batches ── train_batch ── optimizer_step ── end_step
                      ├─ validate ── program.validate_epoch ── batches ── validate_batch
                      └─ EpochEnd

`batches` is the one place where the training thread looks up: commands, limits and the position in the
epoch live there, so that a user's own epoch (`for batch in self.batches(loader): ...`) has them too.
The arithmetic is that of a loop written by hand, bit for bit.
"""

import contextlib
import logging
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import torch
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from offloop.engine.bus.command_mailbox import Envelope, Mailbox
from offloop.engine.callback import StepHook
from offloop.engine.config import TrainerConfig
from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.batches import DeviceTransfer, limited_length, why_empty
from offloop.engine.data.data_wait import DataWait
from offloop.engine.data.random_state import capture_random_state, restore_random_state
from offloop.engine.data.seeded_sampling import SeededSampling
from offloop.engine.data.val_loaders import PREFIX, ValLoader, by_prefix, live_prefix, name_of
from offloop.engine.data.workers import spared_workers
from offloop.engine.errors import EmptyLoaderError, LossError
from offloop.engine.events import (
    NO_METRICS,
    DataBottleneck,
    EpochEnd,
    EpochStart,
    Event,
    Metrics,
    Settings,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.metrics.logged_names import add_computed, check_name
from offloop.engine.position.data_position import DataPosition
from offloop.engine.position.exactness import Doubt
from offloop.engine.training.boundary import Boundary
from offloop.engine.training.freezing import Frozen
from offloop.engine.training.given_rates import GivenRates
from offloop.engine.training.kept_state import KeptBuffers, cloned
from offloop.engine.training.learning_rate import (
    Schedule,
    check_length,
    largest_lr,
    mark_stepped,
    rates_by_group,
)
from offloop.engine.training.optimizer_state import options_of
from offloop.engine.training.precision import (
    MixedPrecision,
    clip,
    free_gradients,
    gradients_are_finite,
    rescale,
)
from offloop.engine.training.reporter import Logged, Reporter, Window, settled
from offloop.engine.training.step_failures import explain_failure
from offloop.engine.training.step_hooks import StepHooks
from offloop.engine.training.training_mode import enter_training, eval_mode

if TYPE_CHECKING:
    from offloop.engine.metrics.metric_set import MetricSet

logger = logging.getLogger("offloop")

Batch = Any
StepOutput = torch.Tensor | Mapping[str, Any] | None
Ending = Literal["stopped", "cancelled", "limit"]
Phase = Literal["before_epoch", "in_epoch", "after_epoch"]


class Program(Protocol):
    """What the loop runs: the part of a `Trainer` that users override."""

    model: torch.nn.Module
    loss: Any
    automatic_optimization: bool

    def training_step(self, batch: Batch, /) -> StepOutput: ...
    def validation_step(self, batch: Batch, /) -> StepOutput: ...
    def train_epoch(self, loader: Iterable[Batch], /) -> None: ...
    def validate_epoch(self, loader: Iterable[Batch], /) -> None: ...


class Limits(Protocol):
    """When a run is complete: totals, None for no limit."""

    epochs: int | None
    max_steps: int | None
    max_time: float | None


class ResumedState(Protocol):
    """What a resumed run continues, see `run_state.py`."""

    path: str
    attempt: int
    taken: float
    state: Mapping[str, Any]
    data: Mapping[str, Any]

    def restore_schedule(self, loop: "TrainingLoop", /) -> None: ...
    def finish(self, loop: "TrainingLoop", doubts: Iterable[Doubt], /) -> Event: ...


KEPT_AT_THE_END: Final = {
    "run_id",
    "epoch",
    "step",
    "batch",
    "latest",
    "val_batches",
    "has_validation",
    "ending",
    "reason",
}
"""What a `Run` tells after its end."""


class TrainingLoop:
    """One run's training. All methods run in the training thread."""

    def __init__(
        self,
        program: Program,
        *,
        config: TrainerConfig,
        limits: Limits,
        device: torch.device,
        optimizers: dict[str, torch.optim.Optimizer],
        schedules: Sequence[Schedule],
        train_loader: Iterable[Batch],
        val_loader: ValLoader | None,
        train_metrics: "MetricSet | None",
        val_metrics: "Mapping[str, MetricSet]",
        monitor: str,
        publish: Callable[[Event], None],
        publish_step: Callable[[Event], None],
        decide: Callable[[Event], None],
        clock_offset: float,
        run_id: str,
        mailbox: Mailbox,
        is_blocked: Callable[[], bool],
        hooks: Sequence[StepHook],
        hook_failed: Callable[[StepHook, BaseException, bool], None],
        save: Callable[[Envelope[Any]], None],
        guard: Callable[[], None],
        count_samples: Callable[[Batch], int] = guess_batch_size,
        validates_live: bool = False,
    ) -> None:
        self.program = program
        self.count_samples = count_samples
        self.config = config
        self.limits = limits
        self.device = device
        self.optimizers = optimizers
        self.schedules = list(schedules)
        # The first of them; those that are attached end with the run
        self.lasting_schedules = len(self.schedules)
        self.given_rates = GivenRates(list(optimizers.values()))
        # As the script made them
        self.options = {name: options_of(each) for name, each in optimizers.items()}
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.has_validation = val_loader is not None
        self.train_metrics = train_metrics
        self.val_loaders = by_prefix(val_loader)
        self.val_prefix = PREFIX  # of the keys of the loader that is, or was last, validated on
        self.val_metrics = val_metrics  # by prefix
        self.validates_live = validates_live  # with the weights in training, before hooks swap an average in
        self.logged_names: tuple[set[str], set[str]] = (set(), set())  # checked, in training and validations
        self.monitor = monitor
        self.publish_step = publish_step  # the short way for the one event of every step
        self.decide = decide
        self.run_id = run_id
        self.mailbox = mailbox
        self.boundary = Boundary(self, mailbox, is_blocked=is_blocked, save=save)
        self.guard = guard  # called before somebody's code that may change model and optimizers
        self.hooks = StepHooks(hooks, hook_failed, guard)
        self.mixed = MixedPrecision(config.precision, device)
        self.frozen = Frozen(program.model)
        self.feed = DeviceTransfer(device, channels_last=config.channels_last)
        self.reporter = Reporter(
            device, publish, clock_offset, config.on_nonfinite, loss_scale=self.mixed.initial_scale
        )
        self._owned: list[torch.nn.Parameter] = []  # what the optimizers held when `_parameters` was made
        self._parameters: list[torch.nn.Parameter] = []
        # On the CPU a loss is there when it is made; on a device, looking at it would wait for the device.
        self.looks_at_losses = config.on_nonfinite == "raise" and device.type == "cpu"

        # Position: counts of finished things, on every event
        self.epoch = 0
        self.step = 0
        self.batch = 0

        # Where the run stands
        self.ending: Ending | None = None  # why `batches` ends before the loader does
        self.reason = ""
        self.started = 0.0
        self.window = Window()  # the batches of the optimizer step in progress
        self.is_between_steps = (
            True  # False after a cancellation between two batches of a step: the first is lost
        )
        self.last_lr = 0.0  # what the latest step used
        self.last_rates = NO_METRICS  # of its parameter groups, where they differ
        self.loss_checked = False
        self.history: list[EpochEnd] = []
        self.latest: dict[str, float] = {}  # the latest value of each metric

        # The epoch in progress
        self.phase: Phase = "before_epoch"
        self.epoch_batches = 0
        self.epoch_samples = 0
        self.epoch_first_step = 1
        self.epoch_metrics: dict[str, float] = {}  # made since the last EpochEnd
        self.may_end_between = True  # False from an EpochEnd on: it has said whether the run goes on
        self.data_wait: DataWait | None = DataWait()  # of the first epoch, None after it

        self.seeding: SeededSampling | None = None
        if config.sampling == "seeded" and config.seed is not None:
            self.seeding = SeededSampling(config.seed)

        # Resuming
        self.attempt = 0
        self.init_from: str | None = None  # where the first weights are from, in words
        self.resumed: ResumedState | None = None  # what is continued; None again when all of it is put back
        self.seconds_before = 0.0  # trained by earlier attempts
        self.at_limit: dict[str, Any] = {}  # see state_at_limit
        self.callback_states: Callable[[], dict[str, Any]] = dict  # of those that steer; set by the session
        self.state_of_trainer: Callable[[], dict[str, Any]] = dict  # of a subclass's own; likewise
        self.is_resumable = False  # True where checkpoints may be taken
        self.data = DataPosition(program, train_loader, val_loader, is_resumable=lambda: self.is_resumable)
        self.is_longer_than_said = False  # True once the train_loader gave more batches than its length

        self.handles_signals = False  # set before the run by who takes them

        # The validation in progress, or the last one
        self.validating = False
        self.validated_step = -1
        self.val_batches = 0
        self.val_samples = 0
        self.val_seconds = 0.0  # of all validations
        self.logged_in_validation: list[Logged] = []  # by the batch in work

        # Iterators that were left before their end: letting go of one waits for what its workers are loading,
        # which must not hold up the last checkpoint
        self.left: list[Iterator[Batch]] = []

        # Manual optimization
        self.stepping: torch.optim.Optimizer | None = None  # the one about to step, for step hooks
        self.stepped: set[str] = set()  # optimizers that this training_step has stepped
        self.steps_of = dict.fromkeys(optimizers, 0)  # training_steps that have stepped each optimizer
        self.in_closure = False  # while an optimizer evaluates the loss by itself
        self.manual_norm: torch.Tensor | None = None
        self.manual_skipped = False

    # The story -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until a limit, a stop or a cancellation; raise what the user's code raises."""
        self.started = time.perf_counter()
        self.last_lr = self.last_lr or largest_lr(self.first_optimizer)
        for optimizer in self.optimizers.values():
            free_gradients(optimizer)
        start = self.train_start()
        self.announce(start)
        for schedule in self.schedules:
            mark_stepped(schedule.scheduler.optimizer)
            check_length(schedule, self.times_to_step(schedule, start.steps_per_epoch))
        if self.resumed is not None:
            has_passes = self.data.restore(
                self.resumed.data,
                in_epoch=self.phase == "in_epoch",
                seeded=self.seeded,
                spared=self.workers_spared,
                batches=self.epoch_batches,
            )
            if not has_passes or self.ending is not None:
                self.finish_resuming()
        epochs = self.limits.epochs
        try:
            if self.config.validate_at_start and start.resumed_from is None:
                self.validate()
                self.epoch_metrics.clear()  # they are of no epoch
            while (epochs is None or self.epoch < epochs) and not self.is_time_to_leave():
                self.run_epoch()
        except BaseException as error:
            if self.mailbox.is_forked:
                raise
            explain_failure(error)
            # What was launched before the failure is told, if it can be.
            with contextlib.suppress(BaseException):
                self.reporter.readback.flush()
            with contextlib.suppress(BaseException):  # the first failure is the one to hear of
                self.hooks.run_all("after_training")
            raise
        self.reporter.readback.flush()
        self.hooks.run_all("after_training")

    def close(self) -> None:
        """Let go what must not outlive the run; its last checkpoint has been taken."""
        self.window.clear()  # a step that failed has left its losses, and they hold all that was computed
        self.train_metrics, self.val_metrics = None, {}  # some keep all outputs of a pass
        if self.hooks.point is not None:
            self.hooks.point.batch = None
        self.data.close()
        if self.seeding is not None:
            self.seeding.close()
        schedulers = [each.scheduler for each in self.schedules]
        lasting = self.lasting_schedules
        self.given_rates.end(schedulers[lasting:], schedulers[:lasting])

    def let_go(self) -> None:
        """Keep only what is told of a run that is over: it must not keep the model alive, nor the data."""
        for name in vars(self).keys() - KEPT_AT_THE_END:
            delattr(self, name)

    def run_epoch(self) -> None:
        """Train one epoch, validate if it is time to, and say how it went."""
        started = time.perf_counter()
        enter_training(self.program.model)
        if self.phase != "in_epoch":  # a resumed epoch has begun already
            self.data.begin_epoch(self.epoch_batches)
            self.epoch_batches = self.epoch_samples = 0
            self.epoch_first_step = self.step + 1
            if self.train_metrics:
                self.train_metrics.reset()
            self.phase = "in_epoch"
            self.announce(EpochStart(**self.position()))
            if self.ending:
                return

        self.program.train_epoch(self.train_loader)
        if self.resumed is not None and self.ending is None:
            self.finish_resuming()  # all passes of the epoch were over
        self.finish_window()
        self.judge_data_wait()
        if self.ending in ("stopped", "cancelled"):
            return  # an unfinished epoch has no end
        if self.epoch_batches == 0:
            if self.ending == "limit":
                return  # the time was up before its first batch
            raise EmptyLoaderError(describe_empty("train_loader", self.train_loader, was_read=self.epoch > 0))
        if not self.program.automatic_optimization and self.step == self.epoch == 0:
            logger.warning(
                "no optimizer has stepped in the first epoch: a manual step calls self.backward(loss) and "
                "self.optimizer_step(name); optimizer.step() is not seen by the run"
            )
        complete = self.ending is None or self.data.is_complete
        is_last = self.epoch + 1 == self.limits.epochs
        if not is_last:
            self.is_time_to_leave()  # a limit that is reached here ends the run with a validation

        self.reporter.readback.flush()
        if not complete and self.ending == "limit":
            self.at_limit = self.state_at_limit()
        trained = self.reporter.train_means.take("train_")
        if self.train_metrics:
            add_computed(trained, self.train_metrics.compute())
        self.epoch_metrics.update(trained)
        self.epoch_metrics["lr"] = self.last_lr
        is_extra = False
        if self.validation_is_due():
            is_extra = not complete or not self.validation_is_regular()
            if is_extra and not self.at_limit:
                self.at_limit = {"validated_step": self.validated_step, "trainer": self.trainer_state()}
            validated = self.validate(is_extra=is_extra)
            if validated is None or self.ending == "cancelled":
                return
        # A decider that stops at ValidationEnd stops a finished epoch: its end is still said.
        if complete:
            for schedule in self.schedules:
                if schedule.interval == "epoch":
                    self.step_epoch_schedule(schedule, is_extra=is_extra)

        if not is_last:
            self.is_time_to_leave()  # the time again, for the last time before the next epoch's first step
        end = EpochEnd(
            metrics=Metrics(self.epoch_metrics),
            samples=self.epoch_samples,
            seconds=time.perf_counter() - started,
            complete=complete,
            final=self.ending == "limit" or is_last,
            **self.position(),
        )
        self.latest.update(self.epoch_metrics)
        self.epoch_metrics.clear()
        self.history.append(end)
        self.phase = "after_epoch" if complete else "in_epoch"
        self.may_end_between = False
        self.announce(end)
        if complete:
            self.epoch += 1
            self.phase = "before_epoch"

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over a loader's batches, on the device, as far as limits and commands allow.

        Between two batches the training thread looks up: it pauses, obeys, or leaves here.
        """
        training = not self.validating
        knob = "limit_train_batches" if training else "limit_val_batches"
        limit = getattr(self.config, knob)
        length = limited_length(loader, limit, knob)
        if isinstance(limit, float):
            limit = length
        mailbox, hooks, clock = self.mailbox, self.hooks, time.perf_counter
        feed, data_wait = self.feed, self.data_wait if training else None
        if self.is_time_to_leave():
            self.data.is_cut |= training
            return  # without asking the loader: making an iterator draws a random number and starts workers
        may_end = self.limits.max_steps is not None or self.limits.max_time is not None
        iterator, given = self.begin_loader(loader)
        data, is_over = self.data, False
        current = data.current if training else None
        while True:
            if current is None or data.is_boundary(current):
                if mailbox.attention:
                    self.boundary.process_commands()
                    if current is not None and not given:
                        data.drawn_before_first_batch()
                if (may_end or self.ending is not None) and self.is_time_to_leave():
                    break
            if given == limit:
                break
            asked = clock()
            try:
                batch = next(iterator)
            except StopIteration:
                is_over = True
                break
            got = clock()
            given += 1
            if data_wait is not None:
                if not data_wait.since:
                    data_wait.begin(got - asked, got, self.set_aside())
                else:
                    data_wait.batches += 1
                    if not feed.has_work():  # a host that is ahead of its device waits for data all the time
                        data_wait.rest += got - asked
            if current is not None:
                current.given, data.asking = given, None
                self.batch += 1
                self.epoch_batches += 1
                if self.window.count == 0:
                    left = None if length is None else length - given + 1
                    self.begin_window(left, got)
                self.window.data_time += got - asked
                if hooks.active:
                    hooks.run("before_batch", batch)
            else:
                self.val_batches += 1
            try:
                yield feed(batch) if feed.is_needed else batch
            except GeneratorExit:
                if current is not None and self.ending is None:
                    current.is_done = True  # the user's epoch has left this loader for good
                raise
        if self.ending is not None:
            self.left.append(iterator)
            if training:
                self.data.leave_epoch()
        if current is not None:
            current.is_done = is_over or given == limit or (given == length and self.is_at_end(iterator))
            self.finish_window()

    def judge_data_wait(self) -> None:
        """After the first epoch, say what to change if it waited for its data."""
        data_wait, self.data_wait = self.data_wait, None
        if data_wait is None or not data_wait.since or self.ending == "cancelled":
            return
        found = data_wait.judge(
            self.train_loader,
            now=time.perf_counter(),
            set_aside=self.set_aside(),
            on_cuda=self.device.type == "cuda",
            is_last=self.ending is not None or self.limits.epochs == self.epoch + 1,
        )
        if found is not None:
            logger.warning(
                "the run waits for its data %.0f %% of the time, %.1f ms for each batch; what may help: %s",
                100 * found.share,
                1e3 * found.wait,
                "; ".join(found.advice),
            )
            self.reporter.publish(
                DataBottleneck(
                    share=found.share, wait=found.wait, advice=tuple(found.advice), **self.position()
                )
            )

    def set_aside(self) -> float:
        """Return the seconds of this run so far that are no training: pauses and validations."""
        return self.boundary.paused_seconds + self.val_seconds

    def begin_loader(self, loader: Iterable[Batch]) -> tuple[Iterator[Batch], int]:
        """Return an iterator over the loader's batches, and how many of them a resumed epoch has had."""
        data = self.data
        if self.validating:
            data.begin_validation(loader, self.epoch)
            with self.workers_spared(loader):
                return iter(loader), 0
        read = self.seeded(loader)
        saved = data.saved_pass()
        if saved is None:
            if self.resumed is not None:
                self.finish_resuming()  # the interruption was between two passes
            data.begin(loader, read, epoch=self.epoch, start=self.epoch_batches)
            with self.workers_spared(read):
                return iter(read), 0
        given: int = saved["given"]
        if saved["is_done"]:
            data.skip(saved, read)
            return iter(()), given
        with self.workers_spared(read):
            iterator = data.go_on(
                saved, read, epoch=self.epoch, start=self.epoch_batches, keep_random=self.resumed is None
            )
        if self.resumed is not None:
            self.finish_resuming()
        return iterator, given

    def state_at_limit(self) -> dict[str, Any]:
        """Return the parts of the state that the end of a run in the middle of an epoch changes.

        An extra validation and an `EpochEnd` are the last word of this run. A run that continues it goes on as if
        they had not been: its checkpoint has these parts as they were at the last step.
        """
        return {
            "means": self.reporter.train_means.state_dict(),
            "epoch_metrics": dict(self.epoch_metrics),
            "validated_step": self.validated_step,
            "callbacks": self.callback_states(),
            "trainer": self.trainer_state(),
        }

    def trainer_state(self) -> dict[str, Any]:
        """Return a copy of what a subclass of the trainer adds to checkpoints, where there are any."""
        own: dict[str, Any] = cloned(self.state_of_trainer()) if self.is_resumable else {}
        return own

    def is_at_end(self, iterator: Iterator[Batch]) -> bool:
        """True if a loader that a limit ends behind its last batch has no more.

        It is asked, as it would be without the limit: samplers draw at their end, too. If its length was wrong, the
        batch is read again by a run that goes on.
        """
        if self.ending != "limit":
            return False
        before = capture_random_state()
        try:
            next(iterator)
        except StopIteration:
            return True
        restore_random_state(before)
        return False

    def workers_spared(self, loader: Iterable[Batch]) -> contextlib.AbstractContextManager[None]:
        """Return a block in which workers are started that leave signals to a run which handles them."""
        return spared_workers(loader) if self.handles_signals else contextlib.nullcontext()

    def seeded(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader that seeds what the samples of this epoch draw, if that is asked for."""
        return loader if self.seeding is None else self.seeding.twin_of(loader, self.epoch)

    def finish_resuming(self) -> None:
        """Put the random states back, the last thing before training goes on, and say how exact it all is."""
        assert self.resumed is not None
        resumed, self.resumed = self.resumed, None
        self.announce(resumed.finish(self, self.data.doubts))
        every = self.config.val_every_n_steps
        if every is not None and self.epoch_batches and self.phase == "in_epoch" and self.ending is None:
            if self.step and self.step % every == 0 and self.validated_step != self.step:
                self.validate()  # it was due when the checkpoint was taken

    def begin_window(self, batches_left: int | None, now: float) -> None:
        """Begin an accumulation window, a shorter one where the loader has fewer batches left."""
        size = self.config.accumulate_grad_batches
        if batches_left is not None and batches_left < size:
            if batches_left > 0:
                size = batches_left
            elif not self.is_longer_than_said:
                self.is_longer_than_said = True
                logger.warning(
                    "the train_loader gives more batches than its length says (%d); accumulation goes on without it",
                    self.epoch_batches - 1,
                )
        self.window.begin(size, now)
        self.hooks.begin_step(self.step + 1)

    def train_batch(self, batch: Batch) -> None:
        """Train on one batch: forward, backward and, at the end of the window, the optimizer."""
        window, hooks = self.window, self.hooks
        if window.size == 0:
            raise RuntimeError("train_batch() takes the batches of `for batch in self.batches(loader)`")
        if hooks.active:
            hooks.run("before_forward", batch)
        samples = self.count_samples(batch)  # now: the step may take the batch apart
        with self.mixed.autocast():
            output = self.program.training_step(batch)
        loss, outputs, targets, weight, own_samples = read_output(output, "training_step")

        if own_samples is not None:
            samples = own_samples
        counted = float(samples) if weight is None else weight
        window.samples += samples
        window.weight += counted
        if self.train_metrics:
            self.train_metrics.add(outputs, targets, "training_step")
        if loss is not None:
            window.losses.append(loss)
            window.weights.append(counted)
        if window.fresh:
            window.settle(counted)
        if not self.program.automatic_optimization:
            self.end_manual_batch()
            return

        if loss is None or not self.loss_checked:
            check_loss(loss)
            self.loss_checked = True
        assert loss is not None
        if self.looks_at_losses:
            self.refuse_nonfinite(loss)
        if window.size > 1:  # each batch counts as its share of the window
            if weight is None:
                loss = loss / window.size
            else:
                loss = loss * weight  # the sum of the weights is known only at the end: rescaled there
                window.is_weighted = True
        if hooks.active:
            hooks.run("before_backward", batch)
        self.mixed.backward(loss)
        if hooks.active:
            hooks.run("after_backward", batch)
            window.settle(counted)
        window.count += 1
        if window.count >= window.size:
            self.optimizer_step(batch)

    def finish_window(self) -> None:
        """Close a window with fewer batches than expected: the loader ended, or the epoch was left."""
        window = self.window
        if window.count and self.ending == "cancelled":
            self.is_between_steps = False
        if window.count and self.ending != "cancelled":
            if not window.is_weighted:
                rescale(self.parameters, window.size / window.count)
            self.optimizer_step(None)
        # Batches of manual steps that stepped nothing, and what an own epoch has logged beside its batches
        elif (window.samples or window.fresh) and self.ending != "cancelled":
            self.epoch_samples += window.samples
            self.reporter.add_to_epoch(window)
        window.clear()

    def optimizer_step(self, batch: Batch) -> None:
        """Update the parameters with the gradients of the window."""
        config, window, optimizer = self.config, self.window, self.first_optimizer
        if window.is_weighted:
            rescale(self.parameters, 1.0 / (sum(window.weights) or 1.0))
        self.mixed.unscale(optimizer)
        if self.hooks.active:
            self.hooks.run("before_optimizer_step", batch)
        norm = None
        if config.gradient_clip_val is not None:
            norm = clip(self.parameters, config.gradient_clip_val, config.gradient_clip_algorithm)
        skipped = config.on_nonfinite == "skip_step" and not self.step_is_finite()
        self.last_lr, self.last_rates = largest_lr(optimizer), rates_by_group(self.optimizers)
        if not skipped:
            self.mixed.step(optimizer)
        self.end_step(batch, norm, self.mixed.update(), skipped)

    def end_step(
        self, batch: Batch, norm: torch.Tensor | None, scale: torch.Tensor | None, skipped: bool
    ) -> None:
        """Count a step that was made, say so, and do what is due after it."""
        config, window = self.config, self.window
        self.step += 1
        if self.schedules:
            self.step_schedules()
        self.stepped.clear()
        self.epoch_samples += window.samples
        if self.hooks.active:
            self.hooks.run("after_step", batch)
        if self.program.automatic_optimization:
            free_gradients(self.first_optimizer)
        self.reporter.step(
            window,
            position=(self.run_id, self.epoch, self.step, self.batch),
            lr=self.last_lr,
            rates=self.last_rates,
            norm=norm,
            scale=scale,
            skipped=skipped,
        )
        window.clear()
        if config.val_every_n_steps is not None and self.step % config.val_every_n_steps == 0:
            self.validate_after_step()

    def step_schedules(self) -> None:
        """Step the schedules that go by steps, those whose optimizer was among the ones that stepped."""
        for schedule in self.schedules:
            if schedule.interval == "step":
                optimizer = schedule.scheduler.optimizer
                has_stepped = self.program.automatic_optimization or self.name_of(optimizer) in self.stepped
                if has_stepped and self.steps_by(optimizer) > schedule.after_steps:
                    schedule.step()

    def name_of(self, optimizer: torch.optim.Optimizer) -> str:
        """Return the name of an optimizer of the run."""
        return next(name for name, each in self.optimizers.items() if each is optimizer)

    def steps_by(self, optimizer: torch.optim.Optimizer) -> int:
        """Return how many of the run's steps have stepped an optimizer."""
        return self.step if self.program.automatic_optimization else self.steps_of[self.name_of(optimizer)]

    def validate_after_step(self) -> None:
        """Run the validation that is due after a step; what applies at a step boundary applies before it."""
        if self.mailbox.attention:
            self.boundary.process_commands()
        if self.ending is None:
            self.validate()

    def validate(self, *, is_extra: bool = False) -> dict[str, float] | None:
        """Run a validation at a step boundary; returns what it made, None if it was stopped.

        Each module gets its own train/eval flag back, so that frozen parts stay frozen.

        Args:
            is_extra: True for one that is made only because the run ends here. A run that goes on from here must
                draw what it draws without it.
        """
        if self.val_loader is None:
            return {}
        started = time.perf_counter()
        self.val_batches = 0
        self.logged_in_validation.clear()  # of one that was stopped
        self.validating = True  # from here on only a pause or a stop applies; the rest waits for its end
        self.announce(ValidationStart(batches=self.batches_to_validate(), **self.position()))
        if self.ending in ("stopped", "cancelled"):
            self.validating = False
            return None
        before = self.data.before_validation() if self.is_resumable else None
        buffers = KeptBuffers(
            (self.program.model, getattr(self.program, "loss", None)) if self.is_resumable else ()
        )
        try:
            try:
                made: dict[str, float] = {}
                if self.validates_live:
                    with eval_mode(self.program.model):
                        made |= self.run_validation(is_live=True)
                self.hooks.run_all("before_validation")
                with eval_mode(self.program.model):
                    made |= self.run_validation()
            finally:
                self.hooks.run_all("after_validation")  # always: it may put back what was swapped before
        finally:
            self.validating = False
            self.val_seconds += time.perf_counter() - started
        if before is not None and (is_extra or self.ending in ("stopped", "cancelled")):
            self.data.rewind_validation(before)  # one that was stopped is made again by a resumed run
            buffers.put_back()
        if self.ending in ("stopped", "cancelled"):
            return None
        self.validated_step = self.step
        if self.logged_in_validation:
            self.add_logged_to_validation(1.0)  # logged beside the batches: nothing to weigh it by
        made |= self.take_validated(PREFIX)
        self.epoch_metrics.update(made)
        self.latest.update(made)
        seconds = time.perf_counter() - started
        self.announce(
            ValidationEnd(metrics=Metrics(made), samples=self.val_samples, seconds=seconds, **self.position())
        )
        return made

    def run_validation(self, *, is_live: bool = False) -> dict[str, float]:
        """Run the model, which is in eval mode, over each val_loader; return what the named ones have made.

        Args:
            is_live: True for the weights in training, where another pass with an average follows.
        """
        self.val_samples = 0
        made: dict[str, float] = {}
        for name, loader in self.val_loaders.items():
            if self.ending in ("stopped", "cancelled"):
                break
            prefix = live_prefix(name) if is_live else name
            self.val_prefix, before = prefix, self.val_batches
            if prefix in self.val_metrics:
                self.val_metrics[prefix].reset()
            with torch.no_grad():
                self.program.validate_epoch(loader)
            if self.ending in ("stopped", "cancelled"):
                break
            if self.val_batches == before:
                name = f"val_loader {name_of(prefix)}".rstrip()
                raise EmptyLoaderError(describe_empty(name, loader, was_read=self.validated_step >= 0))
            if prefix != PREFIX:
                made |= self.take_validated(prefix)
        return made

    def take_validated(self, prefix: str) -> dict[str, float]:
        """Return what was validated under this prefix, and begin anew."""
        self.reporter.readback.flush()
        made = self.reporter.val_means.take(prefix)
        if prefix in self.val_metrics:
            add_computed(made, self.val_metrics[prefix].compute())
        return made

    def batches_to_validate(self) -> int | None:
        """Return how many batches a validation has after limits; None where a loader has no length."""
        lengths = [
            limited_length(each, self.config.limit_val_batches, "limit_val_batches")
            for each in self.val_loaders.values()
        ]
        known = [each for each in lengths if each is not None]
        passes = 2 if self.validates_live else 1
        return passes * sum(known) if len(known) == len(lengths) else None

    def validate_batch(self, batch: Batch) -> None:
        """Run one batch of a validation."""
        samples = self.count_samples(batch)
        with self.mixed.autocast():
            output = self.program.validation_step(batch)
        loss, outputs, targets, weight, own_samples = read_output(output, "validation_step")
        if own_samples is not None:
            samples = own_samples
        counted = float(samples) if weight is None else weight
        self.val_samples += samples
        if self.val_prefix in self.val_metrics:
            self.val_metrics[self.val_prefix].add(outputs, targets, "validation_step")
        if loss is not None:
            self.reporter.add_to_validation("loss", loss, counted)
        if self.logged_in_validation:
            self.add_logged_to_validation(counted)

    def add_logged_to_validation(self, weight: float) -> None:
        """Add what was logged since the last call to the means, as logged beside a loss of this weight."""
        for each in settled(self.logged_in_validation, weight):
            self.reporter.add_to_validation(each.name, each.value, each.in_epoch())
        self.logged_in_validation.clear()

    # Manual optimization -------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients for a manual step, scaled as the precision needs."""
        if self.looks_at_losses and not self.in_closure:
            self.refuse_nonfinite(loss)
        if self.hooks.active:
            self.hooks.run("before_backward")
        with self.mixed.outside_autocast():  # else float32 parts of the model had half-precision gradients
            self.mixed.backward(loss)
        if self.hooks.active:
            self.hooks.run("after_backward")

    def refuse_nonfinite(self, loss: object) -> None:
        """Raise `LossError` for a loss that is not finite, before it changes the weights. For losses on the CPU."""
        if isinstance(loss, torch.Tensor) and loss.numel() == 1 and not math.isfinite(value := loss.item()):
            self.reporter.complain(value, self.step + 1)

    def manual_step(self, name: str, closure: Callable[[], Any] | None) -> Any:
        """Unscale, clip, step and zero one optimizer of a manual step; returns what its `step` returns."""
        config, optimizer = self.config, self.optimizers[name]
        if name in self.stepped:
            self.mixed.update_between(self.parameters)
        self.mixed.unscale(optimizer)
        if self.hooks.active:
            self.stepping = optimizer
            self.hooks.run("before_optimizer_step")
            self.stepping = None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = config.gradient_clip_val

        def clipping(closure: Callable[[], Any]) -> Callable[[], Any]:
            has_begun = False

            def evaluate() -> Any:
                nonlocal has_begun
                self.mixed.cast_anew()
                self.in_closure = True  # a line search may try weights that give no finite loss
                try:
                    with self.mixed.autocast():
                        loss = closure()
                finally:
                    self.in_closure = False
                if self.looks_at_losses and not has_begun:
                    self.refuse_nonfinite(loss)
                has_begun = True
                if limit is not None:
                    self.manual_norm = clip(parameters, limit, config.gradient_clip_algorithm)
                return loss

            return evaluate

        if closure is not None:
            closure = clipping(closure)  # the gradients are made in there
        elif limit is not None:
            self.manual_norm = clip(parameters, limit, config.gradient_clip_algorithm)
        self.last_lr, self.last_rates = largest_lr(self.first_optimizer), rates_by_group(self.optimizers)
        result = None
        if config.on_nonfinite != "skip_step" or gradients_are_finite(parameters):
            with self.mixed.outside_autocast():
                result = self.mixed.step(optimizer, closure)
        else:
            self.manual_skipped = True
        self.mixed.cast_anew()  # the training_step may go forward once more, and all of it is under one autocast
        free_gradients(optimizer)
        self.stepped.add(name)
        return result

    def end_manual_batch(self) -> None:
        """Count a step if the training_step stepped anything."""
        if self.stepped:
            for name in self.stepped:
                self.steps_of[name] += 1
            norm, self.manual_norm = self.manual_norm, None
            skipped, self.manual_skipped = self.manual_skipped, False
            self.end_step(None, norm, self.mixed.update(), skipped)

    # Where the run stands ------------------------------------------------------------------------

    @property
    def first_optimizer(self) -> torch.optim.Optimizer:
        """The only optimizer, or the first of several."""
        return next(iter(self.optimizers.values()))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizers own right now; groups may be added during a run.

        In the model's order, as `clip_grad_norm_(model.parameters())` sees them. Parameters that no optimizer owns
        are left out, because no optimizer zeroes their gradients.
        """
        owned = [
            parameter
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        if len(owned) != len(self._owned) or not all(map(operator.is_, owned, self._owned)):
            left = {id(parameter): parameter for parameter in owned}
            in_model = [left.pop(id(each)) for each in self.program.model.parameters() if id(each) in left]
            self._owned, self._parameters = owned, [*in_model, *left.values()]
        return self._parameters

    def position(self) -> dict[str, Any]:
        """Return the base fields of an event born here and now."""
        return {
            "run_id": self.run_id,
            "time": self.reporter.clock_offset + time.perf_counter(),
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
        }

    def announce(self, event: Event) -> None:
        """Publish an event at which the training thread stands at a boundary, ask deciders, and obey."""
        self.reporter.publish(event)
        if (
            not self.boundary.is_applying_decider_command
        ):  # what a decider's command causes is not decided about again
            self.decide(event)
        if self.mailbox.attention:
            self.boundary.process_commands()

    def log(
        self, name: str, value: "torch.Tensor | float", weight: "torch.Tensor | float | None" = None
    ) -> None:
        """Log a value with the step or the validation in progress."""
        if name not in (checked := self.logged_names[self.validating]):
            metrics = self.val_metrics.get(self.val_prefix) if self.validating else self.train_metrics
            check_name(name, () if metrics is None else metrics.names)
            checked.add(name)
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"log({name!r}) takes one number, got a tensor of shape {tuple(value.shape)}"
                )
            value = value.detach().clone()  # the caller may change it in place before it is read
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"log({name!r}) takes a number or a tensor of one element, got {value!r}")
        if weight is not None:
            weight = checked_weight(weight, f"log({name!r})")
        (self.logged_in_validation if self.validating else self.window.fresh).append(
            Logged(name, value, weight)
        )

    def is_time_to_leave(self) -> bool:
        """True when `batches` should end: at once for a cancellation, else at the window's end."""
        if self.ending == "cancelled":
            return True
        if self.validating:
            return self.ending == "stopped"
        if self.window.count:
            return False
        if self.ending is None and self.reached_limit():
            self.ending = "limit"
        return self.ending is not None

    def reached_limit(self) -> bool:
        """True when `max_steps` or `max_time` ends the run here."""
        limits = self.limits
        if limits.max_steps is not None and self.step >= limits.max_steps:
            self.reason = f"max_steps={limits.max_steps}"
            return True
        is_between = self.phase != "in_epoch" or self.epoch_batches == 0
        if limits.max_time is not None and (self.may_end_between or not is_between):
            if self.seconds() >= limits.max_time:
                self.reason = f"max_time={limits.max_time}"
                return True
        return False

    def seconds(self) -> float:
        """Return how long this run has trained, earlier attempts included and pauses not."""
        return self.seconds_before + time.perf_counter() - self.started - self.boundary.paused_seconds

    def validation_is_due(self) -> bool:
        """True if this epoch ends with a validation that has not been made yet."""
        if self.val_loader is None or self.validated_step == self.step:
            return False
        if self.ending == "limit":
            return True  # the run ends here: its last word should hold a validation
        is_last = self.epoch + 1 == self.limits.epochs
        if is_last and self.validated_step <= 0:
            return True  # likewise: nothing would be judged by a validation
        return self.validation_is_regular()

    def validation_is_regular(self) -> bool:
        """True if this epoch ends with a validation, also in a run that goes on."""
        every = self.config.val_every_n_epochs
        if every is None:
            every = 1 if self.config.val_every_n_steps is None else None
        return every is not None and (self.epoch + 1) % every == 0

    def step_epoch_schedule(self, schedule: Schedule, *, is_extra: bool = False) -> None:
        """Step a schedule that goes by epochs, and say what it did.

        Args:
            schedule: The schedule.
            is_extra: True if the epoch's validation was made only because the run ends: no plateau goes by it.
        """
        optimizer, monitor = schedule.scheduler.optimizer, schedule.monitor or self.monitor
        if self.steps_by(optimizer) <= schedule.after_steps:
            return  # still warming up
        previous = largest_lr(optimizer)
        if isinstance(schedule.scheduler, ReduceLROnPlateau):
            if monitor.startswith("val_") and (is_extra or self.validated_step < self.epoch_first_step):
                return  # an epoch without a validation: there is nothing new to judge by
            schedule.scheduler.step(Metrics(self.epoch_metrics)[monitor])
        else:
            schedule.step()
        if largest_lr(optimizer) != previous:
            self.boundary.publish_lr_change(previous, "schedule", self.name_of(optimizer))

    def can_be_continued(self) -> bool:
        """True unless `on_nonfinite="raise"` would end the run at its next step: a weight is not finite (host sync)."""
        trained: list[torch.Tensor] = [
            each for each in self.parameters if each.requires_grad and not is_lazy(each) and each.numel()
        ]
        if self.config.on_nonfinite != "raise" or not trained:
            return True
        largest = torch._foreach_norm(trained, math.inf)
        return bool(torch.stack([each.isfinite().to(self.device) for each in largest]).all())

    def step_is_finite(self) -> bool:
        """True if the window's losses and gradients are finite. Synchronises with the device."""
        losses = torch.stack(self.window.losses)
        return bool(torch.isfinite(losses).all()) and gradients_are_finite(self.parameters)

    def train_start(self) -> TrainStart:
        """Return the first event of the run."""
        length = limited_length(self.train_loader, self.config.limit_train_batches, "limit_train_batches")
        steps = None
        if length is not None and self.program.automatic_optimization:
            steps = math.ceil(length / self.config.accumulate_grad_batches)
        resumed = self.resumed
        return TrainStart(
            attempt=self.attempt,
            resumed_from=None if resumed is None else resumed.path,
            resumed_at=None if resumed is None else resumed.taken,
            resumed_attempt=None if resumed is None else resumed.attempt,
            init_from=self.init_from,
            config=Settings(self.config.as_settings()),
            device=str(self.device),
            parameters=sum(
                parameter.numel()
                for parameter in self.program.model.parameters()
                if parameter.requires_grad and not is_lazy(parameter)
            ),
            batches_per_epoch=length,
            steps_per_epoch=steps,
            epochs=self.limits.epochs,
            max_steps=self.limits.max_steps,
            max_time=self.limits.max_time,
            **self.position(),
        )

    def times_to_step(self, schedule: Schedule, steps_per_epoch: int | None) -> int | None:
        """Return how many times a schedule will step until the run is complete, None where nothing says so."""
        epochs, max_steps = self.limits.epochs, self.limits.max_steps
        if schedule.interval == "step" and len(self.optimizers) > 1:
            return None  # not every step is one of its optimizer
        if schedule.interval == "epoch":
            return None if epochs is None or max_steps is not None else epochs - self.epoch
        totals = [] if max_steps is None else [max_steps]
        if epochs is not None and steps_per_epoch is not None:
            totals.append(epochs * steps_per_epoch)
        return min(totals) - max(self.step, schedule.after_steps) if totals else None


def describe_empty(name: str, loader: Iterable[Batch], *, was_read: bool) -> str:
    """Say that a loader gave no batch, and why; `was_read` is True if it gave some earlier in the run."""
    if was_read or hasattr(loader, "__next__"):
        again = " when it was read again" if was_read else ""
        return (
            f"the {name} gave no batch{again}: is it a generator, which can be read only once? Give a DataLoader, "
            "a list, or an object whose __iter__ begins anew"
        )
    return f"the {name} gave no batch: {why_empty(loader)}"


NO_NUMBER: Final = ": return the tensor itself, without .item()"
"""What an error adds where a step returns its loss as a number."""


def read_output(
    output: StepOutput, method: str
) -> tuple[torch.Tensor | None, Any, Any, float | None, int | None]:
    """Take a step's return value apart: loss, outputs, targets, weight, samples."""
    if output is None or isinstance(output, torch.Tensor):
        return output, None, None, None, None
    if type(output) is not dict and not isinstance(output, Mapping):  # the second look is slow
        raise LossError(
            f"{method} must return the loss or a mapping with 'loss' and optionally 'outputs', 'targets', "
            f"'weight', 'samples'; got {type(output).__name__}{NO_NUMBER if isinstance(output, float) else ''}"
        )
    weight, samples = output.get("weight"), output.get("samples")
    return (
        output.get("loss"),
        output.get("outputs"),
        output.get("targets"),
        None if weight is None else checked_weight(weight, method),
        None if samples is None else checked_samples(samples, method),
    )


def checked_weight(weight: Any, where: str) -> float:
    """Return what a value counts in means. A tensor on a device is waited for (host sync): give a number."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number or (isinstance(weight, torch.Tensor) and weight.numel() == 1):
        number = float(weight)
        if 0.0 <= number < math.inf:
            return number
    raise ValueError(f"the weight of {where} must be a finite number of at least 0, got {weight!r}")


def checked_samples(samples: Any, where: str) -> int:
    """Return how many samples a step says that its batch has. A tensor on a device is waited for (host sync)."""
    is_whole = isinstance(samples, int) and not isinstance(samples, bool)
    if is_whole or (isinstance(samples, torch.Tensor) and samples.numel() == 1):
        number = int(samples)
        if number >= 0 and number == samples:
            return number
    raise ValueError(f"the samples of {where} must be a whole number of at least 0, got {samples!r}")


def check_loss(loss: object) -> None:
    """Raise `LossError` unless this is a scalar that gradients can flow from."""
    if not isinstance(loss, torch.Tensor):
        hint = {type(None): ": write return loss, or return {'loss': loss, ...}", float: NO_NUMBER}.get(
            type(loss), ""
        )
        raise LossError(
            f"training_step must give a loss, a tensor of one element; got {type(loss).__name__}{hint}"
        )
    if loss.numel() != 1:
        raise LossError(f"the loss must be a scalar, got shape {tuple(loss.shape)}: take its mean() or sum()")
    if not loss.requires_grad:
        raise LossError(
            "the loss has no gradient: was it detached, or computed under torch.no_grad, "
            "or are all parameters frozen?"
        )
