"""engine/runs.py: runs that outlive what starts them, fail alone and are shut down with a deadline."""

import asyncio
import contextlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointNotFoundError,
    ConfigError,
    EpochEnd,
    Run,
    RunNotFoundError,
    Runs,
    RunsClosedError,
    StepPoint,
    Trainer,
    TrainerBusyError,
    ValidationEnd,
    decides,
    in_step,
)
from offloop.engine import runs as runs_module
from offloop.engine.testing import (
    EndlessLoader,
    HangingCallback,
    Recorder,
    tiny_batches,
    tiny_loader,
    tiny_model,
    tiny_trainer,
)

LONG = 30.0
ENDLESS = 1_000_000_000


@pytest.fixture(autouse=True, scope="module")
def torch_is_warm() -> None:
    """The first optimizer of a process imports half of torch, which would hold a test's event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


class Fault(Exception):
    """What the tests' own code raises."""


class At(Callback):
    """Does something at one step, in the training thread."""

    def __init__(self, step: int, act: Callable[[StepPoint], object]) -> None:
        self.step, self.act = step, act

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.step:
            self.act(point)


class HangingStep(Callback):
    """Holds the training thread in a step until it is released."""

    def __init__(self) -> None:
        self.arrived, self.released = threading.Event(), threading.Event()
        self.is_closed = False

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.arrived.set()
        self.released.wait(LONG)

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def hanging() -> Iterator[HangingStep]:
    callback = HangingStep()
    yield callback
    callback.released.set()


def fail(point: StepPoint) -> None:
    raise Fault("in a step")


def leave_program(point: StepPoint) -> None:
    raise SystemExit(3)


async def start_endless(runs: Runs, **knobs: Any) -> Run:
    return await runs.start(tiny_trainer(**knobs), EndlessLoader(), max_steps=ENDLESS)


# The collection ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_runs_are_found_by_id_while_they_go_on_and_after_their_end() -> None:
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            assert (len(runs), list(runs), runs.results) == (0, [], {})
            first = await runs.start(tiny_trainer(), tiny_loader(2), epochs=1)
            second = await start_endless(runs)
            assert (await first.wait()).status == "completed"
            assert list(runs) == list(runs.keys()) == [first.id, second.id]
            assert list(runs.values()) == [first, second]
            assert dict(runs.items()) == {first.id: first, second.id: second} == dict(runs)
            assert runs[second.id] is second and second.id in runs and "another" not in runs
            assert (first.is_over, second.is_over, runs.active) == (True, False, [second])
            assert runs.results == {first.id: first.result}
            assert repr(runs) == "<Runs: 1 in progress, 1 over>"
            assert runs.get("another") is None
            with pytest.raises(
                RunNotFoundError, match="there is no run 'another' here: it was never"
            ) as caught:
                runs["another"]
            assert caught.value.run_id == "another"
            runs.cancel_all("enough")
            results = await runs.wait()
        assert results == runs.results
        assert (second.result.status, second.result.reason) == ("cancelled", "enough")


@pytest.mark.anyio
async def test_start_takes_what_train_takes(tmp_path: Path) -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            run = await runs.start(
                tiny_trainer(run_dir=tmp_path, run_name="mine"),
                tiny_loader(2),
                tiny_loader(1),
                epochs=2,
                metrics=["accuracy"],
                callbacks=[recorder],
            )
            result = await run.wait()
    assert (run.id, run.dir, result.epochs) == ("mine", tmp_path / "mine", 2)
    assert recorder.names()[-1] == "TrainEnd"
    assert run.metrics == result.metrics and "val_accuracy" in run.metrics


def test_start_has_the_signature_of_train() -> None:
    train, start = (inspect.signature(each).parameters for each in (Trainer.train, Runs.start))
    assert list(start)[1] == "trainer"
    assert [each for name, each in start.items() if name != "trainer"] == list(train.values())


@pytest.mark.anyio
async def test_runs_that_ended_first_are_forgotten_beyond_keep() -> None:
    with anyio.fail_after(LONG):
        async with Runs(keep=2) as runs:
            going_on = await start_endless(runs)
            ended = [await runs.start(tiny_trainer(), tiny_loader(1), epochs=1) for _ in range(4)]
            while len(runs.active) > 1:
                await anyio.lowlevel.checkpoint()
            await anyio.wait_all_tasks_blocked()
            assert len(runs) == 3 and going_on.id in runs
            runs.forget(next(iter(runs.results)))
            assert len(runs.results) == 1
            with pytest.raises(ValueError, match="is in progress: cancel it and wait"):
                runs.forget(going_on.id)
            with pytest.raises(RunNotFoundError):
                runs.forget("another")
            assert all(run.result.status == "completed" for run in ended)
    assert len(runs) == 2


@pytest.mark.anyio
async def test_resumed_run_takes_the_place_of_its_earlier_attempt(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"run_dir": tmp_path, "run_name": "one"}
    with anyio.fail_after(LONG):
        async with Runs(keep=1) as runs:
            other = await runs.start(tiny_trainer(), tiny_loader(1), epochs=1)
            for epochs in (1, 2):
                trainer = tiny_trainer(**knobs, callbacks=[ModelCheckpoint(monitor="train_loss")])
                run = await runs.start(trainer, tiny_loader(2), epochs=epochs, resume="auto")
                assert (await run.wait()).epochs == epochs
                await runs.wait()
            assert runs["one"] is run
            assert other.id not in runs


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep": -1}, "keep must be a whole number of at least 0, got -1; keep=None keeps all"),
        ({"keep": True}, "keep must be a whole number"),
        (
            {"shutdown_timeout": 0},
            "shutdown_timeout must be a number of seconds above 0, got 0; None sets no limit",
        ),
        ({"shutdown_timeout": "1"}, "shutdown_timeout must be a number"),
    ],
)
def test_wrong_argument_is_named(arguments: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Runs(**arguments)


# Failing alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "kind"), [(fail, Fault), (leave_program, SystemExit)])
@pytest.mark.anyio
async def test_run_that_fails_takes_nothing_along(
    act: Callable[[StepPoint], object], kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            other = await start_endless(runs)
            failing = await runs.start(
                tiny_trainer(callbacks=[At(2, act)]), EndlessLoader(), max_steps=ENDLESS
            )
            result = await failing.wait()
            assert (result.status, failing.state, result.steps) == ("failed", "failed", 2)
            assert isinstance(failing.failure, kind)
            assert failing.failure.__notes__ == [f"offloop: run {failing.id}, epoch 0, step 2"]
            (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
            assert record.getMessage() == f"run {failing.id} failed"
            assert record.exc_text is None or act.__name__ in record.exc_text
            assert act.__name__ in caplog.text  # with its traceback
            assert other.state == "running"
            more = await runs.start(tiny_trainer(), tiny_loader(1), epochs=1)
            assert (await more.wait()).status == "completed"
    assert other.result.status == "cancelled"


@pytest.mark.anyio
async def test_failure_that_is_kept_keeps_no_tensors() -> None:
    def fail_with_tensor(point: StepPoint) -> None:
        try:
            tensor = torch.zeros(3)
            seen.append(weakref.ref(tensor))
            raise Fault("with a tensor at hand")
        except Fault as error:
            other = torch.ones(3)
            seen.append(weakref.ref(other))
            raise RuntimeError("on top") from error

    seen: list[weakref.ref[torch.Tensor]] = []
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            trainer = tiny_trainer(callbacks=[At(1, fail_with_tensor)])
            run = await runs.start(trainer, EndlessLoader(), max_steps=ENDLESS)
            await run.wait()
            model = weakref.ref(trainer.model)
            del trainer
    assert [each() for each in seen] == [None, None]
    assert model() is None
    assert str(run.failure) == "on top"
    assert run.failure is not None and run.failure.__traceback__ is not None  # the lines are there still


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ConfigError, "epochs"),
        ({"epochs": 0}, ConfigError, "epochs"),
        ({"max_epochs": 1}, ConfigError, r"start\(\) takes no 'max_epochs': use epochs"),
        ({"epochs": 1, "gradient_clip_val": 1.0}, ConfigError, "gradient_clip_val"),
        ({"epochs": 1, "metrics": ["accurracy"]}, ValueError, "did you mean 'accuracy'"),
        ({"epochs": 1, "resume": "last"}, CheckpointNotFoundError, "no checkpoint 'last'"),
    ],
)
@pytest.mark.anyio
async def test_run_that_cannot_start_is_the_callers_error_alone(
    arguments: Any, error: type[Exception], text: str
) -> None:
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            other = await start_endless(runs)
            with pytest.raises(error, match=text):
                await runs.start(tiny_trainer(), tiny_loader(1), **arguments)
            assert list(runs) == [other.id]
            assert not other.is_over


@pytest.mark.anyio
async def test_trainer_has_one_run_at_a_time() -> None:
    trainer = tiny_trainer()
    refused: list[Exception] = []
    started: list[Run] = []

    async def request() -> None:
        try:
            started.append(await runs.start(trainer, EndlessLoader(), max_steps=ENDLESS))
        except TrainerBusyError as error:
            refused.append(error)

    with anyio.fail_after(LONG):
        async with Runs() as runs:
            async with anyio.create_task_group() as requests:
                for _ in range(3):
                    requests.start_soon(request)
            assert len(refused) == 2
            assert list(runs.values()) == started and not started[0].is_over
            started[0].cancel()
            await started[0].wait()
            again = await runs.start(trainer, tiny_loader(1), epochs=1)
            assert (await again.wait()).status == "completed"


@pytest.mark.anyio
async def test_taken_run_name_is_the_callers_error(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            run = await start_endless(runs, run_dir=tmp_path, run_name="one")
            await run.call(lambda trainer: None)
            with pytest.raises(Exception, match="one"):
                await start_endless(runs, run_dir=tmp_path, run_name="one")
            assert list(runs.values()) == [run] and not run.is_over


@pytest.mark.anyio
async def test_coroutine_of_train_async_is_no_trainer() -> None:
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            for wrong in (tiny_trainer().train_async(tiny_loader(1), epochs=1), tiny_model()):
                with pytest.raises(
                    TypeError, match=r"runs.start\(trainer, train_loader, epochs=10\); got (cor|Seq)"
                ):
                    await runs.start(wrong, tiny_loader(1), epochs=1)  # type: ignore[arg-type]


# Outliving what starts them ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_runs_outlive_the_requests_that_start_them() -> None:
    started: list[Run] = []

    async def request() -> None:
        with anyio.CancelScope() as scope:
            started.append(await start_endless(runs))
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    with anyio.fail_after(LONG):
        async with Runs() as runs:
            async with anyio.create_task_group() as requests:
                for _ in range(4):
                    requests.start_soon(request)
            for run in started:
                while run.step < 3:
                    await anyio.lowlevel.checkpoint()
            assert sorted(runs) == sorted(run.id for run in started)
            assert len({run.id for run in started}) == 4
            started[0].cancel("asked to")
            assert (await started[0].wait()).reason == "asked to"
            assert runs.active == [run for run in runs.values() if run is not started[0]]
    assert [run.result.status for run in started] == ["cancelled"] * 4


@pytest.mark.anyio
async def test_cancelled_request_starts_a_run_or_none() -> None:
    """Never one that goes on and is not in the collection."""
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            for _ in range(3):
                recorder, trainer = Recorder(), tiny_trainer()
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await runs.start(trainer, EndlessLoader(), max_steps=ENDLESS, callbacks=[recorder])
                await anyio.wait_all_tasks_blocked()
                if trainer.last_run is None or trainer.last_run.is_over:
                    continue
                assert trainer.last_run.id in runs
        assert runs.active == []


@pytest.mark.anyio
async def test_other_threads_may_look_and_cancel() -> None:
    def look() -> list[str]:
        states = [run.state for run in runs.values() for _ in range(100)]
        for run in runs.active:
            assert runs[run.id] is run
        runs.cancel_all()
        return states

    with anyio.fail_after(LONG):
        async with Runs() as runs:
            for _ in range(3):
                await start_endless(runs)
            assert len(await anyio.to_thread.run_sync(look)) == 300
            results = await runs.wait()
    assert [result.status for result in results.values()] == ["cancelled"] * 3


@pytest.mark.anyio
async def test_runs_that_meet_at_a_decision_go_on_together() -> None:
    """Successive halving: deciders of several runs wait for each other on one event loop."""

    class Rung:
        def __init__(self, size: int) -> None:
            self.size, self.scores, self.is_complete = size, list[float](), anyio.Event()

        async def is_passed(self, score: float) -> bool:
            self.scores.append(score)
            if len(self.scores) == self.size:
                self.is_complete.set()
            await self.is_complete.wait()
            return score in sorted(self.scores)[: self.size // 2]

    class Halving(Callback):
        @decides
        async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
            rung = rungs.get(event.epoch)
            if rung is not None and not await rung.is_passed(event.metrics["val_loss"]):
                run.stop_nowait("halved")

    rungs = {0: Rung(4), 1: Rung(2)}
    batches = tiny_batches(8)
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            for lr in (1e-4, 1e-3, 1e-2, 1e-1):
                torch.manual_seed(0)
                await runs.start(tiny_trainer(lr=lr), batches, batches, epochs=3, callbacks=[Halving()])
            results = await runs.wait()
    assert [result.epochs for result in results.values()] == [1, 1, 2, 3]
    assert [result.status for result in results.values()] == ["stopped"] * 3 + ["completed"]


# Leaving -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_leaving_cancels_the_runs_and_waits_for_them() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            run = await start_endless(runs, callbacks=[recorder])
            while run.step < 3:
                await anyio.lowlevel.checkpoint()
    assert (run.result.status, run.result.reason) == ("cancelled", "shut down")
    assert recorder.names()[-1] == "TrainEnd" and recorder.is_closed
    assert runs.results == {run.id: run.result}  # it can be read after the block


@pytest.mark.anyio
async def test_exception_in_the_block_comes_out_unwrapped_after_the_runs_have_ended() -> None:
    with anyio.fail_after(LONG):
        with pytest.raises(Fault, match="in the block"):
            async with Runs() as runs:
                run = await start_endless(runs)
                raise Fault("in the block")
    assert run.is_over


@pytest.mark.anyio
async def test_cancelled_block_waits_for_its_runs() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        with anyio.CancelScope() as scope:
            async with Runs() as runs:
                run = await start_endless(runs, callbacks=[recorder])
                scope.cancel()
                await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert run.result.status == "cancelled"
    assert recorder.names()[-1] == "TrainEnd"


def test_task_cancelled_again_and_again_while_it_leaves_waits_for_its_runs() -> None:
    """asyncio's own cancellation goes through anyio's shields."""
    started: list[Run] = []

    async def service() -> None:
        async with Runs() as runs:
            started.append(await start_endless(runs, callbacks=[HangingCallback()], drain_timeout=0.2))
            await asyncio.sleep(LONG)

    async def main() -> None:
        task = asyncio.ensure_future(service())
        while not started or started[0].step < 1:
            await anyio.lowlevel.checkpoint()
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert started[0].result.status == "cancelled"

    asyncio.run(main())


@pytest.mark.anyio
async def test_a_shutdown_while_a_run_is_fetched_leaves_its_trainer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = tiny_trainer()

    async def fetch(*_: object) -> None:
        await runs.shutdown()

    def prepare(*_: object) -> None:
        raise AssertionError("prepared")

    monkeypatch.setattr(runs_module, "fetch_async", fetch)
    monkeypatch.setattr(runs_module, "prepare", prepare)
    async with Runs() as runs:
        with pytest.raises(RunsClosedError):
            await runs.start(trainer, tiny_loader(1), epochs=1)


@pytest.mark.anyio
async def test_runs_are_shut_down_before_the_block_ends() -> None:
    with anyio.fail_after(LONG):
        async with Runs() as runs:
            run = await start_endless(runs)
            assert await runs.shutdown() == []
            assert run.result.reason == "shut down"
            with pytest.raises(RunsClosedError, match="no run can be started: this Runs is shut down"):
                await start_endless(runs)
            assert await runs.shutdown() == []
    with pytest.raises(RunsClosedError):
        await start_endless(runs)


@pytest.mark.anyio
async def test_callback_that_does_not_drain_in_time_is_left_in_haste(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hanging = HangingCallback()
    with anyio.fail_after(LONG):
        async with Runs(shutdown_timeout=0.05) as runs:
            run = await start_endless(runs, callbacks=[hanging], drain_timeout=3600.0)
    assert run.result.status == "cancelled"
    assert f"run {run.id} has not ended in time: it ends in haste" in caplog.text
    assert hanging.is_closed


@pytest.mark.anyio
async def test_training_thread_that_hangs_is_named_and_ends_the_run_by_itself(
    hanging: HangingStep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runs_module, "HASTE", 0.05)
    trainer, recorder = tiny_trainer(callbacks=[hanging]), Recorder()
    with anyio.fail_after(LONG):
        async with Runs(shutdown_timeout=0.05) as runs:
            run = await runs.start(trainer, EndlessLoader(), max_steps=ENDLESS, callbacks=[recorder])
            other = await start_endless(runs)
            await anyio.to_thread.run_sync(hanging.arrived.wait)
            assert await runs.shutdown() == [run]
        assert other.result.status == "cancelled"
        assert runs.active == [run] and not run.is_over
        assert f"run {run.id} continues after the shutdown; its training thread is here:" in caplog.text
        assert "self.released.wait(LONG)" in caplog.text
        with pytest.raises(TrainerBusyError):
            trainer.train(tiny_loader(1), epochs=1)  # the thread has its model still
        hanging.released.set()
        assert (await run.wait()).status == "cancelled"
        await anyio.to_thread.run_sync(cast(Any, run._session).thread.join)
        assert hanging.is_closed and recorder.is_closed
        again = await trainer.train_async(tiny_loader(1), epochs=1)  # everything was given back
    assert again.status == "completed"


# Wrong use -----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_block_must_be_entered_once() -> None:
    with anyio.fail_after(LONG):
        runs = Runs()
        with pytest.raises(RuntimeError, match=r"was not entered: use it as `async with Runs\(\) as runs:`"):
            await start_endless(runs)
        with pytest.raises(RuntimeError, match="was not entered"):
            await runs.__aexit__(None, None, None)
        async with runs:
            with pytest.raises(RuntimeError, match="entered before: create another one"):
                await runs.__aenter__()
        with pytest.raises(RuntimeError, match="entered before: create another one"):
            await runs.__aenter__()


@pytest.mark.anyio
async def test_runs_are_started_on_the_loop_of_the_block() -> None:
    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            anyio.run(start_endless, runs)

    with anyio.fail_after(LONG):
        async with Runs() as runs:
            await anyio.to_thread.run_sync(elsewhere)
    assert len(runs) == 0


@pytest.mark.parametrize("what", ["wait", "shutdown"])
@pytest.mark.anyio
async def test_waiting_for_all_runs_in_a_callback_is_an_error_at_once(what: str) -> None:
    class Waits(Callback):
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            await getattr(runs, what)()

    with anyio.fail_after(LONG):
        async with Runs() as runs:
            run = await runs.start(tiny_trainer(callbacks=[Waits()]), tiny_loader(1), epochs=1)
            result = await run.wait()
    assert result.status == "completed"
    assert f"DeadlockError: runs.{what}() in a callback" in result.callback_errors["Waits"][0]
