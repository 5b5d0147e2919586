"""What a training loop is made from: a frozen `Setup`, and the `Host` that it works for."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

from offloop.engine.bus.command_mailbox import Envelope
from offloop.engine.callback import StepHook
from offloop.engine.config import TrainerConfig
from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.val_loaders import ValLoader
from offloop.engine.events import Event
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.position.exactness import Doubt
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.step_output import StepOutput

Batch = Any


class Program(Protocol):
    """What a training loop runs: the part of a `Trainer` that users override."""

    model: torch.nn.Module
    loss: Any
    automatic_optimization: bool

    def training_step(self, batch: Batch, /) -> StepOutput:
        """Return the loss of a batch."""

    def validation_step(self, batch: Batch, /) -> StepOutput:
        """Return the loss of a batch of a validation."""

    def train_epoch(self, loader: Iterable[Batch], /) -> None:
        """Train one epoch."""

    def validate_epoch(self, loader: Iterable[Batch], /) -> None:
        """Run one validation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run is complete: totals, None for no limit. The first limit reached ends the run."""

    epochs: int | None = None
    max_steps: int | None = None
    max_time: float | None = None
    """Seconds of training, pauses not counted."""

    @property
    def may_end_in_epoch(self) -> bool:
        """True if a limit may end the run between two steps of an epoch."""
        return self.max_steps is not None or self.max_time is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is decided about a training before it starts; never changed afterwards."""

    config: TrainerConfig
    limits: Limits
    device: torch.device
    optimizers: Mapping[str, torch.optim.Optimizer]
    schedules: tuple[Schedule, ...] = ()
    """Those of the trainer. Schedules attached during the run are the loop's."""
    train_loader: Iterable[Batch] = ()
    val_loader: ValLoader | None = None
    train_metrics: MetricSet | None = None
    val_metrics: Mapping[str, MetricSet] = dataclasses.field(default_factory=dict)
    """By the prefix of their keys, such as `val_`."""
    monitor: str = "train_loss"
    """Key of the metric that plateau schedules watch by default."""
    count_samples: Callable[[Batch], int] = guess_batch_size
    validates_live: bool = False
    """True: each validation also runs with the weights in training, before hooks swap an average in."""
    is_resumable: bool = False
    """True where checkpoints may be taken."""
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the run is made with, by flat name."""

    @property
    def looks_at_losses(self) -> bool:
        """True if a loss that is not finite is refused before it changes the weights.

        On the CPU a loss is there when it is computed; on a device, looking at it would wait for the device.
        """
        return self.config.on_nonfinite == "raise" and self.device.type == "cpu"

    @property
    def first_optimizer(self) -> torch.optim.Optimizer:
        """The only optimizer, or the first of several."""
        return next(iter(self.optimizers.values()))


class Host(Protocol):
    """What a training loop works for: a run's session, or a `SilentHost`.

    All methods are called in the training thread.
    """

    @property
    def run_id(self) -> str:
        """Identity of the run, on every event."""

    @property
    def clock_offset(self) -> float:
        """Seconds to add to `time.perf_counter()` for the time of an event."""

    @property
    def handles_signals(self) -> bool:
        """True if the run handles SIGINT and SIGTERM, so that loader workers must leave them to it."""

    def emit(self, event: Event, /) -> None:
        """Publish an event. Never waits."""

    def emit_step(self, event: Event, /) -> None:
        """Publish the one event of every step, by the shortest way. Never waits."""

    def decide(self, event: Event, /) -> None:
        """Ask the deciders about an event, and wait for their answers."""

    def is_blocked(self) -> bool:
        """Return True while a subscriber with the right to slow training down is full."""

    def hook_failed(self, hook: StepHook, error: BaseException, is_off: bool, /) -> None:
        """Handle what a step hook raised: report it, or raise it again."""

    def save_for(self, envelope: Envelope[Any], /) -> None:
        """Take or tag a checkpoint for a command, and complete its future once that is durable."""

    def guard(self) -> None:
        """Prepare for user code that may change model or optimizers, which a checkpoint may still be copied from."""

    def callback_states(self) -> dict[str, Any]:
        """Return the state of each callback that steers training."""

    def trainer_state(self) -> dict[str, Any]:
        """Return a copy of what a subclass of the trainer adds to checkpoints; empty where none are taken."""

    def restore_schedule(self) -> None:
        """Restore the state of the schedule attached last, in a run that is being resumed."""

    def finish_resuming(self, doubts: Iterable[Doubt], /) -> Event:
        """Restore the random states, the last thing before training continues.

        Args:
            doubts: What may differ in how the loaders continue.

        Returns:
            The event that tells how exact the resume is.
        """


class SilentHost:
    """A host for trainings that are no run: evaluations, the finders, tests. It publishes and saves nothing."""

    run_id = ""
    clock_offset = 0.0
    handles_signals = False

    def emit(self, event: Event, /) -> None:
        """Ignore the event."""

    def emit_step(self, event: Event, /) -> None:
        """Ignore the event."""

    def decide(self, event: Event, /) -> None:
        """Ask no decider."""

    def is_blocked(self) -> bool:
        """Return False: there are no subscribers."""
        return False

    def hook_failed(self, hook: StepHook, error: BaseException, is_off: bool, /) -> None:
        """Raise the error."""
        raise error

    def save_for(self, envelope: Envelope[Any], /) -> None:
        """Save nothing."""

    def guard(self) -> None:
        """Do nothing: no checkpoint is being copied."""

    def callback_states(self) -> dict[str, Any]:
        """Return nothing: there are no callbacks."""
        return {}

    def trainer_state(self) -> dict[str, Any]:
        """Return nothing: there are no checkpoints."""
        return {}

    def restore_schedule(self) -> None:
        """Not called: only runs are resumed."""
        raise NotImplementedError

    def finish_resuming(self, doubts: Iterable[Doubt], /) -> Event:
        """Not called: only runs are resumed."""
        raise NotImplementedError
