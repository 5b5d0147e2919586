"""Observers at work: one task for each callback takes its events and runs its handlers, in order.

    async def handlers    awaited here, on the event loop; how long each holds the loop is measured
    plain def handlers    a batch of events per hop to one worker thread of the callback
    async deciders        a barrier in the stream brings them here, after all that came before it

Failures are isolated, reported and counted here; nothing a handler does reaches another callback.
What is no `Exception`, such as `SystemExit`, ends the run and reaches its caller.
"""

import contextlib
import contextvars
import functools
import inspect
import itertools
import logging
import queue
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from offloop.engine.bus import forked
from offloop.engine.bus.command_mailbox import actor
from offloop.engine.bus.deadlock import Places
from offloop.engine.bus.subscription import Barrier, Subscription
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker
from offloop.engine.callback import MAX_FAILURES_IN_ROW, Callback, Handlers
from offloop.engine.errors import SubscriberTooSlowError, as_failure, describe, encodable, note_cancellation
from offloop.engine.events import CallbackFailed, Event
from offloop.engine.lazy_imports import was_importing
from offloop.engine.observers.worker import Driver, leaving

logger = logging.getLogger("offloop")
T = TypeVar("T")

EVENTS_AT_ONCE: Final = 1024
"""Events taken from the buffer in one go; the rest stay where new ones can push them out."""
TURN: Final = 0.01
"""Seconds after which handlers that never really await let the rest of the event loop run, between two events."""
FAILURE_INTERVAL: Final = 1.0
"""Seconds between two reports of failures of one callback."""
HOLD_WARNING: Final = 0.05
"""Seconds for which a handler may hold the event loop before it is named; twice the pace of a smooth page."""
WARNING_INTERVAL: Final = 10.0
"""Seconds between two such warnings about one callback."""


class CallbackCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What one callback cost and missed. Times in seconds."""

    events: int = 0
    """Events handled."""
    wall: float = 0.0
    """Time spent in its handlers, awaiting included."""
    cpu: float = 0.0
    """CPU time of its handlers, on the event loop or in its worker thread."""
    held: float = 0.0
    """Time during which its handlers held the event loop."""
    longest_hold: float = 0.0
    """The longest of those times without a pause."""
    decided: float = 0.0
    """Time that the training thread spent in or waited for its deciders."""
    in_step: float = 0.0
    """Time that the training thread spent in its step hooks."""
    lag: float = 0.0
    """The longest time an event had waited when its batch was taken."""
    dropped: int = 0
    """Samples that it missed."""
    failures: int = 0
    """Exceptions that its methods raised."""


class Worker:
    """One thread of one callback, for its plain methods. Made when first needed.

    A daemon: a handler that never returns must not keep the interpreter from leaving. Such a worker is
    given up (`abandoned`) and reported.
    """

    def __init__(self, name: str) -> None:
        self.abandoned = False
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waker = Waker()
        self._thread: Thread | None = None
        self._context = contextvars.copy_context()

    async def run(self, function: Callable[[], T], *, else_here: bool = False) -> T:
        """Run a function in the thread and wait for it. Cancellation: gives the thread up, it cannot be ended.

        Args:
            function: What it raises is raised here; a stray cancellation as the cause of a `RuntimeError`.
            else_here: Where the system gives no thread, run it on the event loop, which it then holds up.

        Raises:
            RuntimeError: The system gives no thread.
        """
        if self._thread is None:
            thread = Thread(self._context.run, self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not else_here:
                    raise
                return function()
            self._thread = thread
        outcome: list[T] = []
        failure: list[BaseException] = []

        generation = forked.generation

        def job() -> None:
            try:
                outcome.append(function())
            except BaseException as error:
                failure.append(error)
            if forked.generation != generation:
                forked.end_process(failure[0] if failure else None)
            self._waker.wake()

        self._jobs.put(job)
        try:
            while not outcome and not failure:
                await self._waker.wait()
        except BaseException:
            self.abandoned = not outcome and not failure
            raise
        if failure:
            raise as_failure(failure[0])
        return outcome[0]

    def close(self) -> None:
        """Let the thread end after its jobs, and wait for it unless it was given up."""
        if self._thread is not None:
            self._jobs.put(None)
            if not self.abandoned:
                self._thread.join()
        self._waker.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Observer:
    """One callback at work: handles its events, keeps its costs, holds its failures.

    All methods run on the event loop unless they say otherwise.
    """

    def __init__(
        self,
        handlers: Handlers,
        subscription: Subscription[Event] | None,
        run: Any,
        publish: Callable[[Event], None],
        fail: Callable[[BaseException], None],
        places: Places | None = None,
    ) -> None:
        """Bind a callback to a run.

        Args:
            handlers: The callback's methods.
            subscription: Its events; None for a callback that neither observes nor decides asynchronously.
            run: Handed to the handlers.
            publish: For `CallbackFailed`.
            fail: Ends the run as failed; for `on_error="raise"`, and for what is no `Exception`.
            places: The run's; they learn where the handlers run.
        """
        self.handlers = handlers
        self.name = handlers.name
        self.subscription = subscription
        self.errors: list[str] = []  # what the result will list: `Type: text` each
        self.decided = 0.0  # written by the training thread
        self.disabled = False
        # True once its task has ended. Written on the event loop, read by threads that wait for it
        self.has_ended = False
        self.run = run
        self._publish = publish
        self._fail = fail
        self._places = Places(lambda: False) if places is None else places
        self._worker = Worker(f"offloop-{self.name}")
        self._driver = Driver(self.name)
        self._generation = forked.generation
        self._events = self._failures = self._failures_in_row = 0
        self._wall = self._cpu = self._held = self._longest_hold = 0.0
        self._reported_at = self._warned_at = -WARNING_INTERVAL
        self._handling: Event | None = None

    @property
    def costs(self) -> CallbackCosts:
        """What the callback has cost so far. Any thread."""
        statistics = None if self.subscription is None else self.subscription.statistics
        return CallbackCosts(
            events=self._events,
            wall=self._wall,
            cpu=self._cpu,
            held=self._held,
            longest_hold=self._longest_hold,
            decided=self.decided,
            lag=0.0 if statistics is None else statistics.lag,
            dropped=0 if statistics is None else statistics.dropped,
            failures=self._failures,
        )

    async def serve(self) -> None:
        """Handle events until the subscription ends. Cancellation: what is left is not handled."""
        if self.subscription is None:
            return
        actor.set(self.name)
        note_cancellation(anyio.get_cancelled_exc_class())
        try:
            with self._places.task(anyio.get_current_task().id):
                await self._serve(self.subscription)
        except SubscriberTooSlowError as error:
            self.disabled = True
            self.failed("its events", error)

    async def _serve(self, subscription: Subscription[Event]) -> None:
        while events := await subscription.take_batch(EVENTS_AT_ONCE):
            started = time.perf_counter()
            for kind, group in itertools.groupby(events, self._where):
                if kind == "barrier":
                    for barrier in group:
                        await self._reach(barrier)
                elif kind == "loop":
                    await self._driver.drive(self._handle_on_loop(list(group)), self.account)
                elif kind == "thread":
                    await self._hand_to_thread(list(group), subscription)
            self._wall += time.perf_counter() - started
            if self.disabled and not self.handlers.deciders:  # deciders still need the barriers
                subscription.close()

    @property
    def keeps_records(self) -> bool:
        """True if announcements of checkpoints wait for this callback. Any thread."""
        has_own = type(self.handlers.callback).make_durable is not Callback.make_durable
        return has_own and self.subscription is not None

    async def make_durable(self, answer: "Future[None]") -> None:
        """Have the callback put what it has written on the disk, and complete `answer`."""
        make_durable = self.handlers.callback.make_durable
        try:
            if inspect.iscoroutinefunction(make_durable):
                await self._driver.drive(make_durable(), self.account)
            else:
                await self._worker.run(make_durable)
        except BaseException as error:
            if self._driver.is_ending(error):
                answer.cancel()
                raise
            self.failed("make_durable", error, is_off=False)
            answer.set_exception(as_failure(error))
        else:
            answer.set_result(None)

    async def _hand_to_thread(self, events: list[Event], subscription: Subscription[Event]) -> None:
        try:
            await self._worker.run(functools.partial(self._handle_in_thread, events, subscription))
        except BaseException as error:  # there is no thread: the handlers' own failures are reported there
            if self._driver.is_ending(error):
                raise
            self.failed(type(events[0]).__name__, error)

    async def close(self) -> None:
        """Call the callback's `close`, once, wherever it belongs; failures are reported."""
        close = self.handlers.callback.close
        self._driver = Driver(self.name)  # of the one before, a handler may have been left
        try:
            if inspect.iscoroutinefunction(close):
                with self._places.task(anyio.get_current_task().id):
                    await self._driver.drive(close(), self.account)
            elif type(self.handlers.callback).close is not Callback.close:
                worker = Worker(f"offloop-{self.name}") if self._worker.abandoned else self._worker
                try:
                    result = await worker.run(close, else_here=True)
                finally:
                    if worker is not self._worker:
                        worker.close()
                if inspect.isawaitable(result):
                    await self._driver.drive(_as_coroutine(result), self.account)
        except BaseException as error:
            if self._driver.is_ending(error):
                raise
            self.failed("close", error)
        finally:
            self._worker.close()

    def leaving(self) -> contextlib.AbstractContextManager[None]:
        """Return what stands around the task group in which `serve` or `close` runs."""
        return leaving(lambda: self._driver)

    def leave_after(self, seconds: float) -> None:
        """Leave a handler, or a `close`, that swallows its cancellation for so many seconds from now on."""
        self._driver.leave_after(seconds)

    def failed(self, what: str, error: BaseException, *, is_off: bool | None = None) -> None:
        """Take note of a failure: report it at most once a second, or end the run. Any thread.

        Args:
            what: Where it failed: a class of events, a point in a step.
            error: What was raised. What is no `Exception` always ends the run, unless it is a stray cancellation.
            is_off: None: count, and switch the observers off after too many in a row. Of a step hook, whose failures
                are counted where it runs, True if this was the last one; of a decider, which is asked again, False.
        """
        if self._generation != forked.generation:
            forked.end_process(error)
        error = as_failure(error)
        self._failures += 1
        described = describe(error)
        if len(self.errors) < 100:  # enough to see what is wrong; a handler may fail a million times
            self.errors.append(f"{what}: {described}")
        if self.handlers.callback.on_error == "raise" or not isinstance(error, Exception):
            self._fail(error)
            return
        if is_off is None:
            self._failures_in_row += 1
            is_off = self._failures_in_row >= MAX_FAILURES_IN_ROW and not self.disabled
            self.disabled = self.disabled or is_off
        if not is_off and time.perf_counter() - self._reported_at < FAILURE_INTERVAL:
            return
        off = f"; it failed {MAX_FAILURES_IN_ROW} times in a row and is off now" if is_off else ""
        self._reported_at = time.perf_counter()
        logger.error("callback %s failed in %s%s", self.name, what, off, exc_info=error)
        if what == CallbackFailed.__name__:
            return  # an event about it would make it fail again
        try:
            self._publish(
                CallbackFailed(
                    callback=self.name,
                    event=what,
                    error=described,
                    traceback=encodable("".join(traceback.format_exception(error))),
                    failures=self._failures,
                    disabled=self.disabled or is_off,
                )
            )
        except Exception:  # the bus has ended: the log and the result have it
            logger.debug("a failure of %s came too late for an event", self.name)

    def _where(self, event: Event | Barrier) -> str:
        if isinstance(event, Barrier):
            return "barrier"
        return "nowhere" if self.disabled else self.handlers.place_of(type(event))

    async def _reach(self, barrier: Any) -> None:
        result = barrier.on_reached()
        if inspect.isawaitable(result):
            await result

    async def _handle_on_loop(self, events: list[Event]) -> None:
        handler_for, run = self.handlers.handler_for, self.run
        event_class, handler = None, None
        turn = time.perf_counter()
        for event in events:
            if self.disabled:
                return
            if time.perf_counter() - turn > TURN:
                await anyio.lowlevel.checkpoint()
                turn = time.perf_counter()
            if type(event) is not event_class:
                event_class = type(event)
                handler = handler_for(event_class)
            self._handling = event
            self._events += 1
            try:
                await handler(event, run)  # type: ignore[misc]  # _where() chose events with a handler
            except BaseException as error:
                if self._driver.is_ending(error):
                    raise
                self.failed(event_class.__name__, error)
            else:
                self._failures_in_row = 0

    def _handle_in_thread(self, events: list[Event], subscription: Subscription[Event]) -> None:
        with self._places.worker(self.name, lambda: subscription.is_blocking):
            self._handle_all(events)

    def _handle_all(self, events: list[Event]) -> None:
        """Handle events in the worker thread."""
        actor.set(self.name)
        handler_for, run = self.handlers.handler_for, self.run
        cpu = time.thread_time()
        for event in events:
            if self.disabled:
                break
            self._events += 1
            try:
                result = handler_for(type(event))(event, run)  # type: ignore[misc]  # _where() chose it
                if result is not None and inspect.isawaitable(result):
                    if inspect.iscoroutine(result):
                        result.close()
                    raise TypeError(
                        f"{type(event).handler_name} is a plain def that returned an awaitable, which nobody "
                        "awaits in its thread: make it an async def"
                    )
            except BaseException as error:
                self.failed(type(event).__name__, error)
            else:
                if self._generation != forked.generation:
                    forked.end_process(None)
                self._failures_in_row = 0
        self._cpu += time.thread_time() - cpu

    def account(self, wall: float, cpu: float) -> None:
        """Take note of a stretch for which a coroutine of the callback held the event loop, in seconds."""
        self._cpu += cpu
        if wall > HOLD_WARNING and was_importing(time.perf_counter() - wall):
            wall = min(wall, cpu)  # an import of ours kept the interpreter from the handler: not its doing
        self._held += wall
        if wall > self._longest_hold:
            self._longest_hold = wall
        now = time.perf_counter()
        if wall > HOLD_WARNING and now - self._warned_at > WARNING_INTERVAL:
            self._warned_at = now
            what = type(self._handling).__name__ if self._handling is not None else "its work"
            logger.warning(
                "callback %s held the event loop for %.0f ms (%.0f ms of them computing) while handling %s: "
                "await something, or make the handler a plain def, which runs in a thread",
                self.name,
                wall * 1e3,
                cpu * 1e3,
                what,
            )


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable
