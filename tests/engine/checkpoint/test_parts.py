"""One checkpoint written by several ranks: one directory, one manifest, and nobody talks but through the store."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import (
    DyingFileSystem,
    FailingFileSystem,
    Killed,
    QuotaFileSystem,
    in_manifest,
    loaded_step,
    save,
    small_state,
    step_of,
)
from rank_support import Rank, Stores, check_part, part_of, save_first

from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointReader,
    CheckpointRequest,
    CheckpointStore,
    CheckpointWriteError,
    Retention,
    SnapshotArena,
)
from offloop.engine.checkpoint import parts as parts_module
from offloop.engine.checkpoint.manifest import decode_manifest
from offloop.engine.checkpoint.part_store import PartStore
from offloop.engine.checkpoint.parts import PIECE_BYTES, Outcome, Part, meeting_place


@pytest.fixture
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.close()


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory / "checkpoints") if name.startswith(".")]


def test_parts_of_all_ranks_stand_in_one_checkpoint(run_directory: Path, stores: Stores) -> None:
    first = stores.channel(0, 3)
    others = [Rank(run_directory, stores.channel(rank, 3)) for rank in (1, 2)]
    with CheckpointStore(run_directory, ranks=first) as store:
        with others[0].saving(7, 1), others[1].saving(7, 1):
            commit = save_first(store, first, 7, 1)
        assert [each.outcomes for each in others] == [[Outcome(path=str(commit.info.path), step=7)]] * 2
        assert hidden(run_directory) == []
    manifest = commit.info.manifest
    assert (manifest.format_version, manifest.min_reader, manifest.ranks) == (2, 2, 3)
    assert [name for name in sorted(manifest.files) if name.startswith("rank")] == [
        "rank-00001-of-00003.json",
        "rank-00001-of-00003.safetensors",
        "rank-00002-of-00003.json",
        "rank-00002-of-00003.safetensors",
    ]
    reader = CheckpointReader(run_directory)
    reader.verify("last")
    loaded = reader.load()
    assert step_of(loaded.state) == 7
    assert sorted(loaded.parts) == [1, 2]
    for rank, part in loaded.parts.items():
        check_part(part, 7, rank)
    ((rank, part),) = reader.load(ranks=[2]).parts.items()
    check_part(part, 7, rank)
    assert reader.load(ranks=[]).parts == {}
    assert reader.load_part("last", "step") == 7
    assert stores.keys() == 0


def test_checkpoint_of_one_process_says_nothing_of_ranks(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        commit = save(store, 1)
    content = (commit.info.path / "MANIFEST.json").read_bytes()
    assert b'"format_version":1,"min_reader":1' in content and b"world_size" not in content
    assert commit.info.manifest.ranks == 1
    assert CheckpointReader(run_directory).load().parts == {}


def test_rank_that_cannot_write_fails_the_save_for_all_and_the_next_one_works(
    run_directory: Path, stores: Stores
) -> None:
    first = stores.channel(0)
    other = Rank(run_directory, stores.channel(1), QuotaFileSystem(100, is_open=True))
    with CheckpointStore(run_directory, ranks=first) as store:
        with other.saving(1, 1), pytest.raises(CheckpointWriteError, match="rank 1: DiskFullError"):
            save_first(store, first, 1, 1)
        assert "rank 1: DiskFullError" in other.outcomes[0].error
        assert hidden(run_directory) == [] and store.checkpoints() == []
        other.filesystem = None
        with other.saving(2, 2):
            save_first(store, first, 2, 2)
        assert hidden(run_directory) == []
    assert loaded_step(run_directory) == 2


def test_first_rank_that_cannot_write_tells_the_others(run_directory: Path, stores: Stores) -> None:
    """The part is there already, or comes later: nothing of it stays."""
    for is_late in (False, True):
        first, other = (
            stores.channel(0, run=str(is_late)),
            Rank(run_directory, stores.channel(1, run=str(is_late))),
        )
        with CheckpointStore(
            run_directory, ranks=first, filesystem=QuotaFileSystem(10, is_open=False)
        ) as store:
            if is_late:
                with pytest.raises(CheckpointWriteError):
                    save_first(store, first, 1, 1)
                other.save(1, 1)
            else:
                with other.saving(1, 1), pytest.raises(CheckpointWriteError):
                    save_first(store, first, 1, 1)
            assert "needs" in other.outcomes[0].error
            assert hidden(run_directory) == []
    assert stores.keys() == 0


def test_save_that_fails_leaves_what_a_faster_rank_writes_for_the_next_one(
    run_directory: Path, stores: Stores
) -> None:
    first, channel = stores.channel(0), stores.channel(1)
    other = Rank(run_directory, channel)
    with CheckpointStore(run_directory, ranks=first) as store:
        # Its part of the first save fails; that of the second is on the disk already
        channel.report(1, Part(error="no"))
        with other.saving(2, 2):
            ahead = run_directory / "checkpoints" / meeting_place(CheckpointRequest(step=2, number=2))
            while not channel._check([channel._part_key(2, 1)]):
                pass
            with pytest.raises(CheckpointWriteError, match="rank 1: no"):
                save_first(store, first, 1, 1)
            assert hidden(run_directory) == [ahead.name]
            save_first(store, first, 2, 2)
        assert hidden(run_directory) == []
    check_part(CheckpointReader(run_directory).load().parts[1], 2, 1)


def test_leftovers_are_swept_beside_a_rank_that_writes_already(run_directory: Path, stores: Stores) -> None:
    """Something could not be deleted at the start, and is tried again with the first save."""
    first, channel = stores.channel(0), stores.channel(1)
    other = Rank(run_directory, channel)
    leftover = run_directory / "checkpoints" / ".trash-old"
    with CheckpointStore(run_directory, ranks=first) as store:
        leftover.mkdir()
        store._has_leftovers = True
        with other.saving(1, 1):
            while not channel._check([channel._part_key(1, 1)]):
                pass
            save_first(store, first, 1, 1)
        assert hidden(run_directory) == []
    check_part(CheckpointReader(run_directory).load().parts[1], 1, 1)


def test_wait_for_a_part_ends_when_a_rank_has_failed_or_takes_too_long(
    run_directory: Path, stores: Stores
) -> None:
    failed: list[str] = []
    first = stores.channel(0, 3, give_up=lambda: "".join(failed))
    with CheckpointStore(run_directory, ranks=first) as store:
        failed.append("rank 2 has failed")
        with pytest.raises(CheckpointWriteError, match="part of ranks 1, 2 did not come: rank 2 has failed"):
            save_first(store, first, 1, 1)
        assert hidden(run_directory) == []
    slow = stores.channel(0, run="slow", timeout=0.01)
    with CheckpointStore(run_directory, ranks=slow) as store:
        with pytest.raises(CheckpointWriteError, match=r"part of rank 1 did not come: 0\.01 s"):
            save_first(store, slow, 1, 1)
    other = Rank(run_directory, stores.channel(1, run="alone", give_up=lambda: "rank 0 has failed"))
    other.save(1, 1)
    assert other.outcomes[0].error.endswith("rank 0 has failed")


def test_part_that_is_being_written_may_still_come(run_directory: Path, stores: Stores) -> None:
    """The run ends in haste, or fails, while a part is on its way."""
    looked = threading.Event()

    def give_up() -> str:
        looked.set()
        return "the run ends in haste"

    first, channel = stores.channel(0, give_up=give_up), stores.channel(1)
    other = Rank(run_directory, channel)

    def save_late() -> None:
        looked.wait(30)
        other.save(1, 1)

    late = threading.Thread(target=save_late, name="late")
    with CheckpointStore(run_directory, ranks=first) as store:
        late.start()
        save_first(store, first, 1, 1)
        late.join(30)
    assert loaded_step(run_directory) == 1


def test_rank_without_the_directory_sends_its_bytes(tmp_path: Path, stores: Stores) -> None:
    """More of them than fits into one value of the store."""
    first, channel = stores.channel(0), stores.channel(1, is_shared=False)
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    parts = PartStore(elsewhere, channel)
    large = torch.arange(2 * PIECE_BYTES, dtype=torch.int32)
    with CheckpointStore(directory, ranks=first) as store:
        state = {"ranks": {"1": {"large": large, **part_of(1, 1)}}}
        with SnapshotArena(slots=1, files=parts.files).take(state) as snapshot:
            parts.commit(snapshot, CheckpointRequest(step=1, number=1))
        save_first(store, first, 1, 1)
    assert channel.outcome(1).error == ""
    assert list(elsewhere.iterdir()) == []
    CheckpointReader(directory).verify("last")
    part: Any = CheckpointReader(directory).load().parts[1]
    assert torch.equal(part["large"], large)
    check_part(part, 1, 1)
    assert stores.keys() == 0


def test_rank_that_only_believes_to_share_the_directory_is_found_out(tmp_path: Path, stores: Stores) -> None:
    first, other = stores.channel(0), Rank(tmp_path / "elsewhere", stores.channel(1))
    (tmp_path / "elsewhere" / "checkpoints").mkdir(parents=True)
    with CheckpointStore(tmp_path / "run", ranks=first) as store:
        with other.saving(1, 1), pytest.raises(CheckpointWriteError, match="rank 0 does not see it"):
            save_first(store, first, 1, 1)
    assert hidden(tmp_path / "elsewhere") == []


@pytest.fixture
def checkpoint(run_directory: Path, stores: Stores) -> Path:
    """A checkpoint of two ranks."""
    first, other = stores.channel(0), Rank(run_directory, stores.channel(1))
    with CheckpointStore(run_directory, ranks=first) as store, other.saving(3, 1):
        return save_first(store, first, 3, 1).info.path


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_damage_in_a_part_is_found(checkpoint: Path, ending: str) -> None:
    reader = CheckpointReader(checkpoint.parent.parent)
    name = f"rank-00001-of-00002.{ending}"
    content = (checkpoint / name).read_bytes()
    kinds: dict[str, bytes | None] = {
        "checksum": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        "truncated": content[:-1],
        "missing": None,
    }
    for kind, damaged in kinds.items():
        (checkpoint / name).unlink()
        if damaged is not None:
            (checkpoint / name).write_bytes(damaged)
        for check in (lambda: reader.verify("last"), lambda: reader.load(), lambda: reader.load(ranks=[1])):
            with pytest.raises(CheckpointCorruptError, match=name) as raised:
                check()
            assert raised.value.kind == kind
        # Weights are read from the common part
        assert step_of(reader.load(ranks=[]).state) == 3
        (checkpoint / name).write_bytes(content)
    reader.verify("last")


@pytest.mark.parametrize(
    ("world_size", "text"),
    [(3, "it is of another one"), (2**60, "it is of another one"), (0, "not a manifest"), (1, None)],
)
def test_manifest_that_lies_about_ranks_is_refused(
    checkpoint: Path, world_size: int, text: str | None
) -> None:
    in_manifest("world_size", value=world_size)(checkpoint)
    reader = CheckpointReader(checkpoint.parent.parent)
    if text is None:
        assert step_of(reader.load().state) == 3
        return
    with pytest.raises(CheckpointCorruptError, match=text):
        reader.load("last", on_corrupt="fallback")


def test_part_of_another_rank_is_refused(run_directory: Path, stores: Stores) -> None:
    first, channel = stores.channel(0), stores.channel(1)
    parts = PartStore(run_directory, channel)
    with CheckpointStore(run_directory, ranks=first) as store:
        with SnapshotArena(slots=1, files=parts.files).take({"ranks": {"2": {"a": 1}}}) as snapshot:
            parts.commit(snapshot, CheckpointRequest(step=1, number=1))
        save_first(store, first, 1, 1)
    with pytest.raises(CheckpointCorruptError, match="it is not the part of rank 1"):
        CheckpointReader(run_directory).load()


def die_on_one_rank(directory: Path, die_at: int, *, on_first: bool, run: str, stores: Stores) -> bool:
    """Save with two ranks of which one stops at its n-th operation; return whether it got through."""
    dying = DyingFileSystem(die_at)
    dead: list[str] = []
    first = stores.channel(0, run=run, give_up=lambda: "".join(dead))
    second = stores.channel(1, run=run, give_up=lambda: "".join(dead))
    other = Rank(directory, second, None if on_first else dying)
    store = None
    try:
        store = CheckpointStore(
            directory,
            ranks=first,
            filesystem=dying if on_first else None,
            retention=Retention(keep_last=2),
        )
        with other.saving(4, 1):
            if not on_first:
                # Its writer has died, which rank 0 hears from its signs of life
                watch = _Watch(other, dead)
                first._give_up = watch
            try:
                save_first(store, first, 4, 1)
            except Killed:
                dead.append("rank 0 has died")
                raise
    except (Killed, CheckpointWriteError):
        return False
    finally:
        if store is not None:
            store.close()
    return other.failure is None


class _Watch:
    """Says that a rank has died once its thread has ended so."""

    def __init__(self, rank: Rank, dead: list[str]) -> None:
        self._rank, self._dead = rank, dead

    def __call__(self) -> str:
        if isinstance(self._rank.failure, Killed):
            self._dead.append("rank 1 has died")
        return "".join(self._dead[:1])


@pytest.mark.parametrize("on_first", [True, False], ids=["rank 0", "rank 1"])
def test_death_at_any_operation_of_a_save_on_either_rank_leaves_old_or_new(
    tmp_path: Path, stores: Stores, on_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is whole, and the next start sweeps the rest."""
    monkeypatch.setattr(parts_module, "LAST_MOMENT", 0.0)
    retention = Retention(keep_last=2)
    template = tmp_path / "template"
    channel = stores.channel(0, run="template")
    other = Rank(template, stores.channel(1, run="template"))
    with CheckpointStore(template, retention=retention, ranks=channel) as store:
        for number in (1, 2, 3):
            with other.saving(number, number, attempt=0):
                save_first(store, channel, number, number, attempt=0)
    outcomes: list[int] = []
    for die_at in range(1000):
        directory = tmp_path / str(die_at)
        shutil.copytree(template, directory)
        is_through = die_on_one_rank(
            directory, die_at, on_first=on_first, run=f"{on_first}/{die_at}", stores=stores
        )
        reader = CheckpointReader(directory)
        step = loaded_step(directory)
        outcomes.append(step)
        assert len(reader.checkpoints()) >= 2 and reader.damaged() == []
        for info in reader.checkpoints():
            reader.verify(info)
            check_part(reader.load(info.path).parts[1], info.step, 1)
        with CheckpointStore(directory, retention=retention) as store:
            assert step_of(store.load().state) == step
            assert hidden(directory) == []
        if is_through:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}
    assert len(outcomes) > (30 if on_first else 6)


@pytest.mark.parametrize("on_first", [True, False], ids=["rank 0", "rank 1"])
def test_failure_of_any_operation_on_either_rank_fails_one_save_for_all(
    tmp_path: Path, stores: Stores, on_first: bool
) -> None:
    for fail_at in range(1000):
        directory, run = tmp_path / str(fail_at), f"{on_first}/{fail_at}"
        failing = FailingFileSystem(10**6, 5)
        first = stores.channel(0, run=run)
        other = Rank(directory, stores.channel(1, run=run), None if on_first else failing)
        with CheckpointStore(directory, ranks=first, filesystem=failing if on_first else None) as store:
            failing.fail_at = failing.count + fail_at
            with other.saving(1, 1):
                try:
                    save_first(store, first, 1, 1)
                    is_saved = True
                except CheckpointWriteError:
                    is_saved = False
            assert other.failure is None
            assert (other.outcomes[0].error == "") == is_saved
            assert [info.step for info in store.checkpoints()] == [1] * is_saved
            failing.fail_at = 10**6
            with other.saving(2, 2):
                save_first(store, first, 2, 2)
            assert hidden(directory) == []
        assert loaded_step(directory) == 2
        shutil.rmtree(directory)
        if is_saved and not failing.failed:
            break
    assert fail_at > (10 if on_first else 6)


def test_manifest_names_the_whole_of_every_part(checkpoint: Path) -> None:
    manifest = decode_manifest((checkpoint / "MANIFEST.json").read_bytes(), checkpoint)
    of_rank = {path: each for path, each in manifest.tensors.items() if path.startswith("ranks.1.")}
    assert {each.file for each in of_rank.values()} == {"rank-00001-of-00002.safetensors"}
    assert set(manifest.tensors) - set(of_rank) and all(path.startswith("ranks.1.") for path in of_rank)
    assert small_state(3)
