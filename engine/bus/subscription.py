"""Subscription: the events of one subscriber, in order, in a bounded buffer.

    drainer, in its event loop                          consumer, in any thread or event loop
    ──────────────────────────                          ─────────────────────────────────────
    put(events) ───────────────────┐
                                   ├──> buffer ───────> take(), take_batch(), async for
    put_barrier(barrier) ──────────┘
    then wakes the consumer that waits

A consumer that only follows samples need not be woken for each hand-over: with `sample_interval`, samples alone wake it
that rarely. Milestones, barriers, a buffer that is half full and the end wake it at once; so does the drainer before
it sleeps because nothing comes any more.

The buffer may hold `buffer` samples. Beyond that the oldest are dropped and counted, or, with `on_full="block"`,
the subscription is blocking: the training thread waits until half of the buffer is free. Milestones are never
dropped; a subscriber that is `MAX_MILESTONES_BEHIND` of them behind is closed.
"""

import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Final, Generic, Literal, Protocol, Self, TypeVar

import anyio
import msgspec

from offloop.engine import checks
from offloop.engine.bus.waker import Waker
from offloop.engine.errors import OffloopError, SubscriberTooSlowError
from offloop.engine.events import Event, EventsDropped, Sample

logger = logging.getLogger("offloop")

BUFFER: Final = 10_000
"""Samples that a subscription holds by default: five seconds of a loop that does 2,000 steps a second."""
MAX_MILESTONES_BEHIND: Final = 100_000
"""Milestones that may wait for one subscriber."""
EVENTS_AT_ONCE: Final = 1024
"""Events that iteration takes out in one go."""
REPORT_INTERVAL: Final = 1.0
"""Seconds between two `EventsDropped` of one subscriber."""

E_co = TypeVar("E_co", bound=Event, covariant=True)
OnFull = Literal["drop_oldest", "block"]


def check_arguments(types: tuple[type[Event], ...], buffer: int, on_full: OnFull) -> None:
    """Check the arguments of `Run.events`.

    Raises:
        TypeError: One of `types` is no event class.
        ConfigError: `buffer` or `on_full` is not legal.
    """
    for each in types:
        if not (isinstance(each, type) and issubclass(each, Event)):
            raise TypeError(
                f"events takes event classes like EpochEnd, got {each!r}; several as events(EpochEnd, StepEnd)"
            )
    checks.whole_number("buffer", buffer)
    checks.choice("on_full", on_full, ("drop_oldest", "block"))


class SubscriptionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one subscriber received and missed so far."""

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
    not_replayed: int = 0
    """Milestones from before it began that were no longer kept: the run keeps the last 100,000, up to 64 MiB."""


class Barrier:
    """A point in the stream of one subscriber; its consumer calls `on_reached` once all before it is handled.

    It passes through the queue like an event, but has no `seq` and only its subscription receives it.
    """

    __slots__ = ("on_reached", "subscription")
    # Below 0 like that of foreign events: in their path the drainer recognises barriers.
    step = -1

    def __init__(self, subscription: "Subscription[Event]", on_reached: Callable[[], object]) -> None:
        self.subscription = subscription
        self.on_reached = on_reached


class Drops:
    """Counts the samples that one subscriber missed, and reports them. Any thread adds, the drainer reports."""

    def __init__(self, subscriber: str) -> None:
        self.total = 0
        self._subscriber = subscriber
        # Guards the counts; held for a few assignments.
        self._lock = threading.Lock()
        self._count = 0  # since the last report
        self._first_step = self._last_step = -1
        self._reported_at = 0.0  # drainer only

    def add(self, count: int, first: Event, last: Event) -> None:
        """Count dropped samples, of which `first` is the oldest and `last` the newest."""
        with self._lock:
            if not self._count:
                self._first_step = first.step
            self._last_step = last.step
            self._count += count
            self.total += count

    def report(self, now: float, *, at_end: bool = False) -> EventsDropped | None:
        """Return the event about drops since the last report: at most one a second, and one at the end."""
        if not self._count or (now - self._reported_at < REPORT_INTERVAL and not at_end):
            return None
        self._reported_at = now
        with self._lock:
            count, self._count = self._count, 0
            return EventsDropped(
                time=now,
                subscriber=self._subscriber,
                count=count,
                total=self.total,
                first_step=self._first_step,
                last_step=self._last_step,
            )


class Source(Protocol):
    """What a subscription needs of the bus that it belongs to."""

    thread: int | None
    """Thread of the event loop in which the drainer puts events in; None before it runs."""

    def clock(self) -> float:
        """Return the Unix time in seconds."""

    def attention(self) -> None:
        """Have the training thread check whether a subscription is blocking."""

    def remove(self, subscription: "Subscription[Event]", /) -> None:
        """Hand over no more events to a subscription, and wake its consumer."""


class Subscription(Generic[E_co]):
    """The events of one subscriber, in order, in a bounded buffer.

    Iterate over it with `async for`, from one task of any event loop, or call `take` from any thread.
    Usable as a context manager, sync or async, that ends the subscription. It ends with the bus: events in the
    buffer can still be taken, then iteration stops. It also ends when no reference to it is left, as after a
    `break` out of `async for event in run.events()`.
    """

    def __init__(
        self,
        source: Source,
        types: tuple[type[Event], ...],
        *,
        name: str,
        buffer: int,
        on_full: OnFull,
        owner: str = "",
        sample_interval: float = 0.0,
    ) -> None:
        self.name = name
        # The callback that reads it outside its handlers, if one does.
        self.owner = owner
        self.buffer = buffer
        # Any thread writes "drop_oldest" when training must not wait any longer, also a signal handler, which
        # must take no lock. The drainer and `is_blocking` read it; one assignment is atomic.
        self.on_full = on_full
        self._source = source
        self._wanted = _Wanted(types)
        # Guards the next three. The drainer and the consumer hold it for the length of a deque operation.
        self._lock = threading.Lock()
        self._events: deque[Event | Barrier] = deque()
        self._milestones = 0  # of the events in the buffer, barriers included; the rest are samples
        # True from too many samples until the buffer is half empty; only with on_full="block".
        self._is_full = False
        # Written by the drainer alone, read by every thread that asks for statistics.
        self._received = 0
        self._drops = Drops(name)
        self._not_replayed = 0  # written by the drainer
        self._lag = 0.0  # written by the consumer
        # Written once, by the drainer or by the thread that closes; read by both sides.
        self._closed = False
        self._error: OffloopError | None = None
        # Set by the consumer while it waits, called by the drainer. A consumer in the drainer's event loop waits
        # for an `anyio.Event`, which only that thread may set; one elsewhere waits for its waker.
        self._wake_consumer: Callable[[], None] | None = None
        self._waker: Waker | None = None  # None for a consumer in the drainer's event loop
        self._waits_for_samples = True  # written by the consumer before it waits, read by the drainer
        self._sample_interval = sample_interval
        # When samples alone may wake the consumer again, on the clock of events. Written by the consumer as it takes,
        # and by the drainer before it sleeps; a write that is lost wakes the consumer sooner or one event later.
        self._samples_due = 0.0
        self._batch: deque[E_co] = deque()  # consumer only: what iteration has taken and not returned yet

    # Consumer's side

    @property
    def takes_samples(self) -> bool:
        """True if a class that it wants may be a sample."""
        return any(issubclass(each, Sample) or issubclass(Sample, each) for each in self._wanted.types)

    @property
    def is_blocking(self) -> bool:
        """True while training waits for this subscriber: its buffer is full, with `on_full="block"`. Any thread."""
        return self._is_full and self.on_full == "block" and not self._closed

    def take(self, limit: int | None = None) -> list[E_co]:
        """Return the events in the buffer, oldest first, at most `limit`; an empty list if there are none.

        Thread: any, one at a time. Never blocks.

        Raises:
            SubscriberTooSlowError: This subscriber was closed because it fell too far behind.
        """
        if self._error is not None and not self._events:
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
            has_room_again = self._is_full and len(self._events) <= self.buffer // 2
            if has_room_again:
                self._is_full = False
        if has_room_again:
            self._source.attention()
        if not events:
            return []
        now = self._source.clock()
        self._samples_due = now + self._sample_interval
        first = events[0]
        if isinstance(first, Event):
            self._lag = max(self._lag, now - first.time)
        return list(events)  # type: ignore[arg-type]  # the buffer holds only the wanted types

    async def take_batch(self, limit: int | None = None) -> list[E_co]:
        """Wait until there are events and return them like `take`; an empty list means the end.

        Cancellation: safe, no event is lost.
        """
        while await self.wait():
            if events := self.take(limit):
                return events
        return self.take(limit)

    async def wait(self, *, samples: bool = True) -> bool:
        """Wait until there is something to take. False means the end: the buffer is empty and stays so.

        With `samples=False`, only a milestone, a buffer that is half full or the end completes the wait, for a
        consumer that takes samples at its own pace. Thread: one task at a time, of any event loop.
        Cancellation: safe, no event is lost.
        """
        self._waits_for_samples = samples
        while not self._has_arrived() and not self._closed:
            if threading.get_ident() == self._source.thread:
                # It may be left from a wait before the drainer ran.
                self._waker = None
                arrived = anyio.Event()
                # The drainer runs in this event loop, so it has put nothing in since the check above.
                self._wake_consumer = arrived.set
                try:
                    await arrived.wait()
                finally:
                    self._wake_consumer = None
            else:
                # Reuse one waker: creating a socket pair would dominate each wait.
                waker = self._waker = self._waker or Waker()
                self._wake_consumer = waker.wake
                try:
                    # Check again: the drainer may have run before it could see the waker.
                    if not self._has_arrived() and not self._closed:
                        await waker.wait()
                except BaseException:
                    self._waker = None
                    raise
                finally:
                    self._wake_consumer = None
        if self._closed:
            self._waker = None
        return bool(self._events)

    def _has_arrived(self) -> bool:
        """True if the buffer holds what the consumer waits for."""
        if self._milestones or not self._events:
            return bool(self._milestones)
        if self._waits_for_samples and not self._sample_interval:
            return True
        # Sooner than samples are dropped; a buffer of one means "latest only".
        if len(self._events) > max(1, self.buffer // 2):
            return True
        return self._waits_for_samples and self._source.clock() >= self._samples_due

    def __aiter__(self) -> AsyncIterator[E_co]:
        return self

    async def __anext__(self) -> E_co:
        if not self._batch:
            self._batch.extend(await self.take_batch(EVENTS_AT_ONCE))
            if not self._batch:
                raise StopAsyncIteration
        return self._batch.popleft()

    def close(self) -> None:
        """End the subscription: no more events come in. Any thread; twice is fine; never blocks for long."""
        self._source.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def statistics(self) -> SubscriptionStatistics:
        """What it received and missed so far. Any thread."""
        return SubscriptionStatistics(
            name=self.name,
            received=self._received,
            waiting=len(self._events),
            dropped=self._drops.total,
            buffer=self.buffer,
            on_full=self.on_full,
            lag=self._lag,
            closed=self._closed,
            not_replayed=self._not_replayed,
        )

    # Drainer's side: called by `Subscribers` only, under its lock

    def _put(self, events: list[Event], classes: Collection[type[Event]], has_milestones: bool) -> None:
        """Append the events of the wanted classes, apply the overflow policy and wake the consumer.

        Args:
            events: Events in order.
            classes: Those that occur among them.
            has_milestones: True if not all of them are samples.
        """
        wanted = self._wanted
        mine = events
        if not all(map(wanted.__getitem__, classes)):
            mine = [event for event in events if wanted[type(event)]]
            if not mine:
                return
        with self._lock:
            self._events.extend(mine)
            self._received += len(mine)
            if has_milestones:
                self._milestones += _count_milestones(mine)
            is_over = len(self._events) > self.buffer
            has_changed = is_over and self._apply_overflow_policy()
        if has_changed:
            self._source.attention()
        if is_over or self._has_arrived():
            self._wake()

    def _wake_for_samples(self) -> None:
        """Wake the consumer if the buffer has samples: no more will come soon."""
        if self._events and self._waits_for_samples:
            self._samples_due = 0.0
            self._wake()

    def _put_barrier(self, barrier: Barrier) -> None:
        with self._lock:
            self._events.append(barrier)
            self._milestones += 1
        self._wake()

    def _apply_overflow_policy(self) -> bool:
        """Block, drop samples, or close a subscriber with too many milestones. Called under the lock.

        Returns:
            True if `is_blocking` has changed.
        """
        if self._milestones > MAX_MILESTONES_BEHIND:
            was_blocking = self.is_blocking
            self._error = SubscriberTooSlowError(self.name, self._milestones)
            self._events.clear()
            self._milestones = 0
            self._closed = True
            logger.error("%s", self._error)
            return was_blocking
        excess = len(self._events) - self._milestones - self.buffer
        if excess <= 0:
            return False
        if self.on_full == "block":
            was_full, self._is_full = self._is_full, True
            return not was_full
        kept: list[Event | Barrier] = []
        dropped: list[Event] = []
        while len(dropped) < excess:
            event = self._events.popleft()
            if isinstance(event, Sample):
                dropped.append(event)
            else:
                kept.append(event)
        self._events.extendleft(reversed(kept))
        self._drops.add(excess, dropped[0], dropped[-1])
        return False

    def _report_drops(self, now: float, *, at_end: bool) -> EventsDropped | None:
        """Return the event about drops, if one is due. A buffer of one means "latest only": its drops are no loss."""
        return None if self.buffer == 1 else self._drops.report(now, at_end=at_end)

    @property
    def _is_starved(self) -> bool:
        """True while its consumer waits and there is nothing to take."""
        return self._wake_consumer is not None and not self._has_arrived()

    def _wake(self) -> None:
        wake = self._wake_consumer
        if wake is not None:
            wake()

    def _end(self, error: OffloopError | None = None) -> None:
        """Close and wake the consumer, which takes what is left; then `error` is raised, if there is one."""
        self._error = self._error or error
        self._closed = True
        # A consumer in an event loop that is gone cannot be woken, and must not be: its event is of that thread.
        if self._waker is not None or threading.get_ident() == self._source.thread:
            self._wake()


class _Wanted(dict[type, bool]):
    """Remembers for each event class whether a subscription wants it."""

    def __init__(self, types: tuple[type[Event], ...]) -> None:
        super().__init__()
        self.types = types

    def __missing__(self, event_class: type) -> bool:
        wanted = self[event_class] = issubclass(event_class, self.types)
        return wanted


def _count_milestones(events: Iterable[Event | Barrier]) -> int:
    return sum(not isinstance(event, Sample) for event in events)
