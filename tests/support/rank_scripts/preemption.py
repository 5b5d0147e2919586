"""Scenarios: a run that saves, held at a place where a signal comes; and the same run, continued."""

import os
from typing import Any

from rank_scripts.parts import Classifier, adam, loader, net, outcome, samples, weights
from rank_scripts.talk import RANK, hold, say

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, Resumed, Run, decides, in_step
from offloop.engine.checkpoint.filesystem import FileSystem

resumed: list[str] = []
"""Not the callback's, whose state would be part of a checkpoint."""


class Model(Classifier):
    """A trainer that can be held in a validation."""

    where = ""

    def validation_step(self, batch: Any) -> Any:
        if self.where == "validation" and not vars(self).get("was_held"):
            self.was_held = True
            hold("validation")
        return super().validation_step(batch)


class Hold(Callback):
    """Holds each rank in a step."""

    ranks = "all"

    def __init__(self, where: str) -> None:
        self.where = where

    @in_step
    def before_forward(self, point: Any) -> None:
        if self.where == "step" and point.step == 7:
            hold("step")

    @in_step
    def after_step(self, point: Any) -> None:
        if point.step == 5 and self.where == "commit":
            hold("commit")
        if point.step == 2:
            say("training")

    @decides
    def on_resumed(self, event: Resumed, run: Run) -> None:
        resumed.append(f"{event.step} {event.exactness} {event.reasons}".strip())


def _train(where: str, **limits: Any) -> Any:
    Model.where = where
    model, holder = net(dropout=0.2, batch_norm=True), Hold(where)
    trainer = Model(
        model,
        adam(model),
        device="cpu",
        run_dir=os.environ["OFFLOOP_TEST_RUNS"],
        run_name="run",
        val_every_n_steps=6,
        seed=3,
    )
    if where == "commit" and RANK == 0:
        _hold_commit()
    result = trainer.train(
        loader(samples(101), shuffle=True),
        loader(samples(29, seed=1)),
        callbacks=[holder, ModelCheckpoint(every_n_steps=4)],
        resume="auto",
        **limits,
    )
    return {"outcome": outcome(result), "weights": weights(model), "resumed": resumed}


def _hold_commit() -> None:
    """Hold the first rename of a checkpoint into place."""
    rename, was_held = FileSystem.rename, False

    def held(self: FileSystem, source: Any, target: Any) -> Any:
        nonlocal was_held
        if not was_held and "step-" in str(target):
            was_held = True
            hold("renaming")
        return rename(self, source, target)

    FileSystem.rename = held  # type: ignore[method-assign]


def in_a_step() -> Any:
    """Held in a step."""
    return _train("step", epochs=3)


def in_a_validation() -> Any:
    """Held in a validation."""
    return _train("validation", epochs=3)


def in_a_commit() -> Any:
    """Rank 0 is held while it commits."""
    return _train("commit", epochs=3)


def continued() -> Any:
    """The same run goes on to its end."""
    return _train("", epochs=3)
