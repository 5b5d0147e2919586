"""Commands that come faster than they can be applied: training goes on, and ends when it is told to."""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import anyio
import pytest

from offloop.engine import Callback, EpochStart, Run, RunEndedError, TrainStart, ValidationEnd, decides
from offloop.engine.testing import EndlessLoader, Recorder, tiny_batches, tiny_loader, tiny_trainer

LONG = 60.0


@pytest.fixture(autouse=True, scope="module")
def everything_is_loaded() -> None:
    """Imports would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


class Flood(Callback):
    """Gives a call at the start, which gives itself again each time it is applied."""

    def __init__(self, then: Callable[[int, Run], object] = lambda count, run: None) -> None:
        self.then = then
        self.count = 0
        self.steps: list[int] = []
        self.futures: list[Future[Any]] = []

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self.run = run
        self.futures.append(run.call_nowait(self._again))

    def _again(self, trainer: object) -> None:
        self.count += 1
        self.steps.append(self.run.step)
        self.futures.append(self.run.call_nowait(self._again))
        self.then(self.count, self.run)


@pytest.mark.anyio
async def test_training_goes_on_between_commands() -> None:
    flood = Flood()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(tiny_loader(5), epochs=2, callbacks=[flood])
    assert (result.status, result.steps) == ("completed", 10)
    assert set(range(1, 10)) <= set(flood.steps)
    assert isinstance(flood.futures[-1].exception(0), RunEndedError)


@pytest.mark.anyio
async def test_stop_ends_the_run_and_what_is_still_queued_fails() -> None:
    flood = Flood(lambda count, run: run.stop_nowait("enough") if count == 10 else None)
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(EndlessLoader(), epochs=1, callbacks=[flood])
    assert (result.status, result.reason) == ("stopped", "enough")
    assert flood.count == 11  # the one that was there at the boundary of the stop, and none after it
    assert isinstance(flood.futures[-1].exception(0), RunEndedError)


@pytest.mark.anyio
async def test_cancel_ends_the_run_whatever_is_queued() -> None:
    applied: list[int] = []

    class Queues(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            def apply(number: int) -> None:
                applied.append(number)
                if number == 3:
                    run.cancel("enough")

            self.futures = [
                run.call_nowait(lambda trainer, number=number: apply(number))  # type: ignore[misc]  # a default
                for number in range(1000)
            ]

    queues, trainer = Queues(), tiny_trainer()
    with anyio.fail_after(LONG):
        result = await trainer.train_async(EndlessLoader(), epochs=1, callbacks=[queues])
    assert result.status == "cancelled"
    assert applied == [0, 1, 2, 3]
    assert all(isinstance(future.exception(0), RunEndedError) for future in queues.futures[4:])


@pytest.mark.anyio
async def test_validations_that_are_asked_for_in_a_row_do_not_nest() -> None:
    """One that is asked for during another begins when that one has ended, not inside of it."""
    depths: list[int] = []

    def depth() -> int:
        frame, count = sys._getframe(), 0
        while frame.f_back is not None:
            frame, count = frame.f_back, count + 1
        return count

    class Batches:
        run: Run | None = None

        def __iter__(self) -> Any:
            depths.append(depth())
            if self.run is not None and len(depths) < 300:
                self.run.validate_nowait()
            return iter(tiny_batches(1))

    batches = Batches()

    class Starts(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            batches.run = run
            run.validate_nowait()

    recorder = Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(
            EndlessLoader(), batches, max_steps=400, callbacks=[Starts(), recorder]
        )
    assert (result.status, result.steps) == ("completed", 400)
    assert len(recorder.of(ValidationEnd)) >= 300
    assert max(depths) - min(depths) < 20


@pytest.mark.anyio
async def test_a_paused_run_obeys_a_flood_and_trains_no_step() -> None:
    def then(count: int, run: Run) -> None:
        if count == 2:
            run.pause_nowait()
        elif count == 100:
            run.resume_nowait()
        elif count == 110:
            run.stop_nowait()

    flood = Flood(then)
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(EndlessLoader(), epochs=1, callbacks=[flood])
    assert result.status == "stopped"
    assert len(set(flood.steps[3:100])) == 1
    assert flood.steps[105] > flood.steps[50]


@pytest.mark.anyio
async def test_commands_of_a_decider_in_a_validation_on_command_apply_at_that_boundary() -> None:
    order: list[str] = []

    class Decides(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            self.run = run

        @decides
        def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            if not order:
                run.call_nowait(lambda trainer: order.append("decider"))

    class Asks(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            self.run = run

    def ask(trainer: object) -> None:  # from here they are no decider's
        asks.run.validate_nowait()
        asks.run.call_nowait(lambda trainer: order.append("outside"))

    class Begins(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            run.call_nowait(ask)

    asks = Asks()
    with anyio.fail_after(LONG):
        await tiny_trainer().train_async(
            tiny_loader(3), tiny_loader(1), epochs=1, callbacks=[asks, Begins(), Decides()]
        )
    assert order == ["decider", "outside"]
