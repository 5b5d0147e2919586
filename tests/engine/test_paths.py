"""engine/paths.py: a run keeps to its directories wherever the process goes, and `~` is the home directory."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offloop.callbacks import LearningCurves, MetricLogger, ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointReader,
    ConfigError,
    EpochEnd,
    ModelRegistry,
    Run,
    RunResult,
    TrainStart,
    decides,
    export_model,
    load_model,
    read_events,
)
from offloop.engine.paths import absolute_path
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Begin in `here`, with `home` and a directory to go to beside it; come back at the end."""
    for name in ("here", "home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


class GoesAway(Callback):
    """Changes the process's directory during the run, as a data set may."""

    def __init__(self, to: Path, *, at_start: bool = False) -> None:
        self.to, self.at_start = to, at_start

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        if self.at_start:
            os.chdir(self.to)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        os.chdir(self.to)


def a_run(*callbacks: Callback, epochs: int = 3, resume: Any = None, **knobs: Any) -> RunResult:
    trainer = tiny_trainer(**{"run_dir": "runs", "run_name": "one", **knobs})
    return trainer.train(BATCHES, BATCHES, epochs=epochs, callbacks=callbacks, resume=resume)


@pytest.mark.parametrize("at_start", [False, True])
def test_a_run_loses_nothing_when_the_process_changes_its_directory(
    tmp_path: Path, elsewhere: Path, at_start: bool
) -> None:
    result = a_run(
        GoesAway(elsewhere, at_start=at_start),
        ModelCheckpoint("val_loss", save_dir="mine", filename="step={step}"),
        MetricLogger(),
    )
    assert result.callback_errors == {}
    run = tmp_path / "here" / "runs" / "one"
    assert result.dir == run
    assert result.best is not None and result.best.path is not None
    assert Path(result.best.path).parent == run / "checkpoints"
    assert [event.epoch for event in read_events(run) if isinstance(event, EpochEnd)] == [0, 1, 2]
    assert "\n" in (run / "metrics.csv").read_text()
    assert '"completed"' in (run / "run.json").read_text()
    assert any((tmp_path / "here" / "mine").iterdir())
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("resume", ["must", "runs/one", Path("runs/one")])
def test_a_resumed_run_stays_where_it_was(tmp_path: Path, elsewhere: Path, resume: Any) -> None:
    a_run(ModelCheckpoint(), epochs=1)
    assert a_run(GoesAway(elsewhere, at_start=True), ModelCheckpoint(), resume=resume).epochs == 3
    saved = CheckpointReader(tmp_path / "here" / "runs" / "one").checkpoints()
    assert saved[-1].step == 12
    assert list(elsewhere.iterdir()) == []


def test_the_default_directory_is_that_of_the_start(tmp_path: Path, elsewhere: Path) -> None:
    a_run(GoesAway(elsewhere), MetricLogger(), run_dir=None)
    assert (tmp_path / "here" / "runs" / "one" / "metrics.csv").exists()
    assert list(elsewhere.iterdir()) == []


def test_a_registry_stays_where_it_was_made(tmp_path: Path, elsewhere: Path) -> None:
    registry = ModelRegistry("models")
    result = a_run(ModelCheckpoint())
    assert result.dir is not None
    os.chdir(elsewhere)
    registry.register(str(result.dir), "net")
    assert (tmp_path / "here" / "models" / "net").is_dir()
    assert list(elsewhere.iterdir()) == []


def test_curves_are_drawn_where_they_were_read(tmp_path: Path, elsewhere: Path) -> None:
    pytest.importorskip("matplotlib")
    a_run(MetricLogger(), epochs=1)
    curves = LearningCurves.read("runs/one")
    os.chdir(elsewhere)
    assert curves.draw().parent == tmp_path / "here" / "runs" / "one"


# The home directory ---------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_directory_everywhere(tmp_path: Path) -> None:
    result = a_run(
        ModelCheckpoint("val_loss", save_dir="~/mine", filename="step={step}"), run_dir="~/runs", epochs=1
    )
    home = tmp_path / "home"
    assert result.dir == home / "runs" / "one"
    assert any((home / "mine").iterdir())
    assert [event.epoch for event in read_events("~/runs/one") if isinstance(event, EpochEnd)] == [0]
    assert {info.step for info in CheckpointReader("~/runs/one").checkpoints()} == {4}
    ModelRegistry("~/models").register("~/runs/one@best", "net")
    export_model("~/runs/one", "~/net.safetensors")
    for source in ("~/runs/one", "~/runs/one@best", "~/net.safetensors", Path("~/net.safetensors")):
        loaded = load_model(source, into=tiny_model(seed=5))
        trained = load_model(str(home / "runs" / "one"), into=tiny_model(seed=5))
        assert_same(loaded, trained)
    assert a_run(ModelCheckpoint(), run_dir="~/runs", resume="~/runs/one", epochs=2).epochs == 2
    again = tiny_trainer().train(BATCHES, epochs=1, init_from="~/net.safetensors")
    assert again.status == "completed"
    assert list((tmp_path / "here").iterdir()) == []


def assert_same(one: Any, other: Any) -> None:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    for (name, value), expected in pairs:
        assert isinstance(value, Tensor) and torch.equal(value, expected), name


def test_the_home_of_an_unknown_user_is_refused_with_the_path() -> None:
    with pytest.raises(ConfigError, match="home directory in '~nobody-of-that-name/runs' is not known"):
        a_run(run_dir="~nobody-of-that-name/runs")


def test_links_and_dots_stay_in_a_path(tmp_path: Path) -> None:
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    assert absolute_path("link/../x") == tmp_path / "here" / "link" / ".." / "x"


@pytest.fixture
def gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory that was removed."""
    directory = tmp_path / "gone"
    directory.mkdir()
    monkeypatch.chdir(directory)
    directory.rmdir()


@pytest.mark.usefixtures("gone")
def test_a_run_without_files_needs_no_working_directory(tmp_path: Path) -> None:
    assert tiny_trainer().train(tiny_loader(1), epochs=1).status == "completed"
    assert tiny_trainer(run_dir=str(tmp_path)).train(tiny_loader(1), epochs=1).status == "completed"


@pytest.mark.usefixtures("gone")
def test_a_relative_path_in_a_removed_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'runs' leads nowhere, since the working directory.* was removed"):
        tiny_trainer(run_dir="runs").train(tiny_loader(1), epochs=1)
