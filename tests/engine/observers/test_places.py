"""Observers behave alike in both places where they may run: order, buffers, failures, commands, checkpoints.

How they end is in test_places_at_the_end.py. What only a child process does is in tests/engine/processes.
"""

import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from placed_callbacks import (
    LONG,
    BlocksAsync,
    BlocksPlain,
    FailsIn,
    FailsToKeepLog,
    Forgets,
    Form,
    Gate,
    KeepsLog,
    Lags,
    Orders,
    OwnError,
    PausesAndStops,
    Place,
    Raises,
    UnpicklableError,
)

from offloop.engine import (
    Callback,
    CallbackFailed,
    EpochEnd,
    EventsDropped,
    RunHandle,
    RunResult,
    StateChanged,
    decides,
)
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True, scope="module")
def everything_is_loaded() -> None:
    """Imports would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


in_both_places = pytest.mark.parametrize("place", ["here", "process"])


async def train(*callbacks: Callback, epochs: int = 1, batches: int = 4, **knobs: Any) -> RunResult:
    """Train for some epochs of a few steps."""
    with anyio.fail_after(LONG):
        return await tiny_trainer(**knobs).train_async(
            tiny_loader(batches), tiny_loader(1), epochs=epochs, callbacks=callbacks
        )


# Order and buffers -------------------------------------------------------------------------------


@pytest.mark.uvloop
@in_both_places
async def test_plain_and_async_handlers_see_one_order_without_gaps(place: Place, tmp_path: Path) -> None:
    orders, recorder = Orders(place, tmp_path / "notes"), Recorder()
    result = await train(orders, recorder, epochs=3)
    *seqs, last = orders.noted()
    assert last == "close"
    assert seqs == [str(event.seq) for event in recorder.events] == [str(n) for n in range(len(seqs))]
    costs = result.callback_costs["Orders"]
    assert (costs.events, costs.failures, costs.dropped) == (len(seqs), 0, 0)
    assert costs.cpu > 0 and costs.wall > 0 and costs.lag > 0
    assert costs.warning == "" and costs.slowdown is None


@in_both_places
async def test_a_handler_that_lags_loses_samples_which_are_counted_and_no_milestone(
    place: Place, tmp_path: Path
) -> None:
    recorder, go = Recorder(), tmp_path / "go"
    lags = Lags(place, tmp_path / "notes", buffer=10, go=go)
    result = await train(lags, Gate(go), recorder, epochs=5, batches=8)
    noted = lags.noted()
    assert [each for each in noted if not each.startswith("sample")] == [
        *(f"epoch {epoch}" for epoch in range(5)),
        "completed",
        "close",
    ]
    samples = [int(each.removeprefix("sample ")) for each in noted if each.startswith("sample")]
    assert samples == sorted(samples) and samples[-1] == result.steps == 40
    dropped = result.callback_costs["Lags"].dropped
    assert 0 < dropped == result.steps - len(samples)
    reports = [event for event in recorder.of(EventsDropped) if event.subscriber == "Lags"]
    assert sum(event.count for event in reports) == reports[-1].total == dropped


@pytest.mark.uvloop
@in_both_places
async def test_training_waits_for_a_full_buffer_and_commands_of_its_handler_do_not_deadlock(
    place: Place, tmp_path: Path
) -> None:
    plain, awaits = BlocksPlain(place, tmp_path / "plain"), BlocksAsync(place, tmp_path / "async")
    for callback in (plain, awaits):
        with anyio.fail_after(LONG):
            result = await tiny_trainer(flush_interval=0.001).train_async(
                EndlessLoader(), tiny_loader(1), epochs=1, callbacks=[callback]
            )
        assert result.status == "stopped"
        assert not result.callback_errors
    refused, *rest = plain.noted()
    assert "training waits until this callback has handled its events" in refused
    assert rest == awaits.noted() == ["no step is missing", "close"]


# Failures ----------------------------------------------------------------------------------------


@in_both_places
async def test_failures_are_isolated_counted_and_reported(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = FailsIn(place, "plain", tmp_path / "plain", epochs=(0, 2))
    awaits = FailsIn(place, "async", tmp_path / "async", epochs=(0, 2))
    recorder = Recorder()
    result = await train(plain, awaits, recorder, epochs=4)
    assert result.status == "completed"
    assert plain.noted() == awaits.noted() == ["0", "1", "2", "3", "close"]
    errors = tuple(f"EpochEnd: ValueError: in epoch {epoch}" for epoch in (0, 2))
    assert result.callback_errors == {"FailsIn": errors, "FailsIn#2": errors}
    for name in result.callback_errors:
        # The second one came within a second: it is in the result.
        failed, *more = [event for event in recorder.of(CallbackFailed) if event.callback == name]
        assert (failed.event, failed.error) == ("EpochEnd", "ValueError: in epoch 0")
        assert (failed.failures, failed.disabled) == (1, False)
        assert 'raise ValueError(f"in epoch {event.epoch}")' in failed.traceback
        assert len(more) <= 1
        assert result.callback_costs[name].failures == 2
        assert f"callback {name} failed in EpochEnd" in caplog.text
    assert 'raise ValueError(f"in epoch {event.epoch}")' in caplog.text
    records = [each for each in caplog.records if "failed in EpochEnd" in each.getMessage()]
    assert {each.process == os.getpid() for each in records} == {place == "here"}


@in_both_places
async def test_ten_failures_in_a_row_switch_a_callback_off(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = range(1, 11)
    plain = FailsIn(place, "plain", tmp_path / "plain", epochs=(*row, 12))
    awaits = FailsIn(place, "async", tmp_path / "async", epochs=(*row, 12))
    almost = FailsIn(place, "plain", tmp_path / "almost", epochs=(*range(9), *range(10, 13)))
    recorder = Recorder()
    result = await train(plain, awaits, almost, recorder, epochs=13, batches=1)
    assert plain.noted() == awaits.noted() == [*map(str, range(11)), "close"]
    assert almost.noted() == [*map(str, range(13)), "close"]
    failures = [costs.failures for name, costs in result.callback_costs.items() if name != "Recorder"]
    assert failures == [10, 10, 12]
    off = [event for event in recorder.of(CallbackFailed) if event.disabled]
    assert {(event.callback, event.failures) for event in off} == {("FailsIn", 10), ("FailsIn#2", 10)}
    assert caplog.text.count("it failed 10 times in a row and is off now") == 2
    assert len(recorder.of(EpochEnd)) == 13


@in_both_places
@pytest.mark.parametrize(
    ("error", "kind", "form"),
    [
        ("own", OwnError, "plain"),
        ("unpicklable", UnpicklableError, "async"),
        ("exit", SystemExit, "plain"),
        ("exit", SystemExit, "async"),
        ("interrupt", KeyboardInterrupt, "async"),
    ],
)
async def test_an_exception_that_ends_the_run_reaches_its_caller_as_itself(
    place: Place, error: str, kind: type[BaseException], form: Form, tmp_path: Path
) -> None:
    callback = Raises(place, form, tmp_path / "notes", error=error)
    if issubclass(kind, Exception):
        callback.on_error = "raise"  # type: ignore[misc]  # of this one only
    with pytest.raises(kind) as raised:
        await train(callback, epochs=10_000_000)
    assert type(raised.value) is kind
    assert getattr(raised.value, "code", 3) == 3
    assert isinstance(raised.value, SystemExit) or "boo" in str(raised.value)
    if place == "process":
        assert any("in the process of Raises" in note for note in raised.value.__notes__)
    assert callback.noted() == ["close"]


@in_both_places
async def test_exceptions_of_any_kind_are_reported_by_their_text(place: Place, tmp_path: Path) -> None:
    texts = {
        "own": "OwnError: boo!",
        "unpicklable": "UnpicklableError: ('boo!', <unlocked _thread.lock object at",
        "local": "LocalError: boo",
        "unprintable": "UnprintableError: <its text raised RuntimeError>",
        "unencodable": "OSError: caf\\udce9",
    }
    callbacks = [Raises(place, "plain", tmp_path / each, error=each) for each in texts]
    result = await train(*callbacks)
    assert result.status == "completed"
    for (error,), text in zip(result.callback_errors.values(), texts.values(), strict=True):
        assert error.startswith(f"EpochEnd: {text}")


@in_both_places
async def test_a_plain_handler_that_returns_an_awaitable_is_a_failure(place: Place, tmp_path: Path) -> None:
    result = await train(Forgets(place, "plain", tmp_path / "notes"))
    (error,) = result.callback_errors["Forgets"]
    assert error.startswith("EpochEnd: TypeError: on_epoch_end is a plain def that returned an awaitable")


# Commands and checkpoints ------------------------------------------------------------------------


@in_both_places
async def test_a_callback_pauses_resumes_and_stops_the_run(place: Place, tmp_path: Path) -> None:
    callback, recorder = PausesAndStops(place, tmp_path / "notes"), Recorder()
    with anyio.fail_after(LONG):
        result = await tiny_trainer().train_async(
            EndlessLoader(), max_steps=1_000_000_000, callbacks=[callback, recorder]
        )
    assert (result.status, result.reason) == ("stopped", "seen enough")
    name = "PausesAndStops"
    assert callback.noted() == [
        "paused",
        f"paused by {name}",
        f"running by {name}",
        f"stopping by {name}",
        "close",
    ]
    assert [event.reason for event in recorder.of(StateChanged)] == ["a look", "", "seen enough"]


class Saves(Callback):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.checkpoint_nowait()


@in_both_places
async def test_a_checkpoint_is_announced_once_the_log_of_what_came_before_is_durable(
    place: Place, tmp_path: Path
) -> None:
    keeps = KeepsLog(place, tmp_path / "notes")
    await train(keeps, Saves(), run_dir=tmp_path / "runs")
    assert keeps.noted() == [*(f"step {step}" for step in range(1, 5)), "durable", "saved 4", "close"]


@in_both_places
async def test_a_log_that_cannot_be_made_durable_is_reported_and_the_checkpoint_is_saved(
    place: Place, tmp_path: Path
) -> None:
    fails, keeps = FailsToKeepLog(place, tmp_path / "fails"), KeepsLog("here", tmp_path / "keeps")
    result = await train(fails, keeps, Saves(), run_dir=tmp_path / "runs")
    assert result.callback_errors["FailsToKeepLog"] == ("make_durable: OSError: disk full",)
    assert "saved 4" in keeps.noted()
    assert result.callback_costs["FailsToKeepLog"].failures == 1
