"""Checkpoints of ranks whose disk is full, and of ranks without a common disk.

There rank 0 writes their parts of checkpoints, and sends what a resumed run needs.
"""

from collections.abc import Callable
from typing import Any

import pytest

from offloop.engine.checkpoint import CheckpointReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found(run_scenarios: Callable[..., Any]) -> Any:
    return run_scenarios("rank_disks", ["full", "whole", "cut", "again"])


def test_full_disk_of_one_rank_fails_one_checkpoint_and_training_goes_on(found: Any) -> None:
    first, _ = found.of("full")
    assert first["status"] == "completed"
    ((step, error),) = first["failed"]
    assert step == 13 and "rank 1: DiskFullError" in error
    # The last one is that after the epoch
    assert first["saved"] == [26, 39, 39]
    reader = CheckpointReader(found.folder / "runs" / "full")
    assert reader.checkpoints()[-1].step == 39 and reader.damaged() == []
    assert not [each for each in (reader.directory / "checkpoints").iterdir() if each.name.startswith(".")]


def test_rank_that_does_not_see_the_run_directory_goes_on_bit_for_bit(found: Any) -> None:
    whole, cut, again = (found.of(name) for name in ("whole", "cut", "again"))
    if not whole[1]["is_hidden"]:
        pytest.skip("this machine lets nobody mount anything")
    assert [each["sees"] for each in (*whole, *cut)] == [True, False, True, False]
    assert [each["steps"] for each in cut] == [17, 17]
    assert again[0]["resumed"] == [["bitwise", ""]]
    for name in ("steps", "metrics", "weights", "buffers"):
        assert [each[name] for each in again] == [each[name] for each in whole], name
    reader = CheckpointReader(found.folder / "runs" / "cut")
    assert reader.damaged() == []
    loaded: Any = reader.load()
    assert [*loaded.parts] == [1]
    assert loaded.state["environment"]["strategy"] == "ddp"
