"""engine/bus/command_mailbox.py: who gives commands, in which order they apply, and who waits for whom."""

import functools
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from offloop.engine.bus import command_mailbox as control_module
from offloop.engine.bus.command_mailbox import Command, CommandName, Control, actor, deciding
from offloop.engine.errors import RunEndedError


def give(control: Control, *names: CommandName) -> list[Future[Any]]:
    return [control.give(name, {}) for name in names]


def give_as_decider(control: Control, name: CommandName, by: str = "Decider") -> Future[Any]:
    who, where = actor.set(by), deciding.set(control)
    try:
        return control.give(name, {})
    finally:
        actor.reset(who)
        deciding.reset(where)


def names(commands: list[Command]) -> list[str]:
    return [command.name for command in commands]


@pytest.fixture
def control() -> Control:
    return Control()


# The order at a boundary ---------------------------------------------------------------------------


def test_outside_commands_apply_by_arrival_and_stop_last(control: Control) -> None:
    give(control, "stop", "set_lr", "call", "validate", "stop", "checkpoint")
    collected = control.collect(step_boundary=True)
    assert names(collected) == ["set_lr", "call", "validate", "checkpoint", "stop", "stop"]
    assert [command.id for command in collected] == [1, 2, 3, 5, 0, 4]


def test_deciders_commands_apply_before_outside_ones(control: Control) -> None:
    give(control, "set_lr", "stop")
    give_as_decider(control, "stop", "First")
    give_as_decider(control, "checkpoint", "First")
    give_as_decider(control, "call", "Second")
    give(control, "pause")
    collected = control.collect(step_boundary=True)
    assert [(command.name, command.by) for command in collected] == [
        ("checkpoint", "First"),
        ("call", "Second"),
        ("set_lr", "user"),
        ("pause", "user"),
        ("stop", "First"),
        ("stop", "user"),
    ]


def test_decider_of_another_run_is_an_outsider_here(control: Control) -> None:
    other = Control()
    give(control, "set_lr")
    token = deciding.set(other)
    give(control, "call")
    deciding.reset(token)
    assert names(control.collect(step_boundary=True)) == ["set_lr", "call"]


@pytest.mark.parametrize(
    ("where", "applied", "left"),
    [
        ({"step_boundary": True}, ["set_lr", "pause", "validate", "resume", "stop"], []),
        ({"step_boundary": False}, ["pause", "resume"], ["set_lr", "validate", "stop"]),
        ({"step_boundary": False, "stop_only": True}, ["pause", "resume", "stop"], ["set_lr", "validate"]),
    ],
)
def test_commands_wait_for_their_boundary(
    control: Control, where: dict[str, bool], applied: list[str], left: list[str]
) -> None:
    give(control, "stop", "set_lr", "pause", "validate", "resume")
    assert control.attention
    assert names(control.collect(**where)) == applied
    assert control.attention is bool(left)
    assert sorted(names(control.collect(step_boundary=True))) == sorted(left)
    assert not control.attention


def test_attention_is_only_asked_for_when_there_is_something(control: Control) -> None:
    assert not control.attention
    assert control.collect(step_boundary=True) == []
    control.poke()
    assert control.attention
    control.collect(step_boundary=True)
    assert not control.attention
    control.cancel("x")
    control.collect(step_boundary=True)
    assert control.attention  # a cancelled run is never told to look away


def test_command_says_who_gave_it(control: Control) -> None:
    control.give("pause", {}, by="viewer")
    give_as_decider(control, "stop", "EarlyStopping")
    (pause, stop) = control.collect(step_boundary=True)
    assert (pause.by, stop.by) == ("viewer", "EarlyStopping")
    assert repr(stop) == "<stop #1 by EarlyStopping>"


def test_command_that_waits_for_its_boundary_is_seen_until_it_is_taken_back(control: Control) -> None:
    assert not control.is_waited_for
    (future,) = give(control, "set_lr")
    control.collect(step_boundary=False)
    assert control.is_waited_for
    future.cancel()
    assert not control.is_waited_for
    give(control, "stop")
    assert control.is_waited_for
    control.collect(step_boundary=True)
    assert not control.is_waited_for


# The end -------------------------------------------------------------------------------------------


def test_end_fails_what_still_waits_and_refuses_more(control: Control) -> None:
    (future,) = give(control, "validate")
    control.end()
    with pytest.raises(RunEndedError, match="the run ended before validate could be applied"):
        future.result(timeout=0)
    with pytest.raises(RunEndedError, match="stop came too late: the run is over"):
        give(control, "stop")
    control.end()
    assert control.collect(step_boundary=True) == []


def test_command_taken_back_does_not_disturb_the_end(control: Control) -> None:
    """`asyncio.wait_for(asyncio.wrap_future(run.validate_nowait()), 5)` cancels the future."""
    taken_back, other = give(control, "validate", "checkpoint")
    assert taken_back.cancel()
    control.end()
    assert taken_back.cancelled()
    assert isinstance(other.exception(timeout=0), RunEndedError)


def test_cancelling_twice_keeps_the_first_reason(control: Control) -> None:
    control.cancel("first")
    control.cancel("second")
    assert control.cancelled and control.cancel_reason == "first"


def test_cancel_tells_whoever_asked(control: Control) -> None:
    told: list[str] = []
    with control.on_cancel(lambda: told.append("inside")):
        control.cancel("x")
    assert told == ["inside"]
    with control.on_cancel(lambda: told.append("late")):
        assert told == ["inside", "late"]
    control.cancel("x")
    assert told == ["inside", "late"]


# Waiting, in the training thread -------------------------------------------------------------------


class Waiting:
    """A training thread that waits in `wait`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=wait, daemon=True)
        self._thread.start()

    def returns(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()


@pytest.mark.parametrize(
    "change",
    [
        lambda control: control.give("resume", {}),
        lambda control: control.poke(),
        lambda control: control.cancel("x"),
    ],
)
def test_pause_ends_with_any_change(control: Control, change: Callable[[Control], None]) -> None:
    waiting = Waiting(functools.partial(control.wait_for_change, control.changes))
    change(control)
    assert waiting.returns()


def test_change_that_came_before_the_wait_is_seen(control: Control) -> None:
    seen = control.changes
    give(control, "resume")
    assert Waiting(functools.partial(control.wait_for_change, seen)).returns()


def test_standing_ends_when_its_condition_holds(control: Control) -> None:
    answers: list[int] = []
    waiting = Waiting(functools.partial(control.stand, lambda: bool(answers), "somebody"))
    control.poke()
    answers.append(1)
    control.poke()
    assert waiting.returns()
    assert not control.standing


def test_cancel_ends_every_wait(control: Control) -> None:
    def stand() -> None:
        with control.on_cancel(told.set):
            control.stand(lambda: control.cancelled, "somebody")

    told = threading.Event()
    waits = [
        Waiting(stand),
        Waiting(functools.partial(control.wait_for_change, control.changes)),
    ]
    control.cancel("x")
    assert all(waiting.returns() for waiting in waits)
    assert told.is_set()


def test_whoever_is_waited_for_too_long_is_named(
    control: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_module, "WAIT_WARNING", 0.001)

    def has_warned_twice() -> bool:
        return len(caplog.records) >= 2

    with caplog.at_level(logging.WARNING):
        assert Waiting(functools.partial(control.stand, has_warned_twice, "decider Mine")).returns()
    assert "training has waited 0 s for decider Mine" in caplog.records[0].getMessage()


# Waiting for a command, in a task ------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_awaited_command_returns_its_result(control: Control) -> None:
    def train() -> None:
        control.wait_for_change(0)
        for command in control.collect(step_boundary=True):
            command.future.set_result(f"{command.name} done")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, train)
            assert await control.wait_for(control.give("call", {})) == "call done"


@pytest.mark.anyio
async def test_awaited_command_raises_what_it_failed_with(control: Control) -> None:
    failing, unreached = give(control, "pause", "set_lr")
    control.collect(step_boundary=False)
    failing.set_exception(KeyError("mine"))
    with anyio.fail_after(5):
        with pytest.raises(KeyError, match="mine"):
            await control.wait_for(failing)

        async def expect_end() -> None:
            with pytest.raises(RunEndedError):
                await control.wait_for(unreached)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_end)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(control.end)


@pytest.mark.anyio
async def test_awaiting_returns_on_acceptance_while_the_training_thread_stands(control: Control) -> None:
    with anyio.fail_after(5):
        with control.standing_still():
            assert await control.wait_for(control.give("set_lr", {})) is None
            applied = control.give("call", {})
            applied.set_result(3)
            assert await control.wait_for(applied) == 3


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_those_already_waiting_are_released_when_the_training_thread_stands(control: Control) -> None:
    results: list[object] = []

    async def wait() -> None:
        results.append(await control.wait_for(control.give("validate", {})))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert results == []
            answers: list[int] = []
            stand = functools.partial(control.stand, lambda: bool(answers), "a decider")
            tasks.start_soon(anyio.to_thread.run_sync, stand)
            while len(results) < 3:
                await anyio.lowlevel.checkpoint()
            answers.append(1)
            control.poke()
    assert results == [None, None, None]
    assert not control._awaiting


@pytest.mark.anyio
async def test_cancelled_await_leaves_the_command_given(control: Control) -> None:
    with anyio.fail_after(5):
        future = control.give("validate", {})
        with anyio.CancelScope() as scope:
            scope.cancel()
            await control.wait_for(future)
        assert scope.cancelled_caught and not future.cancelled()
        (command,) = control.collect(step_boundary=True)
        command.future.set_result(None)
        assert not control._awaiting


# Many threads --------------------------------------------------------------------------------------


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Have the interpreter change threads all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_commands_of_many_threads_are_numbered_in_the_order_they_arrive(
    control: Control, frequent_switches: None
) -> None:
    """Each is applied once; who gave several has them applied in that order."""

    def give_many(by: str) -> None:
        ready.wait()
        for _ in range(200):
            futures[by].append(control.give("call", {}, by=by))

    futures: dict[str, list[Future[Any]]] = {f"thread {number}": [] for number in range(6)}
    ready = threading.Barrier(len(futures))
    threads = [threading.Thread(target=give_many, args=(by,)) for by in futures]
    for thread in threads:
        thread.start()
    applied: list[Command] = []
    while len(applied) < 1200:
        seen = control.changes
        collected = control.collect(step_boundary=True)
        for command in collected:
            command.future.set_result(len(applied))
            applied.append(command)
        if not collected:
            control.wait_for_change(seen)
    for thread in threads:
        thread.join()
    assert [command.id for command in applied] == list(range(1200))
    for given in futures.values():
        places = [future.result(timeout=0) for future in given]
        assert places == sorted(places) and len(places) == 200


def test_number_is_given_with_the_place_in_the_queue(control: Control) -> None:
    """A command that came later never has the lower number, wherever its giver is interrupted."""

    def count() -> Iterator[int]:
        for number in itertools.count():
            held.append(control._changed._is_owned())  # type: ignore[attr-defined]  # it has no public way
            yield number

    held: list[bool] = []
    control._numbers = count()  # type: ignore[assignment]  # a spy
    give(control, "pause", "resume")
    assert held == [True, True]


def test_interrupts_never_leave_the_mailbox_locked(control: Control) -> None:
    """KeyboardInterrupt may be raised between any two lines that the main thread runs, also inside `give`."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        interrupted = 0
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 50e-6)
                # Bounded: an interrupt that strikes inside the garbage collector's work is lost.
                for _ in range(10_000):
                    control.give("resume", {}).cancel()
            except KeyboardInterrupt:
                interrupted += 1
            control.collect(step_boundary=True)
        assert interrupted > 100
        other = threading.Thread(target=control.poke, daemon=True)
        other.start()
        other.join(10.0)
        assert not other.is_alive(), "the mailbox is locked for ever"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
