"""engine/data/batches.py: batches of every shape, moved whole; the "meta" device stands for another one."""

import collections
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset

from offloop.engine import ConfigError, StepEnd, Trainer
from offloop.engine.data.batches import DeviceTransfer, length_of, limited_length, to_device
from offloop.engine.testing import Recorder, tiny_trainer

META = torch.device("meta")


class Pair(NamedTuple):
    inputs: Any
    targets: Any


@dataclasses.dataclass(frozen=True)
class Record:
    inputs: Any
    name: str = "record"
    size: int = dataclasses.field(default=0, init=False)


class Struct(msgspec.Struct, frozen=True):
    inputs: Any
    name: str = "struct"


class Encoding(collections.UserDict[str, Any]):
    """Moves itself, as the batches of tokenizers do."""

    def to(self, device: torch.device) -> "Encoding":
        return Encoding({key: value.to(device) for key, value in self.items()})


def tensors(item: Any) -> Iterator[Tensor]:
    """Find all tensors, knowing the types above only."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, collections.abc.Mapping):
        for part in item.values():
            yield from tensors(part)
    elif isinstance(item, tuple | list):
        for part in item:
            yield from tensors(part)
    elif isinstance(item, Record | Struct):
        yield from tensors(item.inputs)


def x(size: int = 3) -> Tensor:
    return torch.zeros(size, 2)


BATCHES: dict[str, tuple[Any, int]] = {
    "tensor": (x(), 1),
    "tuple": ((x(), x()), 2),
    "list": ([x(), x()], 2),
    "named tuple": (Pair(x(), x()), 2),
    "dict": ({"inputs": x(), "targets": x()}, 2),
    "ordered dict": (collections.OrderedDict(b=x(), a=x()), 2),
    "defaultdict": (collections.defaultdict(list, inputs=x()), 1),
    "read-only mapping": (types.MappingProxyType({"inputs": x()}), 1),
    "dataclass": (Record(x()), 1),
    "struct": (Struct(x()), 1),
    "own to()": (Encoding(inputs=x(), mask=x()), 2),
    "nested": (({"a": [x(), Pair(x(), Record(Struct(x())))]}, x()), 4),
    "with other things": ((["a", "b", "c"], 7, None, b"x", x()), 1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_all_tensors_of_a_batch_are_moved_and_its_types_stay(name: str) -> None:
    batch, count = BATCHES[name]
    moved = to_device(batch, META)
    assert [tensor.device for tensor in tensors(moved)] == [META] * count
    assert type(moved) is type(batch)
    assert all(tensor.device.type == "cpu" for tensor in tensors(batch))


def test_what_is_no_tensor_stays_as_it_is() -> None:
    marker = object()
    batch = ("text", 7, 1.5, None, marker, {"name": "x", "flag": True}, Record(x(), name="kept"))
    moved = to_device(batch, META)
    assert moved[:5] == batch[:5]
    assert moved[5] == batch[5]
    assert moved[6].name == "kept"


def test_keys_and_their_order_stay() -> None:
    moved = to_device(collections.OrderedDict(b=x(), a=x()), META)
    assert list(moved) == ["b", "a"]


def test_a_defaultdict_keeps_its_factory() -> None:
    moved = to_device(collections.defaultdict(list, inputs=x()), META)
    assert moved["other"] == []


def test_a_packed_sequence_moves_itself() -> None:
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    assert to_device(packed, META).data.device == META


def test_a_batch_that_holds_itself_does_not_recurse_for_ever() -> None:
    batch: list[Any] = [x()]
    batch.append(batch)
    assert to_device(batch, META)[0].device == META


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Unsized:
    def __len__(self) -> int:
        raise NotImplementedError  # what older datasets do

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "length"),
    [([1, 2], 2), ((), 0), (iter([1]), None), (DataLoader(Stream()), None), (Unsized(), None)],
    ids=["list", "empty", "iterator", "stream", "unsized"],
)
def test_the_length_is_what_the_loader_says(loader: Any, length: int | None) -> None:
    assert length_of(loader) == length


@pytest.mark.parametrize(
    ("length", "limit", "used"),
    [
        (10, None, 10),
        (10, 3, 3),
        (10, 30, 10),
        (10, 0.25, 2),
        (10, 1.0, 10),
        (10, 0.01, 1),
        (100, 0.29, 29),
        (0, 0.5, 0),
        (None, None, None),
        (None, 3, 3),
    ],
)
def test_a_limit_is_a_number_or_a_share(
    length: int | None, limit: int | float | None, used: int | None
) -> None:
    loader: Any = iter([]) if length is None else range(length)
    assert limited_length(loader, limit, "limit_train_batches") == used


def test_a_share_of_an_unknown_length_is_an_error_that_names_the_knob() -> None:
    with pytest.raises(ConfigError, match=r"^limit_val_batches=0\.5 is a share .* this loader has none"):
        limited_length(iter([]), 0.5, "limit_val_batches")


# The feed -------------------------------------------------------------------------------------------


def test_a_feed_to_the_cpu_hands_batches_on_as_they_are() -> None:
    batch = (x(), {"name": "a"})
    feed = DeviceTransfer(torch.device("cpu"))
    assert not feed.is_needed
    assert feed(batch) is batch
    assert not feed.has_work()


def test_a_feed_moves_batches_whole() -> None:
    feed = DeviceTransfer(META)
    moved = feed(({"a": x(3)}, [x(2)], "text"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert moved[2] == "text"


def test_channels_last_lays_out_images_and_volumes_only() -> None:
    image, volume, flat = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3)
    feed = DeviceTransfer(torch.device("cpu"), channels_last=True)
    moved = feed({"image": image, "volume": [volume], "flat": flat, "index": torch.arange(3)})
    assert moved["image"].is_contiguous(memory_format=torch.channels_last)
    assert moved["volume"][0].is_contiguous(memory_format=torch.channels_last_3d)
    assert moved["flat"] is flat
    assert torch.equal(moved["image"], image) and torch.equal(moved["volume"][0], volume)


def test_channels_last_reaches_the_model_and_the_batches_and_changes_no_values() -> None:
    class Looks(Trainer):
        def training_step(self, batch: Any) -> Any:
            assert batch[0].is_contiguous(memory_format=torch.channels_last)
            assert self.model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
            return super().training_step(batch)

    def a_run(**knobs: Any) -> tuple[list[float], torch.nn.Module]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 4, 3)
        )
        batches = [(torch.randn(4, 3, 6, 6), torch.arange(4) % 3) for _ in range(4)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kind = Looks if knobs else Trainer
        recorder = Recorder()
        tiny_trainer(kind, model=model, optimizer=optimizer, callbacks=[recorder], **knobs).train(
            batches, batches[:1], epochs=2
        )
        return [event.loss for event in recorder.of(StepEnd) if event.loss is not None], model

    losses, model = a_run()
    again, same_model = a_run(channels_last=True)
    assert again == pytest.approx(losses, rel=1e-5)
    for one, other in zip(model.parameters(), same_model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
