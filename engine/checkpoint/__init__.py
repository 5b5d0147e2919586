"""Checkpoints: copied at a step boundary, written beside the training, whole or not there at all.

`SnapshotArena` copies a state, `CheckpointWriter` takes it to disk through a `CheckpointStore`,
`CheckpointReader` finds, checks and loads.  Mechanics only: when to save, and what, is policy.
Listing and verifying need no torch, which is why names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offloop.engine.checkpoint.errors import (
        CheckpointCorruptError,
        CheckpointDeadlineExceeded,
        CheckpointError,
        CheckpointIncompatibleError,
        CheckpointNotFoundError,
        CheckpointReadError,
        CheckpointWriteError,
        DiskFullError,
        RemoteError,
        RunLockedError,
        SnapshotBusyError,
        SnapshotMemoryError,
        SnapshotTornError,
        UnsafeCheckpointError,
        UnserializableStateError,
        WriterDiedError,
    )
    from offloop.engine.checkpoint.lock import DirectoryLock
    from offloop.engine.checkpoint.manifest import CheckpointRequest
    from offloop.engine.checkpoint.named_copies import NamedCopies
    from offloop.engine.checkpoint.reader import (
        CheckpointInfo,
        CheckpointReader,
        LoadedCheckpoint,
        list_runs,
    )
    from offloop.engine.checkpoint.reference import find_checkpoint
    from offloop.engine.checkpoint.remote import RemoteRun
    from offloop.engine.checkpoint.retention import Retention
    from offloop.engine.checkpoint.snapshot import Snapshot, SnapshotArena
    from offloop.engine.checkpoint.store import CheckpointStore, Commit
    from offloop.engine.checkpoint.writer import CheckpointWriter

_MODULES = {
    "errors": (
        "CheckpointCorruptError",
        "CheckpointDeadlineExceeded",
        "CheckpointError",
        "CheckpointIncompatibleError",
        "CheckpointNotFoundError",
        "CheckpointReadError",
        "CheckpointWriteError",
        "DiskFullError",
        "RemoteError",
        "RunLockedError",
        "SnapshotBusyError",
        "SnapshotMemoryError",
        "SnapshotTornError",
        "UnsafeCheckpointError",
        "UnserializableStateError",
        "WriterDiedError",
    ),
    "lock": ("DirectoryLock",),
    "manifest": ("CheckpointRequest",),
    "named_copies": ("NamedCopies",),
    "reader": ("CheckpointInfo", "CheckpointReader", "LoadedCheckpoint", "list_runs"),
    "reference": ("find_checkpoint",),
    "remote": ("RemoteRun",),
    "retention": ("Retention",),
    "snapshot": ("Snapshot", "SnapshotArena"),
    "store": ("CheckpointStore", "Commit"),
    "writer": ("CheckpointWriter",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CheckpointCorruptError",
    "CheckpointDeadlineExceeded",
    "CheckpointError",
    "CheckpointIncompatibleError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "CheckpointReadError",
    "CheckpointReader",
    "CheckpointRequest",
    "CheckpointStore",
    "CheckpointWriteError",
    "CheckpointWriter",
    "Commit",
    "DirectoryLock",
    "DiskFullError",
    "LoadedCheckpoint",
    "NamedCopies",
    "RemoteError",
    "RemoteRun",
    "Retention",
    "RunLockedError",
    "Snapshot",
    "SnapshotArena",
    "SnapshotBusyError",
    "SnapshotMemoryError",
    "SnapshotTornError",
    "UnsafeCheckpointError",
    "UnserializableStateError",
    "WriterDiedError",
    "find_checkpoint",
    "list_runs",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
