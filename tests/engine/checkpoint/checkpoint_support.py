"""File systems that fail, stop dead or keep a record, and states whose content tells their step."""

import errno
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from offloop.engine.checkpoint import (
    CheckpointReader,
    CheckpointRequest,
    CheckpointStore,
    Commit,
    SnapshotArena,
)
from offloop.engine.checkpoint.filesystem import FileSystem


def small_state(step: int) -> dict[str, object]:
    """Return a state in which every tensor and number is `step`; three files, a tied weight."""
    weight = torch.full((3, 4), float(step))
    return {
        "model": {"weight": weight, "tied": weight, "count": torch.tensor(step)},
        "optimizer": {"state": {0: {"exp_avg": torch.full((3, 4), step, dtype=torch.float64)}}},
        "step": step,
        "rng": torch.full((7,), step % 128, dtype=torch.uint8),
    }


def small_weights(value: float) -> dict[str, torch.Tensor]:
    """Return a state dict whose every element is `value`; with a tied weight."""
    weight = torch.full((3, 4), float(value))
    return {"weight": weight, "tied": weight, "count": torch.tensor(int(value))}


def step_of(state: object) -> int:
    """Return the step that a small state belongs to, after checking that all of it does."""
    assert isinstance(state, dict)
    step = state["step"]
    assert isinstance(step, int)
    expected = small_state(step)
    assert_same(state, expected)
    assert state["model"]["weight"] is state["model"]["tied"]
    return step


def assert_same(a: object, b: object) -> None:
    """Compare two states, types and order of keys included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


def save(store: CheckpointStore, step: int, **request: object) -> Commit:
    """Commit a small state."""
    arena = SnapshotArena(slots=1)
    with arena.take(small_state(step)) as snapshot:
        return store.commit(snapshot, CheckpointRequest(step=step, **request))  # type: ignore[arg-type]  # a test's shorthand


def loaded_step(directory: Path) -> int:
    """Return the step of the newest loadable checkpoint, or -1 if there is none at all."""
    reader = CheckpointReader(directory)
    if not reader.checkpoints() and not reader.damaged():
        return -1
    return step_of(reader.load("last", on_corrupt="raise").state)


class Killed(BaseException):
    """Stands for the end of the process: nothing after it reaches the disk."""


class InterceptedFileSystem(FileSystem):
    """Ask `before` ahead of each operation that changes the disk or makes a change durable."""

    def __init__(self) -> None:
        self.count = 0
        self.paths: dict[int, Path] = {}

    def before(self, operation: str, argument: object) -> None:
        """Raise to make the operation fail."""

    def _pass(self, operation: str, argument: object) -> None:
        self.before(operation, argument)
        self.count += 1

    def make_directory(self, path: Path) -> None:
        self._pass("make_directory", path)
        super().make_directory(path)

    def open_new(self, path: Path) -> int:
        self._pass("open_new", path)
        file = super().open_new(path)
        self.paths[file] = path
        return file

    def write(self, file: int, data: memoryview) -> int:
        self._pass("write", file)
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self._pass("sync", file)  # the real one costs milliseconds and proves nothing here

    def close(self, file: int) -> None:
        try:
            self._pass("close", file)
        finally:
            super().close(file)  # whatever is said about it, the descriptor is gone

    def link(self, source: Path, target: Path) -> None:
        self._pass("link", target)
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._pass("rename", source)
        super().rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        self._pass("replace", source)
        super().replace(source, target)

    def sync_directory(self, path: Path) -> None:
        self._pass("sync_directory", path)

    def remove_file(self, path: Path) -> None:
        self._pass("remove_file", path)
        super().remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self._pass("remove_directory", path)
        super().remove_directory(path)


class DyingFileSystem(InterceptedFileSystem):
    """Stop dead at the n-th operation; a write that is hit leaves half of its bytes."""

    def __init__(self, die_at: int) -> None:
        super().__init__()
        self.die_at = die_at

    def before(self, operation: str, argument: object) -> None:
        if self.count >= self.die_at:
            raise Killed

    def write(self, file: int, data: memoryview) -> int:
        if self.count == self.die_at:
            os.write(file, data[: len(data) // 2])
        return super().write(file, data)


class FailingFileSystem(InterceptedFileSystem):
    """Fail the n-th operation once, or from then on; or write short."""

    def __init__(self, fail_at: int, code: int, *, forever: bool = False) -> None:
        super().__init__()
        self.fail_at, self.code, self.forever = fail_at, code, forever
        self.failed: list[str] = []
        self._bad: set[Path] = set()

    def before(self, operation: str, argument: object) -> None:
        if operation == "sync" and isinstance(argument, int):
            assert self.paths[argument] not in self._bad, "an fsync was tried again"
        if self.count == self.fail_at or (self.forever and self.count > self.fail_at):
            self.failed.append(operation)
            if operation == "sync" and isinstance(argument, int):
                self._bad.add(self.paths[argument])
            self.count += 1
            raise OSError(self.code, os.strerror(self.code))


class StingyFileSystem(FileSystem):
    """Take one to seven bytes at a time and be interrupted in between."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def write(self, file: int, data: memoryview) -> int:
        if self._random.random() < 0.3:
            raise InterruptedError(errno.EINTR, "interrupted")
        return super().write(file, data[: self._random.randint(1, 7)])


class VolatileFileSystem(FileSystem):
    """Skip what takes the time: for tests in which nothing crashes."""

    def sync(self, file: int) -> None:
        """Do nothing."""

    def sync_directory(self, path: Path) -> None:
        """Do nothing."""


class QuotaFileSystem(FileSystem):
    """Have room for so many bytes; only if `is_open`, say so beforehand."""

    def __init__(self, room: int, *, is_open: bool) -> None:
        self.room, self.is_open = room, is_open

    def write(self, file: int, data: memoryview) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = super().write(file, data[: self.room])
        self.room -= count
        return count

    def free_bytes(self, path: Path) -> int:
        return self.room if self.is_open else 1 << 40


def rewrite_manifest(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a manifest the way an attacker would: with a fresh checksum."""
    line = (path / "MANIFEST.json").read_bytes().partition(b"\n")[0]
    manifest = msgspec.json.decode(line, type=dict[str, object])
    change(manifest)
    put_manifest(path, msgspec.json.encode(manifest))


def put_manifest(path: Path, line: bytes) -> None:
    (path / "MANIFEST.json").write_bytes(line + b"\ncrc32:%08x\n" % zlib.crc32(line))


def in_manifest(*keys: str, value: object) -> Callable[[Path], None]:
    """Return what sets an entry of a checkpoint's manifest."""

    def change(manifest: dict[str, object]) -> None:
        inner: object = manifest
        for key in keys[:-1]:
            assert isinstance(inner, dict)
            inner = inner[key]
        assert isinstance(inner, dict)
        inner[keys[-1]] = value

    return lambda path: rewrite_manifest(path, change)
