"""Subscribers: all subscriptions of one bus, and the milestones that are replayed to new ones."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from offloop.engine.bus.milestones import Milestones
from offloop.engine.bus.subscription import Barrier, Subscription, SubscriptionStatistics
from offloop.engine.bus.waker import Waker
from offloop.engine.errors import BusClosedError, OffloopError
from offloop.engine.events import Event, EventsDropped


class Subscribers:
    """The subscriptions of one bus. The drainer hands events to them; any thread adds and removes them."""

    def __init__(self, clock: Callable[[], float], attention: Callable[[], None], waker: Waker) -> None:
        """Begin with none.

        Args:
            clock: Returns the Unix time in seconds.
            attention: Called, from any thread, when a subscription has become blocking or is no longer.
            waker: Wakes the drainer.
        """
        self.clock = clock
        self.attention = attention
        # Written by the drainer as it starts; read by consumers, to learn whether they live in its event loop.
        self.thread: int | None = None
        self.has_ended = False  # written under the lock, read by any thread
        self._waker = waker
        # Held by the drainer for a hand-over, by other threads for a few assignments; publishers never take it.
        # Reentrant: a signal handler or a finalizer may close a subscription in the thread that holds it.
        self._lock = threading.RLock()
        # Weak: a subscription ends when its consumer drops it. Replaced under the lock, read by any thread without it.
        self._references: tuple[weakref.ref[Subscription[Event]], ...] = ()
        # Appended by the threads that close a subscription and by the garbage collector, emptied by the drainer:
        # append and popleft are atomic in CPython.
        self._leaving: deque[Subscription[Event] | weakref.ref[Subscription[Event]]] = deque()
        # For replay. Under the lock.
        self._history = Milestones()
        # What consumers get once they have taken all; written before `has_ended`.
        self._error: OffloopError | None = None

    def add(self, subscription: Subscription[Event], *, replay: bool) -> None:
        """Hand events to a subscription from now on; with `replay`, first the milestones so far. Any thread.

        Raises:
            BusClosedError: The bus has ended and there is no replay.
        """
        with self._lock:
            if replay and self._history:
                subscription._not_replayed = self._history.dropped
                history = self._history.events()
                subscription._put(history, set(map(type, history)), has_milestones=True)
            if self.has_ended:
                if not replay:
                    raise BusClosedError("the run has ended: there is nothing left to subscribe to")
                subscription._end(self._error)
            else:
                self._references = (*self._references, weakref.ref(subscription, self._forget))

    def remove(self, subscription: Subscription[Event], /) -> None:
        """Hand over no more events to a subscription, and wake its consumer. Any thread; twice is fine."""
        with self._lock:
            was_blocking = subscription.is_blocking
            subscription._closed = True
            # After the end it stays, for its statistics.
            if not self.has_ended and self._take_out(weakref.ref(subscription)):
                if self.thread in (None, threading.get_ident()):
                    subscription._end()
                else:
                    # A consumer in the drainer's event loop can only be woken from that thread.
                    self._leaving.append(subscription)
                    self._waker.wake()
        if was_blocking:
            self.attention()

    def _take_out(self, reference: "weakref.ref[Subscription[Event]]") -> bool:
        """Remove a reference, or one that is equal; return whether it was there. Called under the lock."""
        is_there = reference in self._references
        if is_there:
            self._references = tuple(each for each in self._references if each != reference)
        return is_there

    def _forget(self, reference: "weakref.ref[Subscription[Event]]") -> None:
        """Leave it to the drainer: the garbage collector calls this in any thread, under any lock."""
        self._leaving.append(reference)
        self._waker.wake()

    @property
    def has_leaving(self) -> bool:
        """True if there is something to reap."""
        return bool(self._leaving)

    def reap(self) -> None:
        """End the subscriptions that other threads have closed, and remove those without a consumer. Drainer."""
        with self._lock:
            while self._leaving:
                leaving = self._leaving.popleft()
                if isinstance(leaving, Subscription):
                    leaving._end()
                else:
                    self._take_out(leaving)
        # Training may have waited for one that has left.
        self.attention()

    def hand_over(
        self, batch: list[Event], barriers: Sequence[tuple[int, Barrier]], milestones: list[Event]
    ) -> None:
        """Put events into the buffers. Drainer.

        Args:
            batch: Events in order, and the barriers between them.
            barriers: Those, each with its place in the batch.
            milestones: The events of the batch that are kept for replay.
        """
        with self._lock:
            start = 0
            # A barrier splits the batch: events before it go first.
            for place, barrier in barriers:
                self._put(batch[start:place], milestones)
                barrier.subscription._put_barrier(barrier)
                start = place + 1
            self._put(batch[start:] if start else batch, milestones)
            self._history.extend(milestones)

    def rest(self) -> None:
        """Wake the consumers that still have samples: nothing comes for now. Drainer."""
        for subscription in self._living():
            subscription._wake_for_samples()

    def note_missed(self, count: int) -> None:
        """Count milestones that never came here, as `SubscriptionStatistics.not_replayed`. Drainer."""
        with self._lock:
            self._history.dropped += count
            for subscription in self._living():
                subscription._not_replayed += count

    def note_dropped(self, count: int) -> None:
        """Count samples that never came here, as `dropped` of the subscribers that want samples. Drainer."""
        with self._lock:
            for subscription in self._living():
                if subscription.takes_samples:
                    subscription._drops.total += count

    def _put(self, events: list[Event], milestones: list[Event]) -> None:
        if events:
            # Usually one or two classes: a subscriber is asked about these, not about each event.
            classes = set(map(type, events))
            for subscription in self._living():
                if not subscription._closed:
                    subscription._put(events, classes, has_milestones=bool(milestones))

    def report_drops(self, now: float, *, at_end: bool) -> list[EventsDropped]:
        """Return the events about drops that are due. Drainer."""
        reports = [each._report_drops(now, at_end=at_end) for each in self._living()]
        return [report for report in reports if report is not None]

    def _living(self) -> list[Subscription[Event]]:
        return [each for reference in self._references if (each := reference()) is not None]

    @property
    def statistics(self) -> tuple[SubscriptionStatistics, ...]:
        """What each subscriber received and missed so far. Any thread."""
        return tuple(each.statistics for each in self._living())

    @property
    def has_blocking(self) -> bool:
        """True while one of them is blocking. Any thread."""
        return any(each.is_blocking for each in self._living())

    def unblock(self) -> None:
        """Let every subscription drop from now on. Any thread, also a signal handler: it takes no lock."""
        for subscription in self._living():
            subscription.on_full = "drop_oldest"
        self.attention()

    def is_starved(self, owner: str) -> bool:
        """True if a callback waits for its own subscription and that is empty. Event loop only."""
        return any(each.owner == owner and each._is_starved for each in self._living())

    def end(self, error: OffloopError | None = None) -> None:
        """Close all and wake their consumers. Drainer, or any thread once the drainer's event loop is gone.

        Args:
            error: Raised in consumers once they have taken what is left; None for an end in order.
        """
        with self._lock:
            self._error = error
            self.has_ended = True
            for subscription in self._living():
                subscription._end(error)
        self.reap()
