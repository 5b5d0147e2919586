"""engine/observers/observer.py: handlers at work, what they cost, and what their failures mean."""

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest

from offloop.engine.bus import subscription as subscription_module
from offloop.engine.bus.command_mailbox import actor
from offloop.engine.bus.event_bus import Bus
from offloop.engine.callback import Callback, Handlers, decides
from offloop.engine.events import CallbackFailed, EpochEnd, EpochStart, Event, Sample
from offloop.engine.observers import cost_watch
from offloop.engine.observers import observer as observer_module
from offloop.engine.observers.cost_watch import CostWatch
from offloop.engine.observers.observer import Observer

RUN = object()
"""What the handlers get as `run`."""


class Note(Event, frozen=True):
    """A milestone of the tests'."""

    number: int = 0


class Tick(Sample, frozen=True):
    """A sample of the tests'."""

    number: int = 0


class Stage:
    """A bus and one observer on it, without a run."""

    def __init__(self, callback: Callback, *, buffer: int = 10_000) -> None:
        handlers = Handlers(callback, type(callback).__name__)
        self.bus = Bus(flush_interval=0.001)
        self.subscription = self.bus.subscribe(handlers.observed_types(), name=handlers.name, buffer=buffer)
        self.reports = self.bus.subscribe((CallbackFailed,))
        self.ended_by: list[BaseException] = []
        watch = CostWatch(handlers, self.bus.step_times)
        self.observer = Observer(
            handlers, self.subscription, RUN, self.bus.publish, self.ended_by.append, watch=watch
        )

    async def play(self, *events: Event) -> None:
        """Publish events, let them be handled, end."""
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.bus.drain)
                for event in events:
                    self.bus.publish(event)
                self.bus.close()
                await self.observer.serve()
            await self.observer.close()

    def failures(self) -> list[tuple[str, str, int, bool]]:
        return [(each.event, each.error, each.failures, each.disabled) for each in self.reports.take()]


@asynccontextmanager
async def at_work(stage: Stage) -> AsyncIterator[anyio.abc.TaskGroup]:
    """Have a stage's bus and observer run beside the body, and closed after it."""
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage.bus.drain)
            tasks.start_soon(stage.observer.serve)
            yield tasks
            stage.bus.close()
        await stage.observer.close()


def notes(count: int) -> list[Note]:
    return [Note(number=number) for number in range(count)]


# Where handlers run, and in which order ------------------------------------------------------------


class Mixed(Callback):
    """Handles notes in a thread, ticks on the event loop, epochs nowhere."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.runs: set[int] = set()

    def on_note(self, event: Note, run: Any) -> None:
        self.seen.append(("note", event.number, threading.get_ident()))
        self.runs.add(id(run))

    async def on_tick(self, event: Tick, run: Any) -> None:
        await anyio.lowlevel.checkpoint()
        self.seen.append(("tick", event.number, threading.get_ident()))
        self.runs.add(id(run))


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_plain_and_async_handlers_see_one_order() -> None:
    callback = Mixed()
    events = [(Note if number % 3 else Tick)(number=number) for number in range(30)]
    await Stage(callback).play(*events, EpochEnd())
    assert [(kind, number) for kind, number, _ in callback.seen] == [
        ("note" if number % 3 else "tick", number) for number in range(30)
    ]
    assert callback.runs == {id(RUN)}


@pytest.mark.anyio
async def test_plain_handlers_of_a_callback_share_one_thread_that_is_not_the_event_loops() -> None:
    names: set[str] = set()

    class Closing(Mixed):
        def close(self) -> None:
            self.seen.append(("close", 0, threading.get_ident()))
            names.add(threading.current_thread().name)

    callback = Closing()
    stage = Stage(callback)
    async with at_work(stage):
        for number in range(3):  # three batches
            stage.bus.publish(Note(number=number))
            while len(callback.seen) <= number:
                await anyio.lowlevel.checkpoint()
    threads = {thread for kind, _, thread in callback.seen}
    assert len(callback.seen) == 4 and len(threads) == 1
    assert threading.get_ident() not in threads
    assert names == {"offloop-Closing"}


@pytest.mark.anyio
async def test_callbacks_do_not_share_threads() -> None:
    threads: list[int] = []

    class Barrier(Callback):
        def on_note(self, event: Note, run: Any) -> None:
            met.wait(10)  # returns only when both are here
            threads.append(threading.get_ident())

    met = threading.Barrier(2)
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(Stage(Barrier()).play, Note())
    assert len(set(threads)) == 2


setting: contextvars.ContextVar[str] = contextvars.ContextVar("setting", default="none")


@pytest.mark.anyio
async def test_context_of_the_caller_and_the_actors_name_reach_handlers() -> None:
    seen: list[tuple[str, str]] = []

    class Curious(Callback):
        def on_note(self, event: Note, run: Any) -> None:
            seen.append((setting.get(), actor.get()))

        async def on_tick(self, event: Tick, run: Any) -> None:
            seen.append((setting.get(), actor.get()))

    token = setting.set("mine")
    stage = Stage(Curious())
    async with at_work(stage):
        stage.bus.publish(Note())
        stage.bus.publish(Tick())
    setting.reset(token)
    assert seen == [("mine", "Curious"), ("mine", "Curious")]


@pytest.mark.anyio
async def test_barrier_comes_after_all_events_before_it_were_handled() -> None:
    callback = Mixed()
    stage = Stage(callback)
    met: list[int] = []

    async def on_reached() -> None:
        await anyio.lowlevel.checkpoint()
        met.append(len(callback.seen))

    async with at_work(stage):
        for number in range(5):
            stage.bus.publish(Note(number=number))
        stage.bus.put_barrier(stage.subscription, lambda: met.append(len(callback.seen)))
        stage.bus.publish(Tick())
        stage.bus.put_barrier(stage.subscription, on_reached)
        stage.bus.publish(Tick())
    assert met == [5, 6]


@pytest.mark.anyio
async def test_handlers_that_never_wait_let_the_event_loop_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "TURN", 0.0)
    turns: list[int] = []

    class Eager(Callback):
        handled = 0

        async def on_note(self, event: Note, run: Any) -> None:
            self.handled += 1

    async def watch() -> None:
        while callback.handled < 50:
            turns.append(callback.handled)
            await anyio.lowlevel.checkpoint()

    callback = Eager()
    stage = Stage(callback)
    async with at_work(stage) as tasks:
        tasks.start_soon(watch)
        for event in notes(50):
            stage.bus.publish(event)
    assert len(set(turns)) > 10


# Costs ---------------------------------------------------------------------------------------------


def compute(seconds: float) -> None:
    """Keep this thread computing for a time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.anyio
async def test_costs_tell_events_and_time_held() -> None:
    class Busy(Callback):
        async def on_note(self, event: Note, run: Any) -> None:
            compute(0.002)
            await anyio.lowlevel.checkpoint()
            compute(0.001)

    stage = Stage(Busy(), buffer=5)
    await stage.play(*notes(3), *(Tick() for _ in range(9)))
    costs = stage.observer.costs
    assert (costs.events, costs.failures, costs.dropped, costs.decided) == (3, 0, 0, 0.0)
    assert 0.009 <= costs.cpu <= costs.held <= costs.wall
    assert 0.002 <= costs.longest_hold <= costs.held
    assert costs.lag > 0.0


@pytest.mark.anyio
async def test_plain_handlers_cost_cpu_but_hold_nobody() -> None:
    class Busy(Callback):
        def on_note(self, event: Note, run: Any) -> None:
            compute(0.002)

    stage = Stage(Busy())
    await stage.play(*notes(3))
    costs = stage.observer.costs
    assert costs.events == 3
    assert 0.006 <= costs.cpu <= costs.wall
    assert costs.held == costs.longest_hold == 0.0


@pytest.mark.anyio
async def test_drops_show_in_the_costs() -> None:
    class Slow(Callback):
        async def on_tick(self, event: Tick, run: Any) -> None: ...

    stage = Stage(Slow(), buffer=4)
    await stage.play(*(Tick(number=number) for number in range(10)))
    assert (stage.observer.costs.events, stage.observer.costs.dropped) == (4, 6)


@pytest.mark.anyio
async def test_who_holds_the_event_loop_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cost_watch, "HOLD_WARNING", 0.001)

    class Holder(Callback):
        async def on_note(self, event: Note, run: Any) -> None:
            compute(0.003)

    await Stage(Holder()).play(*notes(5))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    message = record.getMessage()
    assert message.startswith("callback Holder held the event loop for ")
    assert "while handling Note: await something, or make the handler a plain def" in message


@pytest.mark.anyio
async def test_waiting_holds_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cost_watch, "HOLD_WARNING", 0.5)
    released = anyio.Event()

    class Patient(Callback):
        async def on_note(self, event: Note, run: Any) -> None:
            await released.wait()

    stage = Stage(Patient())
    async with at_work(stage):
        stage.bus.publish(Note())
        while not stage.observer.costs.events:
            await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        released.set()
    assert stage.observer.costs.wall > stage.observer.costs.held
    assert not caplog.records


# Failures ------------------------------------------------------------------------------------------


class FailsAsync(Callback):
    """Fails on notes with an odd number."""

    def __init__(self, error: Callable[[], BaseException] = lambda: ValueError("odd")) -> None:
        self.error = error
        self.handled: list[int] = []

    async def on_note(self, event: Note, run: Any) -> None:
        self.take(event)

    def take(self, event: Note) -> None:
        if event.number % 2:
            raise self.error()
        self.handled.append(event.number)


@pytest.mark.anyio
async def test_decider_whose_observers_are_off_still_gets_barriers() -> None:
    """Else the training thread would wait for it for ever."""

    class Decider(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Any) -> None: ...

        async def on_note(self, event: Note, run: Any) -> None:
            raise ValueError("always")

    stage = Stage(Decider())
    reached = anyio.Event()
    async with at_work(stage):
        for event in notes(20):
            stage.bus.publish(event)
        while not stage.observer.disabled:
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        stage.bus.put_barrier(stage.subscription, reached.set)
        await reached.wait()
    assert stage.observer.costs.events == 10


@pytest.mark.anyio
async def test_failure_while_handling_callback_failed_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fragile(Callback):
        async def on_callback_failed(self, event: CallbackFailed, run: Any) -> None:
            raise ValueError("again")

    stage = Stage(Fragile())
    async with at_work(stage):
        stage.bus.publish(CallbackFailed(callback="other", event="Note", error="x"))
        while not stage.observer.errors:
            await anyio.lowlevel.checkpoint()
    assert [each.callback for each in stage.reports.take()] == ["other"]
    assert "callback Fragile failed in CallbackFailed" in caplog.text


@pytest.mark.anyio
async def test_handler_that_awaits_something_cancelled_fails_alone(anyio_backend_name: str) -> None:
    """On asyncio a task's cancellation reaches whoever awaits it; that is no cancellation of the observer."""
    if anyio_backend_name != "asyncio":
        pytest.skip("on trio nobody can be cancelled like this")

    class Awaits(FailsAsync):
        async def on_note(self, event: Note, run: Any) -> None:
            if event.number % 2:
                task = asyncio.create_task(asyncio.sleep(1000))
                task.cancel()
                await task
            self.handled.append(event.number)

    callback = Awaits()
    stage = Stage(callback)
    await stage.play(*notes(4))
    assert callback.handled == [0, 2]
    failure = (
        "Note: RuntimeError: CancelledError was raised, although neither the run nor its event loop is ending"
    )
    assert stage.observer.errors == [failure] * 2


@pytest.mark.anyio
async def test_cancelled_observer_stops_where_it_is() -> None:
    class Waits(Callback):
        async def on_note(self, event: Note, run: Any) -> None:
            started.set()
            await anyio.sleep_forever()

    started = anyio.Event()
    stage = Stage(Waits())
    async with at_work(stage) as tasks:
        for event in notes(3):
            stage.bus.publish(event)
        await started.wait()
        tasks.cancel_scope.cancel()
    assert stage.observer.costs.events == 1
    assert stage.observer.errors == []


@pytest.mark.anyio
async def test_observer_too_far_behind_is_off_and_nobody_else_is_hurt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subscription_module, "MAX_MILESTONES_BEHIND", 10)

    class Stuck(Callback):
        async def on_note(self, event: Note, run: Any) -> None:
            await released.wait()

    released = anyio.Event()
    stage = Stage(Stuck(), buffer=1)
    async with at_work(stage):
        stage.bus.publish(Note())
        while not stage.observer.costs.events:
            await anyio.lowlevel.checkpoint()
        for event in notes(11):
            stage.bus.publish(event)
        while not stage.subscription.statistics.closed:
            await anyio.lowlevel.checkpoint()
        released.set()
    assert stage.observer.disabled
    (error,) = stage.observer.errors
    assert error.startswith("its events: SubscriberTooSlowError: subscriber 'Stuck' is 11 milestones behind")


# Closing -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_close_runs_where_it_belongs() -> None:
    threads: dict[str, int] = {}

    class Plain(Callback):
        def close(self) -> None:
            threads["plain"] = threading.get_ident()

    class Async(Callback):
        async def close(self) -> None:
            await anyio.lowlevel.checkpoint()
            threads["async"] = threading.get_ident()

    class Awaitable(Callback):
        def close(self) -> Any:
            return Async.close(Async())

    for callback in (Plain(), Async(), Awaitable(), Callback()):
        stage = Stage(callback)
        await stage.play()
        assert stage.observer.errors == []
    assert threads["async"] == threading.get_ident() != threads["plain"]


@pytest.mark.anyio
async def test_callback_without_events_is_closed_too() -> None:
    closed: list[bool] = []

    class OnlyCloses(Callback):
        def close(self) -> None:
            closed.append(True)

    observer = Observer(Handlers(OnlyCloses(), "OnlyCloses"), None, RUN, lambda _: None, lambda _: None)
    await observer.serve()
    await observer.close()
    assert closed == [True]
    assert observer.costs.events == 0


@pytest.mark.anyio
async def test_hanging_async_close_can_be_given_up() -> None:
    class Hangs(Callback):
        async def close(self) -> None:
            await anyio.sleep_forever()

    stage = Stage(Hangs())
    with anyio.fail_after(5), anyio.move_on_after(0.01) as patience:
        await stage.observer.close()
    assert patience.cancelled_caught
    stage.bus.end()


@pytest.mark.anyio
async def test_handler_that_hangs_in_its_thread_is_given_up_and_close_still_called() -> None:
    class Hangs(Callback):
        def on_note(self, event: Note, run: Any) -> None:
            started.set()
            released.wait(30)
            finished.set()

        def close(self) -> None:
            closed.append(threading.get_ident())

    started, released, finished = threading.Event(), threading.Event(), threading.Event()
    closed: list[int] = []
    stage = Stage(Hangs())
    async with at_work(stage) as tasks:
        stage.bus.publish(Note())
        await anyio.to_thread.run_sync(started.wait)
        tasks.cancel_scope.cancel()
    assert len(closed) == 1 and not finished.is_set()
    released.set()
    await anyio.to_thread.run_sync(finished.wait)


def test_event_loop_is_not_needed_to_read_costs() -> None:
    class Quiet(Callback):
        async def on_epoch_start(self, event: EpochStart, run: Any) -> None: ...

    stage = Stage(Quiet())
    assert stage.observer.costs.events == 0
    stage.bus.end()
