"""What can go wrong with a checkpoint, as exceptions.

    CheckpointError
    ├── CheckpointWriteError          a save failed; nothing that was there before is harmed
    │   └── DiskFullError
    ├── CheckpointReadError           the system would not give the bytes (permissions, I/O error)
    ├── CheckpointCorruptError        the bytes are there and wrong
    │   └── UnsafeCheckpointError     ... in a way that only a hand-made file is
    ├── CheckpointIncompatibleError   written by a newer offloop
    ├── CheckpointNotFoundError
    ├── CheckpointDeadlineExceeded    a flush or close ran out of time
    ├── RemoteError                   the remote store did not do what was asked of it
    ├── RunLockedError                another process writes to this run
    ├── SnapshotBusyError             every buffer still waits for the disk
    ├── SnapshotMemoryError           there is no memory for the copy
    ├── SnapshotTornError             a tensor changed while it was copied
    ├── UnserializableStateError      a value in the state that cannot be saved
    └── WriterDiedError               the writer thread is gone

All derive from ``Exception``: ``except Exception`` around a training run sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

CorruptKind = Literal["truncated", "checksum", "header", "manifest", "missing", "foreign"]


class CheckpointError(Exception):
    """Base of every exception of this package."""


class CheckpointWriteError(CheckpointError):
    """Report a save that failed; earlier checkpoints are untouched."""

    def __init__(self, path: Path, errno: int | None, reason: str) -> None:
        self.path = path
        self.errno = errno
        super().__init__(f"cannot write {path}: {reason}")


class DiskFullError(CheckpointWriteError):
    """Report that the disk or the quota has no room (both figures in bytes)."""

    def __init__(self, path: Path, errno: int | None, *, needed: int, free: int) -> None:
        self.needed = needed
        self.free = free
        super().__init__(path, errno, f"needs {needed:,} bytes, {free:,} are free")


class CheckpointReadError(CheckpointError):
    """Report that the system refused to read; says nothing about the content."""

    def __init__(self, path: Path, errno: int | None, reason: str) -> None:
        self.path = path
        self.errno = errno
        super().__init__(f"cannot read {path}: {reason}")


class CheckpointCorruptError(CheckpointError):
    """Report content that is not what was written.

    `item` is the file, or ``file:tensor``, that is wrong.
    """

    def __init__(self, path: Path, item: str, kind: CorruptKind, detail: str) -> None:
        self.path = path
        self.item = item
        self.kind: CorruptKind = kind
        super().__init__(f"{path}: {item} is damaged ({kind}): {detail}")


class UnsafeCheckpointError(CheckpointCorruptError):
    """Report a file that points outside its directory or lies about its sizes."""


class CheckpointIncompatibleError(CheckpointError):
    """Report a checkpoint that this version cannot read although it is whole."""

    def __init__(self, path: Path, difference: str, hint: str) -> None:
        self.path = path
        self.difference = difference
        self.hint = hint
        super().__init__(f"{path}: {difference}. {hint}.")


class CheckpointNotFoundError(CheckpointError):
    """Report that nothing answers to what was asked for. `advice` says what to write instead."""

    def __init__(
        self, wanted: str, searched: Path | str, known: Sequence[str] = (), advice: str = ""
    ) -> None:
        self.wanted = wanted
        self.searched = searched
        self.known = tuple(known)
        there = ", ".join(self.known) if self.known else "no checkpoint"
        super().__init__(f"no checkpoint {wanted!r} in {searched}; there is: {there}{advice}")


class CheckpointDeadlineExceeded(CheckpointError):
    """Report that `pending` saves were not on disk when the time was up."""

    def __init__(self, pending: int, seconds: float) -> None:
        self.pending = pending
        self.seconds = seconds
        super().__init__(f"{pending} checkpoints were not yet on disk after {seconds:g} s")


class RemoteError(CheckpointError):
    """Report that a remote store did not do what was asked, after all tries; local files are untouched.

    `url` is the run's there, or a file's; the store's own exception is the cause.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(f"{url}: {reason}")


class RunLockedError(CheckpointError):
    """Report that another writer has this run; `owner` is what it wrote about itself."""

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.owner = owner
        super().__init__(f"{path.parent} is being written by {owner}")


class SnapshotBusyError(CheckpointError):
    """Report that each of the `slots` buffers still waits for the disk."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        super().__init__(f"all {slots} snapshot buffers are still being written")


class SnapshotMemoryError(CheckpointError):
    """Report that there was no memory for the copy of a state; the system's own exception is the cause."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no memory for a copy of the state: {reason}")


class SnapshotTornError(CheckpointError):
    """Report tensors that changed while they were copied."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(f"changed while the snapshot was taken: {', '.join(self.names)}")


class UnserializableStateError(CheckpointError):
    """Report a value that has no place in a checkpoint, by its path in the state."""

    def __init__(self, path: str, value: object, reason: str | None = None) -> None:
        self.path = path
        self.type = type(value)
        kind = f"{self.type.__module__}.{self.type.__qualname__}"
        allowed = "tensors, numbers, strings, None, and dicts, lists and tuples of them"
        super().__init__(f"state{path} is a {kind}: {reason or f'only {allowed} can be saved'}")


class WriterDiedError(CheckpointError):
    """Report that the writer thread ended before its work was done."""
