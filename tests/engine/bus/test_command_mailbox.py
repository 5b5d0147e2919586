"""engine/bus/command_mailbox.py: who gives commands, in which order they apply, and who waits for whom."""

import functools
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from offloop.engine.bus import command_mailbox as mailbox_module
from offloop.engine.bus.command_mailbox import Envelope, Mailbox, actor, deciding
from offloop.engine.bus.commands import (
    Call,
    Command,
    Pause,
    Place,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)
from offloop.engine.errors import RunEndedError

CALL: Final = Call(lambda trainer: trainer.step)
COMMANDS: Final[dict[str, Command[Any]]] = {
    command.name: command
    for command in (
        Pause(),
        Resume(),
        Stop(),
        SetLearningRate(0.1),
        Validate(),
        SaveCheckpoint(),
        TagCheckpoint("good"),
        CALL,
    )
}


def give(mailbox: Mailbox, *names: str) -> list[Future[Any]]:
    return [mailbox.give(COMMANDS[name]) for name in names]


def give_as_decider(mailbox: Mailbox, name: str, by: str = "Decider") -> Future[Any]:
    who, where = actor.set(by), deciding.set(mailbox)
    try:
        return mailbox.give(COMMANDS[name])
    finally:
        actor.reset(who)
        deciding.reset(where)


def names(envelopes: list[Envelope[Any]]) -> list[str]:
    return [envelope.command.name for envelope in envelopes]


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


# The order at a boundary ---------------------------------------------------------------------------


def test_outside_commands_apply_by_arrival_and_stop_last(mailbox: Mailbox) -> None:
    give(mailbox, "stop", "set_lr", "call", "validate", "stop", "checkpoint")
    collected = mailbox.collect(Place.STEP)
    assert names(collected) == ["set_lr", "call", "validate", "checkpoint", "stop", "stop"]
    assert [envelope.id for envelope in collected] == [1, 2, 3, 5, 0, 4]


def test_deciders_commands_apply_before_outside_ones(mailbox: Mailbox) -> None:
    give(mailbox, "set_lr", "stop")
    give_as_decider(mailbox, "stop", "First")
    give_as_decider(mailbox, "checkpoint", "First")
    give_as_decider(mailbox, "call", "Second")
    give(mailbox, "pause")
    collected = mailbox.collect(Place.STEP)
    assert [(envelope.command.name, envelope.by) for envelope in collected] == [
        ("checkpoint", "First"),
        ("call", "Second"),
        ("set_lr", "user"),
        ("pause", "user"),
        ("stop", "First"),
        ("stop", "user"),
    ]


def test_decider_of_another_run_is_an_outsider_here(mailbox: Mailbox) -> None:
    other = Mailbox()
    give(mailbox, "set_lr")
    token = deciding.set(other)
    give(mailbox, "call")
    deciding.reset(token)
    assert names(mailbox.collect(Place.STEP)) == ["set_lr", "call"]


@pytest.mark.parametrize(
    ("place", "applied", "left"),
    [
        (Place.STEP, ["set_lr", "pause", "validate", "resume", "stop"], []),
        (Place.BATCH, ["pause", "resume"], ["set_lr", "validate", "stop"]),
        (Place.VALIDATION, ["pause", "resume", "stop"], ["set_lr", "validate"]),
    ],
)
def test_commands_wait_for_their_boundary(
    mailbox: Mailbox, place: Place, applied: list[str], left: list[str]
) -> None:
    give(mailbox, "stop", "set_lr", "pause", "validate", "resume")
    assert mailbox.attention
    assert names(mailbox.collect(place)) == applied
    assert mailbox.attention is bool(left)
    assert sorted(names(mailbox.collect(Place.STEP))) == sorted(left)
    assert not mailbox.attention


def test_attention_is_only_asked_for_when_there_is_something(mailbox: Mailbox) -> None:
    assert not mailbox.attention
    assert mailbox.collect(Place.STEP) == []
    mailbox.poke()
    assert mailbox.attention
    mailbox.collect(Place.STEP)
    assert not mailbox.attention
    mailbox.cancel("x")
    mailbox.collect(Place.STEP)
    assert mailbox.attention  # a cancelled run is never told to look away


def test_command_says_who_gave_it(mailbox: Mailbox) -> None:
    mailbox.give(Pause(), by="viewer")
    give_as_decider(mailbox, "stop", "EarlyStopping")
    (pause, stop) = mailbox.collect(Place.STEP)
    assert (pause.by, stop.by) == ("viewer", "EarlyStopping")
    assert repr(stop) == "<stop #1 by EarlyStopping>"


def test_command_that_waits_for_its_boundary_is_seen_until_it_is_taken_back(mailbox: Mailbox) -> None:
    assert not mailbox.is_waited_for
    (future,) = give(mailbox, "set_lr")
    mailbox.collect(Place.BATCH)
    assert mailbox.is_waited_for
    future.cancel()
    assert not mailbox.is_waited_for
    give(mailbox, "stop")
    assert mailbox.is_waited_for
    mailbox.collect(Place.STEP)
    assert not mailbox.is_waited_for


# The end -------------------------------------------------------------------------------------------


def test_end_fails_what_still_waits_and_refuses_more(mailbox: Mailbox) -> None:
    (future,) = give(mailbox, "validate")
    mailbox.end()
    with pytest.raises(RunEndedError, match="the run ended before validate could be applied"):
        future.result(timeout=0)
    with pytest.raises(RunEndedError, match="stop came too late: the run is over"):
        give(mailbox, "stop")
    mailbox.end()
    assert mailbox.collect(Place.STEP) == []


def test_command_taken_back_does_not_disturb_the_end(mailbox: Mailbox) -> None:
    """`asyncio.wait_for(asyncio.wrap_future(run.validate_nowait()), 5)` cancels the future."""
    taken_back, other = give(mailbox, "validate", "checkpoint")
    assert taken_back.cancel()
    mailbox.end()
    assert taken_back.cancelled()
    assert isinstance(other.exception(timeout=0), RunEndedError)


def test_cancelling_twice_keeps_the_first_reason(mailbox: Mailbox) -> None:
    mailbox.cancel("first")
    mailbox.cancel("second")
    assert mailbox.cancelled and mailbox.cancel_reason == "first"


def test_cancel_tells_whoever_asked(mailbox: Mailbox) -> None:
    told: list[str] = []
    with mailbox.on_cancel(lambda: told.append("inside")):
        mailbox.cancel("x")
    assert told == ["inside"]
    with mailbox.on_cancel(lambda: told.append("late")):
        assert told == ["inside", "late"]
    mailbox.cancel("x")
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
        lambda mailbox: mailbox.give(Resume()),
        lambda mailbox: mailbox.poke(),
        lambda mailbox: mailbox.cancel("x"),
    ],
)
def test_pause_ends_with_any_change(mailbox: Mailbox, change: Callable[[Mailbox], None]) -> None:
    waiting = Waiting(functools.partial(mailbox.wait_for_change, mailbox.changes))
    change(mailbox)
    assert waiting.returns()


def test_change_that_came_before_the_wait_is_seen(mailbox: Mailbox) -> None:
    seen = mailbox.changes
    give(mailbox, "resume")
    assert Waiting(functools.partial(mailbox.wait_for_change, seen)).returns()


def test_standing_ends_when_its_condition_holds(mailbox: Mailbox) -> None:
    answers: list[int] = []
    waiting = Waiting(functools.partial(mailbox.stand, lambda: bool(answers), "somebody"))
    mailbox.poke()
    answers.append(1)
    mailbox.poke()
    assert waiting.returns()
    assert not mailbox.is_blocked_on_others


def test_cancel_ends_every_wait(mailbox: Mailbox) -> None:
    def stand() -> None:
        with mailbox.on_cancel(told.set):
            mailbox.stand(lambda: mailbox.cancelled, "somebody")

    told = threading.Event()
    waits = [
        Waiting(stand),
        Waiting(functools.partial(mailbox.wait_for_change, mailbox.changes)),
    ]
    mailbox.cancel("x")
    assert all(waiting.returns() for waiting in waits)
    assert told.is_set()


def test_whoever_is_waited_for_too_long_is_named(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mailbox_module, "WAIT_WARNING", 0.001)

    def has_warned_twice() -> bool:
        return len(caplog.records) >= 2

    with caplog.at_level(logging.WARNING):
        assert Waiting(functools.partial(mailbox.stand, has_warned_twice, "decider Mine")).returns()
    assert "training has waited 0 s for decider Mine" in caplog.records[0].getMessage()


# Waiting for a command, in a task ------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_awaited_command_returns_its_result(mailbox: Mailbox) -> None:
    def train() -> None:
        mailbox.wait_for_change(0)
        for envelope in mailbox.collect(Place.STEP):
            envelope.future.set_result(f"{envelope.command.name} done")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, train)
            assert await mailbox.wait_for(mailbox.give(CALL)) == "call done"


@pytest.mark.anyio
async def test_awaited_command_raises_what_it_failed_with(mailbox: Mailbox) -> None:
    failing, unreached = give(mailbox, "pause", "set_lr")
    mailbox.collect(Place.BATCH)
    failing.set_exception(KeyError("mine"))
    with anyio.fail_after(5):
        with pytest.raises(KeyError, match="mine"):
            await mailbox.wait_for(failing)

        async def expect_end() -> None:
            with pytest.raises(RunEndedError):
                await mailbox.wait_for(unreached)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_end)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(mailbox.end)


@pytest.mark.anyio
async def test_awaiting_returns_on_acceptance_while_the_training_thread_stands(mailbox: Mailbox) -> None:
    with anyio.fail_after(5):
        with mailbox.standing_still():
            assert await mailbox.wait_for(mailbox.give(CALL)) is None
            applied = mailbox.give(CALL)
            applied.set_result(3)
            assert await mailbox.wait_for(applied) == 3


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_those_already_waiting_are_released_when_the_training_thread_stands(mailbox: Mailbox) -> None:
    results: list[object] = []

    async def wait() -> None:
        results.append(await mailbox.wait_for(mailbox.give(Validate())))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert results == []
            answers: list[int] = []
            stand = functools.partial(mailbox.stand, lambda: bool(answers), "a decider")
            tasks.start_soon(anyio.to_thread.run_sync, stand)
            while len(results) < 3:
                await anyio.lowlevel.checkpoint()
            answers.append(1)
            mailbox.poke()
    assert results == [None, None, None]
    assert not mailbox._awaiting


@pytest.mark.anyio
async def test_cancelled_await_leaves_the_command_given(mailbox: Mailbox) -> None:
    with anyio.fail_after(5):
        future = mailbox.give(Validate())
        with anyio.CancelScope() as scope:
            scope.cancel()
            await mailbox.wait_for(future)
        assert scope.cancelled_caught and not future.cancelled()
        (envelope,) = mailbox.collect(Place.STEP)
        envelope.future.set_result(None)
        assert not mailbox._awaiting


# Many threads --------------------------------------------------------------------------------------


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Have the interpreter change threads all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_commands_of_many_threads_are_numbered_in_the_order_they_arrive(
    mailbox: Mailbox, frequent_switches: None
) -> None:
    """Each is applied once; who gave several has them applied in that order."""

    def give_many(by: str) -> None:
        ready.wait()
        for _ in range(200):
            futures[by].append(mailbox.give(CALL, by=by))

    futures: dict[str, list[Future[Any]]] = {f"thread {number}": [] for number in range(6)}
    ready = threading.Barrier(len(futures))
    threads = [threading.Thread(target=give_many, args=(by,)) for by in futures]
    for thread in threads:
        thread.start()
    applied: list[Envelope[Any]] = []
    while len(applied) < 1200:
        seen = mailbox.changes
        collected = mailbox.collect(Place.STEP)
        for envelope in collected:
            envelope.future.set_result(len(applied))
            applied.append(envelope)
        if not collected:
            mailbox.wait_for_change(seen)
    for thread in threads:
        thread.join()
    assert [envelope.id for envelope in applied] == list(range(1200))
    for given in futures.values():
        places = [future.result(timeout=0) for future in given]
        assert places == sorted(places) and len(places) == 200


def test_number_is_given_with_the_place_in_the_queue(mailbox: Mailbox) -> None:
    """A command that came later never has the lower number, wherever its giver is interrupted."""

    def count() -> Iterator[int]:
        for number in itertools.count():
            held.append(mailbox._changed._is_owned())  # type: ignore[attr-defined]  # it has no public way
            yield number

    held: list[bool] = []
    mailbox._numbers = count()  # type: ignore[assignment]  # a spy
    give(mailbox, "pause", "resume")
    assert held == [True, True]


def test_interrupts_never_leave_the_mailbox_locked(mailbox: Mailbox) -> None:
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
                    mailbox.give(Resume()).cancel()
            except KeyboardInterrupt:
                interrupted += 1
            mailbox.collect(Place.STEP)
        assert interrupted > 100
        other = threading.Thread(target=mailbox.poke, daemon=True)
        other.start()
        other.join(10.0)
        assert not other.is_alive(), "the mailbox is locked for ever"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
