"""Session: one run's lifetime, from checked arguments to the result; owns its thread and its shutdown.

    caller's task                 supervisor (shielded)                  training thread
    ─────────────                 ─────────────────────                  ───────────────
    starts the supervisor ──────> drainer, callbacks ──starts──────────> set-up, loop.run()
    waits for `finished`          waits for the thread                        │
       │ cancelled?               <───────────────────────── ends ────────────┘
       └─> tells the mailbox      checkpoints durable, callbacks settle
           and re-raises          TrainEnd, callbacks drain, close() of each
                                  result, `finished`

A native asyncio cancellation goes through any shield, so nothing that must run to its end waits in the
caller's task: that one only tells the mailbox. The supervisor waits for the thread through any number of
cancellations. In the final sweep of `asyncio.run`, where every task is cancelled, only this is promised: the
thread has stopped and `close()` was called.
"""

import contextlib
import contextvars
import functools
import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from offloop.engine.best import BestSoFar
from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.commands import Stop
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker, result_of
from offloop.engine.callback import close_unused
from offloop.engine.errors import (
    BusClosedError,
    RunEndedError,
    RunNameTakenError,
    note_cancellation,
)
from offloop.engine.events import Evaluated, Event, TrainStart
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.observers.observer import CallbackCosts, Observer
from offloop.engine.observers.worker import Worker
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.samples.files import SampleFiles
from offloop.engine.session.callback_tasks import CallbackTasks
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.session.outcome import Outcome
from offloop.engine.session.ownership import Lease
from offloop.engine.session.process import enter_process, leave_process
from offloop.engine.session.run_plan import RunPlan
from offloop.engine.session.storage import Storage
from offloop.engine.session.training_thread import Training

if TYPE_CHECKING:
    from offloop.engine.distributed.rank_run import RankRun

logger = logging.getLogger("offloop")

LEAVING: Final = 30.0
"""Seconds, besides those for its callbacks, that the other ranks wait for rank 0 to end the run."""
STACK_INTERVAL: Final = 10.0
"""Seconds between two log records of the stack of a training thread that does not end."""


class Session:
    """One run. `prepare` makes it from checked arguments; it is used once. All of its life is here: many methods.

    Attributes are written by `__init__`, unless a comment says otherwise, and read by any thread.
    """

    def __init__(self, plan: RunPlan) -> None:
        """Prepare a run. Nothing is taken, started or written. In the thread of the caller."""
        config, monitors, setup, run_id = plan.setup.config, plan.monitors, plan.setup, plan.run_id
        self.run_id = run_id
        self.config = config
        self.monitors = monitors
        # A trainer keeps its last run, which must not keep the trainer.
        self.weak_trainer = weakref.ref(plan.program)
        self.has_validation = setup.val_loader is not None
        self.mailbox = Mailbox()
        self.samples = SampleFiles(plan.directory, has_log=plan.ranks is None or plan.ranks.is_first)
        self.bus = Bus(
            run_id=run_id,
            flush_interval=config.flush_interval,
            # What a caller publishes at once would come before the run's directory.
            begins_with=TrainStart,
            attention=self.mailbox.poke,
            keep=self.samples.keep,
        )
        self.lifetime = Lifetime(self.mailbox, self.bus)
        self.callbacks = CallbackTasks(
            self.bus, self.mailbox, self.lifetime, drain_timeout=config.drain_timeout
        )
        self._logs = DurableLogs(self.bus, in_haste=self.lifetime.is_in_haste)
        self._best = BestSoFar(monitors.best, monitors.best_direction, is_named=monitors.is_best_named)
        self._is_new = plan.resume is None
        self._longest_drain = plan.longest_drain
        self.ranks = plan.ranks
        """None where this process trains alone."""
        self.has_other_ranks = plan.ranks is not None
        every = [each.callback.evaluates_every for each in plan.handlers]
        self.evaluations = Evaluations(next((each for each in every if each is not None), None))
        self.storage: Storage | None = None
        if plan.directory is not None:
            self.storage = Storage(
                plan, plan.directory, self.bus, self._logs, self.lifetime, self.evaluations
            )
        # The next two hold the trainer, model and data. None once the run is over: written by the supervisor.
        self._training: Training | None = Training(
            plan,
            bus=self.bus,
            mailbox=self.mailbox,
            lifetime=self.lifetime,
            callbacks=self.callbacks,
            logs=self._logs,
            best=self._best,
            storage=self.storage,
        )
        self._lease: Lease | None = Lease(plan)
        self.progress = self._training.loop.progress
        # Seconds in step hooks by callback. Written by the training thread.
        self._hook_seconds = self._training.loop.hooks.seconds
        self._outcome = Outcome(
            run_id,
            limits=setup.limits,
            progress=self.progress,
            lifetime=self.lifetime,
            best=self._best,
            evaluations=self.evaluations,
        )
        # Written by the supervisor at the end.
        self.result: RunResult | None = None
        self.finished: Future[RunResult] = Future()
        self._thread_ended = Waker()
        # Who ends the run: the supervisor or the training thread. The lock guards the next two.
        self._hand_over = threading.Lock()
        # Set on the event loop: the supervisor no longer waits for the thread.
        self.is_abandoned = False
        # Set by the training thread as it leaves the end of the run to the supervisor.
        self._has_ended_training = False
        context = contextvars.copy_context()
        self.thread = Thread(context.run, self._train, name=f"offloop-training-{run_id}", daemon=False)
        # Last, when all that a run shows is there
        self.run = Run(self)
        for each in plan.handlers:
            self._training.deciders.add(self.callbacks.add(each, self.run))
        self._logs.watch(self.callbacks.observers)
        self.callbacks.on_ended = self._callback_ended

    # The training thread -------------------------------------------------------------------------

    def _train(self) -> None:
        """Body of the training thread."""
        assert self._training is not None
        self._training.run(self.run)
        if not self._is_alone():
            self._thread_ended.wake()
            return
        try:
            # In an empty context: that of this thread may say that an event loop runs here, the caller's
            contextvars.Context().run(anyio.run, self._end_alone)
        except BaseException:
            logger.exception("run %s could not close its callbacks", self.run_id)

    def _is_alone(self) -> bool:
        """Return whether this thread has to end the run, because the event loop or the supervisor is gone."""
        with self._hand_over:
            self._has_ended_training = not self.is_abandoned
            return self.is_abandoned or self.lifetime.event_loop_is_dead

    async def _end_alone(self) -> None:
        """Close the callbacks and write the result, on an event loop of the training thread."""
        await self._settle_storage()
        self.bus.end()
        await self.callbacks.close()
        await self._finish()

    # Any thread ----------------------------------------------------------------------------------

    @property
    def dir(self) -> Path | None:
        """The run's directory; None if it has none, or could not have it."""
        return None if self.storage is None else self.storage.directory

    @property
    def state(self) -> str:
        """What the run is doing, in one word."""
        if self.lifetime.phase != "running":
            return self.lifetime.phase
        progress = self.progress
        return "validating" if progress.state == "running" and progress.is_validating else progress.state

    @property
    def is_saving(self) -> bool:
        """True while a checkpoint is taken or written."""
        return self.storage is not None and self.storage.checkpoints.in_flight

    @property
    def callback_costs(self) -> dict[str, CallbackCosts]:
        """What each callback has cost so far."""
        if self.result is not None:
            return dict(self.result.callback_costs)
        return self.callbacks.costs(self._hook_seconds)

    def publish(self, event: Event) -> None:
        """Publish an event of the user's. One from the training thread gets its position.

        Raises:
            BusClosedError: The run is over.
        """
        training = self._training
        if training is None:
            self.bus.publish(event)
        else:
            training.publish(event)
        if isinstance(event, Evaluated) and self.storage is not None:
            self.storage.judge(event)

    def _callback_ended(self, observer: Observer) -> None:
        """Expect no more evaluations from an evaluator that has ended, or crashed. Event loop."""
        if observer.handlers.callback.evaluates_every is not None and self.storage is not None:
            self.storage.checkpoints.give_up_evaluations()

    def abandon(self) -> bool:
        """Stop waiting for a training thread that hangs. It ends the run itself if it ever gets there. Event loop.

        Returns:
            False if training has ended: the supervisor is about to end the run.
        """
        with self._hand_over:
            if self._has_ended_training:
                return False
            self.is_abandoned = True
        self._thread_ended.wake()
        return True

    def outcome(self) -> RunResult:
        """Return the result, or raise what the run failed with, once, with a note on where it was."""
        assert self.result is not None
        # Taken from the run: its frames, with all the tensors in them, live as long as the caller keeps the exception
        failure = self.lifetime.take_failure()
        if failure is None:
            return self.result
        self.note_where(failure)
        try:
            raise failure
        finally:
            # Or this frame, which the exception holds, would hold the exception
            del failure

    def note_where(self, failure: BaseException) -> None:
        """Add to a failure where the run was."""
        note = f"offloop: run {self.run_id}, epoch {self.progress.epoch}, step {self.progress.step}"
        if self.storage is not None and self.storage.checkpoints.last is not None:
            note += f", last checkpoint {self.storage.checkpoints.last}"
        failure.add_note(note)

    # The event loop ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Take the trainer, the callbacks and the process for this run.

        The supervisor gives them back. The block does so only if the supervisor never ran: the run was refused, or
        the final sweep of `asyncio.run` cancelled the supervisor before its first line.

        Raises:
            RunNameTakenError: The directory of a new run exists already.
            TrainerBusyError: The trainer is in use.
            ConfigError: A callback serves another run, or another run in this process needs other switches.
        """
        assert self._lease is not None and self._training is not None
        self.mailbox.places.event_loop_thread = threading.get_ident()
        try:
            makes_directory = self._is_new and (self.ranks is None or self.ranks.is_first)
            if makes_directory and self.dir is not None and self.dir.exists():
                raise RunNameTakenError(str(self.dir))
            self._lease.take(self._training, self.run)
            try:
                config = self.config
                enter_process(
                    self.run_id,
                    deterministic=config.deterministic,
                    tf32=config.tf32,
                    seed=config.seed,
                    switch_interval=config.switch_interval,
                )
                try:
                    self.callbacks.pack()
                    yield
                finally:
                    if self._never_ran():
                        leave_process(self.run_id)
            finally:
                if self._never_ran():
                    if self.thread.ident is None:
                        close_unused([each.handlers.callback for each in self.callbacks.observers])
                    self._lease.give_back()
        finally:
            if self._never_ran():
                self.lifetime.phase = "cancelled"
                self.mailbox.end()
                self.finished.cancel()
                if self.ranks is not None:
                    self.ranks.refuse(sys.exception())

    def _never_ran(self) -> bool:
        return self.result is None and not self.is_abandoned

    async def run_to_end(self, started: Callable[[Run], None]) -> None:
        """Run in the caller's task until the end; if cancelled, tell the mailbox and re-raise.

        `outcome` then returns or raises what came of it.

        Args:
            started: Called when the run continues by itself.
        """
        with self.claimed():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.supervise)
                try:
                    started(self.run)
                    await result_of(self.finished)
                except BaseException:
                    self.lifetime.cancel("the task that awaited it was cancelled")
                    raise

    @contextlib.asynccontextmanager
    async def run_block(self) -> AsyncIterator[Run]:
        """Run while the body of `async with` runs, and wait for the end after it.

        An exception in the body stops the run, a failing run cancels the body; neither is wrapped in a group.
        """
        in_body: BaseException | None = None
        with self.claimed():
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as body:
                    tasks.start_soon(self.supervise, body.cancel)
                    try:
                        try:
                            yield self.run
                        except (anyio.get_cancelled_exc_class(), GeneratorExit):
                            raise
                        except BaseException as error:
                            in_body = error
                            with contextlib.suppress(RunEndedError):
                                reason = f"{type(error).__name__} in the block of the run"
                                self.mailbox.give(Stop(reason), by="user")
                        await result_of(self.finished)
                    except BaseException:
                        if not body.cancel_called:
                            self.lifetime.cancel("the task of its block was cancelled")
                        raise
        if in_body is None or in_body in (self.lifetime.failure, self.lifetime.late_exit):
            self.outcome()
        elif self.lifetime.failure is None:
            raise in_body
        elif isinstance(in_body, RunEndedError | BusClosedError):
            # The body only noticed that the run had failed
            self.outcome()
        else:
            both = [in_body, self.lifetime.failure]
            raise BaseExceptionGroup("the run failed, and so did the code in its block", both)

    async def supervise(self, on_failure: Callable[[], None] | None = None) -> None:
        """Host the run on this event loop, from the thread's start to the result. Shielded; never raises.

        Args:
            on_failure: Called on the event loop when the run has failed, before its callbacks drain.
        """
        swept = False
        with anyio.CancelScope(shield=True):
            note_cancellation(anyio.get_cancelled_exc_class())
            self.lifetime.begin_on_event_loop()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.bus.drain)
                    self.callbacks.start(tasks)
                    self._start_thread()
                    swept = await self._wait_for_thread()
                    if self.is_abandoned:
                        self.bus.close()
                        self.callbacks.cancel()
                        return
                    # A run that failed while it was prepared has no first event
                    self.bus.begin()
                    if self.lifetime.failure is not None and on_failure is not None:
                        on_failure()
                    await self._settle_storage()
                    if not swept:
                        await self.callbacks.settle()
                    if self.lifetime.failure is not None and on_failure is not None:
                        on_failure()
                    # `TrainEnd` comes after everything else, and the bus closes behind it
                    self.lifetime.phase = "closing"
                    self.bus.close(self._outcome.train_end())
                    if not swept:
                        await self.callbacks.drain()
                    self.callbacks.cancel()
            # The event loop was closed during the run: the training thread does the rest
            except GeneratorExit:
                raise
            # The final sweep of `asyncio.run` pierced the shield while draining; or a defect of ours
            except BaseException as error:
                swept = True
                if not isinstance(error, anyio.get_cancelled_exc_class()):
                    self.lifetime.fail(error)
            finally:
                # Here without having waited for the thread, if this coroutine is torn down
                if self._is_training():
                    self.lifetime.cancel("the event loop is gone")
            # After a defect of ours the thread may still be training
            await self._wait_for_thread()
            await self.callbacks.close()
            await self._finish()

    def _start_thread(self) -> None:
        try:
            self.thread.start()
        # The system gives no more threads, or the interpreter is about to end
        except RuntimeError as error:
            self.lifetime.fail(error)
            # What the thread does at its end
            self.mailbox.end()
            leave_process(self.run_id)

    async def _wait_for_thread(self) -> bool:
        """Wait for the end of the training thread through all cancellations; return whether there was one."""
        cancelled = False
        warned = time.perf_counter()
        while self._is_training() and not self.is_abandoned:
            try:
                with anyio.move_on_after(STACK_INTERVAL):
                    await self._thread_ended.wait()
                    if not self.is_abandoned:
                        # Returns immediately: the thread is already exiting
                        self.thread.join()
            except anyio.get_cancelled_exc_class():
                cancelled = True
                self.lifetime.cancel("the event loop is ending")
            # A signal handler of the application raised it
            except KeyboardInterrupt as error:
                self.lifetime.fail(error)
            now = time.perf_counter()
            if self.mailbox.cancelled and self._is_training() and now - warned >= STACK_INTERVAL:
                warned = now
                stack = self.stack()
                if stack:
                    logger.warning(
                        "the training thread has not reached its next batch yet; it is here:\n%s", stack
                    )
        return cancelled

    def _is_training(self) -> bool:
        return self.thread.ident is not None and not self.thread.is_over

    def stack(self) -> str:
        """Return where the training thread is now, as Python prints a stack; empty if it has ended. Any thread."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    # The end: on the event loop of the supervisor, or of the training thread ---------------------

    async def _settle_storage(self) -> None:
        """Wait until accepted checkpoints are durable, then uploaded."""
        if self.storage is None:
            return
        if self.evaluations.every is not None:
            with contextlib.suppress(anyio.get_cancelled_exc_class()):
                save = functools.partial(self.storage.finish_saving, self._outcome.ending)
                await _in_thread("offloop-finish-saving", save)
                for each in self.callbacks.observers:
                    if each.handlers.callback.evaluates_every is not None:
                        await self.callbacks.finish_one(each, unless=self._leaves_evaluations)
        settle = functools.partial(self.storage.settle, self._outcome.ending, self._best)
        try:
            await _in_thread("offloop-finish-checkpoints", settle)
        except anyio.get_cancelled_exc_class():
            # The final sweep of `asyncio.run`: the thread ends by itself
            pass
        except BaseException as error:
            self.lifetime.fail(error)

    def _leaves_evaluations(self) -> bool:
        """Whether what is still to be evaluated is left to a run that continues this one. Any thread."""
        return self.lifetime.is_cancelled() or self.lifetime.signal_count > 0

    async def _finish(self) -> None:
        """Make the result, write it to run.json, and release everything."""
        storage = self.storage if self.storage is not None and self.storage.is_open else None
        directory = None if storage is None else storage.directory
        if self.ranks is not None and not self.ranks.is_first:
            directory = self.dir
        result = self._outcome.result(self.callbacks, self.callback_costs, directory)
        self.result = result
        if storage is not None:
            write = functools.partial(
                storage.write_ending, {**result.to_run_json(), **self._outcome.ending()}
            )
            # A directory that is gone by now, or the final sweep, is no reason to lose the result
            try:
                await _in_thread("offloop-run-json", write)
            except (OSError, anyio.get_cancelled_exc_class()):
                logger.warning("%s does not say how the run ended", directory)
            except BaseException:
                logger.exception("%s does not say how the run ended", directory)
        if self.ranks is not None:
            try:
                await _in_thread("offloop-leave", functools.partial(self._leave_ranks, self.ranks))
            except anyio.get_cancelled_exc_class():
                pass
            except Exception:
                logger.exception("run %s could not say goodbye to the other ranks", self.run_id)
        self.lifetime.phase = result.status
        self._release()
        self.finished.set_result(self.result)

    def _leave_ranks(self, ranks: "RankRun") -> None:
        """Leave together with the other ranks, all with the result of rank 0. Blocks."""
        assert self.result is not None
        if self.lifetime.failure is not None:
            # If it came after training, the others wait for this rank to leave
            ranks.explained(self.lifetime.failure)
        else:
            patience = 2 * self._longest_drain + LEAVING
            if ranks.is_first:
                ranks.publish_result(self.result.encode())
            elif (told := ranks.take_result(patience, unless=self._is_leaving_pointless)) is not None:
                self.result = self.result.as_told(told)
            ranks.leave(patience, unless=self._is_leaving_pointless)
        ranks.close()

    def _is_leaving_pointless(self) -> bool:
        return self.lifetime.failure is not None or self.lifetime.signal_count > 1

    def _release(self) -> None:
        """Give the trainer and the callbacks back, and drop every reference to model, data and callbacks.

        The program gets its memory back when it drops the trainer, not at the next garbage collection.
        """
        assert self._lease is not None and self._training is not None
        self._lease.give_back()
        self._training.release()
        self._lease = self._training = None
        self._logs.close()
        self.callbacks.clear()


async def _in_thread(name: str, function: Callable[[], None]) -> None:
    """Run a function that blocks in a new thread; on the event loop if the system gives no thread.

    Cancellation: the thread ends by itself.
    """
    worker = Worker(name)
    try:
        await worker.run(function, else_here=True)
    finally:
        worker.close()
