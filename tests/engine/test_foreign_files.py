"""What others do to a run's directory: files lost or damaged, names taken, links to nothing and to elsewhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.callbacks import MetricLogger, ModelCheckpoint
from offloop.engine import ModelRegistry, Resumed, TrainStart, export_model, read_events
from offloop.engine.checkpoint import CheckpointError, CheckpointReader, CheckpointReadError, CheckpointStore
from offloop.engine.run_dir import read_run_json
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "half": lambda path: path.write_text('{"run_id": "ru'),
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[1, 2]"),
    "without attempt": lambda path: path.write_text('{"run_id": "run"}'),
    "of an odd attempt": lambda path: path.write_text('{"attempt": "second"}'),
    "a link to nothing": link_to_nothing,
}


def train(run_dir: Path, epochs: int, **arguments: Any) -> Recorder:
    recorder = Recorder()
    callbacks = [ModelCheckpoint(), MetricLogger(), recorder]
    arguments = {"run_name": "run", "resume": "auto", **arguments}
    trainer = tiny_trainer(run_dir=run_dir, run_name=arguments.pop("run_name"))
    trainer.train(tiny_batches(2), epochs=epochs, callbacks=callbacks, **arguments)
    return recorder


def resumed_at(recorder: Recorder) -> int | None:
    found = recorder.of(Resumed)
    return found[0].step if found else None


# run.json ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_lost_run_json_is_made_anew_and_attempts_go_on_counting(tmp_path: Path, damage: str) -> None:
    train(tmp_path, 1)
    created = read_run_json(tmp_path / "run")["created"]
    train(tmp_path, 2)
    DAMAGES[damage](tmp_path / "run" / "run.json")
    recorder = train(tmp_path, 3)
    assert (recorder.of(TrainStart)[0].attempt, resumed_at(recorder)) == (2, 4)
    assert resumed_at(train(tmp_path, 4)) == 6
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (described["attempt"], described["status"], described["run_id"]) == (3, "completed", "run")
    assert abs(described["created"] - created) < 60
    assert sorted(info.step for info in CheckpointReader(tmp_path / "run").checkpoints())[-1] == 8


def test_attempts_that_saved_nothing_count_by_the_log(tmp_path: Path) -> None:
    for _ in range(2):
        tiny_trainer(run_dir=tmp_path, run_name="run").train(tiny_batches(1), epochs=1, resume="auto")
    (tmp_path / "run" / "run.json").unlink()
    tiny_trainer(run_dir=tmp_path, run_name="run").train(tiny_batches(1), epochs=1, resume="auto")
    assert [each.attempt for each in read_events(tmp_path / "run") if isinstance(each, TrainStart)] == [2]


def test_run_json_that_is_older_than_the_checkpoints_sets_no_attempt_back(tmp_path: Path) -> None:
    train(tmp_path, 1)
    older = (tmp_path / "run" / "run.json").read_bytes()
    train(tmp_path, 2)
    (tmp_path / "run" / "run.json").write_bytes(older)
    assert train(tmp_path, 3).of(TrainStart)[0].attempt == 2


def test_run_without_run_json_is_found_by_auto_and_by_its_path(tmp_path: Path) -> None:
    train(tmp_path, 1)
    (tmp_path / "run" / "run.json").unlink()
    assert resumed_at(train(tmp_path, 2, run_name=None)) == 2
    (tmp_path / "run" / "run.json").unlink()
    assert resumed_at(train(tmp_path, 3, run_name=None, resume=tmp_path / "run")) == 4


# Names -------------------------------------------------------------------------------------------------


def test_plain_file_with_the_name_of_a_checkpoint_blocks_nothing(tmp_path: Path) -> None:
    train(tmp_path, 1)
    foreign = tmp_path / "run" / "checkpoints" / "step-000000004-a1"
    foreign.write_text("left by some tool")
    recorder = train(tmp_path, 2)
    assert (resumed_at(recorder), foreign.read_text()) == (2, "left by some tool")
    assert CheckpointReader(tmp_path / "run").find().name == "step-000000004-a1-2"


def test_checkpoint_that_is_a_link_to_nothing_gives_way_to_the_one_before(tmp_path: Path) -> None:
    train(tmp_path, 2)
    newest = CheckpointReader(tmp_path / "run").find().path
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "not-mounted")
    (error,) = CheckpointReader(tmp_path / "run").damaged()
    assert isinstance(error, CheckpointReadError) and "which does not exist" in str(error)
    assert resumed_at(train(tmp_path, 3)) == 2
    assert newest.is_symlink()  # it is not set aside: tomorrow it may lead somewhere again


@pytest.mark.parametrize("what", ["each checkpoint", "checkpoints", "run"])
def test_run_behind_links_to_nothing_never_begins_afresh(tmp_path: Path, what: str) -> None:
    train(tmp_path, 2)
    run = tmp_path / "run"
    log = (run / "events.jsonl").read_bytes()
    moved = list((run / "checkpoints").iterdir()) if what == "each checkpoint" else [run / "checkpoints"]
    for path in [run] if what == "run" else moved:
        path.rename(tmp_path / f"moved-{path.name}")
        path.symlink_to(tmp_path / "not-mounted")
    with pytest.raises(CheckpointError, match=r"which does not exist|are damaged"):
        train(tmp_path, 3)
    assert (tmp_path / ("moved-run" if what == "run" else "run") / "events.jsonl").read_bytes() == log


# Links -------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("is_temporary", [False, True])
@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "metrics.csv", "metrics.jsonl"])
def test_files_of_a_run_are_not_written_through_a_link(
    tmp_path: Path, victim: Path, name: str, is_temporary: bool
) -> None:
    train(tmp_path / "runs", 1)
    path = tmp_path / "runs" / "run" / (f".{name}.new" if is_temporary else name)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    train(tmp_path / "runs", 2)
    assert victim.read_text() == "precious"
    assert is_temporary or not path.is_symlink()


def test_locks_are_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "LOCK").symlink_to(victim)
    with pytest.raises(CheckpointError, match="nothing is written through links"):
        CheckpointStore(run)
    registry = ModelRegistry(tmp_path / "models")
    registry.register(torch.nn.Linear(2, 2).state_dict(), "model")
    lock = tmp_path / "models" / "model" / "LOCK"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(CheckpointError, match="nothing is written through links"):
        registry.register(torch.nn.Linear(3, 2).state_dict(), "model")
    assert victim.read_text() == "precious"


def test_export_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        (tmp_path / f".{name}.{os.getpid()}.new").symlink_to(victim)
        export_model(torch.nn.Linear(2, 2).state_dict(), tmp_path / name)
    assert victim.read_text() == "precious"


def test_leftover_of_a_registry_that_is_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "models")
    registry.register(torch.nn.Linear(2, 2).state_dict(), "model")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("precious")
    (tmp_path / "models" / "model" / ".tmp-7").symlink_to(theirs)
    registry.register(torch.nn.Linear(3, 2).state_dict(), "model")
    assert (theirs / "file").read_text() == "precious"
    assert not os.path.lexists(tmp_path / "models" / "model" / ".tmp-7")
