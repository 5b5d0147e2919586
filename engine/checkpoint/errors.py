"""The exceptions of checkpoints. `engine/errors.py` draws them with all others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from offloop.engine.errors import OffloopError

CorruptKind = Literal["truncated", "checksum", "header", "manifest", "missing", "foreign"]


class CheckpointError(OffloopError):
    """Base of the exceptions of checkpoints."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; earlier ones are untouched.

    Attributes:
        path: The file or directory.
        errno: The system's error number, None if there is none.
    """

    def __init__(self, path: Path, errno: int | None, reason: str) -> None:
        self.path = path
        self.errno = errno
        super().__init__(f"cannot write {path}: {reason}")


class DiskFullError(CheckpointWriteError):
    """The disk or the quota has no room for a checkpoint.

    Attributes:
        needed: Bytes needed.
        free: Bytes free.
    """

    def __init__(self, path: Path, errno: int | None, *, needed: int, free: int) -> None:
        self.needed = needed
        self.free = free
        super().__init__(path, errno, f"needs {needed:,} bytes, {free:,} are free")


class CheckpointReadError(CheckpointError):
    """The system refused to read a checkpoint: permissions, an I/O error. Its content may be whole.

    Attributes:
        path: The file or directory.
        errno: The system's error number, None if there is none.
    """

    def __init__(self, path: Path, errno: int | None, reason: str) -> None:
        self.path = path
        self.errno = errno
        super().__init__(f"cannot read {path}: {reason}")


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's content is not what was written.

    Attributes:
        path: The checkpoint.
        item: The damaged file, or `file:tensor`.
        kind: What is wrong with it.
    """

    def __init__(self, path: Path, item: str, kind: CorruptKind, detail: str) -> None:
        self.path = path
        self.item = item
        self.kind: CorruptKind = kind
        super().__init__(f"{path}: {item} is damaged ({kind}): {detail}")


class UnsafeCheckpointError(CheckpointCorruptError):
    """A file of a checkpoint points outside its directory or lies about its sizes."""


class CheckpointIncompatibleError(CheckpointError):
    """A whole checkpoint that does not fit: written by a newer offloop, or of another model.

    Attributes:
        path: The checkpoint.
        difference: What does not fit.
        hint: What to do.
    """

    def __init__(self, path: Path, difference: str, hint: str) -> None:
        self.path = path
        self.difference = difference
        self.hint = hint
        super().__init__(f"{path}: {difference}. {hint}.")


class CheckpointNotFoundError(CheckpointError):
    """There is no such checkpoint.

    Attributes:
        wanted: What was asked for.
        searched: Where.
        known: What there is instead.
    """

    def __init__(
        self, wanted: str, searched: Path | str, known: Sequence[str] = (), advice: str = ""
    ) -> None:
        self.wanted = wanted
        self.searched = searched
        self.known = tuple(known)
        there = ", ".join(self.known) if self.known else "no checkpoint"
        super().__init__(f"no checkpoint {wanted!r} in {searched}; there is: {there}{advice}")


class CheckpointDeadlineError(CheckpointError):
    """Checkpoints were not on disk in time.

    Attributes:
        pending: Number of saves that were not finished.
        seconds: The time they had.
    """

    def __init__(self, pending: int, seconds: float) -> None:
        self.pending = pending
        self.seconds = seconds
        super().__init__(f"{pending} checkpoints were not yet on disk after {seconds:g} s")


class RemoteError(CheckpointError):
    """A remote store failed after all tries; local files are untouched. The store's exception is the cause.

    Attributes:
        url: URL of the run or of a file in it.
        reason: What failed.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(f"{url}: {reason}")


class RunLockedError(CheckpointError):
    """Another process, or another run in this one, writes to the run's directory.

    Attributes:
        path: The lock file.
        owner: What the other one wrote about itself.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.owner = owner
        super().__init__(f"{path.parent} is being written by {owner}")


class SnapshotBusyError(CheckpointError):
    """All snapshot buffers still wait for the disk.

    Attributes:
        slots: The number of buffers.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        super().__init__(f"all {slots} snapshot buffers are still being written")


class SnapshotMemoryError(CheckpointError):
    """There is no memory for the copy of a state. The system's exception is the cause."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no memory for a copy of the state: {reason}")


class UnserializableStateError(CheckpointError):
    """A value in a state has no place in a checkpoint.

    Attributes:
        path: Its path in the state, like `['optimizer']['hook']`.
        type: Its class.
    """

    def __init__(self, path: str, value: object, reason: str | None = None) -> None:
        self.path = path
        self.type = type(value)
        kind = f"{self.type.__module__}.{self.type.__qualname__}"
        allowed = "tensors, numbers, strings, None, and dicts, lists and tuples of them"
        super().__init__(f"state{path} is a {kind}: {reason or f'only {allowed} can be saved'}")


class WriterDiedError(CheckpointError):
    """The writer thread ended before its work was done."""
