"""Prediction, at once and as a stream: outputs in order, bounded read-ahead, everything given back."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anyio
import pytest
import torch
from torch import Tensor, nn

from offloop.engine import BaseTrainer, ConfigError, Trainer, TrainerBusyError
from offloop.engine.testing import EndlessLoader, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(6)
LONG = 60


def expected(model: nn.Module) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [model(inputs) for inputs, _ in BATCHES]


def assert_equal(outputs: list[Tensor], others: list[Tensor]) -> None:
    assert len(outputs) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


def test_predict_gives_the_outputs_of_each_batch_and_restores_the_flags() -> None:
    trainer = tiny_trainer(model=tiny_model(dropout=0.5))
    trainer.model[2].eval()  # type: ignore[index]  # a part that the user keeps in eval mode
    outputs = trainer.predict(BATCHES)
    assert trainer.model.training and trainer.model[0].training and not trainer.model[2].training  # type: ignore[index]
    assert not any(output.requires_grad for output in outputs)
    assert torch.cat(outputs).shape == (24, 3)
    assert_equal(outputs, expected(trainer.model))


class ModelOutput(OrderedDict[str, Any]):
    """Like the outputs of Hugging Face models, which refuse `update()` and keep attributes in step."""

    def update(self, *arguments: Any, **values: Any) -> None:
        raise NotImplementedError

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class Point(NamedTuple):
    logits: Tensor
    name: str


class CheckedPoint(Point):
    """A named tuple that is made in a way of its own."""

    def __new__(cls, *, inputs: Tensor) -> "CheckedPoint":
        return super().__new__(cls, inputs, "checked")


@dataclasses.dataclass(frozen=True)
class Record:
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "model output": lambda logits: ModelOutput(logits=logits),
    "named tuple": lambda logits: Point(logits, "point"),
    "named tuple of its own kind": lambda logits: CheckedPoint(inputs=logits),
    "dataclass": Record,
    "result of torch": lambda logits: torch.max(logits, dim=1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_predict_takes_outputs_of_every_kind(name: str) -> None:
    class Predicts(Trainer):
        def predict_step(self, batch: Any) -> Any:
            return OUTPUTS[name](self.model(batch[0]))

    trainer = tiny_trainer(Predicts)
    for outputs, wanted in zip(trainer.predict(BATCHES), expected(trainer.model), strict=True):
        assert type(outputs) is type(OUTPUTS[name](wanted))
        values = outputs.values if name == "result of torch" else outputs.logits
        assert torch.equal(values, wanted.max(dim=1).values if name == "result of torch" else wanted)


@pytest.mark.parametrize(
    "batches",
    [
        [inputs for inputs, _ in BATCHES],
        [(inputs,) for inputs, _ in BATCHES],
        [{"inputs": inputs} for inputs, _ in BATCHES],
        [{"inputs": inputs, "targets": targets} for inputs, targets in BATCHES],
    ],
    ids=["tensors", "one-tuples", "mappings", "with targets"],
)
def test_batches_may_come_without_targets(batches: list[Any]) -> None:
    trainer = tiny_trainer()
    assert_equal(trainer.predict(batches), expected(trainer.model))


def test_a_predict_step_of_ones_own_and_nested_outputs() -> None:
    class Both(NamedTuple):
        label: Tensor
        details: dict[str, Any]

    class Labels(Trainer):
        def predict_step(self, batch: Any) -> Both:
            assert torch.is_inference_mode_enabled()
            assert not self.model.training
            logits = self.model(batch[0])
            return Both(logits.argmax(dim=1), {"logits": logits, "name": "x"})

    trainer = tiny_trainer(Labels)
    outputs = trainer.predict(BATCHES)
    assert_equal([each.details["logits"] for each in outputs], expected(trainer.model))
    assert outputs[0].details["name"] == "x"


def test_precision_is_that_of_the_trainer() -> None:
    (output, *_) = tiny_trainer(precision="bf16-mixed").predict(BATCHES)
    assert output.dtype == torch.bfloat16


def test_what_fails_is_raised_and_the_trainer_is_free_again() -> None:
    trainer = tiny_trainer()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.predict([torch.zeros(2, 5)])
    assert trainer.model.training
    assert len(trainer.predict(BATCHES)) == 6
    model = tiny_model()
    bare = BaseTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    with pytest.raises(NotImplementedError, match="BaseTrainer must define predict_step"):
        bare.predict(BATCHES)
    with pytest.raises(TypeError, match="loader must be iterable over batches"):
        trainer.predict(3)  # type: ignore[arg-type]


class Counting:
    """Says how many batches were asked for."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.given = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.batches:
                self.given += 1
                yield batch
        finally:
            self.is_closed = True


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_a_stream_gives_what_predict_gives() -> None:
    trainer = tiny_trainer(model=tiny_model(dropout=0.5))
    with anyio.fail_after(LONG):
        async with trainer.predict_async(BATCHES) as stream:
            outputs = [each async for each in stream]
            with pytest.raises(TrainerBusyError, match="this trainer is predicting"):
                trainer.predict(BATCHES)
    assert trainer.model.training
    assert_equal(outputs, trainer.predict(BATCHES))


@pytest.mark.anyio
@pytest.mark.parametrize("read_ahead", [1, 3])
async def test_a_stream_is_ahead_of_its_reader_by_so_many_batches(read_ahead: int) -> None:
    class Signals(Trainer):
        started = threading.Semaphore(0)

        def predict_step(self, batch: Any) -> Any:
            self.started.release()
            return super().predict_step(batch)

    Signals.started = threading.Semaphore(0)
    loader = Counting(EndlessLoader())
    trainer = tiny_trainer(Signals)
    with anyio.fail_after(LONG):
        async with trainer.predict_async(loader, read_ahead=read_ahead) as stream:
            for read in range(5):
                await anext(stream)
                assert loader.given <= read + 1 + read_ahead + 1
            for _ in range(5 + read_ahead):  # that many have been started, or will be
                await anyio.to_thread.run_sync(Signals.started.acquire)
            assert loader.given == 5 + read_ahead
    assert loader.given == 5 + read_ahead
    assert loader.is_closed


@pytest.mark.anyio
async def test_leaving_the_block_ends_the_thread() -> None:
    loader, trainer = Counting(EndlessLoader()), tiny_trainer()
    with anyio.fail_after(LONG):
        async with trainer.predict_async(loader) as stream:
            async for _ in stream:
                break
    assert loader.is_closed
    assert not [each for each in threading.enumerate() if each.name == "offloop-prediction"]
    assert trainer.model.training
    assert len(trainer.predict(BATCHES)) == 6


@pytest.mark.anyio
async def test_a_cancelled_reader_ends_the_thread() -> None:
    loader, trainer = Counting(EndlessLoader()), tiny_trainer()
    with anyio.fail_after(LONG):
        with anyio.CancelScope() as scope:
            async with trainer.predict_async(loader) as stream:
                async for _ in stream:
                    scope.cancel()
    assert scope.cancelled_caught
    assert loader.is_closed
    assert trainer.model.training


@pytest.mark.anyio
async def test_a_failure_comes_out_of_the_stream_after_what_came_before_it() -> None:
    trainer = tiny_trainer()
    outputs = []
    with anyio.fail_after(LONG):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            async with trainer.predict_async([*BATCHES[:2], torch.zeros(2, 5)]) as stream:
                async for each in stream:
                    outputs.append(each)
    assert_equal(outputs, expected(trainer.model)[:2])


@pytest.mark.anyio
async def test_a_failure_after_the_reader_has_left_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    may_fail = threading.Event()

    class FailsLate(Trainer):
        calls = 0

        def predict_step(self, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 1:
                return super().predict_step(batch)
            may_fail.wait(LONG)
            raise ZeroDivisionError

    with anyio.fail_after(LONG):
        async with tiny_trainer(FailsLate).predict_async(EndlessLoader()) as stream:
            await anext(stream)
            may_fail.set()
    assert "a prediction failed after its reader had left" in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("read_ahead", [0, -1, 1.5, True])
async def test_read_ahead_is_checked(read_ahead: Any) -> None:
    with pytest.raises(ConfigError, match="read_ahead must be a whole number of at least 1"):
        async with tiny_trainer().predict_async(BATCHES, read_ahead=read_ahead):
            pass
