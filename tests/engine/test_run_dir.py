"""engine/recovery/run_dir.py: who owns a directory, and what `run.json` says at every moment."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    CommandApplied,
    Run,
    RunNameTakenError,
    StateChanged,
    StepPoint,
    TrainEnd,
    TrainStart,
    edit_labels,
    in_step,
    read_events,
    read_labels,
)
from offloop.engine.run_dir import create_run_dir, describe_environment, new_run_id, write_run_json
from offloop.engine.testing import FailingCallback, tiny_batches, tiny_trainer


class Look(Callback):
    """Reads run.json in the middle of the run."""

    def __init__(self) -> None:
        self.description: dict[str, Any] = {}
        self.run: Run | None = None

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.run = point.run
        self.description = json.loads((point.run.dir / "run.json").read_text())


def test_ids_sort_by_time_differ_and_draw_nothing_from_torch() -> None:
    before = torch.get_rng_state()
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) > 45
    assert all(re.fullmatch(r"\d{8}-\d{6}-[a-hj-km-np-z2-9]{4}", each) for each in ids)
    assert torch.equal(before, torch.get_rng_state())


def test_run_json_says_what_the_run_is_and_how_it_ended(tmp_path: Path) -> None:
    look = Look()
    knobs: dict[str, Any] = {"gradient_clip_val": 1.0, "hyperparameters": {"width": 16}}
    trainer = tiny_trainer(run_dir=str(tmp_path / "deep" / "er"), run_name="first", **knobs)
    result = trainer.train(tiny_batches(3), epochs=1, callbacks=[look])
    assert result.dir == tmp_path / "deep" / "er" / "first"
    during, after = look.description, json.loads((result.dir / "run.json").read_text())
    assert (during["run_id"], during["attempt"], during["status"]) == ("first", 0, "running")
    assert during["config"]["gradient_clip_val"] == 1.0
    assert "hyperparameters" not in during["config"]
    made_with = during["hyperparameters"]
    assert (made_with["width"], made_with["optimizer"], made_with["optimizer.lr"]) == (16, "SGD", 0.05)
    assert (made_with["gradient_clip_val"], made_with["epochs"]) == (1.0, 1)
    assert during["limits"] == {"epochs": 1, "max_steps": None, "max_time": None}
    (start,) = [event for event in read_events(result.dir) if isinstance(event, TrainStart)]
    assert start.hyperparameters == made_with
    assert look.run is not None and look.run.hyperparameters == {"width": 16}
    assert during["command"] == sys.argv
    assert during["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert "git" in during
    assert (after["status"], after["steps"]) == ("completed", 3)
    assert after["reason"] == result.reason
    assert {key: after[key] for key in during if key != "status"} == {
        key: value for key, value in during.items() if key != "status"
    }
    assert sorted(each.name for each in result.dir.iterdir()) == ["events.jsonl", "run.json"]


def test_text_that_cannot_be_encoded_is_written_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the names of odd files give it: on the command line, in an error, in a reason."""
    odd = "caf\udce9"

    class Raises(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                point.run.pause_nowait(odd)
                point.run.resume_nowait(by=odd)
            else:
                raise ValueError(odd)

    monkeypatch.setattr(sys, "argv", ["train.py", odd])
    trainer = tiny_trainer(run_dir=tmp_path, run_name="run")
    with pytest.raises(ValueError, match=odd):
        trainer.train(tiny_batches(3), epochs=1, callbacks=[Raises()])
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    assert description["command"] == ["train.py", "caf\\udce9"]
    assert (description["status"], description["reason"]) == ("failed", "ValueError: caf\\udce9")
    events = list(read_events(tmp_path / "run"))
    assert next(each.reason for each in events if isinstance(each, StateChanged)) == "caf\\udce9"
    assert [each.by for each in events if isinstance(each, CommandApplied)] == ["Raises", "caf\\udce9"]
    assert isinstance(events[-1], TrainEnd) and events[-1].error == "ValueError: caf\\udce9"


def test_failed_run_says_so(tmp_path: Path) -> None:
    class Raises(FailingCallback):
        on_error = "raise"

    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="bad")
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train(tiny_batches(3), epochs=1, callbacks=[Raises()])
    after = json.loads((tmp_path / "bad" / "run.json").read_text())
    assert (after["status"], after["reason"]) == ("failed", "RuntimeError: injected")


def test_taken_name_is_refused_and_its_owner_untouched(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="mine")
    trainer.train(tiny_batches(1), epochs=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with pytest.raises(RunNameTakenError) as caught:
        trainer.train(tiny_batches(1), epochs=1)
    assert caught.value.path == str(tmp_path / "mine")
    assert "choose another run_name" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_name_that_is_taken_just_now_fails_the_run_which_then_writes_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes may look at the same moment; one of them makes the directory."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="mine")
    with pytest.raises(RunNameTakenError):
        trainer.train(tiny_batches(1), epochs=1)
    assert list((tmp_path / "mine").iterdir()) == []
    assert trainer.last_run is not None
    assert (trainer.last_run.result.status, trainer.last_run.result.dir) == ("failed", None)


def test_without_anybody_who_writes_there_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tiny_trainer().train(tiny_batches(1), epochs=1).dir is None
    assert list(tmp_path.iterdir()) == []


def test_run_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run_dir(tmp_path / "run")
    write_run_json(tmp_path / "run", {"status": "running"})

    def cut_off(source: object, target: object) -> None:
        raise OSError("no power")

    monkeypatch.setattr("os.replace", cut_off)
    with pytest.raises(OSError, match="no power"):
        write_run_json(tmp_path / "run", {"status": "completed"})
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"status": "running"}


def test_run_survives_a_directory_that_is_gone_at_the_end(tmp_path: Path) -> None:
    class Remove(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.run.dir.rename(tmp_path / "elsewhere")

    result = tiny_trainer(run_dir=str(tmp_path), run_name="gone").train(
        tiny_batches(1), epochs=1, callbacks=[Remove()]
    )
    assert result.status == "completed"


def test_environment_without_git_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["git"] is None


def test_tags_and_a_note_of_the_trainer_are_the_first_labels_of_its_runs(tmp_path: Path) -> None:
    def train(**knobs: Any) -> None:
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="first", tags=[" baseline ", "a"], note="why")
        trainer.train(tiny_batches(3), callbacks=[ModelCheckpoint()], **knobs)

    train(epochs=1)
    labels = read_labels(tmp_path / "first")
    assert (labels.name, labels.tags, labels.note, labels.version) == ("", ("baseline", "a"), "why", 1)
    assert not {"tags", "note"} & set(json.loads((tmp_path / "first" / "run.json").read_text())["config"])
    edit_labels(tmp_path / "first", version=1, tags=["mine"], note="")
    # What was edited since stays
    train(epochs=2, resume="auto")
    labels = read_labels(tmp_path / "first")
    assert (labels.tags, labels.note) == (("mine",), "")


def test_a_run_with_a_tag_has_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = tiny_trainer(tags=["baseline"]).train(tiny_batches(1), epochs=1)
    assert result.dir == tmp_path / "runs" / result.run_id
    assert read_labels(result.dir).tags == ("baseline",)
