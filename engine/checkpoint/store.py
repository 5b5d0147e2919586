"""Writing checkpoints: at any moment the earlier ones are kept and every visible one is whole.

    write   .tmp-<name>/ ... all files created, written, fsynced; the manifest last
    settle  fsync .tmp-<name>/
    publish rename .tmp-<name> -> <name>; fsync checkpoints/       from here on it is durable
    follow  refs, then retention: <old> -> .trash-<old>, fsync, delete

A name is never used twice and never overwritten. A directory without a valid manifest does not count. After a
failure the temporary directory is deleted, and the same files are never retried: after a failed fsync the kernel may
have dropped the data and would report success the second time.
"""

import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import msgspec

from offloop.engine.checkpoint.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointWriteError,
    DiskFullError,
)
from offloop.engine.checkpoint.evaluations import Evaluation
from offloop.engine.checkpoint.files import check_readable, refuse_tensors, write_checkpoint
from offloop.engine.checkpoint.filesystem import (
    FileSystem,
    make_directories,
    remove_tree,
    write_error,
    write_file,
)
from offloop.engine.checkpoint.format import TensorFile
from offloop.engine.checkpoint.lock import RunLock
from offloop.engine.checkpoint.manifest import (
    MANIFEST,
    PARTS_VERSION,
    CheckpointRequest,
    Manifest,
    ManifestHead,
    TensorView,
    json_number,
)
from offloop.engine.checkpoint.parts import (
    TEMPORARY,
    PartsChannel,
    meeting_place,
    number_of,
)
from offloop.engine.checkpoint.reader import (
    SET_ASIDE,
    TAGS,
    CheckpointInfo,
    CheckpointReader,
)
from offloop.engine.checkpoint.retention import Retention, best_of, select_kept_by_any
from offloop.engine.checkpoint.tags import check_tag
from offloop.engine.checkpoint.tree import encode

FREE_SPACE_MARGIN = 1.05
"""Room for the manifest, folders and blocks; a guess on the safe side."""

_TRASH = ".trash-"


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
    """A durable checkpoint."""

    info: CheckpointInfo
    seconds: float
    """Time from the call until it was durable."""
    deleted: tuple[str, ...]
    """Older checkpoints that retention then removed."""
    problems: tuple[CheckpointError, ...]
    """Later failures, of a ref or a deletion. They do not affect the checkpoint."""


class CheckpointStore(CheckpointReader):
    """The only writer of a run's checkpoints. All methods block; any thread may call them.

    Takes the run's lock, removes what interrupted saves left and repairs the refs.

    Raises:
        RunLockedError: Another store has this run.
        CheckpointIncompatibleError: A newer offloop has written to it.
        CheckpointWriteError: The folders cannot be made.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        retention: Retention | Sequence[Retention] | None = None,
        filesystem: FileSystem | None = None,
        engine_version: str = "",
        ranks: PartsChannel | None = None,
    ) -> None:
        super().__init__(directory)
        # The way to the other processes that write parts of these checkpoints.
        self._ranks = ranks
        # Of the latest save. Directories of later ones may be there: another process may be ahead. None before any
        # process writes.
        self._save_number: int | None = None
        retention = Retention() if retention is None else retention
        self.retention = (retention,) if isinstance(retention, Retention) else tuple(retention)
        self._filesystem = filesystem or FileSystem()
        self._engine_version = engine_version
        # Names that are kept until they are unpinned.
        self._pins: set[str] = set()
        # Names that stay, because their tag or ref could not be set.
        self._unfollowed: set[str] = set()
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
                # A writer that died between rename and fsync left a name that a power cut could still remove. Older
                # checkpoints must not be deleted because of it.
                self._filesystem.sync_directory(self._checkpoints)
            self.sweep()
            for problem in self._follow([self._update_refs]):
                if isinstance(problem, CheckpointIncompatibleError):
                    # Every save would raise it, too.
                    raise problem
            self._save_number = 0
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Calling twice is fine."""
        with self._mutex:
            self._is_closed = True
            self._lock.release()

    def commit(self, snapshot: Snapshotted, request: CheckpointRequest) -> Commit:
        """Write a snapshot as a checkpoint and return when it is durable.

        Does not release the snapshot. After an error nothing new is visible (unless the system refuses to rename),
        and the snapshot may be committed again, to new files.

        Raises:
            DiskFullError: There is no room; checked in advance where possible.
            CheckpointWriteError: The system refused for another reason.
            UnserializableStateError: The request's `extra` cannot be saved.
            ValueError: A tag is no legal name.
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
            if self._ranks is not None:
                temporary = self._checkpoints / meeting_place(request)
                self._save_number = request.number
            try:
                needed = 0
                try:
                    state = msgspec.json.encode(snapshot.tree)
                    check_readable(state, temporary)
                    parts = snapshot.parts()
                    needed = len(state) + sum(len(part.payload) for part in parts)
                    self._check_room(needed)
                    manifest = write_checkpoint(
                        self._filesystem,
                        temporary,
                        manifest,
                        parts,
                        state,
                        snapshot.views,
                        gather=None
                        if self._ranks is None
                        else functools.partial(self._ranks.gather, request.number, temporary),
                    )
                    self._filesystem.rename(temporary, final)
                    self._filesystem.sync_directory(self._checkpoints)
                except OSError as error:
                    raise write_error(error, temporary, needed=needed, filesystem=self._filesystem) from error
            except BaseException:
                self._discard(temporary, final)
                raise
            seconds = time.monotonic() - started
            head = ManifestHead(**{name: getattr(manifest, name) for name in ManifestHead.__struct_fields__})
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
        """Tag a checkpoint, which keeps it from being deleted.

        Raises:
            ValueError: The tag is no legal name, or is in use and `move` is false.
            CheckpointNotFoundError: There is no such checkpoint.
            CheckpointWriteError: The tag cannot be written.
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
        """Set a tag to a checkpoint that need not be on this disk; see `tag`."""
        check_tag(tag)
        with self._writing(), self._translated(self._refs / TAGS / tag):
            self._set_tag(tag, name)

    def set_best(self, name: str) -> None:
        """Set `best`, until retention has a monitor."""
        with self._writing(), self._translated(self._refs):
            self._set_ref(self._refs / "best", name)

    def untag(self, tag: str) -> None:
        """Remove a tag if it exists."""
        check_tag(tag)
        path = self._refs / TAGS / tag
        with self._writing(), self._translated(path), suppress(FileNotFoundError):
            self._filesystem.remove_file(path)
            self._filesystem.sync_directory(path.parent)

    def pin(self, name: str) -> None:
        """Keep a checkpoint until `judge`, or while this store is open. Waits for a commit."""
        with self._mutex:
            self._pins.add(name)

    def judge(
        self, name: str, evaluation: Evaluation | None, *, parent: str | None = None
    ) -> tuple[tuple[str, ...], tuple[CheckpointError, ...]]:
        """Record how a pinned checkpoint was evaluated, and apply the rules of what is kept.

        Args:
            name: The checkpoint; it is not pinned any more.
            evaluation: Its figures; None if there will be none.
            parent: The checkpoint that this attempt was resumed from.

        Returns:
            The checkpoints that were deleted, and what failed.
        """
        deleted: list[str] = []

        def record() -> None:
            if evaluation is not None:
                self._evaluations.add(evaluation, self._filesystem)

        with self._writing():
            self._pins.discard(name)
            problems = self._follow([record, self._update_refs, lambda: self._retain(parent, deleted)])
        return tuple(deleted), tuple(problems)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a checkpoint, if it still exists, while the block reads it."""
        with self._mutex:
            self._held.add(name)
        try:
            yield
        finally:
            with self._mutex:
                self._held.discard(name)

    @contextmanager
    def receiving(self, name: str) -> Iterator[Path]:
        """Add a checkpoint that the block writes into the empty directory it is given.

        Every byte is checked. The checkpoint is durable when this returns; after an error, also of the block, it
        does not exist.

        Raises:
            CheckpointCorruptError: It is damaged or has another name.
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
        """Rename a damaged checkpoint so that it does not count; return its new path."""
        with self._writing(), self._translated(path):
            for number in itertools.count(1):
                target = path.with_name(f"{SET_ASIDE}{path.name}" + (f"-{number}" if number > 1 else ""))
                if not os.path.lexists(target):
                    break
            self._filesystem.rename(path, target)
            self._filesystem.sync_directory(path.parent)
            return target

    def sweep(self) -> None:
        """Delete what interrupted saves and deletions left. What cannot be deleted stays for the next time."""
        with self._writing():
            self._has_leftovers = False
            if any(name.startswith(_TRASH) for name in self._names_in(self._checkpoints)):
                # Without it a power cut could restore an old name with half of its files.
                with suppress(OSError):
                    self._filesystem.sync_directory(self._checkpoints)
            for folder in (self._checkpoints, self._refs, self._refs / TAGS):
                for name in self._names_in(folder):
                    if name.startswith((TEMPORARY, _TRASH)) and not self._is_of_later_save(name):
                        self._try_remove(folder / name)

    def _is_of_later_save(self, name: str) -> bool:
        """Return whether another process may be writing into this temporary directory now."""
        if self._ranks is None or self._save_number is None:
            return False
        number = number_of(name)
        return number is not None and number > self._save_number

    def _reject(self, error: CheckpointError) -> None:
        # Only what is certainly damaged: an unreadable file may be readable tomorrow.
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
            extra=encode(request.extra, refuse_tensors),
            owners=list(request.owners),
            files={},
            # An older reader would not know of the parts.
            format_version=1 if self._ranks is None else PARTS_VERSION,
            min_reader=1 if self._ranks is None else PARTS_VERSION,
            world_size=msgspec.UNSET if self._ranks is None else self._ranks.world_size,
        )

    def _check_room(self, needed: int) -> None:
        needed = int(needed * FREE_SPACE_MARGIN)
        free = self._filesystem.free_bytes(self._checkpoints)
        if free < needed:
            raise DiskFullError(self._checkpoints, None, needed=needed, free=free)

    def _discard(self, temporary: Path, final: Path) -> None:
        """Make a failed save invisible, as far as the system allows."""
        with suppress(OSError):
            # It was renamed, but may not be durable.
            if os.path.lexists(final):
                self._filesystem.rename(final, self._trash_for(final.name))
        self.sweep()

    def _follow(
        self, actions: Sequence[Callable[[], None]], *, if_failed: str | None = None
    ) -> list[CheckpointError]:
        """Run the actions after a commit. A failure neither undoes the commit nor stops the other actions."""
        problems: list[CheckpointError] = []
        for action in actions:
            try:
                with self._translated(self._refs):
                    action()
            except CheckpointError as error:
                problems.append(error)
                self._has_leftovers = True
                if if_failed is not None:
                    # The checkpoint stays even if its tag could not be set.
                    self._unfollowed.add(if_failed)
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
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{next(self._numbers)}")
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
        pinned = {
            *self._pins,
            *self._unfollowed,
            *self._held,
            *self.tags().values(),
            *filter(None, (parent, best)),
        }
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
            # Neither counted as valid nor deleted.
            return False
        return True

    def _temporary_for(self, name: str) -> Path:
        return self._checkpoints / f"{TEMPORARY}{name}-{os.getpid()}-{next(self._numbers)}"

    def _trash_for(self, name: str) -> Path:
        return self._checkpoints / f"{_TRASH}{name}-{os.getpid()}-{next(self._numbers)}"

    def _try_remove(self, path: Path) -> list[OSError]:
        """Delete a path; after a failure the next sweep tries again. Return the failure."""
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
        """Let one thread at a time change files, and none after `close`."""
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
