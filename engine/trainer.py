"""Trainer: what users make, subclass and call. Checks every argument before anything runs."""

import contextlib
import functools
import signal
import sys
import threading
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Unpack

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine import checks
from offloop.engine.argument_hints import METHODS, AsyncBlock, explains_arguments
from offloop.engine.bus.command_mailbox import Mailbox, actor
from offloop.engine.bus.commands import Need, Stop
from offloop.engine.bus.threads import Thread
from offloop.engine.callback import Callback, OnError, close_unused, lookup
from offloop.engine.checkpoint import CheckpointInfo, NamedCopies, RemoteRun, Retention
from offloop.engine.config import TrainerConfig, TrainerKnobs, check_limits, misplaced_argument
from offloop.engine.data.batch_size import BatchSize, checked_batch_size, guess_batch_size
from offloop.engine.data.batches import DeviceTransfer, limited_length, to_device, use_channels_last
from offloop.engine.data.seeded_sampling import check_seedable
from offloop.engine.data.val_loaders import LIVE, PREFIX, ValLoader, by_prefix, live_prefix, name_of
from offloop.engine.errors import (
    ConfigError,
    Preempted,
    TrainerBusyError,
)
from offloop.engine.events import Event, Metrics
from offloop.engine.metrics.metric_set import MetricSet, rows_of
from offloop.engine.metrics.names import MetricSpec, RunMetrics, check_metrics, metrics_for
from offloop.engine.monitor import Mode
from offloop.engine.observers.event_log import EventLog
from offloop.engine.observers.observer import Worker
from offloop.engine.paths import absolute_path
from offloop.engine.recovery.fetch import fetch_run
from offloop.engine.recovery.keepers import Keeper
from offloop.engine.recovery.resume_plan import Resume, plan_resume
from offloop.engine.recovery.run_dir import new_run_id
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.session.arguments import (
    check_callbacks,
    check_loader,
    check_methods,
    check_model,
    check_optimizers,
    check_resume_lr,
    check_val_loader,
    named_optimizers,
    remote_run,
    resolve_device,
)
from offloop.engine.session.ownership import Monitors
from offloop.engine.session.process import handled_signals
from offloop.engine.session.session import Session
from offloop.engine.session.thread_state import caller_state, check_caller
from offloop.engine.tools.prediction import PredictionStream, predictions
from offloop.engine.tools.tuning import (
    BatchSizeSearch,
    LearningRateSearch,
    find_batch_size,
    find_learning_rate,
)
from offloop.engine.training.activation_checkpointing import select_modules
from offloop.engine.training.averages import check_averages
from offloop.engine.training.default_steps import NextTokens, inputs_and_targets, own_loss
from offloop.engine.training.fast_epoch import can_run_fast, train_fast_epoch
from offloop.engine.training.freezing import check_freeze, select_parameters
from offloop.engine.training.given_rates import GivenRates
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.optimizer_state import load_optimizer
from offloop.engine.training.precision import MixedPrecision
from offloop.engine.training.setup import Batch, Host, Limits, Setup, SilentHost
from offloop.engine.training.step_failures import explain_loss, explain_model
from offloop.engine.training.step_output import StepOutput
from offloop.engine.training.training_mode import eval_mode
from offloop.engine.weights.loading import Source, plan_init

Loss = Callable[[Any, Any], torch.Tensor]

DEFAULT_RUN_DIR: Final = "runs"

_STOP: Final = (
    'a trainer is not stopped by an attribute: call self.stop("why") in a step, or run.stop_nowait("why") in a '
    "callback"
)
_BASE_STATE: Final = frozenset({"model", "optimizers", "loss", "scheduler", "scaler"})
"""What `BaseTrainer.state_dict` returns."""


class BaseTrainer:
    """Trains a model as an ordered stream of events. Subclass it to write your own steps; see `Trainer`.

    Override `training_step` and `validation_step`, and if you like `train_epoch` and `validate_epoch`. All
    of them run in the training thread of a run. A trainer has one run at a time.
    """

    automatic_optimization: bool = True
    """False: `training_step` calls `self.backward(loss)` and `self.optimizer_step(name)` itself."""

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
        **overrides: Unpack[TrainerKnobs],
    ) -> None:
        """Say how to train. Nothing is moved, seeded or started before a run.

        Args:
            model: Trained in place. Moved to the device when a run starts.
            optimizer: Over parameters of `model`; or several by name, for manual optimization.
            config: The knobs; each can be given as a keyword instead.
            loss: `loss(outputs, targets)` for batches `(inputs, targets)`.
            scheduler: A torch schedule of (the first) optimizer, stepped as `scheduler_interval` says.
            batch_size: Returns how many samples a batch has, where a guess from its shapes would be wrong: see
                `guess_batch_size`. Called in the training thread, before the step.
            callbacks: Come before those of `train()` in the order of decisions.
            overrides: Knobs of `TrainerConfig`, taking precedence over `config`.

        Raises:
            ConfigError: A knob is unknown (the text names the nearest) or out of range, or the optimizer
                holds parameters that are neither the model's nor the loss's.
            TypeError: Model, optimizer, loss or scheduler is not what its name says.
        """
        of_subclass = set(vars(self))  # what it has set before it called this
        if config is not None and not isinstance(config, TrainerConfig):
            raise TypeError(f"config must be a TrainerConfig, got {type(config).__name__}")
        self.config = (config or TrainerConfig()).replace(**overrides)
        checks.instance("model", model)
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        checks.instance("loss", loss)
        if loss is not None and not callable(loss):
            raise TypeError(
                "loss must be a function of outputs and targets, like torch.nn.functional.cross_entropy, got "
                f"{type(loss).__name__}"
            )
        if batch_size is not None and not callable(batch_size):
            raise ConfigError(
                "batch_size is a function that counts the samples of a batch, like lambda batch: len(batch[0]); got "
                f"{batch_size!r}. The size of batches is the DataLoader's"
            )
        check_model(model)
        self.model = model
        self.optimizers = named_optimizers(optimizer)
        self.loss = loss
        self.scheduler = scheduler
        self.batch_size = batch_size
        self.callbacks = tuple(check_callbacks(callbacks))
        self.device = resolve_device(self.config.device)
        self.last_run: Run | None = None
        self._lock = threading.Lock()  # guards _session, which threads and tasks may want at once
        self._session: Session | None = None
        self._loop_class = TrainingLoop
        self._loop: TrainingLoop | None = None  # of the run, or the evaluation, in progress
        self._occupation = ""  # what it is doing beside runs; under the lock
        self._mixed: MixedPrecision | None = None  # of the latest run: its loss scale goes on in the next one
        self._is_compiled = False
        self._given_rates: GivenRates | None = None  # of the latest run: what the next one begins with
        self._next_tokens = NextTokens()  # of the run, or the evaluation, in progress
        self._is_restoring = False
        self._base_attributes = frozenset(vars(self).keys() - of_subclass)
        check_methods(self, BaseTrainer)
        self._check_model()
        check_optimizers(self.model, self.loss, self.optimizers, self.scheduler, self.config)
        lookup(self.callbacks)
        if self.config.remote is not None:
            # Imports the store's package here, where no event loop of a run waits for it.
            remote_run(self.config.remote, "run")

    if not TYPE_CHECKING:  # a type checker is to know what there is, and nothing else

        def __getattr__(self, name: str) -> Any:
            if "optimizers" not in vars(self) and not name.startswith("__"):
                raise AttributeError(
                    f"{type(self).__name__}.__init__ must call super().__init__(model, optimizer, ...)"
                )
            if name in METHODS:
                raise AttributeError(f"{type(self).__name__} has no {name!r}: use {METHODS[name]}")
            return super().__getattribute__(name)  # again, for the error that Python raises

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise TypeError("a trainer is no model: call self.model(...)")

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
        """Like `training_step` for a batch of a validation, under `torch.no_grad` and in eval mode."""
        raise NotImplementedError(f"{type(self).__name__} must define validation_step(self, batch)")

    def predict_step(self, batch: Batch) -> Any:
        """Return the outputs for a batch of `predict`, in eval mode and under `torch.inference_mode`."""
        raise NotImplementedError(f"{type(self).__name__} must define predict_step(self, batch)")

    def train_epoch(self, loader: Iterable[Batch]) -> None:
        """Train one epoch: an own version must do no more than `for batch in self.batches(loader): ...` here."""
        loop, own = self._in_run("train_epoch"), type(self)
        is_default = own.batches is BaseTrainer.batches and own.train_batch is BaseTrainer.train_batch
        if is_default and can_run_fast(loop):
            train_fast_epoch(loop, loader)  # the same, in one frame
            return
        for batch in self.batches(loader):
            self.train_batch(batch)

    def validate_epoch(self, loader: Iterable[Batch]) -> None:
        """Run one validation: what an own version must do is just this."""
        for batch in self.batches(loader):
            self.validate_batch(batch)

    # To call from a step or an epoch -------------------------------------------------------------

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over batches, on the device; commands, limits and the position in the epoch live here."""
        return self._in_run("batches").batches(loader)

    def train_batch(self, batch: Batch) -> None:
        """Train on one batch: forward, backward and, at the end of its window, the optimizer."""
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
            weight: What it counts in means, at least 0: how many samples or tokens it is a mean over. None: as much
                as the loss of this batch, so that a loss logged under another name has the loss's mean.

        Raises:
            ValueError: The name is that of a metric or of a column of the run, such as `step` or `lr`.
        """
        self._in_run("log").log(name, value, weight)

    def stop(self, reason: str = "asked to stop") -> None:
        """Stop the run at the end of this step, with `status="stopped"`; a validation in progress ends at once.

        For a step, an epoch or a step hook (`point.trainer.stop(...)`); a callback has `run.stop_nowait(reason)`.
        Returns at once: the step goes on to its end.

        Args:
            reason: Why, for the result.
        """
        self._in_run("stop").mailbox.give(Stop(reason))

    @property
    def should_stop(self) -> NoReturn:
        """No attribute of a trainer: `stop(reason)` stops a run."""
        raise AttributeError(_STOP)

    @should_stop.setter
    def should_stop(self, value: object) -> NoReturn:
        raise AttributeError(_STOP)

    stop_training = should_stop

    def publish(self, event: Event) -> None:
        """Publish an event of your own, with the position of the step.

        Raises:
            EventError: It holds more than plain values, or was published before.
        """
        session = self._session
        if session is None:
            raise RuntimeError("publish() works during a run: call it from a step or a callback")
        session.publish(event)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients in a manual step, scaled as the precision needs."""
        self._in_manual_run("backward").manual.backward(loss)

    def optimizer_step(self, name: str | None = None, closure: Callable[[], Any] | None = None) -> Any:
        """Unscale, clip, step and zero an optimizer in a manual step; returns what its `step` returns.

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
        """Let a schedule step with the run that is going on, until its end. In the training thread.

        The next run begins with the rates that the optimizer had before this one, or that were set since, unless
        `Trainer(scheduler=...)` is at work on it too.

        A resumed run puts the schedule's state back here: attach schedules in the same order each time,
        in a decider of `TrainStart`.

        Args:
            scheduler: Made for one of the trainer's optimizers.
            interval: Step after each epoch, or after each optimizer step.
            monitor: What a plateau watches; None for the trainer's `monitor`.
            mode: Whether less or more of that is better; `"auto"`: ask the metric.
            after_steps: Optimizer steps before it begins.

        Raises:
            ConfigError: It is a schedule of another trainer's optimizer, or a plateau made for the other direction.
        """
        loop = self._in_run("attach_scheduler")
        if scheduler.optimizer not in self.optimizers.values():
            raise ConfigError("the scheduler belongs to another optimizer than the trainer's")
        if self._session is not None:
            self._session.monitors.check_schedule(scheduler, monitor, mode)
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
    ) -> str:
        """Say which checkpoints of the run that is going on a callback wants kept. In a decider of `TrainStart`.

        Each callback has rules of its own, which count the checkpoints that it asks for and those that no such
        callback has asked for; a checkpoint stays as long as any of them wants it.

        At its first step the run looks whether its state can be saved at all.

        Args:
            retention: What is kept when a new one is durable.
            save_at_end: Take one when training ends, however it ends but by a failure.
            save_dir: A directory for copies of those that are kept; hard links on the same disk.
            name_of: Gives a copy its name; called in the writer's thread. Where several have one name, the newest has
                it (the best with `copy_best_only`), and the others get numbers.
            copy_best_only: Copy the best ones by the rules' `monitor` alone.
            on_unsaveable: What to do where it can not: end the run with a `CheckpointError`, or say so in the log.

        Returns:
            The callback's name, to be given as `by` to `run.checkpoint_nowait(reason, by=...)`.

        Raises:
            ConfigError: The run has no directory, or another callback has copies under the same names there.
        """
        self._in_run("keep_checkpoints")
        session = self._session
        if session is None or session.checkpoints is None or session.dir is None:
            raise ConfigError(Need.DIRECTORY.value)
        owner = actor.get()
        copies = None if save_dir is None else NamedCopies(absolute_path(save_dir), session.dir, name_of)
        keeper = Keeper(msgspec.structs.replace(retention, owner=owner), save_at_end, copies, copy_best_only)
        try:
            session.checkpoints.keep(keeper)
        except ValueError as error:
            raise ConfigError(f"{error}: give one of them another save_dir or filename") from None
        session.check_state_at_first_step(on_unsaveable)
        return owner

    def measured_weights(self, monitor: str) -> dict[str, Any]:
        """Return the state dict that a metric belongs to which the run that is going on has just made.

        The model's own, or for a metric of validations the average that they run with, if there is one. In the
        training thread; the tensors are live, not copied.

        Args:
            monitor: Key of the metric.
        """
        self._in_run("measured_weights")
        session = self._session
        return dict(self.model.state_dict()) if session is None else session.measured_weights(monitor)

    def freeze(self, *patterns: str) -> None:
        """Freeze parameters from here to the end of the run, as `Trainer(freeze=...)` does from its start.

        In the training thread, between two steps: a plain decider, or `run.call`. A resumed run has frozen what
        was frozen at its checkpoint.

        Raises:
            ConfigError: A pattern means no parameter; the text names what was probably meant.
        """
        self._in_run("freeze").frozen.freeze(select_parameters(self.model, patterns))

    def unfreeze(self, *patterns: str) -> None:
        """Let parameters train again that this run has frozen; those that do train already are left alone.

        Raises:
            ConfigError: A pattern means no parameter; the text names what was probably meant.
        """
        self._in_run("unfreeze").frozen.thaw(select_parameters(self.model, patterns, "unfreeze"))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, where there is one; else see `optimizers`."""
        if len(self.optimizers) > 1:
            raise AttributeError(f"there are several: self.optimizers has {', '.join(self.optimizers)}")
        return next(iter(self.optimizers.values()))

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
        """Name of the loader that is being validated on; empty where there is only one. During a run, in a step."""
        return name_of(self._in_run("val_loader_name").validator.prefix)

    # To start a run ------------------------------------------------------------------------------

    @explains_arguments(misplaced_argument)
    def train(
        self,
        train_loader: Iterable[Batch],
        val_loader: ValLoader | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        metrics: RunMetrics = (),
        callbacks: Sequence[Callback] = (),
        resume: Resume = None,
        resume_lr: float | None = None,
        init_from: Source | None = None,
        init_strict: bool = True,
    ) -> RunResult:
        """Train and return the result. Blocks this thread; the model trains in a thread of its own.

        In the main thread, SIGINT and SIGTERM stop the run in order (second: in haste, third: at once), unless
        somebody else handles them. In a notebook cell or inside another event loop it works too, but blocks
        that loop: `await train_async(...)` there.

        Args:
            train_loader: Anything iterable over batches: a DataLoader, a list, an iterable of tensors.
            val_loader: Likewise, for validations; or several by name: `{"fit": ..., "new": ...}` makes `val_fit_loss`,
                `val_new_loss` and so on.
            epochs: Limit: epochs in total. The first limit reached ends the run.
            max_steps: Limit: optimizer steps.
            max_time: Limit: seconds of training, pauses not counted.
            metrics: Names like `"accuracy"`, or `torchmetrics.Metric` instances, for training and validation; or
                `{"train": [...], "val": [...]}` to choose for each.
            callbacks: More of them, after the trainer's.
            resume: Continue a run: `"auto"` (if there is one), `"must"`, `"last"`, `"best"`, a tag, a step, or
                a path to a checkpoint or a run. None or `"never"`: a new run.
            resume_lr: Learning rate that a resumed run goes on with, as `run.set_lr` sets it: a schedule goes on from
                there. It is set once, however often the script is run again. None: that of the checkpoint.
            init_from: Weights to begin from, as `load_model` takes them: another run, a checkpoint, a registered
                model, a file, a state dict. Not used when a run is resumed.
            init_strict: False: load the weights that fit and log what does not.

        Raises:
            ConfigError: An argument cannot work; nothing has started then.
            WeightsError, ModelNotFoundError, CheckpointError: `init_from` or `resume` cannot be read or does not
                fit; nothing has been written then.
            TrainerBusyError: This trainer has a run going on.
            KeyboardInterrupt, Preempted: After a run that SIGINT or SIGTERM stopped.
            Exception: What a step, a loader or a decider raised, as it was, with a note on where.
        """
        self._fetch(resume)
        session = self._prepare(
            train_loader,
            val_loader,
            epochs,
            max_steps,
            max_time,
            metrics,
            callbacks,
            resume,
            resume_lr,
            (init_from, init_strict),
        )
        if _inside_event_loop():
            return self._train_in_helper_thread(session)
        return self._train_here(session, force_signals=False)

    @explains_arguments(misplaced_argument)
    async def train_async(
        self,
        train_loader: Iterable[Batch],
        val_loader: ValLoader | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        metrics: RunMetrics = (),
        callbacks: Sequence[Callback] = (),
        resume: Resume = None,
        resume_lr: float | None = None,
        init_from: Source | None = None,
        init_strict: bool = True,
        handle_signals: bool = False,
        task_status: anyio.abc.TaskStatus[Run] = anyio.TASK_STATUS_IGNORED,
    ) -> RunResult:
        """Train beside this event loop and return the result, see `train`.

        It ends with the task that awaits it. For runs that outlive what starts them, as in a service, see `Runs`.

        Cancellation: the run ends at its next batch, callbacks drain and close, then it is re-raised.

        Args:
            train_loader, val_loader, epochs, max_steps, max_time, metrics, callbacks, resume, resume_lr, init_from,
                init_strict: As for `train`.
            handle_signals: Take SIGINT and SIGTERM for the length of the run, in the main thread.
            task_status: Given by `task_group.start`, which then returns the `Run`. A run that fails cancels that task
                group and everything in it; runs in `Runs` fail alone.
        """
        await self._fetch_async(resume)
        session = self._prepare(
            train_loader,
            val_loader,
            epochs,
            max_steps,
            max_time,
            metrics,
            callbacks,
            resume,
            resume_lr,
            (init_from, init_strict),
        )
        if not handle_signals:
            await session.run_to_end(task_status.started)
            return session.outcome()
        seen: list[str] = []
        with handled_signals(_note_signal(session, seen), force=True) as session.handles_signals:
            await session.run_to_end(task_status.started)
        result = session.outcome()
        _raise_for_signal(seen)
        return result

    @explains_arguments(misplaced_argument)
    def start(
        self,
        train_loader: Iterable[Batch],
        val_loader: ValLoader | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        metrics: RunMetrics = (),
        callbacks: Sequence[Callback] = (),
        resume: Resume = None,
        resume_lr: float | None = None,
        init_from: Source | None = None,
        init_strict: bool = True,
    ) -> AbstractAsyncContextManager[Run]:
        """Return the run as an async context manager: `async with trainer.start(...) as run:`.

        Leaving the block waits for the end. An exception in the block stops the run; a run that fails
        cancels the block and raises its exception. Arguments as for `train`, checked at once.
        """

        def prepare() -> Session:
            return self._prepare(
                train_loader,
                val_loader,
                epochs,
                max_steps,
                max_time,
                metrics,
                callbacks,
                resume,
                resume_lr,
                (init_from, init_strict),
            )

        fetches = self._remote_to_fetch(resume) is not None
        block = self._fetch_and_run_beside(resume, prepare) if fetches else prepare().run_beside()
        return AsyncBlock(block, "async with trainer.start(...) as run:")

    @explains_arguments()
    def evaluate(self, loader: ValLoader, *, metrics: MetricSpec = (), prefix: str = "val_") -> Metrics:
        """Run the model over a loader in eval mode and return `val_loss` and the metrics. Blocks; no events.

        Args:
            loader: Its batches; or several loaders by name, as `train(val_loader=...)` takes them.
            metrics: Names like `"accuracy"`, or `torchmetrics.Metric` instances.
            prefix: Comes before each key: `"test_"` gives `test_loss`, `test_accuracy`.

        Raises:
            TrainerBusyError: A run is going on; use `run.validate()` then.
        """
        return self._evaluate(loader, metrics, prefix)

    @explains_arguments()
    async def evaluate_async(
        self, loader: ValLoader, *, metrics: MetricSpec = (), prefix: str = "val_"
    ) -> Metrics:
        """Like `evaluate`, in a thread beside this event loop. Cancellation: the thread ends by itself."""
        caller = caller_state(with_autocast=True)

        def work() -> Metrics:
            with caller:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                return self._evaluate(loader, metrics, prefix)

        worker = Worker("offloop-evaluate")
        try:
            return await worker.run(work)
        finally:
            worker.close()

    @explains_arguments()
    def predict(self, loader: Iterable[Batch]) -> list[Any]:
        """Return what `predict_step` gives for each batch of a loader, on the host. Blocks.

        The model is in eval mode meanwhile, and each of its modules gets its own flag back. Tensors of all
        batches become one by `torch.cat(trainer.predict(loader))`.

        Raises:
            TrainerBusyError: A run, or something else, is going on.
        """
        check_loader(loader, "loader")
        with self._occupied("predicting"):
            return list(self._predictions(loader))

    @explains_arguments()
    def predict_async(
        self, loader: Iterable[Batch], *, read_ahead: int = 2
    ) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
        """Predict in a thread of its own: `async with trainer.predict_async(loader) as stream:`.

        `async for outputs in stream` gives the outputs of each batch, in order. The thread is ahead of its reader
        by at most `read_ahead` batches, and leaving the block ends it after the batch in work; so does a
        cancellation, which is then re-raised.

        Args:
            loader: Its batches.
            read_ahead: Outputs that may wait for the reader, at least 1.

        Raises:
            TrainerBusyError: A run, or something else, is going on.
            Exception: What the model or the loader raised comes out of the stream.
        """
        check_loader(loader, "loader")
        checks.whole_number("read_ahead", read_ahead)
        return AsyncBlock(
            self._predict_beside(loader, read_ahead), "async with trainer.predict_async(loader) as stream:"
        )

    @asynccontextmanager
    async def _predict_beside(
        self, loader: Iterable[Batch], read_ahead: int
    ) -> AsyncGenerator[AsyncIterator[Any]]:
        caller = caller_state(with_autocast=True)

        def work() -> Generator[Any, None, None]:
            with caller:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                yield from self._predictions(loader)

        with self._occupied("predicting"):
            stream = PredictionStream(work, read_ahead=read_ahead)
            stream.start()
            try:
                yield stream
            finally:
                await stream.leave()

    @explains_arguments()
    def find_learning_rate(
        self,
        train_loader: Iterable[Batch],
        *,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        steps: int = 100,
        optimizer: str | None = None,
    ) -> LearningRateSearch:
        """Raise the learning rate from step to step and suggest the one at which the loss falls fastest. Blocks.

        Afterwards weights, buffers, optimizer and random states are what they were, bit for bit. The suggestion
        is not applied: give it to your optimizer. See `tuning.find_learning_rate` for how it is found.

        Args:
            train_loader: Read as in training, from the beginning as often as it takes.
            min_lr: Where to begin, above 0.
            max_lr: Where to end, above `min_lr`; the search ends before it when the loss explodes.
            steps: Optimizer steps, at least 10.
            optimizer: Its name, where there are several; the others keep their rates.

        Raises:
            ConfigError: An argument cannot work.
            TrainerBusyError: A run, or something else, is going on.
        """
        check_loader(train_loader, "train_loader")
        return find_learning_rate(
            self, train_loader, min_lr=min_lr, max_lr=max_lr, steps=steps, optimizer=optimizer
        )

    @explains_arguments()
    def find_batch_size(
        self,
        train_loader: "Iterable[Batch] | Callable[[int], Iterable[Batch]]",
        *,
        mode: Literal["binsearch", "power"] = "binsearch",
        start: int = 2,
        max_batch_size: int | None = None,
        steps: int = 3,
        memory_limit: int | None = None,
    ) -> BatchSizeSearch:
        """Find the largest batch size that fits into memory, by training some steps with each tried. Blocks.

        Afterwards weights, buffers, optimizer and random states are what they were, bit for bit, and the memory
        is free again.

        Args:
            train_loader: A DataLoader, whose first samples make up the batches; or a function that returns a loader
                for a batch size, for example one that begins with the longest samples.
            mode: `"power"` doubles until it does not fit, `"binsearch"` then finds the largest in between.
            start: First size tried, at least 1.
            max_batch_size: Largest size tried; None: the size of the data set.
            steps: Optimizer steps with each size, at least 2: the first one makes the optimizer's state.
            memory_limit: Bytes. On CUDA what torch may take, by default nine tenths of what is free. On the CPU
                what this process may take in all; needed there, since a CPU's memory ends without an error.

        Raises:
            ConfigError: An argument cannot work, or not even one sample fits.
            TrainerBusyError: A run, or something else, is going on.
        """
        return find_batch_size(
            self,
            train_loader,
            mode=mode,
            start=start,
            max_batch_size=max_batch_size,
            steps=steps,
            memory_limit=memory_limit,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return model, loss, optimizers, schedule and loss scale, for a file of your own. Tensors are not copied.

        To continue a *run* (its position, data order, random states and callbacks too), use its checkpoints:
        `train(..., resume=...)`. In the training thread (`await run.call(lambda trainer: ...)`), or with no run
        going on.

        Override it, with `load_state_dict`, where your trainer carries state of its own from step to step, such as
        a hidden state or a generator: `return super().state_dict() | {"hidden": self.hidden}`, or your keys alone.
        Each checkpoint calls it in the training thread and keeps your keys. A key with the value None says that
        the attribute of that name is no state.

        Raises:
            TrainerBusyError: A run is going on, and this is not its training thread.
        """
        self._check_thread()
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
        }
        if isinstance(self.loss, torch.nn.Module) and (of_loss := self.loss.state_dict()):
            state["loss"] = of_loss
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self._mixed is not None and self._mixed.scaler is not None:
            state["scaler"] = self._mixed.scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned. The next `train()` is a new run, with this model and optimizer.

        An override is called by each resumed run too, in the training thread before `TrainStart`, with what
        `state_dict` had returned; tensors are on the CPU. The run itself puts back model and optimizers then, and
        `super().load_state_dict(state)` does nothing.

        Raises:
            TrainerBusyError: A run is going on.
            ConfigError: It is the state of something else, or of other optimizers.
            RuntimeError, ValueError: It is of another model or optimizer; torch's text says what differs.
        """
        if self._is_restoring:
            return  # the run does it
        with self._occupied("loading a state"):
            if not isinstance(state, Mapping) or not {"model", "optimizers"} <= set(state):
                raise ConfigError("state must be what Trainer.state_dict() returned")
            if set(state["optimizers"]) != set(self.optimizers):
                raise ConfigError(
                    f"the state is of optimizers {', '.join(state['optimizers'])}; "
                    f"there are {', '.join(self.optimizers)}"
                )
            if ("scheduler" in state) is not (self.scheduler is not None):
                with_it, without = (
                    ("the state", "Trainer") if "scheduler" in state else ("Trainer", "the state")
                )
                raise ConfigError(f"{with_it} has a scheduler, {without} has none")
            self.model.load_state_dict(state["model"])
            for name, optimizer in self.optimizers.items():
                load_optimizer(optimizer, state["optimizers"][name])
            if isinstance(self.loss, torch.nn.Module) and "loss" in state:
                self.loss.load_state_dict(state["loss"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self._mixed = MixedPrecision(self.config.precision, self.device)
            if self._mixed.scaler is not None and "scaler" in state:
                self._mixed.scaler.load_state_dict(state["scaler"])

    @property
    def _has_own_state(self) -> bool:
        """True if a subclass says what a checkpoint holds of it."""
        return type(self).state_dict is not BaseTrainer.state_dict

    def _own_state(self) -> dict[str, Any]:
        """Return what a subclass adds to a checkpoint. Training thread."""
        if not self._has_own_state:
            return {}
        state = self.state_dict()
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{type(self).__name__}.state_dict() must return a mapping, got {type(state).__name__}"
            )
        return {name: value for name, value in state.items() if name not in _BASE_STATE}

    def _restore_own_state(self, own: Mapping[str, Any]) -> None:
        """Give a subclass back what it had added to a checkpoint. Training thread, when the rest is restored."""
        state = BaseTrainer.state_dict(self) | dict(own)
        self._is_restoring = True
        try:
            self.load_state_dict(state)
        finally:
            self._is_restoring = False

    # Preparing -----------------------------------------------------------------------------------

    def _prepare(
        self,
        train_loader: Iterable[Batch],
        val_loader: ValLoader | None,
        epochs: int | None,
        max_steps: int | None,
        max_time: float | None,
        metrics: RunMetrics,
        callbacks: Sequence[Callback],
        resume: Resume,
        resume_lr: float | None,
        init: tuple[Source | None, bool],
    ) -> Session:
        """Check everything that can be checked before a run, and make its session."""
        self._check_free()
        config = self.config
        check_caller(config.precision, self.device)
        epochs = config.epochs if epochs is None else epochs
        max_steps = config.max_steps if max_steps is None else max_steps
        max_time = config.max_time if max_time is None else max_time
        check_loader(train_loader, "train_loader")
        if val_loader is not None:
            check_val_loader(val_loader, "val_loader")
        elif config.validate_at_start:
            raise ConfigError("validate_at_start=True needs a validation: give train() a val_loader")
        check_limits(epochs, max_steps, max_time)
        limited_length(train_loader, config.limit_train_batches, "limit_train_batches")
        if config.sampling == "seeded":
            check_seedable(train_loader)
        if val_loader is not None:
            self._check_validation()
            for each in by_prefix(val_loader).values():
                limited_length(each, config.limit_val_batches, "limit_val_batches")
        for data_set in ("train", "val"):
            check_metrics(metrics_for(data_set, metrics))
        self._check_model()
        self._check_optimization()
        given = [*self.callbacks, *check_callbacks(callbacks)]
        monitors = Monitors(config, given, metrics, val_loader)
        if self.scheduler is not None:
            monitors.check_schedule(self.scheduler, None)

        base_dir = None
        needs_dir = config.run_dir is not None or config.remote is not None
        if needs_dir or any(getattr(each, "needs_run_dir", False) for each in given):
            base_dir = self._base_dir()
        plan = None if resume is None else plan_resume(resume, self._base_dir(), config.run_name)
        will_resume = plan is not None and plan.which is not None
        check_resume_lr(resume_lr, resume, self.optimizers)
        initial_weights = plan_init(*init, will_resume=will_resume)
        if plan is not None:
            base_dir = plan.directory.parent
        if base_dir is not None and not any(isinstance(each, EventLog) for each in given):
            given.insert(0, EventLog())
        handlers = lookup(given)
        if any(each.validates_live for each in given) and any(
            each.startswith(live_prefix(PREFIX)) for each in by_prefix(val_loader)
        ):
            raise ConfigError(
                f"val_loader has the name {LIVE!r}, which is that of the weights in training with validate='both': "
                "rename the loader"
            )
        check_averages(given)
        run_id = config.run_name or new_run_id() if plan is None else plan.directory.name
        remote = None if config.remote is None else remote_run(config.remote, run_id)
        limits = Limits(epochs=epochs, max_steps=max_steps, max_time=max_time)

        def make_loop(session: Session) -> TrainingLoop:
            return self._make_loop(session, limits, train_loader, val_loader, metrics, handlers)

        def claim(session: Session) -> None:
            with self._lock, _owners_lock:
                self._check_free()
                for each in given:
                    owner = _owners.get(id(each))
                    if owner is not None:
                        raise ConfigError(
                            f"this {type(each).__name__} serves run {owner!r}, which is going on: "
                            "give each run a callback of its own"
                        )
                self._session, self._loop, self.last_run = session, session.loop, session.run
                self._mixed = session.loop.mixed
                for each in given:
                    _owners[id(each)] = run_id
            begun: list[Callback] = []
            try:
                for each in given:
                    each.reset()
                    begun.append(each)
            except BaseException:
                close_unused(begun)
                release(session)
                raise

        def release(session: Session) -> None:
            with self._lock, _owners_lock:
                self._session = self._loop = None
                for each in given:
                    _owners.pop(id(each), None)

        return Session(
            self,
            run_id=run_id,
            config=config,
            base_dir=base_dir,
            resume=plan,
            resume_lr=resume_lr if will_resume else None,
            initial_weights=initial_weights,
            remote=remote,
            handlers=handlers,
            monitors=monitors,
            make_loop=make_loop,
            claim=claim,
            release=release,
        )

    def _base_dir(self) -> Path:
        """Return where runs are, as of now."""
        return absolute_path(self.config.run_dir or DEFAULT_RUN_DIR)

    def _remote_to_fetch(self, resume: Resume) -> RemoteRun | None:
        """Return the remote directory that holds what is to be continued, None if there is none to ask.

        Raises:
            ConfigError: It cannot be told which run is meant, or the store cannot be used.
        """
        config = self.config
        if config.remote is None or resume is None or resume == "never":
            return None
        if isinstance(resume, str) and "://" in resume:
            raise ConfigError(
                f"resume={resume!r}: give Trainer(remote_dir=..., run_name=...) and resume='auto', a tag or a step"
            )
        if not isinstance(resume, str | int) or (isinstance(resume, str) and set(resume) & set("/\\")):
            return None  # a local path
        if config.run_name is None:
            raise ConfigError(
                f"resume={resume!r} with remote_dir needs run_name: the store may hold runs of other people, "
                "and runs that are going on elsewhere"
            )
        return remote_run(config.remote, config.run_name)

    def _fetch(self, resume: Resume) -> None:
        """Bring what is to be continued here, if it is elsewhere. Blocks, for the network."""
        remote = self._remote_to_fetch(resume)
        if remote is not None:
            assert self.config.run_name is not None and isinstance(resume, str | int)
            self._check_free()
            fetch_run(remote, self._base_dir() / self.config.run_name, resume)

    async def _fetch_async(self, resume: Resume) -> None:
        """Likewise in a thread beside this event loop. Cancellation: the thread ends by itself."""
        if self._remote_to_fetch(resume) is not None:
            worker = Worker("offloop-fetch")
            try:
                await worker.run(functools.partial(self._fetch, resume))
            finally:
                worker.close()

    @asynccontextmanager
    async def _fetch_and_run_beside(
        self, resume: Resume, prepare: Callable[[], Session]
    ) -> AsyncIterator[Run]:
        await self._fetch_async(resume)
        async with prepare().run_beside() as run:
            yield run

    def _make_loop(
        self,
        session: Session,
        limits: Limits,
        train_loader: Iterable[Batch],
        val_loader: ValLoader | None,
        metrics: RunMetrics,
        handlers: Sequence[Any],
    ) -> TrainingLoop:
        self._next_tokens = NextTokens()
        if self._given_rates is not None:
            self._given_rates.put_back()
        prefixes = list(by_prefix(val_loader))
        validates_live = any(each.callback.validates_live for each in handlers)
        if validates_live:
            prefixes += [live_prefix(each) for each in prefixes]
        setup = Setup(
            config=self.config,
            limits=limits,
            device=self.device,
            optimizers=self.optimizers,
            schedules=self._schedules(),
            train_loader=train_loader,
            val_loader=val_loader,
            train_metrics=self._metric_sets(["train_"], metrics_for("train", metrics)).get("train_"),
            val_metrics=self._metric_sets(prefixes, metrics_for("val", metrics)),
            validates_live=validates_live,
            monitor=session.monitors.default,
            count_samples=self._count_samples(),
            is_resumable=session.dir is not None,
        )
        hooks = [hook for each in handlers for hook in each.hooks]
        loop = self._loop_class(self, setup, session, mailbox=session.mailbox, hooks=hooks)
        self._given_rates = loop.schedules.given_rates
        scaler = loop.mixed.scaler
        if scaler is not None and self._mixed is not None and self._mixed.scaler is not None:
            scaler.load_state_dict(self._mixed.scaler.state_dict())  # it goes on, as model and optimizer do
            loop.reporter.loss_scale = scaler.get_scale()
        return loop

    def _metric_sets(self, prefixes: Iterable[str], metrics: MetricSpec) -> dict[str, MetricSet]:
        if not metrics:
            return {}
        rows = rows_of(self.loss)
        return {each: MetricSet(metrics, prefix=each, device=self.device, rows=rows) for each in prefixes}

    def _schedules(self) -> tuple[Schedule, ...]:
        if self.scheduler is None:
            return ()
        return (Schedule(self.scheduler, self.config.scheduler_interval),)

    def _prepare_model(self) -> None:
        """Bring model and optimizer states to the device, and compile. In the training thread."""
        self.model.to(self.device)
        if isinstance(self.loss, torch.nn.Module):
            self.loss.to(self.device)  # class weights live in it
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                for name, value in state.items():
                    # a step counter may live on the CPU while its parameters are elsewhere
                    if not isinstance(value, torch.Tensor) or value.dim():
                        state[name] = to_device(value, self.device)
        if self.config.channels_last:
            use_channels_last(self.model)
        if self.config.compile and not self._is_compiled:
            options = self.config.compile if isinstance(self.config.compile, dict) else {}
            self.model.compile(**options)
            self._is_compiled = True

    def _evaluate(self, loader: ValLoader, metrics: MetricSpec, prefix: str) -> Metrics:
        check_val_loader(loader, "loader")
        self._check_validation()
        if not isinstance(prefix, str):
            raise TypeError(f'prefix must be a text like "test_", got {prefix!r}')
        if prefix[-1:].isalnum():
            raise ConfigError(f'prefix={prefix!r} makes keys like "{prefix}loss": write prefix="{prefix}_"')
        check_metrics(metrics)
        with self._occupied("evaluating", beside_a_run="await run.validate() asks it to validate"):
            val_metrics = self._metric_sets(by_prefix(loader), metrics)
            loop = self._make_quiet_loop(self.config, val_loader=loader, val_metrics=val_metrics)
            try:
                self._prepare_model()
                made = loop.validate()
                return Metrics(
                    {prefix + key.removeprefix("val_"): value for key, value in (made or {}).items()}
                )
            finally:
                self._loop = None

    @contextlib.contextmanager
    def _occupied(
        self, what: str, *, beside_a_run: str = "await run.call(...) gets at its model"
    ) -> Iterator[None]:
        """Do something with the trainer that no run may disturb."""
        with self._lock:
            if self._session is not None:
                raise TrainerBusyError(f"{_busy(self._session)}; {beside_a_run}")
            self._check_free()
            self._occupation = what
        try:
            yield
        finally:
            self._occupation = ""

    def _make_quiet_loop(
        self,
        config: TrainerConfig,
        *,
        max_steps: int | None = None,
        train_loader: Iterable[Batch] = (),
        schedules: tuple[Schedule, ...] = (),
        val_loader: ValLoader | None = None,
        val_metrics: Mapping[str, MetricSet] | None = None,
        host: Host | None = None,
        mailbox: Mailbox | None = None,
    ) -> TrainingLoop:
        """Return a loop that is no run, and take it as the trainer's."""
        self._next_tokens = NextTokens()
        setup = Setup(
            config=config,
            limits=Limits(epochs=1 if max_steps is None else None, max_steps=max_steps),
            device=self.device,
            optimizers=self.optimizers,
            schedules=schedules,
            train_loader=train_loader,
            val_loader=val_loader,
            val_metrics=val_metrics or {},
            monitor="train_loss" if val_loader is None else "val_loss",
            count_samples=self._count_samples(),
        )
        self._loop = TrainingLoop(self, setup, host or SilentHost(), mailbox=mailbox)
        return self._loop

    def _count_samples(self) -> BatchSize:
        return guess_batch_size if self.batch_size is None else checked_batch_size(self.batch_size)

    # Running -------------------------------------------------------------------------------------

    def _train_here(self, session: Session, *, force_signals: bool) -> RunResult:
        seen: list[str] = []
        with handled_signals(_note_signal(session, seen), force=force_signals) as session.handles_signals:
            anyio.run(session.run_to_end, lambda run: None)
        result = session.outcome()  # raised here and not in the event loop, whose task would hold on to it
        _raise_for_signal(seen)
        return result

    def _train_in_helper_thread(self, session: Session) -> RunResult:
        """Run on an event loop of its own beside the one that this call blocks."""
        if not _inside_ipython():
            warnings.warn(
                "train() blocks the event loop that it was called in: await train_async(...) instead",
                RuntimeWarning,
                stacklevel=4,  # the caller of train(), which is decorated
            )
        failure: list[BaseException] = []
        seen: list[str] = []
        note = _note_signal(session, seen, third_is_final=False)

        def run() -> None:
            try:
                anyio.run(session.run_to_end, lambda run: None)
            except BaseException as error:
                failure.append(error)

        host = Thread(run, name=f"offloop-host-{session.run_id}", daemon=False)
        # Ctrl-C, or a notebook's stop button. It must not raise in here, where train() would be parted from its run:
        # train() returns when the run is over. SIGTERM stays with the application, and no number of interrupts ends it.
        interrupts = handled_signals(
            note, force=False, only=(signal.SIGINT,), third_is_final=False, asks_application=True
        )
        with interrupts as session.handles_signals:
            host.start()
            while not host.is_over:
                host.join()
        if failure:
            raise failure.pop()
        result = session.outcome()
        _raise_for_signal(seen)
        return result

    # Checks --------------------------------------------------------------------------------------

    def _check_model(self) -> None:
        """Check the knobs that name parts of the model."""
        check_freeze(self.model, self.config.freeze)
        select_modules(self.model, self.config.activation_checkpointing)

    def _check_optimization(self) -> None:
        if self.automatic_optimization:
            if len(self.optimizers) > 1:
                raise ConfigError(
                    f"there are {len(self.optimizers)} optimizers ({', '.join(self.optimizers)}): say when each "
                    "steps with automatic_optimization = False and self.optimizer_step(name)"
                )
            if isinstance(self.optimizer, torch.optim.LBFGS):
                raise ConfigError(
                    "LBFGS evaluates the loss several times in a step: use automatic_optimization = False and "
                    "self.optimizer_step(closure=...)"
                )
        elif type(self).training_step in (BaseTrainer.training_step, Trainer.training_step):
            raise ConfigError(
                "automatic_optimization = False leaves the steps to you: define training_step(self, batch) "
                "with self.backward(loss) and self.optimizer_step()"
            )
        elif self.config.accumulate_grad_batches > 1:
            raise ConfigError(
                f"accumulate_grad_batches={self.config.accumulate_grad_batches} needs automatic_optimization: "
                "in a manual step, call self.optimizer_step() every so many batches"
            )

    def _check_validation(self) -> None:
        """Raise where batches of a validation would meet a step that is not there."""
        own = type(self)
        if own.validate_epoch is not BaseTrainer.validate_epoch:
            return
        if own.validation_step is BaseTrainer.validation_step:
            raise ConfigError(f"{own.__name__} must define validation_step(self, batch) to validate")
        if not self.automatic_optimization and own.validation_step is Trainer.validation_step:
            raise ConfigError(
                f"{own.__name__} steps manually, and a validation must not step: define validation_step(self, batch), "
                "or train without a val_loader"
            )

    def _check_free(self) -> None:
        if self._session is not None:
            raise TrainerBusyError(_busy(self._session))
        if self._occupation:
            raise TrainerBusyError(
                f"this trainer is {self._occupation}: one thing at a time, or make another Trainer"
            )

    def _check_thread(self) -> None:
        session = self._session
        if session is not None and threading.current_thread() is not session.thread:
            raise TrainerBusyError(
                f"{_busy(session)}; in its training thread it works: "
                "await run.call(lambda trainer: trainer.state_dict())"
            )

    def _predictions(self, loader: Iterable[Batch]) -> Generator[Any, None, None]:
        """Prepare the model and yield the outputs of each batch."""
        self._prepare_model()
        mixed = MixedPrecision(self.config.precision, self.device)
        feed = DeviceTransfer(self.device, channels_last=self.config.channels_last)
        with eval_mode(self.model):
            yield from predictions(self.predict_step, loader, feed=feed, autocast=mixed.autocast)

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


class Trainer(BaseTrainer):
    """Trains a model whose batches follow a convention, without a line of training code.

    | batch | with `loss=` | without |
    |---|---|---|
    | `(inputs, targets)` | `loss(model(inputs), targets)` | `model(inputs, targets)` returns its loss |
    | mapping | `inputs` and `targets` in it, as above | `model(**batch)` returns its loss |
    | tensor | - | `model(batch)` returns its loss |

    A model returns its loss as a scalar tensor, as `outputs.loss` or as `outputs["loss"]`; its `logits` and the
    batch's `labels` then feed the metrics, the Hugging Face way. Anything else: override `training_step`.
    """

    def training_step(self, batch: Batch) -> StepOutput:
        """Compute the loss by the convention that the batch follows."""
        if self.loss is not None:
            inputs, targets = inputs_and_targets(batch)
            try:
                outputs = self.model(inputs)
            except Exception as error:
                explain_model(error, inputs)
                raise
            try:
                loss = self.loss(outputs, targets)
            except Exception as error:
                explain_loss(error, outputs, targets)
                raise
            return {"loss": loss, "outputs": outputs, "targets": targets}
        loop = self._loop
        has_metrics = loop is not None and (
            loop.validator.metrics if loop.progress.is_validating else loop.train_metrics
        )
        return own_loss(self.model, batch, self._next_tokens if has_metrics else None)

    def validation_step(self, batch: Batch) -> StepOutput:
        """Compute the loss as `training_step` does."""
        if not self.automatic_optimization:
            raise NotImplementedError(
                f"{type(self).__name__} steps manually: define validation_step(self, batch)"
            )
        return self.training_step(batch)

    def predict_step(self, batch: Batch) -> Any:
        """Return the model's outputs; with `loss=` a batch may be `(inputs, targets)`, as in training, or inputs."""
        if isinstance(batch, Mapping):
            if self.loss is not None and "inputs" in batch:
                return self.model(batch["inputs"])
            return self.model(**batch)
        if isinstance(batch, tuple | list):
            if self.loss is not None and len(batch) == 2:
                return self.model(batch[0])
            return self.model(*batch)
        return self.model(batch)


# Callbacks at work, by identity: one instance serves one run at a time, whichever trainer's. Under the lock.
_owners: dict[int, str] = {}
_owners_lock = threading.Lock()


def _busy(session: Session) -> str:
    return f"this trainer has run {session.run_id!r} going on: one run at a time, or make another Trainer"


def _inside_ipython() -> bool:
    """True in a notebook or IPython's shell; other libraries import IPython anywhere."""
    get_ipython = getattr(
        sys.modules.get("IPython"), "get_ipython", None
    )  # None while another thread imports it
    return get_ipython is not None and get_ipython() is not None


def _inside_event_loop() -> bool:
    try:
        anyio.lowlevel.current_token()
    except anyio.NoEventLoopError:
        return False
    return True


def _note_signal(
    session: Session, seen: list[str], *, third_is_final: bool = True
) -> Callable[[Any, int], None]:
    def note(number: Any, count: int) -> None:
        seen.append(number.name)
        session.lifetime.on_signal(number.name, count, third_is_final=third_is_final)

    return note


def _raise_for_signal(seen: Sequence[str]) -> None:
    if "SIGTERM" in seen:
        raise Preempted
    if seen:
        raise KeyboardInterrupt
