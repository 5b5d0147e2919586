"""Trainer: what users make, subclass and call. `program.py` has its constructor, its steps and what they may call."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.abc
from torch.nn.parameter import is_lazy

from offloop.engine.argument_hints import ATTRIBUTES, AsyncBlock, explains_arguments
from offloop.engine.callback import Callback
from offloop.engine.config import misplaced_argument
from offloop.engine.data.val_loaders import ValLoader
from offloop.engine.events import Metrics
from offloop.engine.metrics.names import MetricSpec, RunMetrics
from offloop.engine.recovery.resume_plan import Resume
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.session import ranks
from offloop.engine.session.hosting import run_awaited, run_blocking
from offloop.engine.session.prepare import prepare_async, prepare_blocking, run_block
from offloop.engine.session.run_arguments import RunArguments
from offloop.engine.tools import evaluation, prediction, tuning
from offloop.engine.tools.tuning import BatchSizeSearch, LearningRateSearch
from offloop.engine.training.default_steps import DefaultSteps
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Batch
from offloop.engine.weights.source import Source


class BaseTrainer(TrainingProgram):
    """Trains a model and publishes an ordered stream of events. Subclass it to write your own steps; see `Trainer`.

    Override `training_step` and `validation_step`, and if you like `train_epoch` and `validate_epoch`. All of them
    run in the training thread of a run. A trainer has one run at a time.
    """

    def __repr__(self) -> str:
        if "_last_run" not in vars(self):
            # A subclass has failed before it called our `__init__`, and a debugger shows it.
            return super().__repr__()
        size = sum(each.numel() for each in self.model.parameters() if not is_lazy(each))
        optimizers = ", ".join(type(each).__name__ for each in self.optimizers.values())
        run = "" if self._last_run is None else f"; last run {self._last_run.id}: {self._last_run.state}"
        return (
            f"<{type(self).__name__} of {type(self.model).__name__} with {size:,} parameters, {optimizers}, "
            f"on {self.device}{run}>"
        )

    # Type checkers report these without help
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # A property of a subclass has failed by itself
            if name in ATTRIBUTES and not hasattr(type(self), name):
                text = f"{type(self).__name__!r} object has no attribute {name!r}: {ATTRIBUTES[name]}"
                raise AttributeError(text, name=name, obj=self)
            # Python's own error, or that of a property
            return super().__getattribute__(name)

    @property
    def last_run(self) -> Run | None:
        """The run in progress, else the latest one; None before the first."""
        run: Run | None = self._last_run
        return run

    @property
    def rank(self) -> int:
        """Number of this process among those that train together, from 0; 0 in a process that trains alone."""
        return ranks.launched(self.config)[0]

    @property
    def world_size(self) -> int:
        """Number of processes that train together; 1 in a process that trains alone."""
        return ranks.launched(self.config)[1]

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

        In the main thread, SIGINT and SIGTERM stop the run in order (second: in haste, third: at once), unless the
        program handles them itself. Works in a notebook cell or inside an event loop, too, but blocks that loop:
        use `await train_async(...)` there.

        Args:
            train_loader: Training batches: a DataLoader, a list, any iterable of batches.
            val_loader: Validation batches, likewise; or several loaders by name: `{"fit": ..., "new": ...}` gives the
                metrics `val_fit_loss`, `val_new_loss` and so on.
            epochs: Limit: epochs in total. The first limit reached ends the run.
            max_steps: Limit: optimizer steps in total.
            max_time: Limit: seconds of training in total, without pauses.
            metrics: Names like `"accuracy"`, or `torchmetrics.Metric` instances, for training and validation; or
                `{"train": [...], "val": [...]}` for different ones.
            callbacks: Callbacks of this run, after those of the trainer.
            resume: Continue a run: `"auto"` (if there is one), `"must"`, `"last"`, `"best"`, a tag, a step, or
                a path to a checkpoint or a run. None or `"never"`: a new run.
            resume_lr: Learning rate of a resumed run, set as by `run.set_lr`: a schedule continues from it. It is set
                once, however often the script runs again. None: that of the checkpoint.
            init_from: Initial weights, as `load_model` takes them: another run, a checkpoint, a registered model, a
                file, a state dict. Not used when a run is resumed.
            init_strict: False: load the weights that fit and log the others.

        Raises:
            ConfigError: An argument cannot work. Nothing has started then.
            WeightsError, ModelNotFoundError, CheckpointError: `init_from` or `resume` cannot be read or does not
                fit. Nothing has been written then.
            TrainerBusyError: This trainer has a run in progress.
            KeyboardInterrupt, Preempted: SIGINT or SIGTERM has stopped the run.
            Exception: A step, a loader or a decider has raised it. A note tells where.
        """
        arguments = RunArguments(
            train_loader=train_loader,
            val_loader=val_loader,
            epochs=epochs,
            max_steps=max_steps,
            max_time=max_time,
            metrics=metrics,
            callbacks=callbacks,
            resume=resume,
            resume_lr=resume_lr,
            init_from=init_from,
            init_strict=init_strict,
        )
        return run_blocking(prepare_blocking(self, arguments))

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
        """Train without blocking this event loop, and return the result; see `train`.

        The run ends with the task that awaits it. For runs that outlive their caller, as in a service, see `Runs`.

        Cancellation: the run ends at its next batch, callbacks drain and close, then the cancellation is re-raised.

        Args:
            train_loader, val_loader, epochs, max_steps, max_time, metrics, callbacks, resume, resume_lr, init_from,
                init_strict: As for `train`.
            handle_signals: Handle SIGINT and SIGTERM during the run. In the main thread.
            task_status: Passed by `task_group.start`, which then returns the `Run`. A run that fails cancels that task
                group and everything in it; runs in `Runs` fail alone.
        """
        arguments = RunArguments(
            train_loader=train_loader,
            val_loader=val_loader,
            epochs=epochs,
            max_steps=max_steps,
            max_time=max_time,
            metrics=metrics,
            callbacks=callbacks,
            resume=resume,
            resume_lr=resume_lr,
            init_from=init_from,
            init_strict=init_strict,
        )
        session = await prepare_async(self, arguments)
        return await run_awaited(session, task_status.started, handle_signals=handle_signals)

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

        Leaving the block waits for the end of the run. An exception in the block stops the run; a run that fails
        cancels the block and raises its exception. Arguments are those of `train`, and are checked at once.
        """
        arguments = RunArguments(
            train_loader=train_loader,
            val_loader=val_loader,
            epochs=epochs,
            max_steps=max_steps,
            max_time=max_time,
            metrics=metrics,
            callbacks=callbacks,
            resume=resume,
            resume_lr=resume_lr,
            init_from=init_from,
            init_strict=init_strict,
        )
        return AsyncBlock(run_block(self, arguments), "async with trainer.start(...) as run:")

    def evaluate(self, loader: ValLoader, *, metrics: MetricSpec = (), prefix: str = "val_") -> Metrics:
        """Run the model over a loader in eval mode and return `val_loss` and the metrics. Blocks; no events.

        Where several processes were started, all ranks call it, each with the same loader: they take its batches in
        turn, with the weights of rank 0, and all get the same result.

        Args:
            loader: Batches; or several loaders by name, as in `train(val_loader=...)`.
            metrics: Names like `"accuracy"`, or `torchmetrics.Metric` instances.
            prefix: Start of each key: `"test_"` gives `test_loss`, `test_accuracy`.

        Raises:
            TrainerBusyError: A run is in progress; use `run.validate()` then.
            RankFailedError: Another rank has failed.
        """
        return evaluation.evaluate(self, loader, metrics, prefix)

    async def evaluate_async(
        self, loader: ValLoader, *, metrics: MetricSpec = (), prefix: str = "val_"
    ) -> Metrics:
        """Do what `evaluate` does, in a thread of its own. Cancellation: the thread ends by itself."""
        return await evaluation.evaluate_async(self, loader, metrics, prefix)

    def predict(self, loader: Iterable[Batch]) -> list[Any]:
        """Return the output of `predict_step` for each batch of a loader, on the host. Blocks.

        The model is in eval mode meanwhile; the flag of each module is restored. `torch.cat(trainer.predict(loader))`
        makes one tensor of the tensors of all batches.

        Where several processes were started, all ranks call it, each with the same loader: they take its batches in
        turn, with the weights of rank 0. Rank 0 gets all outputs in order, the others an empty list.

        Raises:
            TrainerBusyError: The trainer is in use.
        """
        return prediction.predict(self, loader)

    def predict_async(
        self, loader: Iterable[Batch], *, read_ahead: int = 2
    ) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
        """Predict in a thread of its own: `async with trainer.predict_async(loader) as stream:`.

        `async for outputs in stream` gives the outputs of each batch, in order. The thread is at most `read_ahead`
        batches ahead of the reader. Leaving the block ends it after the current batch; so does a cancellation, which
        is then re-raised. Where several processes were started, rank 0 has the stream; that of the others is empty,
        and leaving their block waits for rank 0 to leave its own.

        Args:
            loader: Batches.
            read_ahead: Outputs that may wait for the reader, at least 1.

        Raises:
            TrainerBusyError: The trainer is in use.
            Exception: The model or the loader has raised it. It comes out of the stream.
        """
        block = prediction.predict_async(self, loader, read_ahead)
        return AsyncBlock(block, "async with trainer.predict_async(loader) as stream:")

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

        Weights, buffers, optimizer and random states are restored afterwards, bit for bit. The suggestion is not
        applied: give it to your optimizer. `tuning.find_learning_rate` describes the method.

        Args:
            train_loader: Training batches, read again from the beginning as often as needed.
            min_lr: First rate, above 0.
            max_lr: Last rate, above `min_lr`; the search ends earlier if the loss explodes.
            steps: Optimizer steps, at least 10.
            optimizer: Name of the optimizer, where there are several; the others keep their rates.

        Raises:
            ConfigError: An argument cannot work.
            TrainerBusyError: The trainer is in use.
        """
        return tuning.find_learning_rate(
            self, train_loader, min_lr=min_lr, max_lr=max_lr, steps=steps, optimizer=optimizer
        )

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

        Weights, buffers, optimizer and random states are restored afterwards, bit for bit, and the memory is free.

        Args:
            train_loader: A DataLoader, whose first samples fill the batches; or a function that returns a loader for
                a batch size, for example one that begins with the longest samples.
            mode: `"power"` doubles the size until it does not fit; `"binsearch"` then searches between the last two.
            start: First size tried, at least 1.
            max_batch_size: Largest size tried; None: the size of the data set.
            steps: Optimizer steps with each size, at least 2: the first one creates the optimizer's state.
            memory_limit: Bytes. On CUDA the memory that torch may take, by default nine tenths of what is free. On
                the CPU that of the whole process; required there, because running out of it ends the process.

        Raises:
            ConfigError: An argument cannot work, or not even one sample fits.
            TrainerBusyError: The trainer is in use.
        """
        return tuning.find_batch_size(
            self,
            train_loader,
            mode=mode,
            start=start,
            max_batch_size=max_batch_size,
            steps=steps,
            memory_limit=memory_limit,
        )


class Trainer(DefaultSteps, BaseTrainer):
    """Trains a model whose batches follow a convention; no training code is needed.

    | batch | with `loss=` | without |
    |---|---|---|
    | `(inputs, targets)` | `loss(model(inputs), targets)` | `model(inputs, targets)` returns its loss |
    | mapping | `inputs` and `targets` in it, as above | `model(**batch)` returns its loss |
    | tensor | - | `model(batch)` returns its loss |

    A model returns its loss as a scalar tensor, as `outputs.loss` or as `outputs["loss"]`; its `logits` and the
    batch's `labels` then feed the metrics, the Hugging Face way. Anything else: override `training_step`.
    """
