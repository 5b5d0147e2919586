"""What the tests of several ranks share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rank_processes import Ranks
from warm_python import WarmPython


@pytest.fixture
def ranks(warm_python: WarmPython, tmp_path: Path) -> Iterator[Callable[[str], Ranks]]:
    """A function that takes a script and returns its ranks, which are killed at the end."""
    made: list[Ranks] = []

    def make(script: str) -> Ranks:
        made.append(Ranks(warm_python, tmp_path, script))
        return made[-1]

    yield make
    for each in made:
        each.close()
