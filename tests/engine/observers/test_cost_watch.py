"""engine/observers/cost_watch.py: a callback that computes beside training is named, one that waits is not."""

import logging
import threading
import time
from typing import Any, Final

import anyio
import anyio.lowlevel
import pytest

from offloop.engine import Callback, EpochStart, RunHandle, RunResult, StepEnd, StepPoint, decides, in_step
from offloop.engine.bus.step_times import StepTimes
from offloop.engine.callback import Handlers
from offloop.engine.observers import cost_watch
from offloop.engine.observers.cost_watch import STRETCH, CostWatch, Stretch
from offloop.engine.testing import EndlessLoader, tiny_loader, tiny_trainer

LONG: Final = 60.0  # seconds; a bound for what takes a moment


def compute(seconds: float) -> None:
    """Compute in pure Python for so many seconds of this thread's CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))


class Until(Callback):
    """Lets a run train until a handler has returned, and for some steps more."""

    def __init__(self, done: threading.Event) -> None:
        self.done, self.more = done, 100

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if self.done.is_set():
            self.more -= 1
            if not self.more:
                point.run.stop_nowait("done")


class Works(Callback):
    """Does something at step 100, once: there are steps before it to compare with."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def work(self) -> None:
        raise NotImplementedError

    def look(self, event: StepEnd) -> None:
        if event.step >= 100 and not self.done.is_set():
            self.work()
            self.done.set()


class Plain(Works):
    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.look(event)


class PlainComputes(Plain):
    def work(self) -> None:
        compute(0.3)


class AsyncComputes(Works):
    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.look(event)

    def work(self) -> None:
        compute(0.3)


class PlainSleeps(Plain):
    def work(self) -> None:
        time.sleep(0.3)


class AsyncSleeps(AsyncComputes):
    def work(self) -> None:
        time.sleep(0.3)


class Listens(Callback):
    """Computes nothing, while `Plain` computes: it may have to wait for the interpreter."""

    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None: ...


class PlainComputesInC(Plain):
    """Keeps the interpreter all the time: code of C is not interrupted."""

    def work(self) -> None:
        until = time.thread_time() + 0.3
        while time.thread_time() < until:
            sum(range(5_000_000))


class AsyncComputesInC(AsyncComputes):
    """The same, on the event loop."""

    work = PlainComputesInC.work


def wait_for_the_interpreter() -> None:
    """Give the interpreter away and ask for it again, many times, while another thread computes all the time."""
    is_over = threading.Event()

    def compute_all_the_time() -> None:
        while not is_over.is_set():
            sum(range(100))

    other = threading.Thread(target=compute_all_the_time)
    other.start()
    for _ in range(500):
        # Long enough for the other thread to take the interpreter; `sched_yield` often gets it back at once.
        time.sleep(20e-6)
    is_over.set()
    other.join()


class PlainWaitsForInterpreter(Plain):
    def work(self) -> None:
        wait_for_the_interpreter()


class AsyncWaitsForInterpreter(AsyncComputes):
    def work(self) -> None:
        wait_for_the_interpreter()


def train(working: Any, *others: Callback, caplog: pytest.LogCaptureFixture) -> tuple[RunResult, list[str]]:
    """Train beside a callback; return the result and the warnings."""
    with caplog.at_level(logging.WARNING, "offloop"):
        result = tiny_trainer().train(
            EndlessLoader(), max_time=LONG, callbacks=[working, *others, Until(working.done)]
        )
    assert result.reason == "done"
    return result, [each.getMessage() for each in caplog.records if each.name == "offloop"]


@pytest.mark.parametrize("working", [PlainComputes, AsyncComputes, PlainComputesInC, AsyncComputesInC])
def test_a_callback_that_computes_is_named_once_with_the_way_out(
    working: type[Works], caplog: pytest.LogCaptureFixture
) -> None:
    callback = working()
    result, messages = train(callback, Listens(), caplog=caplog)
    (message,) = messages
    assert message.startswith(f"callback {working.__name__} computed for 0.")
    assert "at a stretch while handling StepEnd, in the interpreter that training needs" in message
    assert message.endswith('runs_in = "process" gives it a process of its own')
    costs = result.callback_costs[working.__name__]
    assert costs.warning == message
    assert costs.cpu >= 0.3
    assert costs.slowdown is None or costs.slowdown > 1
    assert ("steps beside it took" in message) == (costs.slowdown is not None)
    assert result.callback_costs["Listens"].warning == ""


@pytest.mark.parametrize("working", [PlainComputes, AsyncComputes])
def test_a_callback_that_computes_is_named_on_trio(
    working: type[Works], caplog: pytest.LogCaptureFixture
) -> None:
    callback = working()

    async def main() -> RunResult:
        return await tiny_trainer().train_async(
            EndlessLoader(), max_time=LONG, callbacks=[callback, Listens(), Until(callback.done)]
        )

    with caplog.at_level(logging.WARNING, "offloop"):
        result = anyio.run(main, backend="trio")
    (message,) = [each.getMessage() for each in caplog.records]
    assert message.startswith(f"callback {working.__name__} computed for 0.")
    assert result.callback_costs[working.__name__].warning == message


@pytest.mark.parametrize("working", [PlainWaitsForInterpreter, AsyncWaitsForInterpreter])
def test_a_callback_that_only_waits_for_the_interpreter_is_not_named(
    working: type[Works], caplog: pytest.LogCaptureFixture
) -> None:
    result, messages = train(working(), caplog=caplog)
    costs = result.callback_costs[working.__name__]
    assert costs.warning == "" and not messages
    # Waiting alone would have it named.
    assert costs.wall > STRETCH > costs.held


@pytest.mark.parametrize("working", [PlainSleeps, AsyncSleeps])
def test_a_callback_that_waits_does_not_compute(
    working: type[Works], caplog: pytest.LogCaptureFixture
) -> None:
    result, messages = train(working(), caplog=caplog)
    assert result.callback_costs[working.__name__].warning == ""
    # One that blocks the event loop is named for that.
    held = [each for each in messages if "held the event loop" in each and "(0 ms of them" in each]
    assert len(messages) == len(held) == (working is AsyncSleeps)


def test_a_little_computing_in_many_events_is_named_by_its_share(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_watch, "WINDOW", 0.5)

    class Often(Callback):
        def __init__(self) -> None:
            self.total, self.done = 0, threading.Event()

        def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
            compute(0.005)
            self.total += 1
            if self.total == 100:
                self.done.set()

    callback: Any = Often()
    callback.buffer = 1
    result, messages = train(callback, caplog=caplog)
    (message,) = messages
    assert message.startswith("callback Often computed for ") and "at a stretch" not in message
    assert result.callback_costs["Often"].warning == message


def test_stretches_of_less_than_a_millisecond_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_watch, "WINDOW", 0.5)

    class Short(Callback):
        def __init__(self) -> None:
            self.total, self.done = 0, threading.Event()

        async def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
            compute(0.0004)
            await anyio.lowlevel.checkpoint()
            self.total += 1
            if self.total == 500:
                self.done.set()

    result, messages = train(Short(), caplog=caplog)
    assert [each for each in messages if "at a stretch" not in each and "Short computed for" in each]
    assert result.callback_costs["Short"].warning


# Judged by step times -----------------------------------------------------------------------------


class Watched:
    """A callback and the steps of a run, whose times the test sets: later than any import of this process."""

    def __init__(self) -> None:
        self.begin = time.perf_counter() + 1_000.0
        self.steps = StepTimes(0.0)
        self.watch = CostWatch(Handlers(Listens(), "Listens"), self.steps)

    def train(self, start: float, count: int, step_time: float) -> float:
        """Have steps end; return when the last one does."""
        ends = [start + step_time * number for number in range(1, count + 1)]
        self.steps.take([StepEnd(loss=0.0, lr=0.1, time=end) for end in ends], has_milestones=False)
        return ends[-1]

    def computes(self, *, on_loop: bool, step_time: float) -> None:
        """Train, compute for 0.3 s beside steps of a length, and train on."""
        start = self.train(self.begin, 100, 0.001)
        self.watch.add(Stretch(start, 0.3, 0.3, 10), "StepEnd", on_loop=on_loop)
        self.train(self.train(start, round(0.3 / step_time), step_time), 100, 0.001)


@pytest.mark.parametrize("on_loop", [False, True])
def test_steps_that_take_longer_beside_it_are_told(on_loop: bool, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.computes(on_loop=on_loop, step_time=0.015)
    assert watched.watch.slowdown == pytest.approx(15.0, rel=0.01)
    assert watched.watch.warning == (
        "callback Listens computed for 0.30 s at a stretch while handling StepEnd, in the interpreter that training "
        "needs: 20 steps beside it took 15.0 times as long as others, 0.28 s in all. "
        'runs_in = "process" gives it a process of its own'
    )
    assert [each.getMessage() for each in caplog.records] == [watched.watch.warning]


@pytest.mark.parametrize("on_loop", [False, True])
def test_computing_that_lets_the_interpreter_go_is_not_named(
    on_loop: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As code of C may do: steps beside it take as long as others. On the event loop, others wait for it."""
    watched = Watched()
    watched.computes(on_loop=on_loop, step_time=0.001)
    assert watched.watch.warning == "" and watched.watch.slowdown is None
    messages = [each.getMessage() for each in caplog.records]
    assert len(messages) == on_loop
    if on_loop:
        assert messages[0].startswith(
            "callback Listens held the event loop for 300 ms (300 ms of them computing) while handling StepEnd"
        )


def test_computing_on_a_busy_machine_is_named_and_a_handler_that_mostly_blocks_is_not() -> None:
    for wall, switches, is_named in ((4.0, 1500, True), (4.0, 10, False)):
        watched = Watched()
        watched.watch.add(Stretch(watched.begin, wall, 0.3, switches), "StepEnd", on_loop=False)
        watched.train(watched.begin, 3, 0.1)
        assert bool(watched.watch.warning) == is_named


def test_computing_is_named_without_figures_where_there_are_no_other_steps() -> None:
    watched = Watched()
    watched.watch.add(Stretch(watched.begin, 0.3, 0.3, 10), "StepEnd", on_loop=False)
    watched.train(watched.begin, 3, 0.1)
    assert watched.watch.slowdown is None
    assert watched.watch.warning.startswith(
        "callback Listens computed for 0.30 s at a stretch while handling StepEnd, in the interpreter that training "
        "needs. runs_in"
    )


# Where handlers run ------------------------------------------------------------------------------


def test_a_callback_that_also_decides_has_to_be_split(caplog: pytest.LogCaptureFixture) -> None:
    class Splits(Callback):
        """Observes milestones, and decides."""

        def __init__(self) -> None:
            self.done = threading.Event()

        def on_state_changed(self, event: Any, run: RunHandle) -> None: ...

        def on_epoch_end(self, event: Any, run: RunHandle) -> None:
            compute(0.3)

        @decides
        def on_epoch_start(self, event: EpochStart, run: RunHandle) -> None: ...

    with caplog.at_level(logging.WARNING, "offloop"):
        result = tiny_trainer().train(tiny_loader(), epochs=5, callbacks=[Splits()])
    warning = result.callback_costs["Splits"].warning
    assert warning.endswith("once its deciders and step hooks are a callback of their own")
    assert [each.getMessage() for each in caplog.records] == [warning]


def test_a_callback_in_a_process_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    class Away(Callback):
        runs_in = "process"

        def on_epoch_end(self, event: Any, run: RunHandle) -> None:
            until = time.thread_time() + 0.3
            while time.thread_time() < until:
                sum(range(1000))

    with caplog.at_level(logging.WARNING, "offloop"):
        result = tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[Away()])
    assert result.callback_costs["Away"].cpu >= 0.6
    assert result.callback_costs["Away"].warning == ""
    assert not caplog.records
