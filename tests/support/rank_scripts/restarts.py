"""Scenarios: a run that is killed again and again under `torchrun --max-restarts`, and one that is not."""

import os
from typing import Any

from rank_scripts.parts import adam, classifier, crc, loader, net, outcome, samples, weights
from rank_scripts.talk import RANK, say

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, CheckpointSaved, Resumed, Run, in_step

has_said = False
"""Not the callback's, whose state would be part of a checkpoint."""


class Say(Callback):
    """Tells the test what happens."""

    async def on_resumed(self, event: Resumed, run: Run) -> None:
        say(f"resumed {event.step} {event.exactness} {event.reasons}")

    async def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        say(f"saved {event.saved_step}")


class SayPid(Callback):
    """Tells the test which process a rank is, once it trains."""

    ranks = "all"

    @in_step
    def after_step(self, point: Any) -> None:
        global has_said
        if not has_said:
            has_said = True
            say("training")


def _train(name: str, *callbacks: Callback) -> Any:
    model = net(dropout=0.3, batch_norm=True)
    trainer = classifier(model, adam(model), seed=11, run_dir=os.environ["OFFLOOP_TEST_RUNS"], run_name=name)
    result = trainer.train(
        loader(samples(101), shuffle=True, num_workers=1, persistent_workers=True),
        loader(samples(29, seed=1)),
        epochs=int(os.environ.get("OFFLOOP_TEST_EPOCHS", "12")),
        metrics=["accuracy"],
        callbacks=[*callbacks, ModelCheckpoint(every_n_steps=3)],
        resume="auto",
    )
    return {
        "outcome": {**outcome(result), "run_id": ""},
        "weights": weights(model),
        "buffers": crc(model.buffers()) if RANK == 0 else 0,
    }


def killed() -> Any:
    """Killed, at the test's wish."""
    return _train("killed", Say(), SayPid())


def whole() -> Any:
    """Never killed."""
    return _train("whole")


class Progress(Callback):
    """Tells the test how far each rank is."""

    @in_step
    def after_step(self, point: Any) -> None:
        if point.step % 50 == 0:
            say(f"step {point.step}")


def two_hosts() -> Any:
    """Trains until it is stopped or cut off."""
    model = net()
    trainer = classifier(
        model,
        adam(model),
        rank_timeout=5.0,
        run_dir=os.environ["OFFLOOP_TEST_RUNS"],
        run_name="hosts",
    )
    result = trainer.train(
        loader(samples(800), shuffle=True),
        max_steps=int(os.environ["OFFLOOP_TEST_STEPS"]),
        callbacks=[Say(), Progress(), ModelCheckpoint(every_n_steps=50)],
        resume="auto",
    )
    return {"outcome": outcome(result), "weights": weights(model)}
