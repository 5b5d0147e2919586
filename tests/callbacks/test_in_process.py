"""Built-in callbacks with runs_in = "process": they do what they do here, or are refused before the run starts."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

import offloop.callbacks
from offloop.callbacks import (
    Alert,
    Alerts,
    Below,
    CheckpointEvaluator,
    EarlyStopping,
    GradientMonitor,
    LayerStatistics,
    LearningCurves,
    LearningRateScheduler,
    MetricLogger,
    MLflowLogger,
    ModelCheckpoint,
    Profiler,
    ProgressBar,
    ResourceMonitor,
    TensorBoardLogger,
    WandbLogger,
    WeightAverage,
)
from offloop.engine import Callback, ConfigError, EpochEnd, RunHandle, RunResult, decides
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of other people's packages
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Place = Literal["here", "process"]
ELSEWHERE = {CheckpointEvaluator, MLflowLogger, WandbLogger}
"""They need servers or processes: test_checkpoint_evaluator.py, test_tracking.py."""
HERE = "which runs in the training thread: leave runs_in out"
REFUSED: dict[type[Callback], str] = {
    ModelCheckpoint: HERE,
    EarlyStopping: HERE,
    LearningRateScheduler: HERE,
    WeightAverage: HERE,
    GradientMonitor: HERE,
    LayerStatistics: HERE,
    Profiler: HERE,
    ResourceMonitor: "measures the process that trains",
}


class WaitsForAlert(Callback):
    """Keeps the run from ending before there is an alert: of its last moments there would be no event."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        # A process may start slowly.
        self.recorder.wait_for(Alert, timeout=100)


class TellsFile:
    """Appends alerts to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def tell(self, alert: Alert) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {alert.rule} {alert.step}\n")


def working(told: Path) -> list[Callback]:
    return [
        MetricLogger(every_n_steps=1),
        TensorBoardLogger(every_n_steps=1),
        LearningCurves(),
        ProgressBar(),
        Alerts(TellsFile(told).tell, Below("val_loss", 100.0)),
    ]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_callback_that_belongs_to_the_process_that_trains_is_refused(kind: type[Callback]) -> None:
    callback = kind()
    callback.runs_in = "process"
    with pytest.raises(ConfigError, match=REFUSED[kind]) as refused:
        tiny_trainer().train(tiny_loader(2), tiny_loader(1), epochs=1, callbacks=[callback])
    assert str(refused.value).startswith(kind.__name__) and "\n" not in str(refused.value)


def test_no_callback_is_missing_here(tmp_path: Path) -> None:
    exported = {getattr(offloop.callbacks, name) for name in offloop.callbacks.__all__}
    callbacks = {each for each in exported if issubclass(each, Callback)}
    assert callbacks == {*REFUSED, *ELSEWHERE, *map(type, working(tmp_path))}


def train(tmp_path: Path, place: Place) -> RunResult:
    callbacks = working(tmp_path / "told")
    for each in callbacks:
        each.runs_in = place
    recorder = Recorder()
    trainer = tiny_trainer(run_dir=tmp_path, run_name="run", hyperparameters={"width": 16})
    return trainer.train(
        tiny_loader(5),
        tiny_loader(2, seed=1),
        epochs=2,
        metrics=["accuracy"],
        callbacks=[recorder, WaitsForAlert(recorder), *callbacks],
    )


def files_of(run_dir: Path) -> dict[str, Any]:
    """Return what the callbacks wrote, without times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir)).Reload()
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tags = board.Tags()
    told = (run_dir.parent / "told").read_text().splitlines()
    return {
        "csv": [{key: value for key, value in row.items() if key != "time"} for row in rows],
        "jsonl": [{key: value for key, value in line.items() if key != "time"} for line in lines],
        "scalars": {tag: [(each.step, each.value) for each in board.Scalars(tag)] for tag in tags["scalars"]},
        "texts": [tag for tag in tags["tensors"] if "session" not in tag],
        "picture": (run_dir / "curves.png").read_bytes(),
        "told": [line.partition(" ")[2] for line in told],
    }


def test_callbacks_in_processes_write_the_same_files(tmp_path: Path) -> None:
    """Takes seconds: five processes start, and all but one import torch."""
    for place in ("here", "process"):
        result = train(tmp_path / place, place)
        assert result.callback_errors == {}, place
    here, there = (files_of(tmp_path / place / "run") for place in ("here", "process"))
    assert there == here
    assert here["told"] and here["texts"] and here["scalars"]["val_loss"]
    pids = {line.split()[0] for line in (tmp_path / "process" / "told").read_text().splitlines()}
    assert str(os.getpid()) not in pids


@pytest.mark.parametrize(
    "name", ["LearningCurves", "Alerts", "MetricLogger", "MLflowLogger", "ProgressBar", "WandbLogger"]
)
def test_process_of_a_callback_does_without_torch(name: str) -> None:
    script = f"import sys; from offloop.callbacks import {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


@pytest.mark.parametrize("kind", [TensorBoardLogger, MLflowLogger, WandbLogger])
def test_place_is_checked_and_kept(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")

    class There(kind):  # type: ignore[misc]  # a class that is a parameter
        runs_in = "process"

    assert (kind().runs_in, kind(runs_in="process").runs_in) == ("here", "process")
    assert (There().runs_in, There(runs_in="here").runs_in) == ("process", "here")
    with pytest.raises(ConfigError, match="runs_in must be None, 'here' or 'process', got 'thread'"):
        kind(runs_in="thread")


def test_events_of_built_in_callbacks_have_handlers_before_they_are_loaded() -> None:
    script = (
        "from offloop import Callback; from offloop.callbacks import ModelCheckpoint\n"
        "from offloop.engine.callback import Handlers\n"
        "names = 'alert', 'gradient_statistics', 'layers_measured', 'profile_written', 'resource_usage'\n"
        "def handle(self, event, run): ...\n"
        "kind = type('Mine', (Callback,), {f'on_{name}': handle for name in names})\n"
        "assert len(Handlers(kind(), 'Mine').observed_types()) == 5"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
