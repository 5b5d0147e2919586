"""One attempt of a recorded run, fed to callbacks.

    replay's thread                                event loop                      worker threads
    ───────────────                                ──────────                      ──────────────
    run() ── an event, or the samples that are due
          ── publish ──────bus──────────────────> async def observers ──────────> def observers
          ── deciders: def here, async def ─────> in the task of their callback
          ── waits until all have handled it <─── barrier in each stream
          ── the same for what they have published meanwhile

The thread plays the part of the training thread: the bus, the observers and the deciders are those of a run. What comes
next waits until every callback has handled what came before, so results do not depend on scheduling, and no sample is
dropped. A handler that waits for events of its own (`run.events()`) holds up nothing.
"""

import contextlib
import copy
import functools
import inspect
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final

import anyio

from offloop.engine.bus.command_mailbox import Mailbox, deciding
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.step_times import StepTimes
from offloop.engine.bus.subscribers import Subscribers
from offloop.engine.bus.subscription import Barrier, OnFull, Subscription
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker, result_of
from offloop.engine.callback import BOUNDARY_EVENTS, Handlers
from offloop.engine.errors import note_cancellation
from offloop.engine.events import CallbackFailed, Event, Sample, TrainEnd, UnknownEvent
from offloop.engine.observers.observer import Observer
from offloop.engine.replays.pace import Pace
from offloop.engine.replays.replayed_run import Facts, NotedCommand, ReplayedRun, Services
from offloop.engine.session.callback_tasks import CallbackTasks
from offloop.engine.session.deciders import Deciders
from offloop.engine.session.lifetime import Lifetime

logger = logging.getLogger("offloop")

SAMPLES_AT_ONCE: Final = 1024
"""Samples that are handed over together, at most."""
MOST_ROUNDS: Final = 100
"""Times that callbacks may react to each other's events before `TrainEnd`."""
READING: Final = 1.0
"""Seconds in which a reader of `run.events()` must read something, or the replay no longer waits for it."""

_NO_EVENTS: Final[tuple[type[Event], ...]] = ()


class _RecordedBus(Bus):
    """A bus whose events have their number, time and position already."""

    def _stamp(self, batch: list[Event], barriers: list[tuple[int, Barrier]]) -> list[Event]:
        milestones: list[Event] = []
        for place, event in enumerate(batch):
            if isinstance(event, Barrier):
                barriers.append((place, event))
            elif not isinstance(event, Sample):
                milestones.append(event)
        return milestones

    def _report_drops(self, now: float, *, at_end: bool = False) -> None:
        # A report would be an event that the run did not have
        pass

    def follow(self, **options: Any) -> "_Following":
        """Subscribe a reader of `run.events()`, with the milestones so far."""
        following = _Following(self._subscribers, **options)
        self._subscribers.add(following, replay=True)
        return following


class _NoStepTimes(StepTimes):
    """Recorded steps are not slowed down by what callbacks compute now."""

    def take(self, events: list[Event], *, has_milestones: bool) -> None:
        """Take nothing."""


class _Following(Subscription[Event]):
    """A subscription whose reader is known to wait, and to have read."""

    def __init__(
        self,
        source: Subscribers,
        types: tuple[type[Event], ...],
        *,
        told: Callable[[bool], None],
        name: str,
        buffer: int,
        on_full: OnFull,
        owner: str,
    ) -> None:
        super().__init__(source, types, name=name, buffer=buffer, on_full=on_full, owner=owner)
        self.has_read = threading.Event()
        # True once its reader has read nothing for too long; until it reads again. Replay's thread, but for `take`.
        self.is_idle = False
        self._told = told

    def take(self, limit: int | None = None) -> list[Event]:
        self.is_idle = False
        self.has_read.set()
        return super().take(limit)

    async def wait(self, *, samples: bool = True) -> bool:
        if not self._has_arrived():
            self._told(True)
        try:
            return await super().wait(samples=samples)
        finally:
            self._told(False)

    @property
    def is_behind(self) -> bool:
        """True while more than half of its buffer waits for the reader."""
        statistics = self.statistics
        return not statistics.closed and statistics.waiting > statistics.buffer // 2


class Attempt:
    """The replay of one attempt. Used once."""

    def __init__(
        self,
        handlers: list[Handlers],
        facts: Facts,
        pace: Pace,
        make_services: Callable[..., Services],
        *,
        delivered: Callable[[Event], None],
        is_continued: Callable[[], bool],
        drain_timeout: float,
    ) -> None:
        """Bind callbacks to an attempt; nothing runs before `run`.

        Args:
            handlers: The callbacks, just looked up.
            facts: What the run is like.
            pace: When events are due.
            make_services: Makes `Services` of places and subscribe.
            delivered: Called in the replay's thread after each recorded event.
            is_continued: True at the end if an attempt follows that continues this one.
            drain_timeout: Seconds for `close()`, and for handlers that are busy at the end.
        """
        self.facts = facts
        self.published: list[Event] = []
        """What the callbacks have published, without reports of failures."""
        self.noted: list[NotedCommand] = []
        """The commands that they gave."""
        self.states: list[Mapping[str, Any] | None] = [None] * len(handlers)
        """The state of each callback at the end, if the attempt is continued and the callback has one."""
        self._pace = pace
        self._delivered = delivered
        self._is_continued = is_continued
        self._mailbox = Mailbox()
        self._bus = _RecordedBus(run_id=facts.run_id, attention=self._mailbox.poke)
        self._bus.step_times = _NoStepTimes(self._bus.clock.offset)
        self._lifetime = Lifetime(self._mailbox, self._bus)
        self._callbacks = CallbackTasks(self._bus, self._mailbox, self._lifetime, drain_timeout=drain_timeout)
        self._deciders = Deciders(self._bus, self._mailbox, self._lifetime)
        self._services = make_services(places=self._mailbox.places, subscribe=self._subscribe)
        self._services.is_deciding = lambda: deciding.get() is self._mailbox
        self._services.subscriptions = lambda: self._bus.subscriptions
        self._services.costs = lambda: self.costs
        self._services.stack = self._stack
        self._followers: list[_Following] = []  # appended by the threads that subscribe
        self._events: Iterable[Event] = ()
        self._thread = Thread(self._feed, name=f"offloop-replay-{facts.run_id}", daemon=False)
        self._has_ended = Waker()
        self._finished: Future[None] = Future()
        self._runs: list[ReplayedRun] = []
        # Observers that have not reached their last barrier, and `_marks` while the bus has not handed all over. The
        # replay's thread adds, the event loop removes.
        self._behind: set[object] = set()
        # Gets barriers alone: they tell how far the bus is.
        self._marks = self._bus.subscribe(_NO_EVENTS, name="replay")
        limits = [SAMPLES_AT_ONCE]
        for each in handlers:
            run = ReplayedRun(each.name, facts, self._services)
            _tell_events(each, run)
            observer = self._callbacks.add(each, run)
            self._deciders.add(observer)
            self._runs.append(run)
            if observer.subscription is not None and observer.subscription.takes_samples:
                limits.append(observer.subscription.buffer)
        self._limit = min(limits)

    # Any thread

    @property
    def costs(self) -> dict[str, Any]:
        """What the callbacks have cost so far, by name."""
        return self._callbacks.costs({})

    @property
    def errors(self) -> dict[str, tuple[str, ...]]:
        """What each callback raised, by name; only those that raised something."""
        return self._callbacks.errors()

    def cancel(self, reason: str) -> None:
        """End at once, out of any wait."""
        self._lifetime.cancel(reason)
        self._pace.stop()

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def _subscribe(
        self, types: tuple[type[Event], ...], *, name: str, buffer: int, on_full: OnFull, run: ReplayedRun
    ) -> Subscription[Event]:
        def told(is_waiting: bool) -> None:
            run.is_following = is_waiting
            if is_waiting:
                self._mailbox.poke()

        owner = run._name
        follower = self._bus.follow(
            types=types, told=told, name=name, buffer=buffer, on_full=on_full, owner=owner
        )
        self._followers.append(follower)
        return follower

    # The event loop

    async def run(self, events: Iterable[Event]) -> None:
        """Feed events to the callbacks, and close them. Cancellation: they are closed, then it is re-raised.

        Raises:
            BaseException: What a callback with `on_error="raise"`, or a decider, has raised.
        """
        self._events = events
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._supervise)
            try:
                await result_of(self._finished)
            except BaseException:
                self.cancel("the task that awaited the replay was cancelled")
                raise
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what a callback has raised, once, with a note on where the replay was."""
        failure = self._lifetime.take_failure()
        if failure is None:
            return
        event = self._runs[0].event if self._runs else Event()
        failure.add_note(
            f"offloop: replay of run {self.facts.run_id}, {type(event).__name__} of step {event.step}"
        )
        try:
            raise failure
        finally:
            # Or this frame, which the exception holds, would hold the exception
            del failure

    async def _supervise(self) -> None:
        """Host the attempt, from the thread's start to the last `close()`. Shielded; never raises."""
        with anyio.CancelScope(shield=True):
            note_cancellation(anyio.get_cancelled_exc_class())
            self._lifetime.begin_on_event_loop()
            self._mailbox.places.event_loop_thread = threading.get_ident()
            try:
                self._callbacks.pack()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._bus.drain)
                    tasks.start_soon(self._reach_marks)
                    self._callbacks.start(tasks)
                    self._thread.start()
                    swept = await self._wait_for_thread()
                    self._bus.close()
                    if not swept:
                        await self._callbacks.drain()
                    self._callbacks.cancel()
            except GeneratorExit:
                raise
            except BaseException as error:
                # The final sweep of `asyncio.run`; or a callback that cannot be sent to its process
                if not isinstance(error, anyio.get_cancelled_exc_class()):
                    self._lifetime.fail(error)
            finally:
                if self._is_going():
                    self.cancel("the event loop is gone")
            await self._wait_for_thread()
            self._mailbox.end()
            await self._callbacks.close()
            self._take_noted()
            self.facts.is_over = True
            self._finished.set_result(None)

    async def _reach_marks(self) -> None:
        while await self._marks.take_batch():
            self._reached(self._marks)

    def _is_going(self) -> bool:
        return self._thread.ident is not None and not self._thread.is_over

    async def _wait_for_thread(self) -> bool:
        """Wait for the end of the replay's thread through all cancellations; return whether there was one."""
        cancelled = False
        while self._is_going():
            try:
                await self._has_ended.wait()
                # Returns immediately: the thread is already exiting
                self._thread.join()
            except anyio.get_cancelled_exc_class():
                cancelled = True
                self.cancel("the event loop is ending")
        return cancelled

    # The replay's thread

    def _feed(self) -> None:
        """Body of the replay's thread."""
        self._mailbox.places.training_thread = threading.get_ident()
        try:
            with self._mailbox.on_cancel(self._pace.stop), contextlib.closing(self._chunks()) as chunks:
                for chunk in chunks:
                    self._hand_over(chunk)
                    if self._mailbox.cancelled:
                        return
                    for event in chunk:
                        self._delivered(event)
                    self._pace.delivered(chunk[-1])
                self._finish_rounds()
                if self._is_continued():
                    self._keep_states()
        except BaseException as error:
            self._lifetime.fail(error)
        finally:
            self._mailbox.places.training_thread = None
            self._has_ended.wake()

    def _chunks(self) -> Generator[list[Event], None, None]:
        """Yield the events that are handed over together: a milestone, or samples that are due; at their pace."""
        chunk: list[Event] = []
        is_first = True
        for event in self._events:
            if is_first:
                self._pace.begin(event)
                is_first = False
            is_many = isinstance(event, Sample | UnknownEvent)
            if chunk and not (is_many and len(chunk) < self._most_at_once() and self._pace.is_due(event)):
                yield chunk
                chunk = []
            if not chunk and not self._pace.wait_until_due(event):
                return
            chunk.append(event)
            if not is_many:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _most_at_once(self) -> int:
        """Return how many samples have room wherever they go."""
        rooms = [each.buffer // 2 for each in self._followers if not each.is_idle]
        return max(1, min([self._limit, *rooms]))

    def _hand_over(self, chunk: list[Event]) -> None:
        """Hand recorded events over, ask the deciders, and wait until all is handled."""
        event = chunk[0]
        if isinstance(event, TrainEnd):
            self._finish_rounds()
        self.facts.take(event)
        self.facts.samples.take_over(event)
        if len(chunk) == 1:
            self._go_on_to(event)
        self._emit(chunk)
        if isinstance(event, BOUNDARY_EVENTS):
            self._deciders.decide(event)
        self._wait_until_handled()
        self._go_on_to(chunk[-1])
        self._hand_over_published()
        self._take_noted()

    def _keep_states(self) -> None:
        """Keep what a checkpoint would have kept of the callbacks: the next attempt continues with it."""
        for place, observer in enumerate(self._callbacks.observers):
            if observer.handlers.has_state:
                self.states[place] = copy.deepcopy(observer.handlers.callback.state_dict())

    def _go_on_to(self, event: Event) -> None:
        for run in self._runs:
            run.event = event

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            self._bus.emit(event)

    def _finish_rounds(self) -> None:
        """Hand over what callbacks publish in reaction to each other, before the end."""
        for _ in range(MOST_ROUNDS):
            if self._mailbox.cancelled or not self._hand_over_published():
                return
        logger.warning("callbacks still publish events after %d rounds at the end of a replay", MOST_ROUNDS)

    def _hand_over_published(self) -> bool:
        """Hand over what the callbacks have published, in an order that does not depend on scheduling."""
        taken = [
            (seq, place, number, event)
            for place, run in enumerate(self._runs)
            for seq, number, event in run._take_published()
        ]
        if not taken or self._mailbox.cancelled:
            return False
        published = [event for *_, event in sorted(taken, key=lambda each: each[:3])]
        self.published += [event for event in published if not isinstance(event, CallbackFailed)]
        for begin in range(0, len(published), self._limit):
            self._emit(published[begin : begin + self._limit])
            self._wait_until_handled()
        return True

    def _take_noted(self) -> None:
        taken = [
            (seq, place, number, command)
            for place, run in enumerate(self._runs)
            for seq, number, command in run._take_noted()
        ]
        self.noted += [command for *_, command in sorted(taken, key=lambda each: each[:3])]

    def _wait_until_handled(self) -> None:
        """Wait until each callback has handled what was handed over, unless a handler waits for events itself."""
        awaited: list[tuple[Observer, ReplayedRun]] = []
        self._behind.add(self._marks)
        self._bus.put_barrier(self._marks, _nothing)
        for observer, run in zip(self._callbacks.observers, self._runs, strict=True):
            if observer.subscription is None or observer.has_ended:
                continue
            awaited.append((observer, run))
            if observer not in self._behind:
                self._behind.add(observer)
                self._bus.put_barrier(observer.subscription, functools.partial(self._reached, observer))

        def is_handled() -> bool:
            if self._mailbox.cancelled or self._bus.has_ended:
                return True
            return self._marks not in self._behind and all(
                observer not in self._behind or observer.has_ended or run.is_following
                for observer, run in awaited
            )

        if not is_handled():
            names = ", ".join(observer.name for observer, _ in awaited)
            self._mailbox.stand(is_handled, f"the handlers of {names}")
        for follower in list(self._followers):
            self._wait_for_reader(follower)
        if self._bus.is_blocked:
            self._mailbox.stand(
                lambda: self._mailbox.cancelled or not self._bus.is_blocked,
                "a subscriber with on_full='block'",
            )
        self._lifetime.cancel_if_event_loop_is_gone()

    def _reached(self, observer: object) -> None:
        """Note that an observer has handled what came before its barrier. Event loop."""
        self._behind.discard(observer)
        self._mailbox.poke()

    def _wait_for_reader(self, follower: _Following) -> None:
        """Wait until a reader of `run.events()` has read enough for samples to have room, if it reads at all."""
        while follower.is_behind and not follower.is_idle and not self._mailbox.cancelled:
            follower.has_read.clear()
            if follower.is_behind and not follower.has_read.wait(READING):
                follower.is_idle = True


def _nothing() -> None:
    """What a barrier of `_marks` does: that it came is enough."""


def _tell_events(handlers: Handlers, run: ReplayedRun) -> None:
    """Have each observer of a callback tell its run which event it handles."""
    for name, handler in handlers.observers.items():
        handlers.observers[name] = _telling(handler, run)


def _telling(handler: Callable[..., Any], run: ReplayedRun) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(handler):

        async def handle(event: Event, handle: ReplayedRun) -> Any:
            run.event = event
            return await handler(event, handle)

        return handle

    def handle_in_thread(event: Event, handle: ReplayedRun) -> Any:
        run.event = event
        return handler(event, handle)

    return handle_in_thread
