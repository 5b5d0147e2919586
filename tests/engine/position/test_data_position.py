"""A resumed run goes on in its data, or says that it does not: "bitwise" and other bits is the worst fault there is."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from interruptions import Cut
from samplers import StatefulSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from offloop.callbacks import EarlyStopping, LearningRateScheduler, ModelCheckpoint
from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Event,
    Resumed,
    Run,
    StepEnd,
    Trainer,
    TrainStart,
    decides,
)
from offloop.engine.position.data_position import DataPosition
from offloop.engine.position.epoch_source import EpochSource
from offloop.engine.position.loader_position import capture_in_epoch
from offloop.engine.testing import Recorder, reproducible

FEATURES, SAMPLES, BATCH, BATCHES = 6, 20, 4, 5

INPUTS = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(3))
TARGETS = INPUTS[:, :3].argmax(dim=1)
NUMPY = numpy.random.default_rng(0)  # as scripts have one, for everything


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index], TARGETS[index]


class DrawsFromScript(Samples):
    def __getitem__(self, index: int) -> Any:
        return INPUTS[index] + float(NUMPY.random()), TARGETS[index]


class HardensSlowly(Samples):
    """Samples that change with what was read before."""

    def __init__(self) -> None:
        self.read = 0

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return INPUTS[index] * (1 + self.read / 100), TARGETS[index]


class Wears(Samples):
    """Samples that change in place."""

    def __init__(self) -> None:
        self.inputs = INPUTS.clone()

    def __getitem__(self, index: int) -> Any:
        self.inputs[index] *= 1.01
        return self.inputs[index], TARGETS[index]


class KeepsNoise(Samples):
    """Augments each sample once."""

    def __init__(self) -> None:
        self.kept: dict[int, torch.Tensor] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.kept:
            self.kept[index] = INPUTS[index] + torch.randn(FEATURES)
        return self.kept[index], TARGETS[index]


class Stronger:
    """A transform that counts, from a default of its class."""

    calls = 0

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return inputs * (1 + self.calls / 100)


class WithTransform(Samples):
    def __init__(self) -> None:
        self.transform = Stronger()

    def __getitem__(self, index: int) -> Any:
        return self.transform(INPUTS[index]), TARGETS[index]


class Transformed(Samples):
    """Holds a function that draws from a generator which only its closure knows."""

    def __init__(self) -> None:
        generator = random.Random(3)

        def noisy(inputs: torch.Tensor) -> torch.Tensor:
            return inputs + generator.random()

        self.transform = noisy

    def __getitem__(self, index: int) -> Any:
        return self.transform(INPUTS[index]), TARGETS[index]


class Indices(Sampler[int]):
    def __len__(self) -> int:
        return SAMPLES


class Counting(Indices):
    """Counts its epochs by itself."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(random.Random(self.epoch).sample(range(SAMPLES), SAMPLES))


class ShufflesInPlace(Indices):
    """Goes by `set_epoch` and by the order of the epoch before."""

    def __init__(self) -> None:
        self.order = torch.arange(SAMPLES)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        self.order = self.order[torch.randperm(SAMPLES, generator=generator)]
        return iter(self.order.tolist())


class FromScript(Indices):
    def __iter__(self) -> Iterator[int]:
        yield from NUMPY.permutation(SAMPLES).tolist()


class ByEpoch(Indices):
    """Goes by `set_epoch`, as samplers for distributed training do."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from random.Random(self.epoch).sample(range(SAMPLES), SAMPLES)


class ByEpochAndMore(ByEpoch):
    def __init__(self) -> None:
        self.random = random.Random(2)

    def __iter__(self) -> Iterator[int]:
        yield from self.random.sample(list(super().__iter__()), SAMPLES)


class AsItGoes(ByEpoch):
    """Draws each index when it is asked for it, out of those that are left."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(SAMPLES))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class Buckets(BatchSampler):
    """Batches in an order of their own."""

    def __init__(self) -> None:
        super().__init__(range(SAMPLES), BATCH, drop_last=False)
        self._random = random.Random(6)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        self._random.shuffle(batches)
        return iter(batches)


class Wrapping(DataLoader[Any]):
    """A loader with an iterator of its own, as libraries have them."""

    def __iter__(self) -> Any:
        for inputs, targets in super().__iter__():
            yield inputs * 2, targets


class GoesOn(IterableDataset[Any]):
    """A stream that never begins anew."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.islice(self._numbers, SAMPLES):
            yield INPUTS[number % 7], TARGETS[number % 7]


class ShuffledList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(random.sample(list(super().__iter__()), len(self)))


class Prefetching:
    """Somebody's wrapper."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.loader))


class Collates:
    """Counts its batches, from a default of its class."""

    batches = 0

    def __call__(self, samples: Any) -> Any:
        self.batches += 1
        return torch.stack([each[0] for each in samples]) * self.batches, torch.stack(
            [each[1] for each in samples]
        )


def counting_collate() -> Callable[[Any], Any]:
    batches = [0]

    def collate(samples: Any) -> Any:
        batches[0] += 1
        return torch.stack([each[0] for each in samples]) * batches[0], torch.stack(
            [each[1] for each in samples]
        )

    return collate


def batches_of_list() -> list[Any]:
    return [(INPUTS[at : at + BATCH], TARGETS[at : at + BATCH]) for at in range(0, SAMPLES, BATCH)]


def endless() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield (
            torch.randn(BATCH, FEATURES, generator=generator),
            torch.randint(0, 3, (BATCH,), generator=generator),
        )


def unseeded_split() -> Any:
    return Subset(Samples(), random.SystemRandom().sample(range(SAMPLES), SAMPLES))


def noisy_collate() -> Callable[[Any], Any]:
    generator = numpy.random.default_rng(1)

    def collate(samples: list[Any]) -> Any:
        inputs, targets = torch.utils.data.default_collate(samples)
        return inputs + float(generator.random()), targets

    return collate


MINED: list[Any] = []  # the sampler of the run in progress
SEEN: list[Any] = []  # batches of the run in progress; a trainer that kept them would be named for it


class WithDropout(Trainer):
    """Draws from torch's generator in each step, and notes what it has seen."""

    def __init__(self, directory: Path, name: str, **knobs: Any) -> None:
        torch.manual_seed(7)
        model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 3)
        )
        super().__init__(
            model,
            torch.optim.SGD(model.parameters(), lr=0.05),
            loss=torch.nn.functional.cross_entropy,
            device="cpu",
            run_dir=str(directory),
            run_name=name,
            **knobs,
        )

    def training_step(self, batch: Any) -> Any:
        SEEN.append(tuple(batch[0].flatten().tolist()))
        return super().training_step(batch)


def a_run(
    directory: Path,
    name: str,
    make_loader: Callable[[], Any],
    *callbacks: Callback,
    epochs: int | None = 3,
    metrics: Any = (),
    max_steps: int | None = None,
    resume: str | None = None,
    val_loader: Any = None,
    make: Callable[..., WithDropout] = WithDropout,
    **knobs: Any,
) -> tuple[list[Any], list[Event]]:
    """Train; return the batches that were seen, and the events. A run that goes on does not need the seeds."""
    trainer, recorder = make(directory, name, **knobs), Recorder()
    seed = 1 if resume is None else 77
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    SEEN.clear()
    loader = make_loader()
    try:
        trainer.train(
            loader,
            val_loader,
            epochs=epochs,
            max_steps=max_steps,
            resume=resume,
            metrics=metrics,
            callbacks=[recorder, *callbacks],
        )
    finally:
        for each in (loader, val_loader):
            iterator: Any = getattr(each, "_iterator", None)
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()  # else it happens when garbage is collected, and takes seconds
    return list(SEEN), recorder.events


def losses(events: Iterable[Event]) -> dict[int, float]:
    return {event.step: event.loss or 0.0 for event in events if isinstance(event, StepEnd)}


def said(events: Iterable[Event]) -> tuple[str, str]:
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    return resumed.exactness, resumed.reasons


PLACES: dict[str, tuple[list[Callback], dict[str, Any]]] = {
    "in the middle of an epoch": ([Cut(7)], {}),
    "between two epochs": ([], {"epochs": 1}),
    "at a limit": ([], {"max_steps": 7}),
}


def interrupt_and_go_on(
    tmp_path: Path, make_loader: Callable[[], Any], place: str, **options: Any
) -> tuple[bool, str, str]:
    """Return whether a resumed run is the uninterrupted one bit for bit, how exact it says it is, and why not."""
    callbacks, shorter = PLACES[place]
    seen, whole = a_run(tmp_path, "whole", make_loader, **options)
    first, _ = a_run(tmp_path, "cut", make_loader, ModelCheckpoint(), *callbacks, **options | shorter)
    rest, events = a_run(tmp_path, "cut", make_loader, resume="must", **options)
    step = min(losses(events)) - 1
    is_same = first + rest == seen and losses(events) == {
        number: loss for number, loss in losses(whole).items() if number > step
    }
    return is_same, *said(events)


def loader(dataset: Callable[[], Any] = Samples, **options: Any) -> Callable[[], Any]:
    """Return what makes a loader; options that are functions are called."""

    def make() -> Any:
        made = {name: value() if isinstance(value, type) else value for name, value in options.items()}
        return DataLoader(dataset(), **{"batch_size": BATCH, **made})

    return make


def with_sampler(make: Callable[[Any], Any], **options: Any) -> Callable[[], Any]:
    def make_loader() -> Any:
        data = Samples()
        return DataLoader(data, batch_size=BATCH, sampler=make(data), **options)

    return make_loader


KNOWN: dict[str, Callable[[], Any]] = {
    "a distributed sampler": with_sampler(lambda data: DistributedSampler(data, 1, 0, seed=3)),
    "a sampler with set_epoch": loader(sampler=ByEpoch),
    "weights": with_sampler(lambda data: WeightedRandomSampler(range(1, SAMPLES + 1), SAMPLES)),
    "a subset": with_sampler(lambda data: SubsetRandomSampler(range(SAMPLES))),
    "with replacement": with_sampler(lambda data: RandomSampler(data, replacement=True)),
    "a list as sampler": with_sampler(lambda data: [3, 1, 2, 0] * BATCHES),
    "batches of a sampler with a state": lambda: DataLoader(
        Samples(), batch_sampler=BatchSampler(StatefulSampler(SAMPLES), BATCH, drop_last=False)
    ),
    "lists": batches_of_list,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KNOWN)
def test_order_that_is_known_goes_on_bit_for_bit(kind: str, place: str, tmp_path: Path) -> None:
    assert interrupt_and_go_on(tmp_path, KNOWN[kind], place) == (True, "bitwise", "")


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "counts its epochs": (loader(sampler=Counting), "the state of Counting is not saved"),
    "draws from the script's generator": (loader(sampler=FromScript), "the state of FromScript is not saved"),
    "set_epoch and a generator": (
        loader(sampler=ByEpochAndMore),
        "ByEpochAndMore has a generator (random)",
    ),
    "a batch sampler": (
        lambda: DataLoader(Samples(), batch_sampler=Buckets()),
        "the state of Buckets is not saved",
    ),
    "a data set and the script's generator": (
        loader(DrawsFromScript, shuffle=True),
        "DrawsFromScript has a generator (NUMPY)",
    ),
    "a data set that counts": (loader(HardensSlowly, shuffle=True), "HardensSlowly.read was"),
    "a transform's closure": (
        loader(Transformed, shuffle=True),
        "Transformed has a generator (generator)",
    ),
    "a collate function's closure": (
        lambda: DataLoader(Samples(), BATCH, shuffle=True, collate_fn=noisy_collate()),
        "collate has a generator (generator)",
    ),
    "a loader's own iterator": (
        lambda: Wrapping(Samples(), BATCH, shuffle=True),
        "Wrapping overrides __iter__",
    ),
    "a stream": (
        lambda: DataLoader(GoesOn(), BATCH),
        "the state of GoesOn is not saved",
    ),
    "a list that shuffles itself": (
        lambda: ShuffledList(batches_of_list()),
        "the state of ShuffledList is not saved",
    ),
    "a wrapper": (
        lambda: Prefetching(loader(shuffle=True)()),
        "the state of Prefetching is not saved",
    ),
    "set_epoch and an order that is shuffled on": (
        loader(sampler=ShufflesInPlace),
        "ShufflesInPlace.order has changed during the run",
    ),
    "a data set that changes in place": (loader(Wears, shuffle=True), "Wears.inputs has changed"),
    "a cache of augmented samples": (loader(KeepsNoise, shuffle=True), "KeepsNoise.kept has changed"),
    "a transform that counts": (loader(WithTransform, shuffle=True), "WithTransform.transform has changed"),
    "a collate function that counts": (
        lambda: DataLoader(Samples(), BATCH, shuffle=True, collate_fn=Collates()),
        "Collates.batches was",
    ),
    "a collate function's counter": (
        lambda: DataLoader(Samples(), BATCH, shuffle=True, collate_fn=counting_collate()),
        "collate.closure has changed",
    ),
    "an unseeded split": (
        lambda: DataLoader(unseeded_split(), BATCH),
        "samples chosen by Subset are others than before",
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", UNKNOWN)
def test_order_that_is_not_known_is_named(kind: str, place: str, tmp_path: Path) -> None:
    make_loader, reason = UNKNOWN[kind]
    _, exactness, reasons = interrupt_and_go_on(tmp_path, make_loader, place)
    assert exactness == "approximate"
    assert reason in reasons


def test_weights_that_follow_the_losses_are_named(tmp_path: Path) -> None:
    class Mines(WithDropout):
        """Gives samples another weight as it goes."""

        def training_step(self, batch: Any) -> Any:
            MINED[0].weights[self.step % SAMPLES] *= 3
            return super().training_step(batch)

    def mined() -> Any:
        MINED[:] = [WeightedRandomSampler(range(1, SAMPLES + 1), SAMPLES)]
        return DataLoader(Samples(), BATCH, sampler=MINED[0])

    is_same, exactness, reasons = interrupt_and_go_on(tmp_path, mined, "between two epochs", make=Mines)
    assert (is_same, exactness) == (False, "approximate")
    assert reasons.startswith("WeightedRandomSampler.weights has changed during the run")


class FollowsEpoch(Samples):
    """Holds what follows from the number of the epoch alone."""

    def set_epoch(self, epoch: int) -> None:
        self.inputs = INPUTS * (1 + epoch)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], TARGETS[index]


def halves() -> Any:
    parts = torch.utils.data.random_split(Samples(), [8, 12], torch.Generator().manual_seed(4))
    return torch.utils.data.ConcatDataset(parts)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dataset", [FollowsEpoch, halves])
def test_data_set_that_is_as_it_was_is_not_named(dataset: Any, place: str, tmp_path: Path) -> None:
    made = loader(dataset, shuffle=True)
    assert interrupt_and_go_on(tmp_path, made, place) == (True, "bitwise", "")


@pytest.mark.parametrize("place", PLACES)
def test_endless_iterator_goes_on_where_it_was_and_says_that_it_was_read_again(
    place: str, tmp_path: Path
) -> None:
    is_same, exactness, reasons = interrupt_and_go_on(tmp_path, endless, place, limit_train_batches=BATCHES)
    assert is_same, "it has a generator of its own"
    assert exactness == "approximate"
    assert "generator continues from epoch to epoch" in reasons
    assert (
        f"{BATCHES if place == 'between two epochs' else 7} batches of generator were read again" in reasons
    )


# Samplers that draw as they go ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_sampler_that_draws_as_it_goes_is_named(workers: int, tmp_path: Path) -> None:
    """Training draws from the same generator in between, so the order cannot be drawn again."""
    make_loader = loader(sampler=AsItGoes, num_workers=workers)
    is_same, exactness, reasons = interrupt_and_go_on(tmp_path, make_loader, "in the middle of an epoch")
    assert (is_same, exactness) == (False, "approximate")
    assert "draws from global generators as it goes" in reasons


def test_sampler_that_draws_as_it_goes_begins_an_epoch_as_it_would_have(tmp_path: Path) -> None:
    make_loader = loader(sampler=AsItGoes)
    assert interrupt_and_go_on(tmp_path, make_loader, "between two epochs") == (True, "bitwise", "")


class CallsAtItsStart(Samples):
    """Has something drawn after `iter(loader)` and before the first batch, where samplers draw."""

    run: Run | None = None

    def set_epoch(self, epoch: int) -> None:
        if epoch == 1 and self.run is not None:
            self.run.call_nowait(lambda trainer: torch.rand(3))


class TellsTheRun(Callback):
    def __init__(self, dataset: CallsAtItsStart) -> None:
        self.dataset = dataset

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        if event.resumed_from is None:
            self.dataset.run = run


@pytest.mark.parametrize(
    "make",
    [
        WithDropout,
        type(
            "Own", (WithDropout,), {"batches": lambda self, loader: super(WithDropout, self).batches(loader)}
        ),
    ],
)
def test_command_before_the_first_batch_does_not_change_the_order(make: Any, tmp_path: Path) -> None:
    def run(name: str, *callbacks: Callback, resume: str | None = None) -> tuple[list[Any], list[Event]]:
        data = CallsAtItsStart()
        loader = DataLoader(data, BATCH, shuffle=True)
        return a_run(tmp_path, name, lambda: loader, TellsTheRun(data), *callbacks, resume=resume, make=make)

    seen, _ = run("whole")
    first, _ = run("cut", ModelCheckpoint(), Cut(7))
    rest, events = run("cut", resume="must")
    assert (first + rest == seen, said(events)) == (True, ("bitwise", ""))


class Noisy(Samples):
    def __getitem__(self, index: int) -> Any:
        return INPUTS[index] + torch.randn(FEATURES), TARGETS[index]


def test_what_persistent_workers_draw_is_other_from_the_next_epoch_on(tmp_path: Path) -> None:
    make_loader = loader(Noisy, shuffle=True, num_workers=1, persistent_workers=True)
    is_same, exactness, reasons = interrupt_and_go_on(tmp_path, make_loader, "between two epochs")
    assert (is_same, exactness) == (False, "equivalent")
    assert "inside persistent workers is not restored" in reasons


def test_workers_that_draw_nothing_change_nothing(tmp_path: Path) -> None:
    make_loader = loader(
        lambda: TensorDataset(INPUTS, TARGETS), shuffle=True, num_workers=1, persistent_workers=True
    )
    for place in ("in the middle of an epoch", "between two epochs"):
        assert interrupt_and_go_on(tmp_path / place, make_loader, place) == (True, "bitwise", "")


def test_another_number_of_workers_is_named(tmp_path: Path) -> None:
    """What was drawn in a worker is now drawn from the generator that training draws from."""
    a_run(tmp_path, "cut", loader(shuffle=True, num_workers=1), ModelCheckpoint(), epochs=1)
    _, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must")
    assert said(events) == ("approximate", "num_workers was 1, now it is 0")


# Several loaders --------------------------------------------------------------------------------------


class OneAfterTheOther(WithDropout):
    def __init__(self, directory: Path, name: str, **knobs: Any) -> None:
        super().__init__(directory, name, **knobs)
        generator = torch.Generator().manual_seed(9)
        self.second = DataLoader(Samples(), BATCH, shuffle=True, generator=generator)

    def train_epoch(self, loader: Iterable[Any]) -> None:
        for each in (loader, self.second):
            for batch in self.batches(each):
                self.train_batch(batch)


class SideBySide(OneAfterTheOther):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        for first, second in zip(self.batches(loader), self.batches(self.second), strict=True):
            self.train_batch(first)
            self.train_batch(second)


class LeavesTheFirst(OneAfterTheOther):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        for number, batch in enumerate(self.batches(loader)):
            if number == 2:
                break
            self.train_batch(batch)
        for batch in self.batches(self.second):
            self.train_batch(batch)


class MadeAnew(OneAfterTheOther):
    """Its second loader is another object in each epoch."""

    def train_epoch(self, loader: Iterable[Any]) -> None:
        for each in (loader, DataLoader(Samples(), BATCH, shuffle=True)):
            for batch in self.batches(each):
                self.train_batch(batch)


class OneTwice(WithDropout):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        for _ in range(2):
            for batch in self.batches(loader):
                self.train_batch(batch)


class InnerLoop(OneAfterTheOther):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        for outer in self.batches(loader):
            for inner in self.batches(self.second):
                self.train_batch(inner)
            self.train_batch(outer)


@pytest.mark.parametrize("cut", [2, 5, 7, 8, 10, 11, 14])
@pytest.mark.parametrize("make", [OneAfterTheOther, SideBySide, MadeAnew, LeavesTheFirst, OneTwice])
def test_epoch_over_two_loaders_goes_on_where_it_was(
    make: type[WithDropout], cut: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"make": make, "epochs": 2}
    if make is LeavesTheFirst and cut in (2, 8, 10):
        return  # what it counts itself begins anew with the epoch, inside the first loader
    seen, whole = a_run(tmp_path, "whole", loader(shuffle=True), **options)
    first, _ = a_run(tmp_path, "cut", loader(shuffle=True), ModelCheckpoint(), Cut(cut), **options)
    rest, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must", **options)
    assert first + rest == seen
    assert losses(events) == {step: loss for step, loss in losses(whole).items() if step > len(first)}
    assert said(events) == ("bitwise", "")


@pytest.mark.parametrize("make", [OneAfterTheOther, SideBySide, MadeAnew])
def test_epochs_over_two_loaders_begin_as_they_would_have(make: type[WithDropout], tmp_path: Path) -> None:
    is_same, *rest = interrupt_and_go_on(tmp_path, loader(shuffle=True), "between two epochs", make=make)
    assert (is_same, rest) == (True, ["bitwise", ""])


def test_inner_loop_is_named_in_the_middle_of_an_epoch_and_exact_between_two(tmp_path: Path) -> None:
    options: dict[str, Any] = {"make": InnerLoop}
    in_epoch = interrupt_and_go_on(tmp_path / "in", loader(), "in the middle of an epoch", **options)
    assert in_epoch == (
        False,
        "approximate",
        "the position in an inner loop over a loader is not saved",
    )
    assert interrupt_and_go_on(tmp_path / "between", loader(), "between two epochs", **options) == (
        True,
        "bitwise",
        "",
    )


@pytest.mark.parametrize("max_steps", [5, 10])
def test_limit_at_the_end_of_the_first_loader_is_not_the_end_of_the_epoch(
    max_steps: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"make": OneAfterTheOther, "epochs": 2}
    seen, _ = a_run(tmp_path, "whole", loader(shuffle=True), **options)
    first, ended = a_run(
        tmp_path, "cut", loader(shuffle=True), ModelCheckpoint(), max_steps=max_steps, **options
    )
    assert [event.complete for event in ended if isinstance(event, EpochEnd)] == [max_steps == 10]
    rest, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must", **options)
    assert (first + rest == seen, said(events)) == (True, ("bitwise", ""))


def test_nameless_loader_with_a_generator_of_its_own_is_named(tmp_path: Path) -> None:
    class Own(MadeAnew):
        def train_epoch(self, loader: Iterable[Any]) -> None:
            super().train_epoch(DataLoader(Samples(), BATCH, shuffle=True, generator=self.generator))

        generator = torch.Generator()

    _, exactness, reasons = interrupt_and_go_on(
        tmp_path, loader(shuffle=True), "between two epochs", make=Own
    )
    assert exactness == "approximate"
    assert "no attribute of the trainer" in reasons


def test_batches_that_were_read_and_not_trained_are_named(tmp_path: Path) -> None:
    """A checkpoint between the two loaders' batches: the second batch is read already."""
    options: dict[str, Any] = {"make": SideBySide, "val_every_n_steps": 5, "val_loader": batches_of_list()}
    a_run(tmp_path, "cut", loader(shuffle=True), Cut(5), **options)
    _, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must", **options)
    exactness, reasons = said(events)
    assert exactness == "approximate"
    assert "batches that were read but not trained are lost" in reasons


# Validations ------------------------------------------------------------------------------------------


def shuffled_validation(**options: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(INPUTS, TARGETS), 8, shuffle=True, generator=generator, **options)


VALIDATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "a generator of its own": (shuffled_validation, ""),
    "workers": (lambda: shuffled_validation(num_workers=1), ""),
    "workers that stay": (lambda: shuffled_validation(num_workers=1, persistent_workers=True), ""),
    "a sampler with a state": (lambda: DataLoader(Samples(), 8, sampler=StatefulSampler(SAMPLES)), ""),
    "set_epoch": (lambda: DataLoader(Samples(), 8, sampler=ByEpoch()), ""),
    "a sampler that counts": (
        lambda: DataLoader(Samples(), 8, sampler=Counting()),
        "val_loader: the state of Counting is not saved",
    ),
}


@pytest.mark.parametrize("kind", VALIDATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_validations_go_on_as_they_would_have(kind: str, place: str, tmp_path: Path) -> None:
    make_val_loader, reason = VALIDATIONS[kind]
    callbacks, shorter = PLACES[place]
    _, whole = a_run(tmp_path, "whole", loader(shuffle=True), val_loader=make_val_loader())
    a_run(
        tmp_path,
        "cut",
        loader(shuffle=True),
        ModelCheckpoint(),
        *callbacks,
        val_loader=make_val_loader(),
        **shorter,
    )
    _, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must", val_loader=make_val_loader())
    exactness, reasons = said(events)
    if reason:
        assert exactness == "approximate"
        assert reason in reasons
        return
    assert (exactness, reasons) == ("bitwise", "")
    assert_same_rest(whole, events)


class ValidatesOnTwo(WithDropout):
    def __init__(self, directory: Path, name: str, **knobs: Any) -> None:
        super().__init__(directory, name, **knobs)
        self.loaders = [shuffled_validation(), shuffled_validation(num_workers=1, persistent_workers=True)]

    def validate_epoch(self, loader: Iterable[Any]) -> None:
        for each in self.loaders:
            for batch in self.batches(each):
                self.validate_batch(batch)


def test_validation_over_two_loaders_goes_on_as_it_would_have(tmp_path: Path) -> None:
    options: dict[str, Any] = {"make": ValidatesOnTwo, "val_loader": batches_of_list()}
    _, whole = a_run(tmp_path, "whole", loader(shuffle=True), **options)
    a_run(tmp_path, "cut", loader(shuffle=True), ModelCheckpoint(), max_steps=7, **options)
    _, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must", **options)
    assert said(events) == ("bitwise", "")
    assert_same_rest(whole, events)


def assert_same_rest(whole: list[Event], rest: list[Event]) -> None:
    """What the training thread said after the interruption is what the uninterrupted run said."""
    besides = (
        "TrainStart",
        "Resumed",
        "CommandApplied",
    )  # what is saved may differ, and commands are counted
    of_whole, of_rest = (
        [each for each in reproducible(of) if each[0] not in besides] for of in (whole, rest)
    )
    assert of_rest
    assert of_whole[-len(of_rest) :] == of_rest


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({}, id="every epoch"),
        pytest.param({"val_every_n_epochs": 2}, id="every second epoch"),
        pytest.param({"val_every_n_steps": 4}, id="every four steps"),
    ],
)
@pytest.mark.parametrize("max_steps", [4, 7, 10])
def test_last_word_of_a_run_is_no_part_of_the_run_that_goes_on(
    max_steps: int, knobs: dict[str, Any], tmp_path: Path
) -> None:
    """A limit adds a validation and an EpochEnd: they draw, and deciders, plateaus and means go by them."""

    def run(name: str, **more: Any) -> tuple[list[Any], list[Event]]:
        return a_run(
            tmp_path,
            name,
            loader(shuffle=True),
            EarlyStopping(monitor="val_loss", patience=30),
            LearningRateScheduler("reduce_on_plateau", monitor="train_loss", factor=0.5, patience=0),
            ModelCheckpoint(),
            val_loader=loader(shuffle=True)(),
            epochs=5,
            metrics=["accuracy"],
            **knobs,
            **more,
        )

    _, whole = run("whole")
    run("cut", max_steps=max_steps)
    _, events = run("cut", resume="must")
    assert said(events) == ("bitwise", "")
    assert_same_rest(whole, events)


class Looked(torch.nn.Module):
    """Counts what it is asked, in buffers, and lets it be seen in its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("transient", torch.zeros(()), persistent=False)

    calls: torch.Tensor
    transient: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.transient = self.transient + 1
        return inputs * (1 + self.calls / 50) * (1 + self.transient / 50)


class CountsValidations(WithDropout):
    """Remembers its validations in a state of its own, and trains by them."""

    def __init__(self, *arguments: Any, **knobs: Any) -> None:
        super().__init__(*arguments, **knobs)
        self.model: torch.nn.Module = torch.nn.Sequential(self.model, Looked())
        self.threshold = torch.ones(())

    def training_step(self, batch: Any) -> Any:
        return super().training_step((batch[0] * self.threshold, batch[1]))

    def validate_epoch(self, loader: Any) -> None:
        super().validate_epoch(loader)
        self.threshold *= 0.9

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"threshold": self.threshold}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.threshold = state["threshold"].clone()


@pytest.mark.parametrize("first", [{"max_steps": 7}, {"epochs": 1, "val_every_n_epochs": 2}])
def test_state_that_the_last_validation_changes_goes_on_as_it_was(first: Any, tmp_path: Path) -> None:
    made: dict[str, Any] = {"make": CountsValidations, "val_loader": batches_of_list()}
    every = first.get("val_every_n_epochs", 1)
    _, whole = a_run(tmp_path, "whole", loader(shuffle=True), val_every_n_epochs=every, **made)
    a_run(tmp_path, "cut", loader(shuffle=True), ModelCheckpoint(), **made, **first)
    _, rest = a_run(tmp_path, "cut", loader(shuffle=True), resume="must", val_every_n_epochs=every, **made)
    assert said(rest) == ("bitwise", "")
    assert_same_rest(whole, rest)


def test_early_stopping_counts_as_if_the_run_had_not_ended(tmp_path: Path) -> None:
    """The validation at the limit would be the third without a better loss."""

    def run(name: str, **more: Any) -> int:
        stopping = EarlyStopping(monitor="val_loss", patience=3, min_delta=100.0)
        _, events = a_run(
            tmp_path,
            name,
            loader(shuffle=True),
            stopping,
            ModelCheckpoint(),
            val_loader=batches_of_list(),
            epochs=6,
            **more,
        )
        return max(losses(events))

    assert run("whole") == 4 * BATCHES
    assert run("cut", max_steps=12) == 12
    assert run("cut", resume="must") == 4 * BATCHES


# What callbacks hear of a resumed epoch ---------------------------------------------------------------


class Curriculum(Callback):
    """Needs the epoch's number before its first batch, also of one that goes on in the middle."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int]] = []

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        if event.resumed_from is not None:
            self.begun.append(("resumed", event.epoch, event.step))

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        self.begun.append(("begun", event.epoch, event.step))


def test_decider_learns_of_a_resumed_epoch_at_train_start(tmp_path: Path) -> None:
    a_run(tmp_path, "cut", loader(), Cut(7))
    curriculum = Curriculum()
    a_run(tmp_path, "cut", loader(), curriculum, resume="must")
    assert curriculum.begun == [("resumed", 1, 7), ("begun", 2, 10)]


class OnlyExact(Callback):
    @decides
    def on_resumed(self, event: Resumed, run: Run) -> None:
        if event.exactness != "bitwise":
            run.stop_nowait(f"not exact: {event.reasons}")


@pytest.mark.parametrize("cut", [7, 10])
def test_decider_can_refuse_to_go_on_inexactly(cut: int, tmp_path: Path) -> None:
    a_run(tmp_path, "cut", loader(sampler=Counting), Cut(cut))
    seen, events = a_run(tmp_path, "cut", loader(sampler=Counting), OnlyExact(), resume="must")
    assert seen == []
    assert "Counting" in said(events)[1]


def test_attempt_that_trains_nothing_leaves_the_position_as_it_was(tmp_path: Path) -> None:
    """It saves again, and has never put the random states back."""
    seen, _ = a_run(tmp_path, "whole", loader(shuffle=True))
    first, _ = a_run(tmp_path, "cut", loader(shuffle=True), ModelCheckpoint(), max_steps=7)
    again, _ = a_run(tmp_path, "cut", loader(shuffle=True), ModelCheckpoint(), max_steps=7, resume="must")
    rest, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must")
    assert (again, first + rest == seen) == ([], True)
    assert said(events) == ("bitwise", "")


def test_checkpoint_of_an_older_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds one loader and where it stood."""

    def older(self: DataPosition, *, in_epoch: bool, batches: int) -> dict[str, Any]:
        return {"before": self.current.before, "now": capture_in_epoch(self.current.loader)}

    seen, _ = a_run(tmp_path, "whole", loader(shuffle=True))
    with monkeypatch.context() as patch:
        patch.setattr(DataPosition, "capture", older)
        first, _ = a_run(tmp_path, "cut", loader(shuffle=True), Cut(7))
    rest, events = a_run(tmp_path, "cut", loader(shuffle=True), resume="must")
    assert (first + rest == seen, said(events)) == (True, ("bitwise", ""))


def test_share_of_a_loader_is_described_as_the_whole() -> None:
    """One process of two reads half of the batches; a checkpoint may have been taken before it read any."""

    def half(loader: Iterable[Any]) -> DataLoader[Any]:
        return DataLoader(Samples(), batch_sampler=list(BatchSampler(range(SAMPLES), BATCH, False))[::2])

    train_loader, val_loader = (DataLoader(Samples(), batch_size=BATCH) for _ in range(2))

    def source() -> EpochSource:
        return EpochSource(
            object.__new__(Trainer),
            train_loader,
            val_loader,
            seed=None,
            is_resumable=True,
            share=half,
            share_validation=half,
        )

    first = source()
    early = first.position.capture(in_epoch=False, batches=0)
    list(first.begin(train_loader, epoch=0, start=0, keep_random=False)[0])
    list(first.begin_validation(val_loader, 0))
    late = first.position.capture(in_epoch=False, batches=3)
    again = source()
    again.restore(early, in_epoch=False, epoch=0, batches=0)
    list(again.begin_validation(val_loader, 0))
    later = again.position.capture(in_epoch=False, batches=0)
    for saved in (early, late, later):
        assert saved["validation"]["val_loader"]["description"]["batches"] == BATCHES
        assert saved["loaders"]["train_loader"]["description"]["batches"] == BATCHES
        resumed = source()
        resumed.restore(saved, in_epoch=False, epoch=1, batches=0)
        assert not [each for each in resumed.position.doubts if "batches was" in each.reason]
