"""All callbacks in one run: they do not disturb each other, and an interrupted run goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfter

import offloop.callbacks
from offloop.callbacks import (
    Alerts,
    Below,
    EarlyStopping,
    GradientMonitor,
    LayerStatistics,
    LearningCurves,
    LearningRateScheduler,
    MetricLogger,
    ModelCheckpoint,
    Profiler,
    ProgressBar,
    ResourceMonitor,
    Spike,
    Stalled,
    TensorBoardLogger,
    WeightAverage,
)
from offloop.engine import Callback, RunResult
from offloop.engine.testing import Recorder, reproducible, tiny_loader, tiny_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of other people's packages
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COMPARED = {
    "StepEnd",
    "ValidationEnd",
    "EpochEnd",
    "LearningRateChanged",
    "GradientStatistics",
    "LayersMeasured",
}
ELSEWHERE = {"MLflowLogger", "WandbLogger", "CheckpointEvaluator"}
"""They need servers or processes: test_tracking.py, test_checkpoint_evaluator.py."""


def every_callback() -> list[Callback]:
    return [
        ModelCheckpoint("val_loss", save_top_k=3),
        EarlyStopping("val_loss", min_delta=0.1, patience=2, restore_best=True),
        LearningRateScheduler("reduce_on_plateau", patience=0, factor=0.5, threshold=0.1),
        WeightAverage(decay=0.9),
        MetricLogger(every_n_steps=1),
        TensorBoardLogger(),
        GradientMonitor(every_n_steps=2),
        LayerStatistics(every_n_steps=3),
        Profiler(wait=1, warmup=1, active=2),
        LearningCurves(),
        ProgressBar(),
        ResourceMonitor(),
        Alerts(None, Below("val_loss", 0.0), Spike(), Stalled(60.0)),
    ]


def train(
    tmp_path: Path, name: str, *callbacks: Callback, resume: Any = None
) -> tuple[RunResult, list[Any], dict[str, torch.Tensor]]:
    """Train until the validation gets better too slowly."""
    torch.manual_seed(3)
    trainer = tiny_trainer(lr=0.3, run_dir=str(tmp_path), run_name=name)
    recorder = Recorder()
    result = trainer.train(
        tiny_loader(5, shuffle=True),
        tiny_loader(2, seed=1),
        epochs=12,
        metrics=["accuracy", "f1_score"],
        callbacks=[recorder, *callbacks],
        resume=resume,
    )
    return result, reproducible(recorder.events), dict(trainer.model.state_dict())


def rows(result: RunResult) -> list[dict[str, Any]]:
    """Return what was logged, without what differs from run to run."""
    assert result.dir is not None
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: each for key, each in line.items() if key not in ("time", "attempt")} for line in lines]


def trained(events: list[Any]) -> list[Any]:
    """Return what the training thread said, but for the beginnings, of which a resumed epoch has one more."""
    return [event for event in events if event[0] in COMPARED]


def test_no_callback_is_missing_here() -> None:
    exported = {getattr(offloop.callbacks, name) for name in offloop.callbacks.__all__}
    callbacks = {each.__name__ for each in exported if issubclass(each, Callback)}
    assert callbacks - ELSEWHERE == {type(each).__name__ for each in every_callback()}


@pytest.mark.parametrize("interrupted_after", [4, 10])
def test_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, interrupted_after: int) -> None:
    whole, events, weights = train(tmp_path, "whole", *every_callback())
    assert whole.status == "stopped" and whole.reason.startswith("val_loss did not improve")
    assert not whole.callback_errors
    assert train(tmp_path, "parts", *every_callback(), StopAfter(interrupted_after))[0].status == "stopped"
    resumed, later, resumed_weights = train(tmp_path, "parts", *every_callback(), resume="auto")
    assert (resumed.reason, resumed.steps, resumed.metrics) == (whole.reason, whole.steps, whole.metrics)
    assert whole.best is not None and resumed.best is not None
    assert (resumed.best.score, resumed.best.step) == (whole.best.score, whole.best.step)
    assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)
    assert rows(resumed) == rows(whole)
    assert trained(later) == trained(events)[-len(trained(later)) :]
    assert {name for name, _ in trained(later)} == COMPARED
    assert not resumed.callback_errors
