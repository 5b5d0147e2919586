"""engine/observers/line_file.py: whole lines or nothing, whatever the disk does, and never through a link."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offloop.engine import LineFile, replace_file


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Act as a disk that is full: the system writes up to the limit, and refuses what is beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_line_that_did_not_fit_is_taken_back_and_glues_nothing_together(path: Path) -> None:
    log = LineFile(path)
    log.append(b"first\n")
    with no_file_beyond(10), pytest.raises(OSError, match="too large"):
        log.append(b"second\n")  # four bytes of it were written
    assert path.read_bytes() == b"first\n"
    log.append(b"third\n")
    log.close()
    assert path.read_bytes() == b"first\nthird\n"


def test_half_a_line_that_cannot_be_taken_back_stays_a_line_of_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LineFile(path)

    def refuse(file: int, size: int) -> None:
        raise OSError("injected")

    with monkeypatch.context() as patch, no_file_beyond(3), pytest.raises(OSError, match="too large"):
        patch.setattr(os, "ftruncate", refuse)
        log.append(b"first\n")
    log.append(b"second\n")
    log.close()
    assert path.read_bytes() == b"fir\nsecond\n"


@pytest.mark.parametrize(
    "content", [b"", b"half", b"one\n", b"one\nhalf", b"x" * 70_000, b"one\n" + b"x" * 70_000]
)
def test_half_a_line_at_the_end_is_cut_off_when_it_is_opened(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    log = LineFile(path)
    log.append(b"next\n")
    log.close()
    log.close()
    assert path.read_bytes() == content[: content.rfind(b"\n") + 1] + b"next\n"


@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_nothing_is_written_through_a_link(tmp_path: Path, path: Path, target: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(tmp_path / target)
    with pytest.raises(OSError, match="it is a link"):
        LineFile(path)
    replace_file(path, b"new")
    assert not path.is_symlink() and path.read_bytes() == b"new"
    (tmp_path / ".log.jsonl.new").symlink_to(victim)
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert (victim.read_text(), sorted(os.listdir(tmp_path))) == ("precious", ["log.jsonl", "victim"])


def test_pipe_is_refused(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        LineFile(path)


def test_file_that_cannot_be_replaced_is_as_it_was(path: Path) -> None:
    path.write_bytes(b"old")
    with no_file_beyond(5), pytest.raises(OSError, match="too large"):
        replace_file(path, b"much longer")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]
