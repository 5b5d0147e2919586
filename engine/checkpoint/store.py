"""Write checkpoints so that whatever happens, what was there stays and what is there is whole.

    write   .tmp-<name>/ ... every file created anew, written, fsynced; the manifest last
    settle  fsync .tmp-<name>/
    publish rename .tmp-<name> -> <name>;  fsync checkpoints/       from here on it is durable
    follow  refs, then retention: <old> -> .trash-<old>, fsync, delete

A name is never used twice and never overwritten.  A directory without a valid manifest under a
final name does not exist for anybody.  After a failure the temporary directory is deleted and
nothing is tried again on the same files: after a failed fsync the kernel may have dropped the
data and would report success the second time.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from offloop.engine.checkpoint.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointWriteError,
    DiskFullError,
    UnserializableStateError,
)
from offloop.engine.checkpoint.filesystem import (
    FileSystem,
    make_directories,
    remove_tree,
    write_error,
    write_file,
)
from offloop.engine.checkpoint.format import TensorFile, write_tensor_file
from offloop.engine.checkpoint.lock import RunLock
from offloop.engine.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointRequest,
    FileRecord,
    Manifest,
    ManifestHead,
    StoredTensor,
    TensorView,
    encode_manifest,
    excess_of,
    json_number,
)
from offloop.engine.checkpoint.reader import (
    MAX_JSON_BYTES,
    SET_ASIDE,
    TAGS,
    CheckpointInfo,
    CheckpointReader,
)
from offloop.engine.checkpoint.retention import Retention, best_of, select_kept_by_any
from offloop.engine.checkpoint.tags import check_tag
from offloop.engine.checkpoint.tree import encode

FREE_SPACE_MARGIN = 1.05
"""Manifest, folders and blocks come on top of the bytes; a guess on the safe side."""

_TEMPORARY, _TRASH = ".tmp-", ".trash-"


class Snapshotted(Protocol):
    """What the store needs of a snapshot."""

    @property
    def tree(self) -> object: ...
    @property
    def views(self) -> Mapping[str, TensorView]: ...
    def wait_ready(self) -> None: ...
    def parts(self) -> Sequence[TensorFile]: ...


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is durable."""

    info: CheckpointInfo
    seconds: float
    """From the call to the moment it was durable."""
    deleted: tuple[str, ...]
    """Older ones that retention removed after that."""
    problems: tuple[CheckpointError, ...]
    """What went wrong after that: a ref or a deletion. The checkpoint is not affected."""


class CheckpointStore(CheckpointReader):
    """The one writer of a run's checkpoints. All methods block; any thread may call them.

    Takes the run's lock, sweeps what interrupted saves left and mends the refs.

    Raises:
        RunLockedError: If another store has this run.
        CheckpointIncompatibleError: If a newer offloop has written to it.
        CheckpointWriteError: If the folders cannot be made.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        retention: Retention | Sequence[Retention] | None = None,
        filesystem: FileSystem | None = None,
        engine_version: str = "",
    ) -> None:
        super().__init__(directory)
        retention = Retention() if retention is None else retention
        self.retention = (retention,) if isinstance(retention, Retention) else tuple(retention)
        self._filesystem = filesystem or FileSystem()
        self._engine_version = engine_version
        self._pins: set[str] = set()
        self._held: set[str] = set()
        self._numbers = itertools.count()
        self._has_leftovers = False
        self._is_closed = False
        self._mutex = threading.RLock()
        with self._translated(self.directory):
            for path in (self._checkpoints, self._refs / TAGS):
                make_directories(self._filesystem, path.absolute())
            self._lock = RunLock(self.directory)
        try:
            with self._translated(self._checkpoints):
                # A predecessor that died between rename and fsync left a name that we can see and
                # a power cut could take; deleting older ones because of it must not be possible.
                self._filesystem.sync_directory(self._checkpoints)
            self.sweep()
            for problem in self._follow([self._update_refs]):
                if isinstance(problem, CheckpointIncompatibleError):
                    raise problem  # each save would, and say so only then
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Calling twice is fine."""
        with self._mutex:
            self._is_closed = True
            self._lock.release()

    def commit(self, snapshot: Snapshotted, request: CheckpointRequest) -> Commit:
        """Make a checkpoint of the snapshot and return once it is durable.

        The snapshot is not released. After an error nothing new is visible (unless the system
        refuses even to take a name back), and the snapshot may be committed again, to new files.

        Raises:
            DiskFullError: If there is no room; found out beforehand where possible.
            CheckpointWriteError: For any other refusal of the system.
            UnserializableStateError: If the request's `extra` cannot be saved.
            ValueError: For a tag that is no proper name.
        """
        for tag in request.tags:
            check_tag(tag)
        with self._writing():
            if self._has_leftovers:
                self.sweep()
            started = time.monotonic()
            snapshot.wait_ready()
            manifest = self._draft(request)
            final = self._checkpoints / manifest.name
            temporary = self._temporary_for(manifest.name)
            try:
                needed = 0
                try:
                    state = msgspec.json.encode(snapshot.tree)
                    _check_readable(state, temporary)
                    parts = snapshot.parts()
                    needed = len(state) + sum(len(part.payload) for part in parts)
                    self._check_room(needed)
                    manifest = write_checkpoint(
                        self._filesystem, temporary, manifest, parts, state, snapshot.views
                    )
                    self._filesystem.rename(temporary, final)
                    self._filesystem.sync_directory(self._checkpoints)
                except OSError as error:
                    raise write_error(error, temporary, needed=needed, filesystem=self._filesystem) from error
            except BaseException:
                self._discard(temporary, final)
                raise
            seconds = time.monotonic() - started
            head = msgspec.convert(manifest, ManifestHead, from_attributes=True)
            info = CheckpointInfo(final, head)
            self._remember(info)
            deleted: list[str] = []
            problems = self._follow(
                [
                    *(lambda tag=tag: self._set_tag(tag, manifest.name) for tag in request.tags),
                    self._update_refs,
                    lambda: self._retain(manifest.parent, deleted),
                ],
                if_failed=manifest.name,
            )
            return Commit(info, seconds, tuple(deleted), tuple(problems))

    def tag(self, tag: str, which: str | int = "last", *, move: bool = False) -> CheckpointInfo:
        """Name a checkpoint, which keeps it from being deleted.

        Raises:
            ValueError: For an improper name, or one that is in use when `move` is false.
            CheckpointNotFoundError: If there is no such checkpoint.
            CheckpointWriteError: If it cannot be written down.
        """
        check_tag(tag)
        with self._writing():
            info = self.find(which)
            present = self.tags().get(tag)
            if present not in (None, info.name) and not move:
                raise ValueError(f"tag {tag!r} is on {present}; move=True moves it")
            with self._translated(self._refs / TAGS / tag):
                self._set_tag(tag, info.name)
            return info

    def set_tag(self, tag: str, name: str) -> None:
        """Let a tag name a checkpoint that need not be here, as it is elsewhere; see `tag`."""
        check_tag(tag)
        with self._writing(), self._translated(self._refs / TAGS / tag):
            self._set_tag(tag, name)

    def set_best(self, name: str) -> None:
        """Let ``best`` name a checkpoint, until retention knows by what to judge."""
        with self._writing(), self._translated(self._refs):
            self._set_ref(self._refs / "best", name)

    def untag(self, tag: str) -> None:
        """Remove a tag; one that is not there is fine."""
        check_tag(tag)
        path = self._refs / TAGS / tag
        with self._writing(), self._translated(path), suppress(FileNotFoundError):
            self._filesystem.remove_file(path)
            self._filesystem.sync_directory(path.parent)

    def pin(self, name: str) -> None:
        """Keep a checkpoint while this store is open, e.g. the one that was resumed from."""
        with self._mutex:
            self._pins.add(name)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a checkpoint while the block reads it, if it is still there."""
        with self._mutex:
            self._held.add(name)
        try:
            yield
        finally:
            with self._mutex:
                self._held.discard(name)

    @contextmanager
    def receiving(self, name: str) -> Iterator[Path]:
        """Take in a checkpoint that the block puts into an empty directory; durable when this returns.

        Every byte is checked. After an error, of the block too, nothing is there.

        Raises:
            CheckpointCorruptError: It is not whole, or not the one of this name.
            CheckpointWriteError: The system refused.
        """
        with self._writing():
            temporary, final = self._temporary_for(name), self._checkpoints / name
            try:
                with self._translated(temporary):
                    if os.path.lexists(final):
                        self.quarantine(final)
                    self._filesystem.make_directory(temporary)
                    yield temporary
                    info = self._at(temporary)
                    if info.name != name:
                        raise CheckpointCorruptError(temporary, MANIFEST, "foreign", f"is of {info.name!r}")
                    self.verify(info)
                    for file in (*info.manifest.files, MANIFEST):
                        self._filesystem.sync_file(temporary / file)
                    self._filesystem.sync_directory(temporary)
                    self._filesystem.rename(temporary, final)
                    self._filesystem.sync_directory(self._checkpoints)
            except BaseException:
                self._discard(temporary, final)
                raise
            self._follow([self._update_refs])

    def quarantine(self, path: Path) -> Path:
        """Move a damaged checkpoint out of the way, for people to look at; return where to."""
        with self._writing(), self._translated(path):
            for number in itertools.count(1):
                target = path.with_name(f"{SET_ASIDE}{path.name}" + (f"-{number}" if number > 1 else ""))
                if not os.path.lexists(target):
                    break
            self._filesystem.rename(path, target)
            self._filesystem.sync_directory(path.parent)
            return target

    def sweep(self) -> None:
        """Delete what interrupted saves and deletions left; what resists stays for next time."""
        with self._writing():
            self._has_leftovers = False
            if any(name.startswith(_TRASH) for name in self._names_in(self._checkpoints)):
                # Or a power cut could bring an old name back over half of its files.
                with suppress(OSError):
                    self._filesystem.sync_directory(self._checkpoints)
            for folder in (self._checkpoints, self._refs, self._refs / TAGS):
                for name in self._names_in(folder):
                    if name.startswith((_TEMPORARY, _TRASH)):
                        self._try_remove(folder / name)

    def _reject(self, error: CheckpointError) -> None:
        # Only what is certainly damaged; what the system would not read may be fine tomorrow.
        if isinstance(error, CheckpointCorruptError):
            with suppress(CheckpointWriteError):
                self.quarantine(error.path)

    def _draft(self, request: CheckpointRequest) -> Manifest:
        known = self.checkpoints()
        base = name = f"step-{request.step:09d}-a{request.attempt}"
        number = 1
        while os.path.lexists(self._checkpoints / name):
            number += 1
            name = f"{base}-{number}"
        return Manifest(
            name=name,
            serial=1 + max((info.manifest.serial for info in known), default=0),
            engine_version=self._engine_version,
            run_id=request.run_id,
            attempt=request.attempt,
            parent=request.parent,
            step=request.step,
            epoch=request.epoch,
            batch=request.batch,
            reason=request.reason,
            complete=request.complete,
            created=time.time(),
            metrics={key: json_number(value) for key, value in request.metrics.items()},
            extra=encode(request.extra, _no_tensor),
            owners=list(request.owners),
            files={},
        )

    def _check_room(self, needed: int) -> None:
        needed = int(needed * FREE_SPACE_MARGIN)
        free = self._filesystem.free_bytes(self._checkpoints)
        if free < needed:
            raise DiskFullError(self._checkpoints, None, needed=needed, free=free)

    def _discard(self, temporary: Path, final: Path) -> None:
        """Make a failed save invisible, as far as the system lets us."""
        with suppress(OSError):
            if os.path.lexists(final):  # renamed, but not known to be durable
                self._filesystem.rename(final, self._trash_for(final.name))
        self.sweep()

    def _follow(
        self, actions: Sequence[Callable[[], None]], *, if_failed: str | None = None
    ) -> list[CheckpointError]:
        """Do what comes after a commit: one failure neither undoes it nor stops the others."""
        problems: list[CheckpointError] = []
        for action in actions:
            try:
                with self._translated(self._refs):
                    action()
            except CheckpointError as error:
                problems.append(error)
                self._has_leftovers = True
                if if_failed is not None:
                    self._pins.add(if_failed)  # a tag that could not be set pins all the same
        return problems

    def _update_refs(self) -> None:
        known = self.checkpoints()
        if known:
            self._set_ref(self._refs / "last", known[-1].name)
        best = best_of([info.manifest for info in known], self.retention)
        if best is not None:
            self._set_ref(self._refs / "best", best.name)

    def _set_tag(self, tag: str, name: str) -> None:
        self._set_ref(self._refs / TAGS / tag, name)

    def _set_ref(self, path: Path, name: str) -> None:
        if self._read_ref(path.relative_to(self._refs)) == name:
            return
        temporary = path.with_name(f"{_TEMPORARY}{path.name}-{next(self._numbers)}")
        try:
            write_file(self._filesystem, temporary, f"{name}\n".encode())
            self._filesystem.replace(temporary, path)
        except BaseException:
            self._try_remove(temporary)
            raise
        self._filesystem.sync_directory(path.parent)

    def _retain(self, parent: str | None, deleted: list[str]) -> None:
        known = self.checkpoints()
        best = self._read_ref(Path("best"))
        pinned = {*self._pins, *self._held, *self.tags().values(), *filter(None, (parent, best))}
        if len(select_kept_by_any([info.manifest for info in known], self.retention, pinned=pinned)) == len(
            known
        ):
            return
        whole = [info for info in known if self._looks_whole(info)]
        kept = select_kept_by_any([info.manifest for info in whole], self.retention, pinned=pinned)
        failures: list[OSError] = []
        for info in whole:
            if info.name not in kept:
                trash = self._trash_for(info.name)
                self._filesystem.rename(info.path, trash)
                self._filesystem.sync_directory(self._checkpoints)
                deleted.append(info.name)
                failures += self._try_remove(trash)
        if failures:
            raise failures[0]

    def _looks_whole(self, info: CheckpointInfo) -> bool:
        try:
            self.verify(info, level="quick")
        except (CheckpointError, OSError):
            return False  # is not counted among the valid ones, and not deleted either
        return True

    def _temporary_for(self, name: str) -> Path:
        return self._checkpoints / f"{_TEMPORARY}{name}-{os.getpid()}-{next(self._numbers)}"

    def _trash_for(self, name: str) -> Path:
        return self._checkpoints / f"{_TRASH}{name}-{os.getpid()}-{next(self._numbers)}"

    def _try_remove(self, path: Path) -> list[OSError]:
        """Delete now or, if that fails, at the next sweep; return the failure."""
        try:
            if path.is_dir() and not path.is_symlink():
                remove_tree(self._filesystem, path)
            elif os.path.lexists(path):
                self._filesystem.remove_file(path)
        except OSError as error:
            self._has_leftovers = True
            return [error]
        return []

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Let one thread at a time change things, and none after `close`."""
        with self._mutex:
            if self._is_closed:
                raise CheckpointError(f"the store of {self.directory} is closed")
            yield

    @contextmanager
    def _translated(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(error, path, needed=0, filesystem=self._filesystem) from error


def write_checkpoint(
    filesystem: FileSystem,
    directory: Path,
    manifest: Manifest,
    parts: Sequence[TensorFile],
    state: bytes,
    views: Mapping[str, TensorView],
) -> Manifest:
    """Put everything into a new directory, down to the disk; return the manifest with all checksums. Blocks."""
    filesystem.make_directory(directory)
    files = {STATE: FileRecord(len(state), zlib.crc32(state))}
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        written = write_tensor_file(filesystem, directory, part)
        files[part.name] = written.record
        tensors |= written.tensors
    write_file(filesystem, directory / STATE, state)
    manifest = msgspec.structs.replace(manifest, files=files, tensors=tensors, views=dict(views))
    write_file(filesystem, directory / MANIFEST, encode_manifest(manifest))
    filesystem.sync_directory(directory)
    return manifest


def _check_readable(state: bytes, directory: Path) -> None:
    """Refuse to write what no reader would take."""
    excess = excess_of(state)
    if len(state) > MAX_JSON_BYTES:
        excess = f"{len(state):,} bytes, at most {MAX_JSON_BYTES:,} can be read"
    if excess:
        raise CheckpointWriteError(directory / STATE, None, f"{excess}: keep large lists as tensors")


def _no_tensor(path: str, value: object) -> None:
    if hasattr(value, "data_ptr"):
        raise UnserializableStateError(path, value, "extra holds no tensors")
