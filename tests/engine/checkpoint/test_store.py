"""The store: names, refs, tags, one writer at a time, whatever happens to the last one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoint_support import loaded_step, save, small_state, step_of

from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointRequest,
    CheckpointStore,
    Retention,
    RunLockedError,
    SnapshotArena,
    list_runs,
)
from offloop.engine.checkpoint.format import combine_crc32
from offloop.engine.checkpoint.lock import Owner, _boot_id


def test_a_checkpoint_can_be_found_in_every_way(run_directory: Path) -> None:
    policy = Retention(keep_last=None, monitor="loss")
    with CheckpointStore(run_directory, retention=policy) as store:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7)):
            save(store, step, metrics={"loss": loss}, tags=("first",) if step == 1 else ())
    reader = CheckpointReader(run_directory)
    assert [info.step for info in reader.checkpoints()] == [1, 2, 3]
    expected = {"last": 3, "best": 2, "first": 1, "step-000000002-a1": 2, 2: 2}
    for which, step in expected.items():
        assert reader.find(which).step == step  # type: ignore[arg-type]  # str or int
        assert step_of(reader.load(which).state) == step  # type: ignore[arg-type]  # str or int
    path = reader.find(2).path
    assert reader.find(path).step == reader.find(str(path)).step == 2
    assert reader.find("best").metrics == {"loss": 0.1}
    assert reader.find("best").bytes > 100


def test_what_is_not_there_is_named_with_what_is(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
            store.find("last")
        save(store, 1)
        for which in ("best", "v1", 7, "../refs", run_directory / "nowhere", "../../etc/passwd"):
            with pytest.raises(CheckpointNotFoundError):
                store.find(which)
        with pytest.raises(CheckpointNotFoundError, match="step-000000001-a1"):
            store.find("v1")


def test_reading_needs_no_lock_and_an_empty_place_is_no_error(tmp_path: Path) -> None:
    assert CheckpointReader(tmp_path / "none").checkpoints() == []
    assert list_runs(tmp_path / "none") == []
    with CheckpointStore(tmp_path / "b") as store, CheckpointStore(tmp_path / "a"):
        save(store, 1)
        (tmp_path / "file").touch()
        assert [run.directory.name for run in list_runs(tmp_path)] == ["a", "b"]
        assert list_runs(tmp_path)[1].find().step == 1


def test_the_same_step_twice_makes_two_checkpoints(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        assert save(store, 1).info.name == "step-000000001-a1"
        assert save(store, 1).info.name == "step-000000001-a1-2"
        assert save(store, 1, attempt=2).info.name == "step-000000001-a2"
        assert store.find(1).name == "step-000000001-a2"


def test_the_last_one_is_the_last_committed_even_at_a_lower_step(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        save(store, 200)
        save(store, 100, attempt=2)
        assert store.find("last").step == 100
    assert (run_directory / "refs" / "last").read_text() == "step-000000100-a2\n"


def test_tags_pin_move_and_go(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        save(store, 1)
        store.tag("v1")
        for step in (2, 3, 4, 5):
            save(store, step)
        assert [info.step for info in store.checkpoints()] == [1, 4, 5]
        assert store.tags() == {"v1": "step-000000001-a1"}
        store.tag("v1", 1)
        with pytest.raises(ValueError, match="move=True"):
            store.tag("v1", 5)
        store.tag("v1", 5, move=True)
        save(store, 6)
        assert [info.step for info in store.checkpoints()] == [5, 6]
        store.untag("v1")
        store.untag("v1")
        assert store.tags() == {}


@pytest.mark.parametrize("tag", ["", "last", "best", "must", "a/b", "..", ".hidden", "x" * 65, "é"])
def test_improper_tags_are_refused(run_directory: Path, tag: str) -> None:
    with CheckpointStore(run_directory) as store:
        with pytest.raises(ValueError, match="tag must be"):
            save(store, 1, tags=(tag,))
        assert store.checkpoints() == []


def test_the_one_resumed_from_stays(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        for step in (1, 2):
            save(store, step)
        parent = store.find(1).name
        store.pin(parent)
        for step in (3, 4, 5):
            save(store, step, attempt=2)
        assert [info.step for info in store.checkpoints()] == [1, 4, 5]
    with CheckpointStore(run_directory) as store:
        save(store, 6, attempt=2, parent=parent)
        assert 1 in [info.step for info in store.checkpoints()]
        save(store, 7, attempt=2)
        assert [info.step for info in store.checkpoints()] == [6, 7]


def test_damaged_ones_are_not_counted_when_old_ones_are_deleted(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        for step in (1, 2):
            save(store, step)
        os.truncate(store.find(2).path / "model.safetensors", 10)
        save(store, 3)
        assert [info.step for info in store.checkpoints()] == [1, 2, 3]
        save(store, 4)
        assert [info.step for info in store.checkpoints()] == [2, 3, 4]


def test_leftovers_are_swept_and_strange_names_left_alone(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        save(store, 1)
    checkpoints = run_directory / "checkpoints"
    for name in (".tmp-x", ".trash-y", ".bad-z", "mine"):
        (checkpoints / name / "inner").mkdir(parents=True)
        (checkpoints / name / "inner" / "file").touch()
    (checkpoints / ".tmp-link").symlink_to(run_directory.parent)
    (run_directory / "refs" / ".tmp-last-3").touch()
    CheckpointStore(run_directory).close()
    assert sorted(os.listdir(checkpoints)) == [".bad-z", "mine", "step-000000001-a1"]
    assert sorted(os.listdir(run_directory / "refs")) == ["last", "tags"]


def test_lost_and_wrong_refs_are_mended(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        save(store, 1)
        save(store, 2)
    (run_directory / "refs" / "last").write_text("../../etc/passwd\n")
    assert CheckpointReader(run_directory).find("last").step == 2
    CheckpointStore(run_directory).close()
    assert (run_directory / "refs" / "last").read_text() == "step-000000002-a1\n"


def test_extra_facts_and_odd_metrics_survive(run_directory: Path) -> None:
    with (
        CheckpointStore(run_directory, engine_version="1.2") as store,
        SnapshotArena().take(small_state(1)) as snapshot,
    ):
        request = CheckpointRequest(
            step=1,
            epoch=2,
            batch=3,
            run_id="run",
            reason="manual",
            metrics={"a": float("nan"), "b": float("-inf")},
            extra={"python": (3, 11), "seeds": {0: 2**80}},
        )
        store.commit(snapshot, request)
        loaded = store.load()
    manifest = loaded.info.manifest
    assert (manifest.epoch, manifest.batch, manifest.run_id) == (2, 3, "run")
    assert manifest.engine_version == "1.2" and manifest.reason == "manual"
    assert loaded.info.metrics["a"] != loaded.info.metrics["a"]
    assert loaded.info.metrics["b"] == float("-inf")
    assert loaded.extra == request.extra
    line = (loaded.info.path / "MANIFEST.json").read_text().splitlines()[0]
    assert json.loads(line)["tensors"]["model.weight"]["crc32"]


def test_second_store_on_a_run_is_refused(run_directory: Path) -> None:
    with CheckpointStore(run_directory):
        with pytest.raises(RunLockedError, match=str(os.getpid())) as caught:
            CheckpointStore(run_directory)
        assert str(os.getpid()) in caught.value.owner
    store = CheckpointStore(run_directory)
    store.close()
    store.close()
    with pytest.raises(CheckpointError, match="closed"):
        save(store, 1)
    with pytest.raises(CheckpointError, match="closed"):
        store.tag("v1")


HOLDER = """
    import os, sys, time
    from offloop.engine.checkpoint import CheckpointStore
    store = CheckpointStore(sys.argv[1])
    if os.fork() == 0:  # a loader worker that outlives its parent
        print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock_even_if_its_children_live(run_directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(run_directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=str(process.pid)):
            CheckpointStore(run_directory)
        process.kill()
        process.wait()
        with CheckpointStore(run_directory) as store:
            save(store, 1)
        assert loaded_step(run_directory) == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_owners_that_cannot_be_alive_are_known() -> None:
    import socket

    host, boot = socket.gethostname(), _boot_id()
    assert not Owner(os.getpid(), host, boot, 0.0).is_gone()
    assert Owner(os.getpid(), host, "another boot", 0.0).is_gone()
    assert Owner(2**22 + 1, host, boot, 0.0).is_gone()
    assert not Owner(2**22 + 1, "elsewhere", boot, 0.0).is_gone()


def test_checksums_of_parts_make_the_checksum_of_the_whole(run_directory: Path) -> None:
    import random
    import zlib

    source = random.Random(0)
    for size in (0, 1, 2, 3, 255, 4096, 100_001):
        a, b = source.randbytes(100), source.randbytes(size)
        assert combine_crc32(zlib.crc32(a), zlib.crc32(b), size) == zlib.crc32(a + b)
    with CheckpointStore(run_directory) as store:
        info = save(store, 1).info
    for name, record in info.manifest.files.items():
        assert zlib.crc32((info.path / name).read_bytes()) == record.crc32


def test_listing_and_verifying_import_no_torch_and_nothing_imports_pickle(
    run_directory: Path,
) -> None:
    with CheckpointStore(run_directory) as store:
        save(store, 1)
    code = """
        import sys
        import offloop.engine
        before = set(sys.modules)
        from offloop.engine.checkpoint import CheckpointReader
        reader = CheckpointReader(sys.argv[1])
        reader.verify(reader.checkpoints()[0])
        print({"torch", "pickle"} & (set(sys.modules) - before))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(run_directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "set()\n", result.stderr
