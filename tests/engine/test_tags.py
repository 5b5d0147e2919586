"""Tags from a run: which checkpoint gets the name, what it is kept from, and what is refused."""

from pathlib import Path

import anyio
import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointFailed,
    CheckpointSaved,
    CommandApplied,
    ConfigError,
    RunEndedError,
    StepPoint,
    TrainStart,
    in_step,
    load_model,
)
from offloop.engine.checkpoint import CheckpointError, CheckpointNotFoundError, CheckpointReader
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

LONG = 30
ENDLESS = 10**9


class TagAt(Callback):
    """Tags the state of some steps, and remembers the weights that it tagged."""

    def __init__(self, *steps: int, save_first: bool = False, move: bool = False) -> None:
        self.steps, self.save_first, self.move = steps, save_first, move
        self.weights: dict[int, torch.Tensor] = {}
        self.futures: list[object] = []

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step in self.steps:
            if self.save_first:
                point.run.checkpoint_nowait("interval")
            self.weights[point.step] = next(point.model.parameters()).detach().clone()
            name = "moving" if self.move else f"v{point.step}"
            self.futures.append(point.run.tag_nowait(name, move=self.move))


def test_tag_names_the_weights_of_its_step_and_outlives_retention(tmp_path: Path) -> None:
    tagger = TagAt(2, 5)
    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(
        tiny_loader(12), epochs=1, callbacks=[tagger, ModelCheckpoint(every_n_steps=1, keep_last=2)]
    )
    reader = CheckpointReader(tmp_path / "run")
    assert {tag: reader.find(tag).step for tag in reader.tags()} == {"v2": 2, "v5": 5}
    for step in (2, 5):
        weights = load_model(f"{tmp_path}/run@v{step}")
        assert torch.equal(next(iter(weights.values())), tagger.weights[step])
    steps = [info.step for info in reader.checkpoints()]
    assert 1 not in steps and 3 not in steps and steps[-1] == 12


@pytest.mark.anyio
async def test_tag_takes_a_checkpoint_of_this_step_and_keeps_it(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
        async with trainer.start(EndlessLoader(), max_steps=ENDLESS) as run:
            await run.pause()
            saved = await run.tag("v1", by="somebody")
            assert saved is not None and saved.saved_step == run.step
            assert run.dir is not None
            reader = CheckpointReader(run.dir)
            assert reader.tags() == {"v1": Path(saved.path).name}  # it is durable when the call returns
            await run.stop()
    info = reader.find("v1")
    assert (info.step, info.manifest.reason) == (saved.saved_step, "manual")
    first = next(iter(trainer.model.state_dict().items()))
    assert torch.equal(load_model(f"{run.dir}@v1")[first[0]], first[1])


def test_checkpoint_just_taken_gets_the_tag_and_no_second_one_is_made(tmp_path: Path) -> None:
    recorder = Recorder()
    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(
        tiny_loader(4), epochs=1, callbacks=[TagAt(3, save_first=True), recorder]
    )
    (saved,) = recorder.of(CheckpointSaved)
    assert CheckpointReader(tmp_path / "run").find("v3").path == Path(saved.path)
    acknowledged = [event for event in recorder.of(CommandApplied) if event.command == "tag"]
    assert [(event.arguments, event.error) for event in acknowledged] == [
        ({"tag": "v3", "move": False, "checkpoint": None}, None)
    ]


def test_tag_moves_only_when_told_to(tmp_path: Path) -> None:
    tagger = TagAt(1, 3, move=True)
    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(tiny_loader(4), epochs=1, callbacks=[tagger])
    assert CheckpointReader(tmp_path / "run").find("moving").step == 3


@pytest.mark.anyio
async def test_tag_in_use_is_refused_and_stays_where_it_is(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
        async with trainer.start(EndlessLoader(), max_steps=ENDLESS) as run:
            first = await run.tag("v1")
            while run.step == (first.saved_step if first else 0):
                await run.call(lambda trainer: None)
            with pytest.raises(ValueError, match=r"tag 'v1' is on step-.*move=True moves it"):
                await run.tag("v1")
            assert first is not None and run.dir is not None
            assert CheckpointReader(run.dir).find("v1").path == Path(first.path)
            second = await run.tag("v1", move=True)
            assert second is not None and second.saved_step > first.saved_step
            await run.stop()


@pytest.mark.anyio
async def test_tag_of_a_saved_checkpoint_saves_no_other_one(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
        async with trainer.start(EndlessLoader(), max_steps=ENDLESS) as run:
            first = await run.checkpoint()
            assert first is not None and run.dir is not None
            while run.step == first.saved_step:
                await run.call(lambda trainer: None)
            saved = await run.tag("by_step", first.saved_step)
            assert saved is not None
            assert (saved.path, saved.saved_step, saved.reason) == (first.path, first.saved_step, "manual")
            assert saved.bytes == first.bytes
            await run.tag("by_tag", "by_step")
            await run.tag("by_name", Path(first.path).name)
            await run.tag("by_last", "last")
            reader = CheckpointReader(run.dir)
            assert {reader.find(name).path for name in reader.tags()} == {Path(first.path)}
            assert len(reader.tags()) == 4 and len(reader.checkpoints()) == 1
            with pytest.raises(CheckpointNotFoundError, match="by_step"):
                await run.tag("v1", "nowhere")
            with pytest.raises(ConfigError, match=r"checkpoint must be the name .* got '/etc'"):
                run.tag_nowait("v1", "/etc")
            assert "v1" not in reader.tags()
            await run.stop()


@pytest.mark.anyio
async def test_improper_tag_or_run_without_directory_is_refused_at_once(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with tiny_trainer(run_dir=str(tmp_path)).start(EndlessLoader(), max_steps=ENDLESS) as run:
            for wrong in ("last", "best", "", "a/b", "x" * 65):
                with pytest.raises(ConfigError, match="tag must be letters"):
                    run.tag_nowait(wrong)
            await run.stop()
        async with tiny_trainer().start(EndlessLoader(), max_steps=ENDLESS) as bare:
            with pytest.raises(ConfigError, match="give Trainer"):
                bare.tag_nowait("v1")
            await bare.stop()
    with pytest.raises(RunEndedError):
        run.tag_nowait("v1")


def test_tag_of_a_checkpoint_that_cannot_be_written_fails_and_the_next_one_is_taken_anew(
    tmp_path: Path,
) -> None:
    class Blocked(TagAt):
        """Puts a file in the place of the directory of checkpoints while the first tag is made."""

        @in_step
        def after_step(self, point: StepPoint) -> None:
            place = point.run.dir / "checkpoints"
            if point.step == 1:
                place.write_text("in the way")
                self.futures.append(point.run.tag_nowait("v1"))
            if point.step == 2:
                self.futures.append(point.run.tag_nowait("v2"))
            if point.step == 3:
                place.unlink()
                self.futures.append(point.run.tag_nowait("v3"))

    tagger, recorder = Blocked(), Recorder()
    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(
        tiny_loader(4), epochs=1, callbacks=[tagger, recorder]
    )
    first, second, third = tagger.futures
    for future in (first, second):
        with pytest.raises(CheckpointError):
            future.result(timeout=LONG)  # type: ignore[attr-defined]  # a future of a CheckpointSaved
    assert third.result(timeout=LONG).saved_step == 3  # type: ignore[attr-defined]
    assert len(recorder.of(CheckpointFailed)) == 2
    assert CheckpointReader(tmp_path / "run").find("v3").step == 3


def test_run_goes_on_from_its_tag(tmp_path: Path) -> None:
    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(tiny_loader(6), epochs=1, callbacks=[TagAt(2)])
    for resume, steps in (("v2", 4), (f"{tmp_path}/run@v2", 5), (f"{tmp_path}/run:2", 6)):
        recorder = Recorder()
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
        result = trainer.train(tiny_loader(6), max_steps=steps, resume=resume, callbacks=[recorder])
        assert result.steps == steps
        (start,) = recorder.of(TrainStart)
        assert start.resumed_from == str(CheckpointReader(tmp_path / "run").find("v2").path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint 'v3'"):
        trainer.train(tiny_loader(6), max_steps=9, resume=f"{tmp_path}/run@v3")
