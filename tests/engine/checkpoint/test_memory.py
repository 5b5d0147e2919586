"""What checkpoints hold in memory while the disk does not take them: the buffers, and nothing that grows."""

import gc
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, CheckpointFailed, CheckpointSaved, StepPoint, Trainer, in_step
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.checkpoint.snapshot import DEFAULT_SLOTS
from offloop.engine.testing import Recorder, tiny_loader, tiny_model

STEPS = 100
BUFFERS, FLOATS = 32, 125_000
STATE = BUFFERS * FLOATS * 4  # 16 MB; the rest of the state is a thousandth of it


class Large(torch.nn.Module):
    """The tiny model, with buffers that every checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        for number in range(BUFFERS):
            self.register_buffer(f"buffer{number}", torch.full((FLOATS,), float(number)))

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.model(inputs)


def tensor_bytes() -> int:
    """Return how much memory all tensors of this process hold, what they share counted once."""
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def train(directory: Path, steps: int, *callbacks: Callback) -> None:
    model = Large()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=torch.nn.functional.cross_entropy,
        device="cpu",
        run_dir=str(directory),
    )
    trainer.train(tiny_loader(steps), epochs=1, callbacks=[ModelCheckpoint(every_n_steps=1), *callbacks])


def test_a_disk_that_hangs_costs_the_buffers_and_ten_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred saves while the first one is held in its first write: two are taken, the others left out."""
    train(tmp_path, 1)  # whatever is imported late is there now
    is_training, disk_goes_on = threading.Event(), threading.Event()
    write = FileSystem.write

    def held(self: FileSystem, file: int, data: memoryview) -> int:
        if is_training.is_set():  # not before: the run writes its run.json
            assert disk_goes_on.wait(60)
        return write(self, file, data)

    monkeypatch.setattr(FileSystem, "write", held)

    class Measure(Callback):
        def reset(self) -> None:
            self.tensors, self.peaks = list[int](), list[int]()
            self.measure()

        def measure(self) -> None:
            self.peaks.append(tracemalloc.get_traced_memory()[1])
            self.tensors.append(tensor_bytes())
            tracemalloc.reset_peak()  # that took a list of everything

        @in_step
        def before_batch(self, point: StepPoint) -> None:
            is_training.set()

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step in (10, STEPS):
                self.measure()
            if point.step == STEPS:
                disk_goes_on.set()

    measure, recorder = Measure(), Recorder()
    gc.collect()
    tracemalloc.start()
    try:
        train(tmp_path, STEPS, measure, recorder)
        peak = max(*measure.peaks, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    before, *during = measure.tensors
    for held_then in during:
        assert DEFAULT_SLOTS * STATE <= held_then - before <= DEFAULT_SLOTS * STATE * 1.1
    assert during[1] - during[0] < 0.01 * STATE, "nothing grows with what was left out"
    assert peak < 0.1 * DEFAULT_SLOTS * STATE, "nothing else is copied on its way to the disk"
    left_out = recorder.of(CheckpointFailed)
    assert len(left_out) == STEPS - DEFAULT_SLOTS
    assert all("SnapshotBusyError" in event.error for event in left_out)
    assert [event.saved_step for event in recorder.of(CheckpointSaved)] == [1, 2, STEPS]
