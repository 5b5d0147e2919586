"""What the checkpoint tests share: small states, stores on a fast disk, no thread left behind."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run's directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [
        thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("offloop")
    ]
    assert not left
