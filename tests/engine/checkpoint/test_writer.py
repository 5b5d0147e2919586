"""The writing thread: in order, bounded, never silent, and never a torn snapshot."""

import errno
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_support import FailingFileSystem, VolatileFileSystem, loaded_step, small_state

from offloop.engine.checkpoint import (
    CheckpointDeadlineError,
    CheckpointError,
    CheckpointRequest,
    CheckpointStore,
    CheckpointWriteError,
    CheckpointWriter,
    Commit,
    DiskFullError,
    SnapshotArena,
    SnapshotBusyError,
    WriterDiedError,
)
from offloop.engine.checkpoint.filesystem import FileSystem


class Recorder:
    """Collects what the writer reports."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.failed: list[tuple[int, CheckpointError]] = []

    def on_saved(self, request: CheckpointRequest, commit: Commit) -> None:
        assert commit.info.step == request.step
        self.saved.append(request.step)

    def on_failed(self, request: CheckpointRequest, error: CheckpointError) -> None:
        self.failed.append((request.step, error))


class GatedFileSystem(FileSystem):
    """Writes nothing until the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_waiting = threading.Event()

    def write(self, file: int, data: memoryview) -> int:
        self.is_waiting.set()
        assert self.gate.wait(30)
        return super().write(file, data)


def test_snapshots_are_saved_in_order(run_directory: Path) -> None:
    recorder, arena = Recorder(), SnapshotArena()
    with CheckpointStore(run_directory) as store:
        writer = CheckpointWriter(store, on_saved=recorder.on_saved, on_failed=recorder.on_failed)
        for step in range(1, 8):
            writer.submit_nowait(arena.take(small_state(step)), CheckpointRequest(step=step))
        writer.flush(30)
        assert writer.pending == 0
        assert recorder.saved == [1, 2, 3, 4, 5, 6, 7] and not recorder.failed
        writer.close(30)
        writer.close(30)
        with pytest.raises(WriterDiedError), arena.take(small_state(8)) as snapshot:
            writer.submit_nowait(snapshot, CheckpointRequest(step=8))
    assert loaded_step(run_directory) == 7


def test_a_slow_disk_costs_skips_and_no_memory(run_directory: Path) -> None:
    filesystem = GatedFileSystem()
    recorder, arena = Recorder(), SnapshotArena(slots=2)
    with CheckpointStore(run_directory, filesystem=filesystem) as store:
        writer = CheckpointWriter(store, on_saved=recorder.on_saved, on_failed=recorder.on_failed)
        skipped = 0
        for step in range(100):
            try:
                snapshot = arena.take_nowait(small_state(step))
            except SnapshotBusyError:
                skipped += 1
                continue
            writer.submit_nowait(snapshot, CheckpointRequest(step=step))
        assert skipped == 98 and writer.pending == 2
        with pytest.raises(CheckpointDeadlineError) as caught:
            writer.flush(0.01)
        assert caught.value.pending == 2
        with pytest.raises(SnapshotBusyError):
            arena.take(small_state(100), timeout=0.01)
        threading.Thread(target=filesystem.gate.set).start()
        writer.submit_nowait(arena.take(small_state(100)), CheckpointRequest(step=100))
        writer.close(30)
    assert recorder.saved == [0, 1, 100]


def test_the_queue_is_bounded(run_directory: Path) -> None:
    filesystem, recorder = GatedFileSystem(), Recorder()
    with CheckpointStore(run_directory, filesystem=filesystem) as store:
        writer = CheckpointWriter(
            store, on_saved=recorder.on_saved, on_failed=recorder.on_failed, queue_size=1
        )
        arena = SnapshotArena(slots=3)
        writer.submit_nowait(arena.take(small_state(1)), CheckpointRequest(step=1))
        with arena.take(small_state(2)) as second:
            with pytest.raises(SnapshotBusyError):
                writer.submit_nowait(second, CheckpointRequest(step=2))
        filesystem.gate.set()
        writer.close(30)
    with pytest.raises(ValueError, match="queue_size"):
        CheckpointWriter(store, on_saved=recorder.on_saved, on_failed=recorder.on_failed, queue_size=0)


def test_calls_come_in_their_turn_and_take_no_snapshots_place(
    run_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem, recorder, said = GatedFileSystem(), Recorder(), list[object]()

    def fail(death: WriterDiedError | None) -> None:
        raise RuntimeError("a call that fails")

    with CheckpointStore(run_directory, filesystem=filesystem) as store:
        writer = CheckpointWriter(
            store, on_saved=recorder.on_saved, on_failed=recorder.on_failed, queue_size=2
        )
        arena = SnapshotArena()
        writer.submit_nowait(arena.take(small_state(1)), CheckpointRequest(step=1))
        for _ in range(10):
            writer.call_nowait(lambda death: said.append((death, list(recorder.saved))))
        writer.call_nowait(fail)
        writer.submit_nowait(arena.take(small_state(2)), CheckpointRequest(step=2))
        writer.call_nowait(lambda death: said.append((death, list(recorder.saved))))
        assert not said
        filesystem.gate.set()
        writer.close(30)
        with pytest.raises(WriterDiedError):
            writer.call_nowait(fail)
    assert said == [(None, [1])] * 10 + [(None, [1, 2])]
    assert "a function in the checkpoint writer failed" in caplog.messages


def test_failures_are_reported_and_the_next_save_works(run_directory: Path) -> None:
    filesystem = FailingFileSystem(1 << 60, errno.ENOSPC)
    recorder, arena = Recorder(), SnapshotArena(slots=1)
    with CheckpointStore(run_directory, filesystem=filesystem) as store:
        writer = CheckpointWriter(store, on_saved=recorder.on_saved, on_failed=recorder.on_failed)
        for step in range(1, 6):
            snapshot = arena.take(small_state(step), timeout=30)
            if step % 2 == 0:
                writer.flush(30)
                filesystem.fail_at = filesystem.count + step
            writer.submit_nowait(snapshot, CheckpointRequest(step=step))
        writer.close(30)
    assert recorder.saved == [1, 3, 5]
    assert [(step, type(error)) for step, error in recorder.failed] == [
        (2, DiskFullError),
        (4, DiskFullError),
    ]


def test_errors_that_are_not_ours_are_reported_too(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, arena = Recorder(), SnapshotArena(slots=1)
    with CheckpointStore(run_directory) as store:
        monkeypatch.setattr(store, "commit", lambda *_: 1 / 0)
        writer = CheckpointWriter(store, on_saved=recorder.on_saved, on_failed=recorder.on_failed)
        writer.submit_nowait(arena.take(small_state(1)), CheckpointRequest(step=1))
        writer.close(30)
    ((step, error),) = recorder.failed
    assert step == 1 and isinstance(error, CheckpointWriteError)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_failing_listener_is_logged_and_does_not_stop_the_writer(
    run_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("listener")

    with CheckpointStore(run_directory) as store:
        writer = CheckpointWriter(store, on_saved=fail, on_failed=fail)
        arena = SnapshotArena()
        for step in (1, 2):
            writer.submit_nowait(arena.take(small_state(step)), CheckpointRequest(step=step))
        writer.flush(30)
        store.commit = None  # type: ignore[assignment,method-assign]  # so that it fails
        writer.submit_nowait(arena.take(small_state(3)), CheckpointRequest(step=3))
        writer.close(30)
    assert loaded_step(run_directory) == 2
    assert "step 3 was not saved" in caplog.text and caplog.text.count("RuntimeError") >= 3


def test_a_writer_that_dies_says_so_and_frees_its_slots(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, arena = Recorder(), SnapshotArena(slots=3)
    start = threading.Event()

    told: list[WriterDiedError | None] = []

    def die(*_: object) -> None:
        start.wait(30)
        raise SystemExit

    with CheckpointStore(run_directory) as store:
        monkeypatch.setattr(store, "commit", die)
        writer = CheckpointWriter(store, on_saved=recorder.on_saved, on_failed=recorder.on_failed)
        for step in (1, 2, 3):
            writer.submit_nowait(arena.take(small_state(step)), CheckpointRequest(step=step))
        writer.call_nowait(told.append)
        start.set()
        with pytest.raises(WriterDiedError) as caught:
            writer.flush(30)
        assert isinstance(caught.value.__cause__, SystemExit)
        snapshots = [arena.take(small_state(4), timeout=30) for _ in range(3)]
        with pytest.raises(WriterDiedError):
            writer.submit_nowait(snapshots[0], CheckpointRequest(step=4))
        with pytest.raises(WriterDiedError):
            writer.close(30)
    writer._thread.join(30)
    assert [step for step, _ in recorder.failed] == [1, 2, 3]
    assert all(isinstance(error, WriterDiedError) for _, error in recorder.failed)
    assert [type(death) for death in told] == [WriterDiedError]


class SluggishFileSystem(VolatileFileSystem):
    """Many small writes, each giving the interpreter away."""

    def write(self, file: int, data: memoryview) -> int:
        os.sched_yield()
        return super().write(file, data[:512])


def test_a_thousand_checkpoints_of_a_running_training_are_never_torn(run_directory: Path) -> None:
    """The loop rewrites every tensor all the time; each checkpoint must hold one step only."""
    tensors = [torch.zeros(size, dtype=torch.int32) for size in (1, 7, 300, 3000)]
    tensors.append(tensors[2][100:200])  # shares memory
    state = {"model": dict(zip("abcde", tensors, strict=True)), "step": 0}
    wrong: list[object] = []
    saved: list[int] = []

    def on_saved(request: CheckpointRequest, commit: Commit) -> None:
        loaded = store.load(commit.info.path).state
        assert isinstance(loaded, dict)
        values = {int(v) for t in loaded["model"].values() for v in (t.min(), t.max())}
        if values | {loaded["step"]} != {request.step}:
            wrong.append((request, values))
        saved.append(request.step)

    with CheckpointStore(run_directory, filesystem=SluggishFileSystem()) as store:
        writer = CheckpointWriter(
            store, on_saved=on_saved, on_failed=lambda request, error: wrong.append(error)
        )
        arena = SnapshotArena(slots=2)
        for step in itertools.count(1):
            for tensor in tensors:
                tensor.fill_(step)
            state["step"] = step
            try:
                snapshot = arena.take(state, timeout=0.0 if step % 3 else 30)
            except SnapshotBusyError:
                continue
            writer.submit_nowait(snapshot, CheckpointRequest(step=step))
            if len(saved) >= 1000 or wrong:
                break
        writer.close(30)
    assert not wrong
    assert len(saved) >= 1000 and saved == sorted(saved)


FORGETFUL = """
    import sys
    from checkpoint_support import small_state
    from offloop.engine.checkpoint import *
    store = CheckpointStore(sys.argv[1])
    writer = CheckpointWriter(store, on_saved=print, on_failed=print)
    arena = SnapshotArena()
    writer.submit_nowait(arena.take(small_state(1)), CheckpointRequest(step=1))
"""


def test_a_program_that_forgets_to_close_still_saves_and_ends(run_directory: Path) -> None:
    paths = [str(Path(__file__).parent), *sys.path]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORGETFUL), str(run_directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert loaded_step(run_directory) == 1
