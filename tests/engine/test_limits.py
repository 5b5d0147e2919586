"""When a run is over: epochs, max_steps, max_time, limits of batches; and loaders of every kind."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from offloop.callbacks import LearningRateScheduler
from offloop.engine import (
    Callback,
    EmptyLoaderError,
    EpochEnd,
    EpochStart,
    Run,
    StepEnd,
    Trainer,
    TrainStart,
    ValidationEnd,
    decides,
)
from offloop.engine.testing import EndlessLoader, Recorder, tiny_batches, tiny_loader, tiny_trainer

BATCHES = tiny_batches(8)


class NoLength:
    """Batches without a length, anew for each iterator."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(BATCHES)


def story(recorder: Recorder) -> list[str]:
    """Return what happened, with the steps of a row as one word."""
    words: list[str] = []
    for event in recorder.events:
        name = type(event).__name__
        if name == "StepEnd" and words and words[-1].startswith("StepEnd"):
            words[-1] = f"StepEnd x{int(words[-1].partition(' x')[2] or 1) + 1}"
        else:
            words.append(name)
    return words


def test_epochs_are_trained_whole() -> None:
    recorder = Recorder()
    result = tiny_trainer(callbacks=[recorder]).train(BATCHES, epochs=2)
    one = ["EpochStart", "StepEnd x8", "EpochEnd"]
    assert story(recorder) == ["TrainStart", *one, *one, "TrainEnd"]
    assert (result.status, result.reason, result.epochs, result.steps) == ("completed", "epochs=2", 2, 16)
    assert [(end.epoch, end.step, end.batch, end.complete) for end in recorder.of(EpochEnd)] == [
        (0, 8, 8, True),
        (1, 16, 16, True),
    ]


def test_max_steps_ends_an_epoch_early_with_a_validation_and_an_incomplete_end() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder], val_every_n_epochs=5)
    result = trainer.train(BATCHES, BATCHES[:2], max_steps=11)
    assert story(recorder) == [
        "TrainStart",
        *("EpochStart", "StepEnd x8", "EpochEnd"),
        *("EpochStart", "StepEnd x3", "ValidationStart", "ValidationEnd", "EpochEnd"),
        "TrainEnd",
    ]
    assert [(end.epoch, end.complete, end.samples) for end in recorder.of(EpochEnd)] == [
        (0, True, 32),
        (1, False, 12),
    ]
    assert (result.status, result.reason, result.epochs, result.steps) == ("completed", "max_steps=11", 1, 11)
    assert "val_loss" in result.metrics


def test_max_steps_at_the_end_of_an_epoch_completes_it() -> None:
    recorder = Recorder()
    result = tiny_trainer(callbacks=[recorder]).train(BATCHES, max_steps=8, epochs=5)
    assert story(recorder) == ["TrainStart", "EpochStart", "StepEnd x8", "EpochEnd", "TrainEnd"]
    assert (result.epochs, result.steps, result.history[0].complete) == (1, 8, True)


def test_max_steps_counts_accumulated_steps() -> None:
    result = tiny_trainer(accumulate_grad_batches=3).train(BATCHES, max_steps=4)
    assert (result.steps, result.epochs) == (4, 1)  # 8 batches: 3 + 3 + 2, then one window of 3
    assert result.history[-1].batch == 11


def test_the_first_limit_ends_the_run() -> None:
    trainer = tiny_trainer()
    assert trainer.train(BATCHES, epochs=1, max_steps=100).reason == "epochs=1"
    assert trainer.train(BATCHES, epochs=100, max_steps=1).reason == "max_steps=1"


class Clock:
    """`time.perf_counter`, and a way to let time pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0.0
        real = time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: real() + self.passed)


def test_max_time_ends_an_epoch_at_a_step_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Slow(Trainer):
        def training_step(self, batch: Any) -> Any:
            clock.passed += 100.0
            return super().training_step(batch)

    recorder = Recorder()
    trainer = tiny_trainer(Slow, accumulate_grad_batches=2, callbacks=[recorder])
    result = trainer.train(BATCHES, BATCHES[:1], max_time=250.0)
    assert story(recorder) == [
        "TrainStart",
        *("EpochStart", "StepEnd x2", "ValidationStart", "ValidationEnd", "EpochEnd"),
        "TrainEnd",
    ]
    assert (result.status, result.reason, result.epochs) == ("completed", "max_time=250.0", 0)
    assert (result.history[0].complete, result.history[0].batch) == (False, 4)


def test_time_that_is_up_between_two_epochs_ends_the_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class SlowValidation(Trainer):
        def validation_step(self, batch: Any) -> Any:
            clock.passed += 100.0
            return super().training_step(batch)

    recorder = Recorder()
    trainer = tiny_trainer(SlowValidation, callbacks=[recorder])
    result = trainer.train(BATCHES, BATCHES[:1], max_time=50.0)
    assert story(recorder) == [
        "TrainStart",
        *("EpochStart", "StepEnd x8", "ValidationStart", "ValidationEnd", "EpochEnd"),
        "TrainEnd",
    ]
    assert (result.status, result.reason, result.epochs) == ("completed", "max_time=50.0", 1)


@pytest.mark.parametrize("event", ["on_epoch_end", "on_epoch_start"])
def test_time_that_is_up_after_an_epochs_end_ends_the_run_after_one_more_step(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of an epoch says whether it is the last; so the time is looked at next after a step."""
    clock = Clock(monkeypatch)

    class Deliberate(Callback):
        @decides
        def on_epoch_start(self, started: EpochStart, run: Run) -> None:
            if event == "on_epoch_start" and started.epoch == 1:
                clock.passed += 200.0

        @decides
        def on_epoch_end(self, ended: EpochEnd, run: Run) -> None:
            if event == "on_epoch_end":
                clock.passed += 200.0

    recorder = Recorder()
    result = tiny_trainer(callbacks=[recorder, Deliberate()]).train(BATCHES, max_time=150.0)
    assert story(recorder) == [
        "TrainStart",
        *("EpochStart", "StepEnd x8", "EpochEnd"),
        *("EpochStart", "StepEnd", "EpochEnd"),
        "TrainEnd",
    ]
    assert [(each.complete, each.final) for each in result.history] == [(True, False), (False, True)]
    assert (result.status, result.reason, result.epochs) == ("completed", "max_time=150.0", 1)


def test_limit_reached_by_an_own_epoch_that_leaves_early_ends_the_run() -> None:
    class Half(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for number, batch in enumerate(self.batches(loader), 1):
                self.train_batch(batch)
                if number == 4:
                    break

    recorder = Recorder()
    result = tiny_trainer(Half, callbacks=[recorder]).train(BATCHES, max_steps=8)
    one = ["EpochStart", "StepEnd x4", "EpochEnd"]
    assert story(recorder) == ["TrainStart", *one, *one, "TrainEnd"]
    assert (result.status, result.steps, result.epochs) == ("completed", 8, 2)


# Limits of batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "used"), [(3, 3), (0.5, 4), (1.0, 8), (100, 8), (0.01, 1)])
def test_batches_of_an_epoch_and_of_a_validation_are_limited(limit: int | float, used: int) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(limit_train_batches=limit, limit_val_batches=limit, callbacks=[recorder])
    result = trainer.train(BATCHES, BATCHES, epochs=2)
    assert (result.steps, result.epochs) == (2 * used, 2)
    assert [end.samples for end in recorder.of(ValidationEnd)] == [4 * used] * 2
    (start,) = recorder.of(TrainStart)
    assert (start.batches_per_epoch, start.steps_per_epoch) == (used, used)


def test_a_limited_loader_is_not_asked_for_more() -> None:
    given: list[int] = []

    class Counting:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(BATCHES):
                given.append(index)
                yield batch

    tiny_trainer(limit_train_batches=3).train(Counting(), epochs=1)
    assert given == [0, 1, 2]


def test_a_limit_shortens_the_last_accumulation_window() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(limit_train_batches=5, accumulate_grad_batches=2, callbacks=[recorder])
    trainer.train(BATCHES, epochs=1)
    assert [end.samples for end in recorder.of(StepEnd)] == [8, 8, 4]


class Says:
    """A loader that is wrong about its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(tiny_batches(12))


@pytest.mark.parametrize("length", [4, 8, 12, 16, 100])
def test_a_wrong_length_ends_no_accumulation(length: int, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(accumulate_grad_batches=4, callbacks=[recorder])
    trainer.train(Says(length), epochs=2)
    assert [end.samples for end in recorder.of(StepEnd)] == [16] * 6
    warned = [text for text in caplog.messages if "gives more batches than its length says" in text]
    assert len(warned) == (length < 12)  # once, not in each epoch


def test_a_length_that_ends_in_a_window_costs_no_batch() -> None:
    recorder = Recorder()
    tiny_trainer(accumulate_grad_batches=4, callbacks=[recorder]).train(Says(6), epochs=1)
    assert [end.samples for end in recorder.of(StepEnd)] == [16, 8, 16, 8]


def test_a_one_cycle_schedule_that_is_too_short_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    schedule = LearningRateScheduler("one_cycle")
    result = tiny_trainer(callbacks=[recorder, schedule]).train(Says(4), epochs=1)
    assert result.steps == 12
    assert len({end.lr for end in recorder.of(StepEnd)[5:]}) == 1
    (text,) = [text for text in caplog.messages if "one-cycle" in text]
    assert (
        text == "the one-cycle schedule is over after 4 steps, but the run continues: the learning rate stays"
    )


def test_an_endless_loader_is_fine_under_a_limit() -> None:
    result = tiny_trainer(limit_train_batches=5).train(EndlessLoader(), epochs=2)
    assert (result.steps, result.epochs) == (10, 2)
    assert tiny_trainer().train(EndlessLoader(), max_steps=7).steps == 7


# Loaders ------------------------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in BATCHES:
            yield from zip(inputs, targets, strict=True)


LOADERS: dict[str, Any] = {
    "list": BATCHES,
    "tuple": tuple(BATCHES),
    "DataLoader": tiny_loader(8),
    "no length": NoLength(),
    "IterableDataset": DataLoader(Stream(), batch_size=4),
}


@pytest.mark.parametrize("name", LOADERS)
def test_any_iterable_over_batches_is_a_loader(name: str) -> None:
    result = tiny_trainer().train(LOADERS[name], LOADERS[name], epochs=2)
    expected = tiny_trainer().train(BATCHES, BATCHES, epochs=2)
    assert result.metrics == expected.metrics
    assert (result.epochs, result.steps) == (2, 16)


def test_without_a_length_nothing_is_said_about_it() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder]).train(NoLength(), epochs=1)
    (start,) = recorder.of(TrainStart)
    assert (start.batches_per_epoch, start.steps_per_epoch) == (None, None)


def test_a_loader_may_give_more_or_fewer_batches_than_its_length_says() -> None:
    class Liar(NoLength):
        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

    for length in (5, 11):
        recorder = Recorder()
        trainer = tiny_trainer(accumulate_grad_batches=3, callbacks=[recorder])
        result = trainer.train(Liar(length), epochs=1)
        assert result.status == "completed"
        assert sum(end.samples for end in recorder.of(StepEnd)) == 32


def test_a_generator_is_good_for_one_epoch_and_then_an_error_that_says_why() -> None:
    assert tiny_trainer().train(iter(BATCHES), epochs=1).steps == 8
    trainer = tiny_trainer()
    with pytest.raises(
        EmptyLoaderError, match="gave no batch when it was read again: is it a generator, which can be read"
    ):
        trainer.train(iter(BATCHES), epochs=2)
    assert trainer.last_run is not None
    assert (trainer.last_run.result.status, trainer.last_run.result.epochs) == ("failed", 1)


def test_a_loader_that_turns_out_to_be_empty_is_an_error() -> None:
    with pytest.raises(EmptyLoaderError, match=r"^the train_loader gave no batch"):
        tiny_trainer().train(iter([]), epochs=1)
    with pytest.raises(EmptyLoaderError, match=r"^the val_loader gave no batch"):
        tiny_trainer().train(BATCHES, iter([]), epochs=1)
    with pytest.raises(EmptyLoaderError, match=r"^the val_loader gave no batch"):
        tiny_trainer().train(BATCHES, iter([]), max_steps=1)


def test_an_iterator_that_is_not_needed_is_not_made() -> None:
    """Making one draws from torch's generator and starts workers."""

    class TwoLoaders(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for each in (loader, loader):
                for batch in self.batches(each):
                    self.train_batch(batch)

    loader, trainer = tiny_loader(8), tiny_trainer(TwoLoaders)
    torch.manual_seed(0)
    iter(loader)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    trainer.train(loader, max_steps=8)
    assert torch.equal(torch.get_rng_state(), state)
