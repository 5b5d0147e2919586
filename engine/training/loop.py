"""The training loop: plain synchronous PyTorch, from the first batch to the last, in the training thread.

It runs a program (the user's `Trainer`: steps and epochs) as a `Setup` says, for a `Host` that publishes its events,
asks deciders and saves checkpoints. It knows no callback and no event loop.

    run ── run_epoch ─┬─ program.train_epoch ── batches ── train_batch ── optimizer_step ── end_step
                      ├─ Validator.validate ── program.validate_epoch ── batches ── validate_batch
                      └─ end_epoch

`batches` is the one place where the training thread stops to process commands and to check limits, so a user's own
epoch (`for batch in self.batches(loader): ...`) does both too. The arithmetic is that of a loop written by hand, bit
for bit. `fast_epoch.py` has the usual epoch a second time, in one frame.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.callback import StepHook
from offloop.engine.data.batches import DeviceTransfer, describe_empty, limited_length
from offloop.engine.data.data_wait import DataWait
from offloop.engine.errors import EmptyLoaderError
from offloop.engine.events import EpochEnd, EpochStart, Metrics
from offloop.engine.metrics.logged_names import add_computed
from offloop.engine.position.epoch_source import EpochSource
from offloop.engine.training.boundary import Boundary
from offloop.engine.training.freezing import Frozen
from offloop.engine.training.learning_rate import largest_lr, rates_by_group
from offloop.engine.training.manual import ManualOptimization, refuse_nonfinite
from offloop.engine.training.optimizer_state import options_of
from offloop.engine.training.parameters import OwnedParameters
from offloop.engine.training.precision import (
    MixedPrecision,
    clip,
    free_gradients,
    gradients_are_finite,
    rescale,
)
from offloop.engine.training.progress import Progress, ResumePoint
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.reports import report_data_wait, train_start
from offloop.engine.training.schedules import Schedules
from offloop.engine.training.setup import Batch, Host, Program, Setup
from offloop.engine.training.step_failures import explain_failure
from offloop.engine.training.step_hooks import StepHooks, StepPoint
from offloop.engine.training.step_output import check_loss, read_output
from offloop.engine.training.strategy import Strategy
from offloop.engine.training.training_mode import enter_training
from offloop.engine.training.validation import Validator
from offloop.engine.training.window import Window, checked_value

logger = logging.getLogger("offloop")


class TrainingLoop:
    """One training. All methods run in the training thread; other threads read `progress`."""

    def __init__(
        self,
        program: Program,
        setup: Setup,
        host: Host,
        *,
        mailbox: Mailbox | None = None,
        hooks: Sequence[StepHook] = (),
        strategy: Strategy | None = None,
    ) -> None:
        """Prepare a training; nothing is touched before `run`.

        Args:
            program: Its steps and epochs.
            setup: What was decided before.
            host: Publishes events, asks deciders, saves checkpoints.
            mailbox: Where commands come from; None for one that stays empty.
            hooks: Step hooks, in declared order.
            strategy: Speaks to the other processes that train with this one; None: there are none.
        """
        config, device = setup.config, setup.device
        self.program = program
        self.setup = setup
        self.host = host
        self.mailbox = mailbox or Mailbox()
        self.strategy = strategy = strategy or Strategy()
        self.progress = Progress(steps_of=dict.fromkeys(setup.optimizers, 0))
        self.window = Window()
        """The batches of the optimizer step in progress."""
        self.mixed = MixedPrecision(config.precision, device)
        self.feed = DeviceTransfer(device, channels_last=config.channels_last)
        self.frozen = Frozen(program.model)
        self.parameters = OwnedParameters(program, setup.optimizers)
        self.made_options = {name: options_of(each) for name, each in setup.optimizers.items()}
        """The options of each optimizer as the script made it."""
        self.train_metrics = setup.train_metrics
        self.reporter = Reporter(
            host,
            self.progress,
            device,
            config.on_nonfinite,
            loss_scale=self.mixed.initial_scale,
            strategy=strategy,
        )
        is_manual = not program.automatic_optimization
        self.schedules = Schedules(setup, self.progress, self.reporter, is_manual=is_manual)
        self.hooks = StepHooks(hooks, host)
        self.source = EpochSource(
            program,
            setup.train_loader,
            setup.val_loader,
            seed=config.seed if config.sampling == "seeded" else None,
            is_resumable=setup.is_resumable,
            share=strategy.shared_training,
            share_validation=strategy.shared_validation,
        )
        self.validator = Validator(
            program,
            setup,
            progress=self.progress,
            reporter=self.reporter,
            hooks=self.hooks,
            mixed=self.mixed,
            source=self.source,
            strategy=strategy,
        )
        self.boundary = Boundary(
            program,
            host,
            self.mailbox,
            progress=self.progress,
            window=self.window,
            reporter=self.reporter,
            schedules=self.schedules,
            validator=self.validator,
        )
        self.manual = ManualOptimization(
            setup, self.progress, self.mixed, self.hooks, self.reporter, self.parameters, strategy
        )
        # Several processes find a loss that is not finite together, some steps late
        self.looks_at_losses = setup.looks_at_losses and strategy.world_size == 1
        self.data_wait: DataWait | None = DataWait()
        """What the first epoch waits for its loader; None after it."""
        self.resumed: ResumePoint | None = None
        """The checkpoint that is continued; None again once its loaders and random states are restored."""
        self.at_limit: dict[str, Any] = {}
        """See `_state_at_limit`."""
        self.has_whole_steps = True
        """False after a cancellation between two batches of one step: the first batch's gradients are lost."""
        self.is_loss_checked = False
        self._started = 0.0
        self._logged_names: set[str] = set()
        # False from an EpochEnd on, which has told whether the run continues
        self._may_end_between_epochs = True

    def run(self, handle: object = None) -> None:
        """Train until a limit, a stop or a cancellation; raise what the user's code raises.

        Args:
            handle: The `Run` that step hooks see.
        """
        progress, setup = self.progress, self.setup
        self._started = time.perf_counter()
        self.strategy.begin(self)
        self.source.handles_signals = self.host.handles_signals
        self.prepare_hooks(handle)
        progress.last_lr = progress.last_lr or largest_lr(setup.first_optimizer)
        for optimizer in setup.optimizers.values():
            free_gradients(optimizer)
        start = train_start(self.program, setup, progress, self.resumed, self.reporter, self.strategy)
        self.boundary.announce(start)
        self.schedules.begin(start.steps_per_epoch)
        if self.resumed is not None:
            is_pass_interrupted = self.source.restore(
                self.resumed.loaders,
                in_epoch=progress.phase == "in_epoch",
                epoch=progress.epoch,
                batches=progress.epoch_batches,
            )
            if not is_pass_interrupted or progress.ending is not None:
                self.finish_resuming()
        epochs = setup.limits.epochs
        try:
            if setup.config.validate_at_start and start.resumed_from is None:
                self.validate()
                progress.epoch_metrics.clear()  # they belong to no epoch
            while (epochs is None or progress.epoch < epochs) and not self.is_time_to_leave():
                self.run_epoch()
        except BaseException as error:
            if self.mailbox.is_forked:
                raise
            explain_failure(error)
            # Publish what was launched before the failure, unless others would have to join: they wait elsewhere
            with contextlib.suppress(BaseException):
                if self.strategy.world_size == 1:
                    self.reporter.flush()
            with contextlib.suppress(BaseException):
                self.hooks.run_all("after_training")
            raise
        self.reporter.flush()
        self.hooks.run_all("after_training")

    def prepare_hooks(self, handle: object) -> None:
        """Create what step hooks get. They can run until `close`."""
        parts = (self.setup, self.progress, self.window, self.reporter, self.hooks, self.log)
        self.hooks.point = StepPoint(self.program, handle, *parts)

    def run_epoch(self) -> None:
        """Train one epoch, validate if that is due, and publish its end."""
        started = time.perf_counter()
        progress, setup = self.progress, self.setup
        enter_training(self.program.model)
        # A resumed epoch has begun already
        if progress.phase != "in_epoch":
            self.source.position.begin_epoch(progress.epoch_batches)
            progress.epoch_batches = progress.epoch_samples = 0
            progress.epoch_first_step = progress.step + 1
            if self.train_metrics:
                self.train_metrics.reset()
            progress.phase = "in_epoch"
            self.boundary.announce(EpochStart(**self.reporter.position()))
            if progress.ending:
                return

        self.program.train_epoch(setup.train_loader)
        if self.resumed is not None and progress.ending is None:
            # All passes of the epoch were over when the checkpoint was taken
            self.finish_resuming()
        self.finish_window()
        if self.data_wait is not None:
            report_data_wait(self.data_wait, setup, progress, self.reporter, aside=self.seconds_aside())
            self.data_wait = None
        # An unfinished epoch has no end, nor has one whose time was up before its first batch
        if progress.is_interrupted or (progress.epoch_batches == 0 and progress.ending == "limit"):
            return
        if progress.epoch_batches == 0:
            was_read = progress.epoch > 0
            raise EmptyLoaderError(describe_empty("train_loader", self.setup.train_loader, was_read=was_read))
        if not self.program.automatic_optimization and progress.step == progress.epoch == 0:
            logger.warning(
                "no optimizer has stepped in the first epoch: a manual step calls self.backward(loss) and "
                "self.optimizer_step(name); optimizer.step() is not seen by the run"
            )
        self._end_epoch(started)

    def _end_epoch(self, started: float) -> None:
        """Compute the epoch's metrics, validate, step schedules, and publish `EpochEnd`."""
        progress = self.progress
        is_complete = progress.ending is None or self.source.position.is_complete
        is_last = progress.epoch + 1 == self.setup.limits.epochs
        if not is_last:
            # A limit that is reached here ends the run with a validation
            self.is_time_to_leave()

        self.reporter.flush()
        if not is_complete and progress.ending == "limit":
            self.at_limit = self._state_at_limit()
        trained = self.reporter.train_means.take("train_")
        if self.train_metrics:
            add_computed(trained, self.strategy.gather_metrics(self.train_metrics).compute())
        progress.epoch_metrics.update(trained)
        progress.epoch_metrics["lr"] = progress.last_lr
        is_extra = False
        if self.validator.is_due():
            is_extra = not is_complete or not self.validator.is_regular()
            if is_extra and not self.at_limit:
                self.at_limit = {
                    "validated_step": progress.validated_step,
                    "trainer": self.host.trainer_state(),
                }
            validated = self.validate(is_extra=is_extra)
            if validated is None or progress.ending == "cancelled":
                return
        # A decider that stops at ValidationEnd stops a finished epoch, whose end is still published
        if is_complete:
            self.schedules.end_epoch(is_extra=is_extra)

        if not is_last:
            # The last look at the time before the next epoch's first step
            self.is_time_to_leave()
        end = EpochEnd(
            metrics=Metrics(progress.epoch_metrics),
            samples=progress.epoch_samples,
            seconds=time.perf_counter() - started,
            complete=is_complete,
            final=progress.ending == "limit" or is_last,
            **self.reporter.position(),
        )
        progress.latest.update(progress.epoch_metrics)
        progress.epoch_metrics.clear()
        progress.history.append(end)
        progress.phase = "after_epoch" if is_complete else "in_epoch"
        self._may_end_between_epochs = False
        self.boundary.announce(end)
        if is_complete:
            progress.epoch += 1
            progress.phase = "before_epoch"

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over a loader's batches, on the device, as far as limits and commands allow.

        Between two batches the training thread processes commands: it pauses, changes something, or leaves here.
        """
        progress, source = self.progress, self.source
        is_training = not progress.is_validating
        knob = "limit_train_batches" if is_training else "limit_val_batches"
        limit = self.setup.config.limit_train_batches if is_training else self.setup.config.limit_val_batches
        length = limited_length(loader, limit, knob)
        limit = length if isinstance(limit, float) else limit
        limit, length = self.strategy.batches_of(loader, limit, length, is_training=is_training)
        mailbox, hooks, position, clock = self.mailbox, self.hooks, source.position, time.perf_counter
        feed, data_wait = self.feed, self.data_wait if is_training else None
        if self.is_time_to_leave():
            # The loader is not asked: making an iterator draws a random number and starts workers
            position.is_cut |= is_training
            return
        may_end = self.setup.limits.may_end_in_epoch
        iterator, given = self.begin_loader(loader)
        is_over, current = False, position.current if is_training else None
        while True:
            if current is None or position.is_boundary(current):
                if mailbox.attention:
                    self.boundary.process_commands()
                    if current is not None and not given:
                        position.drawn_before_first_batch()
                if (may_end or progress.ending is not None) and self.is_time_to_leave():
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
                    data_wait.begin(got - asked, got, self.seconds_aside())
                else:
                    data_wait.batches += 1
                    # A host that is ahead of its device waits for data all the time
                    if not feed.has_work():
                        data_wait.rest += got - asked
            if current is not None:
                current.given, position.asking = given, None
                progress.batch += 1
                progress.epoch_batches += 1
                if self.window.count == 0:
                    left = None if length is None else length - given + 1
                    self.window.begin(self.setup.config.accumulate_grad_batches, got, batches_left=left)
                    hooks.begin_step(progress.step + 1)
                self.window.data_time += got - asked
                if hooks.active:
                    hooks.run("before_batch", batch)
            else:
                progress.val_batches += 1
            try:
                yield feed(batch) if feed.is_needed else batch
            except GeneratorExit:
                if current is not None and progress.ending is None:
                    # The user's epoch has left this loader for good
                    current.is_done = True
                raise
        if progress.ending is not None:
            source.leave(iterator, in_training=is_training)
        if current is not None:
            is_at_length = given == length and progress.ending == "limit"
            current.is_done = is_over or given == limit or (is_at_length and source.has_no_more(iterator))
            self.finish_window()

    def begin_loader(self, loader: Iterable[Batch]) -> tuple[Iterator[Batch], int]:
        """Return an iterator over the loader's batches, and how many of them a resumed epoch has had."""
        progress, source = self.progress, self.source
        if progress.is_validating:
            self.strategy.begin_pass()
            return source.begin_validation(loader, progress.epoch), 0
        if self.resumed is not None and not source.is_interrupted_pass_next:
            # The interruption was between two passes
            self.finish_resuming()
        iterator, given = source.begin(
            loader,
            epoch=progress.epoch,
            start=progress.epoch_batches,
            keep_random=self.resumed is None,
        )
        # A resumed epoch has had all of a pass that is done
        if not source.position.current.is_done:
            iterator = self.strategy.iterate(iterator, given)
            if self.resumed is not None:
                self.finish_resuming()
        return iterator, given

    def train_batch(self, batch: Batch) -> None:
        """Train on one batch: forward, backward and, at the end of the window, the optimizer."""
        window, hooks = self.window, self.hooks
        if window.size == 0:
            raise RuntimeError("train_batch() takes the batches of `for batch in self.batches(loader)`")
        if hooks.active:
            hooks.run("before_forward", batch)
        share = self.strategy.share
        # Counted first, because the step may take the batch apart
        samples = self.setup.count_samples(batch)
        with self.strategy.accumulating(is_last=window.count + 1 >= window.size):
            with self.mixed.autocast():
                output = self.strategy.forward(batch)
            loss, outputs, targets, weight, own_samples = read_output(output, "training_step")

            if own_samples is not None:
                samples = own_samples
            if not share.counts:
                samples, weight = 0, None if weight is None else 0.0
            loss_weight = float(samples) if weight is None else weight
            window.samples += samples
            window.weight += loss_weight
            if self.train_metrics and share.counts:
                self.train_metrics.add(outputs, targets, "training_step")
            if loss is not None:
                window.losses.append(loss)
                window.weights.append(loss_weight)
                window.factors.append(share.factor)
            if window.fresh:
                window.settle(loss_weight, share.factor)
            if not self.program.automatic_optimization:
                if (done := self.manual.end_batch()) is not None:
                    self._end_step(None, done.norm, self.mixed.update(), skipped=done.skipped)
                return

            if loss is None or not self.is_loss_checked:
                check_loss(loss)
                self.is_loss_checked = True
            assert loss is not None
            if self.looks_at_losses:
                refuse_nonfinite(loss, self.reporter, self.progress.step + 1)
            if hooks.active:
                hooks.run("before_backward", batch)
            self.mixed.backward(window.weighted(loss, weight, share.factor, self.strategy.world_size))
        if hooks.active:
            hooks.run("after_backward", batch)
            window.settle(loss_weight, share.factor)
        window.count += 1
        if window.count >= window.size:
            self.optimizer_step(batch)

    def optimizer_step(self, batch: Batch) -> None:
        """Update the parameters with the gradients of the window."""
        config, window, optimizer = self.setup.config, self.window, self.setup.first_optimizer
        if window.is_weighted:
            total = self.strategy.sum(sum(window.weights)) or 1.0
            rescale(self.parameters(), self.strategy.world_size / total)
        self.mixed.unscale(optimizer)
        if self.hooks.active:
            self.hooks.run("before_optimizer_step", batch)
        norm = None
        if config.gradient_clip_val is not None:
            norm = clip(self.parameters(), config.gradient_clip_val, config.gradient_clip_algorithm)
        skipped = False
        if config.on_nonfinite == "skip_step":
            skipped = not self.strategy.all(window.is_finite() and gradients_are_finite(self.parameters()))
        self.progress.last_lr = largest_lr(optimizer)
        self.progress.last_rates = rates_by_group(self.setup.optimizers)
        if not skipped:
            self.mixed.step(optimizer)
        self._end_step(batch, norm, self.mixed.update(), skipped=skipped)

    def _end_step(
        self, batch: Batch, norm: torch.Tensor | None, scale: torch.Tensor | None, *, skipped: bool
    ) -> None:
        """Count a step, publish it, and validate if that is due after it."""
        progress, window = self.progress, self.window
        progress.step += 1
        if self.schedules.all:
            self.schedules.step(self.manual.stepped)
        self.manual.clear()
        if self.hooks.active:
            self.hooks.run("after_step", batch)
        if self.program.automatic_optimization:
            free_gradients(self.setup.first_optimizer)
        self.reporter.step(window, norm=norm, scale=scale, skipped=skipped)
        window.clear()
        if self.validator.is_due_after_step():
            self.validate_after_step()

    def finish_window(self) -> None:
        """Close a window with fewer batches than planned: the loader ended, or the epoch was left."""
        progress, window = self.progress, self.window
        if progress.ending == "cancelled":
            if window.count:
                self.has_whole_steps = False
        elif window.count:
            if not window.is_weighted:
                rescale(self.parameters(), window.size / window.count)
            if window.count < window.size:
                self.strategy.average_gradients(self.parameters())
            self.optimizer_step(None)
        elif window.samples or window.fresh:
            # Batches of manual steps that stepped nothing, and values that an own epoch logged outside of batches
            self.reporter.add_to_epoch(window)
        window.clear()

    def validate(self, *, is_extra: bool = False) -> dict[str, float] | None:
        """Run a validation, see `Validator.validate`."""
        boundary = self.boundary
        return self.validator.validate(boundary.announce, boundary.process_commands, is_extra=is_extra)

    def validate_after_step(self) -> None:
        """Run the validation that is due after a step; commands for a step boundary are applied before it."""
        if self.mailbox.attention:
            self.boundary.process_commands()
        if self.progress.ending is None:
            self.validate()

    def finish_resuming(self) -> None:
        """Restore the random states, the last thing before training continues, and publish how exact all is."""
        self.resumed = None
        self.boundary.announce(self.host.finish_resuming(self.source.position.doubts))
        progress = self.progress
        is_after_step = progress.epoch_batches and progress.step and progress.phase == "in_epoch"
        if is_after_step and progress.ending is None and self.validator.is_due_after_step():
            # It was due when the checkpoint was taken
            if progress.validated_step != progress.step:
                self.validate()

    def log(
        self, name: str, value: "torch.Tensor | float", weight: "torch.Tensor | float | None" = None
    ) -> None:
        """Log a value with the step or the validation in progress."""
        if self.progress.is_validating:
            self.validator.log(name, value, weight)
            return
        self.window.fresh.append(checked_value(name, value, weight, self.train_metrics, self._logged_names))

    def close(self) -> None:
        """Release what must not outlive the run. Its last checkpoint was taken."""
        # The graphs of the losses of a step that failed hold everything that was computed
        self.window.clear()
        self.train_metrics = None
        self.validator.close()
        self.hooks.close()
        self.source.close()
        self.schedules.close()
        self.strategy.close()

    def is_time_to_leave(self) -> bool:
        """Return True when `batches` should end: at once for a cancellation, else at the window's end."""
        progress = self.progress
        if progress.ending == "cancelled":
            return True
        if progress.is_validating:
            return progress.ending == "stopped"
        if self.window.count:
            return False
        if progress.ending is None and self._has_reached_limit():
            progress.ending = "limit"
        return progress.ending is not None

    def _has_reached_limit(self) -> bool:
        """Return True when `max_steps` or `max_time` ends the run here."""
        limits, progress = self.setup.limits, self.progress
        if limits.max_steps is not None and progress.step >= limits.max_steps:
            progress.reason = f"max_steps={limits.max_steps}"
            return True
        is_in_epoch = progress.phase == "in_epoch" and progress.epoch_batches > 0
        if limits.max_time is None or not (is_in_epoch or self._may_end_between_epochs):
            return False
        if self.strategy.seconds(self.seconds()) < limits.max_time:
            return False
        progress.reason = f"max_time={limits.max_time}"
        return True

    def seconds(self) -> float:
        """Return how long this run has trained in seconds: earlier attempts included, pauses not."""
        return (
            self.progress.earlier_seconds + time.perf_counter() - self._started - self.boundary.paused_seconds
        )

    def seconds_aside(self) -> float:
        """Return the seconds of this attempt spent in pauses and validations."""
        return self.boundary.paused_seconds + self.validator.seconds

    def can_be_continued(self) -> bool:
        """Return True unless a weight is not finite and `on_nonfinite="raise"` would end a resumed run (host sync)."""
        return self.setup.config.on_nonfinite != "raise" or self.parameters.are_finite()

    def _state_at_limit(self) -> dict[str, Any]:
        """Return the parts of the state that the end of a run in the middle of an epoch changes.

        Such a run ends with an extra validation and an `EpochEnd`. A run that is resumed from there continues as if
        they had not happened, so its checkpoint has these parts as they were at the last step.
        """
        return {
            "means": self.reporter.train_means.state_dict(),
            "epoch_metrics": dict(self.progress.epoch_metrics),
            "validated_step": self.progress.validated_step,
            "callbacks": self.host.callback_states(),
            "trainer": self.host.trainer_state(),
        }
