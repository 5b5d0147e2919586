"""Trainer: what users make, subclass and call. `program.py` has its constructor, its steps and what they may call."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

import anyio
import anyio.abc

from offloop.engine.argument_hints import AsyncBlock, explains_arguments
from offloop.engine.callback import Callback
from offloop.engine.config import misplaced_argument
from offloop.engine.data.val_loaders import ValLoader
from offloop.engine.events import Metrics
from offloop.engine.metrics.names import MetricSpec, RunMetrics
from offloop.engine.recovery.resume_plan import Resume
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.session.hosting import run_awaited, run_blocking
from offloop.engine.session.prepare import prepare_async, prepare_blocking, run_beside
from offloop.engine.session.run_arguments import RunArguments
from offloop.engine.tools import evaluation, prediction, tuning
from offloop.engine.tools.tuning import BatchSizeSearch, LearningRateSearch
from offloop.engine.training.default_steps import DefaultSteps
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Batch
from offloop.engine.weights.source import Source


class BaseTrainer(TrainingProgram):
    """Trains a model as an ordered stream of events. Subclass it to write your own steps; see `Trainer`.

    Override `training_step` and `validation_step`, and if you like `train_epoch` and `validate_epoch`. All
    of them run in the training thread of a run. A trainer has one run at a time.
    """

    @property
    def last_run(self) -> Run | None:
        """The run in progress, else the latest one; None before the first."""
        run: Run | None = self._last_run
        return run

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

        Leaving the block waits for the end. An exception in the block stops the run; a run that fails
        cancels the block and raises its exception. Arguments as for `train`, checked at once.
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
        return AsyncBlock(run_beside(self, arguments), "async with trainer.start(...) as run:")

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
        return evaluation.evaluate(self, loader, metrics, prefix)

    @explains_arguments()
    async def evaluate_async(
        self, loader: ValLoader, *, metrics: MetricSpec = (), prefix: str = "val_"
    ) -> Metrics:
        """Like `evaluate`, in a thread beside this event loop. Cancellation: the thread ends by itself."""
        return await evaluation.evaluate_async(self, loader, metrics, prefix)

    @explains_arguments()
    def predict(self, loader: Iterable[Batch]) -> list[Any]:
        """Return what `predict_step` gives for each batch of a loader, on the host. Blocks.

        The model is in eval mode meanwhile, and each of its modules gets its own flag back. Tensors of all
        batches become one by `torch.cat(trainer.predict(loader))`.

        Raises:
            TrainerBusyError: A run, or something else, is going on.
        """
        return prediction.predict(self, loader)

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
        block = prediction.predict_async(self, loader, read_ahead)
        return AsyncBlock(block, "async with trainer.predict_async(loader) as stream:")

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
        return tuning.find_learning_rate(
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
    """Trains a model whose batches follow a convention, without a line of training code.

    | batch | with `loss=` | without |
    |---|---|---|
    | `(inputs, targets)` | `loss(model(inputs), targets)` | `model(inputs, targets)` returns its loss |
    | mapping | `inputs` and `targets` in it, as above | `model(**batch)` returns its loss |
    | tensor | - | `model(batch)` returns its loss |

    A model returns its loss as a scalar tensor, as `outputs.loss` or as `outputs["loss"]`; its `logits` and the
    batch's `labels` then feed the metrics, the Hugging Face way. Anything else: override `training_step`.
    """
