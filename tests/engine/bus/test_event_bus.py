"""event_bus.py: order, pace, bounds and the end, from plain threads and on every event loop, without a trainer."""

import contextlib
import functools
import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offloop.engine.bus import event_bus as bus_module
from offloop.engine.bus import subscription as subscription_module
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.subscription import Barrier, OnFull, Subscription
from offloop.engine.errors import (
    BusClosedError,
    EventError,
    EventLoopStalledError,
    SubscriberTooSlowError,
)
from offloop.engine.events import (
    EpochEnd,
    EpochStart,
    Event,
    EventsDropped,
    Sample,
    StepEnd,
    TrainEnd,
    TrainStart,
)


class Note(Event, frozen=True):
    """A milestone of the tests'."""

    number: int = 0
    author: int = 0


class Tick(Sample, frozen=True):
    """A sample of the tests'."""

    number: int = 0
    author: int = 0


AnyBus = TypeVar("AnyBus", bound=Bus)


@pytest.fixture
def bus() -> Iterator[Bus]:
    """A bus that no event loop drains: the test calls `hand_over`."""
    bus = Bus(run_id="r")
    yield bus
    bus.end()


@contextlib.asynccontextmanager
async def running(bus: AnyBus) -> AsyncIterator[AnyBus]:
    """Drain a bus during the body, and close it afterwards."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.drain)
        yield bus
        bus.close()


def hand_over(bus: Bus) -> None:
    """Do what the drainer of a closed bus does: hand over everything, reports of drops included."""
    while bus._hand_over():
        pass
    bus._report_drops(bus.clock(), at_end=True)
    bus._hand_over()


def step(number: int) -> StepEnd:
    return StepEnd(loss=0.0, lr=0.1, step=number, batch=number, epoch=0)


def in_threads(*functions: Callable[[], object]) -> None:
    """Run functions at the same time, each in a plain thread, and wait for all; raises what one raised."""
    ready = threading.Barrier(len(functions))
    failures: list[BaseException] = []

    def work(function: Callable[[], object]) -> None:
        ready.wait()
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def count_wakes(bus: Bus) -> list[int]:
    """Have the bus's wakes counted in the one number of the returned list."""
    wakes, wake = [0], bus._waker.wake

    def counted() -> None:
        wakes[0] += 1
        wake()

    bus._waker.wake = counted  # type: ignore[method-assign]  # a spy
    return wakes


def set_clock(bus: Bus, now: float) -> None:
    bus.clock = bus._subscribers.clock = lambda: now  # type: ignore[assignment]  # a manual clock


def publish_numbered(bus: Bus, event_class: type[Note | Tick], count: int, author: int = 0) -> None:
    for number in range(count):
        bus.publish(event_class(number=number, author=author))


def numbers(events: Sequence[Event]) -> list[int]:
    return [event.number for event in events if isinstance(event, Note | Tick)]


# Order and stamps ----------------------------------------------------------------------------------


def test_events_are_numbered_in_publishing_order_without_gaps(bus: Bus) -> None:
    everything = bus.subscribe((Event,))
    in_threads(*(functools.partial(publish_numbered, bus, Tick, 500, author) for author in range(8)))
    hand_over(bus)
    events = everything.take()
    assert [event.seq for event in events] == list(range(4000))
    for author in range(8):
        by_author = [event for event in events if isinstance(event, Tick) and event.author == author]
        assert numbers(by_author) == list(range(500))


def test_foreign_events_get_the_position_of_the_last_training_event(bus: Bus) -> None:
    everything = bus.subscribe((Event,))
    bus.publish(Note())
    bus.publish(StepEnd(loss=0.0, lr=0.1, epoch=2, step=7, batch=9))
    hand_over(bus)
    bus.publish(Note())
    bus.publish(StepEnd(loss=0.0, lr=0.1, epoch=2, step=8, batch=10))
    bus.publish(Note())
    hand_over(bus)
    positions = [(event.epoch, event.step, event.batch) for event in everything.take()]
    assert positions == [(0, 0, 0), (2, 7, 9), (2, 7, 9), (2, 8, 10), (2, 8, 10)]


def test_foreign_event_about_an_earlier_step_moves_nobody_else_back(bus: Bus) -> None:
    everything = bus.subscribe((Event,))
    bus.publish(StepEnd(loss=0.0, lr=0.1, epoch=2, step=8, batch=10))
    bus.publish(Note(epoch=1, step=5, batch=6))
    bus.publish(Note())
    hand_over(bus)
    positions = [(event.epoch, event.step, event.batch) for event in everything.take()]
    assert positions == [(2, 8, 10), (1, 5, 6), (2, 8, 10)]


def test_time_never_runs_backwards(bus: Bus) -> None:
    """Threads may append in another order than they read the clock, and a late StepEnd tells its launch."""
    everything = bus.subscribe((Event,))
    for time in (5.0, 3.0, 6.0):
        bus.emit(StepEnd(loss=0.0, lr=0.1, time=time))
    hand_over(bus)
    bus.emit(StepEnd(loss=0.0, lr=0.1, time=4.0))
    hand_over(bus)
    assert [event.time for event in everything.take()] == [5.0, 5.0, 6.0, 6.0]


def test_run_id_is_filled_in_where_there_is_none(bus: Bus) -> None:
    everything = bus.subscribe((Event,))
    bus.publish(Note())
    bus.publish(Note(run_id="another"))
    hand_over(bus)
    assert [event.run_id for event in everything.take()] == ["r", "another"]


def test_subscription_gets_its_classes_and_their_subclasses(bus: Bus) -> None:
    everything, samples, two = (
        bus.subscribe((Event,)),
        bus.subscribe((Sample,)),
        bus.subscribe((Note, EpochEnd)),
    )
    for event in (Note(), Tick(), EpochStart(), step(1), EpochEnd()):
        bus.publish(event)
    hand_over(bus)
    assert [type(event) for event in everything.take()] == [Note, Tick, EpochStart, StepEnd, EpochEnd]
    assert [type(event) for event in samples.take()] == [Tick, StepEnd]
    assert [type(event) for event in two.take()] == [Note, EpochEnd]


# What is refused -----------------------------------------------------------------------------------


def test_event_published_twice_is_refused(bus: Bus) -> None:
    event = Note()
    bus.publish(event)
    with pytest.raises(EventError, match="Note was published before: make a new event"):
        bus.publish(event)


def test_tensor_on_an_event_is_refused_in_the_publisher(bus: Bus) -> None:
    everything = bus.subscribe((Event,))
    with pytest.raises(EventError, match=r"EpochEnd\.metrics\['a'\] holds a Tensor"):
        bus.publish(EpochEnd(metrics={"a": torch.tensor(1.0)}))  # type: ignore[arg-type]  # that is the point
    hand_over(bus)
    assert everything.take() == []


def test_publishing_and_subscribing_after_the_end_is_refused(bus: Bus) -> None:
    bus.close()
    bus.close()
    with pytest.raises(BusClosedError, match="Note was published after the run had ended"):
        bus.publish(Note())
    bus.end()
    assert bus.has_ended
    with pytest.raises(BusClosedError, match="nothing left to subscribe to"):
        bus.subscribe((Event,))


def test_flush_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="flush_interval must be above 0 seconds, got 0"):
        Bus(flush_interval=0)


# Bounds --------------------------------------------------------------------------------------------


def test_full_buffer_drops_the_oldest_samples_and_no_milestone(bus: Bus) -> None:
    lagging = bus.subscribe((Note, Tick), buffer=3)
    for number in range(12):
        bus.publish((Note if number % 4 == 0 else Tick)(number=number))
        if number % 3 == 0:
            hand_over(bus)
    hand_over(bus)
    assert numbers(lagging.take()) == [0, 4, 8, 9, 10, 11]
    statistics = lagging.statistics
    assert (statistics.received, statistics.dropped, statistics.waiting) == (12, 6, 0)


def test_buffer_of_one_keeps_the_latest_only_and_reports_nothing(bus: Bus) -> None:
    latest, everything = bus.subscribe((StepEnd,), buffer=1), bus.subscribe((EventsDropped,))
    for number in range(5):
        bus.publish(step(number))
    hand_over(bus)
    assert [event.step for event in latest.take()] == [4]
    assert latest.statistics.dropped == 4
    assert everything.take() == []


def test_drops_are_reported_at_most_once_a_second_and_add_up(bus: Bus) -> None:
    reports = bus.subscribe((EventsDropped,))
    slow = bus.subscribe((StepEnd,), name="slow", buffer=2)

    def publish(numbers: range, now: float) -> None:
        set_clock(bus, now)
        for number in numbers:
            bus.publish(step(number))
        bus._hand_over()
        bus._hand_over()  # takes out the report that the first one may have put in

    publish(range(5), now=100.0)
    publish(range(5, 7), now=100.5)
    publish(range(7, 8), now=101.0)
    publish(range(8, 9), now=101.5)
    hand_over(bus)
    found = [
        (each.subscriber, each.count, each.total, each.first_step, each.last_step) for each in reports.take()
    ]
    assert found == [("slow", 3, 3, 0, 2), ("slow", 3, 6, 3, 5), ("slow", 1, 7, 6, 6)]
    assert slow.statistics.dropped == 7


def test_subscriber_too_many_milestones_behind_is_closed(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subscription_module, "MAX_MILESTONES_BEHIND", 10)
    lost, fine = bus.subscribe((Note,), name="lost", buffer=3), bus.subscribe((Note,))
    publish_numbered(bus, Note, 10)
    hand_over(bus)
    assert numbers(fine.take()) == list(range(10))
    bus.publish(Note(number=10))
    hand_over(bus)
    for _ in range(2):
        with pytest.raises(SubscriberTooSlowError, match="'lost' is 11 milestones behind") as raised:
            lost.take()
    assert (raised.value.subscriber, raised.value.milestones) == ("lost", 11)
    assert lost.statistics.closed
    assert "'lost' is 11 milestones behind" in caplog.text
    publish_numbered(bus, Note, 1)
    hand_over(bus)
    assert numbers(fine.take()) == [10, 0]


def test_take_with_a_limit_leaves_the_rest_in_place(bus: Bus) -> None:
    subscription = bus.subscribe((Note, Tick), buffer=2)
    for number in range(4):
        bus.publish((Tick if number % 2 else Note)(number=number))
    hand_over(bus)
    assert numbers(subscription.take(3)) == [0, 1, 2]
    for number in range(4, 7):  # 3 is still there: of four samples the oldest two go
        bus.publish(Tick(number=number))
    hand_over(bus)
    assert numbers(subscription.take(10)) == [5, 6]
    assert subscription.take(10) == []


def test_statistics_tell_lag_and_what_waits(bus: Bus) -> None:
    subscription = bus.subscribe((Note,), name="mine", buffer=7)
    set_clock(bus, 100.0)
    publish_numbered(bus, Note, 2)
    hand_over(bus)
    assert bus.subscriptions[0].waiting == 2
    set_clock(bus, 103.0)
    subscription.take()
    (statistics,) = bus.subscriptions
    assert (statistics.name, statistics.buffer, statistics.lag) == ("mine", 7, 3.0)
    assert (statistics.received, statistics.waiting, statistics.closed) == (2, 0, False)
    assert statistics.on_full == "drop_oldest"


# Back-pressure -------------------------------------------------------------------------------------


@pytest.fixture
def looked_up() -> list[None]:
    """Grows each time a bus asks for attention."""
    return []


@pytest.fixture
def blocking(looked_up: list[None]) -> Iterator[Bus]:
    bus = Bus(attention=lambda: looked_up.append(None))
    yield bus
    bus.end()


def test_full_block_subscription_is_shown_and_loses_nothing(blocking: Bus, looked_up: list[None]) -> None:
    subscription = blocking.subscribe((Tick, Note), buffer=4, on_full="block")
    publish_numbered(blocking, Tick, 4)
    hand_over(blocking)
    assert not blocking.is_blocked and not looked_up
    blocking.publish(Tick(number=4))
    hand_over(blocking)
    assert blocking.is_blocked and len(looked_up) == 1
    publish_numbered(blocking, Note, 1)
    assert numbers(subscription.take(2)) == [0, 1]
    assert blocking.is_blocked  # still more than half full
    assert numbers(subscription.take(1)) == [2]
    assert not blocking.is_blocked and len(looked_up) == 2
    hand_over(blocking)
    assert numbers(subscription.take()) == [3, 4, 0]
    assert subscription.statistics.dropped == 0


def test_milestones_do_not_block(blocking: Bus) -> None:
    subscription = blocking.subscribe((Note,), buffer=1, on_full="block")
    publish_numbered(blocking, Note, 50)
    hand_over(blocking)
    assert not blocking.is_blocked and len(subscription.take()) == 50


def test_unblocking_turns_waiting_into_counted_drops(blocking: Bus, looked_up: list[None]) -> None:
    subscription = blocking.subscribe((Tick,), buffer=2, on_full="block")
    publish_numbered(blocking, Tick, 5)
    hand_over(blocking)
    assert blocking.is_blocked
    blocking.unblock()
    assert not blocking.is_blocked and len(looked_up) == 2
    blocking.publish(Tick(number=5))
    hand_over(blocking)
    assert not blocking.is_blocked
    assert numbers(subscription.take()) == [4, 5]
    assert subscription.statistics.dropped == 4


def test_block_subscription_that_is_closed_holds_nobody_up(blocking: Bus, looked_up: list[None]) -> None:
    subscription = blocking.subscribe((Tick,), buffer=1, on_full="block")
    publish_numbered(blocking, Tick, 5)
    hand_over(blocking)
    assert blocking.is_blocked
    subscription.close()
    assert not blocking.is_blocked and len(looked_up) == 2


def test_block_subscription_that_fell_too_far_behind_holds_nobody_up(
    blocking: Bus, looked_up: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription_module, "MAX_MILESTONES_BEHIND", 10)
    subscription = blocking.subscribe((Event,), buffer=1, on_full="block")
    publish_numbered(blocking, Tick, 5)
    hand_over(blocking)
    assert blocking.is_blocked
    publish_numbered(blocking, Note, 11)
    hand_over(blocking)
    assert not blocking.is_blocked and len(looked_up) == 2
    assert subscription.statistics.closed


def test_end_of_the_bus_holds_nobody_up(blocking: Bus, looked_up: list[None]) -> None:
    subscription = blocking.subscribe((Tick,), buffer=1, on_full="block")
    publish_numbered(blocking, Tick, 5)
    hand_over(blocking)
    blocking.end()
    assert not blocking.is_blocked and len(looked_up) == 2
    assert subscription.statistics.closed


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_subscription_that_nobody_holds_any_more_has_ended() -> None:
    looked = anyio.Event()
    with anyio.fail_after(10):
        async with running(Bus(flush_interval=0.001, attention=lambda: looked.set())) as bus:
            publish_numbered(bus, Tick, 1)
            async for _ in bus.subscribe((Tick,), buffer=1, on_full="block", name="left"):
                publish_numbered(bus, Tick, 5)
                while not bus.is_blocked:
                    await anyio.lowlevel.checkpoint()
                looked = anyio.Event()
                break
            assert not bus.is_blocked and bus.subscriptions == ()
            await looked.wait()  # whoever waited for it is told
            assert not bus._subscribers._references


def test_signal_handler_may_unblock_while_the_bus_hands_over() -> None:
    """The second Ctrl-C interrupts the very thread that may be in the middle of a hand-over."""

    def interrupted() -> None:
        if held_up.is_blocked:
            held_up.unblock()

    held_up = Bus(attention=interrupted)
    subscription = held_up.subscribe((Tick,), buffer=2, on_full="block")
    publish_numbered(held_up, Tick, 5)
    in_threads(functools.partial(hand_over, held_up))
    assert subscription.on_full == "drop_oldest"
    held_up.end()


# Replay --------------------------------------------------------------------------------------------


def test_replay_begins_with_the_milestones_so_far(bus: Bus) -> None:
    publish_numbered(bus, Note, 3)
    publish_numbered(bus, Tick, 3)
    hand_over(bus)
    late, later = bus.subscribe((Event,), replay=True), bus.subscribe((Tick,), replay=True)
    bus.publish(Note(number=3))
    bus.publish(Tick(number=3))
    hand_over(bus)
    assert [(type(event).__name__, event.seq) for event in late.take()] == [
        ("Note", 0),
        ("Note", 1),
        ("Note", 2),
        ("Note", 6),
        ("Tick", 7),
    ]
    assert [event.seq for event in later.take()] == [7]


def test_replay_after_the_end_gives_what_there_was_and_ends(bus: Bus) -> None:
    publish_numbered(bus, Note, 3)
    hand_over(bus)
    bus.end()
    late = bus.subscribe((Note,), replay=True)
    assert numbers(late.take()) == [0, 1, 2]
    assert late.statistics.closed


# Barriers ---------------------------------------------------------------------------------------


def test_barrier_stands_in_its_subscription_between_the_events_around_it(bus: Bus) -> None:
    mine, other = bus.subscribe((Note,)), bus.subscribe((Event,))
    wakes = count_wakes(bus)
    bus.publish(Tick(number=0))
    bus.emit(step(3))
    assert wakes == [0]
    bus.put_barrier(mine, lambda: None)
    assert wakes == [1]
    bus.publish(Note(number=1))
    bus.put_barrier(mine, lambda: None)
    bus.publish(Note(number=2))
    hand_over(bus)
    kinds = [each if isinstance(each, Barrier) else each.number for each in mine.take()]
    assert [kind if isinstance(kind, int) else "barrier" for kind in kinds] == ["barrier", 1, "barrier", 2]
    assert [(event.seq, event.step) for event in other.take()] == [(0, 0), (1, 3), (2, 3), (3, 3)]


def test_subscription_to_nothing_gets_its_barriers(bus: Bus) -> None:
    nothing: Subscription[Event] = bus.subscribe((), name="decider", buffer=1, on_full="drop_oldest")
    publish_numbered(bus, Tick, 5)
    bus.put_barrier(nothing, lambda: None)
    publish_numbered(bus, Note, 5)
    hand_over(bus)
    assert [type(each).__name__ for each in nothing.take()] == ["Barrier"]


# Wakes and stalls ----------------------------------------------------------------------------------


def test_first_event_after_idle_wakes_once(bus: Bus) -> None:
    wakes = count_wakes(bus)
    bus._armed = True
    publish_numbered(bus, Tick, 100)
    assert wakes == [1]


def test_samples_ride_the_pace(bus: Bus) -> None:
    wakes = count_wakes(bus)
    publish_numbered(bus, Tick, 100)
    assert wakes == [0]


def test_milestones_wake_at_once_but_twenty_times_a_second_at_most(bus: Bus) -> None:
    wakes = count_wakes(bus)
    for now, expected in ((100.0, 20), (100.9, 20), (101.0, 40), (101.99, 40)):
        set_clock(bus, now)
        publish_numbered(bus, Note, 50)
        assert wakes == [expected]


class Holding:
    """A thread that stands in `hold_the_event_loop`, as an event loop does whose handler never returns."""

    def __init__(self) -> None:
        self._release = threading.Event()
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self.hold_the_event_loop)
        self.thread.start()
        self._ready.wait()

    def hold_the_event_loop(self) -> None:
        self._ready.set()
        self._release.wait()

    def let_go(self) -> None:
        self._release.set()
        self.thread.join()


def test_stack_of_a_stalled_event_loop_is_logged_once(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    holding = Holding()
    bus._subscribers.thread = holding.thread.ident
    for start in (1000.0, 2000.0):
        set_clock(bus, start)
        bus._hand_over()
        caplog.clear()
        set_clock(bus, start + 5.0)
        bus.publish(Tick())
        assert not caplog.records
        set_clock(bus, start + 5.5)
        for event in (Tick(), Note(), Tick()):
            bus.publish(event)
        (record,) = caplog.records
        assert "the event loop has taken no events for 5.5 s" in record.getMessage()
        assert "hold_the_event_loop" in record.getMessage()
    holding.let_go()
    assert not bus.loop_is_gone


def test_idle_is_no_stall(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    bus._subscribers.thread = threading.get_ident()
    set_clock(bus, bus.clock() + 100.0)
    bus._armed = True
    publish_numbered(bus, Tick, 2)
    assert not caplog.records


def test_two_that_publish_after_idle_see_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    """The second comes when the first has just taken the wake upon itself."""

    class Interrupted(Bus):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "_armed" and value is False and getattr(self, "_queue", None):
                self.publish(Tick(number=2))

    bus = Interrupted()
    bus._subscribers.thread = threading.get_ident()
    set_clock(bus, bus.clock() + 100.0)
    bus._armed = True
    bus.publish(Tick(number=1))
    assert len(bus._queue) == 2
    assert not caplog.records
    bus.end()


def test_event_loop_whose_thread_is_gone_is_told(blocking: Bus, looked_up: list[None]) -> None:
    holding = Holding()
    holding.let_go()
    blocking._subscribers.thread = holding.thread.ident
    set_clock(blocking, blocking.clock() + 100.0)
    blocking.publish(Tick())
    assert blocking.loop_is_gone
    assert len(looked_up) == 1


def test_event_loop_that_takes_nothing_costs_samples_then_the_run(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "MAX_WAITING_SAMPLES", 10)
    monkeypatch.setattr(bus_module, "MAX_WAITING", 20)
    everything = bus.subscribe((Event,))
    for number in range(15):
        bus.publish(step(number))
    assert bus._refused.total == 5
    publish_numbered(bus, Note, 10)
    with pytest.raises(EventLoopStalledError, match="20 events wait for the event loop"):
        bus.publish(Note())
    bus.publish(step(15))  # a sample is still only dropped
    hand_over(bus)
    events = everything.take()
    assert [event.step for event in events if isinstance(event, StepEnd)] == list(range(10))
    assert numbers(events) == list(range(10))
    report = events[-1]
    assert isinstance(report, EventsDropped)
    assert (report.subscriber, report.count, report.total) == ("bus", 6, 6)
    assert (report.first_step, report.last_step) == (10, 15)
    bus.publish(step(16))  # it is awake again
    hand_over(bus)
    assert [event.step for event in everything.take()] == [16]


# On an event loop ----------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_bus_works_on_its_own_from_a_plain_thread() -> None:
    with anyio.fail_after(10):
        async with running(Bus(flush_interval=0.001)) as bus:
            subscription = bus.subscribe((Tick,))

            def publish() -> None:
                publish_numbered(bus, Tick, 3000)
                bus.close()

            thread = threading.Thread(target=publish)
            thread.start()
            received = [event.number async for event in subscription]
            thread.join()
        assert received == list(range(3000))
        assert bus.has_ended


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_every_subscriber_sees_the_one_order_while_threads_publish() -> None:
    orders: dict[str, list[Event]] = {"first": [], "second": []}

    async def consume(name: str) -> None:
        async for event in subscriptions[name]:
            orders[name].append(event)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            subscriptions = {name: bus.subscribe((Event,), buffer=100_000) for name in orders}
            for name in orders:
                tasks.start_soon(consume, name)
            publishers = [functools.partial(publish_numbered, bus, Tick, 1000, author) for author in range(3)]
            publishers.append(functools.partial(publish_numbered, bus, Note, 300, 3))
            await anyio.to_thread.run_sync(in_threads, *publishers)
            bus.close()
    assert [event.seq for event in orders["first"]] == list(range(3300))
    assert orders["second"] == orders["first"]
    times = [event.time for event in orders["first"]]
    assert times == sorted(times)


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_milestone_is_handed_over_at_once_between_two_flushes() -> None:
    with anyio.fail_after(10):
        async with running(Bus(flush_interval=1000.0)) as bus:
            subscription = bus.subscribe((Note, Tick))
            while not bus._armed:
                await anyio.lowlevel.checkpoint()
            bus.publish(Tick(number=0))  # the first after idle: from here on there is a pace
            assert numbers(await subscription.take_batch()) == [0]
            await anyio.wait_all_tasks_blocked()
            bus.publish(Tick(number=1))
            await anyio.to_thread.run_sync(bus.publish, Note(number=2))
            assert numbers(await subscription.take_batch()) == [1, 2]
            await anyio.wait_all_tasks_blocked()
            bus.close()


@pytest.mark.anyio
async def test_idle_bus_wakes_nobody() -> None:
    with anyio.fail_after(10):
        async with running(Bus(flush_interval=0.001)) as bus:
            wakes = count_wakes(bus)
            subscription = bus.subscribe((Tick,))
            for rounds in (1, 2, 3):
                while not bus._armed:
                    await anyio.lowlevel.checkpoint()
                assert wakes == [rounds - 1]  # asleep, and nothing has woken it since the last event
                publish_numbered(bus, Tick, 10)
                received = 0
                while received < 10:
                    received += len(await subscription.take_batch())
                assert wakes == [rounds]


@pytest.mark.anyio
@pytest.mark.uvloop
@pytest.mark.parametrize("first_comes", [True, False])
async def test_events_wait_for_the_first_one_of_all_or_for_the_end(first_comes: bool) -> None:
    with anyio.fail_after(10):
        async with running(Bus(flush_interval=0.001, begins_with=TrainStart)) as bus:
            subscription = bus.subscribe((Note, Tick, TrainStart))
            bus.publish(Note(number=0))
            bus.publish(Tick(number=1))
            while not bus._armed:
                await anyio.lowlevel.checkpoint()
            assert subscription.take(10) == []
            if first_comes:
                await anyio.to_thread.run_sync(bus.publish, TrainStart(step=0, epoch=0, batch=0))
            else:
                bus.close()
            received: list[Event] = []
            while len(received) < 2 + first_comes:
                received += await subscription.take_batch()
            assert [type(event) for event in received] == [TrainStart] * first_comes + [Note, Tick]
            assert [event.seq for event in received] == list(range(2 + first_comes))


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["begin", "close"])
async def test_the_first_one_of_all_is_first_also_if_the_run_ends_before_anything_was_handed_over(
    end: str,
) -> None:
    """A short run on a busy machine."""
    bus = Bus(flush_interval=0.001, begins_with=TrainStart)
    subscription = bus.subscribe((Note, TrainStart))
    for event in (Note(number=0), TrainStart(step=0, epoch=0, batch=0), Note(number=1)):
        bus.publish(event)
    if end == "begin":
        bus.begin()
    bus.close()
    with anyio.fail_after(10):
        await bus.drain()
    assert [type(event) for event in subscription.take(10)] == [TrainStart, Note, Note]


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_subscriber_may_live_in_another_thread_and_event_loop(anyio_backend: Any) -> None:
    backend, options = anyio_backend

    async def consume(subscription: Subscription[Tick]) -> list[int]:
        with anyio.fail_after(10):
            return [event.number async for event in subscription]

    def elsewhere(bus: Bus) -> list[int]:
        with bus.subscribe((Tick,)) as subscription:
            subscribed.set()
            return anyio.run(consume, subscription, backend=backend, backend_options=options)

    received: list[int] = []

    async def wait_elsewhere() -> None:
        received.extend(await anyio.to_thread.run_sync(elsewhere, bus))

    subscribed = threading.Event()
    with anyio.fail_after(15):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            tasks.start_soon(wait_elsewhere)
            await anyio.to_thread.run_sync(subscribed.wait)
            for start in range(0, 100, 10):
                for number in range(start, start + 10):
                    bus.publish(Tick(number=number))
                await anyio.lowlevel.checkpoint()
            bus.close()
    assert received == list(range(100))


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_who_waits_for_milestones_is_not_woken_by_samples() -> None:
    woken: list[bool] = []

    async def wait_for_milestones(subscription: Subscription[Event]) -> None:
        while more := await subscription.wait(samples=False):
            woken.append(more)
            assert numbers(subscription.take()) == [0, 1, 2, 3]

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            subscription = bus.subscribe((Tick, Note))
            tasks.start_soon(wait_for_milestones, subscription)
            for number in range(3):
                bus.publish(Tick(number=number))
                while subscription.statistics.received <= number:
                    await anyio.lowlevel.checkpoint()
                await anyio.wait_all_tasks_blocked()
            assert woken == []
            bus.publish(Note(number=3))
            while not woken:
                await anyio.lowlevel.checkpoint()
            bus.close()
    assert woken == [True]


async def taken_by(subscription: Subscription[Event], batches: list[list[int]]) -> None:
    while await subscription.wait():
        batches.append(numbers(subscription.take()))


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_samples_alone_wake_a_subscriber_no_sooner_than_its_interval() -> None:
    batches: list[list[int]] = []
    bus = Bus()
    with anyio.fail_after(5):
        bus._subscribers.thread = threading.get_ident()
        subscription = bus.subscribe((Tick, Note), buffer=6, sample_interval=0.5)

        async def at(now: float, *events: Event) -> list[list[int]]:
            """Hand events over at a time, and return what was taken then."""
            batches.clear()
            set_clock(bus, now)
            for event in events:
                bus.publish(event)
            bus._hand_over()
            await anyio.wait_all_tasks_blocked()
            return list(batches)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(taken_by, subscription, batches)
            assert await at(10.0, Tick(number=0)) == [[0]]
            assert await at(10.4, Tick(number=1)) == []
            assert await at(10.6, Tick(number=2)) == [[1, 2]]
            # A milestone wakes it at once,
            assert await at(10.7, Tick(number=3)) == []
            assert await at(10.8, Note(number=4), Tick(number=5)) == [[3, 4, 5]]
            # a buffer that is more than half full,
            assert await at(10.9, *(Tick(number=number) for number in (6, 7, 8))) == []
            assert await at(10.9, Tick(number=9)) == [[6, 7, 8, 9]]
            # and the end.
            assert await at(11.0, Tick(number=10)) == []
            bus.end()
        assert batches == [[10]]
    assert subscription.statistics.dropped == 0


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_samples_reach_a_subscriber_with_an_interval_when_no_more_come() -> None:
    batches: list[list[int]] = []
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            subscription = bus.subscribe((Tick, Note), sample_interval=3600.0)
            tasks.start_soon(taken_by, subscription, batches)
            for number in range(3):
                bus.publish(Tick(number=number))
                while sum(map(len, batches)) <= number:
                    await anyio.lowlevel.checkpoint()
            bus.close()
    assert batches == [[0], [1], [2]]


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_who_waits_for_milestones_in_another_event_loop_has_all_samples_in_the_end(
    anyio_backend: Any,
) -> None:
    backend, options = anyio_backend
    batches: list[list[int]] = []

    async def consume(subscription: Subscription[Event]) -> None:
        with anyio.fail_after(10):
            while await subscription.wait(samples=False):
                batches.append(numbers(subscription.take()))

    async def wait_elsewhere(subscription: Subscription[Event]) -> None:
        await anyio.to_thread.run_sync(
            lambda: anyio.run(consume, subscription, backend=backend, backend_options=options)
        )

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            subscription = bus.subscribe((Tick, Note))
            tasks.start_soon(wait_elsewhere, subscription)
            for number in (0, 1):
                bus.publish(Tick(number=number))
            bus.publish(Note(number=2))
            while not batches:
                await anyio.lowlevel.checkpoint()
            bus.publish(Tick(number=3))
            bus.close()
    assert batches == [[0, 1, 2], [3]]


@pytest.mark.anyio
async def test_plain_thread_may_take() -> None:
    def poll(subscription: Subscription[Tick]) -> list[int]:
        taken: list[int] = []
        while not (ended := subscription.statistics.closed) or subscription.statistics.waiting:
            taken += numbers(subscription.take(7))
        assert ended
        return taken

    received: list[int] = []

    async def wait_for_thread(subscription: Subscription[Tick]) -> None:
        received.extend(await anyio.to_thread.run_sync(poll, subscription))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            tasks.start_soon(wait_for_thread, bus.subscribe((Tick,)))
            await anyio.to_thread.run_sync(publish_numbered, bus, Tick, 500)
            bus.close()
    assert received == list(range(500))


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_closing_from_another_thread_ends_a_waiting_iteration() -> None:
    """Its task waits in the drainer's event loop, which nothing but that thread may touch."""
    async with anyio.create_task_group() as tasks, running(Bus(flush_interval=1000.0)) as bus:
        subscription, ended = bus.subscribe((Tick,)), anyio.Event()

        async def consume() -> None:
            assert [event async for event in subscription] == []
            ended.set()

        tasks.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(subscription.close)
        await anyio.to_thread.run_sync(subscription.close)
        with anyio.fail_after(5):
            await ended.wait()
        assert bus.subscriptions == ()


@pytest.mark.anyio
async def test_closing_in_the_event_loop_ends_a_waiting_iteration() -> None:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks, running(Bus()) as bus:
            async with bus.subscribe((Tick,)) as subscription:

                async def consume() -> None:
                    assert [event async for event in subscription] == []

                tasks.start_soon(consume)
                await anyio.wait_all_tasks_blocked()


@pytest.mark.anyio
async def test_subscribing_before_the_bus_runs_misses_nothing() -> None:
    bus = Bus(flush_interval=0.001)
    subscription = bus.subscribe((Tick,))
    publish_numbered(bus, Tick, 3)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:

            async def consume() -> None:
                assert [event.number async for event in subscription] == [0, 1, 2, 3]

            tasks.start_soon(consume)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(bus.drain)
            bus.publish(Tick(number=3))
            bus.close()


@pytest.mark.anyio
async def test_subscribing_and_unsubscribing_while_publishing_loses_nothing_in_between() -> None:
    """Whoever is subscribed for a while gets a stretch of the run without a hole."""
    stretches: list[list[int]] = []

    def come_and_go(bus: Bus) -> None:
        while len(stretches) < 15:
            with bus.subscribe((Event,), buffer=1_000_000) as subscription:
                while not (events := subscription.take()) and len(stretches) < 15:
                    pass
            if events:
                stretches.append([event.seq for event in events])

    def publish(bus: Bus) -> None:
        while len(stretches) < 15:
            if len(bus._queue) < 1000:
                bus.publish(Tick())

    with anyio.fail_after(30):
        async with running(Bus(flush_interval=0.001)) as bus:
            stays = bus.subscribe((Event,), buffer=1_000_000)
            functions = [functools.partial(each, bus) for each in (come_and_go, come_and_go, publish)]
            await anyio.to_thread.run_sync(in_threads, *functions)
            bus.close()
        seqs = [event.seq async for event in stays]
        assert seqs == list(range(len(seqs)))
    for stretch in stretches:
        assert stretch == list(range(stretch[0], stretch[-1] + 1))


@pytest.mark.anyio
async def test_cancelled_wait_loses_nothing() -> None:
    with anyio.fail_after(5):
        async with running(Bus(flush_interval=0.001)) as bus:
            subscription = bus.subscribe((Tick,))
            with anyio.CancelScope() as scope:
                scope.cancel()
                await subscription.take_batch()
            assert scope.cancelled_caught
            publish_numbered(bus, Tick, 2)
            received: list[int] = []
            while len(received) < 2:
                received += numbers(await subscription.take_batch(1))
            assert received == [0, 1]


@pytest.mark.anyio
async def test_what_was_published_before_the_end_is_handed_over() -> None:
    with anyio.fail_after(5):
        async with running(Bus(flush_interval=1000.0)) as bus:
            subscription = bus.subscribe((Event,))
            small = bus.subscribe((Tick,), name="small", buffer=2)
            await anyio.wait_all_tasks_blocked()
            publish_numbered(bus, Tick, 5)
            bus.close()
        received = [event async for event in subscription]
        assert numbers(received) == list(range(5))
        assert [type(event) for event in received[5:]] == [EventsDropped]
        assert [event.number async for event in small] == [3, 4]
        assert subscription.statistics.closed and not bus.is_blocked


@pytest.mark.anyio
async def test_drops_of_the_last_second_are_reported_before_the_end() -> None:
    with anyio.fail_after(5):
        async with running(Bus(flush_interval=0.001)) as bus:
            set_clock(bus, 1000.0)  # always the same second
            reports = bus.subscribe((EventsDropped,))
            small = bus.subscribe((Tick,), name="small", buffer=2)
            publish_numbered(bus, Tick, 5)
            assert [each.count for each in await reports.take_batch()] == [3]
            publish_numbered(bus, Tick, 5)
            while small.statistics.dropped < 8:
                await anyio.lowlevel.checkpoint()
            bus.close()
        assert [(each.count, each.total) async for each in reports] == [(5, 8)]


@pytest.mark.anyio
async def test_event_published_while_the_drainer_falls_asleep_is_not_left_lying() -> None:
    class Interrupted(Bus):
        interruptions = 0

        def __setattr__(self, name: str, value: object) -> None:
            if name == "_armed" and value is True and self.interruptions < 3:
                self.interruptions += 1
                self.publish(Tick(number=self.interruptions))  # too early to see that it has to wake
            super().__setattr__(name, value)

    with anyio.fail_after(5):
        async with running(Interrupted(flush_interval=0.001)) as bus:
            subscription = bus.subscribe((Tick,))
            received: list[int] = []
            while len(received) < 3:
                received += numbers(await subscription.take_batch())
        assert received == [1, 2, 3]


@pytest.mark.anyio
async def test_nothing_comes_after_the_last_event_however_late_it_was_checked() -> None:
    """A thread may have passed the check for the end and append only now."""

    class Raced(Bus):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_final" and value is not None:
                self.emit(Note(time=1.0))
            return value

    with anyio.fail_after(5):
        async with running(Raced(flush_interval=0.001)) as bus:
            everything = bus.subscribe((Event,))
            bus.close(last=TrainEnd(status="completed"))
        assert [type(event) async for event in everything] == [TrainEnd]


@pytest.mark.anyio
async def test_last_event_comes_after_everything_else() -> None:
    """Other threads publish until they are refused, and the reports of drops come before it too."""

    def publish_until_closed() -> None:
        started.set()
        with pytest.raises(BusClosedError):
            while True:
                bus.publish(Note())
                while (
                    len(bus._queue) > 1000 and not bus._closing
                ):  # what is beyond the bounds would be dropped
                    os.sched_yield()

    started = threading.Event()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks, running(Bus(flush_interval=0.001)) as bus:
            everything = bus.subscribe((Event,), buffer=1_000_000)
            small = bus.subscribe((Tick,), name="small", buffer=2)
            tasks.start_soon(anyio.to_thread.run_sync, publish_until_closed)
            await anyio.to_thread.run_sync(started.wait)
            publish_numbered(bus, Tick, 5)
            bus.close(last=TrainEnd(status="completed"))
            bus.close()
    events = [event async for event in everything]
    assert [event.seq for event in events] == list(range(len(events)))
    assert isinstance(events[-1], TrainEnd)
    assert reported(events) == small.statistics.dropped == 3


def reported(events: Sequence[Event]) -> int:
    """Return how many drops were reported. In how many reports depends on where the hand-overs part the samples."""
    return sum(each.count for each in events if isinstance(each, EventsDropped))


@pytest.mark.anyio
async def test_drops_of_several_hand_overs_are_all_reported_before_the_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bus_module, "HAND_OVER_AT_ONCE", 3)
    with anyio.fail_after(5):
        async with running(Bus(flush_interval=1000.0)) as bus:
            everything = bus.subscribe((Event,))
            small = bus.subscribe((Tick,), name="small", buffer=2)
            await anyio.wait_all_tasks_blocked()
            publish_numbered(bus, Tick, 5)
            bus.close(last=TrainEnd(status="completed"))
        events = [event async for event in everything]
        assert [type(event) for event in events[5:]] == [EventsDropped, EventsDropped, TrainEnd]
        assert reported(events) == small.statistics.dropped == 3


@pytest.mark.anyio
async def test_cancelled_drainer_ends_the_bus() -> None:
    bus = Bus()
    subscription = bus.subscribe((Tick,))
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.drain)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert bus.has_ended
        assert [event async for event in subscription] == []


@pytest.mark.anyio
async def test_slow_subscriber_does_not_keep_another_from_its_events() -> None:
    with anyio.fail_after(5):
        async with running(Bus(flush_interval=0.001)) as bus:
            bus.subscribe((Event,), buffer=10)  # never takes anything
            quick = bus.subscribe((Tick,))
            received: list[int] = []
            for start in range(0, 100, 20):
                publish_numbered(bus, Tick, 20, author=start)
                while len(received) < start + 20:
                    received += numbers(await quick.take_batch())
            assert received == list(range(20)) * 5


@pytest.mark.anyio
async def test_backlog_is_handed_over_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks get their turn while a backlog goes out."""
    monkeypatch.setattr(bus_module, "HAND_OVER_AT_ONCE", 10)
    bus = Bus(flush_interval=0.001)
    publish_numbered(bus, Tick, 100)
    seen: list[int] = []

    async def watch() -> None:
        while len(bus._queue) > 10:
            seen.append(len(bus._queue))
            await anyio.lowlevel.checkpoint()
        bus.close()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.drain)
            tasks.start_soon(watch)
    assert len(set(seen)) >= 3


def test_bus_that_never_ran_leaves_nothing_behind() -> None:
    """Without a warning either: those are errors here."""
    bus = Bus()
    bus.subscribe((Event,))
    gone = weakref.ref(bus)
    del bus
    gc.collect()
    assert gone() is None


# Generated schedules -------------------------------------------------------------------------------


class Model:
    """What a subscription must hold: events as (seq-independent) identities, dropped by the stated rule."""

    def __init__(self, subscription: Subscription[Any], wants: tuple[type[Event], ...]) -> None:
        self.subscription = subscription
        self.wants = wants
        self.waiting: list[Event] = []
        self.received = self.taken = self.dropped = 0
        self.is_full = False

    def put(self, events: list[Event]) -> None:
        mine = [event for event in events if isinstance(event, self.wants)]
        self.received += len(mine)
        self.waiting += mine
        if not mine:
            return
        samples = [event for event in self.waiting if isinstance(event, Sample)]
        if self.subscription.on_full == "block":
            self.is_full = self.is_full or len(samples) > self.subscription.buffer
            return
        too_old = samples[: max(0, len(samples) - self.subscription.buffer)]
        self.waiting = [event for event in self.waiting if not any(event is each for each in too_old)]
        self.dropped += len(too_old)

    def take(self, limit: int | None) -> list[Event]:
        taken, self.waiting = self.waiting[:limit], self.waiting[len(self.waiting[:limit]) :]
        self.is_full = self.is_full and len(self.waiting) > self.subscription.buffer // 2
        self.taken += len(taken)
        return taken

    @property
    def is_blocking(self) -> bool:
        return self.is_full and self.subscription.on_full == "block"


class BusMachine(RuleBasedStateMachine):
    """Publish, subscribe, unsubscribe, overflow and take in any order, against a model."""

    @initialize()
    def begin(self) -> None:
        self.bus = Bus()
        self.everything = self.bus.subscribe((Event,), buffer=1_000_000)
        self.queued: list[Event] = []
        self.milestones: list[Event] = []
        self.models: list[Model] = []
        self.count = 0

    @rule(event_class=st.sampled_from([Note, Tick]), count=st.integers(1, 6))
    def publish(self, event_class: type[Note | Tick], count: int) -> None:
        for _ in range(count):
            event = event_class(number=self.count)
            self.count += 1
            self.bus.publish(event)
            self.queued.append(event)

    @rule()
    def hand_over(self) -> None:
        self.bus._hand_over()
        for model in self.models:
            model.put(self.queued)
        self.milestones += [event for event in self.queued if isinstance(event, Note)]
        self.queued = []

    @rule(
        wants=st.sampled_from([(Note, Tick), (Note,), (Tick,)]),
        buffer=st.integers(1, 5),
        on_full=st.sampled_from(["drop_oldest", "block"]),
        replay=st.booleans(),
    )
    def subscribe(self, wants: tuple[type[Event], ...], buffer: int, on_full: OnFull, replay: bool) -> None:
        subscription = self.bus.subscribe(wants, buffer=buffer, on_full=on_full, replay=replay)
        self.models.append(Model(subscription, wants))
        if replay:
            self.models[-1].put(self.milestones)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), limit=st.none() | st.integers(1, 8))
    def take(self, data: st.DataObject, limit: int | None) -> None:
        model = data.draw(st.sampled_from(self.models))
        expected, taken = model.take(limit), model.subscription.take(limit)
        assert [id(event) for event in taken] == [id(event) for event in expected]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def unsubscribe(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.models))
        self.models.remove(model)
        model.subscription.close()

    @rule()
    def unblock(self) -> None:
        self.bus.unblock()

    @invariant()
    def counts_add_up(self) -> None:
        for model in self.models:
            statistics = model.subscription.statistics
            assert statistics.received == model.received
            assert statistics.dropped == model.dropped
            assert statistics.waiting == len(model.waiting)
            assert model.received == model.taken + model.dropped + len(model.waiting)
            assert model.subscription.is_blocking == model.is_blocking
        assert self.bus.is_blocked == any(model.is_blocking for model in self.models)

    def teardown(self) -> None:
        if not hasattr(self, "bus"):
            return
        self.hand_over()
        hand_over(self.bus)
        events = self.everything.take()
        assert [event.seq for event in events] == list(range(len(events)))
        assert numbers(events) == list(range(self.count))
        self.bus.end()


TestBusMachine = BusMachine.TestCase
TestBusMachine.settings = settings(max_examples=60, stateful_step_count=30)


@settings(max_examples=20)
@given(
    schedules=st.lists(
        st.lists(st.tuples(st.sampled_from([Note, Tick]), st.integers(1, 40)), max_size=8),
        min_size=2,
        max_size=4,
    ),
    buffers=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    visits=st.integers(0, 20),
)
def test_order_milestones_and_counts_hold_whatever_threads_do(
    schedules: list[list[tuple[type[Note | Tick], int]]], buffers: list[int], visits: int
) -> None:
    bus = Bus()
    everything = bus.subscribe((Event,), buffer=1_000_000)
    subscriptions = [bus.subscribe((Note, Tick), buffer=buffer) for buffer in buffers]
    taken: list[list[Event]] = [[] for _ in buffers]
    running = threading.Semaphore(0)

    def publish(author: int, schedule: list[tuple[type[Note | Tick], int]]) -> None:
        number = 0
        for event_class, count in schedule:
            for _ in range(count):
                bus.publish(event_class(number=number, author=author))
                number += 1
        running.release()

    def drain() -> None:
        finished = 0
        while finished < len(schedules):
            bus._hand_over()
            finished += running.acquire(blocking=False)
        hand_over(bus)
        over.set()

    def consume(place: int) -> None:
        while not over.is_set() or subscriptions[place].statistics.waiting:
            taken[place].extend(subscriptions[place].take(5))

    def visit() -> None:
        for _ in range(visits):
            with bus.subscribe((Event,), replay=True) as guest:
                guest.take()

    over = threading.Event()
    in_threads(
        drain,
        visit,
        *(functools.partial(publish, author, schedule) for author, schedule in enumerate(schedules)),
        *(functools.partial(consume, place) for place in range(len(buffers))),
    )
    events = everything.take()
    bus.end()
    published = sum(count for schedule in schedules for _, count in schedule)
    milestones = [id(event) for event in events if isinstance(event, Note)]
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, Note | Tick) for event in events) == published
    for author in range(len(schedules)):
        own = [each for each in events if isinstance(each, Note | Tick) and each.author == author]
        assert numbers(own) == list(range(len(own)))
    for subscription, received in zip(subscriptions, taken, strict=True):
        seqs = [event.seq for event in received]
        assert seqs == sorted(set(seqs))
        assert [id(event) for event in received if isinstance(event, Note)] == milestones
        statistics = subscription.statistics
        assert statistics.received == published == len(received) + statistics.dropped
        reports = [each for each in events if isinstance(each, EventsDropped)]
        if subscription.buffer > 1 and len(buffers) == 1:
            assert sum(report.count for report in reports) == statistics.dropped
