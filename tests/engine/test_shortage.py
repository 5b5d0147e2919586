"""Runs that get no memory, no thread or no descriptor: the cause is told, and nothing is lost or left behind."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    CallbackFailed,
    CheckpointFailed,
    CheckpointSaved,
    EpochEnd,
    EpochStart,
    RemoteDirectory,
    Run,
    decides,
)
from offloop.engine.checkpoint import CheckpointReader, SnapshotMemoryError, WriterDiedError
from offloop.engine.checkpoint import snapshot as snapshot_module
from offloop.engine.paths import RUN_JSON
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

NO_THREAD = "can't start new thread"


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Have the system refuse threads of some names, so many times."""
    start = threading.Thread.start

    def refuse(*names: str, times: int = sys.maxsize) -> list[str]:
        refused: list[str] = []

        def start_or_refuse(thread: threading.Thread) -> None:
            if thread.name.startswith(names) and len(refused) < times:
                refused.append(thread.name)
                raise RuntimeError(NO_THREAD)  # what Python says when pids.max or ulimit -u is reached
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
        return refused

    return refuse


class Plain(Callback):
    """Needs a thread."""

    def __init__(self) -> None:
        self.handled: list[str] = []

    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        self.handled.append("start")

    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self.handled.append("end")

    def close(self) -> None:
        self.handled.append("closed")


# Threads ---------------------------------------------------------------------------------------------


def test_observer_without_a_thread_is_reported_and_closed(refuse: Callable[..., list[str]]) -> None:
    refuse("offloop-Plain")
    plain, recorder = Plain(), Recorder()
    result = tiny_trainer(drain_timeout=3600.0).train(tiny_loader(1), epochs=2, callbacks=[plain, recorder])
    assert result.status == "completed"
    assert {NO_THREAD in each for each in result.callback_errors["Plain"]} == {True}
    assert NO_THREAD in recorder.of(CallbackFailed)[0].error
    assert plain.handled == ["closed"]
    assert recorder.is_closed


def test_observer_goes_on_when_there_is_a_thread_again(refuse: Callable[..., list[str]]) -> None:
    refuse("offloop-Plain", times=1)
    plain, recorder = Plain(), Recorder()

    class Waits(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            recorder.wait_for(CallbackFailed)

    result = tiny_trainer().train(tiny_loader(1), epochs=2, callbacks=[plain, recorder, Waits()])
    assert len(result.callback_errors["Plain"]) == 1
    assert plain.handled[-2:] == ["end", "closed"]


def test_observer_that_may_fail_the_run_fails_it_for_want_of_a_thread(
    refuse: Callable[..., list[str]],
) -> None:
    class Must(Plain):
        on_error = "raise"

    refuse("offloop-Must")
    must = Must()
    trainer = tiny_trainer()
    with pytest.raises(RuntimeError, match=NO_THREAD):
        trainer.train(tiny_loader(1), epochs=2, callbacks=[must])
    assert must.handled == ["closed"]
    assert trainer.last_run is not None
    assert trainer.last_run.result.status == "failed"


def test_the_end_of_a_run_needs_no_thread(refuse: Callable[..., list[str]], tmp_path: Path) -> None:
    refused = refuse("offloop-finish-checkpoints", "offloop-run-json")
    result = tiny_trainer(run_dir=tmp_path).train(tiny_loader(1), epochs=1, callbacks=[ModelCheckpoint()])
    assert len(refused) == 2
    assert result.best is not None
    assert result.best.path is not None and Path(result.best.path).is_dir()
    assert result.dir is not None
    assert '"completed"' in (result.dir / RUN_JSON).read_text()


def test_checkpoint_without_a_thread_fails_and_the_next_one_is_saved(
    refuse: Callable[..., list[str]], tmp_path: Path
) -> None:
    refuse("offloop-checkpoint-writer", times=1)
    recorder, trainer = Recorder(), tiny_trainer(run_dir=tmp_path)
    result = trainer.train(
        tiny_loader(1), epochs=2, callbacks=[ModelCheckpoint(every_n_epochs=1, save_top_k=10), recorder]
    )
    assert result.status == "completed"
    (failed,) = recorder.of(CheckpointFailed)
    assert (failed.saved_step, NO_THREAD in failed.error) == (1, True)
    assert {each.saved_step for each in recorder.of(CheckpointSaved)} == {2}


def test_resume_without_a_thread_for_the_writer_says_so_and_leaves_no_lock(
    refuse: Callable[..., list[str]], tmp_path: Path
) -> None:
    trainer = tiny_trainer(run_dir=tmp_path, run_name="run")
    trainer.train(tiny_loader(1), epochs=1, callbacks=[ModelCheckpoint()])
    refuse("offloop-checkpoint-writer", times=1)
    with pytest.raises(WriterDiedError, match=NO_THREAD):
        trainer.train(tiny_loader(1), epochs=2, callbacks=[ModelCheckpoint()], resume="auto")
    assert trainer.train(tiny_loader(1), epochs=2, callbacks=[ModelCheckpoint()], resume="auto").steps == 2


@pytest.mark.parametrize("name", ["offloop-uploads", "offloop-claim"])
def test_run_without_a_thread_for_its_uploads_fails_at_once(
    refuse: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    refuse(name)
    trainer = tiny_trainer(
        run_dir=tmp_path / "here",
        remote_dir=RemoteDirectory(f"file://{tmp_path / 'there'}", timeout=3600.0),
    )
    recorder = Recorder()
    with pytest.raises(RuntimeError, match=NO_THREAD):
        trainer.train(tiny_loader(1), epochs=1, callbacks=[ModelCheckpoint(), recorder])
    assert recorder.names() == ["TrainEnd"]
    assert recorder.is_closed
    assert trainer.last_run is not None
    result = trainer.last_run.result
    assert result.status == "failed"
    assert result.dir is None or '"failed"' in (result.dir / RUN_JSON).read_text()


# Memory ----------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["Python", "torch on the host", "torch on a device"],
)
def no_memory(request: pytest.FixtureRequest) -> Iterator[Exception]:
    error: Exception = request.param
    yield error
    error.__traceback__ = None


def test_checkpoint_without_memory_for_its_copy_fails_and_the_run_goes_on(
    no_memory: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = snapshot_module._Slot.fit, []

    def fit_or_fail(slot: Any, *arguments: Any, **named: Any) -> None:
        calls.append(slot)
        if len(calls) == 1:
            raise no_memory
        fit(slot, *arguments, **named)

    monkeypatch.setattr(snapshot_module._Slot, "fit", fit_or_fail)
    recorder, trainer = Recorder(), tiny_trainer(run_dir=tmp_path)
    result = trainer.train(tiny_loader(4), epochs=1, callbacks=[ModelCheckpoint(every_n_steps=2), recorder])
    assert result.status == "completed"
    (failed,) = recorder.of(CheckpointFailed)
    assert failed.saved_step == 2
    assert failed.error.startswith(f"{SnapshotMemoryError.__name__}: no memory for a copy of the state")
    assert result.dir is not None
    assert {info.step for info in CheckpointReader(result.dir).checkpoints()} == {4}


def test_last_checkpoint_without_memory_does_not_fail_the_run(
    no_memory: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise no_memory

    monkeypatch.setattr(snapshot_module._Slot, "fit", fail)
    recorder, trainer = Recorder(), tiny_trainer(run_dir=tmp_path)
    result = trainer.train(tiny_loader(4), epochs=1, callbacks=[ModelCheckpoint(), recorder])
    assert result.status == "completed"
    assert recorder.of(CheckpointFailed)


def test_state_dict_without_memory_is_a_failed_checkpoint(no_memory: Exception, tmp_path: Path) -> None:
    class Short(Callback):
        def state_dict(self) -> dict[str, Any]:
            raise no_memory

    recorder, trainer = Recorder(), tiny_trainer(run_dir=tmp_path)
    result = trainer.train(tiny_loader(2), epochs=1, callbacks=[ModelCheckpoint(), Short(), recorder])
    assert result.status == "completed"
    assert type(no_memory).__name__ in recorder.of(CheckpointFailed)[0].error


def test_command_for_a_checkpoint_hears_that_there_is_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise MemoryError

    class Asks(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            self.future = run.checkpoint_nowait()

    monkeypatch.setattr(snapshot_module._Slot, "fit", fail)
    asks = Asks()
    assert tiny_trainer(run_dir=tmp_path).train(tiny_loader(1), epochs=1, callbacks=[asks]).steps == 1
    assert isinstance(asks.future.exception(0), SnapshotMemoryError)


# Descriptors -----------------------------------------------------------------------------------------

DESCRIPTORS = """
import errno, logging, os, resource, sys
from pathlib import Path
from offloop.callbacks import ModelCheckpoint
from offloop.engine.testing import tiny_loader, tiny_trainer

sys.unraisablehook = lambda unraisable: None  # asyncio's loop complains when it is made by halves
logging.getLogger("offloop").setLevel(logging.CRITICAL)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resume = RESUME
given = {"callbacks": [ModelCheckpoint()], "resume": resume}
tiny_trainer(run_dir="warm").train(tiny_loader(1), epochs=1, callbacks=[ModelCheckpoint()])
for free in range(100):
    trainer = tiny_trainer(run_dir="runs", run_name=f"run{free}")
    if resume:
        trainer.train(tiny_loader(1), epochs=1, callbacks=[ModelCheckpoint()])
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(free + 1)]
    for each in opened:
        os.close(each)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[-1], limits[1]))
    try:
        result = trainer.train(tiny_loader(1), epochs=2, **given)
        outcome = "with errors" if result.callback_errors else result.status
    except Exception as error:
        assert isinstance(error, OSError) or error.errno == errno.EMFILE, repr(error)
        outcome = "no descriptor"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    again = "auto" if Path("runs", f"run{free}").exists() else None
    assert trainer.train(tiny_loader(1), epochs=2, callbacks=[ModelCheckpoint()], resume=again).steps == 2
    print(outcome)
    if outcome == "completed" and free > 20:
        break
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts on numbers of descriptors")
@pytest.mark.parametrize("resume", [None, "auto"])
def test_run_without_descriptors_says_so_and_may_be_started_again(
    tmp_path: Path, warm_python: Any, resume: str | None
) -> None:
    """With no descriptor free, one, two, and so on: an error of the system at the start, and no lock is left."""
    script = tmp_path / "script.py"
    script.write_text(DESCRIPTORS.replace("RESUME", repr(resume)))
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split("\n")
    assert outcomes[0] == "no descriptor"
    assert outcomes[-2] == "completed"


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_resume_without_memory_or_descriptors_is_not_taken_for_a_damaged_checkpoint(
    error: Exception, tmp_path: Path
) -> None:
    class Short(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            raise error

    trainer = tiny_trainer(run_dir=tmp_path, run_name="run")
    given: dict[str, Any] = {"callbacks": [ModelCheckpoint(), Short()]}
    trainer.train(tiny_loader(1), epochs=1, **given)
    with pytest.raises(type(error)) as caught:
        trainer.train(tiny_loader(1), epochs=2, resume="auto", **given)
    assert caught.value is error
    error.__traceback__ = None
