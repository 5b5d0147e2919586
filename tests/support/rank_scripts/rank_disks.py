"""Scenarios: the disk of rank 1 is full for a moment; then it does not see the directory of rank 0's runs.

That is as on two machines without a common disk.
"""

import ctypes
import errno
import os
from typing import Any

from rank_scripts.parts import adam, classifier, crc, loader, net, samples, weights
from rank_scripts.talk import RANK

from offloop.callbacks import ModelCheckpoint
from offloop.engine import CheckpointFailed, CheckpointSaved, Resumed
from offloop.engine.checkpoint import part_store
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.testing import Recorder

NEW_MOUNTS = 0x00020000
RECURSIVE_PRIVATE = 0x4000 | 0x40000
STEPS = 17
"""In the middle of the second epoch."""


def _hide(directory: str) -> bool:
    """Lay an empty file system of this thread over a directory; False where the machine does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs(directory, exist_ok=True)
    return bool(
        libc.unshare(NEW_MOUNTS) == 0
        and libc.mount(b"none", b"/", None, RECURSIVE_PRIVATE, None) == 0
        and libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, None) == 0
    )


def _train(name: str, *, max_steps: int | None = None, resume: str | None = None) -> Any:
    runs = os.environ["OFFLOOP_TEST_RUNS"]
    is_hidden = True
    # Threads that are started later have the same mounts
    if RANK == 1 and not os.path.ismount(runs):
        is_hidden = _hide(runs)
    model = net(dropout=0.3, batch_norm=True)
    trainer = classifier(model, adam(model), seed=11, run_dir=runs, run_name=name)
    recorder = Recorder()
    result = trainer.train(
        loader(samples(101), shuffle=True),
        loader(samples(29, seed=1)),
        epochs=3,
        metrics=["accuracy"],
        max_steps=max_steps,
        callbacks=[ModelCheckpoint(), recorder],
        resume=resume,
    )
    return {
        "steps": result.steps,
        "metrics": dict(result.metrics),
        "weights": weights(model),
        "buffers": crc(model.buffers()) if RANK == 0 else 0,
        "resumed": [(each.exactness, each.reasons) for each in recorder.of(Resumed)],
        "is_hidden": is_hidden,
        "sees": os.path.exists(os.path.join(runs, name, "run.json")),
    }


class FullOnce(FileSystem):
    """Has no room for the first write."""

    has_room = False

    def write(self, file: int, data: memoryview) -> int:
        if not FullOnce.has_room:
            FullOnce.has_room = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)


def full() -> Any:
    """The first checkpoint finds the disk of rank 1 full. Before anything is hidden."""
    if RANK == 1:
        vars(part_store)["FileSystem"] = FullOnce
    model = net()
    trainer = classifier(
        model, adam(model), seed=11, run_dir=os.environ["OFFLOOP_TEST_RUNS"], run_name="full"
    )
    recorder = Recorder()
    result = trainer.train(
        loader(samples(101)),
        loader(samples(29, seed=1)),
        epochs=3,
        callbacks=[ModelCheckpoint(), recorder],
    )
    return {
        "status": result.status,
        "failed": [(each.saved_step, each.error) for each in recorder.of(CheckpointFailed)],
        "saved": [each.saved_step for each in recorder.of(CheckpointSaved)],
    }


def whole() -> Any:
    """Never interrupted."""
    return _train("whole")


def cut() -> Any:
    """Ends in mid-epoch, with a last checkpoint."""
    return _train("cut", max_steps=STEPS)


def again() -> Any:
    """Continued."""
    return _train("cut", resume="must")
