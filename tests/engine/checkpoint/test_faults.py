"""Any operation of a save may fail: a typed error, the old ones are there, the next save works."""

import errno
import os
from pathlib import Path

import pytest
from checkpoint_support import (
    FailingFileSystem,
    QuotaFileSystem,
    StingyFileSystem,
    loaded_step,
    save,
    step_of,
)

from offloop.engine.checkpoint import (
    CheckpointReader,
    CheckpointStore,
    CheckpointWriteError,
    DiskFullError,
    Retention,
    SnapshotArena,
)
from offloop.engine.checkpoint.filesystem import FileSystem

NEVER = 1 << 60


def leftovers(directory: Path) -> list[str]:
    found = [
        *os.listdir(directory / "checkpoints"),
        *os.listdir(directory / "refs"),
        *os.listdir(directory / "refs" / "tags"),
    ]
    return [name for name in found if name.startswith(".")]


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_failure_of_any_operation_harms_nothing(tmp_path: Path, code: int, forever: bool) -> None:
    directory = tmp_path / "run"
    retention = Retention(keep_last=2)
    with CheckpointStore(directory, retention=retention) as store:
        for step in (1, 2):
            save(store, step)
    step = 2
    failures = successes = 0
    for fail_at in range(1000):
        filesystem = FailingFileSystem(NEVER, code, forever=forever)
        with CheckpointStore(directory, retention=retention, filesystem=filesystem) as store:
            filesystem.count, filesystem.fail_at = 0, fail_at
            try:
                commit = save(store, step + 1)
            except CheckpointWriteError as error:
                failures += 1
                assert isinstance(error, DiskFullError) == (code == errno.ENOSPC)
                assert error.errno == code
                # If nothing works any more, one that has its name already cannot be hidden again.
                assert loaded_step(directory) in ((step, step + 1) if forever else (step,))
                step = loaded_step(directory)
            else:
                successes += 1
                step += 1
                assert loaded_step(directory) == step
                assert bool(commit.problems) == bool(filesystem.failed)
            filesystem.fail_at, filesystem.forever = NEVER, False
            if not filesystem.failed:
                break
            step += 1
            assert not save(store, step).problems
            assert loaded_step(directory) == step
            assert not leftovers(directory)
            assert len(store.checkpoints()) == 2
    assert failures > 20 and successes > 5


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failure_of_any_operation_while_opening_is_typed(tmp_path: Path, code: int) -> None:
    for fail_at in range(100):
        directory = tmp_path / str(fail_at)
        filesystem = FailingFileSystem(fail_at, code)
        try:
            CheckpointStore(directory, filesystem=filesystem).close()
        except CheckpointWriteError as error:
            assert error.errno == code
        with CheckpointStore(directory) as store:  # neither locked nor spoiled
            save(store, 1)
        if not filesystem.failed:
            return
    pytest.fail("never got through")


def test_short_and_interrupted_writes_are_continued(run_directory: Path) -> None:
    with CheckpointStore(run_directory, filesystem=StingyFileSystem()) as store:
        save(store, 1)
        store.verify("last")
    assert loaded_step(run_directory) == 1


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(run_directory: Path) -> None:
    class Stuck(FileSystem):
        def write(self, file: int, data: memoryview) -> int:
            return 0

    with (
        CheckpointStore(run_directory, filesystem=Stuck()) as store,
        pytest.raises(CheckpointWriteError),
    ):
        save(store, 1)


@pytest.mark.parametrize("is_open", [True, False])
def test_full_disk_is_named_and_cleaned_up(run_directory: Path, is_open: bool) -> None:
    filesystem = QuotaFileSystem(1 << 30, is_open=is_open)
    with CheckpointStore(run_directory, filesystem=filesystem) as store:
        save(store, 1)
        filesystem.room = 1000
        with pytest.raises(DiskFullError) as caught:
            save(store, 2)
        assert caught.value.needed > 300
        assert (caught.value.free <= 1000) == is_open
        assert not leftovers(run_directory)
        filesystem.room = 1 << 30
        save(store, 3)
    assert loaded_step(run_directory) == 3


def test_full_disk_is_found_out_before_anything_is_written(run_directory: Path) -> None:
    class NoRoom(FileSystem):
        def free_bytes(self, path: Path) -> int:
            return 10

    with CheckpointStore(run_directory, filesystem=NoRoom()) as store:
        with pytest.raises(DiskFullError) as caught:
            save(store, 1)
        assert caught.value.free == 10 and caught.value.errno is None
        assert not os.listdir(run_directory / "checkpoints")


def test_full_disk_of_four_megabytes(tmp_path: Path) -> None:
    """A real one where this machine lets us mount it, else the quota above stands for it."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=4m tmpfs {mount} 2>/dev/null"):
        pytest.skip("no right to mount a file system")
    try:
        with CheckpointStore(mount / "run", retention=Retention(keep_last=None)) as store:
            (mount / "ballast").write_bytes(bytes(3_900_000))
            save(store, 1)
            with pytest.raises(DiskFullError):
                for step in range(2, 50):
                    save(store, step)
            newest = loaded_step(mount / "run")
            assert newest >= 1 and not leftovers(mount / "run")
            (mount / "ballast").unlink()
            save(store, newest + 1)
            assert loaded_step(mount / "run") == newest + 1
    finally:
        os.system(f"umount {mount}")


def test_a_failed_snapshot_may_be_committed_again(run_directory: Path) -> None:
    from checkpoint_support import small_state

    from offloop.engine.checkpoint import CheckpointRequest

    filesystem = FailingFileSystem(NEVER, errno.EIO)
    with (
        CheckpointStore(run_directory, filesystem=filesystem) as store,
        SnapshotArena().take(small_state(1)) as snapshot,
    ):
        filesystem.fail_at = filesystem.count + 4
        with pytest.raises(CheckpointWriteError):
            store.commit(snapshot, CheckpointRequest(step=1))
        store.commit(snapshot, CheckpointRequest(step=1))
        assert step_of(CheckpointReader(run_directory).load().state) == 1
