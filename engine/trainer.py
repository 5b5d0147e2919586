"""Trainer: what users make, subclass and call. Checks every argument before anything runs."""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import anyio.abc
import anyio.lowlevel
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from offloop.engine.callback import Callback, lookup
from offloop.engine.checkpoint import CheckpointInfo, NamedCopies, Retention
from offloop.engine.config import TrainerConfig, check_limits, misplaced_argument
from offloop.engine.control import Control
from offloop.engine.data import length_of, limited_length, to_device
from offloop.engine.errors import (
    BatchError,
    ConfigError,
    EmptyLoaderError,
    Preempted,
    TrainerBusyError,
)
from offloop.engine.event_log import EventLog
from offloop.engine.events import Event, Metrics
from offloop.engine.learning_rate import Schedule
from offloop.engine.loop import Batch, StepOutput, TrainingLoop
from offloop.engine.metric_names import MetricSpec, check_metrics, chosen_metrics, metric_direction
from offloop.engine.metrics import MetricSet
from offloop.engine.observer import Worker
from offloop.engine.plain_epoch import is_plain, train_plain_epoch
from offloop.engine.process import handled_signals
from offloop.engine.resume import Resume, plan_resume
from offloop.engine.run import Run, RunResult
from offloop.engine.run_dir import new_run_id
from offloop.engine.seeded_sampling import check_seedable
from offloop.engine.session import Session
from offloop.engine.weights import Source, plan_init

Loss = Callable[[Any, Any], torch.Tensor]

DEFAULT_RUN_DIR: Final = "runs"


class _Limits:
    """When the run is complete."""

    def __init__(self, epochs: int | None, max_steps: int | None, max_time: float | None) -> None:
        self.epochs, self.max_steps, self.max_time = epochs, max_steps, max_time


class BaseTrainer:
    """Trains a model as an ordered stream of events. Subclass it to write your own steps; see `Trainer`.

    Override `training_step` and `validation_step`, and if you like `train_epoch` and `validate_epoch`. All
    of them run in the training thread of a run. A trainer has one run at a time.
    """

    automatic_optimization: bool = True
    """False: `training_step` calls `self.backward(loss)` and `self.optimizer_step(name)` itself."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
        config: TrainerConfig | None = None,
        *,
        loss: Loss | None = None,
        scheduler: LRScheduler | None = None,
        callbacks: Sequence[Callback] = (),
        **overrides: Any,
    ) -> None:
        """Say how to train. Nothing is moved, seeded or started before a run.

        Args:
            model: Trained in place. Moved to the device when a run starts.
            optimizer: Over parameters of `model`; or several by name, for manual optimization.
            config: The knobs; each can be given as a keyword instead.
            loss: `loss(outputs, targets)` for batches `(inputs, targets)`.
            scheduler: A torch schedule of (the first) optimizer, stepped as `scheduler_interval` says.
            callbacks: Come before those of `train()` in the order of decisions.
            overrides: Knobs of `TrainerConfig`, taking precedence over `config`.

        Raises:
            ConfigError: A knob is unknown (the text names the nearest) or out of range, or the optimizer
                holds parameters that are not the model's.
            TypeError: Model, optimizer, loss or scheduler is not what its name says.
        """
        if config is not None and not isinstance(config, TrainerConfig):
            raise TypeError(f"config must be a TrainerConfig, got {type(config).__name__}")
        self.config = (config or TrainerConfig()).replace(**overrides)
        _expect_instance(model, "model")
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _expect_instance(loss, "loss")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be a function of outputs and targets, got {type(loss).__name__}")
        self.model = model
        self.optimizers = _named_optimizers(optimizer)
        self.loss = loss
        self.scheduler = scheduler
        self.callbacks = tuple(callbacks)
        self.device = _resolve_device(self.config.device)
        self.last_run: Run | None = None
        self._lock = threading.Lock()  # guards _session, which threads and tasks may want at once
        self._session: Session | None = None
        self._loop: TrainingLoop | None = None  # of the run, or the evaluation, in progress
        self._is_compiled = False
        self._check_optimizers()
        lookup(self.callbacks)

    # To override ---------------------------------------------------------------------------------

    def training_step(self, batch: Batch) -> StepOutput:
        """Compute the loss of a batch, which is on the device already. Runs under autocast.

        Returns:
            The loss, a scalar tensor; or a mapping with `loss` and optionally `outputs` and `targets` (for the
            named metrics) and `weight` (samples or tokens that the loss is a mean over; a number).
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_step(self, batch)")

    def validation_step(self, batch: Batch) -> StepOutput:
        """Like `training_step` for a batch of a validation, under `torch.no_grad` and in eval mode."""
        raise NotImplementedError(f"{type(self).__name__} must define validation_step(self, batch)")

    def train_epoch(self, loader: Iterable[Batch]) -> None:
        """Train one epoch: an own version must do no more than `for batch in self.batches(loader): ...` here."""
        loop, own = self._in_run("train_epoch"), type(self)
        is_default = own.batches is BaseTrainer.batches and own.train_batch is BaseTrainer.train_batch
        if is_default and is_plain(loop):
            train_plain_epoch(loop, loader)  # the same, in one frame
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
        self._in_run("validate_batch").validate_batch(batch)

    def log(self, name: str, value: torch.Tensor | float) -> None:
        """Log a value of this step: `StepEnd.metrics[name]`, and the epoch's mean `train_name` or `val_name`.

        A tensor of one element stays on the device and is read late.
        """
        self._in_run("log").log(name, value)

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
        self._in_manual_run("backward").backward(loss)

    def optimizer_step(self, name: str | None = None, closure: Callable[[], Any] | None = None) -> None:
        """Unscale, clip, step and zero an optimizer in a manual step.

        Args:
            name: Which of several; may be left out where there is one.
            closure: For optimizers that evaluate the loss several times (LBFGS).
        """
        loop = self._in_manual_run("optimizer_step")
        if name is None and len(self.optimizers) == 1:
            name = next(iter(self.optimizers))
        if name not in self.optimizers:
            raise ConfigError(f"there is no optimizer {name!r}; there are {', '.join(self.optimizers)}")
        loop.manual_step(name, closure)

    def attach_scheduler(
        self,
        scheduler: LRScheduler,
        *,
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str | None = None,
        after_steps: int = 0,
    ) -> None:
        """Let a schedule step with the run that is going on, until its end. In the training thread.

        A resumed run puts the schedule's state back here: attach schedules in the same order each time,
        in a decider of `TrainStart`.

        Args:
            scheduler: Made for one of the trainer's optimizers.
            interval: Step after each epoch, or after each optimizer step.
            monitor: What a plateau watches; None for the run's `monitor`.
            after_steps: Optimizer steps before it begins.
        """
        loop = self._in_run("attach_scheduler")
        if scheduler.optimizer not in self.optimizers.values():
            raise ConfigError("the scheduler belongs to another optimizer than the trainer's")
        loop.schedules.append(Schedule(scheduler, interval, monitor, after_steps))
        if loop.resumed is not None:
            loop.resumed.restore_schedule(loop)

    def keep_checkpoints(
        self,
        retention: Retention,
        *,
        save_at_end: bool,
        save_dir: Path | None = None,
        name_of: Callable[[CheckpointInfo], str] = lambda info: info.name,
    ) -> None:
        """Say which checkpoints the run that is going on keeps. In the training thread, before the first one.

        Args:
            retention: What is kept when a new one is durable.
            save_at_end: Take one when training ends, however it ends but by a failure.
            save_dir: A directory for copies of them; hard links on the same disk.
            name_of: Gives a copy its name; called in the writer's thread.
        """
        self._in_run("keep_checkpoints")
        session = self._session
        if session is None or session.checkpoints is None:
            raise ConfigError("this run has no directory to save into: give Trainer(run_dir=...)")
        copies = None if save_dir is None else NamedCopies(save_dir, session.run_id, name_of)
        session.checkpoints.keep(retention, copies)
        session.save_at_end = save_at_end

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, where there is one; else see `optimizers`."""
        if len(self.optimizers) > 1:
            raise AttributeError(f"there are several: self.optimizers has {', '.join(self.optimizers)}")
        return next(iter(self.optimizers.values()))

    @property
    def epoch(self) -> int:
        """Index of the epoch in progress, from 0; during a run."""
        return self._in_run("epoch").epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; during a run."""
        return self._in_run("step").step

    # To start a run ------------------------------------------------------------------------------

    def train(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        metrics: MetricSpec = (),
        callbacks: Sequence[Callback] = (),
        resume: Resume = None,
        init_from: Source | None = None,
        init_strict: bool = True,
        **misplaced: Any,
    ) -> RunResult:
        """Train and return the result. Blocks this thread; the model trains in a thread of its own.

        In the main thread, SIGINT and SIGTERM stop the run in order (second: in haste, third: at once), unless
        somebody else handles them. In a notebook cell or inside another event loop it works too, but blocks
        that loop: `await train_async(...)` there.

        Args:
            train_loader: Anything iterable over batches: a DataLoader, a list, an iterable of tensors.
            val_loader: Likewise, for validations.
            epochs: Limit: epochs in total. The first limit reached ends the run.
            max_steps: Limit: optimizer steps.
            max_time: Limit: seconds of training, pauses not counted.
            metrics: Names like `"accuracy"`, or `torchmetrics.Metric` instances, for training and validation.
            callbacks: More of them, after the trainer's.
            resume: Continue a run: `"auto"` (if there is one), `"must"`, `"last"`, `"best"`, a tag, a step, or
                a path to a checkpoint or a run. None or `"never"`: a new run.
            init_from: Weights to begin from, as `load_model` takes them: another run, a checkpoint, a registered
                model, a file, a state dict. Not used when a run is resumed.
            init_strict: False: load the weights that fit and log what does not.
            misplaced: None are legal; the error says where a knob belongs.

        Raises:
            ConfigError: An argument cannot work; nothing has started then.
            WeightsError, ModelNotFoundError, CheckpointError: `init_from` or `resume` cannot be read or does not
                fit; nothing has been written then.
            TrainerBusyError: This trainer has a run going on.
            KeyboardInterrupt, Preempted: After a run that SIGINT or SIGTERM stopped.
            Exception: What a step, a loader or a decider raised, as it was, with a note on where.
        """
        session = self._prepare(
            train_loader,
            val_loader,
            epochs,
            max_steps,
            max_time,
            metrics,
            callbacks,
            resume,
            (init_from, init_strict),
            misplaced,
        )
        if _inside_event_loop():
            return self._train_in_helper_thread(session)
        return self._train_here(session, force_signals=False)

    async def train_async(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        metrics: MetricSpec = (),
        callbacks: Sequence[Callback] = (),
        resume: Resume = None,
        init_from: Source | None = None,
        init_strict: bool = True,
        handle_signals: bool = False,
        task_status: anyio.abc.TaskStatus[Run] = anyio.TASK_STATUS_IGNORED,
        **misplaced: Any,
    ) -> RunResult:
        """Train beside this event loop and return the result, see `train`.

        Also for a run that outlives its starter: `run = await task_group.start(partial(trainer.train_async, ...))`.

        Cancellation: the run ends at its next batch, callbacks drain and close, then it is re-raised.

        Args:
            train_loader, val_loader, epochs, max_steps, max_time, metrics, callbacks, resume, init_from, init_strict:
                As for `train`.
            handle_signals: Take SIGINT and SIGTERM for the length of the run, in the main thread.
            task_status: Given by `task_group.start`, which returns the `Run`.
            misplaced: None are legal.
        """
        session = self._prepare(
            train_loader,
            val_loader,
            epochs,
            max_steps,
            max_time,
            metrics,
            callbacks,
            resume,
            (init_from, init_strict),
            misplaced,
        )
        if not handle_signals:
            return await session.run_to_end(task_status.started)
        seen: list[str] = []
        with handled_signals(_note_signal(session, seen), force=True):
            result = await session.run_to_end(task_status.started)
        _raise_for_signal(seen)
        return result

    def start(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        metrics: MetricSpec = (),
        callbacks: Sequence[Callback] = (),
        resume: Resume = None,
        init_from: Source | None = None,
        init_strict: bool = True,
        **misplaced: Any,
    ) -> AbstractAsyncContextManager[Run]:
        """Return the run as an async context manager: `async with trainer.start(...) as run:`.

        Leaving the block waits for the end. An exception in the block stops the run; a run that fails
        cancels the block and raises its exception. Arguments as for `train`, checked at once.
        """
        session = self._prepare(
            train_loader,
            val_loader,
            epochs,
            max_steps,
            max_time,
            metrics,
            callbacks,
            resume,
            (init_from, init_strict),
            misplaced,
        )
        return session.run_beside()

    def evaluate(self, loader: Iterable[Batch], *, metrics: MetricSpec = ()) -> Metrics:
        """Run the model over a loader in eval mode and return `val_loss` and the metrics. Blocks; no events.

        Raises:
            TrainerBusyError: A run is going on; `run.validate()` is its way.
        """
        return self._evaluate(loader, metrics)

    async def evaluate_async(self, loader: Iterable[Batch], *, metrics: MetricSpec = ()) -> Metrics:
        """Like `evaluate`, in a thread beside this event loop. Cancellation: the thread ends by itself."""
        worker = Worker("offloop-evaluate")
        try:
            return await worker.run(functools.partial(self._evaluate, loader, metrics))
        finally:
            worker.close()

    # Preparing -----------------------------------------------------------------------------------

    def _prepare(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        epochs: int | None,
        max_steps: int | None,
        max_time: float | None,
        metrics: MetricSpec,
        callbacks: Sequence[Callback],
        resume: Resume,
        init: tuple[Source | None, bool],
        misplaced: Mapping[str, Any],
    ) -> Session:
        """Check everything that can be checked before a run, and make its session."""
        for name in misplaced:
            raise misplaced_argument(name)
        self._check_free()
        config = self.config
        epochs = config.epochs if epochs is None else epochs
        max_steps = config.max_steps if max_steps is None else max_steps
        max_time = config.max_time if max_time is None else max_time
        check_limits(epochs, max_steps, max_time)
        _check_loader(train_loader, "train_loader")
        limited_length(train_loader, config.limit_train_batches, "limit_train_batches")
        if config.sampling == "seeded":
            check_seedable(train_loader)
        if val_loader is not None:
            _check_loader(val_loader, "val_loader")
            limited_length(val_loader, config.limit_val_batches, "limit_val_batches")
        check_metrics(metrics)
        self._check_optimization()
        monitor = _monitor(config, metrics, val_loader)

        given = [*self.callbacks, *callbacks]
        base_dir = None
        if config.run_dir is not None or any(getattr(each, "needs_run_dir", False) for each in given):
            base_dir = Path(config.run_dir or DEFAULT_RUN_DIR)
        plan = plan_resume(resume, Path(config.run_dir or DEFAULT_RUN_DIR), config.run_name)
        will_resume = plan is not None and plan.which is not None
        initial_weights = plan_init(*init, will_resume=will_resume)
        if plan is not None:
            base_dir = plan.directory.parent
        if base_dir is not None and not any(isinstance(each, EventLog) for each in given):
            given.insert(0, EventLog())
        handlers = lookup(given)
        run_id = config.run_name or new_run_id() if plan is None else plan.directory.name
        limits = _Limits(epochs, max_steps, max_time)

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
                for each in given:
                    _owners[id(each)] = run_id
            try:
                for each in given:
                    each.reset()
            except BaseException:
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
            initial_weights=initial_weights,
            handlers=handlers,
            monitor=monitor,
            direction_of=functools.partial(metric_direction, metrics=metrics),
            make_loop=make_loop,
            claim=claim,
            release=release,
        )

    def _make_loop(
        self,
        session: Session,
        limits: _Limits,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        metrics: MetricSpec,
        handlers: Sequence[Any],
    ) -> TrainingLoop:
        return TrainingLoop(
            self,
            config=self.config,
            limits=limits,
            device=self.device,
            optimizers=self.optimizers,
            schedules=self._schedules(),
            train_loader=train_loader,
            val_loader=val_loader,
            train_metrics=MetricSet(metrics, prefix="train_", device=self.device) if metrics else None,
            val_metrics=MetricSet(metrics, prefix="val_", device=self.device) if metrics else None,
            monitor=session.monitor,
            publish=session.emit,
            publish_step=session.bus.publish_unchecked,
            decide=session.decide,
            clock_offset=session.bus.clock_offset,
            run_id=session.run_id,
            control=session.control,
            is_blocked=lambda: session.bus.blocked and not session.bus.loop_is_gone,
            hooks=[hook for each in handlers for hook in each.hooks],
            hook_failed=session.hook_failed,
            save=session.save_for,
        )

    def _schedules(self) -> list[Schedule]:
        if self.scheduler is None:
            return []
        return [Schedule(self.scheduler, self.config.scheduler_interval)]

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
        if self.config.compile and not self._is_compiled:
            options = self.config.compile if isinstance(self.config.compile, dict) else {}
            self.model.compile(**options)
            self._is_compiled = True

    def _evaluate(self, loader: Iterable[Batch], metrics: MetricSpec) -> Metrics:
        _check_loader(loader, "loader")
        check_metrics(metrics)
        with self._lock:
            if self._session is not None:
                raise TrainerBusyError(f"{_busy(self._session)}; await run.validate() asks it to validate")
            self._check_free()
            loop = self._loop = TrainingLoop(
                self,
                config=self.config,
                limits=_Limits(1, None, None),
                device=self.device,
                optimizers=self.optimizers,
                schedules=(),
                train_loader=(),
                val_loader=loader,
                train_metrics=None,
                val_metrics=MetricSet(metrics, prefix="val_", device=self.device) if metrics else None,
                monitor="val_loss",
                publish=lambda event: None,
                publish_step=lambda event: None,
                decide=lambda event: None,
                clock_offset=0.0,
                run_id="",
                control=Control(),
                is_blocked=lambda: False,
                hooks=(),
                hook_failed=lambda hook, error: None,
                save=lambda command: None,
            )
        try:
            self._prepare_model()
            made = loop.validate()
            return Metrics(made or {})
        finally:
            self._loop = None

    # Running -------------------------------------------------------------------------------------

    def _train_here(self, session: Session, *, force_signals: bool) -> RunResult:
        seen: list[str] = []
        with handled_signals(_note_signal(session, seen), force=force_signals):
            result = anyio.run(session.run_to_end, lambda run: None)
        _raise_for_signal(seen)
        return result

    def _train_in_helper_thread(self, session: Session) -> RunResult:
        """Run on an event loop of its own beside the one that this call blocks."""
        if "IPython" not in sys.modules:
            warnings.warn(
                "train() blocks the event loop that it was called in: await train_async(...) instead",
                RuntimeWarning,
                stacklevel=3,
            )
        failure: list[BaseException] = []

        def host() -> None:
            try:
                anyio.run(session.run_to_end, lambda run: None)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=host, name=f"offloop-host-{session.run_id}")
        thread.start()
        try:
            thread.join()
        except KeyboardInterrupt:  # a notebook's stop button: leave in order, keep the session alive
            session.on_signal("SIGINT", 1)
            thread.join()
            raise
        if failure:
            raise failure[0]
        assert session.result is not None
        return session.result

    # Checks --------------------------------------------------------------------------------------

    def _check_optimizers(self) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        for name, optimizer in self.optimizers.items():
            strange = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
            if strange:
                which = f"optimizer {name!r}" if len(self.optimizers) > 1 else "the optimizer"
                raise ConfigError(
                    f"{which} holds {strange} parameters that are not the model's: was the model copied or moved "
                    "after the optimizer was made, or is a part of it missing from `model`?"
                )
        if self.scheduler is not None:
            _expect_instance(self.scheduler, "scheduler", "optimizer, ...")
            if not isinstance(self.scheduler, LRScheduler):
                raise TypeError(
                    f"scheduler must be a torch.optim.lr_scheduler, got {type(self.scheduler).__name__}"
                )
            if self.scheduler.optimizer not in self.optimizers.values():
                raise ConfigError("the scheduler belongs to another optimizer than the one given")
            if isinstance(self.scheduler, ReduceLROnPlateau) and self.config.scheduler_interval == "step":
                raise ConfigError(
                    'ReduceLROnPlateau looks at a metric of an epoch: leave scheduler_interval at "epoch"'
                )

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

    def _check_free(self) -> None:
        if self._session is not None:
            raise TrainerBusyError(_busy(self._session))
        if self._loop is not None:
            raise TrainerBusyError("this trainer is evaluating: one thing at a time, or make another Trainer")

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
            inputs, targets = _inputs_and_targets(batch)
            outputs = self.model(inputs)
            return {"loss": self.loss(outputs, targets), "outputs": outputs, "targets": targets}
        return _own_loss(self.model, batch)

    def validation_step(self, batch: Batch) -> StepOutput:
        """Compute the loss as `training_step` does."""
        if not self.automatic_optimization:
            raise NotImplementedError(
                f"{type(self).__name__} steps manually: define validation_step(self, batch)"
            )
        return self.training_step(batch)


# Callbacks at work, by identity: one instance serves one run at a time, whichever trainer's. Under the lock.
_owners: dict[int, str] = {}
_owners_lock = threading.Lock()


def _inputs_and_targets(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "inputs" in batch and "targets" in batch:
        return batch["inputs"], batch["targets"]
    raise BatchError(
        f"with loss= a batch must be (inputs, targets) or a mapping with those keys, got {_describe(batch)}: "
        "override training_step(self, batch)"
    )


def _own_loss(model: torch.nn.Module, batch: Batch) -> StepOutput:
    if isinstance(batch, Mapping):
        outputs = model(**batch)
        targets = batch.get("labels", batch.get("targets"))
    elif isinstance(batch, tuple | list):
        outputs = model(*batch)
        targets = batch[-1] if batch else None
    elif isinstance(batch, torch.Tensor):
        outputs, targets = model(batch), None
    else:
        raise BatchError(
            f"a batch must be a tensor, a tuple, a list or a mapping, got {_describe(batch)}: "
            "override training_step(self, batch)"
        )
    loss = outputs if isinstance(outputs, torch.Tensor) else _part(outputs, "loss")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise BatchError(
            f"the model returned {_describe(outputs)} for a batch of {_describe(batch)}, which is no loss: give "
            "Trainer(loss=...), let the model return its loss, or override training_step(self, batch)"
        )
    logits = _part(outputs, "logits")
    if isinstance(logits, torch.Tensor) and isinstance(targets, torch.Tensor):
        return {"loss": loss, "outputs": logits, "targets": targets}
    return loss


def _part(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _expect_instance(value: object, name: str, arguments: str = "...") -> None:
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an instance: write {value.__name__}({arguments}) instead of {value.__name__}"
        )


def _named_optimizers(
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
) -> dict[str, torch.optim.Optimizer]:
    named = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    if not named:
        raise ConfigError("optimizer is an empty mapping: give at least one")
    for name, each in named.items():
        _expect_instance(each, "optimizer", "model.parameters(), lr=...")
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"{name} must be a torch.optim.Optimizer, got {type(each).__name__}")
    return named


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is none that torch knows: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no MPS device here")
    return device


def _check_loader(loader: Any, name: str) -> None:
    _expect_instance(loader, name)
    if isinstance(loader, str | bytes) or not hasattr(loader, "__iter__"):
        indexable = " (a Dataset? wrap it in a DataLoader)" if hasattr(loader, "__getitem__") else ""
        raise TypeError(f"{name} must be iterable over batches, got {type(loader).__name__}{indexable}")
    if length_of(loader) == 0:
        raise EmptyLoaderError(f"{name} is empty: it has no batch")


def _monitor(config: TrainerConfig, metrics: MetricSpec, val_loader: object) -> str:
    """Return the key that says what is best; whether less or more of it is better must be known."""
    monitor = config.monitor or ("train_loss" if val_loader is None else "val_loss")
    if monitor.startswith("val_") and val_loader is None:
        raise ConfigError(f"monitor={monitor!r} needs a validation: give train() a val_loader")
    if not monitor.startswith(("train_", "val_")):
        raise ConfigError(f"monitor must begin with train_ or val_, like val_loss; got {monitor!r}")
    if config.mode == "auto" and metric_direction(monitor, metrics) is None:
        raise ConfigError(
            f"monitor={monitor!r} is no metric that is known: {_known_keys(metrics, val_loader)} will be made. "
            'If a step logs it, say whether less or more of it is better: mode="min" or mode="max"'
        )
    return monitor


def _known_keys(metrics: MetricSpec, val_loader: object) -> str:
    names = ("loss", *chosen_metrics(metrics))
    prefixes = ("train_",) if val_loader is None else ("train_", "val_")
    return ", ".join(prefix + name for prefix in prefixes for name in names)


def _busy(session: Session) -> str:
    return f"this trainer has run {session.run_id!r} going on: one run at a time, or make another Trainer"


def _inside_event_loop() -> bool:
    try:
        anyio.lowlevel.current_token()
    except anyio.NoEventLoopError:
        return False
    return True


def _note_signal(session: Session, seen: list[str]) -> Callable[[Any, int], None]:
    def note(number: Any, count: int) -> None:
        seen.append(number.name)
        session.on_signal(number.name, count)

    return note


def _raise_for_signal(seen: Sequence[str]) -> None:
    if "SIGTERM" in seen:
        raise Preempted
    if seen:
        raise KeyboardInterrupt
