"""The training loop: plain synchronous PyTorch, from the first batch to the last, in the training thread.

It is given a program to run (the user's `Trainer`: steps and epochs), a function to publish events with, a
mailbox to look at, deciders to ask and a table of step hooks. It knows no callback and no event loop.

    run ─┬─ run_epoch ─┬─ program.train_epoch ── batches ── train_batch ── optimizer_step
         │             ├─ validate ── program.validate_epoch ── batches ── validate_batch
         │             └─ EpochEnd
         └─ ...

`batches` is the one place where the training thread looks up: commands, limits and the position in the
epoch live there, so that a user's own epoch (`for batch in self.batches(loader): ...`) has them too.
The arithmetic is that of a loop written by hand, bit for bit.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from offloop.engine.callback import StepHook
from offloop.engine.config import TrainerConfig
from offloop.engine.control import Command, Control
from offloop.engine.data import batch_size, limited_length, to_device
from offloop.engine.errors import ConfigError, EmptyLoaderError, LossError
from offloop.engine.events import (
    NO_METRICS,
    CommandApplied,
    EpochEnd,
    EpochStart,
    Event,
    LearningRateChanged,
    Metrics,
    Sample,
    Settings,
    StateChanged,
    StepEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.learning_rate import largest_lr, scale_lr
from offloop.engine.precision import MixedPrecision, clip, gradients_are_finite, rescale
from offloop.engine.readback import Readback

if TYPE_CHECKING:
    from offloop.engine.metrics import MetricSet

logger = logging.getLogger("offloop")
Batch = Any
StepOutput = torch.Tensor | Mapping[str, Any] | None
Ending = Literal["stopped", "cancelled", "limit"]


class Program(Protocol):
    """What the loop runs: the part of a `Trainer` that users override."""

    model: torch.nn.Module
    automatic_optimization: bool

    def training_step(self, batch: Batch, /) -> StepOutput: ...
    def validation_step(self, batch: Batch, /) -> StepOutput: ...
    def train_epoch(self, loader: Iterable[Batch], /) -> None: ...
    def validate_epoch(self, loader: Iterable[Batch], /) -> None: ...


class Limits(Protocol):
    """When a run is complete."""

    epochs: int | None
    max_steps: int | None
    max_time: float | None


class Means:
    """Weighted means of named values, on the host."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def take(self, prefix: str) -> dict[str, float]:
        """Return the means under prefixed names, and begin anew."""
        means = {
            f"{prefix}{name}": total / self.weights[name] if self.weights[name] else math.nan
            for name, total in self.sums.items()
        }
        self.sums.clear()
        self.weights.clear()
        return means


class StepPoint:
    """What a step hook sees: the live objects of the step it runs in. Valid only during the call."""

    def __init__(self, loop: "TrainingLoop", trainer: Any, run: Any) -> None:
        self.trainer = trainer
        self.run = run
        self.name = ""
        self.batch: Batch = None
        self._loop = loop

    @property
    def model(self) -> torch.nn.Module:
        """The model in training."""
        return self._loop.program.model

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """The optimizers by name; a single one is called `optimizer`."""
        return self._loop.optimizers

    @property
    def epoch(self) -> int:
        """Index of the epoch, from 0."""
        return self._loop.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; at `after_step` the one just made is among them."""
        return self._loop.step

    @property
    def loss(self) -> torch.Tensor | None:
        """The latest batch's loss, () on the device, detached; None before the first."""
        return self._loop.window_losses[-1] if self._loop.window_losses else None

    def log(self, name: str, value: "torch.Tensor | float") -> None:
        """Log a value with the step, as `Trainer.log` does. A tensor stays on the device until read late."""
        self._loop.log(name, value)

    def publish(self, event_class: type[Event], **values: Any) -> None:
        """Publish an event whose numbers may still be on the device; they are read late, in order.

        Args:
            event_class: The class of the event.
            values: Its fields; tensors of one element become floats.
        """
        self._loop.publish_late(event_class, values)


class TrainingLoop:
    """One run's training, from the first epoch to the last. All methods run in the training thread."""

    def __init__(
        self,
        program: Program,
        *,
        config: TrainerConfig,
        limits: Limits,
        device: torch.device,
        optimizers: dict[str, torch.optim.Optimizer],
        scheduler: LRScheduler | None,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        train_metrics: "MetricSet | None",
        val_metrics: "MetricSet | None",
        monitor: str,
        publish: Callable[[Event], None],
        decide: Callable[[Event], None],
        clock_offset: float,
        run_id: str,
        control: Control,
        is_blocked: Callable[[], bool],
        hooks: Sequence[StepHook],
        hook_failed: Callable[[StepHook, Exception], None],
        save: Callable[[Command], None],
    ) -> None:
        self.program = program
        self.config = config
        self.limits = limits
        self.device = device
        self.optimizers = optimizers
        self.scheduler = scheduler
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.train_metrics = train_metrics
        self.val_metrics = val_metrics
        self.monitor = monitor
        self.emit = publish
        self.decide = decide
        self.clock_offset = clock_offset
        self.run_id = run_id
        self.control = control
        self.is_blocked = is_blocked
        self.hooks = hooks
        self.hook_failed = hook_failed
        self.save = save
        self.point: StepPoint | None = None

        self.mixed = MixedPrecision(config.precision, device)
        self.readback = Readback(device)
        self.on_host = device.type == "cpu"
        self.automatic = program.automatic_optimization
        self.parameters = list(program.model.parameters())
        self.first_optimizer = next(iter(optimizers.values()))

        # Position: counts of finished things, on every event
        self.epoch = 0
        self.step = 0
        self.batch = 0

        # Where the run stands
        self.ending: Ending | None = None
        self.reason = ""
        self.paused_by: Command | None = None
        self.state = "running"
        self.obeying_decider = False
        self.validating = False
        self.started = 0.0
        self.paused_seconds = 0.0

        # The epoch in progress
        self.epoch_batches = 0
        self.epoch_length: int | None = None
        self.epoch_samples = 0
        self.train_means = Means()
        self.val_means = Means()
        self.epoch_metrics: dict[str, float] = {}  # made since the last EpochEnd
        self.history: list[EpochEnd] = []
        self.latest: dict[str, float] = {}
        self.last_lr = 0.0

        # The accumulation window in progress: the batches of one optimizer step
        self.window = 0  # how many batches it will have
        self.in_window = 0  # how many it has
        self.window_losses: list[torch.Tensor] = []
        self.window_weights: list[float] = []
        self.window_logged: list[tuple[str, torch.Tensor | float]] = []
        self.window_samples = 0
        self.window_data_time = 0.0
        self.window_started = 0.0
        self.window_is_weighted = False
        self.active_hooks: dict[str, list[StepHook]] = {}
        self.stepped: dict[str, bool] = {}  # manual optimization: optimizers stepped by this training_step
        self.manual_norm: torch.Tensor | None = None
        self.loss_checked = False

        # The validation in progress, or the last one
        self.validated_step = -1
        self.val_samples = 0
        self.val_batches = 0

    # The story -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until a limit, a stop or a cancellation; raise what the user's code raises."""
        self.started = time.perf_counter()
        self.last_lr = self.lr
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.announce(self.train_start())
        epochs = self.limits.epochs
        while self.ending is None and (epochs is None or self.epoch < epochs):
            self.run_epoch()
        self.readback.flush()

    def run_epoch(self) -> None:
        """Train one epoch, validate if it is time to, and say how it went."""
        started = time.perf_counter()
        self.epoch_batches = self.epoch_samples = 0
        self.epoch_length = limited_length(
            self.train_loader, self.config.limit_train_batches, "limit_train_batches"
        )
        if self.train_metrics:
            self.train_metrics.reset()
        self.announce(EpochStart(**self.position()))
        if self.ending:
            return

        self.program.train_epoch(self.train_loader)
        self.finish_window()
        if self.ending in ("stopped", "cancelled"):
            return  # an unfinished epoch has no end
        if self.epoch_batches == 0:
            raise EmptyLoaderError(self.describe_empty_loader())

        complete = self.ending is None or self.epoch_batches == self.epoch_length
        self.readback.flush()
        self.epoch_metrics.update(self.train_means.take("train_"))
        self.epoch_metrics["lr"] = self.last_lr
        if self.train_metrics:
            self.epoch_metrics.update(self.train_metrics.compute())
        if self.validation_is_due_after_epoch():
            made = self.validate()
            if made is None or self.ending == "cancelled":
                return
        # A decider that stops at ValidationEnd stops a finished epoch: its end is still said.
        if complete and self.config.scheduler_interval == "epoch":
            self.step_scheduler()

        end = EpochEnd(
            metrics=Metrics(self.epoch_metrics),
            samples=self.epoch_samples,
            seconds=time.perf_counter() - started,
            complete=complete,
            **self.position(),
        )
        self.latest.update(self.epoch_metrics)
        self.epoch_metrics.clear()
        self.history.append(end)
        self.announce(end)
        self.epoch += complete

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
        control, clock = self.control, time.perf_counter
        iterator = iter(loader)
        given = 0
        while True:
            if control.attention:
                self.look_up()
            if self.is_time_to_leave() or given == limit:
                break
            asked = clock()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            got = clock()
            given += 1
            if training:
                self.batch += 1
                self.epoch_batches += 1
                if self.in_window == 0:
                    self.begin_window(got, None if length is None else length - given + 1)
                self.window_data_time += got - asked
                if self.active_hooks:
                    self.run_hooks("before_batch", batch)
            else:
                self.val_batches += 1
            yield batch if self.on_host else to_device(batch, self.device)
        if training:
            self.finish_window()

    def begin_window(self, now: float, batches_left: int | None) -> None:
        """Begin an accumulation window: the batches of one optimizer step, fewer at the end of an epoch."""
        self.window = self.config.accumulate_grad_batches
        if batches_left is not None and batches_left < self.window:
            self.window = max(1, batches_left)
        self.window_started = now
        self.window_data_time = 0.0
        if self.hooks:
            number = self.step + 1
            self.active_hooks = {}
            for hook in self.hooks:
                if number % hook.every_n_steps == 0:
                    self.active_hooks.setdefault(hook.point, []).append(hook)

    def train_batch(self, batch: Batch) -> None:
        """Train on one batch: forward, backward and, at the end of the window, the optimizer."""
        if self.window == 0:
            raise RuntimeError("train_batch() takes the batches of `for batch in self.batches(loader)`")
        if self.active_hooks:
            self.run_hooks("before_forward", batch)
        with self.mixed.autocast():
            output = self.program.training_step(batch)
        loss, outputs, targets, weight = read_output(output, "training_step")

        samples = batch_size(batch)
        self.window_samples += samples
        if self.train_metrics and outputs is not None and targets is not None:
            self.train_metrics.update(outputs.detach(), targets)
        if loss is not None:
            self.window_losses.append(loss.detach())
            self.window_weights.append(samples if weight is None else weight)
        if not self.automatic:
            self.end_manual_batch()
            return

        if not self.loss_checked:
            check_loss(loss)
            self.loss_checked = True
        assert loss is not None
        self.backward_in_window(loss, weight)
        if self.active_hooks:
            self.run_hooks("after_backward", batch)
        self.in_window += 1
        if self.in_window >= self.window:
            self.optimizer_step(batch)

    def backward_in_window(self, loss: torch.Tensor, weight: float | None) -> None:
        """Add a batch's gradients: each batch counts as its share of the window."""
        if self.window > 1:
            if weight is None:
                loss = loss / self.window
            else:
                loss = loss * weight  # the sum of the weights is known only at the end: rescaled there
                self.window_is_weighted = True
        self.mixed.backward(loss)

    def finish_window(self) -> None:
        """Close a window that has fewer batches than expected: the loader ended, or the epoch was left."""
        if self.in_window and self.ending != "cancelled":
            if not self.window_is_weighted:
                rescale(self.parameters, self.window / self.in_window)
            self.optimizer_step(None)
        self.in_window = 0
        self.window_losses.clear()  # of a cancelled window, or of manual steps that stepped nothing
        self.window_weights.clear()

    def optimizer_step(self, batch: Batch) -> None:
        """Update the parameters with the gradients of the window."""
        config = self.config
        optimizer = self.first_optimizer
        if self.window_is_weighted:
            rescale(self.parameters, 1.0 / (sum(self.window_weights) or 1.0))
            self.window_is_weighted = False
        self.mixed.unscale(optimizer)
        if self.active_hooks:
            self.run_hooks("before_optimizer_step", batch)
        norm = None
        if config.gradient_clip_val is not None:
            norm = clip(self.parameters, config.gradient_clip_val, config.gradient_clip_algorithm)
        skipped = config.on_nonfinite == "skip_step" and not self.step_is_finite()
        self.last_lr = self.lr
        if not skipped:
            self.mixed.step(optimizer)
        scale = self.mixed.update()
        self.in_window = 0
        self.end_step(batch, norm, scale, skipped)

    def end_step(
        self, batch: Batch, norm: torch.Tensor | None, scale: torch.Tensor | None, skipped: bool
    ) -> None:
        """Count a step that was made, say so, and do what is due after it."""
        if self.scheduler is not None and self.config.scheduler_interval == "step":
            self.scheduler.step()
        self.step += 1
        self.epoch_samples += self.window_samples
        if self.active_hooks:
            self.run_hooks("after_step", batch)
        if self.automatic:
            self.first_optimizer.zero_grad()
        self.publish_step(norm, scale, skipped)
        every = self.config.val_every_n_steps
        if every is not None and self.step % every == 0:
            self.validate()

    def validate(self) -> dict[str, float] | None:
        """Run a validation at a step boundary; returns what it made, None if it was stopped.

        Each module gets its own train/eval flag back, so that frozen parts stay frozen.
        """
        if self.val_loader is None:
            raise ConfigError("there is no val_loader to validate on: give one to train()")
        started = time.perf_counter()
        self.announce(ValidationStart(**self.position()))
        if self.ending in ("stopped", "cancelled"):
            return None
        self.run_validation_hooks("before_validation")
        self.validating = True
        in_training = [module for module in self.program.model.modules() if module.training]
        self.program.model.eval()
        try:
            made = self.run_validation(self.val_loader)
        finally:
            for module in in_training:
                module.training = True
            self.validating = False
        if self.ending in ("stopped", "cancelled"):
            return None
        self.validated_step = self.step
        self.run_validation_hooks("after_validation")
        self.epoch_metrics.update(made)
        self.latest.update(made)
        self.announce(
            ValidationEnd(
                metrics=Metrics(made),
                samples=self.val_samples,
                seconds=time.perf_counter() - started,
                **self.position(),
            )
        )
        return made

    def run_validation(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Run the model over `loader` and return the values made. The model is in eval mode already."""
        self.val_samples = self.val_batches = 0
        if self.val_metrics:
            self.val_metrics.reset()
        with torch.no_grad():
            self.program.validate_epoch(loader)
        if self.val_batches == 0 and self.ending is None:
            raise EmptyLoaderError("the val_loader gave no batch")
        self.readback.flush()
        made = self.val_means.take("val_")
        if self.val_metrics:
            made.update(self.val_metrics.compute())
        return made

    def validate_batch(self, batch: Batch) -> None:
        """Run one batch of a validation."""
        with self.mixed.autocast():
            output = self.program.validation_step(batch)
        loss, outputs, targets, weight = read_output(output, "validation_step")
        samples = batch_size(batch)
        self.val_samples += samples
        if self.val_metrics and outputs is not None and targets is not None:
            self.val_metrics.update(outputs, targets)
        if loss is not None:
            counted = samples if weight is None else weight
            self.readback.read([loss], lambda values: self.val_means.add("loss", values[0], counted))

    # Manual optimization -------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients for a manual step, scaled as the precision needs."""
        self.mixed.backward(loss)
        if self.active_hooks:
            self.run_hooks("after_backward", None)

    def manual_step(self, name: str, closure: Callable[[], Any] | None) -> None:
        """Unscale, clip, step and zero one optimizer of a manual step."""
        config, optimizer = self.config, self.optimizers[name]
        self.mixed.unscale(optimizer)
        if self.active_hooks:
            self.run_hooks("before_optimizer_step", None)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if config.gradient_clip_val is not None:
            norm = clip(parameters, config.gradient_clip_val, config.gradient_clip_algorithm)
            self.manual_norm = norm
        self.last_lr = self.lr
        if config.on_nonfinite != "skip_step" or gradients_are_finite(parameters):
            self.mixed.step(optimizer, closure)
        optimizer.zero_grad()
        self.stepped[name] = True

    def end_manual_batch(self) -> None:
        """Count a step if the training_step stepped anything."""
        if self.stepped:
            self.stepped.clear()
            norm, self.manual_norm = self.manual_norm, None
            self.end_step(None, norm, self.mixed.update(), skipped=False)

    # Looking up: commands, pauses, limits --------------------------------------------------------

    def is_time_to_leave(self) -> bool:
        """True when `batches` should end: at once for a cancellation, else at the window's end."""
        if self.ending == "cancelled":
            return True
        if self.validating:
            return self.ending == "stopped"
        if self.in_window:
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
        if limits.max_time is not None:
            seconds = time.perf_counter() - self.started - self.paused_seconds
            if seconds >= limits.max_time:
                self.reason = f"max_time={limits.max_time}"
                return True
        return False

    def look_up(self) -> None:
        """Obey what waits in the mailbox, and wait while paused or while a `block` subscriber is full."""
        seen = self.control.changes
        self.obey()
        while self.ending != "cancelled":
            if self.paused_by is not None and not self.control.has_stop:
                asked = time.perf_counter()
                self.control.wait_for_change(seen)
                self.paused_seconds += time.perf_counter() - asked
            elif self.is_blocked():
                self.control.stand(
                    lambda: self.control.cancelled or not self.is_blocked(),
                    "a subscriber with on_full='block'",
                )
            else:
                break
            seen = self.control.changes
            self.obey()
        if self.paused_by is not None and self.ending is not None:
            self.paused_by = None  # a stop ends a pause

    def obey(self) -> None:
        """Apply the commands that can be applied here."""
        control = self.control
        boundary = self.in_window == 0 and not self.validating
        while commands := control.collect(step_boundary=boundary, stop_only=self.validating):
            for command in commands:
                self.apply(command)
        if control.cancelled and self.ending != "cancelled":
            self.ending = "cancelled"
            self.reason = control.cancel_reason
            self.change_state("stopping", control.cancel_reason, "")

    def announce(self, event: Event) -> None:
        """Publish an event at which the training thread stands at a boundary, ask deciders, and obey."""
        self.publish(event)
        if not self.obeying_decider:  # what a decider's command causes is not decided about again
            self.decide(event)
        if self.control.attention:
            self.look_up()

    def apply(self, command: Command) -> None:
        """Apply a command, acknowledge it, and give the result to whoever waits for it."""
        if not command.future.set_running_or_notify_cancel():
            return
        result, error = None, None
        outer, self.obeying_decider = self.obeying_decider, self.obeying_decider or command.from_decider
        try:
            result = getattr(self, f"apply_{command.name}")(command)
        except Exception as problem:
            error = problem
        finally:
            self.obeying_decider = outer
        settings = {name: plain(value) for name, value in command.arguments.items()}
        self.publish(
            CommandApplied(
                command=command.name,
                command_id=command.id,
                by=command.by,
                arguments=Settings(settings),
                error=None if error is None else f"{type(error).__name__}: {error}",
                **self.position(),
            )
        )
        if command.name == "checkpoint" and error is None:
            return  # its future is completed by the writer, when the checkpoint is durable
        if error is None:
            command.future.set_result(result)
        else:
            command.future.set_exception(error)
            if command.name == "validate" and not isinstance(error, ConfigError):
                raise error  # the user's own validation failed, as it would have at its usual time

    def apply_pause(self, command: Command) -> None:
        self.paused_by = command
        self.change_state("paused", command.arguments.get("reason", ""), command.by)

    def apply_resume(self, command: Command) -> None:
        if self.paused_by is not None:
            self.paused_by = None
            self.change_state("running", "", command.by)

    def apply_stop(self, command: Command) -> None:
        self.ending = "stopped"
        self.reason = command.arguments["reason"]
        self.change_state("stopping", self.reason, command.by)

    def apply_validate(self, command: Command) -> Metrics:
        made = self.validate()
        if made is None:
            raise ConfigError("the validation was stopped before its end")
        return Metrics(made)

    def apply_call(self, command: Command) -> Any:
        return command.arguments["function"](self.program)

    def apply_checkpoint(self, command: Command) -> None:
        self.save(command)

    def apply_set_lr(self, command: Command) -> None:
        lr, group, name = (command.arguments[key] for key in ("lr", "group", "optimizer"))
        if name is None:
            name = next(iter(self.optimizers))
        optimizer = self.optimizers[name]
        previous = largest_lr(optimizer)
        scale_lr(optimizer, lr, group=group, scheduler=self.scheduler)
        self.publish_lr_change(previous, "command", name)

    # Saying what happened ------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """Learning rate of the first optimizer: its largest group's."""
        return largest_lr(self.first_optimizer)

    def position(self) -> dict[str, Any]:
        """Return the base fields of an event born here and now."""
        return {
            "run_id": self.run_id,
            "time": self.clock_offset + time.perf_counter(),
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
        }

    def publish(self, event: Event) -> None:
        """Publish an event of this thread; everything before it goes first."""
        if isinstance(event, Sample):
            self.readback.put(lambda: self.emit(event))
        else:
            self.readback.flush()
            self.emit(event)

    def publish_late(self, event_class: type[Event], values: dict[str, Any]) -> None:
        """Publish an event whose tensors are read when they have arrived."""
        base = {**self.position(), **values}
        names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
        if not names:
            self.publish(event_class(**base))
            return

        def deliver(numbers: list[float]) -> None:
            self.emit(event_class(**{**base, **dict(zip(names, numbers, strict=True))}))

        self.readback.read([values[name] for name in names], deliver)

    def log(self, name: str, value: "torch.Tensor | float") -> None:
        """Log a value with the step or the validation in progress."""
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"log({name!r}) takes one number, got a tensor of shape {tuple(value.shape)}"
                )
            value = value.detach().clone()  # the caller may change it in place before it is read
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"log({name!r}) takes a number or a tensor of one element, got {value!r}")
        if not self.validating:
            self.window_logged.append((name, value))
        elif isinstance(value, torch.Tensor):
            self.readback.read([value], lambda values: self.val_means.add(name, values[0], 1.0))
        else:
            self.val_means.add(name, value, 1.0)

    def publish_step(self, norm: torch.Tensor | None, scale: torch.Tensor | None, skipped: bool) -> None:
        """Publish `StepEnd` for the step just made, now or when its values have arrived."""
        now = time.perf_counter()
        losses, weights = self.window_losses, self.window_weights
        if self.readback.is_immediate and len(losses) == 1 and not self.window_logged and scale is None:
            # The usual step on a CPU, without the detour
            value = losses[0].item()  # host sync, free on CPU
            weight = weights[0]
            self.check_finite(value)
            means = self.train_means
            means.sums["loss"] = means.sums.get("loss", 0.0) + value * weight
            means.weights["loss"] = means.weights.get("loss", 0.0) + weight
            self.emit(
                StepEnd(
                    run_id=self.run_id,
                    time=self.clock_offset + now,
                    epoch=self.epoch,
                    step=self.step,
                    batch=self.batch,
                    loss=value,
                    lr=self.last_lr,
                    grad_norm=None if norm is None else norm.item(),  # host sync, free on CPU
                    samples=self.window_samples,
                    data_time=self.window_data_time,
                    step_time=now - self.window_started,
                    skipped=skipped,
                )
            )
            losses.clear()
            weights.clear()
        else:
            self.read_step(now, norm, scale, skipped)
        self.window_samples = 0

    def read_step(
        self, now: float, norm: torch.Tensor | None, scale: torch.Tensor | None, skipped: bool
    ) -> None:
        """Read a step's values as the device allows, and publish its `StepEnd` then."""
        fields = {
            **self.position(),
            "time": self.clock_offset + now,
            "lr": self.last_lr,
            "samples": self.window_samples,
            "data_time": self.window_data_time,
            "step_time": now - self.window_started,
        }
        losses, weights, logged = self.window_losses, self.window_weights, self.window_logged
        self.window_losses, self.window_weights, self.window_logged = [], [], []
        on_device = [value for _, value in logged if isinstance(value, torch.Tensor)]
        extra = [value for value in (norm, scale) if value is not None]

        def deliver(numbers: list[float]) -> None:
            of_losses = numbers[: len(losses)]
            rest = iter(numbers[len(losses) :])
            metrics: dict[str, list[float]] = {}
            for name, value in logged:
                number = next(rest) if isinstance(value, torch.Tensor) else float(value)
                metrics.setdefault(name, []).append(number)
                self.train_means.add(name, number, fields["samples"])
            for value, weight in zip(of_losses, weights, strict=True):
                self.check_finite(value, fields["step"])
                self.train_means.add("loss", value, weight)
            means = {name: sum(values) / len(values) for name, values in metrics.items()}
            grad_norm = next(rest) if norm is not None else None
            was_skipped = skipped
            if scale is not None:
                means["loss_scale"] = next(rest)
                was_skipped = skipped or means["loss_scale"] < self.latest.get("loss_scale", 0.0)
                self.latest["loss_scale"] = means["loss_scale"]
            self.emit(
                StepEnd(
                    loss=sum(of_losses) / len(of_losses) if of_losses else math.nan,
                    grad_norm=grad_norm,
                    skipped=was_skipped,
                    metrics=Metrics(means) if means else NO_METRICS,
                    **fields,
                )
            )

        self.readback.read([*losses, *on_device, *extra], deliver)

    def train_start(self) -> TrainStart:
        """Return the first event of the run."""
        length = limited_length(self.train_loader, self.config.limit_train_batches, "limit_train_batches")
        steps = None
        if length is not None and self.automatic:
            steps = math.ceil(length / self.config.accumulate_grad_batches)
        return TrainStart(
            config=Settings(self.config.as_settings()),
            device=str(self.device),
            parameters=sum(p.numel() for p in self.parameters if p.requires_grad),
            batches_per_epoch=length,
            steps_per_epoch=steps,
            epochs=self.limits.epochs,
            max_steps=self.limits.max_steps,
            max_time=self.limits.max_time,
            **self.position(),
        )

    def change_state(self, state: str, reason: str, by: str) -> None:
        self.state = state
        self.publish(StateChanged(state=state, reason=reason, by=by, **self.position()))

    def publish_lr_change(self, previous: float, source: str, name: str) -> None:
        lr = largest_lr(self.optimizers[name])
        shown = name if len(self.optimizers) > 1 else ""
        self.publish(
            LearningRateChanged(lr=lr, previous=previous, source=source, optimizer=shown, **self.position())
        )

    # Smaller things ------------------------------------------------------------------------------

    def step_scheduler(self) -> None:
        """Step a schedule that goes by epochs, and say what it did."""
        if self.scheduler is None:
            return
        name = next(iter(self.optimizers))
        previous = self.lr
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(Metrics(self.epoch_metrics)[self.monitor])
        else:
            self.scheduler.step()
        if self.lr != previous:
            self.publish_lr_change(previous, "schedule", name)

    def validation_is_due_after_epoch(self) -> bool:
        if self.val_loader is None or self.validated_step == self.step:
            return False
        if self.ending == "limit":
            return True  # the run ends here: its last word should hold a validation
        every = self.config.val_every_n_epochs
        if every is None:
            every = 1 if self.config.val_every_n_steps is None else None
        return every is not None and (self.epoch + 1) % every == 0

    def step_is_finite(self) -> bool:
        """True if the window's losses and gradients are finite. Synchronises with the device."""
        losses = torch.stack(self.window_losses)
        return bool(torch.isfinite(losses).all()) and gradients_are_finite(self.parameters)

    def check_finite(self, loss: float, step: int | None = None) -> None:
        if not math.isfinite(loss) and self.config.on_nonfinite != "skip_step":
            where = f"the loss of step {self.step if step is None else step} is {loss}"
            if self.config.on_nonfinite == "raise":
                raise LossError(f'{where}; on_nonfinite="warn" goes on, "skip_step" leaves such updates out')
            logger.warning("%s", where)

    def describe_empty_loader(self) -> str:
        if self.epoch == 0:
            return "the train_loader gave no batch"
        return (
            f"the train_loader gave no batch in epoch {self.epoch}: is it a generator that can be read only once? "
            "Give a DataLoader, a list, or an object whose __iter__ begins anew"
        )

    def run_hooks(self, point: str, batch: Batch) -> None:
        """Run the step hooks that asked for this step at this point."""
        for hook in self.active_hooks.get(point, ()):
            self.run_hook(hook, batch)

    def run_validation_hooks(self, point: str) -> None:
        for hook in self.hooks:
            if hook.point == point:
                self.run_hook(hook, None)

    def run_hook(self, hook: StepHook, batch: Batch) -> None:
        seen = self.point
        assert seen is not None
        seen.name, seen.batch = hook.point, batch
        try:
            with torch.no_grad():
                hook.method(seen)
        except Exception as error:
            self.hook_failed(hook, error)


def read_output(
    output: StepOutput, method: str
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, float | None]:
    """Take a step's return value apart: loss, outputs, targets, weight."""
    if output is None or isinstance(output, torch.Tensor):
        return output, None, None, None
    if not isinstance(output, Mapping):
        raise LossError(
            f"{method} must return the loss or a mapping with 'loss' and optionally 'outputs', 'targets', "
            f"'weight'; got {type(output).__name__}"
        )
    weight = output.get("weight")
    return (
        output.get("loss"),
        output.get("outputs"),
        output.get("targets"),
        None if weight is None else float(weight),  # host sync if it is a tensor on a device: give a number
    )


def check_loss(loss: object) -> None:
    """Raise `LossError` unless this is a scalar that gradients can flow from."""
    if not isinstance(loss, torch.Tensor):
        raise LossError(f"training_step must give a loss, a tensor of one element; got {type(loss).__name__}")
    if loss.numel() != 1:
        raise LossError(f"the loss must be a scalar, got shape {tuple(loss.shape)}: take its mean() or sum()")
    if not loss.requires_grad:
        raise LossError(
            "the loss has no gradient: was it detached, or computed under torch.no_grad, "
            "or are all parameters frozen?"
        )


def plain(value: Any) -> Any:
    """Return what an argument looks like on an event."""
    return (
        value
        if isinstance(value, bool | int | float | str | None)
        else getattr(value, "__name__", str(value))
    )
