"""epoch_locals.py: what a train_epoch of one's own carries in its variables is named, and nothing else is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Resumed, StepEnd, Trainer
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer

BATCHES = tiny_batches(6)


class Plain(Trainer):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        for batch in self.batches(loader):
            inputs, targets = batch
            half = inputs * 0.5
            self.train_batch((half, targets))


class Unpacked(Trainer):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        steps, name = 3, "epoch"
        batches = self.batches(loader)
        for inputs, targets in batches:
            assert steps and name
            self.train_batch((inputs, targets))


class Prepares(Trainer):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        assert self.epoch >= 0
        super().train_epoch(loader)


class Twice(Trainer):
    """What has been counted before the loop in work is counted again in the resumed epoch."""

    def train_epoch(self, loader: Iterable[Any]) -> None:
        for number, batch in enumerate(self.batches(loader)):
            if number == 1:
                break
            self.train_batch(batch)
        for _ in range(2):
            for batch in self.batches(loader):
                self.train_batch(batch)


class Iterates(Trainer):
    second = tiny_batches(6, seed=9)

    def train_epoch(self, loader: Iterable[Any]) -> None:
        others = iter(self.second)
        for batch in self.batches(loader):
            next(others)
            self.train_batch(batch)


class Counts(Trainer):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        count, total = 0, 0.0
        for batch in self.batches(loader):
            count += 1
            total += 0.5
            self.train_batch(batch)


class Enumerates(Trainer):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        for index, batch in enumerate(self.batches(loader)):
            assert index >= 0
            self.train_batch(batch)


class Carries(Trainer):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        hidden = torch.zeros(2)
        seen: list[int] = []
        for batch in self.batches(loader):
            hidden = hidden + 1
            seen.append(1)
            self.train_batch(batch)


class CarriesOn(Plain):
    def train_epoch(self, loader: Iterable[Any]) -> None:
        hidden = torch.zeros(2)
        hidden += 1
        super().train_epoch(loader)


_OF_A_SCRIPT: dict[str, Any] = {}
exec(compile("def forever():\n    while True:\n        yield 1\n", "train_loop.py", "exec"), _OF_A_SCRIPT)


class GeneratesElsewhere(Trainer):
    """Its generator is of a file that is called like one of the engine's."""

    def train_epoch(self, loader: Iterable[Any]) -> None:
        numbers = _OF_A_SCRIPT["forever"]()
        for batch in self.batches(loader):
            next(numbers)
            self.train_batch(batch)


def resumed(trainer_class: type[Trainer], directory: Path) -> Resumed:
    def run(max_steps: int, resume: Any = None) -> Recorder:
        recorder = Recorder()
        trainer = tiny_trainer(trainer_class, run_dir=directory, run_name="run")
        trainer.train(BATCHES, max_steps=max_steps, callbacks=[ModelCheckpoint(), recorder], resume=resume)
        return recorder

    run(4)
    recorder = run(8, "must")
    assert len(recorder.of(StepEnd)) == 4
    return recorder.of(Resumed)[0]


@pytest.mark.parametrize("trainer_class", [Trainer, Plain, Unpacked, Prepares, Twice])
def test_variables_that_carry_nothing_are_no_doubt(trainer_class: type[Trainer], tmp_path: Path) -> None:
    event = resumed(trainer_class, tmp_path)
    assert (event.exactness, event.reasons) == ("bitwise", "")


@pytest.mark.parametrize(
    ("trainer_class", "words"),
    [
        (Iterates, "local variable others starts over"),
        (Counts, "local variables count, total start over"),
        (Enumerates, "local variable index starts over"),
        (Carries, "local variables hidden, seen start over"),
        (GeneratesElsewhere, "local variable numbers starts over"),
        (CarriesOn, "local variable hidden starts over"),
    ],
)
def test_variables_that_may_carry_something_are_named(
    trainer_class: type[Trainer], words: str, tmp_path: Path
) -> None:
    event = resumed(trainer_class, tmp_path)
    assert event.exactness == "approximate"
    assert words in event.reasons


def test_between_epochs_there_are_no_variables(tmp_path: Path) -> None:
    def run(epochs: int, resume: Any = None) -> Recorder:
        recorder = Recorder()
        trainer = tiny_trainer(Counts, run_dir=tmp_path, run_name="run")
        trainer.train(BATCHES, epochs=epochs, callbacks=[ModelCheckpoint(), recorder], resume=resume)
        return recorder

    run(1)
    assert run(2, "must").of(Resumed)[0].exactness == "bitwise"
