"""Runs: training runs that outlive the requests that start them, and fail alone."""

import logging
import math
import threading
import time
import traceback
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from types import TracebackType
from typing import Final, Self

import anyio
import anyio.abc
import anyio.lowlevel

from offloop.engine import checks
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.callback import Callback
from offloop.engine.config import misplaced_argument
from offloop.engine.data.val_loaders import ValLoader
from offloop.engine.errors import DeadlockError, RunNotFoundError, RunsClosedError
from offloop.engine.metrics.names import RunMetrics
from offloop.engine.recovery.resume_plan import Resume
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.session.prepare import fetch_async, prepare
from offloop.engine.session.run_arguments import RunArguments
from offloop.engine.session.session import Session
from offloop.engine.trainer import BaseTrainer
from offloop.engine.training.setup import Batch
from offloop.engine.weights.source import Source

logger = logging.getLogger("offloop")

KEEP: Final = 100
"""Ended runs kept by default: a day of short runs, or some MB with histories of a thousand epochs."""
SHUTDOWN_TIMEOUT: Final = 60.0
"""Seconds of an orderly shutdown by default: for a batch, a last checkpoint and the 30 s in which callbacks drain."""
HASTE: Final = 5.0
"""Seconds after that for runs that end in haste: 2 for the commit of a checkpoint, 2 more for `close()`."""


class _Hosted:
    """A run in progress. Event loop only."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.scope = anyio.CancelScope()
        self.is_over = anyio.Event()


class Runs(Mapping[str, Run]):
    """The training runs of an application, by id. They outlive the request that starts them, and fail alone.

    ```python
    async with Runs() as runs:
        run = await runs.start(trainer, train_loader, epochs=100)
        ...
    ```

    A mapping from run ids to `Run` objects in the order of their starts: `runs[run_id]`, `runs.values()`, `len(runs)`,
    `run_id in runs`. Ended runs stay in it until they are forgotten.

    A failed run is logged with its traceback. It affects neither the other runs nor the block: its
    `run.result.status` is `"failed"`, and `run.failure` is the exception, without the local variables of its frames.

    Leaving the block calls `shutdown`. `start`, `wait` and `shutdown` belong to the event loop that entered the
    block and may be awaited in any of its tasks; all other methods may be called from any thread.
    """

    def __init__(self, *, keep: int | None = KEEP, shutdown_timeout: float | None = SHUTDOWN_TIMEOUT) -> None:
        """Create an empty collection; enter it with `async with` to start runs.

        Args:
            keep: Ended runs to keep, at least 0; beyond that, the one that ended first is forgotten. None keeps all.
            shutdown_timeout: Seconds for the runs to end in order when the block is left, above 0. None: no limit.

        Raises:
            ConfigError: An argument is out of range.
        """
        checks.whole_number("keep", keep, at_least=0, optional=True, hint="; keep=None keeps all")
        checks.number(
            "shutdown_timeout",
            shutdown_timeout,
            above=0,
            finite=False,
            optional=True,
            unit="seconds",
            hint="; None sets no limit",
        )
        self.keep = keep
        self.shutdown_timeout = shutdown_timeout
        # Guards changes of the next two, by the event loop and by threads that forget runs. Never held across an await.
        self._lock = threading.Lock()
        # Any thread reads it without the lock, by copying it: that is one call, which no other thread interrupts.
        self._runs: dict[str, Run] = {}
        # The ids of ended runs, in the order of their ends
        self._ended: dict[str, None] = {}
        # The runs in progress. The rest is used on the event loop only.
        self._hosted: dict[str, _Hosted] = {}
        # Hosts the runs, from entering the block to leaving it
        self._tasks: anyio.abc.TaskGroup | None = None
        self._loop: object = None
        self._is_closed = False

    # The collection: any thread --------------------------------------------------------------------

    def __getitem__(self, run_id: str) -> Run:
        run = self._runs.get(run_id)
        if run is None:
            raise RunNotFoundError(run_id)
        return run

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs.copy())

    def keys(self) -> KeysView[str]:
        """Return the ids, as of now."""
        return self._runs.copy().keys()

    def values(self) -> ValuesView[Run]:
        """Return the runs, as of now, in the order of their starts."""
        return self._runs.copy().values()

    def items(self) -> ItemsView[str, Run]:
        """Return ids and runs, as of now."""
        return self._runs.copy().items()

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def active(self) -> list[Run]:
        """The runs in progress, in the order of their starts."""
        return [run for run in self.values() if not run.is_over]

    @property
    def results(self) -> dict[str, RunResult]:
        """The results of the ended runs that are kept, by id."""
        return {run.id: run.result for run in self.values() if run.is_over}

    def forget(self, run_id: str) -> None:
        """Remove an ended run; its files stay.

        Raises:
            RunNotFoundError: There is no such run.
            ValueError: It is in progress.
        """
        if not self[run_id].is_over:
            raise ValueError(
                f"run {run_id!r} is in progress: cancel it and wait for its end before you forget it"
            )
        with self._lock:
            self._runs.pop(run_id, None)
            self._ended.pop(run_id, None)

    def cancel_all(self, reason: str = "cancelled") -> None:
        """Cancel all runs in progress, as `Run.cancel` does. Does not wait."""
        for run in self.active:
            run.cancel(reason)

    def __repr__(self) -> str:
        active = len(self.active)
        return f"<Runs: {active} in progress, {len(self) - active} over>"

    # Starting and ending: the event loop -------------------------------------------------------------

    @explains_arguments(misplaced_argument)
    async def start(
        self,
        trainer: BaseTrainer,
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
    ) -> Run:
        """Start a run and return it; it continues by itself.

        Wrong arguments and other reasons why the run cannot start are raised here. Later failures are the run's.

        Cancellation: either the run has not started, or it continues and is in the collection.

        Args:
            trainer: The trainer, which has one run at a time.
            train_loader, val_loader, epochs, max_steps, max_time, metrics, callbacks, resume, resume_lr, init_from,
                init_strict: As for `Trainer.train`.

        Raises:
            ConfigError: An argument cannot work.
            WeightsError, ModelNotFoundError, CheckpointError: `init_from` or `resume` cannot be read.
            TrainerBusyError: This trainer has a run in progress.
            RunNameTakenError: The directory of the run exists already.
            RunsClosedError: The block has been left, or is being left.
        """
        self._expect_open()
        if not isinstance(trainer, BaseTrainer):
            if hasattr(trainer, "close") and hasattr(trainer, "cr_await"):
                # A coroutine, as of train_async(): it would warn that it was never awaited.
                trainer.close()
            raise TypeError(
                "start takes a trainer and the arguments of its train(), "
                f"as in runs.start(trainer, train_loader, epochs=10); got {type(trainer).__name__}"
            )
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
        await fetch_async(trainer, resume)
        # Asked again: it may have been shut down meanwhile, and preparing a run changes the trainer
        tasks = self._expect_open()
        run: Run = await tasks.start(self._host, prepare(trainer, arguments))
        return run

    async def wait(self) -> dict[str, RunResult]:
        """Wait until no run is in progress, and return `results`. Cancellation: the runs continue.

        Raises:
            DeadlockError: A callback of one of the runs calls it in a handler, for which the end of that run waits.
        """
        self._expect_outside_callbacks("wait")
        await self._wait_for_all()
        return self.results

    async def shutdown(self) -> list[Run]:
        """Cancel all runs and wait until they are over. Leaving the block calls it; calling it twice is fine.

        Runs end at their next batch, as after `Run.cancel`, and `start` raises `RunsClosedError` from now on.
        Runs that have not ended after `shutdown_timeout` seconds end in haste: callbacks do not drain, and only a
        checkpoint that is being written is finished. A training thread that does not reach its next batch even then
        (a step or a loader that hangs) cannot be ended from outside. Its stack is logged, and the run ends by itself
        once the thread reaches its next batch; the interpreter cannot exit before.

        Cancellation: the runs are cancelled nevertheless.

        Returns:
            The runs that are still in progress.

        Raises:
            DeadlockError: A callback of one of the runs calls it in a handler, for which the end of that run waits.
        """
        self._expect_outside_callbacks("shutdown")
        return await self._shut_down(self._deadline())

    def _deadline(self) -> float:
        return math.inf if self.shutdown_timeout is None else time.perf_counter() + self.shutdown_timeout

    async def _shut_down(self, deadline: float) -> list[Run]:
        self._is_closed = True
        self.cancel_all("shut down")
        if await self._wait_for_all(deadline):
            return []
        for hosted in self._hosted.values():
            logger.warning("run %s has not ended in time: it ends in haste", hosted.session.run_id)
            hosted.session.lifetime.hurry("shut down")
        if await self._wait_for_all(deadline + HASTE):
            return []
        left = []
        for hosted in tuple(self._hosted.values()):
            run = hosted.session.run
            stack = run.stack()
            if hosted.session.abandon():
                logger.error(
                    "run %s continues after the shutdown; its training thread is here:\n%s", run.id, stack
                )
                hosted.scope.cancel()
                left.append(run)
        # The hosts of the abandoned runs return now; any other run is about to end by itself.
        await self._wait_for_all()
        return left

    async def __aenter__(self) -> Self:
        if self._tasks is not None or self._is_closed:
            raise RuntimeError("this Runs was entered before: create another one for another block")
        self._loop = anyio.lowlevel.current_token().native_token
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._tasks is None:
            raise RuntimeError("this Runs was not entered: use it as `async with Runs() as runs:`")
        deadline = self._deadline()
        cancellation: BaseException | None = None
        while True:
            try:
                with anyio.CancelScope(shield=True):
                    await self._shut_down(deadline)
                break
            # A native cancellation pierces the shield.
            except anyio.get_cancelled_exc_class() as error:
                cancellation = error
        # Without the exception of the block: the task group would wrap it, and there is nothing left to cancel.
        await self._tasks.__aexit__(None, None, None)
        if cancellation is not None and exc is None:
            raise cancellation

    def _expect_outside_callbacks(self, what: str) -> None:
        task = anyio.get_current_task().id
        if any(task in hosted.session.mailbox.places.tasks for hosted in self._hosted.values()):
            raise DeadlockError(
                f"runs.{what}() in a callback would wait forever: a run ends when its callbacks have handled their "
                "events. Call it in another task"
            )

    def _expect_open(self) -> anyio.abc.TaskGroup:
        if self._is_closed:
            raise RunsClosedError("no run can be started: this Runs is shut down")
        if self._tasks is None:
            raise RuntimeError("this Runs was not entered: use it as `async with Runs() as runs:`")
        if anyio.lowlevel.current_token().native_token is not self._loop:
            raise RuntimeError(
                "this Runs belongs to another event loop: start runs on the one that entered it"
            )
        return self._tasks

    async def _host(self, session: Session, *, task_status: anyio.abc.TaskStatus[Run]) -> None:
        """Body of one run's task. Raises only if the run cannot start or the task is cancelled."""
        self._expect_open()
        hosted = _Hosted(session)

        def register(run: Run) -> None:
            with self._lock:
                # There may be an earlier attempt of this run, which has ended.
                self._runs.pop(run.id, None)
                self._ended.pop(run.id, None)
                self._runs[run.id] = run
            self._hosted[run.id] = hosted
            # Before the callbacks of those that wait for the run
            session.finished.add_done_callback(lambda _: _log_failure(session))
            task_status.started(run)

        try:
            with hosted.scope:
                await session.run_to_end(register)
        finally:
            if self._hosted.get(session.run_id) is hosted:
                del self._hosted[session.run_id]
                if session.result is not None:
                    self._note_end(session.run_id)
            hosted.is_over.set()

    async def _wait_for_all(self, deadline: float = math.inf) -> bool:
        """Wait until no run is in progress; return False if the deadline comes first."""
        with anyio.move_on_after(deadline - time.perf_counter()):
            while self._hosted:
                await next(iter(self._hosted.values())).is_over.wait()
        return not self._hosted

    def _note_end(self, run_id: str) -> None:
        """Note the end of a run, and forget the runs that ended first if there are more than `keep`."""
        with self._lock:
            if run_id in self._runs:
                self._ended[run_id] = None
            while self.keep is not None and len(self._ended) > self.keep:
                first = next(iter(self._ended))
                del self._ended[first], self._runs[first]


def _log_failure(session: Session) -> None:
    """Log the failure of a run, and clear the frames of the exception, which may hold tensors."""
    failure = session.lifetime.failure
    if failure is None or session.result is None:
        return
    session.note_where(failure)
    logger.error("run %s failed", session.run_id, exc_info=failure)
    for each in _with_causes(failure):
        traceback.clear_frames(each.__traceback__)


def _with_causes(error: BaseException) -> list[BaseException]:
    """Return an exception, its causes and contexts, and the members of groups among them."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or each in found:
            continue
        found.append(each)
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
    return found
