"""Observers end alike in both places where they may run: close, cancellation, drain, a second run."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from placed_callbacks import (
    LONG,
    ClosesAsync,
    Counts,
    FailsToClose,
    Gate,
    Hangs,
    HangsAtTheEnd,
    Place,
    ReturnsClose,
    Told,
    exists,
)

from offloop.engine import Callback, EpochEnd, Run, RunResult, TrainEnd, Trainer
from offloop.engine.session import lifetime
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True, scope="module")
def everything_is_loaded() -> None:
    """Imports would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


in_both_places = pytest.mark.parametrize("place", ["here", "process"])
ENDLESS = 1_000_000_000  # steps


# Close -------------------------------------------------------------------------------------------


@in_both_places
async def test_close_is_called_once_in_each_form_and_its_failure_is_reported(
    place: Place, tmp_path: Path
) -> None:
    awaits, returns = ClosesAsync(place, tmp_path / "awaits"), ReturnsClose(place, tmp_path / "returns")
    fails = FailsToClose(place, tmp_path / "fails")
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(
            tiny_loader(2), epochs=1, callbacks=[awaits, returns, fails]
        )
    assert awaits.noted() == returns.noted() == ["completed", "close"]
    assert fails.noted() == ["close"]
    assert result.callback_errors == {"FailsToClose": ("close: OSError: disk full",)}


class Fails(Trainer):
    """Fails in its third step."""

    def training_step(self, batch: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            raise ValueError("in training")
        return super().training_step(batch)


@pytest.mark.uvloop
@in_both_places
async def test_the_end_and_close_come_however_the_run_ends(place: Place, tmp_path: Path) -> None:
    failed, cancelled = Counts(place, tmp_path / "failed"), Counts(place, tmp_path / "cancelled")
    with anyio.fail_after(LONG):
        with pytest.raises(ValueError, match="in training"):
            await tiny_trainer(Fails).train_async(tiny_loader(), epochs=1, callbacks=[failed])
        async with tiny_trainer(callbacks=[cancelled]).start(EndlessLoader(), max_steps=ENDLESS) as run:
            run.cancel("enough")
    assert failed.noted() == ["begin", "failed after 2, closing", "close"]
    assert cancelled.noted() == ["begin", f"cancelled after {run.result.steps}, closing", "close"]


@in_both_places
async def test_a_second_run_begins_after_reset(place: Place, tmp_path: Path) -> None:
    counts = Counts(place, tmp_path / "notes")
    trainer = tiny_trainer()
    with anyio.fail_after(LONG):
        for steps in (3, 5):
            await trainer.train_async(tiny_loader(steps), epochs=1, callbacks=[counts])
    assert counts.noted() == [
        "begin",
        "completed after 3, closing",
        "close",
        "begin",
        "completed after 5, closing",
        "close",
    ]


# Handlers that hang ------------------------------------------------------------------------------

DRAIN = 0.1  # seconds for handlers that hang
WAYS = ("awaits", "computes", "swallows")


class LetsClose(Callback):
    """Gives callbacks all the time they need for `close`, which in a process takes a while on a busy machine."""

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks

    async def on_train_end(self, event: TrainEnd, run: Run) -> None:
        for each in self.callbacks:
            each.drain_timeout = LONG


@pytest.fixture
def hanging(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Hangs]]:
    """Callbacks that hang, each in its way."""
    monkeypatch.setattr(lifetime, "SWALLOWING", 0.05)
    hanging = [Hangs(place, way, tmp_path / way, drain_timeout=DRAIN) for way in WAYS]
    yield hanging
    for each in hanging:
        each.release.touch()
    for thread in threading.enumerate():
        if thread.name.startswith("offloop-Hangs"):
            thread.join(LONG)


def check_end(hanging: list[Hangs], result: RunResult, recorder: Recorder) -> None:
    """Check that handlers that hung were ended in order, and that no other callback has missed anything."""
    for each, name in zip(hanging, ("Hangs", "Hangs#2", "Hangs#3"), strict=True):
        first, *middle, last = each.noted()
        assert middle == ([] if each.way == "computes" else ["is cancelled"])
        assert last == "close"
        pid = int(first.removeprefix("hangs in "))
        if each.runs_in == "process":
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        else:
            assert pid == os.getpid()
        (error,) = result.callback_errors[name]
        assert error.startswith("drain: TimeoutError: still busy ")
        assert result.callback_costs[name].failures == 1
    assert recorder.names()[-1] == "TrainEnd" and recorder.is_closed


async def told(run: Run, times: int) -> None:
    """Wait until handlers have told something so many times."""
    with anyio.fail_after(LONG):
        async for _ in run.events(Told):
            times -= 1
            if times == 0:
                return


@pytest.mark.uvloop
@in_both_places
async def test_a_run_whose_task_is_cancelled_ends_though_handlers_hang(
    place: Place, hanging: list[Hangs]
) -> None:
    recorder, trainer = Recorder(), tiny_trainer()

    async def train() -> None:
        await trainer.train_async(
            EndlessLoader(), max_steps=ENDLESS, callbacks=[*hanging, LetsClose(*hanging), recorder]
        )

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(train)
            await anyio.to_thread.run_sync(lambda: recorder.wait_for(Told, times=len(WAYS), timeout=LONG))
            tasks.cancel_scope.cancel()
    assert trainer.last_run is not None
    assert trainer.last_run.result.status == "cancelled"
    check_end(hanging, trainer.last_run.result, recorder)


@in_both_places
async def test_handlers_that_hang_have_their_drain_timeout(place: Place, hanging: list[Hangs]) -> None:
    recorder = Recorder()
    async with tiny_trainer(callbacks=[*hanging, LetsClose(*hanging), recorder]).start(
        EndlessLoader(), max_steps=ENDLESS
    ) as run:
        await told(run, len(WAYS))
        await run.stop()
    assert run.result.status == "stopped"
    check_end(hanging, run.result, recorder)


@in_both_places
async def test_a_handler_that_hangs_at_the_end_is_cancelled_and_closed(place: Place, tmp_path: Path) -> None:
    hangs, recorder = HangsAtTheEnd(place, tmp_path / "notes", drain_timeout=DRAIN), Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(
            tiny_loader(1), epochs=2, callbacks=[hangs, LetsClose(hangs), Gate(), recorder]
        )
    assert hangs.noted()[-1] == "close" and hangs.noted().count("close") == 1
    assert [error.split(":")[0] for error in result.callback_errors["HangsAtTheEnd"]] == ["drain"]
    assert len(recorder.of(EpochEnd)) == 2 and recorder.is_closed


@pytest.mark.parametrize("place", ["here", "process"])
def test_close_is_called_when_the_event_loop_of_the_run_ends(
    place: Place, tmp_path: Path, anyio_backend_name: str
) -> None:
    """`asyncio.run` cancels all tasks at its end, which goes through any shield."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio waits for all tasks")
    counts = Counts(place, tmp_path / "notes")

    async def main() -> None:
        training = asyncio.create_task(
            tiny_trainer().train_async(EndlessLoader(), max_steps=ENDLESS, callbacks=[counts])
        )
        await exists(counts.notes)
        assert not training.done()

    asyncio.run(main())
    first, *_, last = counts.noted()
    assert (first, last) == ("begin", "close") and counts.noted().count("close") == 1
