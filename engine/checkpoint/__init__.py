"""Checkpoints: copied at a step boundary, written in the background, visible only when whole.

`SnapshotArena` copies a state, `CheckpointWriter` takes it to disk through a `CheckpointStore`,
`CheckpointReader` finds, checks and loads. Mechanics only: when to save, and what, is policy.
Names are loaded when first used, because listing and verifying need no torch.
"""

from typing import TYPE_CHECKING

from offloop.engine.lazy_facade import lazy_facade

if TYPE_CHECKING:
    from offloop.engine.checkpoint.errors import CheckpointCorruptError as CheckpointCorruptError
    from offloop.engine.checkpoint.errors import CheckpointDeadlineError as CheckpointDeadlineError
    from offloop.engine.checkpoint.errors import CheckpointError as CheckpointError
    from offloop.engine.checkpoint.errors import CheckpointIncompatibleError as CheckpointIncompatibleError
    from offloop.engine.checkpoint.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from offloop.engine.checkpoint.errors import CheckpointReadError as CheckpointReadError
    from offloop.engine.checkpoint.errors import CheckpointWriteError as CheckpointWriteError
    from offloop.engine.checkpoint.errors import DiskFullError as DiskFullError
    from offloop.engine.checkpoint.errors import RemoteError as RemoteError
    from offloop.engine.checkpoint.errors import RunLockedError as RunLockedError
    from offloop.engine.checkpoint.errors import SnapshotBusyError as SnapshotBusyError
    from offloop.engine.checkpoint.errors import SnapshotMemoryError as SnapshotMemoryError
    from offloop.engine.checkpoint.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from offloop.engine.checkpoint.errors import UnserializableStateError as UnserializableStateError
    from offloop.engine.checkpoint.errors import WriterDiedError as WriterDiedError
    from offloop.engine.checkpoint.lock import DirectoryLock as DirectoryLock
    from offloop.engine.checkpoint.manifest import CheckpointRequest as CheckpointRequest
    from offloop.engine.checkpoint.named_copies import NamedCopies as NamedCopies
    from offloop.engine.checkpoint.reader import CheckpointInfo as CheckpointInfo
    from offloop.engine.checkpoint.reader import CheckpointReader as CheckpointReader
    from offloop.engine.checkpoint.reader import LoadedCheckpoint as LoadedCheckpoint
    from offloop.engine.checkpoint.reader import list_runs as list_runs
    from offloop.engine.checkpoint.reference import find_checkpoint as find_checkpoint
    from offloop.engine.checkpoint.remote import RemoteRun as RemoteRun
    from offloop.engine.checkpoint.retention import Retention as Retention
    from offloop.engine.checkpoint.snapshot import Snapshot as Snapshot
    from offloop.engine.checkpoint.snapshot import SnapshotArena as SnapshotArena
    from offloop.engine.checkpoint.store import CheckpointStore as CheckpointStore
    from offloop.engine.checkpoint.store import Commit as Commit
    from offloop.engine.checkpoint.writer import CheckpointWriter as CheckpointWriter

_NAMES = {
    "errors": """
        CheckpointCorruptError CheckpointDeadlineError CheckpointError CheckpointIncompatibleError
        CheckpointNotFoundError CheckpointReadError CheckpointWriteError DiskFullError RemoteError
        RunLockedError SnapshotBusyError SnapshotMemoryError UnsafeCheckpointError UnserializableStateError
        WriterDiedError
    """,
    "lock": "DirectoryLock",
    "manifest": "CheckpointRequest",
    "named_copies": "NamedCopies",
    "reader": "CheckpointInfo CheckpointReader LoadedCheckpoint list_runs",
    "reference": "find_checkpoint",
    "remote": "RemoteRun",
    "retention": "Retention",
    "snapshot": "Snapshot SnapshotArena",
    "store": "CheckpointStore Commit",
    "writer": "CheckpointWriter",
}

__all__, __getattr__, __dir__ = lazy_facade(__name__, _NAMES)
