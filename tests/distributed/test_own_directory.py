"""Ranks without a common disk: rank 0 writes their parts of checkpoints, and sends what a resumed run needs."""

from collections.abc import Callable
from typing import Any

import pytest

from offloop.engine.checkpoint import CheckpointReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_rank_that_does_not_see_the_run_directory_goes_on_bit_for_bit(
    run_scenarios: Callable[..., Any],
) -> None:
    found = run_scenarios("own_directory", ["whole", "cut", "again"])
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
    assert [*reader.load().parts] == [1]
