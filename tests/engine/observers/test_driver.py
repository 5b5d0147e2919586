"""engine/observers/driver.py: coroutines are measured, and abandoned if they do not end."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from offloop.engine import Callback, EpochEnd, EpochStart, Run, TrainEnd, decides
from offloop.engine.observers.cost_watch import Stretch
from offloop.engine.observers.driver import Driver, allowing_abandoned
from offloop.engine.session import lifetime
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

LONG = 30.0


@pytest.fixture(autouse=True, scope="module")
def everything_is_loaded() -> None:
    """Imports would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


def ignore(stretch: Stretch) -> None:
    pass


class Swallows:
    """Awaits something for ever, whatever is raised, as a retry loop around a bare `except` does."""

    def __init__(self) -> None:
        self.swallowed = 0
        self.began = anyio.Event()
        self.wait: Callable[[float], Any] = anyio.sleep

    async def __call__(self) -> None:
        while True:
            with contextlib.suppress(BaseException):
                self.began.set()
                await self.wait(0.5)
            self.swallowed += 1


async def sleep_in_a_scope(seconds: float) -> None:
    with anyio.move_on_after(100):
        await anyio.sleep(seconds)


@pytest.mark.anyio
@pytest.mark.parametrize("wait", [anyio.sleep, sleep_in_a_scope])
async def test_coroutine_that_swallows_its_cancellation_is_abandoned(wait: Callable[[float], Any]) -> None:
    swallows, driver, after = Swallows(), Driver("Swallows"), []
    swallows.wait = wait

    async def drive() -> None:
        await driver.drive(swallows(), ignore)
        after.append("not reached")

    with anyio.fail_after(LONG):
        with allowing_abandoned(lambda: driver):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(drive)
                await swallows.began.wait()
                driver.abandon_after(0.05)
                tasks.cancel_scope.cancel()
        await anyio.lowlevel.checkpoint()
    assert swallows.swallowed
    assert not after


@pytest.mark.anyio
async def test_coroutine_has_its_time_to_clean_up() -> None:
    driver, cleaned, began = Driver("Cleans"), anyio.Event(), anyio.Event()

    async def cleans() -> None:
        try:
            began.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            cleaned.set()

    async def drive() -> None:
        await driver.drive(cleans(), ignore)

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive)
            await began.wait()
            driver.abandon_after(LONG)
            tasks.cancel_scope.cancel()
    assert cleaned.is_set()


@pytest.mark.anyio
async def test_coroutine_gets_its_cancellation_however_late_that_comes() -> None:
    """A busy machine may deliver it only when the time for it is over."""
    driver, cleaned, began = Driver("Cleans"), anyio.Event(), anyio.Event()

    async def cleans() -> None:
        try:
            began.set()
            await anyio.sleep_forever()
        finally:
            cleaned.set()

    async def drive() -> None:
        await driver.drive(cleans(), ignore)

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive)
            await began.wait()
            driver.abandon_after(0.0)
            tasks.cancel_scope.cancel()
    assert cleaned.is_set()
    assert not driver.has_abandoned


@pytest.mark.anyio
async def test_leaving_hides_no_other_failure() -> None:
    with pytest.RaisesGroup(RuntimeError):
        with allowing_abandoned(lambda: Driver("Fails")):
            async with anyio.create_task_group():
                raise RuntimeError("of something else")


@pytest.mark.anyio
async def test_own_timeouts_of_a_coroutine_are_its_own() -> None:
    async def times_out() -> str:
        with anyio.move_on_after(0.001):
            await anyio.sleep_forever()
        return "done"

    stretches: list[Stretch] = []
    assert await Driver("Times").drive(times_out(), stretches.append) == "done"
    assert len(stretches) == 2


# In runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetime, "SWALLOWING", 0.05)


@pytest.mark.anyio
async def test_close_that_swallows_its_cancellation_is_abandoned(soon: None) -> None:
    class Retries(Callback):
        async def close(self) -> None:
            await Swallows()()

    recorder, trainer = Recorder(), tiny_trainer(drain_timeout=0.1)
    with anyio.fail_after(LONG):
        result = await trainer.train_async(tiny_loader(1), epochs=1, callbacks=[Retries(), recorder])
    assert result.status == "completed"
    assert [each.split(":")[0] for each in result.callback_errors["Retries"]] == ["close"]
    assert recorder.is_closed


@pytest.mark.anyio
async def test_decider_that_swallows_its_timeout_is_abandoned_and_its_callback_goes_on(soon: None) -> None:
    class Retries(Callback):
        handled = 0

        @decides(timeout=0.01)
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            await Swallows()()

        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            with anyio.move_on_after(0.001):  # a timeout of its own is no sign of swallowing
                await anyio.sleep_forever()
            self.handled += 1

    retries, trainer = Retries(), tiny_trainer()
    with anyio.fail_after(LONG):
        result = await trainer.train_async(tiny_loader(1), epochs=2, callbacks=[retries])
    assert (result.status, result.steps, retries.handled) == ("completed", 2, 2)
    assert not result.callback_errors


@pytest.mark.anyio
async def test_cancel_ends_a_run_whose_decider_swallows_it(soon: None) -> None:
    class Retries(Callback):
        @decides
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            run.cancel("enough")
            await Swallows()()

        async def on_train_end(self, event: TrainEnd, run: Run) -> None:
            self.ended = event.status

    retries, trainer = Retries(), tiny_trainer()
    with anyio.fail_after(LONG):
        result = await trainer.train_async(EndlessLoader(), epochs=2, callbacks=[retries])
    assert result.status == retries.ended == "cancelled"


@pytest.mark.anyio
async def test_in_haste_callbacks_that_swallow_share_two_seconds(soon: None) -> None:
    """As after a second Ctrl-C: the drain and every `close()` end, however long `drain_timeout` is."""

    class Retries(Callback):
        async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            session = run._session
            session.lifetime.on_signal("SIGINT", 1)
            session.lifetime.on_signal("SIGINT", 2)
            self.began = time.perf_counter()
            await Swallows()()

        async def close(self) -> None:
            await Swallows()()

    recorder, trainer = Recorder(), tiny_trainer(drain_timeout=3600.0)
    retries = [Retries(), Retries(), Retries()]
    with anyio.fail_after(LONG):
        await trainer.train_async(EndlessLoader(), epochs=2, callbacks=[*retries, recorder])
    assert trainer.last_run is not None
    result = trainer.last_run.result
    assert result.status in ("stopped", "cancelled")  # training may end between the two signals
    assert [[each.split(":")[0] for each in errors] for errors in result.callback_errors.values()] == [
        ["drain", "close"]
    ] * 3
    assert recorder.is_closed
