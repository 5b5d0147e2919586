"""Exceptions that are no `Exception`, out of every place where a run calls a user's code."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest
import torch
import torchmetrics

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Run,
    RunEndedError,
    StepPoint,
    TrainEnd,
    Trainer,
    ValidationEnd,
    decides,
    in_step,
)
from offloop.engine.testing import Recorder, tiny_batches, tiny_loader, tiny_trainer
from offloop.engine.training.setup import Batch
from offloop.engine.training.step_output import StepOutput


class Stray(BaseException):
    """As test frameworks raise for a failed test, so that no `except Exception` holds it."""


@pytest.fixture(params=[SystemExit, KeyboardInterrupt, Stray, GeneratorExit, asyncio.CancelledError])
def error(request: pytest.FixtureRequest) -> Iterator[BaseException]:
    error = request.param()
    yield error
    error.__traceback__ = error.__context__ = None  # pytest holds it longer than the frames in it should live


ORDERS = (GeneratorExit, asyncio.CancelledError)
"""What an event loop would take for an order of its own, were it raised anew."""


class Raises:
    """Raises an exception at one place, once."""

    def __init__(self, place: str, error: BaseException) -> None:
        self.place, self.error = place, error
        self.has_raised = False

    def at(self, place: str) -> None:
        if place == self.place and not self.has_raised:
            self.has_raised = True
            raise self.error


class Steps(Trainer):
    raises: Raises

    def training_step(self, batch: Batch) -> StepOutput:
        if self.model.training:
            self.raises.at("training step")
        return super().training_step(batch)

    def validation_step(self, batch: Batch) -> StepOutput:
        self.raises.at("validation step")
        return super().training_step(batch)


class Batches:
    """A loader."""

    def __init__(self, raises: Raises, place: str) -> None:
        self.raises, self.place = raises, place

    def __iter__(self) -> Iterator[Batch]:
        for batch in tiny_batches(2):
            with contextlib.suppress(StopIteration):
                self.raises.at(self.place)
            yield batch


class Accuracy(torchmetrics.Metric):
    higher_is_better = True
    raises: ClassVar[Raises]

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.raises.at("metric's update")

    def compute(self) -> torch.Tensor:
        self.raises.at("metric's compute")
        return torch.tensor(1.0)


class Decides(Callback):
    def __init__(self, raises: Raises) -> None:
        self.raises = raises

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        self.raises.at("plain decider")

    @decides
    async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        await anyio.lowlevel.checkpoint()
        self.raises.at("async decider")

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.raises.at("step hook")

    @in_step
    def after_validation(self, point: StepPoint) -> None:
        self.raises.at("hook after a validation")

    def state_dict(self) -> Mapping[str, Any]:
        self.raises.at("state_dict")
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.raises.at("load_state_dict")


class Observes(Callback):
    def __init__(self, raises: Raises) -> None:
        self.raises = raises

    async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        self.raises.at("async observer")

    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self.raises.at("plain observer")

    async def on_train_end(self, event: TrainEnd, run: Run) -> None:
        self.raises.at("observer of the end")


class Closes(Callback):
    def __init__(self, raises: Raises) -> None:
        self.raises = raises

    def close(self) -> None:
        self.raises.at("plain close")


class ClosesAsync(Callback):
    def __init__(self, raises: Raises) -> None:
        self.raises = raises

    async def close(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.raises.at("async close")


IN_TRAINING = [
    "training step",
    "validation step",
    "train_loader",
    "val_loader",
    "metric's update",
    "metric's compute",
    "plain decider",
    "async decider",
    "step hook",
    "hook after a validation",
    "state_dict",
    "load_state_dict",
]
OBSERVING = ["async observer", "plain observer"]
AT_THE_END = ["observer of the end", "plain close", "async close"]


class Outcome:
    """What has become of a run in which something was raised."""

    raised: BaseException | None = None

    def __init__(self, run_dir: Path, raises: Raises) -> None:
        self.raises = raises
        self.recorder = Recorder()
        Accuracy.raises = raises
        trainer = tiny_trainer(Steps, run_dir=run_dir, run_name="run", drain_timeout=3600.0)
        assert isinstance(trainer, Steps)
        self.trainer = trainer
        self.trainer.raises = raises

    async def train(self) -> None:
        raises = self.raises
        if raises.place == "load_state_dict":
            raises.has_raised = True
            await self._train(epochs=1)
            raises.has_raised = False
            await self._train(epochs=2, resume="auto")
        else:
            await self._train(epochs=2)
        assert raises.has_raised

    async def _train(self, **given: Any) -> None:
        raises = self.raises
        callbacks = [
            ModelCheckpoint(),
            Decides(raises),
            Observes(raises),
            Closes(raises),
            ClosesAsync(raises),
        ]
        try:
            with anyio.fail_after(60):
                await self.trainer.train_async(
                    Batches(raises, "train_loader"),
                    Batches(raises, "val_loader"),
                    metrics=[Accuracy()],
                    callbacks=[*callbacks, self.recorder],
                    **given,
                )
        except BaseException as error:
            self.raised = error

    @property
    def status(self) -> str:
        """The status, which result, last event and `run.json` agree on."""
        assert self.trainer.last_run is not None
        result = self.trainer.last_run.result
        assert result.dir is not None
        (end,) = self.recorder.of(TrainEnd)
        assert end is self.recorder.events[-1]
        assert json.loads((result.dir / "run.json").read_text())["status"] == result.status == end.status
        assert (result.dir / "events.jsonl").read_bytes().splitlines()[-1].startswith(b'{"type":"TrainEnd"')
        assert self.recorder.is_closed
        return result.status

    @property
    def listed(self) -> list[str]:
        """What the result lists of callbacks' failures."""
        assert self.trainer.last_run is not None
        return [each for errors in self.trainer.last_run.result.callback_errors.values() for each in errors]


@pytest.fixture(autouse=True, scope="module")
def everything_is_loaded() -> None:
    """Imports would hold a test's event loop for seconds, and asyncio is known once it has hosted a run."""
    tiny_trainer().train(tiny_loader(1), epochs=1)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "offloop")


@pytest.mark.anyio
@pytest.mark.parametrize("place", IN_TRAINING)
async def test_in_training_it_ends_the_run_and_reaches_the_caller(
    place: str, error: BaseException, tmp_path: Path
) -> None:
    outcome = Outcome(tmp_path, Raises(place, error))
    await outcome.train()
    assert outcome.status == "failed"
    if isinstance(error, ORDERS):
        assert isinstance(outcome.raised, RuntimeError)
        assert outcome.raised.__cause__ is error
    else:
        assert outcome.raised is error


@pytest.mark.anyio
@pytest.mark.parametrize("place", OBSERVING)
async def test_in_an_observer_it_ends_the_run_unless_it_is_a_stray_cancellation(
    place: str, error: BaseException, tmp_path: Path
) -> None:
    outcome = Outcome(tmp_path, Raises(place, error))
    await outcome.train()
    if isinstance(error, ORDERS):
        assert outcome.status == "completed"
        assert outcome.raised is None
    else:
        assert outcome.raised is error
        # A plain observer may be late: after `TrainEnd` the status stands.
        assert outcome.status == "failed" or place == "plain observer"
    assert [type(error).__name__ in each for each in outcome.listed] == [True]


@pytest.mark.anyio
@pytest.mark.parametrize("place", AT_THE_END)
async def test_at_the_end_it_is_raised_when_everything_is_closed_and_changes_no_status(
    place: str, error: BaseException, tmp_path: Path
) -> None:
    outcome = Outcome(tmp_path, Raises(place, error))
    await outcome.train()
    assert outcome.status == "completed"
    assert outcome.raised is (None if isinstance(error, ORDERS) else error)
    assert [type(error).__name__ in each for each in outcome.listed] == [True]


@pytest.mark.anyio
async def test_in_a_call_it_ends_the_run_unless_it_is_a_stray_cancellation(error: BaseException) -> None:
    def fail(trainer: object) -> None:
        raise error

    class Calls(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            self.future = run.call_nowait(fail)

    calls, recorder, trainer = Calls(), Recorder(), tiny_trainer()
    raised: BaseException | None = None
    try:
        with anyio.fail_after(60):
            await trainer.train_async(tiny_loader(1), epochs=1, callbacks=[calls, recorder])
    except BaseException as problem:
        raised = problem
    told = calls.future.exception(0)
    assert recorder.names()[-1] == "TrainEnd"
    assert trainer.last_run is not None
    if isinstance(error, ORDERS):
        assert (raised, trainer.last_run.result.status) == (None, "completed")
        assert isinstance(told, RuntimeError) and told.__cause__ is error
    else:
        assert (raised, trainer.last_run.result.status) == (error, "failed")
        assert isinstance(told, RunEndedError)


def test_in_a_reset_it_reaches_the_caller_and_what_was_reset_is_closed(error: BaseException) -> None:
    closed: list[str] = []

    class Before(Callback):
        def close(self) -> None:
            closed.append(type(self).__name__)
            raise Stray("in close, too")

    class First(Before):
        pass

    class Bad(Callback):
        def reset(self) -> None:
            raise error

    trainer = tiny_trainer()
    with pytest.raises(type(error)) as caught:
        trainer.train(tiny_loader(1), epochs=1, callbacks=[First(), Before(), Bad()])
    assert closed == ["First", "Before"]
    assert caught.value is error
    assert trainer.train(tiny_loader(1), epochs=1).status == "completed"


@pytest.mark.anyio
async def test_all_step_hooks_after_a_validation_run_whatever_one_raises(error: BaseException) -> None:
    class PutsBack(Callback):
        is_swapped = False

        @in_step
        def before_validation(self, point: StepPoint) -> None:
            self.is_swapped = True

        @in_step
        def after_validation(self, point: StepPoint) -> None:
            self.is_swapped = False

    class Bad(Callback):
        @in_step
        def after_validation(self, point: StepPoint) -> None:
            raise error

    first, last = PutsBack(), PutsBack()
    with pytest.raises((type(error), RuntimeError)):
        await tiny_trainer().train_async(
            tiny_loader(1), tiny_loader(1), epochs=1, callbacks=[first, Bad(), last]
        )
    assert not first.is_swapped and not last.is_swapped
