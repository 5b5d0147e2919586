"""callbacks/model_checkpoint.py: what is saved when, what stays on disk, and which is best. Real files."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointFailed,
    CheckpointReader,
    CheckpointSaved,
    ConfigError,
    EpochEnd,
    MetricNotFoundError,
    Run,
    RunResult,
    StepPoint,
    Trainer,
    ValidationStart,
    decides,
    in_step,
)
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.testing import FailingCallback, Recorder, SlowCallback, tiny_batches, tiny_trainer

BATCHES = 2  # steps of an epoch


class Scripted(Trainer):
    """Validates with losses from a list, one for each validation."""

    losses: list[float]

    def validation_step(self, batch: Any) -> torch.Tensor:
        return torch.tensor(self.losses.pop(0))


class WaitForDisk(Callback):
    """Lets training go on only when every save so far has ended, which makes the order of disk and training certain.

    Without it a run of microsecond steps leaves out what cadence wants while the disk is busy.
    """

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        self._wait(point.run)

    @decides
    def on_validation_start(self, event: ValidationStart, run: Run) -> None:
        self._wait(run)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._wait(run)

    def _wait(self, run: Run) -> None:
        storage = cast(Any, run._session).storage
        assert storage is not None
        storage.checkpoints.flush()


def trainer_for(tmp_path: Path, losses: list[float], **knobs: Any) -> Trainer:
    trainer = tiny_trainer(Scripted, run_dir=str(tmp_path), run_name="run", **knobs)
    assert isinstance(trainer, Scripted)
    trainer.losses = list(losses)
    return trainer


def train(
    tmp_path: Path, losses: list[float], *callbacks: Callback, resume: Any = None, **arguments: Any
) -> tuple[RunResult, Recorder]:
    """Train an epoch for each loss, or as the limits say; nothing is left out because the disk is busy."""
    recorder = Recorder()
    knobs = arguments.pop("knobs", {})
    arguments.setdefault("epochs", len(losses))
    result = trainer_for(tmp_path, losses, **knobs).train(
        tiny_batches(BATCHES),
        tiny_batches(1) if losses else None,
        callbacks=[recorder, WaitForDisk(), *callbacks],
        resume=resume,
        **arguments,
    )
    return result, recorder


def on_disk(tmp_path: Path) -> list[str]:
    """Return the checkpoints in the run's directory, by name; nothing else may be there."""
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def steps_on_disk(tmp_path: Path) -> list[int]:
    return [int(name.split("-")[1]) for name in on_disk(tmp_path)]


def ref(tmp_path: Path, name: str) -> str:
    return (tmp_path / "run" / "refs" / name).read_text().strip()


def saved(recorder: Recorder) -> list[tuple[int, str]]:
    return [(event.saved_step, event.reason) for event in recorder.of(CheckpointSaved)]


# When ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param({}, [(2, "best"), (4, "interval"), (6, "best")], id="each-epoch"),
        pytest.param({"every_n_epochs": 2}, [(2, "best"), (4, "interval"), (6, "best")], id="every-2-epochs"),
        pytest.param({"every_n_epochs": 3}, [(2, "best"), (6, "best")], id="every-3-epochs"),
        pytest.param(
            {"every_n_steps": 3},
            [(2, "best"), (3, "interval"), (6, "interval"), (6, "best")],
            id="every-3-steps",
        ),
        pytest.param({"save_best_only": True}, [(2, "best"), (6, "best")], id="best-only"),
    ],
)
def test_when_it_saves(tmp_path: Path, arguments: dict[str, Any], expected: list[tuple[int, str]]) -> None:
    checkpoint = ModelCheckpoint("val_loss", save_last=False, keep_last=None, **arguments)
    result, recorder = train(tmp_path, [3.0, 4.0, 2.0], checkpoint)
    assert saved(recorder) == expected
    assert steps_on_disk(tmp_path) == [step for step, _ in expected]
    assert result.best is not None and result.best.path is not None
    assert (result.best.step, Path(result.best.path).name) == (6, ref(tmp_path, "best"))


def test_the_run_knows_the_steps_at_which_it_saves(tmp_path: Path) -> None:
    """Several processes meet at these steps, and so save at exactly them."""
    known: list[list[int]] = []

    class Look(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            known.append(point.trainer._loop.host._saving.cadences)

    by_steps = [ModelCheckpoint(every_n_steps=3), ModelCheckpoint(every_n_steps=5, every_seconds=9.0)]
    callbacks = [*by_steps, ModelCheckpoint(every_seconds=9.0), Look()]
    tiny_trainer(callbacks=callbacks, run_dir=tmp_path).train(tiny_batches(1), epochs=1)
    assert known == [[3, 5]]


def test_training_metric_is_judged_and_saved_once_an_epoch(tmp_path: Path) -> None:
    _, recorder = train(tmp_path, [], ModelCheckpoint(save_last=False), epochs=3)
    assert [step for step, _ in saved(recorder)] == [2, 4, 6]


class Clock(Callback):
    """A clock on which each step takes four seconds."""

    seconds = 0.0

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.seconds = 4.0 * point.step


def test_every_seconds_counts_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    fake = SimpleNamespace(monotonic=lambda: clock.seconds)
    monkeypatch.setattr("offloop.callbacks.model_checkpoint.time", fake)
    checkpoint = ModelCheckpoint("val_loss", every_seconds=10.0, save_last=False)
    _, recorder = train(tmp_path, [1.0, 2.0, 3.0, 4.0], clock, checkpoint)
    assert saved(recorder) == [(2, "best"), (5, "interval"), (8, "interval")]


def _stop(run: Run) -> None:
    run.stop_nowait("enough")


def _cancel(run: Run) -> None:
    run.cancel()


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[Run], object]) -> None:
        self.step, self.act = step, act

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.step:
            self.act(point.run)


@pytest.mark.parametrize("save_last", [True, False])
@pytest.mark.parametrize(
    ("limits", "act", "status", "step"),
    [
        pytest.param({"max_steps": 3}, None, "completed", 3, id="limit"),
        pytest.param({"epochs": 5}, _stop, "stopped", 3, id="stop"),
        pytest.param({"epochs": 5}, _cancel, "cancelled", 3, id="cancel"),
    ],
)
def test_save_last(
    tmp_path: Path, limits: dict[str, int], act: Any, status: str, step: int, save_last: bool
) -> None:
    checkpoint = ModelCheckpoint("train_loss", save_best_only=True, save_last=save_last)
    others = [] if act is None else [At(step, act)]
    result, recorder = train(tmp_path, [], checkpoint, *others, **({"epochs": None} | limits))
    assert (result.status, result.steps) == (status, step)
    assert ((step, "final") in saved(recorder)) == save_last
    if save_last:
        assert ref(tmp_path, "last") == on_disk(tmp_path)[-1]


def test_save_last_after_a_failure_would_save_a_broken_state(tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        raise RuntimeError("broken")

    checkpoint = ModelCheckpoint("train_loss", every_n_steps=2)
    with pytest.raises(RuntimeError, match="broken") as caught:
        train(tmp_path, [], checkpoint, At(3, fail), epochs=3)
    assert steps_on_disk(tmp_path)[-1] == 2
    assert "last checkpoint" in caught.value.__notes__[-1]


# What stays ----------------------------------------------------------------------------------------


LOSSES = [5.0, 3.0, 4.0, 2.0, 6.0, 7.0]  # of steps 2, 4, ..., 12; best at 8


@pytest.mark.parametrize(
    ("arguments", "stays", "best", "last"),
    [
        pytest.param({}, [8, 10, 12], 8, 12, id="default"),
        pytest.param({"keep_last": 3}, [8, 10, 12], 8, 12, id="keep-3"),
        pytest.param({"keep_last": 4}, [6, 8, 10, 12], 8, 12, id="keep-4"),
        pytest.param({"keep_last": None}, [2, 4, 6, 8, 10, 12], 8, 12, id="keep-all"),
        pytest.param({"save_top_k": 2}, [4, 8, 10, 12], 8, 12, id="top-2"),
        pytest.param({"save_top_k": 3}, [4, 6, 8, 10, 12], 8, 12, id="top-3"),
        pytest.param({"mode": "max"}, [10, 12], 12, 12, id="max"),
        pytest.param({"keep_every_n_steps": 6}, [6, 8, 10, 12], 8, 12, id="every-6th-for-good"),
        pytest.param({"save_best_only": True}, [4, 8], 8, 8, id="best-only"),
        pytest.param({"save_best_only": True, "save_top_k": 3}, [2, 4, 8], 8, 8, id="best-only-top-3"),
        pytest.param({"every_n_epochs": 3}, [8, 12], 8, 12, id="every-3-epochs"),
    ],
)
def test_what_stays_on_disk(
    tmp_path: Path, arguments: dict[str, Any], stays: list[int], best: int, last: int
) -> None:
    result, _ = train(tmp_path, LOSSES, ModelCheckpoint("val_loss", save_last=False, **arguments))
    assert on_disk(tmp_path) == [f"step-{step:09d}-a0" for step in stays]
    assert (ref(tmp_path, "best"), ref(tmp_path, "last")) == (f"step-{best:09d}-a0", f"step-{last:09d}-a0")
    assert result.best is not None
    assert result.best.path == str(tmp_path / "run" / "checkpoints" / ref(tmp_path, "best"))


def test_default_keeps_the_best_of_long_ago(tmp_path: Path) -> None:
    """The best is saved once: a second copy of its step would be the one that result.best.path names and loses."""
    result, _ = train(tmp_path, [1.0, 2.0, 2.0, 2.0, 2.0], ModelCheckpoint())
    assert result.best is not None and result.best.path is not None
    assert Path(result.best.path).name == ref(tmp_path, "best") == "step-000000002-a0"
    assert Path(result.best.path).is_dir()


BESTS = [
    pytest.param([2.0, 2.0, 2.0], [2], id="ties-keep-the-older"),
    pytest.param([float("nan"), 3.0, 2.0], [4, 6], id="nan-first"),
    pytest.param([3.0, float("nan"), 4.0, 2.0], [2, 8], id="nan-in-the-middle"),
    pytest.param([1.0, 0.0, 0.5], [2, 4], id="zero"),
    pytest.param([-1.0, -2.0, -1.5], [2, 4], id="negative"),
    pytest.param([3.0, 2.0, 2.0, 2.0], [2, 4], id="improving-then-flat"),
    pytest.param([float("nan"), float("nan")], [], id="only-nan"),
]


@pytest.mark.parametrize(("losses", "bests"), BESTS)
def test_which_is_best(tmp_path: Path, losses: list[float], bests: list[int]) -> None:
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    result, recorder = train(tmp_path, losses, checkpoint, knobs={"on_nonfinite": "warn"})
    assert saved(recorder) == [(step, "best") for step in bests]
    assert (result.best.path if result.best else None) == (
        str(tmp_path / "run" / "checkpoints" / ref(tmp_path, "best")) if bests else None
    )


@pytest.mark.parametrize(("losses", "bests"), BESTS)
@pytest.mark.anyio
async def test_choice_is_the_same_beside_slow_and_failing_observers(
    tmp_path: Path, losses: list[float], bests: list[int]
) -> None:
    recorder, slow, failing = Recorder(), SlowCallback(0.001), FailingCallback(CheckpointSaved)
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    with anyio.fail_after(60):
        await trainer_for(tmp_path, losses, on_nonfinite="warn").train_async(
            tiny_batches(BATCHES),
            tiny_batches(1),
            epochs=len(losses),
            callbacks=[recorder, WaitForDisk(), slow, failing, checkpoint],
        )
    assert saved(recorder) == [(step, "best") for step in bests]
    best = tmp_path / "run" / "refs" / "best"
    assert (int(best.read_text().split("-")[1]) if best.exists() else None) == (bests[-1] if bests else None)
    assert slow.handled and (failing.raised or not bests)


# Failures ------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, *steps: int, error: int = errno.ENOSPC) -> None:
    """Make the disk refuse the checkpoints of some steps."""
    make_directory = FileSystem.make_directory

    def refusing(self: FileSystem, path: Path) -> None:
        if any(f"step-{step:09d}" in path.name for step in steps):
            raise OSError(error, "injected")
        make_directory(self, path)

    monkeypatch.setattr(FileSystem, "make_directory", refusing)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_failed_best_falls_back_to_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    refuse(monkeypatch, 4, error=error)
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    result, recorder = train(tmp_path, [5.0, 1.0, 6.0], checkpoint)
    assert result.status == "completed" and result.steps == 6
    assert [(event.saved_step, event.reason) for event in recorder.of(CheckpointFailed)] == [(4, "best")]
    assert on_disk(tmp_path) == [ref(tmp_path, "best")] == ["step-000000002-a0"]
    assert result.best is not None
    assert (result.best.score, result.best.path) == (1.0, None)  # it was reached, and nothing holds it


def test_after_a_failed_best_the_next_one_is_measured_by_what_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, 4)
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    _, recorder = train(tmp_path, [5.0, 1.0, 6.0, 3.0, 4.0], checkpoint)
    assert saved(recorder) == [(2, "best"), (8, "best")]
    assert ref(tmp_path, "best") == "step-000000008-a0"


def test_failed_first_best_leaves_the_choice_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 2)
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    _, recorder = train(tmp_path, [1.0, 5.0, 6.0], checkpoint)
    assert saved(recorder) == [(4, "best")]


def test_disk_that_refuses_everything_does_not_touch_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path / "fine", [], ModelCheckpoint(), epochs=3)
    refuse(monkeypatch, *range(10))
    result, recorder = train(tmp_path / "full", [], ModelCheckpoint(), epochs=3)
    assert result.status == "completed"
    assert [event.metrics for event in result.history] == [event.metrics for event in whole.history]
    assert saved(recorder) == [] and len(recorder.of(CheckpointFailed)) == 4
    assert on_disk(tmp_path / "full") == []


# Missing metrics, arguments ------------------------------------------------------------------------


def test_missing_metric_lists_the_keys(tmp_path: Path) -> None:
    with pytest.raises(MetricNotFoundError, match=r"val_accuracy.*val_loss"):
        train(tmp_path, [1.0, 2.0], ModelCheckpoint("val_accuracy"))


def test_validation_that_never_comes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"monitor='val_loss' needs a validation: give train\(\) a val_loader"
    ):
        train(tmp_path, [], ModelCheckpoint("val_loss"), epochs=2)


class WithoutLoss(Trainer):
    """Steps by hand and says no loss."""

    automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        inputs, _ = batch
        self.backward(self.model(inputs).sum())
        self.optimizer_step()


def test_run_without_the_default_metric_is_saved_all_the_same(tmp_path: Path) -> None:
    trainer = tiny_trainer(WithoutLoss, run_dir=str(tmp_path), run_name="run")
    result = trainer.train(tiny_batches(BATCHES), epochs=2, callbacks=[ModelCheckpoint(save_last=False)])
    assert (result.status, result.best) == ("completed", None)
    assert steps_on_disk(tmp_path) == [2, 4]


def test_metric_and_direction_of_the_trainer_are_taken_over(tmp_path: Path) -> None:
    knobs = {"monitor": "val_loss", "mode": "max"}
    _, recorder = train(
        tmp_path, [1.0, 2.0, 1.5], ModelCheckpoint(save_best_only=True, save_last=False), knobs=knobs
    )
    assert saved(recorder) == [(2, "best"), (4, "best")]


def test_the_trainer_has_the_last_word_about_the_best_of_a_run(tmp_path: Path) -> None:
    result, _ = train(tmp_path, [1.0, 2.0], ModelCheckpoint("val_loss"), knobs={"monitor": "train_loss"})
    assert result.best is not None and result.best.monitor == "train_loss"


@pytest.mark.parametrize("first", ["train_loss", "val_loss"])
def test_of_two_that_disagree_the_first_says_which_moment_of_a_run_is_best(
    tmp_path: Path, first: str
) -> None:
    two = [ModelCheckpoint("train_loss"), ModelCheckpoint("val_loss", mode="max")]
    result, _ = train(tmp_path, [1.0, 2.0, 1.5], *(two if first == "train_loss" else two[::-1]))
    assert result.best is not None and result.best.monitor == first
    assert result.best.step == (6 if first == "train_loss" else 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"save_top_k": 0}, "save_top_k must be a whole number of at least 1, got 0"),
        ({"save_top_k": -1}, "got -1; keep_last=None keeps all"),
        ({"keep_last": 0}, "keep_last must be"),
        ({"save_last": "link"}, "save_last must be True or False, got 'link'"),
        ({"every_n_steps": 1.5}, "every_n_steps must be"),
        ({"every_n_epochs": True}, "every_n_epochs must be"),
        ({"keep_every_n_steps": -1}, "keep_every_n_steps must be"),
        ({"every_seconds": 0}, "every_seconds must be a number of seconds above 0"),
        ({"save_best_only": True, "every_n_epochs": 1}, "save_best_only saves when the metric improves"),
        ({"monitor": "loss"}, "monitor must begin with train_ or val_"),
        ({"monitor": "val_loss", "mode": "up"}, "mode must be"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ModelCheckpoint(**arguments)


# Resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted_after", [1, 2, 3, 4])
def test_resumed_run_knows_the_best_so_far(tmp_path: Path, interrupted_after: int) -> None:
    def policy() -> ModelCheckpoint:
        return ModelCheckpoint("val_loss", save_best_only=True)

    whole, expected = train(tmp_path / "whole", LOSSES, policy())
    stop = At(interrupted_after * BATCHES + 1, _stop)
    train(tmp_path, LOSSES[:interrupted_after], policy(), stop, epochs=len(LOSSES))
    result, recorder = train(
        tmp_path, LOSSES[interrupted_after:], policy(), resume="auto", epochs=len(LOSSES)
    )
    later = [entry for entry in saved(expected) if entry[0] > interrupted_after * BATCHES]
    assert saved(recorder) == later
    assert result.best is not None and whole.best is not None
    assert (result.best.score, result.best.step) == (whole.best.score, whole.best.step)


def test_resumed_run_keeps_what_was_asked_for(tmp_path: Path) -> None:
    def policy() -> ModelCheckpoint:
        return ModelCheckpoint("val_loss", save_top_k=2, save_last=False)

    train(tmp_path, LOSSES[:3], policy(), At(7, _stop), epochs=len(LOSSES))
    train(tmp_path, LOSSES[3:], policy(), resume="auto", epochs=len(LOSSES))
    assert on_disk(tmp_path) == [f"step-{step:09d}-a{int(step > 6)}" for step in (4, 6, 8, 10, 12)]
    assert ref(tmp_path, "best") == "step-000000008-a1"


@pytest.mark.parametrize("more", [0, 2])
def test_best_of_an_earlier_attempt_is_found(tmp_path: Path, more: int) -> None:
    before, _ = train(tmp_path, [3.0, 1.0, 2.0], ModelCheckpoint("val_loss"))
    checkpoint = ModelCheckpoint("val_loss")
    result = trainer_for(tmp_path, [4.0, 5.0], callbacks=[checkpoint]).train(
        tiny_batches(BATCHES), tiny_batches(1), epochs=3 + more, resume="auto"
    )
    assert before.best is not None and result.best == before.best
    assert result.best.path == str(tmp_path / "run" / "checkpoints" / "step-000000004-a0")
    assert ref(tmp_path, "best") == "step-000000004-a0"


def test_best_is_not_that_of_a_path_which_the_run_has_left(tmp_path: Path) -> None:
    """Two attempts reach the same step with the same score; the later one's is the run's."""
    train(tmp_path, [3.0, 1.0], ModelCheckpoint("val_loss", keep_last=None))
    result, _ = train(tmp_path, [1.0, 2.0], ModelCheckpoint("val_loss", keep_last=None), resume=2, epochs=3)
    assert result.best is not None and result.best.path is not None
    assert Path(result.best.path).name == "step-000000004-a1"


def test_new_run_forgets_the_best_of_the_one_before(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    train(tmp_path / "first", [1.0], checkpoint)
    _, recorder = train(tmp_path / "second", [2.0], checkpoint)
    assert saved(recorder) == [(2, "best")]


def test_checkpoint_between_validations_does_not_pass_for_the_earlier_best(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint("val_loss", every_n_steps=1, save_top_k=2, save_last=False)
    train(tmp_path, [1.0, 3.0, 2.0, 4.0], checkpoint)
    assert sorted(set(steps_on_disk(tmp_path))) == [
        2,
        7,
        8,
    ]  # not 3, which has step 2's val_loss and other weights


# Copies under names of one's own ---------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_copies_have_the_names_that_were_asked_for_and_go_with_their_checkpoints(tmp_path: Path) -> None:
    named = tmp_path / "models"
    checkpoint = ModelCheckpoint(
        "val_loss", save_last=False, save_dir=named, filename="epoch={epoch}-val_loss={val_loss:.1f}"
    )
    result, _ = train(tmp_path, LOSSES, checkpoint)
    assert steps_on_disk(tmp_path) == [8, 10, 12]
    assert names_in(named) == ["epoch=3-val_loss=2.0", "epoch=4-val_loss=6.0", "epoch=5-val_loss=7.0"]
    original = tmp_path / "run" / "checkpoints" / "step-000000008-a0"
    copy = named / "epoch=3-val_loss=2.0"
    assert names_in(copy) == names_in(original)
    assert all((copy / name).samefile(original / name) for name in names_in(copy))  # they take no space
    reader = CheckpointReader(named)
    assert reader.find(copy).step == 8
    reader.verify(reader.find(copy), level="full")
    assert result.best is not None and result.best.path == str(original)


def test_copies_on_another_disk_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "injected")

    monkeypatch.setattr(os, "link", refuse_link)
    train(tmp_path, [1.0], ModelCheckpoint(save_last=False, save_dir=tmp_path / "models"))
    (copy,) = (tmp_path / "models").iterdir()
    assert copy.name == "epoch=0-step=2"
    reader = CheckpointReader(tmp_path / "models")
    reader.verify(reader.find(copy), level="full")
    (original,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not (copy / "MANIFEST.json").samefile(original / "MANIFEST.json")


def test_runs_may_share_a_directory_and_leave_alone_what_is_not_theirs(tmp_path: Path) -> None:
    named = tmp_path / "models"
    (named / "mine").mkdir(parents=True)
    (named / "best").write_text("mine too")
    for number in (1, 2):
        checkpoint = ModelCheckpoint(save_best_only=True, save_last=False, save_dir=named, filename="best")
        train(tmp_path / str(number), [3.0, 2.0], checkpoint)
    assert len(names_in(named)) == 2 + 2
    assert (named / "best").read_text() == "mine too" and (named / "mine").is_dir()
    found = [CheckpointReader(named).find(path) for path in sorted(named.glob("best-*"))]
    assert [info.step for info in found] == [4, 4]


def test_resumed_run_takes_its_copies_over(tmp_path: Path) -> None:
    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint("val_loss", save_last=False, save_dir=tmp_path / "models", filename="{step}")

    train(tmp_path, [3.0, 4.0, 5.0], checkpoint())
    assert names_in(tmp_path / "models") == ["2", "4", "6"]
    train(tmp_path, [2.0, 1.0], checkpoint(), resume="last", epochs=5)
    assert sorted(map(int, names_in(tmp_path / "models"))) == steps_on_disk(tmp_path)


@pytest.mark.parametrize("save_last", [True, False])
def test_fixed_name_is_that_of_the_best(tmp_path: Path, save_last: bool) -> None:
    checkpoint = ModelCheckpoint(
        "val_loss", save_best_only=True, save_last=save_last, save_dir=tmp_path / "models", filename="best"
    )
    train(tmp_path, [5.0, 2.0, 4.0, 3.0], checkpoint)
    assert names_in(tmp_path / "models") == ["best"]
    assert CheckpointReader(tmp_path / "models").find(tmp_path / "models" / "best").step == 4


def test_fixed_name_of_several_best_ones_is_that_of_the_very_best(tmp_path: Path) -> None:
    models = tmp_path / "models"
    checkpoint = ModelCheckpoint(
        "val_loss", save_best_only=True, save_top_k=2, save_dir=models, filename="best"
    )
    train(tmp_path, [5.0, 3.0, 2.0, 4.0], checkpoint)
    steps = {name: CheckpointReader(models).find(models / name).step for name in names_in(models)}
    assert steps == {"best": 6, "best-2": 4}


def test_fixed_name_without_best_only_is_that_of_the_newest(tmp_path: Path) -> None:
    models = tmp_path / "models"
    train(tmp_path, [2.0, 3.0, 4.0], ModelCheckpoint("val_loss", save_dir=models, filename="model"))
    steps = {name: CheckpointReader(models).find(models / name).step for name in names_in(models)}
    assert steps["model"] == 6 and set(steps.values()) == {2, 4, 6}


def test_best_copy_of_a_run_that_goes_on_is_replaced(tmp_path: Path) -> None:
    models = tmp_path / "models"

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint("val_loss", save_best_only=True, save_dir=models, filename="best")

    train(tmp_path, [3.0, 2.0, 4.0], checkpoint())
    assert CheckpointReader(models).find(models / "best").step == 4
    train(tmp_path, [1.0, 5.0], checkpoint(), resume="auto", epochs=5)
    assert names_in(models) == ["best"]
    assert CheckpointReader(models).find(models / "best").step == 8


# Several in one run ----------------------------------------------------------------------------------


class TwoScores(Trainer):
    """Validates with two scores, each from a list."""

    scripts: dict[str, list[float]]

    def validation_step(self, batch: Any) -> torch.Tensor:
        self.log("score", self.scripts["score"][self.epoch])
        return torch.tensor(self.scripts["loss"][self.epoch])


def train_for_two(tmp_path: Path, *callbacks: Callback, **arguments: Any) -> tuple[RunResult, Recorder]:
    """Train six epochs of which epoch 1 is best by val_loss, and epoch 3 by val_score."""
    trainer = tiny_trainer(TwoScores, run_dir=str(tmp_path), run_name="run", **arguments.pop("knobs", {}))
    assert isinstance(trainer, TwoScores)
    trainer.scripts = {"loss": [9.0, 3.0, 5.0, 6.0, 7.0, 8.0], "score": [0.1, 0.2, 0.3, 0.9, 0.4, 0.5]}
    recorder = Recorder()
    result = trainer.train(
        tiny_batches(BATCHES),
        tiny_batches(1),
        callbacks=[recorder, WaitForDisk(), *callbacks],
        **{"epochs": 6, **arguments},
    )
    return result, recorder


def two(tmp_path: Path, **arguments: Any) -> list[ModelCheckpoint]:
    return [
        ModelCheckpoint("val_loss", **arguments),
        ModelCheckpoint("val_score", mode="max", **arguments),
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_each_of_two_keeps_its_best_and_knows_it(tmp_path: Path, order: int) -> None:
    by_loss, by_score = two(tmp_path)
    result, _ = train_for_two(tmp_path, *[by_loss, by_score][::order])
    assert {4, 8, 10, 12} == set(steps_on_disk(tmp_path))
    assert by_loss.best is not None and by_score.best is not None
    assert (by_loss.best.monitor, by_loss.best.score, by_loss.best.step) == ("val_loss", 3.0, 4)
    assert (by_score.best.monitor, by_score.best.score, by_score.best.step) == ("val_score", 0.9, 8)
    assert result.best == (by_loss if order == 1 else by_score).best
    for best in (by_loss.best, by_score.best):
        assert best.path is not None
        info = CheckpointReader(tmp_path / "run").find(Path(best.path))
        assert (info.step, info.metrics[best.monitor]) == (best.step, best.score)
    assert ref(tmp_path, "best") == Path(str(result.best and result.best.path)).name


def test_each_of_two_has_its_own_copies(tmp_path: Path) -> None:
    models = tmp_path / "models"
    by_loss = ModelCheckpoint("val_loss", save_best_only=True, save_dir=models, filename="least-loss")
    by_score = ModelCheckpoint(
        "val_score", mode="max", save_best_only=True, save_dir=models, filename="best-score"
    )
    each = ModelCheckpoint("val_loss", save_dir=tmp_path / "all", filename="{step}", keep_last=3)
    train_for_two(tmp_path, by_loss, by_score, each)
    reader = CheckpointReader(models)
    assert {name: reader.find(models / name).step for name in names_in(models)} == {
        "least-loss": 4,
        "best-score": 8,
    }
    assert set(names_in(tmp_path / "all")) == {"4", "8", "10", "12"}


def test_each_of_two_keeps_the_newest_of_its_own(tmp_path: Path) -> None:
    """Many of one do not crowd out the few of the other."""
    often = ModelCheckpoint("val_loss", every_n_steps=1, save_last=False)
    rarely = ModelCheckpoint("val_score", mode="max", every_n_epochs=2, save_last=False)
    train_for_two(tmp_path, often, rarely)
    owned: dict[str, set[int]] = {}
    for info in CheckpointReader(tmp_path / "run").checkpoints():
        for owner in info.manifest.owners:
            owned.setdefault(owner, set()).add(info.step)
    assert owned == {"ModelCheckpoint": {4, 11, 12}, "ModelCheckpoint#2": {4, 8, 12}}


def test_one_checkpoint_serves_both_where_both_want_one(tmp_path: Path) -> None:
    _, recorder = train_for_two(
        tmp_path, *two(tmp_path, save_best_only=True, save_last=False, keep_last=None)
    )
    assert saved(recorder) == [(2, "best"), (4, "best"), (6, "best"), (8, "best")]
    both = {info.step: info.manifest.owners for info in CheckpointReader(tmp_path / "run").checkpoints()}
    assert both[2] == both[4] == ["ModelCheckpoint", "ModelCheckpoint#2"]
    assert both[6] == both[8] == ["ModelCheckpoint#2"]


def test_the_last_one_is_taken_for_those_that_want_it(tmp_path: Path) -> None:
    last = ModelCheckpoint("val_loss", save_best_only=True, save_last=True)
    without = ModelCheckpoint("val_score", mode="max", save_best_only=True, save_last=False)
    train_for_two(tmp_path, last, without)
    newest = CheckpointReader(tmp_path / "run").find("last")
    assert (newest.manifest.reason, newest.manifest.owners) == ("final", ["ModelCheckpoint"])


def test_each_of_two_goes_on_with_its_own_best(tmp_path: Path) -> None:
    train_for_two(tmp_path, *two(tmp_path), epochs=3)
    by_loss, by_score = two(tmp_path)
    result, recorder = train_for_two(tmp_path, by_loss, by_score, resume="auto")
    assert by_loss.best is not None and by_score.best is not None
    assert by_loss.best == result.best
    assert (by_loss.best.step, Path(str(by_loss.best.path)).name) == (4, "step-000000004-a0")
    assert (by_score.best.step, Path(str(by_score.best.path)).name) == (8, "step-000000008-a1")
    assert [entry for entry in saved(recorder) if entry[1] == "best"] == [(8, "best")]


def test_checkpoint_of_nobody_counts_for_all(tmp_path: Path) -> None:
    """One that the host has asked for is among the newest of each."""
    manual = At(11, lambda run: run.checkpoint_nowait())
    policies = two(tmp_path, save_last=False, save_dir=tmp_path / "models")
    policies[1] = ModelCheckpoint("val_score", mode="max", save_last=False, save_dir=tmp_path / "more")
    train_for_two(tmp_path, manual, *policies)
    assert "epoch=5-step=11" in names_in(tmp_path / "models") and "epoch=5-step=11" in names_in(
        tmp_path / "more"
    )


def test_same_names_in_one_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"under the same names already: give one of them another save_dir"):
        train_for_two(tmp_path, *two(tmp_path, save_dir=tmp_path / "models"))


def test_best_is_what_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 4)
    checkpoint = ModelCheckpoint("val_loss", save_best_only=True, save_last=False)
    assert checkpoint.best is None
    train(tmp_path, [5.0, 1.0, 6.0], checkpoint)
    assert checkpoint.best is not None and (checkpoint.best.step, checkpoint.best.score) == (2, 5.0)


def test_metric_of_another_moment_is_no_part_of_a_name(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        "val_loss", every_n_steps=3, save_dir=tmp_path / "models", filename="{step}-{val_loss:.1f}"
    )
    train(tmp_path, [1.0, 2.0], checkpoint)
    assert names_in(tmp_path / "models") == ["2-1.0", "3-nan", "4-2.0"]


def test_directory_that_refuses_copies_does_not_touch_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_link(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(os, "link", refuse_link)
    monkeypatch.setattr(shutil, "copyfile", refuse_link)
    result, recorder = train(tmp_path, [1.0], ModelCheckpoint(save_last=False, save_dir=tmp_path / "models"))
    assert (result.status, saved(recorder)) == ("completed", [(2, "best")])
    assert names_in(tmp_path / "models") == []
    assert "were not copied to" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"filename": "x"}, "give save_dir too"),
        ({"save_dir": "d", "filename": ""}, "must be a pattern like 'epoch="),
        (
            {"save_dir": "d", "filename": "{epoc}"},
            r"unknown key \{epoc\}; legal are \{epoch\}, \{step\}",
        ),
        ({"save_dir": "d", "filename": "{}"}, "unknown key"),
        ({"save_dir": "d", "filename": "{val_loss.real}"}, "unknown key"),
        ({"save_dir": "d", "filename": "{epoch!r}"}, "leave it out"),
        ({"save_dir": "d", "filename": "{epoch"}, "is no pattern: expected"),
        ({"save_dir": "d", "filename": "{val_loss:.3x}"}, r"cannot format \{val_loss:.3x\}: Unknown"),
        ({"save_dir": "d", "filename": "{epoch:.3s}"}, r"cannot format \{epoch:.3s\}"),
        ({"save_dir": "d", "filename": "a/{epoch}"}, "name of one directory"),
        ({"save_dir": "d", "filename": ".{epoch}"}, "name of one directory"),
        ({"save_dir": "d", "filename": "x" * 201}, "name of one directory"),
    ],
)
def test_names_that_cannot_be_are_refused_early(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ModelCheckpoint(**arguments)


def test_metric_that_nobody_makes_is_an_error_that_lists_those_there_are(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(save_dir=tmp_path / "models", filename="{val_accurac:.2f}")
    with pytest.raises(MetricNotFoundError, match=r"val_accurac.*val_loss"):
        train(tmp_path, [1.0], checkpoint)
