"""Evaluations beside training: which checkpoints are kept for them, and what is chosen. Real runs, real files."""

import threading
from pathlib import Path
from typing import Any

import pytest

from offloop.callbacks import EarlyStopping, ModelCheckpoint
from offloop.engine import Callback, CheckpointSaved, ConfigError, Evaluated, Metrics, Run, RunResult
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer
from tests.callbacks.test_model_checkpoint import WaitForDisk

SCORES = {2: 0.3, 4: 0.9, 6: 0.9, 8: 0.1, 10: 0.5}
"""By step; each epoch has two."""


class Judge(Callback):
    """Evaluates by a table, once it may."""

    evaluates_every = 1

    def __init__(self, *, after: int = 0, fails_at: int = -1) -> None:
        self.after, self.fails_at = after, fails_at
        self.seen: list[int] = []
        self.go = threading.Event()

    def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        self.seen.append(event.saved_step)
        if event.saved_step <= self.after:
            assert self.go.wait(60)
        position: dict[str, Any] = {
            "path": event.path,
            "of_step": event.saved_step,
            "of_epoch": event.saved_step // 2 - 1,
        }
        if event.saved_step == self.fails_at:
            run.publish(Evaluated(**position, error="ValueError: no"))
        else:
            metrics = Metrics({"eval_accuracy": SCORES[event.saved_step]})
            run.publish(Evaluated(**position, metrics=metrics))


class Lets(Callback):
    """Lets the judge begin only when the last checkpoint is durable: all of them wait until then."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        if event.saved_step == 10:
            self.judge.go.set()


def train(tmp_path: Path, judge: Judge, **arguments: Any) -> tuple[RunResult, ModelCheckpoint, Recorder]:
    recorder, keeps = Recorder(), ModelCheckpoint(monitor="eval_accuracy", **arguments)
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    callbacks = [recorder, WaitForDisk(), keeps, judge, Lets(judge)]
    return trainer.train(tiny_batches(2), epochs=5, callbacks=callbacks), keeps, recorder


def on_disk(tmp_path: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("after", [0, 10], ids=["fast", "slow"])
@pytest.mark.parametrize(("top_k", "kept"), [(1, [4, 8, 10]), (3, [4, 6, 8, 10])])
def test_the_choice_is_the_same_however_slow_the_evaluator_is(
    tmp_path: Path, after: int, top_k: int, kept: list[int]
) -> None:
    result, keeps, recorder = train(tmp_path, Judge(after=after), save_top_k=top_k)
    assert on_disk(tmp_path) == kept
    assert result.best is not None and keeps.best == result.best
    assert (result.best.score, result.best.step, result.best.monitor) == (0.9, 4, "eval_accuracy")
    assert (tmp_path / "run" / "refs" / "best").read_text().strip() == Path(result.best.path or "").name
    assert result.to_columns()["eval_accuracy"] == list(SCORES.values())
    assert result.metrics["eval_accuracy"] == 0.5
    assert [event.of_step for event in recorder.of(Evaluated)] == [2, 4, 6, 8, 10]


def test_a_checkpoint_that_cannot_be_evaluated_is_not_kept_for_it(tmp_path: Path) -> None:
    result, _, _ = train(tmp_path, Judge(after=10, fails_at=4))
    assert on_disk(tmp_path) == [6, 8, 10]
    assert result.best is not None and result.best.step == 6


def test_what_cannot_work_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot decide anything in training"):
        EarlyStopping(monitor="eval_loss")
    trainer = tiny_trainer(run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="no callback evaluates them"):
        trainer.train(tiny_batches(2), epochs=1, callbacks=[ModelCheckpoint(monitor="eval_accuracy")])
    with pytest.raises(ConfigError, match="Judge and Judge both evaluate checkpoints"):
        trainer.train(tiny_batches(2), epochs=1, callbacks=[Judge(), Judge()])
