"""Observers: each callback has a task that takes its events and runs its handlers, in order.

    async def handlers    awaited in that task; the time for which each holds the event loop is measured
    plain def handlers    run in the callback's worker thread, which gets the events in batches
    async deciders        a barrier in the stream runs them in that task, after the handlers of earlier events

Failures are isolated, reported and counted here: what a handler raises never reaches another callback.
An exception that is no `Exception`, such as `SystemExit`, ends the run and reaches its caller.
"""

import contextlib
import functools
import inspect
import itertools
import logging
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import anyio
import anyio.lowlevel
import msgspec

from offloop.engine.bus import forked
from offloop.engine.bus.command_mailbox import actor
from offloop.engine.bus.deadlock import Places
from offloop.engine.bus.subscription import Barrier, Subscription
from offloop.engine.callback import MAX_FAILURES_IN_ROW, Callback, Handlers
from offloop.engine.errors import SubscriberTooSlowError, as_failure, describe, encodable, note_cancellation
from offloop.engine.events import CallbackFailed, Event
from offloop.engine.observers.cost_watch import HOLD_WARNING, CostWatch, Meter, Stretch
from offloop.engine.observers.driver import Driver, allowing_abandoned
from offloop.engine.observers.worker import Worker

logger = logging.getLogger("offloop")

EVENTS_AT_ONCE: Final = 1024
"""Events taken from the buffer in one go; the rest stays in the buffer, where newer samples can replace it."""
TURN: Final = 0.01
"""Seconds after which other tasks get a turn between two events, although no handler has really awaited."""
FAILURE_INTERVAL: Final = 1.0
"""Seconds between two reports of failures of one callback, at least."""


class CallbackCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What one callback cost and missed. Times are in seconds."""

    events: int = 0
    """Events handled."""
    wall: float = 0.0
    """Time in its handlers, awaiting included."""
    cpu: float = 0.0
    """CPU time of its handlers, on the event loop or in its worker thread."""
    held: float = 0.0
    """Time during which its handlers held the event loop; waiting for the interpreter is not counted."""
    longest_hold: float = 0.0
    """The longest of those times without an await."""
    decided: float = 0.0
    """Time for which the training thread ran its deciders, or waited for them."""
    in_step: float = 0.0
    """Time for which the training thread ran its step hooks."""
    lag: float = 0.0
    """The longest time that an event had waited when its batch was taken."""
    dropped: int = 0
    """Samples that it missed."""
    failures: int = 0
    """Exceptions that its methods raised."""
    warning: str = ""
    """How the log named it as a callback that computes beside training, with what that cost; empty if it did not."""
    slowdown: float | None = None
    """How many times as long steps took while it computed, measured when it was named; None if that is unknown."""


class Observer:
    """One callback at work: handles its events, measures its costs, isolates its failures.

    All methods belong to the event loop unless they say otherwise.
    """

    def __init__(
        self,
        handlers: Handlers,
        subscription: Subscription[Event] | None,
        run: Any,
        publish: Callable[[Event], None],
        fail: Callable[[BaseException], None],
        places: Places | None = None,
        watch: CostWatch | None = None,
    ) -> None:
        """Bind a callback to a run.

        Args:
            handlers: The callback's methods.
            subscription: Its events; None for a callback that neither observes nor decides asynchronously.
            run: Passed to the handlers.
            publish: Publishes `CallbackFailed`.
            fail: Ends the run as failed; for `on_error="raise"`, and for what is no `Exception`.
            places: The run's; the places where the handlers run are added to it.
            watch: Names the callback if it computes beside training or blocks the event loop; None where that
                disturbs nothing.
        """
        self.handlers = handlers
        self.name = handlers.name
        self.subscription = subscription
        self.run = run
        # True once its task has ended. Written on the event loop, read by threads that wait for it.
        self.has_ended = False
        # Seconds. Written by the training thread after a decider; read by any thread.
        self.decided = 0.0
        # Written by the thread in which the callback fails: event loop, worker or, for deciders and step hooks, the
        # training thread. Read by any thread. Without a lock, two failures at one moment may be counted as one.
        # The result lists these, each with its type and text.
        self.errors: list[str] = []
        self.disabled = False
        self._failures = self._failures_in_row = 0
        self._reported_at = -math.inf
        # Written by the event loop and, during a handler in a thread, by the worker: never by both at a time.
        self._events = 0
        self._cpu = 0.0
        # The rest belongs to the event loop; `costs` reads numbers from any thread.
        self._wall = self._held = self._longest_hold = 0.0
        self._watch = watch
        # What the handlers on the event loop work at.
        self._handling = "its work"
        self._publish = publish
        self._fail = fail
        self._places = Places(lambda: False) if places is None else places
        self._worker = Worker(f"offloop-{self.name}")
        self._driver = Driver(self.name)
        self._generation = forked.generation

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
            warning="" if self._watch is None else self._watch.warning,
            slowdown=None if self._watch is None else self._watch.slowdown,
        )

    async def serve(self) -> None:
        """Handle events until the subscription ends. Cancellation: the events that are left are not handled."""
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
            for place, group in self._by_place(events):
                if place == "barrier":
                    for barrier in group:
                        await self._reach(barrier)
                elif place == "loop":
                    await self._driver.drive(self._handle_on_loop(group), self.account)
                elif place == "thread":
                    await self._hand_to_thread(group, subscription)
            self._wall += time.perf_counter() - started
            # Deciders still need the barriers.
            if self.disabled and not self.handlers.deciders:
                subscription.close()

    @property
    def keeps_log(self) -> bool:
        """True if a checkpoint is announced only once this callback's log is durable. Any thread."""
        is_overridden = type(self.handlers.callback).make_durable is not Callback.make_durable
        return is_overridden and self.subscription is not None

    async def make_durable(self, answer: "Future[None]") -> None:
        """Call the callback's `make_durable`, and complete `answer` when what it has written is on disk."""
        make_durable = self.handlers.callback.make_durable
        try:
            if inspect.iscoroutinefunction(make_durable):
                await self._driver.drive(make_durable(), self.account)
            else:
                await self._run_in_thread(make_durable, "make_durable")
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
            handle = functools.partial(self._handle_in_thread, events, subscription)
            await self._run_in_thread(handle, type(events[-1]).__name__)
        except BaseException as error:
            # There is no thread: failures of the handlers are reported in it.
            if self._driver.is_ending(error):
                raise
            self.failed(type(events[0]).__name__, error)

    async def _run_in_thread(self, function: Callable[[], object], what: str) -> None:
        """Run a function in the worker thread, and account for what it took."""
        stretches: list[Stretch] = []

        def measured() -> None:
            meter = Meter()
            try:
                function()
            finally:
                stretch = meter.read()
                self._cpu += stretch.cpu
                stretches.append(stretch)

        try:
            await self._worker.run(measured)
        finally:
            if self._watch is not None and stretches:
                self._watch.add(stretches[0], what, on_loop=False)

    async def close(self) -> None:
        """Call the callback's `close`, once, in its worker thread or here; failures are reported."""
        close = self.handlers.callback.close
        # A new one: the driver before may have abandoned a handler.
        self._driver = Driver(self.name)
        try:
            if inspect.iscoroutinefunction(close):
                with self._places.task(anyio.get_current_task().id):
                    await self._driver.drive(close(), self.account)
            elif type(self.handlers.callback).close is not Callback.close:
                worker = Worker(f"offloop-{self.name}") if self._worker.is_abandoned else self._worker
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

    def allowing_abandoned(self) -> contextlib.AbstractContextManager[None]:
        """Return the context to enter around the task group in which `serve` or `close` runs."""
        return allowing_abandoned(lambda: self._driver)

    def abandon_after(self, seconds: float) -> None:
        """Abandon a handler, or a `close`, that still swallows its cancellation in so many seconds."""
        self._driver.abandon_after(seconds)

    def failed(self, what: str, error: BaseException, *, is_off: bool | None = None) -> None:
        """Count a failure, and report it at most once a second or end the run. Any thread.

        Args:
            what: Where it failed: a class of events, a point in a step.
            error: What was raised. Unless it is an `Exception` or a stray cancellation, it ends the run.
            is_off: None: switch the handlers off after too many failures in a row. True or False for a step hook,
                whose failures in a row are counted elsewhere: whether it is off now. False for a decider, which is
                asked again.
        """
        if self._generation != forked.generation:
            forked.end_process(error)
        error = as_failure(error)
        self._failures += 1
        described = describe(error)
        # Enough to see what is wrong: a handler may fail a million times.
        if len(self.errors) < 100:
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
            # An event about it would make it fail again.
            return
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
        except Exception:
            # The bus has ended: the failure is in the log and in the result.
            logger.debug("a failure of %s came too late for an event", self.name)

    def _by_place(self, events: list[Event]) -> Iterator[tuple[str, list[Event]]]:
        """Yield runs of events that are handled in the same place, in order, each with its place."""
        classes = set(map(type, events))
        # Nearly always all go to one place: that is not asked for each event.
        if len(classes) == 1 or len({self._place_of(each) for each in classes}) == 1:
            yield self._place_of(type(events[0])), events
        else:
            for place, group in itertools.groupby(events, lambda event: self._place_of(type(event))):
                yield place, list(group)

    def _place_of(self, event_class: type) -> str:
        if event_class is Barrier:
            return "barrier"
        return "nowhere" if self.disabled else self.handlers.place_of(event_class)

    async def _reach(self, barrier: Any) -> None:
        result = barrier.on_reached()
        if inspect.isawaitable(result):
            await result

    async def _handle_on_loop(self, events: list[Event]) -> None:
        handler_for, run, clock = self.handlers.handler_for, self.run, time.perf_counter
        event_class, handler = None, None
        turn = clock() + TURN
        # What is done here for each event adds to every handler.
        for event in events:
            if event.__class__ is not event_class:
                event_class = event.__class__
                handler = handler_for(event_class)
                self._handling = event_class.__name__
            if clock() > turn:
                await anyio.lowlevel.checkpoint()
                turn = clock() + TURN
            self._events += 1
            try:
                await handler(event, run)  # type: ignore[misc]  # _place_of() chose events with a handler
            except BaseException as error:
                if self._driver.is_ending(error):
                    raise
                self.failed(event_class.__name__, error)
                if self.disabled:
                    return
            else:
                if self._failures_in_row:
                    self._failures_in_row = 0

    def _handle_in_thread(self, events: list[Event], subscription: Subscription[Event]) -> None:
        with self._places.worker(self.name, lambda: subscription.is_blocking):
            self._handle_all(events)

    def _handle_all(self, events: list[Event]) -> None:
        """Handle events in the worker thread."""
        actor.set(self.name)
        handler_for, run = self.handlers.handler_for, self.run
        event_class, handler = None, None
        for event in events:
            if event.__class__ is not event_class:
                event_class = event.__class__
                handler = handler_for(event_class)
            self._events += 1
            try:
                result = handler(event, run)  # type: ignore[misc]  # _place_of() chose it
                if result is not None and inspect.isawaitable(result):
                    if inspect.iscoroutine(result):
                        result.close()
                    raise TypeError(
                        f"{type(event).handler_name} is a plain def that returned an awaitable, which "
                        "is never awaited in its thread: make it an async def"
                    )
            except BaseException as error:
                self.failed(type(event).__name__, error)
                if self.disabled:
                    break
            else:
                if self._generation != forked.generation:
                    forked.end_process(None)
                if self._failures_in_row:
                    self._failures_in_row = 0
        try:
            self.handlers.callback.events_handled()
        except BaseException as error:
            self.failed(type(events[-1]).__name__, error)

    def account(self, stretch: Stretch) -> None:
        """Add a stretch for which a coroutine of the callback ran on the event loop without an await."""
        # Short ones need no closer look, and there are many.
        held = stretch.wall if stretch.wall <= HOLD_WARNING else stretch.held
        self._cpu += stretch.cpu
        self._held += held
        if held > self._longest_hold:
            self._longest_hold = held
        if self._watch is not None:
            self._watch.add(stretch, self._handling, on_loop=True)


async def _as_coroutine(awaitable: Awaitable[object]) -> object:
    return await awaitable
