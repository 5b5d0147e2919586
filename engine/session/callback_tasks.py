"""Callback tasks: the tasks in which a run's callbacks handle events, and how they end.

    start       one task per callback, on the event loop of the run
    settle      before `TrainEnd`: the callbacks handle what was published so far, and what they publish meanwhile
    drain       after `TrainEnd`: they handle it; those that miss the deadline are cancelled and reported
    close       each callback's `close()`, always

A handler or a `close()` may hang, or swallow its cancellation. Every wait here has a deadline, which a second signal
shortens.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import anyio
import anyio.abc
import msgspec

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.subscription import BUFFER, Subscription
from offloop.engine.callback import Handlers
from offloop.engine.events import Event
from offloop.engine.observers.cost_watch import CostWatch
from offloop.engine.observers.observer import CallbackCosts, Observer
from offloop.engine.processes.encoded_events import EncodedEvents
from offloop.engine.processes.process_observer import ProcessObserver
from offloop.engine.session.lifetime import HASTY_CLOSE, HASTY_MOMENT, Lifetime

logger = logging.getLogger("offloop")

CLOSE_IN_HASTE: Final = HASTY_CLOSE - 2 * HASTY_MOMENT
"""Seconds after a second signal for the `close()` of all callbacks: what their last events leave of the time."""


class _Task(NamedTuple):
    """The task of one callback."""

    observer: Observer
    scope: anyio.CancelScope
    served: anyio.Event
    """Set when the task has ended."""


class CallbackTasks:
    """The callbacks of one run at work. Event loop, unless a method says otherwise."""

    def __init__(self, bus: Bus, mailbox: Mailbox, lifetime: Lifetime, *, drain_timeout: float) -> None:
        """Begin without callbacks; `add` brings them.

        Args:
            bus: The source of their events.
            mailbox: Poked when a callback's task ends; its `places` learn which tasks and threads run handlers.
            lifetime: The run's.
            drain_timeout: Seconds for `settle`, for `drain` and for each `close()`.
        """
        self.observers: list[Observer] = []
        # Events that handlers have published: only whether it grows matters, so threads need no lock to write it.
        self.reactions = 0
        self._bus = bus
        self._lifetime = lifetime
        self._mailbox = mailbox
        self._drain_timeout = drain_timeout
        self._tasks: list[_Task] = []
        # Shared by all child processes.
        self._encoded = EncodedEvents()
        # Set when the observer has handled everything before the barrier.
        self._barriers: dict[Observer, anyio.Event] = {}
        # Observers that `settle` gave up on.
        self._late: set[Observer] = set()
        # Called on the event loop when a callback handles nothing any more; set before the run starts.
        self.on_ended: Callable[[Observer], None] = lambda observer: None

    def add(self, handlers: Handlers, run: Any) -> Observer:
        """Bind a callback to the run, and return the observer that handles its events. Before the run starts."""
        callback = handlers.callback
        types = handlers.observed_types()
        needs_barriers = any(decider.is_async or handlers.observers for decider in handlers.deciders.values())
        subscription: Subscription[Event] | None = None
        if types or needs_barriers:
            buffer = callback.buffer or BUFFER
            subscription = self._bus.subscribe(
                types,
                name=handlers.name,
                buffer=buffer,
                on_full=callback.on_full,
                sample_interval=callback.sample_interval,
            )
        observer: Observer
        if callback.runs_in == "process":
            observer = ProcessObserver(
                handlers, subscription, run, run.publish, self._lifetime.fail, self._mailbox, self._encoded
            )
        else:
            observer = Observer(
                handlers,
                subscription,
                run,
                run.publish,
                self._lifetime.fail,
                self._mailbox.places,
                CostWatch(handlers, self._bus.step_times),
            )
        self.observers.append(observer)
        return observer

    def pack(self) -> None:
        """Pickle the callbacks that run in processes. After `reset`, in the thread that starts the run.

        Raises:
            ConfigError: One holds what cannot be sent to another process.
        """
        for each in self.observers:
            if isinstance(each, ProcessObserver):
                each.pack()

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start one task per callback."""
        for observer in self.observers:
            task = _Task(observer, anyio.CancelScope(), anyio.Event())
            self._tasks.append(task)
            tasks.start_soon(self._serve, *task)

    async def _serve(self, observer: Observer, scope: anyio.CancelScope, served: anyio.Event) -> None:
        # In a separate task: a handler may have to be abandoned
        async def serve() -> None:
            try:
                await observer.serve()
            except Exception as error:  # a defect of ours, which must not cancel the other callbacks
                self._lifetime.fail(error)

        try:
            with scope, observer.allowing_abandoned():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(serve)
        finally:
            served.set()
            observer.has_ended = True
            self.on_ended(observer)
            if observer in self._barriers:
                # It handles nothing any more, so it never reaches the barrier
                self._barriers[observer].set()
            # The training thread may be waiting for it
            self._mailbox.poke()

    async def settle(self) -> None:
        """Let the callbacks handle everything before `TrainEnd`, and what they publish meanwhile.

        `TrainEnd` is the last event and tells how the run ended, so it waits for what callbacks still have to
        publish and for failures of those with `on_error="raise"`, for `drain_timeout` seconds at most. It does not
        wait for events that come from elsewhere, such as a thread that publishes at a pace until the run ends.
        """
        started = time.perf_counter()
        is_first_round = True
        while not self._bus.has_ended:
            reactions = self.reactions
            behind = await self._reach_barriers(started)
            if is_first_round:
                self._late = behind
            elif behind:
                seconds = max(map(self._drain_timeout_of, behind))
                logger.warning("callbacks still published events %g s after training", seconds)
            if behind or self.reactions == reactions:
                break
            is_first_round = False
        self._barriers = {}

    def _drain_timeout_of(self, observer: Observer) -> float:
        own = observer.handlers.callback.drain_timeout
        return self._drain_timeout if own is None else own

    async def _reach_barriers(self, started: float) -> set[Observer]:
        """Put a barrier in each stream of events, and return the observers that do not reach it in time.

        Args:
            started: When the time of all began, on the clock of `time.perf_counter`.
        """
        self._barriers = {
            observer: anyio.Event()
            for observer in self.observers
            if observer.subscription is not None and not observer.has_ended
        }
        for observer, reached in self._barriers.items():
            assert observer.subscription is not None
            self._bus.put_barrier(observer.subscription, reached.set)
        behind: set[Observer] = set()
        for observer, reached in self._barriers.items():
            awaits_end = functools.partial(self._bus.is_awaited_by, observer.name)
            deadline = started + self._drain_timeout_of(observer)
            is_reached = await self._lifetime.wait_until(reached, deadline, unless=awaits_end)
            # A handler that waits for `TrainEnd` is not late
            if not is_reached and not awaits_end():
                behind.add(observer)
        return behind

    async def finish_one(self, observer: Observer, *, unless: Callable[[], bool]) -> None:
        """Let one callback handle everything published so far; end it if that takes longer than its time.

        Args:
            observer: The callback.
            unless: Ends the callback without a word when it returns True.
        """
        task = next((each for each in self._tasks if each.observer is observer), None)
        if task is None or observer.subscription is None or observer.has_ended:
            return
        seconds = self._drain_timeout_of(observer)
        reached = anyio.Event()
        self._barriers = {observer: reached}
        self._bus.put_barrier(observer.subscription, reached.set)
        if not await self._lifetime.wait_until(reached, time.perf_counter() + seconds, unless=unless):
            self._cancel(observer, task.scope)
            if not unless():
                observer.failed("drain", TimeoutError(f"still busy {seconds:g} s after training: cancelled"))
        self._barriers = {}

    async def drain(self) -> None:
        """Let the callbacks handle `TrainEnd`; cancel and report those that miss the deadline or were late before."""
        now = time.perf_counter()
        moment = now + HASTY_MOMENT
        for observer, scope, served in self._tasks:
            seconds = self._drain_timeout_of(observer)
            deadline = moment if observer in self._late else now + seconds
            if not await self._lifetime.wait_until(served, deadline, at_least=moment):
                self._cancel(observer, scope)
                error = TimeoutError(f"still busy {seconds:g} s after the end: cancelled")
                observer.failed("drain", error)

    def cancel(self) -> None:
        """Cancel all handlers; one that swallows its cancellation is abandoned."""
        for observer, scope, _ in self._tasks:
            self._cancel(observer, scope)

    def _cancel(self, observer: Observer, scope: anyio.CancelScope) -> None:
        observer.abandon_after(self._lifetime.swallowing)
        scope.cancel()

    async def close(self) -> None:
        """Call `close()` of each callback, always; one that hangs is given up and reported. On any event loop."""
        for observer in self.observers:
            try:
                await self._close_one(observer)
            except anyio.get_cancelled_exc_class():
                # The final sweep of `asyncio.run` cancels this task: the next callback is closed all the same
                continue

    async def _close_one(self, observer: Observer) -> None:
        closed = anyio.Event()

        # In a separate task: it may have to be abandoned
        async def close() -> None:
            try:
                await observer.close()
            except (
                Exception
            ) as error:  # a defect of ours, which must not keep the other callbacks from being closed
                self._lifetime.fail(error)
            finally:
                closed.set()

        started = time.perf_counter()
        with observer.allowing_abandoned():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(close)
                # In haste all callbacks share the time that is left, but each is called and has a moment.
                is_closed = await self._lifetime.wait_until(
                    closed,
                    started + self._drain_timeout_of(observer),
                    haste=CLOSE_IN_HASTE,
                    at_least=started + HASTY_MOMENT,
                )
                if not is_closed:
                    taken = time.perf_counter() - started
                    self._cancel(observer, tasks.cancel_scope)
                    observer.failed(
                        "close", TimeoutError(f"close() took longer than {taken:.1f} s: given up")
                    )

    def costs(self, in_step: dict[str, float]) -> dict[str, CallbackCosts]:
        """Return what each callback has cost so far, by name. Any thread.

        Args:
            in_step: Seconds in step hooks, by the name of the callback.
        """
        return {
            each.name: msgspec.structs.replace(each.costs, in_step=in_step.get(each.name, 0.0))
            for each in self.observers
        }

    def errors(self) -> dict[str, tuple[str, ...]]:
        """Return what each callback raised, by name; only those that raised something."""
        return {each.name: tuple(each.errors) for each in self.observers if each.errors}

    def clear(self) -> None:
        """Forget the callbacks, when the run is over."""
        # Replaced, not emptied: a supervisor that has abandoned the training thread may still go through them
        self.observers, self._tasks, self._late = [], [], set()
