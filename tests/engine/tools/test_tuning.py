"""engine/tools/tuning.py: what the finders find, and that they leave no trace."""

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from offloop.engine import ConfigError, Trainer, TrainerBusyError
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_model, tiny_trainer
from offloop.engine.tools.tuning import suggest

PLENTY = 2**50
OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class Net(nn.Module):
    """Has everything that training changes: dropout, running statistics, buffers that are saved and that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.body[2].eval()

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + len(inputs)
        logits: Tensor = self.body(inputs)
        return logits


def everything(trainer: Trainer, loader: Any = None) -> Any:
    """Return all that a search must put back, as values of its own."""
    model = trainer.model
    numpy_state: Any = numpy.random.get_state()
    return copy.deepcopy(
        {
            "parameters": [(name, each.detach(), each.grad) for name, each in model.named_parameters()],
            "buffers": list(model.named_buffers()),
            "modes": [module.training for module in model.modules()],
            "requires_grad": [each.requires_grad for each in model.parameters()],
            "optimizers": [each.state_dict() for each in trainer.optimizers.values()],
            "random": (torch.get_rng_state(), random.getstate(), numpy_state[1:]),
            "loader": None if loader is None else loader.generator.get_state(),
        }
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.dtype == other.dtype
            and torch.equal(one, other)
        )
    if isinstance(one, numpy.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


class DrawsAll(Trainer):
    def training_step(self, batch: Any) -> Any:
        random.random()
        numpy.random.rand()
        torch.rand(1)
        return super().training_step(batch)


def learning_rate(trainer: Trainer, loader: Any) -> None:
    assert trainer.find_learning_rate(loader, steps=20).losses


def batch_size(trainer: Trainer, loader: Any) -> None:
    assert trainer.find_batch_size(loader, memory_limit=PLENTY, max_batch_size=8).suggestion == 8


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01), momentum=0.9),
    "groups": lambda model: torch.optim.Adam(
        [{"params": model.body[0].parameters(), "lr": 0.1}, {"params": model.body[3].parameters()}], lr=0.2
    ),
}


@pytest.mark.parametrize("search", [learning_rate, batch_size])
@pytest.mark.parametrize(
    ("optimizer", "is_trained", "knobs"),
    [
        ("AdamW", False, {}),
        ("AdamW", True, {"freeze": "body.0", "accumulate_grad_batches": 2}),
        ("SGD", True, {}),
        ("groups", True, {"gradient_clip_val": 1.0}),
    ],
)
def test_a_search_leaves_no_trace(
    search: Callable[[Trainer, Any], None], optimizer: str, is_trained: bool, knobs: dict[str, Any]
) -> None:
    model = Net()
    trainer = tiny_trainer(DrawsAll, model=model, optimizer=OPTIMIZERS[optimizer](model), **knobs)
    loader = tiny_loader(8, shuffle=True)
    if is_trained:
        trainer.train(loader, epochs=1)
        trainer.model(torch.randn(4, 8)).sum().backward()
    before = everything(trainer, loader)
    search(trainer, loader)
    assert equal(everything(trainer, loader), before)

    twin = copy.deepcopy(model)
    result = trainer.train(loader, epochs=1)  # and it trains as if nothing had been
    assert result.status == "completed"
    assert not equal(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("search", [learning_rate, batch_size])
def test_a_search_that_fails_leaves_no_trace_either(search: Callable[[Trainer, Any], None]) -> None:
    class Fails(DrawsAll):
        calls = 0

        def training_step(self, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 8:
                raise ZeroDivisionError
            return super().training_step(batch)

    model = Net()
    trainer = tiny_trainer(Fails, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    loader = tiny_loader(8, shuffle=True)
    before = everything(trainer, loader)
    with pytest.raises(ZeroDivisionError):
        search(trainer, loader)
    assert equal(everything(trainer, loader), before)
    search(trainer, loader)  # the trainer is free again


def test_a_search_equals_the_range_test_written_by_hand() -> None:
    trainer = tiny_trainer()
    found = trainer.find_learning_rate(tiny_batches(7), min_lr=1e-4, max_lr=1.0, steps=30)

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = tiny_batches(7)
    losses = []
    for index in range(30):
        inputs, targets = batches[index % 7]
        optimizer.param_groups[0]["lr"] = found.lrs[index]
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert list(found.losses) == losses
    assert list(found.lrs) == pytest.approx([1e-4 * 10 ** (4 * index / 29) for index in range(30)])
    mean, smoothed = 0.0, []
    for index, value in enumerate(losses, 1):
        mean = 0.98 * mean + 0.02 * value
        smoothed.append(mean / (1 - 0.98**index))
    assert list(found.smoothed) == pytest.approx(smoothed)
    assert found.suggestion is None or found.suggestion in found.lrs


def test_the_search_ends_when_the_loss_explodes() -> None:
    found = tiny_trainer().find_learning_rate(tiny_batches(8), min_lr=1e-3, max_lr=1e12, steps=200)
    assert 10 < len(found.lrs) < 200
    assert max(found.smoothed[10:]) <= 4 * min(found.smoothed[10:])
    assert all(map(numpy.isfinite, found.losses))


def test_the_suggestion_is_where_the_curve_falls_fastest() -> None:
    lrs = [10.0 ** (index / 10) for index in range(60)]
    curve = [2.0 - 1.0 / (1.0 + numpy.exp(-(index - 30) / 3)) for index in range(60)]
    assert suggest(lrs, curve) == lrs[30]
    assert suggest(lrs, [1.0 + index for index in range(60)]) is None
    assert suggest(lrs[:5], curve[:5]) is None


def test_a_picture_of_the_search(tmp_path: Path) -> None:
    found = tiny_trainer().find_learning_rate(tiny_batches(8), steps=20)
    path = found.plot(tmp_path / "lr.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_several_optimizers_are_searched_one_at_a_time() -> None:
    rates: list[float] = []

    class Two(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> Any:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.backward(loss)
            self.optimizer_step("first")
            self.optimizer_step("second")
            rates.append(self.optimizers["second"].param_groups[0]["lr"])
            return loss

    model = tiny_model()
    optimizers = {
        "first": torch.optim.SGD(model[0].parameters(), lr=0.1),  # type: ignore[index]
        "second": torch.optim.SGD(model[3].parameters(), lr=0.2),  # type: ignore[index]
    }
    trainer = tiny_trainer(Two, model=model, optimizer=optimizers)
    with pytest.raises(ConfigError, match="which optimizer\\? Give optimizer=, one of first, second"):
        trainer.find_learning_rate(tiny_batches(4))
    with pytest.raises(ConfigError, match="there is no optimizer 'third'"):
        trainer.find_learning_rate(tiny_batches(4), optimizer="third")
    found = trainer.find_learning_rate(tiny_batches(4), steps=12, optimizer="first")
    assert len(found.lrs) == 12
    assert set(rates) == {0.2}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"min_lr": 0}, "min_lr must be a finite number above 0"),
        ({"max_lr": float("inf")}, "max_lr must be a finite number above 0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr must be below max_lr"),
        ({"steps": 3}, "steps must be a whole number of at least 10"),
    ],
)
def test_a_search_for_the_rate_checks_its_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny_trainer().find_learning_rate(tiny_batches(4), **arguments)


# The batch size -----------------------------------------------------------------------------------------


class Holds(Trainer):
    """Stands for a device with room for so many samples."""

    room = 37
    sizes: list[int]

    def training_step(self, batch: Any) -> Any:
        if len(batch[0]) > self.room:
            raise OUT_OF_MEMORY("CUDA out of memory.")
        return super().training_step(batch)


def loader_of(samples: int, **knobs: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(samples, 8), torch.arange(samples) % 3)
    return DataLoader(data, **{"batch_size": 4, **knobs})


@pytest.mark.parametrize(
    ("room", "samples", "arguments", "found", "tried"),
    [
        (37, 500, {}, 37, [2, 4, 8, 16, 32, 64, 48, 40, 36, 38, 37]),
        (37, 500, {"mode": "power"}, 32, [2, 4, 8, 16, 32, 64]),
        (37, 20, {}, 20, [2, 4, 8, 16, 20]),
        (37, 500, {"max_batch_size": 10}, 10, [2, 4, 8, 10]),
        (37, 500, {"start": 30}, 37, [30, 60, 45, 37, 41, 39, 38]),
        (37, 500, {"start": 100, "mode": "power"}, 32, [100, 1, 2, 4, 8, 16, 32, 64]),
        (1, 500, {}, 1, [2, 1]),
        (500, 1, {}, 1, [1]),
    ],
)
def test_the_largest_size_that_fits_is_found(
    room: int, samples: int, arguments: dict[str, Any], found: int, tried: list[int]
) -> None:
    trainer = tiny_trainer(Holds)
    trainer.room = room  # type: ignore[attr-defined]
    search = trainer.find_batch_size(loader_of(samples), memory_limit=PLENTY, **arguments)
    assert search.suggestion == found
    assert [trial.batch_size for trial in search.trials] == tried
    assert [trial.fits for trial in search.trials] == [size <= room for size in tried]


def test_what_never_fits_is_an_error() -> None:
    trainer = tiny_trainer(Holds)
    trainer.room = 0  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"not even one sample fits into .* MiB: try precision"):
        trainer.find_batch_size(loader_of(10), memory_limit=PLENTY)


@pytest.mark.parametrize(
    "message",
    ["DefaultCPUAllocator: can't allocate memory: you tried to", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."],
)
def test_other_errors_that_mean_the_same(message: str) -> None:
    class Other(Trainer):
        def training_step(self, batch: Any) -> Any:
            if len(batch[0]) > 3:
                raise RuntimeError(message)
            return super().training_step(batch)

    assert tiny_trainer(Other).find_batch_size(loader_of(100), memory_limit=PLENTY).suggestion == 3


def test_any_other_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tiny_trainer().find_batch_size(
            DataLoader(TensorDataset(torch.randn(9, 5), torch.arange(9)), batch_size=3), memory_limit=PLENTY
        )


class Stream(IterableDataset[Any]):
    def __init__(self, size: int = 1_000_000) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.size):
            yield torch.randn(8), torch.tensor(1)


class ManyAtOnce(Dataset[Any]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("it is asked for many at once")

    def __getitems__(self, indices: list[int]) -> Any:
        return [(torch.randn(8), torch.tensor(index % 3)) for index in indices]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=2),
        DataLoader(ManyAtOnce(), batch_size=2),
        lambda size: [(torch.randn(size, 8), torch.zeros(size, dtype=torch.long))],
        lambda size: loader_of(200, batch_size=size),
    ],
    ids=["stream", "many at once", "function of a list", "function of a loader"],
)
def test_where_batches_may_come_from(loader: Any) -> None:
    assert tiny_trainer(Holds).find_batch_size(loader, memory_limit=PLENTY).suggestion == 37


def test_a_stream_that_ends_is_the_largest_batch() -> None:
    loader = DataLoader(Stream(11), batch_size=2)
    assert tiny_trainer(Holds).find_batch_size(loader, memory_limit=PLENTY).suggestion == 11


@pytest.mark.parametrize(
    ("loader", "arguments", "text"),
    [
        (loader_of(9), {"memory_limit": None}, "memory_limit is needed on cpu: .* Give the bytes"),
        (loader_of(9), {"mode": "bisect"}, "mode must be 'binsearch' or 'power'"),
        (loader_of(9), {"start": 0}, "start must be a whole number of at least 1"),
        (loader_of(9), {"steps": 1}, "steps must be a whole number of at least 2"),
        (loader_of(9), {"memory_limit": 0}, "memory_limit must be a whole number of at least 1"),
        (tiny_batches(3), {}, "train_loader must be a DataLoader that makes up batches .* got list"),
        (loader_of(9, batch_size=None), {}, "train_loader must be a DataLoader that makes up batches"),
        (lambda size: [], {}, r"train_loader\(2\) gave no batch"),
    ],
)
def test_a_search_for_the_size_checks_its_arguments(
    loader: Any, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny_trainer().find_batch_size(loader, **{"memory_limit": PLENTY, **arguments})


def test_memory_of_the_process_is_what_counts_on_the_cpu() -> None:
    class Wide(nn.Module):
        """Keeps half a megabyte for each sample."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Tensor:
            wide = inputs[:, :1].expand(-1, 2**17) * self.scale  # (B, 2**17), which exp keeps
            out: Tensor = wide.exp().mean(dim=1, keepdim=True).expand(-1, 3)
            return out * self.scale

    model = Wide()
    trainer = tiny_trainer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6))
    gc.collect()
    now = psutil.Process().memory_info().rss
    search = trainer.find_batch_size(loader_of(500), memory_limit=now + 80 * 2**20)
    assert 10 <= search.suggestion <= 150
    peaks = [trial.peak_memory for trial in search.trials if trial.fits]
    assert all(peak is not None and peak <= now + 80 * 2**20 for peak in peaks)
    assert psutil.Process().memory_info().rss < now + 60 * 2**20, "it is free again"


def test_a_search_keeps_nothing_of_the_trainer() -> None:
    def search() -> weakref.ref[Any]:
        trainer = tiny_trainer()
        trainer.find_learning_rate(tiny_batches(4), steps=10)
        return weakref.ref(trainer.model)

    search()  # what is imported on the way leaves cycles of its own
    gc.collect()
    gc.disable()
    try:
        assert search()() is None
    finally:
        gc.enable()


def test_nothing_else_is_done_meanwhile() -> None:
    class Meddler(Trainer):
        def training_step(self, batch: Any) -> Any:
            with pytest.raises(TrainerBusyError, match="this trainer is searching: one thing at a time"):
                self.train(tiny_batches(1), epochs=1)
            return super().training_step(batch)

    assert len(tiny_trainer(Meddler).find_learning_rate(tiny_batches(4), steps=12).lrs) == 12
