"""Loader workers beside all that a run has going on: forking them from a process with threads does not hang."""

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offloop.callbacks import MetricLogger, ModelCheckpoint, ProgressBar
from offloop.engine import Callback, StepEnd, Trainer
from offloop.engine.testing import tiny_trainer

logger = logging.getLogger("offloop.tests.workers")
Sample = tuple[Tensor, Tensor]


class Talks(Dataset[Sample]):
    """Does in its workers what takes locks: logs, prints, imports, computes."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        import colorsys  # the import lock; nothing has loaded this one before

        assert os.getpid() != self.parent
        logger.warning("sample %d", index)
        print(f"sample {index}", flush=True)
        hue, _, _ = colorsys.rgb_to_hsv(0.1, 0.2, 0.3)
        inputs = torch.randn(64, 64) @ torch.randn(64, 8)
        return inputs[0] + hue, torch.tensor(index % 3)


class Quiet(Dataset[Sample]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        return torch.zeros(8), torch.tensor(index % 3)


class Busy(Callback):
    """Keeps the event loop and a thread of its own at what takes locks."""

    async def on_step_end(self, event: StepEnd, run: Any) -> None:
        logger.warning("step %d", event.step)
        await anyio.lowlevel.checkpoint()


class BusyThread(Callback):
    def on_step_end(self, event: StepEnd, run: Any) -> None:
        logger.warning("step %d", event.step)
        print(f"step {event.step}", flush=True)


def many_epochs(epochs: int, tmp_path: Path, **loader_knobs: Any) -> None:
    loader = DataLoader(Talks(), batch_size=2, num_workers=2, **loader_knobs)
    with (tmp_path / "bar").open("w") as file:
        result = tiny_trainer(run_dir=str(tmp_path)).train(
            loader,
            epochs=epochs,
            callbacks=[
                ProgressBar(file=file),
                MetricLogger(every_n_steps=1),
                ModelCheckpoint(every_n_epochs=max(1, epochs // 4)),
                Busy(),
                BusyThread(),
            ],
        )
    assert (result.status, result.epochs, result.steps) == ("completed", epochs, 4 * epochs)
    assert not result.callback_errors
    assert not multiprocessing.active_children()


def in_a_process_of_its_own(tmp_path: Path, *command: str, seconds: float) -> str:
    """Run a script with the streams that scripts have; pytest's, which replace them, are not made for forks."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a worker that hangs outlives its parent
            process.wait()
    said = (tmp_path / "out").read_text()
    assert code == 0, said[-2000:]
    return said


@pytest.mark.slow
def test_many_epochs_with_fresh_workers_do_not_hang(tmp_path: Path) -> None:
    in_a_process_of_its_own(tmp_path, __file__, "12", str(tmp_path), seconds=100)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_epochs_with_fresh_workers_do_not_hang(tmp_path: Path) -> None:
    in_a_process_of_its_own(tmp_path, __file__, "1000", str(tmp_path), seconds=1700)


@pytest.mark.slow
def test_workers_are_started_the_way_that_the_user_chose(tmp_path: Path) -> None:
    loader = DataLoader(Quiet(), batch_size=2, num_workers=1, multiprocessing_context="forkserver")
    seen: list[str] = []
    others = multiprocessing.active_children()  # workers of loaders that other tests have left

    class Look(Trainer):
        def training_step(self, batch: Any) -> Any:
            children = multiprocessing.active_children()
            seen.extend(type(each).__name__ for each in children if each not in others)
            return super().training_step(batch)

    assert tiny_trainer(Look).train(loader, epochs=1).status == "completed"
    assert set(seen) == {"ForkServerProcess"}
    assert loader.multiprocessing_context is not None


LEAVING = """
import ctypes, logging, multiprocessing, os, sys
import torch
from torch.utils.data import DataLoader
from offloop.engine.data import workers
from offloop.engine.testing import tiny_loader, tiny_trainer

workers.PATIENCE = 0.2
logging.getLogger("offloop").setLevel("ERROR")  # on a busy machine the run says that it waits for its data

class Samples(torch.utils.data.Dataset):
    samples = tiny_loader(12).dataset
    def __init__(self, hangs_at):
        self.hangs_at = hangs_at
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, index):
        if index == self.hangs_at:
            mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            for _ in range(2):  # the second time for ever, and no handler of Python's is run there
                libc.pthread_mutex_lock(mutex)
        return self.samples[index]

def train(hangs_at):
    global loader  # so that its workers are there to the end
    torch.set_num_threads(1)
    loader = DataLoader(Samples(hangs_at), batch_size=4, num_workers=2, persistent_workers=True, prefetch_factor=8)
    result = tiny_trainer().train(loader, max_steps=2)
    os.write(1, f"{result.status} {len(multiprocessing.active_children())}\\n".encode())

for hangs_at in (-1, 32):  # none, or the ninth batch, which is loaded ahead
    child = multiprocessing.get_context("fork").Process(target=train, args=(hangs_at,))
    child.start()
    child.join()
    print(child.exitcode, flush=True)
train(-1)
"""


@pytest.mark.slow
def test_spared_workers_keep_no_process_from_leaving(tmp_path: Path) -> None:
    """Neither the main one nor one of multiprocessing's, which end in ways of their own; nor if a worker hangs."""
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    said = in_a_process_of_its_own(tmp_path, str(script), seconds=100)
    assert said.splitlines() == ["completed 2", "0", "completed 2", "0", "completed 2"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    many_epochs(int(sys.argv[1]), Path(sys.argv[2]))
