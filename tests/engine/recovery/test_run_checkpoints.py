"""run_checkpoints.py: a device copies beside the computation, and nobody changes what it still copies from."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offloop.callbacks import ModelCheckpoint, WeightAverage
from offloop.engine import Callback, EpochEnd, Run, StepPoint, ValidationStart, decides, in_step
from offloop.engine.checkpoint import CheckpointReader, cuda_copy
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.testing import tiny_batches, tiny_trainer

copiers: "list[LateCopier]" = []


class LateCopier(cuda_copy.CudaCopier):
    """Stands for a device that copies as late as it may: when what follows has to wait for it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.late: list[LateCopy] = []
        copiers.append(self)

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        owned = self._owned()
        kept = [each if each.untyped_storage().data_ptr() in owned else each.clone() for each in sources]
        self.late.append(LateCopy(targets, kept))
        return self.late[-1]

    def guard(self) -> None:
        for copy in self.late:
            copy.run()
        self.late.clear()


class LateCopy:
    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self.targets, self.sources = list(targets), list(sources)
        self.done = threading.Event()

    def run(self) -> None:
        if not self.done.is_set():
            with torch.no_grad():
                torch._foreach_copy_(self.targets, self.sources)
            self.done.set()

    def wait(self) -> None:
        self.done.wait()


@pytest.fixture(autouse=True)
def late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        def __init__(self, memory: Tensor) -> None: ...
        def release(self) -> None: ...

    monkeypatch.setattr(cuda_copy, "any_on_cuda", lambda tensors: True)
    monkeypatch.setattr(cuda_copy, "PinnedMemory", Memory)
    flush = Checkpoints.flush

    def flush_both(self: Checkpoints) -> bool:
        """Who waits for the disk has waited for the device."""
        for copier in copiers:
            copier.guard()
        return flush(self)

    copiers.clear()
    monkeypatch.setattr(cuda_copy, "CudaCopier", LateCopier)
    monkeypatch.setattr(Checkpoints, "flush", flush_both)


class Saves(Callback):
    """Takes a checkpoint of every step, and remembers what must be in it."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.at[point.step] = {name: each.clone() for name, each in point.model.state_dict().items()}
        point.run.checkpoint_nowait()

    def check(self, run: Path) -> None:
        reader = CheckpointReader(run)
        mine = [info for info in reader.checkpoints() if info.manifest.reason == "manual"]  # not the best
        assert [info.step for info in mine] == list(self.at)
        for info in mine:
            state: Any = reader.load(info.path).state
            for name, expected in self.at[info.step].items():
                assert torch.equal(state["model"][name], expected), (info.step, name)


def spoil(model: torch.nn.Module) -> None:
    """Change the weights, by something else than the optimizer."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


class SpoilsInStep(Callback):
    def __init__(self, point: str) -> None:
        self.point = point

    def spoil_at(self, point: StepPoint) -> None:
        if point.name == self.point:
            spoil(point.model)

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        self.spoil_at(point)

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        self.spoil_at(point)

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        self.spoil_at(point)

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        self.spoil_at(point)

    @in_step
    def before_train_end(self, point: StepPoint) -> None:
        self.spoil_at(point)


class SpoilsInDecider(Callback):
    @decides
    def on_validation_start(self, event: ValidationStart, run: Run) -> None:
        spoil(run.trainer.model)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        spoil(run.trainer.model)


class SpoilsByCall(Callback):
    @in_step
    def after_step(self, point: StepPoint) -> None:
        point.run.call_nowait(lambda trainer: spoil(trainer.model))


@pytest.mark.parametrize(
    "spoiler",
    [
        pytest.param(SpoilsInStep("before_batch"), id="before_batch"),
        pytest.param(SpoilsInStep("before_forward"), id="before_forward"),
        pytest.param(SpoilsInStep("before_optimizer_step"), id="before_optimizer_step"),
        pytest.param(SpoilsInStep("before_validation"), id="before_validation"),
        pytest.param(SpoilsInStep("before_train_end"), id="before_train_end"),
        pytest.param(SpoilsInDecider(), id="decider"),
        pytest.param(SpoilsByCall(), id="call"),
        pytest.param(WeightAverage(decay=0.5), id="average"),
    ],
)
def test_checkpoint_is_not_torn_by_what_changes_weights_right_after_it(
    spoiler: Callback, tmp_path: Path
) -> None:
    saves = Saves()
    trainer = tiny_trainer(
        run_dir=tmp_path,
        run_name="run",
        val_every_n_steps=2,
        callbacks=[ModelCheckpoint(every_n_steps=100, keep_last=None), saves, spoiler],
    )
    trainer.train(tiny_batches(4), tiny_batches(2), epochs=2)
    saves.check(tmp_path / "run")


def test_checkpoint_is_not_torn_by_a_module_that_changes_its_weights_in_the_forward_pass(
    tmp_path: Path,
) -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 4, max_norm=0.1), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    )
    tokens = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2]])
    batches = [(tokens[[step % 4]], torch.tensor([step % 3])) for step in range(4)]
    saves = Saves()
    everything = ModelCheckpoint(every_n_steps=100, keep_last=None)
    trainer = tiny_trainer(model=model, run_dir=tmp_path, run_name="run", callbacks=[everything, saves])
    trainer.train(batches, epochs=2)
    saves.check(tmp_path / "run")
