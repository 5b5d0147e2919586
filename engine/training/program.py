"""TrainingProgram: how to train, without what starts a run.

`setup.Program` is the small part of it that a training loop calls. `BaseTrainer` adds `train`, `evaluate` and so on.
This module imports nothing that imports a run, so that sessions, runs and tools can all be typed with it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.argument_hints import (
    FixedCallbacks,
    declared_as,
    explains_arguments,
    refused_setter,
)
from offloop.engine.bus.commands import Need, Stop
from offloop.engine.callback import Callback, OnError, lookup
from offloop.engine.checkpoint import CheckpointInfo, Retention
from offloop.engine.config import TrainerConfig
from offloop.engine.data.batch_size import BatchSize
from offloop.engine.data.val_loaders import name_of
from offloop.engine.errors import ConfigError
from offloop.engine.events import Event
from offloop.engine.monitor import Mode
from offloop.engine.training.arguments import (
    check_callbacks,
    check_methods,
    check_model,
    check_model_knobs,
    check_optimizers,
    check_parts,
    named_optimizers,
    remote_run,
    resolve_device,
)
from offloop.engine.training.fast_epoch import can_run_fast, train_fast_epoch
from offloop.engine.training.freezing import select_parameters
from offloop.engine.training.given_rates import GivenRates
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.occupancy import KeepRequest, Occupancy
from offloop.engine.training.own_loss import NextTokens
from offloop.engine.training.precision import MixedPrecision
from offloop.engine.training.setup import Batch
from offloop.engine.training.step_output import StepOutput
from offloop.engine.training.trainer_arguments import Loss, trainer_arguments
from offloop.engine.training.trainer_state import capture_state, restore_state

_STOP: Final = (
    'a trainer is not stopped by an attribute: call self.stop("why") in a step, or run.stop_nowait("why") in a '
    "callback"
)


class TrainingProgram:
    """How to train: the parts, the knobs, the steps to override and what steps may call.

    More than 25 methods: a user's step calls all of them on `self`. Most only delegate to the loop or to the run.
    """

    automatic_optimization: bool = True
    """False: `training_step` calls `self.backward(loss)` and `self.optimizer_step(name)` itself."""

    @declared_as(trainer_arguments)
    @explains_arguments()
    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
        config: TrainerConfig | None = None,
        *,
        loss: Loss | None = None,
        scheduler: LRScheduler | None = None,
        batch_size: BatchSize | None = None,
        callbacks: Sequence[Callback] = (),
        **knobs: Any,
    ) -> None:
        set_by_subclass = set(vars(self))
        check_parts(model, config, loss, batch_size)
        self.config = (config or TrainerConfig()).replace(**knobs)
        check_model(model)
        self.model = model
        self.optimizers = named_optimizers(optimizer)
        self.loss = loss
        self.scheduler = scheduler
        self.batch_size = batch_size
        self._callbacks = FixedCallbacks(check_callbacks(callbacks))
        self.device = resolve_device(str(self.config.device), strategy=self.config.strategy)
        self._occupancy = Occupancy()
        self._loop_class = TrainingLoop
        # Of the run, evaluation or search in progress. Set before its thread starts, cleared after it has ended.
        self._loop: TrainingLoop | None = None
        self._next_tokens = NextTokens()
        # What the latest run leaves to the next one: its loss scale, and the learning rates before its schedules
        self._mixed: MixedPrecision | None = None
        self._given_rates: GivenRates | None = None
        self._is_compiled = False
        self._is_restoring = False  # while a resumed run calls `load_state_dict`
        self._last_run: Any = None  # a Run, a class that this module must not import
        # What is no state of a subclass
        self._base_attributes = frozenset(vars(self).keys() - set_by_subclass)
        check_methods(self, TrainingProgram)
        check_model_knobs(self.model, self.config)
        check_optimizers(self.model, self.loss, self.optimizers, self.scheduler, self.config)
        lookup(self.callbacks)
        if self.config.remote is not None:
            # Imports the store's package here, where no event loop of a run waits for it.
            remote_run(self.config.remote, "run")

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a trainer cannot be copied or pickled: make another one, or save trainer.state_dict() or its model"
        )

    # To override ---------------------------------------------------------------------------------

    def training_step(self, batch: Batch) -> StepOutput:
        """Compute the loss of a batch, which is on the device already. Runs under autocast.

        Returns:
            The loss, a scalar tensor; or a mapping with `loss` and optionally `outputs` and `targets` (for the
            named metrics), `samples` (how many the batch has, where a guess would be wrong) and `weight` (samples
            or tokens that the loss is a mean over; a number, by default `samples`).
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_step(self, batch)")

    def validation_step(self, batch: Batch) -> StepOutput:
        """Compute the loss of a validation batch, like `training_step`, under `torch.no_grad` and in eval mode."""
        raise NotImplementedError(f"{type(self).__name__} must define validation_step(self, batch)")

    def predict_step(self, batch: Batch) -> Any:
        """Return the outputs for a batch of `predict`, in eval mode and under `torch.inference_mode`."""
        raise NotImplementedError(f"{type(self).__name__} must define predict_step(self, batch)")

    def train_epoch(self, loader: Iterable[Batch]) -> None:
        """Train one epoch. An override needs only `for batch in self.batches(loader): self.train_batch(batch)`."""
        loop, own = self._in_run("train_epoch"), type(self)
        is_default = own.batches is TrainingProgram.batches and own.train_batch is TrainingProgram.train_batch
        if is_default and can_run_fast(loop):
            train_fast_epoch(loop, loader)  # the same, in one frame
            return
        for batch in self.batches(loader):
            self.train_batch(batch)

    def validate_epoch(self, loader: Iterable[Batch]) -> None:
        """Run one validation. An override needs only the loop of `train_epoch`, with `self.validate_batch(batch)`."""
        for batch in self.batches(loader):
            self.validate_batch(batch)

    # To call from a step or an epoch -------------------------------------------------------------

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over batches on the device. Commands, limits and resuming work between two of them."""
        return self._in_run("batches").batches(loader)

    def train_batch(self, batch: Batch) -> None:
        """Train on one batch: forward, backward and, at the end of its accumulation window, the optimizer."""
        self._in_run("train_batch").train_batch(batch)

    def validate_batch(self, batch: Batch) -> None:
        """Run one batch of a validation."""
        self._in_run("validate_batch").validator.validate_batch(batch)

    @explains_arguments()
    def log(self, name: str, value: torch.Tensor | float, weight: torch.Tensor | float | None = None) -> None:
        """Log a value of this step: `StepEnd.metrics[name]`, and the epoch's mean `train_name` or `val_name`.

        Args:
            name: Without `train_` or `val_`.
            value: A tensor of one element stays on the device and is read late.
            weight: Its weight in means, at least 0: how many samples or tokens it is a mean over. None: that of this
                batch's loss, so that a loss logged under another name has the loss's mean.

        Raises:
            ValueError: The name is that of a metric or of a column of the run, such as `step` or `lr`.
        """
        self._in_run("log").log(name, value, weight)

    def stop(self, reason: str = "asked to stop") -> None:
        """Stop the run at the end of this step, with `status="stopped"`; a validation in progress ends at once.

        For a step, an epoch or a step hook (`point.trainer.stop(...)`); a callback has `run.stop_nowait(reason)`.
        Returns at once: the step runs to its end.

        Args:
            reason: Why, for the result.
        """
        self._in_run("stop").mailbox.give(Stop(reason))

    def _refuse_stop(self, *_: object) -> NoReturn:
        raise AttributeError(_STOP)

    # The ways in which other libraries stop a run. As plain attributes they would be set and ignored.
    should_stop = stop_training = property(_refuse_stop, _refuse_stop)

    def publish(self, event: Event) -> None:
        """Publish an event of your own, with the position of the step.

        Raises:
            EventError: It holds more than plain values, or was published before.
        """
        # Read once: another thread may call this while the run ends
        run = self._occupancy.run
        if run is None:
            raise RuntimeError("publish() works during a run: call it from a step or a callback")
        run.publish(event)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients in a manual step, scaled as the precision needs."""
        self._in_manual_run("backward").manual.backward(loss)

    def optimizer_step(self, name: str | None = None, closure: Callable[[], Any] | None = None) -> Any:
        """Unscale, clip, step and zero an optimizer in a manual step; return what its `step` returns.

        Args:
            name: Which of several; may be left out where there is one.
            closure: For optimizers that evaluate the loss several times (LBFGS). Their `step` returns the loss.
        """
        loop = self._in_manual_run("optimizer_step")
        if name is None and len(self.optimizers) == 1:
            name = next(iter(self.optimizers))
        if name is None:
            raise ConfigError(f"which optimizer? Give its name, one of {', '.join(self.optimizers)}")
        if name not in self.optimizers:
            raise ConfigError(f"there is no optimizer {name!r}; there are {', '.join(self.optimizers)}")
        return loop.manual.step(name, closure)

    def attach_scheduler(
        self,
        scheduler: LRScheduler,
        *,
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str | None = None,
        mode: Mode = "auto",
        after_steps: int = 0,
    ) -> None:
        """Step a schedule with the run in progress, until its end. In the training thread.

        The next run begins with the rates that the optimizer had before this one, or that were set since, unless
        `Trainer(scheduler=...)` sets them too.

        A resumed run restores the schedule's state here: attach schedules in the same order each time,
        in a decider of `TrainStart`.

        Args:
            scheduler: Made for one of the trainer's optimizers.
            interval: Step after each epoch, or after each optimizer step.
            monitor: The metric that a plateau watches; None for the trainer's `monitor`.
            mode: Whether less or more of that is better; `"auto"`: ask the metric.
            after_steps: Optimizer steps before it begins.

        Raises:
            ConfigError: It is a schedule of another trainer's optimizer, or a plateau made for the other direction.
        """
        loop = self._in_run("attach_scheduler")
        if scheduler.optimizer not in self.optimizers.values():
            raise ConfigError("the scheduler belongs to another optimizer than the trainer's")
        if self._occupancy.run is not None:
            self._occupancy.run.check_schedule(scheduler, monitor, mode)
        loop.schedules.attach(Schedule(scheduler, interval, monitor, after_steps))
        if loop.resumed is not None:
            loop.host.restore_schedule()

    def keep_checkpoints(
        self,
        retention: Retention,
        *,
        save_at_end: bool,
        save_dir: Path | None = None,
        name_of: Callable[[CheckpointInfo], str] = lambda info: info.name,
        copy_best_only: bool = False,
        on_unsaveable: OnError = "raise",
        every_n_steps: int | None = None,
    ) -> str:
        """Keep checkpoints of the run in progress for a callback. In a decider of `TrainStart`.

        The rules of a callback count the checkpoints that it asks for and those that no such callback has asked
        for; a checkpoint stays as long as one callback wants it.

        At its first step the run checks whether its state can be saved at all.

        Args:
            retention: Which checkpoints are kept when a new one is durable.
            save_at_end: Take one when training ends, unless it fails.
            save_dir: A directory for copies of those that are kept; hard links on the same disk.
            name_of: Returns the name of a copy; called in the writer's thread. Where several have one name, the
                newest gets it (the best with `copy_best_only`), and the others get numbers.
            copy_best_only: Copy only the best ones by the rules' `monitor`.
            on_unsaveable: Whether a state that cannot be saved ends the run with a `CheckpointError`, or is logged.
            every_n_steps: At which steps the callback asks for checkpoints, if it knows: with several processes, all
                then save at exactly these. One that is asked for at another step is saved some steps later.

        Returns:
            The callback's name, to be given as `by` to `run.checkpoint_nowait(reason, by=...)`.

        Raises:
            ConfigError: The run has no directory, or another callback has copies under the same names there.
        """
        self._in_run("keep_checkpoints")
        if self._occupancy.run is None:
            raise ConfigError(Need.DIRECTORY.value)
        return self._occupancy.run.keep_checkpoints(
            KeepRequest(
                retention=retention,
                save_at_end=save_at_end,
                save_dir=save_dir,
                name_of=name_of,
                copy_best_only=copy_best_only,
                on_unsaveable=on_unsaveable,
                every_n_steps=every_n_steps,
            )
        )

    def measured_weights(self, monitor: str) -> dict[str, Any]:
        """Return the state dict to which the latest value of a metric belongs, in the run in progress.

        That of the model, or for a metric of validations that of the average that they run with, if there is one.
        In the training thread; the tensors are live, not copied.

        Args:
            monitor: Key of the metric.
        """
        self._in_run("measured_weights")
        run = self._occupancy.run
        return dict(self.model.state_dict()) if run is None else run.measured_weights(monitor)

    def freeze(self, *patterns: str) -> None:
        """Freeze parameters until the end of the run, as `Trainer(freeze=...)` does from its start.

        In the training thread, between two steps: in a plain decider, or with `run.call`. A resumed run has frozen
        what was frozen at its checkpoint.

        Raises:
            ConfigError: A pattern matches no parameter; the text names the likely one.
        """
        self._in_run("freeze").frozen.freeze(select_parameters(self.model, patterns))

    def unfreeze(self, *patterns: str) -> None:
        """Train parameters again that this run has frozen; those that train already are not touched.

        Raises:
            ConfigError: A pattern matches no parameter; the text names the likely one.
        """
        self._in_run("unfreeze").frozen.thaw(select_parameters(self.model, patterns, "unfreeze"))

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """Callbacks of every run, before those that `train()` is given."""
        return self._callbacks

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, where there is one; else see `optimizers`."""
        if len(self.optimizers) > 1:
            raise AttributeError(f"there are several: self.optimizers has {', '.join(self.optimizers)}")
        return next(iter(self.optimizers.values()))

    if not TYPE_CHECKING:
        callbacks = callbacks.setter(refused_setter("callbacks"))
        optimizer = optimizer.setter(refused_setter("optimizer"))

    @property
    def epoch(self) -> int:
        """Index of the epoch in progress, from 0; during a run."""
        return self._in_run("epoch").progress.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; during a run."""
        return self._in_run("step").progress.step

    @property
    def val_loader_name(self) -> str:
        """Name of the loader that a validation reads; empty where there is only one. During a run, in a step."""
        return name_of(self._in_run("val_loader_name").validator.prefix)

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return model, loss, optimizers, schedule and loss scale, for a file of your own. Tensors are not copied.

        To continue a *run* (its position, data order, random states and callbacks too), use its checkpoints:
        `train(..., resume=...)`. In the training thread (`await run.call(lambda trainer: ...)`), or while no run
        is in progress.

        Override it, with `load_state_dict`, where your trainer carries state of its own from step to step, such as
        a hidden state or a generator: `return super().state_dict() | {"hidden": self.hidden}`, or your keys alone.
        Each checkpoint calls it in the training thread and keeps your keys. A key with the value None says that
        the attribute of that name is no state.

        Raises:
            TrainerBusyError: A run is in progress, and this is not its training thread.
        """
        self._occupancy.check_thread()
        scaler = None if self._mixed is None else self._mixed.scaler
        return capture_state(self.model, self.loss, self.optimizers, self.scheduler, scaler)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. The next `train()` is a new run, with this model and optimizer.

        A resumed run calls an override, too, in the training thread before `TrainStart`, with what `state_dict`
        had returned; tensors are on the CPU. The run itself restores model and optimizers then, and
        `super().load_state_dict(state)` does nothing.

        Raises:
            TrainerBusyError: A run is in progress.
            ConfigError: It is the state of something else, or of other optimizers.
            RuntimeError, ValueError: It is of another model or optimizer; torch's text says what differs.
        """
        if self._is_restoring:
            return
        with self._occupancy.use("loading a state"):
            mixed = MixedPrecision(self.config.precision, self.device)
            restore_state(state, self.model, self.loss, self.optimizers, self.scheduler, mixed.scaler)
            self._mixed = mixed

    # ---------------------------------------------------------------------------------------------

    def _in_run(self, what: str) -> TrainingLoop:
        if self._loop is None:
            raise RuntimeError(f"{what} works during a run: call it from a step, an epoch or a step hook")
        return self._loop

    def _in_manual_run(self, what: str) -> TrainingLoop:
        loop = self._in_run(what)
        if self.automatic_optimization:
            raise RuntimeError(
                f"{what}() is for manual steps: set automatic_optimization = False on the class, "
                "or return the loss from training_step"
            )
        return loop
