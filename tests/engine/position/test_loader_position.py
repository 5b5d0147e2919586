"""Loaders of all kinds go on in the middle of an epoch, and between two, and say how exactly."""

import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from interruptions import Cut
from samplers import StatefulSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # it has no types

from offloop.engine import (
    Callback,
    ConfigError,
    EpochStart,
    Event,
    Resumed,
    StepEnd,
    StepPoint,
    decides,
    in_step,
)
from offloop.engine.testing import Recorder, tiny_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated:UserWarning"
)  # torchdata asks torch for it

FEATURES, SAMPLES, BATCH = 8, 24, 4  # six batches an epoch


READ: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()  # an attribute would be a state


class Samples(Dataset[Any]):
    """The task without augmentation; knows what was read from it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.targets = self.inputs[:, :3].argmax(dim=1)

    @property
    def read(self) -> list[int]:
        return READ.setdefault(self, [])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.inputs[index], self.targets[index]


class Augmented(Samples):
    """Draws from each global generator."""

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        noise = torch.randn(FEATURES) + random.random() + numpy.random.rand()
        return inputs + noise, target


class Forgetful(Samples):
    """Draws from a generator of its own, and has no way to save it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return inputs + torch.randn(FEATURES, generator=self.generator), target


class OwnGenerator(Forgetful):
    """Can save it."""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Stream(IterableDataset[Any]):
    """Reads samples in order."""

    def __init__(self) -> None:
        self.samples = Samples()
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < SAMPLES:
            self.position += 1
            yield self.samples[self.position - 1]
        self.position = 0


class StatefulStream(Stream):
    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class OwnLoader:
    """No DataLoader at all, with a position of its own."""

    def __init__(self) -> None:
        self.dataset = Samples()
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < SAMPLES:
            indices = range(self.position, self.position + BATCH)
            self.position += BATCH
            pairs = [self.dataset[index] for index in indices]
            yield torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def steps_of(events: Iterable[Event]) -> dict[int, float]:
    ends = [event for event in events if isinstance(event, StepEnd)]
    return {event.step: event.loss for event in ends if event.loss is not None}


def a_run(
    directory: Path,
    name: str,
    make_loader: Callable[[], Any],
    *callbacks: Callback,
    resume: str | None = None,
    **knobs: Any,
) -> list[Event]:
    """Train three epochs; a resumed run must not need the seeds of the first."""
    recorder = Recorder()
    torch.manual_seed(1 if resume is None else 77)
    random.seed(1 if resume is None else 77)
    numpy.random.seed(1 if resume is None else 77)
    trainer = tiny_trainer(run_dir=str(directory), run_name=name, **knobs)
    loader = make_loader()
    try:
        trainer.train(loader, epochs=3, callbacks=[recorder, *callbacks], resume=resume)
    finally:
        iterator: Any = getattr(loader, "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()  # else it happens when garbage is collected, and takes seconds
    return recorder.events


def cut_and_go_on(
    tmp_path: Path, make_loader: Callable[[], Any], cut: int, **knobs: Any
) -> tuple[dict[int, float], dict[int, float], Resumed]:
    """Return the losses of an uninterrupted run and of a resumed one, and what the latter says."""
    whole = steps_of(a_run(tmp_path, "whole", make_loader, **knobs))
    a_run(tmp_path, "cut", make_loader, Cut(cut), **knobs)
    events = a_run(tmp_path, "cut", make_loader, Cut(-1), resume="must", **knobs)
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    rest = steps_of(events)
    assert list(rest) == list(range(cut + 1, 19)), "each batch comes once"
    return {step: loss for step, loss in whole.items() if step > cut}, rest, resumed


def loader_of(dataset: Callable[[], Any], workers: int = 0, **options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(dataset(), batch_size=BATCH, num_workers=workers, **options)


def with_generator() -> Any:
    return DataLoader(Samples(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(8))


def with_batch_sampler() -> Any:
    data = Samples()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(8))
    return DataLoader(data, batch_sampler=BatchSampler(sampler, BATCH, drop_last=False))


def stateful(dataset: Callable[[], Any], workers: int = 0, **options: Any) -> Callable[[], Any]:
    return lambda: StatefulDataLoader(dataset(), batch_size=BATCH, num_workers=workers, **options)


EXACT = {
    "shuffled": loader_of(Samples, shuffle=True),
    "augmented": loader_of(Augmented, shuffle=True),
    "a generator of the loader": with_generator,
    "a batch sampler": with_batch_sampler,
    "a sampler with a state": lambda: DataLoader(
        Samples(), batch_size=BATCH, sampler=StatefulSampler(SAMPLES)
    ),
    "a data set with a state": loader_of(OwnGenerator, shuffle=True),
    "a stream with a state": loader_of(StatefulStream),
    "torchdata": stateful(Samples, shuffle=True),
    "torchdata, augmented": stateful(Augmented, shuffle=True),
    "torchdata, a generator": lambda: StatefulDataLoader(
        Samples(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(8)
    ),
    "torchdata, a torch sampler": lambda: StatefulDataLoader(
        Samples(), batch_size=BATCH, sampler=RandomSampler(range(SAMPLES))
    ),
    "torchdata, a data set with a state": stateful(OwnGenerator, shuffle=True),
    "torchdata, a stream with a state": stateful(StatefulStream),
}


@pytest.mark.parametrize("cut", [6, 9])
@pytest.mark.parametrize("kind", EXACT)
def test_loader_goes_on_bit_for_bit(kind: str, cut: int, tmp_path: Path) -> None:
    """After the last batch of an epoch, and in the middle of one."""
    whole, rest, resumed = cut_and_go_on(tmp_path, EXACT[kind], cut)
    assert rest == whole
    assert (resumed.exactness, resumed.reasons) == ("bitwise", "")


SAME_ORDER: dict[str, tuple[Callable[[], Any], str]] = {
    "workers": (loader_of(Samples, 2, shuffle=True), "worker processes is not restored"),
    "persistent workers": (
        loader_of(Samples, 2, shuffle=True, persistent_workers=True),
        "worker processes is not restored",
    ),
    "a sampler with a state, workers": (
        lambda: DataLoader(Samples(), batch_size=BATCH, sampler=StatefulSampler(SAMPLES), num_workers=2),
        "worker processes is not restored",
    ),
    "torchdata, workers": (stateful(Samples, 2, shuffle=True), "worker processes is not restored"),
    "a loader of one's own": (OwnLoader, "OwnLoader restored itself"),
}


@pytest.mark.parametrize("cut", [6, 9])
@pytest.mark.parametrize("kind", SAME_ORDER)
def test_loader_that_may_draw_elsewhere_goes_on_in_the_same_order(
    kind: str, cut: int, tmp_path: Path
) -> None:
    make_loader, reason = SAME_ORDER[kind]
    whole, rest, resumed = cut_and_go_on(tmp_path, make_loader, cut)
    assert rest == whole, "these data sets draw nothing"
    assert resumed.exactness == "equivalent"
    assert reason in resumed.reasons


@pytest.mark.parametrize("cut", [9])
def test_torchdata_brings_the_state_of_data_sets_back_into_workers(cut: int, tmp_path: Path) -> None:
    whole, rest, resumed = cut_and_go_on(tmp_path, stateful(OwnGenerator, 2, shuffle=True), cut)
    assert rest == whole
    assert resumed.exactness == "equivalent"
    assert "StatefulDataLoader restored itself" in resumed.reasons


def test_data_set_with_a_state_in_workers_is_called_approximate(tmp_path: Path) -> None:
    _, _, resumed = cut_and_go_on(tmp_path, loader_of(OwnGenerator, 2, shuffle=True), 4)
    assert resumed.exactness == "approximate"
    assert "torchdata.StatefulDataLoader" in resumed.reasons


@pytest.mark.parametrize("knobs", [{}, {"sampling": "seeded", "seed": 5}], ids=["plain", "seeded"])
def test_generator_that_nobody_saves_is_named(knobs: dict[str, Any], tmp_path: Path) -> None:
    whole, rest, resumed = cut_and_go_on(tmp_path, loader_of(Forgetful, shuffle=True), 4, **knobs)
    assert rest != whole
    assert resumed.exactness == "approximate"
    assert "Forgetful has a generator (generator)" in resumed.reasons


def test_stream_without_a_state_is_read_again(tmp_path: Path) -> None:
    whole, rest, resumed = cut_and_go_on(tmp_path, loader_of(Stream), 4)
    assert rest == whole
    assert resumed.exactness == "approximate"
    assert "4 batches of DataLoader were read again" in resumed.reasons


def test_checkpoint_at_the_start_of_an_epoch_goes_on_in_its_order(tmp_path: Path) -> None:
    """The loader has not been asked then: what the epoch before began with must not count."""

    class AtStart(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Any) -> None:
            if event.epoch == 1:
                run.checkpoint_nowait("manual")
                run.stop_nowait("cut")

    whole = steps_of(a_run(tmp_path, "whole", with_generator))
    a_run(tmp_path, "cut", with_generator, AtStart())
    events = a_run(tmp_path, "cut", with_generator, resume="last")
    assert steps_of(events) == {step: loss for step, loss in whole.items() if step > 6}
    assert [event.exactness for event in events if isinstance(event, Resumed)] == ["bitwise"]
    assert [event.epoch for event in events if isinstance(event, EpochStart)] == [2], "it was said already"


@pytest.mark.parametrize("make_loader", [loader_of(Samples, shuffle=True), stateful(Samples, shuffle=True)])
def test_not_a_sample_is_read_to_skip_it(make_loader: Callable[[], Any], tmp_path: Path) -> None:
    a_run(tmp_path, "cut", make_loader, Cut(4))
    loader = make_loader()
    a_run(tmp_path, "cut", lambda: loader, Cut(-1), resume="must")
    assert len(loader.dataset.read) == 18 * BATCH - 4 * BATCH


class Million(Dataset[Any]):
    """A million batches of one; counts what is read."""

    read = 0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return torch.full((FEATURES,), index / 1e6), torch.tensor(index % 3)


def test_resume_at_batch_100_000_of_a_million_reads_nothing_to_get_there() -> None:
    """The whole way of a resumed epoch, without 100,000 steps of training before it."""
    from offloop.engine.position.loader_position import capture_before_epoch, capture_in_epoch, continue_epoch

    torch.manual_seed(0)
    loader = DataLoader(Million(), shuffle=True)
    data = loader.dataset
    assert isinstance(data, Million)
    before = capture_before_epoch(loader)
    uninterrupted = iter(loader)
    for _ in range(100_000):  # reads nothing either, to get to the same place quickly
        uninterrupted._next_index()
    now = capture_in_epoch(loader)
    torch.manual_seed(77)
    rest, doubts = continue_epoch(loader, 100_000, before, now)
    assert (data.read, doubts) == (0, [])
    assert [torch.equal(next(rest)[0], next(uninterrupted)[0]) for _ in range(3)] == [True] * 3
    assert data.read == 6


# sampling="seeded" -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [6, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_seeded_augmentation_goes_on_bit_for_bit(workers: int, cut: int, tmp_path: Path) -> None:
    make_loader = loader_of(Augmented, workers, shuffle=True)
    whole, rest, resumed = cut_and_go_on(tmp_path, make_loader, cut, sampling="seeded", seed=5)
    assert rest == whole
    assert (resumed.exactness, resumed.reasons) == ("bitwise", "")


def test_augmentation_in_workers_that_is_not_seeded_is_drawn_anew(tmp_path: Path) -> None:
    """What the mode is for: without it this differs, and says so."""
    whole, rest, resumed = cut_and_go_on(tmp_path, loader_of(Augmented, 2, shuffle=True), 4)
    assert rest != whole
    assert resumed.exactness == "equivalent"
    assert 'sampling="seeded"' in resumed.reasons


def test_seeded_numbers_do_not_depend_on_who_loads_the_sample(tmp_path: Path) -> None:
    def make_loader(workers: int) -> Any:
        data = Augmented()
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(8))
        return DataLoader(data, BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 1)

    losses = [
        steps_of(
            a_run(tmp_path, f"run{workers}", lambda: make_loader(workers), sampling="seeded", seed=5)  # noqa: B023
        )
        for workers in (0, 1, 2)
    ]
    assert len(set(losses[0].values())) == 18
    assert losses[1:] == losses[:1] * 2


def test_seeded_samples_differ_in_each_epoch_and_with_the_seed(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Look(Callback):
        @in_step
        def before_forward(self, point: StepPoint) -> None:
            seen.append(point.batch[0])

    loader = DataLoader(Augmented(), batch_size=SAMPLES)  # one batch, always in the same order
    for seed in (5, 6):
        a_run(tmp_path, f"seed{seed}", lambda: loader, Look(), sampling="seeded", seed=seed)
    assert len({tuple(batch.flatten().tolist()) for batch in seen}) == 6
    noise = seen[0] - Samples().inputs
    assert len({round(value, 4) for value in noise.flatten().tolist()}) > 0.9 * noise.numel()


def test_seeded_sampling_leaves_the_training_its_generators(tmp_path: Path) -> None:
    """Dropout draws what it draws without: what samples draw is not taken from it."""
    drawn: list[list[float]] = []
    for sampling, dataset in (("loader", Samples), ("seeded", Augmented)):
        torch.manual_seed(1)
        numbers: list[float] = []

        class Draw(Callback):
            @in_step
            def before_forward(self, point: StepPoint, numbers: list[float] = numbers) -> None:
                numbers += [float(torch.rand(())), random.random()]

        a_run(tmp_path, sampling, loader_of(dataset, shuffle=True), Draw(), sampling=sampling, seed=5)
        drawn.append(numbers)
    assert drawn[0] == drawn[1]


class Pairs(Augmented):
    """Fetches whole batches, and single ones for a loader without batches."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def collate_with_noise(samples: list[Any]) -> Any:
    inputs, targets = torch.utils.data.default_collate(samples)
    return inputs + torch.rand(()), targets


@pytest.mark.parametrize(
    "options",
    [{"batch_size": BATCH}, {"batch_size": BATCH, "collate_fn": collate_with_noise}],
    ids=["whole batches", "a collate function that draws"],
)
def test_seeded_batches_go_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    def make_loader() -> Any:
        return DataLoader(Pairs(), shuffle=True, num_workers=2, **options)

    whole, rest, resumed = cut_and_go_on(tmp_path, make_loader, 4, sampling="seeded", seed=5)
    assert rest == whole
    assert resumed.exactness == "bitwise"


def test_seeded_loader_without_batches_of_its_own(tmp_path: Path) -> None:
    class Batches(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.randn(BATCH, FEATURES), torch.arange(BATCH) % 3

    def make_loader() -> Any:
        return DataLoader(Batches(), batch_size=None, shuffle=True)

    whole, rest, resumed = cut_and_go_on(tmp_path, make_loader, 4, sampling="seeded", seed=5)
    assert rest == whole
    assert resumed.exactness == "bitwise"


@pytest.mark.parametrize(
    ("make_loader", "text"),
    [
        (loader_of(Stream), "Stream is an IterableDataset"),
        (OwnLoader, "got OwnLoader"),
        (stateful(OwnGenerator, 2), "keeps the state of its data set"),
    ],
)
def test_what_cannot_be_seeded_is_refused_before_the_run(make_loader: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny_trainer(sampling="seeded", seed=1).train(make_loader(), epochs=1)


def test_seeded_sampling_needs_a_seed() -> None:
    with pytest.raises(ConfigError, match="give seed="):
        tiny_trainer(sampling="seeded")


def test_another_sampling_is_no_longer_called_bitwise(tmp_path: Path) -> None:
    make_loader = loader_of(Samples, shuffle=True)
    a_run(tmp_path, "cut", make_loader, Cut(4))
    events = a_run(tmp_path, "cut", make_loader, resume="must", sampling="seeded", seed=5)
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.exactness == "approximate"
    assert "sampling was loader, now it is seeded" in resumed.reasons
