"""What is kept, as a function, and on a disk that dies between commit and deletion."""

import math
import shutil
from pathlib import Path

import pytest
from checkpoint_support import DyingFileSystem, Killed, save
from hypothesis import given
from hypothesis import strategies as st

from offloop.engine.checkpoint import CheckpointReader, CheckpointStore, Retention
from offloop.engine.checkpoint.manifest import ManifestHead, json_number
from offloop.engine.checkpoint.retention import rank, select_kept


def saved(serial: int, *, step: int | None = None, loss: float | None = None) -> ManifestHead:
    step = serial if step is None else step
    metrics = {} if loss is None else {"loss": json_number(loss)}
    return ManifestHead(
        name=f"step-{step:09d}-a1-{serial}",
        serial=serial,
        step=step,
        created=0.0,
        metrics=metrics,
        files={},
    )


def kept(checkpoints: list[ManifestHead], policy: Retention, **more: object) -> list[int]:
    names = select_kept(checkpoints, policy, **more)  # type: ignore[arg-type]  # a test's shorthand
    return [checkpoint.serial for checkpoint in checkpoints if checkpoint.name in names]


def test_the_newest_are_kept_by_order_of_commits_and_not_of_steps() -> None:
    checkpoints = [saved(1, step=100), saved(2, step=200), saved(3, step=50), saved(4, step=60)]
    assert kept(checkpoints, Retention(keep_last=2)) == [3, 4]
    assert kept(checkpoints, Retention(keep_last=3)) == [2, 3, 4]


def test_two_are_kept_however_few_are_asked_for() -> None:
    assert kept([saved(n) for n in range(5)], Retention(keep_last=1)) == [3, 4]
    assert kept([saved(1)], Retention(keep_last=1)) == [1]


def test_none_keeps_all() -> None:
    assert kept([saved(n) for n in range(5)], Retention(keep_last=None)) == [0, 1, 2, 3, 4]


def test_the_best_are_kept_and_nan_and_infinity_are_never_best() -> None:
    losses = [0.3, math.nan, 0.1, math.inf, 0.2, 0.9, 0.8]
    checkpoints = [saved(n, loss=loss) for n, loss in enumerate(losses)]
    policy = Retention(monitor="loss", save_top_k=2)
    assert kept(checkpoints, policy) == [2, 4, 5, 6]
    assert [c.serial for c in rank(checkpoints, policy)] == [2, 4, 0, 6, 5]
    highest = Retention(monitor="loss", save_top_k=2, mode="max")
    assert [c.serial for c in rank(checkpoints, highest)][:2] == [5, 6]


def test_of_equal_ones_the_older_is_kept() -> None:
    checkpoints = [saved(n, loss=0.5) for n in range(6)]
    assert kept(checkpoints, Retention(monitor="loss", save_top_k=2)) == [0, 1, 4, 5]
    assert rank(checkpoints, Retention(monitor="loss", mode="max"))[0].serial == 0


def test_the_best_one_is_kept_although_no_number_was_asked_for() -> None:
    checkpoints = [saved(n, loss=float(n)) for n in range(6)]
    assert kept(checkpoints, Retention(monitor="loss")) == [0, 4, 5]


def test_multiples_and_pinned_ones_are_kept() -> None:
    checkpoints = [saved(n) for n in range(1, 12)]
    policy = Retention(keep_every_n_steps=4)
    assert kept(checkpoints, policy, pinned={checkpoints[0].name, "gone"}) == [1, 4, 8, 10, 11]


@given(
    losses=st.lists(st.one_of(st.none(), st.floats()), max_size=12),
    keep_last=st.one_of(st.none(), st.integers(1, 5)),
    save_top_k=st.integers(0, 4),
)
def test_never_fewer_than_two(losses: list[float | None], keep_last: int | None, save_top_k: int) -> None:
    checkpoints = [saved(n, loss=loss) for n, loss in enumerate(losses)]
    policy = Retention(keep_last=keep_last, save_top_k=save_top_k, monitor="loss")
    chosen = kept(checkpoints, policy)
    assert len(chosen) >= min(2, len(checkpoints))
    assert not checkpoints or checkpoints[-1].serial in chosen
    # Judging again changes nothing: what was kept is kept.
    assert kept([c for c in checkpoints if c.serial in chosen], policy) == chosen


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"keep_last": 0}, "keep_last"),
        ({"save_top_k": -1}, "save_top_k"),
        ({"save_top_k": 1}, "monitor"),
        ({"mode": "best"}, "mode"),
        ({"keep_every_n_steps": 0}, "keep_every_n_steps"),
    ],
)
def test_wrong_policies_are_named(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Retention(**arguments)  # type: ignore[arg-type]  # wrong on purpose


def test_death_between_commit_and_deletion_never_leaves_fewer_than_two(tmp_path: Path) -> None:
    """Fifty points of death, from the rename on, with the strictest policy there is."""
    policy = Retention(keep_last=1, save_top_k=1, monitor="loss")
    base = tmp_path / "base"
    with CheckpointStore(base, retention=policy) as store:
        for step, loss in ((1, 0.5), (2, 0.9), (3, 0.8), (4, 0.7)):
            save(store, step, metrics={"loss": loss})
    deaths = 0
    for die_at in range(10, 70):
        directory = tmp_path / str(die_at)
        shutil.copytree(base, directory)
        filesystem = DyingFileSystem(1 << 60)
        with CheckpointStore(directory, retention=policy, filesystem=filesystem) as store:
            filesystem.count, filesystem.die_at = 0, die_at
            try:
                save(store, 5, metrics={"loss": 0.1})
                save(store, 6, metrics={"loss": 0.6})
            except Killed:
                deaths += 1
        reader = CheckpointReader(directory)
        whole = reader.checkpoints()
        for info in whole:
            reader.verify(info)
        assert len(whole) >= 2
        best = min(whole, key=lambda info: info.metrics["loss"])
        assert best.metrics["loss"] in (0.5, 0.1)
    assert deaths >= 50
