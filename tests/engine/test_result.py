"""engine/result.py: what a run has come to, as a table and read back from its directory."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from warm_python import WarmPython

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Best,
    Callback,
    EpochEnd,
    Metrics,
    Run,
    RunResult,
    Trainer,
    decides,
)
from offloop.engine.testing import FailingCallback, tiny_batches, tiny_trainer

BATCHES = tiny_batches(3)


def comparable(result: RunResult) -> dict[str, Any]:
    """Return what a result and the one that was read back have in common."""
    fields = {name: getattr(result, name) for name in RunResult.__slots__ if name != "callback_costs"}
    fields["history"] = [(each.epoch, each.step, dict(each.metrics)) for each in result.history]
    fields["seconds"] = pytest.approx(result.seconds, abs=5.0)  # TrainEnd comes a moment before the result
    fields["dir"] = result.dir and result.dir.resolve()
    return fields


def test_a_result_is_read_back_from_its_directory(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        run_dir=tmp_path, run_name="run", callbacks=[ModelCheckpoint(), FailingCallback(EpochEnd)]
    )
    result = trainer.train(BATCHES, BATCHES, epochs=3, metrics=["accuracy"])
    loaded = RunResult.load(tmp_path / "run")
    assert comparable(loaded) == comparable(result)
    assert loaded.best is not None and loaded.best.path is not None
    assert loaded.callback_errors and loaded.callback_costs == {}


def test_a_resumed_run_is_read_back_whole(tmp_path: Path) -> None:
    def train(epochs: int, resume: Any = None) -> RunResult:
        trainer = tiny_trainer(run_dir=tmp_path, run_name="run", callbacks=[ModelCheckpoint()])
        return trainer.train(BATCHES, BATCHES, epochs=epochs, resume=resume)

    train(2)
    result = train(5, "must")
    assert [end.epoch for end in result.history] == [0, 1, 2, 3, 4]
    assert comparable(RunResult.load(tmp_path / "run")) == comparable(result)


@pytest.mark.anyio
async def test_a_run_that_goes_on_is_read_so_far(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=tmp_path, run_name="run")
    async with trainer.start(BATCHES, BATCHES, epochs=1_000_000) as run:
        async for event in run.events(EpochEnd):
            if event.epoch == 2:
                break
        await run.pause()
        await run.checkpoint()  # durable once the log has everything before it
        loaded = RunResult.load(tmp_path / "run")
        assert [each.epoch for each in loaded.history] == list(range(loaded.epochs))
        assert (loaded.status, loaded.best, loaded.seconds) == ("running", None, 0.0)
        assert loaded.epochs > 2 and "val_loss" in loaded.metrics
        run.cancel()


def test_a_killed_run_is_read_up_to_its_end(tmp_path: Path, warm_python: WarmPython) -> None:
    source = """
import os
from offloop.engine import Callback, EpochStart, decides
from offloop.engine.testing import tiny_batches, tiny_trainer
from offloop.callbacks import ModelCheckpoint

class Die(Callback):
    @decides
    async def on_epoch_start(self, event: EpochStart, run) -> None:
        if event.epoch == 2:
            os.kill(os.getpid(), 9)

tiny_trainer(run_dir=".", run_name="run", callbacks=[Die()]).train(tiny_batches(3), tiny_batches(2), epochs=9)
"""
    script = tmp_path / "script.py"
    script.write_text(source)
    assert warm_python.run(script).returncode == -9
    loaded = RunResult.load(tmp_path / "run")
    assert loaded.status == "running"
    assert [end.epoch for end in loaded.history] == list(range(loaded.epochs))


@pytest.mark.parametrize("name", ["", "nothing-here", "empty"])
def test_a_directory_of_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is not the directory of a run"):
        RunResult.load(tmp_path / name)


def test_run_json_says_the_last_metrics_and_the_best(tmp_path: Path) -> None:
    class Diverges(Trainer):
        def validation_step(self, batch: Any) -> Any:
            self.log("scale", math.inf)
            return super().validation_step(batch)

    trainer = tiny_trainer(
        Diverges, run_dir=tmp_path, run_name="run", callbacks=[ModelCheckpoint("val_loss")]
    )
    result = trainer.train(BATCHES, BATCHES, epochs=2)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert result.best is not None
    assert described["best"] == {
        "monitor": "val_loss",
        "score": result.best.score,
        "epoch": result.best.epoch,
        "step": result.best.step,
        "path": result.best.path,
    }
    assert described["metrics"] == {**result.metrics, "val_scale": "Infinity"}
    assert (described["epochs"], described["steps"], described["status"]) == (2, 6, "completed")
    assert RunResult.load(tmp_path / "run").metrics["val_scale"] == math.inf


def test_the_history_as_columns() -> None:
    trainer = tiny_trainer(val_every_n_epochs=2)
    result = trainer.train(BATCHES, BATCHES[:1], epochs=2)
    columns = result.to_columns()
    assert list(columns) == ["epoch", "step", "samples", "seconds", "train_loss", "lr", "val_loss"]
    assert (columns["epoch"], columns["step"]) == ([0, 1], [3, 6])
    assert columns["train_loss"] == [end.metrics["train_loss"] for end in result.history]
    assert math.isnan(columns["val_loss"][0]) and columns["val_loss"][1] == result.metrics["val_loss"]


def test_the_columns_of_a_run_without_an_epoch() -> None:
    class StopAtOnce(Callback):
        @decides
        def on_epoch_start(self, event: Any, run: Run) -> None:
            run.stop_nowait()

    result = tiny_trainer(callbacks=[StopAtOnce()]).train(BATCHES, epochs=1)
    assert result.to_columns() == {"epoch": [], "step": [], "samples": [], "seconds": []}


def test_a_result_of_many_epochs_and_metrics_fits_a_notebook_cell() -> None:
    metrics = Metrics({f"val_metric_{index}": 1 / (index + 3) for index in range(20)})
    history = tuple(EpochEnd(metrics=metrics, samples=8, seconds=1.0, epoch=index) for index in range(1000))
    result = RunResult(
        run_id="first",
        status="failed",
        reason="RuntimeError: " + "a long story\n" * 100,
        epochs=1000,
        steps=64000,
        metrics=metrics,
        best=Best(monitor="val_metric_0", score=0.25, epoch=3, step=256),
        history=history,
        seconds=12.34,
        callback_costs={},
        callback_errors={},
        dir=None,
    )
    first, second, third = repr(result).splitlines()
    assert first.startswith("<RunResult first: failed (RuntimeError: a long story a long story")
    assert first.endswith("...), 1000 epochs, 64000 steps, 12.3 s") and len(first) < 150
    assert second.startswith("  val_metric_0=0.3333, val_metric_1=0.25") and second.endswith(" and 14 more")
    assert third == "  best val_metric_0=0.25 in epoch 3, at step 256>"
