"""The bus: the only module through which events cross threads.

    training thread, writers, callbacks              event loop                       anywhere
    ───────────────────────────────────              ──────────                       ────────
    publish(event) ──append──> queue ──────> drainer, every 50 ms ──> buffer of A ──> async for ...
        never waits              │           gives seq, dispatches ─> buffer of B ──> take()
                                 │
             one byte wakes the drainer: first event after idle, milestones (20 a second at most)

Publishers wait for nothing: publishing is an append to a deque, which is atomic in CPython. Only the drainer
takes events out, so the order of the queue is the order of the run and `seq` has no gaps. It hands over
everything that has gathered and then sleeps `flush_interval`, because waking an event loop once for each event
of a fast training loop costs 15-30 % of the loop's speed, and waking it twenty times a second next to nothing.

How events are published:

    where                            how                                             after the end of the run
    ───────────────────────────────  ──────────────────────────────────────────────  ────────────────────────
    training loop                    Reporter -> host.emit, host.emit_step           does not happen
                                     -> Bus.emit
    user code, callbacks             run.publish, trainer.publish -> Bus.publish;    raises BusClosedError
                                     in the training thread -> Reporter
    threads that outlive training    Bus.publish_or_log                              a log record
    the bus itself                   appended during a hand-over                     does not happen

Each subscription has a bounded buffer (`subscription.py`). Beyond the bound samples are dropped, oldest first, and
counted; one with `on_full="block"` makes the training thread wait instead (`Bus.is_blocked`). Milestones are never
dropped.
"""

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from offloop.engine.bus.step_times import StepTimes
from offloop.engine.bus.subscribers import Subscribers
from offloop.engine.bus.subscription import (
    BUFFER,
    Barrier,
    Drops,
    OnFull,
    Subscription,
    SubscriptionStatistics,
)
from offloop.engine.bus.waker import Waker
from offloop.engine.encoding import check_new
from offloop.engine.errors import BusClosedError, EventLoopStalledError
from offloop.engine.events import Event, Sample

logger = logging.getLogger("offloop")

FLUSH_INTERVAL: Final = 0.05
"""Seconds between hand-overs. An idle tick of 20 ms costs 1.3-1.9 % of a core; people still see 50 ms as "now"."""
WAKES_PER_SECOND: Final = 20
"""Milestones a second that wake the event loop at once; later ones wait for its pace. A wake costs 0.1 ms."""
MAX_WAITING_SAMPLES: Final = 100_000
"""Events in the queue above which new samples are dropped: the event loop has stalled for a long time."""
MAX_WAITING: Final = 1_000_000
"""Events in the queue at which publishing fails; about 0.5 GB."""
STALL_WARNING: Final = 5.0
"""Seconds without a hand-over after which the event loop's stack is logged."""
HAND_OVER_AT_ONCE: Final = 10_000
"""Events taken out in one go, so that a backlog does not hold the event loop for long (about 5 ms)."""

E = TypeVar("E", bound=Event)
_set = msgspec.structs.force_setattr


class Clock:
    """Unix time in seconds that never runs backwards. Any thread."""

    def __init__(self) -> None:
        self.offset = time.time() - time.perf_counter()

    def __call__(self) -> float:
        return self.offset + time.perf_counter()


class Bus:
    """Carries the events of one run from any thread to its subscribers, while `drain` runs on an event loop."""

    def __init__(
        self,
        *,
        run_id: str = "",
        flush_interval: float = FLUSH_INTERVAL,
        begins_with: type[Event] | None = None,
        attention: Callable[[], None] | None = None,
        keep: Callable[[Event], None] | None = None,
    ) -> None:
        """Make a bus; nothing runs until `drain` does.

        Args:
            run_id: Written into events that come without one.
            flush_interval: Seconds between hand-overs, > 0.
            begins_with: Class of the event that is handed over first: those that other threads publish before it wait
                for it, and follow it. None: no event waits.
            attention: Called, from any thread, when `is_blocked` has changed and when the bus notices that its
                event loop is gone. Must not block.
            keep: Called, from any thread, with each milestone before it is appended, to take out of it what does not
                travel with events. Must not block; what it raises, the publisher gets.
        """
        if not flush_interval > 0:
            raise ValueError(f"flush_interval must be above 0 seconds, got {flush_interval}")
        self.run_id = run_id
        self.flush_interval = flush_interval
        self.clock = Clock()
        self.step_times = StepTimes(self.clock.offset)
        self.loop_is_gone = False  # written by the publisher that notices it, read by the training thread
        self._attention = attention or (lambda: None)
        self._keep = keep or (lambda event: None)
        self._waker = Waker()  # waits in the drainer's event loop, woken by any thread
        self._subscribers = Subscribers(self.clock, self._attention, self._waker)
        # Appended by every thread, emptied by the drainer: append and popleft are atomic in CPython.
        self._queue: deque[Event] = deque()
        self._refused = Drops("bus")  # samples that publishers dropped because the event loop had stalled
        # Set by the drainer before it sleeps until something comes, cleared by the publisher that wakes it. Two
        # publishers may both wake it, which is harmless. The drainer looks at the queue after it has set it, so it
        # misses no event of a publisher that came too early to see it.
        self._armed = False
        # Written by the drainer, and by the publisher that wakes it from idle; read by publishers.
        self._handed_over_at = self.clock()
        self._stall_logged = False  # set by the publisher that logs, cleared by the drainer
        # Written by all publishers without a lock: a count that is lost costs one wake too many.
        self._wake_window = 0.0  # start of the second in which wakes are counted
        self._wakes = 0
        # Written by the thread that closes: the final event first, then the flag that publishers and drainer read.
        self._final: Event | None = None
        self._closing = False
        # The rest belongs to the drainer.
        self._begins_with = begins_with  # None once that event has come
        self._done = False  # it has handed over everything
        self._napping: anyio.CancelScope | None = None  # while it sleeps for its pace
        self._idling: anyio.Event | None = None  # while it sleeps until something comes
        self._seq = 0
        self._last: Event | None = None  # the last training event: foreign ones get its position
        self._last_time = 0.0

    # Publishing: any thread, never waits

    def publish(self, event: Event) -> None:
        """Check an event, stamp its time and append it to the run's events.

        Raises:
            EventError: A field is no plain value, or this very event was published before.
            BusClosedError: The bus has ended.
            EventLoopStalledError: A million events wait for the event loop.
        """
        self.prepare(event)
        self.emit(event)

    def publish_or_log(self, event: Event) -> None:
        """Publish an event, or log it if the run has ended: for threads that may finish their work later."""
        try:
            self.publish(event)
        except BusClosedError:
            logger.info("%s came after the end of the run", event)

    def prepare(self, event: Event) -> None:
        """Check an event and stamp its time, without appending it. Raises like `publish`."""
        if self._closing:
            raise BusClosedError(f"{type(event).__name__} was published after the run had ended")
        check_new(event)
        _set(event, "time", self.clock())

    def emit(self, event: Event) -> None:
        """Append an event that is valid and has its time: one of the training loop, or one that was prepared.

        Raises:
            EventLoopStalledError: A million events wait for the event loop.
        """
        queue = self._queue
        if len(queue) >= MAX_WAITING_SAMPLES and self._apply_overflow_policy(event):
            return
        is_milestone = not isinstance(event, Sample)
        if is_milestone:
            self._keep(event)
        queue.append(event)
        if is_milestone or self._armed:
            self._wake_for(event)
        elif event.time - self._handed_over_at > STALL_WARNING:
            self._log_stall(event.time)

    def put_barrier(self, subscription: Subscription[Event], on_reached: Callable[[], object]) -> None:
        """Put a barrier into the stream of a subscription, behind all events published so far."""
        self._queue.append(Barrier(subscription, on_reached))  # type: ignore[arg-type]  # told apart by the drainer
        self._waker.wake()

    def _wake_for(self, event: Event) -> None:
        now = event.time
        if self._armed:
            # It was idle, not stalled. Set first: other publishers look at it once the bus is armed no more.
            self._handed_over_at = now
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

    def _apply_overflow_policy(self, event: Event) -> bool:
        """Drop a sample, or fail beyond the hard limit; True if the event was dropped."""
        if isinstance(event, Sample):
            self._refused.add(1, event, event)
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
        """Log once per stall what holds the event loop: a handler that never returns appears nowhere else."""
        thread = self._subscribers.thread
        if self._stall_logged or thread is None:
            return
        self._stall_logged = True
        frame = sys._current_frames().get(thread)
        if frame is None:
            self.loop_is_gone = True
            self._attention()
            logger.error("the event loop's thread is gone: this run's events are no longer delivered")
            return
        stack = "".join(traceback.format_stack(frame))
        waited = now - self._handed_over_at
        logger.warning("the event loop has taken no events for %.1f s; it is here:\n%s", waited, stack)

    # Subscribing: any thread

    def subscribe(
        self,
        types: tuple[type[E], ...],
        *,
        name: str = "subscriber",
        buffer: int = BUFFER,
        on_full: OnFull = "drop_oldest",
        replay: bool = False,
        owner: str = "",
        sample_interval: float = 0.0,
    ) -> Subscription[E]:
        """Subscribe to events of the given classes and their subclasses. Does not block beyond a hand-over in progress.

        Args:
            types: Event classes; none to receive only barriers.
            name: Shown in statistics and in `EventsDropped`.
            buffer: Samples held, at least 1; with 1 it is "latest only". Milestones come on top.
            on_full: `"drop_oldest"`, or `"block"`: training waits until there is room.
            replay: Begin with the milestones so far (the last 100,000, up to 64 MiB).
            owner: The callback that reads it outside its handlers, if one does.
            sample_interval: Least seconds between two times at which samples alone wake the subscriber.

        Raises:
            BusClosedError: The bus has ended and there is no replay.
        """
        subscription: Subscription[E] = Subscription(
            self._subscribers,
            types,
            name=name,
            buffer=buffer,
            on_full=on_full,
            owner=owner,
            sample_interval=sample_interval,
        )
        self._subscribers.add(subscription, replay=replay)
        return subscription

    @property
    def subscriptions(self) -> tuple[SubscriptionStatistics, ...]:
        """What each subscriber received and missed so far. Any thread."""
        return self._subscribers.statistics

    def is_awaited_by(self, owner: str) -> bool:
        """True if a callback waits for its own subscription and no event is on its way. Event loop only."""
        return not self._queue and self._subscribers.is_starved(owner)

    @property
    def has_ended(self) -> bool:
        """True when nothing is handed over any more. Any thread."""
        return self._subscribers.has_ended

    @property
    def is_blocked(self) -> bool:
        """True while a subscription with `on_full="block"` is over its bound. Any thread."""
        return self._subscribers.has_blocking

    def unblock(self) -> None:
        """Let every subscription drop from now on: the training thread must not wait any longer. Any thread."""
        self._subscribers.unblock()

    # Draining: the event loop

    async def drain(self) -> None:
        """Hand events over until the bus is closed and empty. Two tasks, on the event loop.

        Cancellation: ends the bus; events still in the queue are lost.
        """
        self._subscribers.thread = threading.get_ident()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen)
                await self._hand_over_at_pace()
                # Wake the listener rather than cancel it: the cancellation's traceback would form a cycle that keeps
                # the run alive.
                self._done = True
                self._waker.wake()
        finally:
            self.end()

    def begin(self) -> None:
        """Hand over what waits for the first event, also if that has not come: it will not any more. Event loop."""
        if self._begins_with is not None:
            _put_first(self._queue, self._begins_with)
        self._begins_with = None
        self._waker.wake()

    async def _hand_over_at_pace(self) -> None:
        while True:
            if self._subscribers.has_leaving:
                self._subscribers.reap()
            if self._hand_over():
                if len(self._queue) >= HAND_OVER_AT_ONCE:
                    # A backlog: no pause, but let other tasks run.
                    await anyio.lowlevel.checkpoint()
                elif not self._closing:
                    await self._nap()
            elif self._closing:
                self._report_drops(self.clock(), at_end=True)
                if not self._queue:
                    break
            else:
                self._subscribers.rest()
                self._armed = True
                if not (self._has_events() or self._closing or self._subscribers.has_leaving):
                    self._idling = anyio.Event()
                    await self._idling.wait()
                    self._idling = None
                self._armed = False
        if self._final is not None:
            # Before what another thread may be publishing right now.
            self._queue.appendleft(self._final)
            self._hand_over(limit=1)

    async def _nap(self) -> None:
        """Sleep until the next hand-over is due, unless `_listen` ends the sleep.

        A sleep that ends by itself takes a third of the time of a wait for the socket with a deadline, which
        dominated a hand-over.
        """
        with anyio.CancelScope() as self._napping:
            await anyio.sleep(self.flush_interval)
        self._napping = None

    async def _listen(self) -> None:
        """React to wakes from other threads. A drainer that does not sleep is about to look by itself."""
        while not self._done:
            await self._waker.wait()
            if self._idling is not None:
                self._idling.set()
            elif self._napping is not None:
                if self._closing or self._subscribers.has_leaving or len(self._queue) >= HAND_OVER_AT_ONCE:
                    self._napping.cancel()
                else:
                    # A milestone came. The pace stays as it was.
                    self._hand_over()

    def close(self, last: Event | None = None) -> None:
        """Let the drainer hand over what is there and end. Any thread; twice is fine; does not wait.

        Args:
            last: Published as the last event of all, after the reports of drops and whatever other threads publish
                meanwhile.
        """
        if last is not None:
            self.prepare(last)
            self._final = last
        self._closing = True
        self._waker.wake()

    def end(self) -> None:
        """End at once; events in the queue are lost. Event loop, or any thread once the event loop is gone."""
        self._subscribers.end()

    def _hand_over(self, limit: int | None = None) -> int:
        """Take out what has gathered, number it, and put it into the buffers. Returns how many there were."""
        queue = self._queue
        count = min(len(queue), limit or HAND_OVER_AT_ONCE) if self._has_events() else 0
        now = self.clock()
        self._handed_over_at = now
        self._stall_logged = False
        if count:
            take = queue.popleft
            batch = [take() for _ in range(count)]
            barriers: list[tuple[int, Barrier]] = []
            milestones = self._stamp(batch, barriers)
            self._subscribers.hand_over(batch, barriers, milestones)
            self.step_times.take(batch, has_milestones=bool(milestones))
        self._report_drops(now)
        return count

    def _has_events(self) -> bool:
        """Return whether there is something to hand over: nothing before the first event of all."""
        if self._begins_with is not None:
            if not _put_first(self._queue, self._begins_with) and not self._closing:
                return False
            self._begins_with = None
        return bool(self._queue)

    def _stamp(self, batch: list[Event], barriers: list[tuple[int, Barrier]]) -> list[Event]:
        """Number the events, give foreign ones their position, and return the milestones.

        Args:
            batch: Events and barriers, in order.
            barriers: The barriers of the batch are appended here, each with its place.
        """
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
            elif last is None or event.step >= last.step:
                # Otherwise the event is about an earlier step.
                last = event
            if event.time < last_time:
                # Threads may append in another order than they read the clock.
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

    def _report_drops(self, now: float, *, at_end: bool = False) -> None:
        reports = self._subscribers.report_drops(now, at_end=at_end)
        if (refused := self._refused.report(now, at_end=at_end)) is not None:
            reports.append(refused)
        self._queue.extend(reports)


def _put_first(queue: deque[Event], first: type[Event]) -> bool:
    """Put the event that a run begins with first, and return whether it has come. Others may append meanwhile."""
    waiting = [queue.popleft() for _ in range(len(queue))]
    waiting.sort(key=lambda event: not isinstance(event, first))
    queue.extendleft(reversed(waiting))
    return bool(waiting) and isinstance(waiting[0], first)
