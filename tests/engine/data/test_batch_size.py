"""engine/data/batch_size.py: how many samples a batch has, guessed from its shapes, counted by a function, or given."""

import collections
import dataclasses
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, zeros
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import pack_sequence

from offloop.engine import BatchError, ConfigError, EpochEnd, StepEnd, Trainer, ValidationEnd
from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

PICTURES = [zeros(3, 8 + number, 9) for number in range(4)]
BOXES = [{"boxes": zeros(number + 1, 4), "label": torch.tensor(number)} for number in range(4)]
IDS = zeros(5, 9, dtype=torch.long)


class Pair(NamedTuple):
    inputs: Any
    targets: Any


@dataclasses.dataclass
class Record:
    inputs: Any
    name: str = "record"


class Struct(msgspec.Struct):
    inputs: Any


class Graphs:
    """A batch as PyTorch Geometric makes it: 40 nodes of 5 graphs."""

    num_graphs = 5

    def __init__(self) -> None:
        self.x = zeros(40, 3)


class Tensors:
    """A batch that has its shape, as a TensorDict."""

    batch_size = torch.Size([5, 2])


COLLATED: dict[str, Any] = {
    "a tensor": zeros(5, 2),
    "a pair": (zeros(5, 2), zeros(5)),
    "a list of parts": [zeros(5, 2), zeros(5, 3), zeros(5)],
    "a mapping": {"inputs": zeros(5, 2), "targets": zeros(5)},
    "one part": {"inputs": zeros(5, 2)},
    "another mapping": collections.UserDict(ids=IDS, mask=IDS),
    "texts and scalars beside it": {
        "names": list("abcde"),
        "scale": 2.0,
        "n": torch.tensor(7),
        "x": zeros(5, 2),
    },
    "a named tuple": Pair(zeros(5, 2), zeros(5)),
    "a dataclass": Record(zeros(5, 2)),
    "a struct": Struct(zeros(5, 2)),
    "arrays": (np.zeros((5, 2)), np.zeros(5)),
    "several inputs": ((zeros(5, 2), zeros(5, 3)), zeros(5)),
    "several inputs and targets": ([zeros(5, 2), zeros(5, 3)], [zeros(5), zeros(5, 1)]),
    "nested": ({"a": [zeros(5, 2), Pair(zeros(5), Record(Struct(zeros(5))))]}, zeros(5)),
    "two mappings": [{"x": zeros(5, 2)}, {"x": zeros(5, 3)}],
    "an extra of another length": (zeros(5, 10), zeros(5), zeros(10)),
    "boxes of all pictures": (zeros(5, 3, 9, 9), zeros(17, 5)),
    "patches of all pictures": {"patches": zeros(900, 14), "ids": IDS, "mask": IDS},
    "texts in one row, with their offsets": (zeros(100), zeros(5), zeros(5)),
    "time steps first": (zeros(20, 5, 3), zeros(5)),
    "tokens, time steps first": (zeros(20, 5, dtype=torch.long), zeros(5)),
    "time steps first, with lengths": (zeros(20, 5, 3), zeros(5, 7), zeros(5), zeros(5)),
    "packed sequences": pack_sequence([zeros(6 - number, 2) for number in range(5)]),
    "packed sequences and targets": (pack_sequence([zeros(6 - number, 2) for number in range(5)]), zeros(5)),
    "graphs": Graphs(),
    "graphs and targets": (Graphs(), zeros(5)),
    "an object that knows": Tensors(),
    "texts": list("abcde"),
    "texts and classes": (list("abcde"), [0, 1, 2, 3, 4]),
}
SAMPLES: dict[str, Any] = {
    "pictures and targets": (tuple(PICTURES), tuple(BOXES)),
    "lists of both": [PICTURES, BOXES],
    "pictures and classes": (PICTURES, zeros(4)),
    "pictures and pictures": (PICTURES, [zeros(3, 8, 8)] * 4),
    "pictures alone": PICTURES,
    "pictures in a mapping": {"images": PICTURES, "targets": BOXES},
    "pictures in a dataclass": Record(PICTURES),
    "samples": list(zip(PICTURES, BOXES, strict=True)),
    "samples of pictures": [(each, zeros(3, 8, 8)) for each in PICTURES],
    "mappings": [{"image": each, "label": torch.tensor(1)} for each in PICTURES],
}
UNKNOWN: dict[str, Any] = {
    "a scalar": torch.tensor(1.0),
    "nothing": None,
    "a text": "text",
    "an empty tuple": (),
    "an empty list": [],
    "an empty mapping": {},
    "an object": object(),
}


@pytest.mark.parametrize("name", COLLATED)
def test_a_collated_batch_has_as_many_samples_as_its_parts_are_long(name: str) -> None:
    assert guess_batch_size(COLLATED[name]) == 5


@pytest.mark.parametrize("name", SAMPLES)
def test_a_list_of_samples_is_counted_and_not_the_channels_of_its_first_picture(name: str) -> None:
    assert guess_batch_size(SAMPLES[name]) == 4


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_batch_that_gives_no_hint_counts_as_one_sample(name: str) -> None:
    assert guess_batch_size(UNKNOWN[name]) == 1


def test_an_empty_batch_has_no_samples() -> None:
    assert guess_batch_size(zeros(0, 4)) == 0


def test_a_batch_that_holds_itself_is_counted() -> None:
    batch: list[Any] = [zeros(5, 2)]
    batch.append(batch)
    assert guess_batch_size(batch) == 5


# In a run -----------------------------------------------------------------------------------------------

UNEVEN = [{"x": inputs, "y": inputs[:, :1] + number} for number, inputs in enumerate(zeros(10, 8).split(4))]
MEAN = (4 * 0 + 4 * 1 + 2 * 4) / 10


class Popping(Trainer):
    """Takes its batch apart; the model gives zeros, and so each batch's loss is its number squared."""

    def training_step(self, batch: dict[str, Tensor]) -> Any:
        return mse_loss(self.model(batch.pop("x")), batch.pop("y"))


def a_run(trainer: Trainer, batches: list[Any]) -> Recorder:
    recorder = Recorder()
    trainer.train(
        [dict(each) for each in batches], [dict(each) for each in batches], epochs=1, callbacks=[recorder]
    )
    return recorder


def zero_trainer(kind: type[Trainer], **knobs: Any) -> Trainer:
    model = tiny_model(classes=1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return kind(model, torch.optim.SGD(model.parameters(), lr=0.0), device="cpu", **knobs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_takes_its_batch_apart_changes_no_count(accumulate: int) -> None:
    recorder = a_run(zero_trainer(Popping, accumulate_grad_batches=accumulate), UNEVEN)
    assert sum(event.samples for event in recorder.of(StepEnd)) == 10
    (end,) = recorder.of(EpochEnd)
    assert end.samples == recorder.of(ValidationEnd)[0].samples == 10
    assert end.metrics["train_loss"] == end.metrics["val_loss"] == pytest.approx(MEAN)


class Saying(Trainer):
    def training_step(self, batch: dict[str, Tensor]) -> Any:
        return {"loss": mse_loss(self.model(batch["x"]), batch["y"]), "samples": batch["n"]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_may_say_how_many_samples_its_batch_has(accumulate: int, as_tensor: bool) -> None:
    counts = [1, 2, 5]
    batches = [
        {**batch, "n": torch.tensor(count) if as_tensor else count}
        for batch, count in zip(UNEVEN, counts, strict=True)
    ]
    recorder = a_run(zero_trainer(Saying, accumulate_grad_batches=accumulate), batches)
    (end,) = recorder.of(EpochEnd)
    assert end.samples == recorder.of(ValidationEnd)[0].samples == 8
    assert end.metrics["train_loss"] == end.metrics["val_loss"] == pytest.approx((2 * 1 + 5 * 4) / 8)


@pytest.mark.parametrize("count", [-1, 1.5, True, "many"])
def test_samples_that_are_no_number_of_samples_are_refused(count: Any) -> None:
    trainer = zero_trainer(Saying)
    with pytest.raises(
        ValueError, match="the samples of training_step must be a whole number of at least 0, got"
    ):
        trainer.train([{**UNEVEN[0], "n": count}], epochs=1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_function_counts_what_a_guess_cannot_know(accumulate: int) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(
        batch_size=lambda batch: 2 * len(batch[0]), accumulate_grad_batches=accumulate, callbacks=[recorder]
    )
    trainer.train(tiny_batches(2), tiny_batches(1), epochs=1)
    assert sum(event.samples for event in recorder.of(StepEnd)) == 16
    assert recorder.of(ValidationEnd)[0].samples == 8


@pytest.mark.parametrize("returned", [None, -1, 4.0, torch.tensor(4)])
def test_a_function_that_returns_no_number_of_samples_is_told_so(returned: Any) -> None:
    trainer = tiny_trainer(batch_size=lambda batch: returned)
    with pytest.raises(BatchError, match="batch_size must return a number of samples, an int; it returned"):
        trainer.train(tiny_batches(1), epochs=1)


def test_a_number_as_batch_size_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"got 32\. The size of batches is the DataLoader's"):
        tiny_trainer(batch_size=32)
