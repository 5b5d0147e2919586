"""engine/bus/deadlock.py: waits that could never end raise at once, those that end are left alone."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import anyio
import pytest

from offloop.engine import (
    Callback,
    CheckpointSaved,
    DeadlockError,
    EpochEnd,
    EpochStart,
    Run,
    StepPoint,
    TrainEnd,
    TrainStart,
    decides,
    in_step,
)
from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.commands import Call, Command, SaveCheckpoint, Stop, Validate
from offloop.engine.bus.deadlock import Places
from offloop.engine.testing import tiny_loader, tiny_trainer

SAVED = CheckpointSaved(path="/here", saved_step=1)
LONG = 60.0
"""Seconds; no test takes that long unless it fails."""

GIVEN: list[Callable[[Run], "Future[Any]"]] = [
    lambda run: run.pause_nowait(),
    lambda run: run.stop_nowait(),
    lambda run: run.call_nowait(lambda trainer: None),
]


@pytest.mark.parametrize("give", GIVEN)
def test_a_plain_decider_that_waits_for_a_command_fails(give: Callable[[Run], "Future[Any]"]) -> None:
    class Waits(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            give(run).result()

    with pytest.raises(DeadlockError, match=r"this is the training thread.* Leave \.result\(\) out"):
        tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Waits()])


def test_a_step_hook_that_waits_for_a_command_fails() -> None:
    class Waits(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.run.pause_nowait().exception(timeout=LONG)

    with pytest.raises(DeadlockError, match=r"run\.pause_nowait\(\.\.\.\)\.result\(\) would wait for ever"):
        tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Waits()])


def test_a_called_function_that_waits_for_a_command_fails() -> None:
    class Calls(Callback):
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            self.call = run.call_nowait(lambda trainer: run.stop_nowait().result())

    callback = Calls()
    tiny_trainer().train(tiny_loader(1), max_steps=10**6, callbacks=[callback])
    assert isinstance(callback.call.exception(0), DeadlockError)


@pytest.mark.anyio
async def test_an_async_decider_that_waits_for_a_command_fails() -> None:
    class Waits(Callback):
        @decides
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            run.stop_nowait().result()

    with anyio.fail_after(LONG), pytest.raises(DeadlockError, match="takes effect when the decider returns"):
        await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[Waits()])


@pytest.mark.anyio
async def test_a_thread_that_an_async_decider_waits_for_fails() -> None:
    class Waits(Callback):
        @decides
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            await anyio.to_thread.run_sync(lambda: run.stop_nowait().result())

    with anyio.fail_after(LONG), pytest.raises(DeadlockError, match="training waits for this decider"):
        await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[Waits()])


@pytest.mark.anyio
async def test_code_on_the_event_loop_is_told_to_await() -> None:
    tried = anyio.Event()

    class Waits(Callback):
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            try:
                run.call_nowait(lambda trainer: None).result()
            finally:
                tried.set()

    with anyio.fail_after(LONG):
        async with tiny_trainer().start(tiny_loader(1), max_steps=10**6, callbacks=[Waits()]) as run:
            given = run.pause_nowait()
            with pytest.raises(DeadlockError, match=r"write await run\.resume"):
                run.resume_nowait().result(timeout=LONG)
            await tried.wait()
            await run.stop()
            assert given.result() is None  # it is done: nothing is waited for
    (error,) = run.result.callback_errors["Waits"]
    assert "DeadlockError: run.call_nowait(...).result() would block the event loop" in error


def test_a_plain_observer_may_wait_while_training_does_not_wait_for_it() -> None:
    seen: list[object] = []

    class Waits(Callback):
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            seen.append(run.call_nowait(lambda trainer: trainer.epoch >= 0).result(LONG))
            seen.append(run.stop_nowait("enough").exception(LONG))

    result = tiny_trainer().train(tiny_loader(1), max_steps=10**6, callbacks=[Waits()])
    assert (result.status, seen) == ("stopped", [True, None])


def test_a_run_ends_whose_decider_waits_for_an_observer_that_waits_for_a_command() -> None:
    """The command is applied before the decider's boundary, or the wait for it fails: both may happen."""
    has_stepped = threading.Event()

    class Waits(Callback):
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            assert has_stepped.wait(LONG)
            run.call_nowait(lambda trainer: None).result()

        @in_step
        def after_step(self, point: StepPoint) -> None:
            has_stepped.set()

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            """Its observers have handled what came before."""

    result = tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Waits()])
    assert result.status == "completed"
    errors = result.callback_errors.get("Waits", ())
    assert all("training waits until this callback has handled its events" in each for each in errors)


def test_a_wait_of_a_worker_ends_when_training_begins_to_wait_for_its_callback() -> None:
    mailbox = Mailbox()
    given, begun, failures = mailbox.give(Validate()), threading.Event(), list[BaseException]()

    def work() -> None:
        with mailbox.places.worker("Waits", lambda: False):
            begun.set()
            try:
                given.result()
            except DeadlockError as error:
                failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(LONG)
    with mailbox.standing_still("Waits"):
        thread.join(LONG)
    assert [type(each) for each in failures] == [DeadlockError]


def test_a_worker_whose_full_buffer_holds_training_up_fails() -> None:
    places, future = Places(lambda: False), Mailbox().give(Stop())
    with places.worker("Blocks", lambda: True):
        assert "training waits until this callback" in (places.why_endless(Stop()) or "")
    with places.worker("Blocks", lambda: False):
        assert places.why_endless(Stop()) is None
    with pytest.raises(TimeoutError):
        future.result(0)


def test_another_runs_callback_of_the_same_name_may_wait() -> None:
    one, other = Mailbox(), Mailbox()
    with one.places.worker("Same", lambda: False), other.standing_still("Same"):
        assert other.places.why_endless(Stop()) is None
    with one.places.worker("Same", lambda: False), one.standing_still("Same"):
        assert one.places.why_endless(Stop()) is not None


@pytest.mark.anyio
async def test_a_callback_that_waits_for_the_end_of_its_run_fails() -> None:
    class Waits(Callback):
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            self.run = run
            await run.wait()

        async def on_train_end(self, event: TrainEnd, run: Run) -> None:
            await run.wait()

        async def close(self) -> None:
            await self.run.wait()

    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[Waits()])
    errors = result.callback_errors["Waits"]
    assert [each.split(":")[0] for each in errors] == ["TrainStart", "TrainEnd", "close"]
    assert all("Handle TrainEnd" in each for each in errors)


@pytest.mark.anyio
async def test_tasks_beside_a_run_may_wait_for_its_end() -> None:
    statuses: list[str] = []

    async def watch(run: Run) -> None:
        statuses.append((await run.wait()).status)

    class Starts(Callback):
        async def on_train_start(self, event: TrainStart, run: Run) -> None:
            tasks.start_soon(watch, run)

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            await tiny_trainer().train_async(tiny_loader(1), epochs=1, callbacks=[Starts()])
    assert statuses == ["completed"]


@pytest.mark.parametrize("decides_it", [True, False])
def test_a_command_that_is_not_awaited_in_a_plain_handler_is_an_error(decides_it: bool) -> None:
    """It would be a coroutine that never runs: the command was given to nobody."""

    class Forgets(Callback):
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            run.stop("enough")  # type: ignore[unused-coroutine]  # the mistake

        if decides_it:
            on_epoch_end = decides(on_epoch_end)

    words = r"run\.stop\(\) must be awaited, and this is a plain def.*write run\.stop_nowait\(\.\.\.\)"
    if decides_it:
        with pytest.raises(RuntimeError, match=words):
            tiny_trainer().train(tiny_loader(1), epochs=2, callbacks=[Forgets()])
        return
    result = tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Forgets()])
    assert "write run.stop_nowait(...)" in result.callback_errors["Forgets"][0]


def test_an_attribute_stops_no_run() -> None:
    class Stops(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            run.should_stop = True

    with pytest.raises(AttributeError, match=r'call run\.stop_nowait\("why"\)'):
        tiny_trainer().train(tiny_loader(1), epochs=2, callbacks=[Stops()])


def run_in_thread(work: Callable[[], object]) -> None:
    """Run work in a thread, and wait for it; a wait that never ends fails the test."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LONG)
    assert not thread.is_alive()


@pytest.mark.parametrize("place", ["training thread", "event loop"])
def test_a_command_that_is_completed_during_the_check_is_no_deadlock(place: str) -> None:
    """Another thread completes it between two looks at its state: it is neither pending nor running then."""
    mailbox = Mailbox()
    mailbox.places.training_thread = threading.get_ident() if place == "training thread" else None
    mailbox.places.event_loop_thread = threading.get_ident() if place == "event loop" else None
    future = mailbox.give(SaveCheckpoint())
    assert future.set_running_or_notify_cancel()
    look = future.running

    def running() -> bool:
        is_running = look()
        if not future.done():
            future.set_result(SAVED)
        return is_running

    future.running = running  # type: ignore[method-assign]
    assert future.result(timeout=LONG) is SAVED


def test_a_checkpoint_on_its_way_may_be_waited_for_while_training_waits_for_the_callback() -> None:
    mailbox, failures = Mailbox(), list[BaseException]()
    future, begun = mailbox.give(SaveCheckpoint()), threading.Event()

    def work() -> None:
        with mailbox.places.worker("Waits", lambda: False):
            begun.set()
            try:
                assert future.result() is SAVED
            except BaseException as error:
                failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert begun.wait(LONG)
    assert future.set_running_or_notify_cancel()
    with mailbox.standing_still("Waits"):
        while mailbox.places._waiting and not all(
            each.is_set() for each in mailbox.places._waiting
        ):  # it looks again, and goes on waiting
            pass
        future.set_result(SAVED)
        thread.join(LONG)
    assert not thread.is_alive() and not failures


@pytest.mark.parametrize("command", [Validate(), Call(lambda trainer: trainer.step)])
def test_a_command_at_work_in_the_training_thread_cannot_be_waited_for_there(command: Command[Any]) -> None:
    mailbox = Mailbox()
    mailbox.places.training_thread = threading.get_ident()
    future = mailbox.give(command)
    assert future.set_running_or_notify_cancel()
    with pytest.raises(DeadlockError, match="this is the training thread"):
        future.result(timeout=LONG)


def test_a_validation_at_work_cannot_be_waited_for_by_its_own_hook() -> None:
    class Waits(Callback):
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            self.given = run.validate_nowait()
            self.is_given.set()

        def __init__(self) -> None:
            self.is_given = threading.Event()

        @in_step
        def after_step(self, point: StepPoint) -> None:
            assert self.is_given.wait(LONG)

        @in_step
        def before_validation(self, point: StepPoint) -> None:
            self.given.result(LONG)

    with pytest.raises(
        DeadlockError, match=r"run\.validate_nowait\(\.\.\.\)\.result\(\) would wait for ever"
    ):
        tiny_trainer().train(tiny_loader(2), tiny_loader(1), max_steps=10**6, callbacks=[Waits()])


def test_a_plain_observer_may_run_an_event_loop_of_its_own() -> None:
    class Runs(Callback):
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            anyio.run(self.stop, run)

        async def stop(self, run: Run) -> None:
            with pytest.raises(DeadlockError, match="Handle TrainEnd"):
                await run.wait()
            await run.stop("enough")

    result = tiny_trainer().train(tiny_loader(1), max_steps=10**6, callbacks=[Runs()])
    assert (result.status, result.reason, result.callback_errors) == ("stopped", "enough", {})


def test_a_thread_with_the_number_of_one_that_has_ended_is_not_taken_for_it() -> None:
    kept: list[Run] = []

    class Keeps(Callback):
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            kept.append(run)

    tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Keeps()])
    (run,) = kept
    statuses: list[str] = []

    async def wait() -> None:
        statuses.append((await run.wait()).status)

    assert run._mailbox.places.training_thread is None  # numbers of threads are given again
    run_in_thread(lambda: anyio.run(wait))
    assert statuses == ["completed"]
