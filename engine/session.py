"""Session: one run's lifetime, from checked arguments to the result; owns its thread and its shutdown.

    caller's task                 supervisor (shielded)                  training thread
    ─────────────                 ─────────────────────                  ───────────────
    starts the supervisor ──────> drainer, observers ──starts──────────> set-up, loop.run()
    waits for "done"              waits for the thread                        │
       │ cancelled?               <───────────────────────── ends ────────────┘
       └─> tells the mailbox      checkpoints durable, TrainEnd
           and re-raises          observers drain, close() of each
                                  result, "done"

A native asyncio cancellation goes through any shield, so nothing that must run to its end waits in the
caller's task: that one only tells the mailbox. The supervisor waits for the thread through any number of
cancellations. In `asyncio.run`'s final sweep, where every task is cancelled, only this is promised: the
thread has stopped and `close()` was called.
"""

import contextlib
import contextvars
import functools
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import anyio.abc
import msgspec
import torch

from offloop.engine.bus import BUFFER, Bus, Subscription
from offloop.engine.callback import Decider, Handlers, StepHook
from offloop.engine.config import TrainerConfig
from offloop.engine.control import Control, actor, deciding
from offloop.engine.errors import ConfigError, OffloopError, RunEndedError
from offloop.engine.events import EpochEnd, Event, Metrics, TrainEnd, ValidationEnd
from offloop.engine.loop import TrainingLoop
from offloop.engine.observer import CallbackCosts, Observer, Worker
from offloop.engine.process import enter_process, leave_process
from offloop.engine.run import Best, Run, RunResult, Status
from offloop.engine.run_dir import create_run_dir, describe_environment, write_run_json
from offloop.engine.step_hooks import StepPoint
from offloop.engine.waker import Waker, result_of

if TYPE_CHECKING:
    from offloop.engine.trainer import BaseTrainer

logger = logging.getLogger("offloop")

STACK_INTERVAL: Final = 10.0
"""Seconds after which the stack of a training thread that does not end is logged, and again."""
IMPATIENT_CLOSE: Final = 2.0
"""Seconds that are left for everything after a second signal."""


class Session:
    """One run. Made by the trainer with checked arguments, used once."""

    def __init__(
        self,
        trainer: "BaseTrainer",
        *,
        run_id: str,
        config: TrainerConfig,
        base_dir: Path | None,
        handlers: Sequence[Handlers],
        monitor: str,
        direction: Literal["min", "max"] | None,
        make_loop: Callable[["Session"], TrainingLoop],
        claim: Callable[["Session"], None],
        release: Callable[["Session"], None],
    ) -> None:
        self.trainer = trainer
        self.run_id = run_id
        self.config = config
        self.dir = None if base_dir is None else base_dir / run_id
        self.monitor = monitor
        self.direction = direction
        self.control = Control()
        self.bus = Bus(run_id=run_id, flush_interval=config.flush_interval, attention=self.control.poke)
        self.result: RunResult | None = None  # written by the supervisor at the end, read by everybody
        self.finished: Future[RunResult] = Future()
        self.failure: BaseException | None = None  # the first one; from the training thread or a callback
        self.best: Best | None = None  # written by the training thread
        self.signal_count = 0
        self._claim, self._release = claim, release
        self._handlers = handlers
        self._phase = "starting"  # then "running", "closing", and the result's status
        self._started = time.perf_counter()
        self._description: dict[str, Any] = {}
        self._thread_ended = Waker()
        self._loop_thread: threading.Thread | None = None
        self._deciders: dict[str, list[tuple[Decider, Observer]]] = {}
        self.loop = make_loop(self)
        self.run = Run(self)
        self.loop.hooks.point = StepPoint(self.loop, trainer, self.run)
        self.observers = [self._observe(each) for each in handlers]
        context = contextvars.copy_context()
        self._device_context = _default_device()
        self.thread = threading.Thread(
            target=context.run, args=(self._train,), name=f"offloop-training-{run_id}", daemon=False
        )

    # The training thread's side ------------------------------------------------------------------

    def _train(self) -> None:
        """Be the training thread."""
        try:
            with self._device_context, torch.enable_grad():
                if self.loop.device.type == "cuda":
                    torch.cuda.set_device(self.loop.device)
                self._set_up()
                self._phase = "running"
                self.loop.run()
        except BaseException as error:
            self._fail(error)
        finally:
            self.control.end()
            leave_process(self.run_id)
            self._thread_ended.wake()

    def _set_up(self) -> None:
        """Do what must be done before the first event and may block."""
        if self.dir is not None:
            description = {
                "run_id": self.run_id,
                "attempt": 0,
                "created": time.time(),
                "status": "running",
                "config": self.config.as_settings(),
                **describe_environment(),
            }
            create_run_dir(self.dir, description)
            self._description = description
        self.trainer._prepare_model()
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed)
        if not self.trainer.model.training:
            self.trainer.model.train()  # left in eval mode as a whole, as from_pretrained() does

    def emit(self, event: Event) -> None:
        """Publish an event of the training loop, and keep the best moment up to date."""
        if isinstance(event, ValidationEnd | EpochEnd):
            self._judge(event)
        self.bus.publish_unchecked(event)

    def publish(self, event: Event) -> None:
        """Publish somebody's event; in the training thread with its position and after all before it."""
        if threading.current_thread() is self.thread:
            self.bus.prepare(event)
            for name, value in self.loop.position().items():
                msgspec.structs.force_setattr(event, name, value)
            self.loop.reporter.publish(event)
        else:
            self.bus.publish(event)

    def decide(self, event: Event) -> None:
        """Ask the deciders about an event, in declared order."""
        for decider, observer in self._deciders.get(event.handler_name, ()):
            if self.control.cancelled:
                return
            started = time.perf_counter()
            try:
                self._ask(decider, observer, event)
            except Exception as error:
                if (observer.handlers.callback.on_error or "raise") == "raise":
                    raise
                observer.failed(type(event).__name__, error)
            finally:
                observer.decided += time.perf_counter() - started

    def _ask(self, decider: Decider, observer: Observer, event: Event) -> None:
        name = f"decider {decider.callback}.{event.handler_name}"
        if decider.is_async:
            answers: list[Exception | None] = []
            self._meet(observer, name, lambda: self._decide_on_loop(decider, event, answers), answers)
            if answers and answers[0] is not None:
                raise answers[0]
            return
        if observer.handlers.observers:
            # Its observers share its state: what came before this event is handled first.
            caught_up: list[Exception | None] = []
            self._meet(observer, name, lambda: self._answer(caught_up, None), caught_up)
            if self.control.cancelled:
                return
        with _acting(decider.callback, self.control):
            decider.method(event, self.run)

    def _meet(
        self,
        observer: Observer,
        name: str,
        arrive: Callable[[], object],
        answers: list[Exception | None],
    ) -> None:
        """Wait until an observer has reached this point of its stream and `arrive` has answered."""
        assert observer.subscription is not None
        self.bus.rendezvous(observer.subscription, arrive)
        self.control.stand(lambda: bool(answers) or self.control.cancelled or self._loop_is_gone(), name)
        if not answers and self._loop_is_gone():
            self.control.cancel("the event loop is gone")

    async def _decide_on_loop(self, decider: Decider, event: Event, answers: list[Exception | None]) -> None:
        """Run an async decider on the event loop, until it answers, its timeout, or a cancellation."""
        error: Exception | None = None
        try:
            with Waker() as cancelled, self.control.on_cancel(cancelled.wake):
                async with anyio.create_task_group() as tasks:

                    async def watch() -> None:
                        await cancelled.wait()
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(watch)
                    with anyio.move_on_after(decider.timeout) as patience:
                        try:
                            with _acting(decider.callback, self.control):
                                await decider.method(event, self.run)
                        except Exception as problem:
                            error = problem
                    if patience.cancelled_caught:
                        logger.warning(
                            "decider %s.%s took longer than its %.1f s: training goes on without it",
                            decider.callback,
                            event.handler_name,
                            decider.timeout,
                        )
                    tasks.cancel_scope.cancel()
        finally:
            self._answer(answers, error)

    def _answer(self, answers: list[Exception | None], error: Exception | None) -> None:
        answers.append(error)
        self.control.poke()

    def _loop_is_gone(self) -> bool:
        thread = self._loop_thread
        return self.bus.loop_is_gone or self.bus.has_ended or (thread is not None and not thread.is_alive())

    def hook_failed(self, hook: StepHook, error: Exception) -> None:
        """Hold or pass on what a step hook raised. Training thread."""
        if hook.on_error == "raise":
            raise error
        observer = next(each for each in self.observers if each.name == hook.callback)
        observer.failed(hook.point, error)

    def save(self, command: Any) -> None:
        """Take a checkpoint for a command. Training thread."""
        raise ConfigError("checkpoints are not there yet")

    def _judge(self, event: ValidationEnd | EpochEnd) -> None:
        """Note the best moment: strictly better only, so ties keep the older; NaN is never best."""
        by_validation = self.monitor.startswith("val_")
        if isinstance(event, ValidationEnd) is not by_validation:
            return
        if self.monitor not in event.metrics:
            if self.config.monitor is not None:
                event.metrics[self.monitor]  # raises and lists what there is
            return
        score = event.metrics[self.monitor]
        if self.direction is None or not math.isfinite(score):
            return
        best = self.best.score if self.best is not None else None
        if best is None or (score < best if self.direction == "min" else score > best):
            self.best = Best(monitor=self.monitor, score=score, epoch=event.epoch, step=event.step)

    # Anybody's side ------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """What the run is doing, in a word."""
        if self._phase != "running":
            return self._phase
        state = self.loop.boundary.state
        return "validating" if state == "running" and self.loop.validating else state

    @property
    def callback_costs(self) -> dict[str, CallbackCosts]:
        """What each callback has cost so far."""
        return {observer.name: observer.costs for observer in self.observers}

    def cancel(self, reason: str) -> None:
        """End the run at its next batch. Any thread, also a signal handler."""
        self.control.cancel(reason)
        self.bus.unblock()

    def on_signal(self, name: str, count: int) -> None:
        """Obey a signal: the first stops the run in order, the second in haste. Main thread."""
        self.signal_count = count
        if count == 1:
            logger.warning("%s: stopping; once more to leave in haste", name)
            with contextlib.suppress(OffloopError):
                self.control.give("stop", {"reason": name}, by="signal")
        else:
            self.cancel(f"{name}, twice")

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure and end training. Any thread."""
        if self.failure is None:
            self.failure = error
        self.cancel(f"{type(error).__name__}: {error}")

    # The event loop's side -----------------------------------------------------------------------

    def _observe(self, handlers: Handlers) -> Observer:
        callback = handlers.callback
        types = handlers.observed_types()
        meets = any(decider.is_async or handlers.observers for decider in handlers.deciders.values())
        subscription: Subscription[Event] | None = None
        if types or meets:
            buffer = callback.buffer or BUFFER
            subscription = Subscription(self.bus, handlers.name, types, buffer, callback.on_full)
            self.bus.add(subscription)
        observer = Observer(handlers, subscription, self.run, self.publish, self._fail)
        for name, decider in handlers.deciders.items():
            self._deciders.setdefault(name, []).append((decider, observer))
        return observer

    def claim(self) -> None:
        """Take the trainer, the callbacks and the process for this run; raises if somebody has them."""
        self._claim(self)
        try:
            enter_process(self.run_id, deterministic=self.config.deterministic, seed=self.config.seed)
        except BaseException:
            self._release(self)
            raise

    async def run_to_end(self, started: Callable[[Run], None]) -> RunResult:
        """Run in the caller's task: wait for the end; if cancelled, tell the mailbox and re-raise.

        Args:
            started: Called when the run goes on by itself.
        """
        self.claim()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.supervise)
            started(self.run)
            try:
                await result_of(self.finished)
            except anyio.get_cancelled_exc_class():
                self.cancel("the task that awaited it was cancelled")
                raise
        return self.outcome()

    @contextlib.asynccontextmanager
    async def run_beside(self) -> AsyncIterator[Run]:
        """Run beside the body of `async with`, and wait for the end after it.

        An exception in the body stops the run, a failing run cancels the body; neither is wrapped in a group.
        """
        self.claim()
        in_body: Exception | None = None
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as body:
                tasks.start_soon(self.supervise, body.cancel)
                try:
                    try:
                        yield self.run
                    except Exception as error:
                        in_body = error
                        with contextlib.suppress(RunEndedError):
                            reason = f"{type(error).__name__} beside the run"
                            self.control.give("stop", {"reason": reason}, by="user")
                    await result_of(self.finished)
                except BaseException:
                    if not body.cancel_called:
                        self.cancel("the task beside it was cancelled")
                    raise
        if self.failure is not None and in_body is not None and in_body is not self.failure:
            raise in_body
        self.outcome()
        if in_body is not None:
            raise in_body

    async def supervise(self, on_failure: Callable[[], None] | None = None) -> None:
        """Host the run on this event loop, from the thread's start to the result. Shielded; never raises.

        Args:
            on_failure: Called on the event loop when the run has failed, before its callbacks drain.
        """
        swept = False
        with anyio.CancelScope(shield=True):
            self._loop_thread = threading.current_thread()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.bus.drain)
                    scopes = [anyio.CancelScope() for _ in self.observers]
                    served = [anyio.Event() for _ in self.observers]
                    for observer, scope, event in zip(self.observers, scopes, served, strict=True):
                        tasks.start_soon(self._serve, observer, scope, event)
                    self.thread.start()
                    swept = await self._thread_is_over()
                    if self.failure is not None and on_failure is not None:
                        on_failure()
                    self._end_bus()
                    if not swept:
                        await self._drain(scopes, served)
                    for scope in scopes:
                        scope.cancel()
            except BaseException as error:
                # A cancellation that pierced the shield while draining (asyncio.run's sweep), or a defect of ours
                swept = True
                if not isinstance(error, anyio.get_cancelled_exc_class()) and self.failure is None:
                    self.failure = error
            finally:
                self._abandon_thread()
            await self._close()
            await self._finish()

    async def _serve(self, observer: Observer, scope: anyio.CancelScope, served: anyio.Event) -> None:
        with scope:
            await observer.serve()
        served.set()

    async def _thread_is_over(self) -> bool:
        """Wait for the training thread through all cancellations; True if there was one."""
        cancelled = False
        warned = time.perf_counter()
        while self.thread.is_alive():
            try:
                with anyio.move_on_after(STACK_INTERVAL):
                    await self._thread_ended.wait()
                    self.thread.join()  # it has done all but return
            except anyio.get_cancelled_exc_class():
                cancelled = True
                self.cancel("the event loop is ending")
            now = time.perf_counter()
            if self.control.cancelled and self.thread.is_alive() and now - warned >= STACK_INTERVAL:
                warned = now
                self._log_stack()
        return cancelled

    def _log_stack(self) -> None:
        frame = sys._current_frames().get(self.thread.ident or 0)
        if frame is not None:
            stack = "".join(traceback.format_stack(frame))
            logger.warning("the training thread has not reached its next batch yet; it is here:\n%s", stack)

    def _end_bus(self) -> None:
        """Publish `TrainEnd` after everything else, and close the bus behind it."""
        self._phase = "closing"
        self.bus.settle()
        status, reason = self._status()
        error = self.failure
        self.bus.publish(
            TrainEnd(
                status=status,
                reason=reason,
                error=None if error is None else f"{type(error).__name__}: {error}",
                metrics=Metrics(self.loop.latest),
                seconds=time.perf_counter() - self._started,
            )
        )
        self.bus.close()

    async def _drain(self, scopes: Sequence[anyio.CancelScope], served: Sequence[anyio.Event]) -> None:
        """Let the callbacks handle what is left; cancel and report who misses the deadline."""
        deadline = time.perf_counter() + self.config.drain_timeout
        for observer, scope, event in zip(self.observers, scopes, served, strict=True):
            while not event.is_set():
                # short looks, so that a second signal is not kept waiting by a callback that hangs
                left = deadline - time.perf_counter()
                if self.signal_count > 1 or left <= 0:
                    scope.cancel()
                    late = TimeoutError(
                        f"still busy {self.config.drain_timeout:g} s after the end: cancelled"
                    )
                    observer.failed("drain", late)
                    break
                with anyio.move_on_after(min(left, 0.5)):
                    await event.wait()

    async def _close(self) -> None:
        """Call `close()` of each callback, always; a close that hangs is given up and reported."""
        patience = IMPATIENT_CLOSE if self.signal_count > 1 else self.config.drain_timeout
        for observer in self.observers:
            try:
                with anyio.move_on_after(patience) as scope:
                    await observer.close()
                if scope.cancelled_caught:
                    observer.failed(
                        "close", TimeoutError(f"close() took longer than {patience:g} s: given up")
                    )
            except anyio.get_cancelled_exc_class():
                continue  # the sweep again: go on with the next one

    def _abandon_thread(self) -> None:
        """Make sure that the thread knows, if this coroutine is torn down without having waited for it."""
        if self.thread.is_alive():
            self.cancel("the event loop is gone")

    def _status(self) -> tuple[Status, str]:
        if self.failure is not None:
            return "failed", f"{type(self.failure).__name__}: {self.failure}"
        if self.loop.ending == "cancelled":
            return "cancelled", self.loop.reason
        if self.loop.ending == "stopped":
            return "stopped", self.loop.reason
        return "completed", self.loop.reason or f"epochs={self.loop.limits.epochs}"

    async def _finish(self) -> None:
        status, reason = self._status()
        self.result = RunResult(
            run_id=self.run_id,
            status=status,
            reason=reason,
            epochs=self.loop.epoch,
            steps=self.loop.step,
            metrics=Metrics(self.loop.latest),
            best=self.best,
            history=tuple(self.loop.history),
            seconds=time.perf_counter() - self._started,
            callback_costs=self.callback_costs,
            callback_errors={each.name: tuple(each.errors) for each in self.observers if each.errors},
            dir=self.dir if self._description else None,
        )
        if self._description:
            assert self.dir is not None
            ending = {"status": status, "reason": reason, "ended": time.time(), "steps": self.loop.step}
            write = functools.partial(write_run_json, self.dir, self._description | ending)
            worker = Worker("offloop-run-json")
            # The run has its result; a directory that is gone by now, or a sweep, is no reason to lose it.
            with contextlib.suppress(OSError, anyio.get_cancelled_exc_class()):
                await worker.run(write)
            worker.close()
        self._phase = status
        self._thread_ended.close()
        self._release(self)
        self.finished.set_result(self.result)

    def outcome(self) -> RunResult:
        """Return the result, or raise what the run failed with, once, with a note on where it was."""
        assert self.result is not None
        if self.failure is not None:
            self.failure.add_note(
                f"offloop: run {self.run_id}, epoch {self.loop.epoch}, step {self.loop.step}"
            )
            raise self.failure
        return self.result


@contextlib.contextmanager
def _acting(name: str, control: Control) -> Iterator[None]:
    """Mark what happens inside as done by a decider of this run."""
    who, where = actor.set(name), deciding.set(control)
    try:
        yield
    finally:
        actor.reset(who)
        deciding.reset(where)


def _default_device() -> contextlib.AbstractContextManager[Any]:
    """Return a context that brings the caller's default device to another thread: torch keeps it per thread."""
    device = torch.get_default_device()
    return contextlib.nullcontext() if device.type == "cpu" else device
