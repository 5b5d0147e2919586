"""The bus: the only code by which events cross threads.

    training thread, writers, callbacks              event loop                       anywhere
    ───────────────────────────────────              ──────────                       ────────
    publish(event) ──append──> queue ──────> drainer, every 50 ms ──> buffer of A ──> async for ...
        never waits              │           gives seq, dispatches ─> buffer of B ──> take()
                                 │
             one byte wakes the drainer: first event after idle, milestones (20 a second at most)

Nobody who publishes waits for anybody: publishing is an append to a deque, which is atomic in CPython.
The drainer is the one that takes events out, so the order of the queue is the order of the run and
`seq` has no gaps. It hands over everything that has gathered and then sleeps `flush_interval`, because
waking an event loop once for each event of a fast training loop costs 15-30 % of the loop's speed, and
waking it twenty times a second next to nothing.

Each subscription has a bounded buffer of its own. Samples beyond the bound are dropped, oldest first,
and counted; a subscription made with `on_full="block"` is instead shown to the publisher's side
(`Bus.blocked`), which may wait before it makes more. Milestones are never dropped.
"""

import logging
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypeVar, overload

import anyio
import anyio.lowlevel
import msgspec

from offloop.engine.bus.waker import Waker
from offloop.engine.errors import (
    BusClosedError,
    EventError,
    EventLoopStalledError,
    SubscriberTooSlowError,
)
from offloop.engine.events import Event, EventsDropped, Sample, check

logger = logging.getLogger("offloop")

FLUSH_INTERVAL: Final = 0.05
"""Seconds between hand-overs. An idle tick of 20 ms costs 1.3-1.9 % of a core; 50 ms is still "now" to people."""
BUFFER: Final = 10_000
"""Samples that a subscription holds by default: five seconds of a loop that does 2,000 steps a second."""
WAKES_PER_SECOND: Final = 20
"""Milestones that wake the event loop at once, before they ride the pace; a wake costs the publisher 0.1 ms."""
MAX_WAITING_SAMPLES: Final = 100_000
"""Events in the queue above which new samples are dropped: the event loop has stalled for a long time."""
MAX_WAITING: Final = 1_000_000
"""Events in the queue at which publishing fails; about 0.5 GB."""
MAX_MILESTONES_BEHIND: Final = 100_000
"""Milestones that may wait for one subscriber, and that are kept for replay."""
STALL_WARNING: Final = 5.0
"""Seconds without a hand-over after which the event loop's stack is logged."""
HAND_OVER_AT_ONCE: Final = 10_000
"""Events taken out in one go, so that a backlog does not hold the event loop for long (about 5 ms)."""
REPORT_INTERVAL: Final = 1.0
"""Seconds between two `EventsDropped` of one subscriber."""

E = TypeVar("E", bound=Event)
OnFull = Literal["drop_oldest", "block"]
_set = msgspec.structs.force_setattr


class SubscriptionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one subscriber got and missed, as of now."""

    name: str
    """Who subscribed."""
    received: int
    """Events put into its buffer."""
    waiting: int
    """Events in its buffer now."""
    dropped: int
    """Samples that it missed."""
    buffer: int
    """Samples that its buffer holds."""
    on_full: OnFull
    """What happens when they are exceeded."""
    lag: float
    """Longest time in seconds that the oldest event of a batch had waited when it was taken."""
    closed: bool
    """True after the end."""


class Barrier:
    """A point in the stream of one subscriber; its consumer calls `on_reached` once all before it is handled.

    It passes through the queue like an event, but has no `seq` and only its subscription receives it.
    """

    __slots__ = ("on_reached", "subscription")
    step = -1  # sends the drainer down the path of foreign events, where barriers are recognised

    def __init__(self, subscription: "Subscription[Event]", on_reached: Callable[[], object]) -> None:
        self.subscription = subscription
        self.on_reached = on_reached


class Subscription(Generic[E]):
    """The events of one subscriber, in order, in a bounded buffer.

    Iterate over it with `async for`, from one task of any event loop, or call `take` from any thread.
    Usable as a context manager, sync or async, that ends the subscription. It ends with the bus: events in the
    buffer can still be taken, then iteration stops. It also ends when nobody holds it any more, as after a
    `break` out of `async for event in run.events()`.
    """

    def __init__(
        self, bus: "Bus", name: str, types: tuple[type[Event], ...], buffer: int, on_full: OnFull
    ) -> None:
        self.name = name
        self.owner = ""  # the callback that reads it beside its handlers, if one does; set when it is made
        self.buffer = buffer
        self.on_full = on_full
        self._bus = bus
        self._wanted = _Wanted(types)
        self._lock = threading.Lock()  # drainer and consumer, for the length of a deque operation
        self._events: deque[Event | Barrier] = deque()
        self._milestones = 0  # of the events in the buffer; the rest are samples and may be dropped
        self._received = 0
        self._dropped = 0
        self._lag = 0.0
        self._unreported: list[Event] = []  # oldest and newest dropped sample since the last report
        self._unreported_count = 0
        self._reported_at = 0.0
        self._closed = False
        self._error: SubscriberTooSlowError | None = None
        # Set by the waiting consumer, called by the drainer. Which it is depends on whether the consumer
        # lives in the drainer's event loop (an anyio.Event is enough) or elsewhere (a socket pair).
        self._wake_consumer: Callable[[], None] | None = None
        self._waker: Waker | None = None  # of a consumer that lives elsewhere, from its first wait on
        self._waits_for_samples = True  # set by the consumer, read by the drainer
        self._batch: deque[E] = deque()  # what iteration has taken and not yet given out

    # Consumer's side

    @property
    def is_blocking(self) -> bool:
        """True while it keeps training waiting, by `on_full="block"` and a full buffer. Any thread."""
        return self in self._bus._blocked

    def take(self, limit: int | None = None) -> list[E]:
        """Return what has gathered, at most `limit` events, oldest first; empty if nothing has.

        Thread: any, one at a time. Never blocks.

        Raises:
            SubscriberTooSlowError: This subscriber was closed because it fell too far behind.
        """
        if self._error is not None:
            raise self._error
        with self._lock:
            events = self._events
            if limit is None or limit >= len(events):
                self._events = deque()
                self._milestones = 0
            else:
                events = deque(events.popleft() for _ in range(limit))
                if self._milestones:
                    self._milestones -= _count_milestones(events)
        if not events:
            return []
        self._bus._took(self)
        first = events[0]
        if isinstance(first, Event):
            self._lag = max(self._lag, self._bus.clock() - first.time)
        return list(events)  # type: ignore[arg-type]  # the buffer holds only the wanted types

    async def take_batch(self, limit: int | None = None) -> list[E]:
        """Wait until something is there and return it like `take`; an empty list means the end.

        Cancellation: safe, nothing is lost.
        """
        while await self.wait():
            if events := self.take(limit):
                return events
        return self.take(limit)

    async def wait(self, *, samples: bool = True) -> bool:
        """Wait until there is something to take; False means the end: nothing is there, and nothing will come.

        Without `samples` only a milestone and the end are waited for: whoever takes samples at a pace of its own
        is not woken for each hand-over of them. Thread: one task at a time, of any event loop.
        Cancellation: safe, nothing is lost.
        """
        self._waits_for_samples = samples
        while not self._has_arrived() and not self._closed:
            if threading.get_ident() == self._bus._thread:
                arrived = anyio.Event()
                self._wake_consumer = arrived.set  # no await since the look: the drainer cannot have run
                try:
                    await arrived.wait()
                finally:
                    self._wake_consumer = None
            else:
                # One for all waits: a pair of sockets for each would be most of what a wait takes.
                waker = self._waker = self._waker or Waker()
                self._wake_consumer = waker.wake
                try:
                    if not self._has_arrived() and not self._closed:  # the drainer may have run meanwhile
                        await waker.wait()
                except BaseException:
                    self._close_waker()
                    raise
                finally:
                    self._wake_consumer = None
        if self._closed:
            self._close_waker()
        return bool(self._events)

    def _has_arrived(self) -> bool:
        """True if there is what the consumer waits for."""
        return bool(self._events if self._waits_for_samples else self._milestones)

    @property
    def _is_starved(self) -> bool:
        """True while its consumer waits and there is nothing to take."""
        return self._wake_consumer is not None and not self._has_arrived()

    def _close_waker(self) -> None:
        if self._waker is not None:
            self._waker.close()
            self._waker = None

    def __aiter__(self) -> AsyncIterator[E]:
        return self

    async def __anext__(self) -> E:
        if not self._batch:
            self._batch.extend(await self.take_batch(1024))
            if not self._batch:
                raise StopAsyncIteration
        return self._batch.popleft()

    def close(self) -> None:
        """End the subscription: no more events come in. Any thread; twice is fine; never blocks for long."""
        self._bus._unsubscribe(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def statistics(self) -> SubscriptionStatistics:
        """What it got and missed, as of now. Any thread."""
        return SubscriptionStatistics(
            name=self.name,
            received=self._received,
            waiting=len(self._events),
            dropped=self._dropped,
            buffer=self.buffer,
            on_full=self.on_full,
            lag=self._lag,
            closed=self._closed,
        )

    # Drainer's side

    def _put(self, events: list[Event], has_milestones: bool) -> None:
        wanted = self._wanted
        mine = events if wanted.everything else [event for event in events if wanted[type(event)]]
        if not mine:
            return
        with self._lock:
            self._events.extend(mine)
            self._received += len(mine)
            if has_milestones:
                self._milestones += _count_milestones(mine)
            is_full = len(self._events) > self.buffer
            if is_full:
                self._limit()
        if is_full or self._has_arrived():
            self._wake()

    def _put_barrier(self, barrier: Barrier) -> None:
        with self._lock:
            self._events.append(barrier)
            self._milestones += 1
        self._wake()

    def _limit(self) -> None:
        """Hold the bounds. Called under the lock."""
        if self._milestones > MAX_MILESTONES_BEHIND:
            self._error = SubscriberTooSlowError(self.name, self._milestones)
            self._events.clear()
            self._milestones = 0
            self._closed = True
            self._bus._took(self)  # nobody may wait for it any more
            logger.error("%s", self._error)
            return
        excess = len(self._events) - self._milestones - self.buffer
        if excess <= 0:
            return
        if self.on_full == "block":
            self._bus._block(self)
            return
        kept: list[Event | Barrier] = []
        first = last = None
        dropped = excess
        while excess:
            event = self._events.popleft()
            if isinstance(event, Sample):
                first, last = first or event, event
                excess -= 1
            else:
                kept.append(event)
        self._events.extendleft(reversed(kept))
        self._dropped += dropped
        self._unreported_count += dropped
        assert first is not None and last is not None
        self._unreported = [(self._unreported or [first])[0], last]

    def _report(self, now: float, last: bool = False) -> EventsDropped | None:
        """Return what to say about drops, if it is time to. "Latest only" is no loss worth a word."""
        if not self._unreported_count or self.buffer == 1:
            return None
        if not last and now - self._reported_at < REPORT_INTERVAL:
            return None
        with self._lock:
            count, (first, newest) = self._unreported_count, self._unreported
            self._unreported_count, self._unreported = 0, []
        self._reported_at = now
        return EventsDropped(
            subscriber=self.name,
            count=count,
            total=self._dropped,
            first_step=first.step,
            last_step=newest.step,
        )

    def _wake(self) -> None:
        wake = self._wake_consumer
        if wake is not None:
            wake()

    def _end(self) -> None:
        self._closed = True
        self._wake()


class Bus:
    """Carries the events of one run from any thread to its subscribers.

    Use it as an async context manager, or start `drain` in a task group of your own:

    ```python
    async with Bus() as bus:
        events = bus.subscribe(StepEnd)
        threading.Thread(target=lambda: bus.publish(StepEnd(loss=1.0, lr=0.1))).start()
        async for event in events:
            ...
    ```
    """

    def __init__(
        self,
        *,
        run_id: str = "",
        flush_interval: float = FLUSH_INTERVAL,
        attention: Callable[[], None] | None = None,
    ) -> None:
        """Make a bus; nothing runs until `drain` does.

        Args:
            run_id: Written into events that come without one.
            flush_interval: Seconds between hand-overs, > 0.
            attention: Called, from any thread, when a `block` subscription fills up or has room again, and
                when the bus notices that its event loop is gone. Must not block.
        """
        if not flush_interval > 0:
            raise ValueError(f"flush_interval must be above 0 seconds, got {flush_interval}")
        self.run_id = run_id
        self.flush_interval = flush_interval
        self.clock_offset = time.time() - time.perf_counter()  # Unix time = offset + perf_counter()
        self.loop_is_gone = False  # written by whoever notices, read by the training thread
        self._attention = attention or (lambda: None)
        self._queue: deque[Event] = deque()  # appended by every thread, emptied by the drainer
        self._waker = Waker()
        self._armed = False  # set by the drainer before it sleeps for long; the next publish wakes it
        self._handed_over_at = self.clock()  # written by the drainer, read by publishers
        self._stall_logged = False
        self._wake_window = 0.0  # start of the second in which wakes are counted
        self._wakes = 0
        self._refused_lock = threading.Lock()
        self._refused: list[Event] = []  # oldest and newest sample refused while the event loop stalled
        self._refused_count = 0
        self._refused_total = 0
        self._closing = False
        self._done = False  # the drainer has handed over everything
        self._ended = False
        self._thread: int | None = None  # of the drainer's event loop
        # Of the drainer while it sleeps: for the pace, or until something comes
        self._napping: anyio.CancelScope | None = None
        self._idling: anyio.Event | None = None
        self._seq = 0
        self._last: Event | None = None  # the last training event: foreign ones get its position
        self._last_time = 0.0
        # Subscriptions and history; never taken by publishers. Reentrant: a signal handler may call `unblock`
        # while the thread that it interrupts hands over.
        self._lock = threading.RLock()
        # Weak: whoever reads a subscription holds it, and one that nobody holds any more has ended.
        self._subscriptions: list[weakref.ref[Subscription[Event]]] = []
        # Left for the drainer: those that other threads have closed, and the references of those that are gone.
        self._leaving: deque[Subscription[Event] | weakref.ref[Subscription[Event]]] = deque()
        self._final: Event | None = None  # set by `close`, taken by the drainer after everything else
        self._history: deque[Event] = deque(maxlen=MAX_MILESTONES_BEHIND)
        self._blocked: weakref.WeakSet[Subscription[Event]] = weakref.WeakSet()

    def clock(self) -> float:
        """Return Unix time in seconds that never runs backwards. Any thread."""
        return self.clock_offset + time.perf_counter()

    # Publishing: any thread

    def publish(self, event: Event) -> None:
        """Check an event, stamp its time and put it into the run's order.

        Thread: any; never waits. Users' events come through here; the training loop, whose events are
        right by construction, calls `publish_unchecked`.

        Raises:
            EventError: A field is no plain value, or this very event was published before.
            BusClosedError: The bus has ended.
            EventLoopStalledError: A million events wait for the event loop.
        """
        self.prepare(event)
        self.publish_unchecked(event)

    def prepare(self, event: Event) -> None:
        """Check an event and stamp its time, without putting it into the order. Raises like `publish`."""
        if self._closing:
            raise BusClosedError(f"{type(event).__name__} was published after the run had ended")
        if not isinstance(event, Event):
            if isinstance(event, type) and issubclass(event, Event):
                raise EventError(
                    f"publish takes an event, got the class {event.__name__}: publish {event.__name__}(...)"
                )
            raise EventError(
                f"publish takes an event, got a {type(event).__name__}: numbers of a step go to log(name, value); else "
                "define class Mine(Event, frozen=True) with its fields, and publish Mine(...)"
            )
        if event.time:
            raise EventError(
                f"{type(event).__name__} was published before: make a new event for each publish"
            )
        check(event)
        _set(event, "time", self.clock())

    def publish_unchecked(self, event: Event) -> None:
        """Append an event that has its time. Any thread; never waits. Raises like `publish`."""
        queue = self._queue
        if len(queue) >= MAX_WAITING_SAMPLES and self._refuse(event):
            return
        queue.append(event)
        if self._armed or not isinstance(event, Sample):
            self._wake_for(event)
        elif event.time - self._handed_over_at > STALL_WARNING:
            self._log_stall(event.time)

    def put_barrier(self, subscription: "Subscription[Event]", on_reached: Callable[[], object]) -> None:
        """Put a barrier into the stream of `subscription`, at once. Any thread; never waits."""
        self._queue.append(Barrier(subscription, on_reached))  # type: ignore[arg-type]  # told apart by the drainer
        self._waker.wake()

    def _wake_for(self, event: Event) -> None:
        now = event.time
        if self._armed:
            self._handed_over_at = now  # it was idle, not stalled; before others see that it is armed no more
            self._armed = False
            self._waker.wake()
            return
        if now - self._wake_window >= 1.0:
            self._wake_window, self._wakes = now, 0
        self._wakes += 1
        if self._wakes <= WAKES_PER_SECOND:
            self._waker.wake()
        if now - self._handed_over_at > STALL_WARNING:
            self._log_stall(now)

    def _refuse(self, event: Event) -> bool:
        """Handle a queue that nobody empties: drop samples, then fail."""
        if isinstance(event, Sample):
            with self._refused_lock:  # held for these lines only
                self._refused_count += 1
                self._refused_total += 1
                self._refused = [(self._refused or [event])[0], event]
            if event.time - self._handed_over_at > STALL_WARNING:
                self._log_stall(event.time)
            return True
        if len(self._queue) >= MAX_WAITING:
            raise EventLoopStalledError(
                f"{len(self._queue):,} events wait for the event loop, which has not taken any for "
                f"{self.clock() - self._handed_over_at:.0f} s"
            )
        return False

    def _log_stall(self, now: float) -> None:
        """Say once per stall what holds the event loop: a handler that never returns is named nowhere else."""
        thread = self._thread
        if self._stall_logged or thread is None:
            return
        self._stall_logged = True
        frame = sys._current_frames().get(thread)
        if frame is None:
            self.loop_is_gone = True
            self._attention()
            logger.error("the event loop's thread is gone; nobody receives this run's events any more")
            return
        stack = "".join(traceback.format_stack(frame))
        waited = now - self._handed_over_at
        logger.warning("the event loop has taken no events for %.1f s; it is here:\n%s", waited, stack)

    # Subscribing: any thread

    @overload
    def subscribe(
        self,
        *,
        name: str = ...,
        buffer: int = ...,
        on_full: OnFull = ...,
        replay: bool = ...,
    ) -> Subscription[Event]: ...

    @overload
    def subscribe(
        self,
        *types: type[E],
        name: str = ...,
        buffer: int = ...,
        on_full: OnFull = ...,
        replay: bool = ...,
    ) -> Subscription[E]: ...

    def subscribe(
        self,
        *types: type[Event],
        name: str = "subscriber",
        buffer: int = BUFFER,
        on_full: OnFull = "drop_oldest",
        replay: bool = False,
    ) -> Subscription[Any]:
        """Subscribe to events of the given classes and their subclasses; to all without any.

        Thread: any. Does not block beyond a hand-over in progress.

        Args:
            types: Event classes.
            name: Shown in statistics and in `EventsDropped`.
            buffer: Samples held, at least 1; with 1 it is "latest only". Milestones come on top.
            on_full: `"drop_oldest"`, or `"block"`: the publisher's side may wait until there is room.
            replay: Begin with the milestones so far (the last 100,000).

        Raises:
            BusClosedError: The bus has ended.
        """
        for wanted in types:
            if not (isinstance(wanted, type) and issubclass(wanted, Event)):
                raise TypeError(
                    f"subscribe takes event classes like EpochEnd, got {wanted!r}; several as events(EpochEnd, StepEnd)"
                )
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        if on_full not in ("drop_oldest", "block"):
            raise ValueError(f"on_full must be 'drop_oldest' or 'block', got {on_full!r}")
        return self.add(Subscription(self, name, types or (Event,), buffer, on_full), replay=replay)

    def add(self, subscription: Subscription[E], *, replay: bool = False) -> Subscription[E]:
        """Let a subscription in that was made by hand, also one for no types: it gets barriers only."""
        with self._lock:
            if replay and self._history:
                subscription._put(list(self._history), has_milestones=True)
            if self._ended:
                if not replay:
                    raise BusClosedError("the run has ended: there is nothing left to subscribe to")
                subscription._end()
            reference = weakref.ref(subscription, self._forget)
            self._subscriptions.append(reference)  # type: ignore[arg-type]  # invariant, but only put into
        return subscription

    def _unsubscribe(self, subscription: Subscription[E]) -> None:
        with self._lock:
            subscription._closed = True
            reference = weakref.ref(subscription)  # equal to the one in the list
            if not self._ended and reference in self._subscriptions:
                self._subscriptions.remove(reference)  # type: ignore[arg-type]  # invariant
                if self._thread in (None, threading.get_ident()):
                    subscription._end()
                else:
                    # A consumer that waits in the drainer's event loop can only be woken from its thread.
                    self._leaving.append(subscription)  # type: ignore[arg-type]  # likewise
                    self._waker.wake()
        self._took(subscription)

    def _forget(self, reference: "weakref.ref[Subscription[E]]") -> None:
        """Leave it to the drainer: this is called by the garbage collector, in any thread, under any lock."""
        self._leaving.append(reference)  # type: ignore[arg-type]  # invariant
        self._waker.wake()

    def _reap_subscriptions(self) -> None:
        """End the subscriptions that other threads have closed, and take out those that nobody holds."""
        with self._lock:
            while self._leaving:
                leaving = self._leaving.popleft()
                if isinstance(leaving, Subscription):
                    leaving._end()
                elif leaving in self._subscriptions:
                    self._subscriptions.remove(leaving)

    def _living(self) -> list[Subscription[Event]]:
        return [each for reference in self._subscriptions if (each := reference()) is not None]

    @property
    def subscriptions(self) -> tuple[SubscriptionStatistics, ...]:
        """What each subscriber got and missed, as of now. Any thread."""
        with self._lock:
            return tuple(each.statistics for each in self._living())

    @property
    def dropped(self) -> int:
        """Samples dropped before the drainer, because the event loop had stalled."""
        return self._refused_total

    def is_awaited_by(self, owner: str) -> bool:
        """True if a callback waits in one of its own subscriptions and nothing is under way to it. Event loop only."""
        with self._lock:
            return not self._queue and any(
                each.owner == owner and each._is_starved for each in self._living()
            )

    @property
    def has_ended(self) -> bool:
        """True when nothing is handed over any more."""
        return self._ended

    # Back-pressure: a full `block` subscription is shown to the publisher's side

    @property
    def blocked(self) -> bool:
        """True while a `block` subscription is over its bound. Any thread."""
        return bool(self._blocked)

    def unblock(self) -> None:
        """Let every `block` subscription drop from now on; for a publisher that must not wait any longer."""
        with self._lock:
            for subscription in self._living():
                subscription.on_full = "drop_oldest"
            self._blocked.clear()
        self._attention()

    def _block(self, subscription: Subscription[E]) -> None:
        self._blocked.add(subscription)  # type: ignore[arg-type]  # invariant
        self._attention()

    def _took(self, subscription: Subscription[E]) -> None:
        if subscription in self._blocked and (
            subscription._closed or len(subscription._events) <= subscription.buffer // 2
        ):
            self._blocked.discard(subscription)  # type: ignore[arg-type]  # invariant
            self._attention()

    # Draining: the event loop

    async def drain(self) -> None:
        """Hand events over until the bus is closed and empty. Two tasks, on the event loop.

        Cancellation: ends the bus; events still in the queue are lost.
        """
        self._thread = threading.get_ident()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen)
                await self._hand_over_at_pace()
                # Not cancelled: of that a traceback would stay, and with it in a cycle all that the run holds.
                self._done = True
                self._waker.wake()
        finally:
            self._end()

    async def _hand_over_at_pace(self) -> None:
        while True:
            if self._leaving:
                self._reap_subscriptions()
                self._attention()  # the publisher's side may have waited for one that is gone
            if self._hand_over():
                if len(self._queue) >= HAND_OVER_AT_ONCE:
                    await anyio.lowlevel.checkpoint()  # a backlog: no pause, but let others run
                elif not self._closing:
                    await self._nap()
            elif self._closing:
                self._report_drops(self.clock(), last=True)
                if not self._queue:
                    break
            else:
                self._armed = True
                if not (self._queue or self._closing or self._leaving):  # nothing came since: sleep
                    await self._idle()
                self._armed = False
        if self._final is not None:
            self._queue.appendleft(self._final)  # before what another thread may be publishing right now
            self._hand_over(limit=1)

    async def _nap(self) -> None:
        """Sleep until it is time for the next hand-over, unless `_listen` ends it.

        A sleep that ends by itself takes a third of what it takes to wait for the socket up to a deadline, and that
        was most of what a hand-over took.
        """
        with anyio.CancelScope() as self._napping:
            await anyio.sleep(self.flush_interval)
        self._napping = None

    async def _idle(self) -> None:
        """Sleep until `_listen` hears of something."""
        self._idling = anyio.Event()
        await self._idling.wait()
        self._idling = None

    async def _listen(self) -> None:
        """Do what a wake from another thread asks for. A drainer that does not sleep is about to look by itself."""
        while not self._done:
            await self._waker.wait()
            if self._idling is not None:
                self._idling.set()
            elif self._napping is not None:
                if self._closing or self._leaving or len(self._queue) >= HAND_OVER_AT_ONCE:
                    self._napping.cancel()
                else:
                    self._hand_over()  # a milestone; the pace goes on as it was

    def settle(self) -> None:
        """Hand over all there is now and report every drop. Event loop only; for the one about to end the bus."""
        while self._hand_over():
            pass
        self._report_drops(self.clock(), last=True)
        self._hand_over()

    def close(self, last: Event | None = None) -> None:
        """Let the drainer hand over what is there and end. Any thread; twice is fine; does not wait.

        Args:
            last: Published as the last event of all, whatever other threads are publishing meanwhile, and after
                the reports of drops.
        """
        if last is not None:
            self.prepare(last)
            self._final = last
        self._closing = True
        self._waker.wake()

    async def __aenter__(self) -> Self:
        self._thread = threading.get_ident()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self.drain)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        # Not told of the body's exception: a task group would wrap it, and the drainer ends by itself.
        await self._tasks.__aexit__(None, None, None)

    def _hand_over(self, limit: int | None = None) -> int:
        """Take out what has gathered, number it, and put it into the buffers. Returns how many there were."""
        queue = self._queue
        count = min(len(queue), limit or HAND_OVER_AT_ONCE)
        now = self.clock()
        self._handed_over_at = now
        self._stall_logged = False
        if count:
            take = queue.popleft
            batch = [take() for _ in range(count)]
            barriers: list[tuple[int, Barrier]] = []
            milestones = self._stamp(batch, barriers)
            with self._lock:
                start = 0
                for place, barrier in barriers:  # a barrier splits the batch: events before it go first
                    self._dispatch(batch[start:place], milestones)
                    barrier.subscription._put_barrier(barrier)
                    start = place + 1
                self._dispatch(batch[start:] if start else batch, milestones)
                self._history.extend(milestones)
        self._report_drops(now)
        return count

    def _stamp(self, batch: list[Event], barriers: list[tuple[int, Barrier]]) -> list[Event]:
        """Number the events, give foreign ones their position, and return the milestones."""
        seq, last, last_time = self._seq, self._last, self._last_time
        milestones: list[Event] = []
        for place, event in enumerate(batch):
            if event.step < 0:
                if isinstance(event, Barrier):
                    barriers.append((place, event))
                    continue
                if last is not None:
                    _set(event, "epoch", last.epoch)
                    _set(event, "step", last.step)
                    _set(event, "batch", last.batch)
                else:
                    _set(event, "epoch", 0)
                    _set(event, "step", 0)
                    _set(event, "batch", 0)
            elif last is None or event.step >= last.step:  # else it tells of what was before
                last = event
            if event.time < last_time:  # threads may append in another order than they read the clock
                _set(event, "time", last_time)
            else:
                last_time = event.time
            if not event.run_id:
                _set(event, "run_id", self.run_id)
            _set(event, "seq", seq)
            seq += 1
            if not isinstance(event, Sample):
                milestones.append(event)
        self._seq, self._last, self._last_time = seq, last, last_time
        return milestones

    def _dispatch(self, events: list[Event], milestones: list[Event]) -> None:
        if events:
            for subscription in self._living():
                if not subscription._closed:
                    subscription._put(events, has_milestones=bool(milestones))

    def _report_drops(self, now: float, last: bool = False) -> None:
        reports = [subscription._report(now, last) for subscription in self._living()]
        if self._refused_count:
            with self._refused_lock:
                count, (first, newest) = self._refused_count, self._refused
                self._refused_count, self._refused = 0, []
            reports.append(
                EventsDropped(
                    subscriber="bus",
                    count=count,
                    total=self._refused_total,
                    first_step=first.step,
                    last_step=newest.step,
                )
            )
        for report in reports:
            if report is not None:
                _set(report, "time", now)
                self._queue.append(report)

    def _end(self) -> None:
        self._ended = True
        with self._lock:
            for subscription in self._living():
                subscription._end()
            self._reap_subscriptions()
            self._blocked.clear()
        self._attention()
        self._waker.close()


class _Wanted(dict[type, bool]):
    """Remembers for each event class whether a subscription wants it."""

    def __init__(self, types: tuple[type[Event], ...]) -> None:
        super().__init__()
        self.types = types
        self.everything = Event in types

    def __missing__(self, event_class: type) -> bool:
        wanted = self[event_class] = issubclass(event_class, self.types)
        return wanted


def _count_milestones(events: Iterable[Event | Barrier]) -> int:
    return sum(not isinstance(event, Sample) for event in events)
