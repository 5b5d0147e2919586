"""Copies of a run's checkpoints under names that people chose, in a directory of theirs.

    write   <directory>/.tmp-<run>-<name>/    each file a hard link where the disk allows it, else a copy, fsynced
    note    <run>/refs/copies/<directory>/<name>            the name of the checkpoint
    publish rename .tmp-<run>-<name> -> <name>
    delete  rename <name> -> .trash-<run>-<name>, then its files, then the note

A copy appears whole or not at all, and goes when its checkpoint has gone. What a killed run left is deleted when the
run goes on: by the notes, copies whose checkpoint was deleted in between; by their names, what was half written or
half deleted. What is in the directory and is not a copy of this run's is never touched: a name that is taken gets a
number. Here <run> and <directory> stand for hashes of their paths: runs may share a directory, and their ids.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from offloop.engine.checkpoint.errors import CheckpointError
from offloop.engine.checkpoint.filesystem import FileSystem, make_directories, remove_tree, write_file
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.checkpoint.reader import CHECKPOINTS, REFS, CheckpointInfo, CheckpointReader

COPIES = "copies"


class NamedCopies:
    """The copies of one run. All methods block; one thread at a time."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        name_of: Callable[[CheckpointInfo], str],
        filesystem: FileSystem | None = None,
    ) -> None:
        """Keep copies in `directory`, which is made, and take over those that the run has there already.

        Args:
            directory: Where the copies stand.
            run_directory: Of the run whose checkpoints they are.
            name_of: Gives a copy its name.
            filesystem: What changes the disk; tests give others.

        Raises:
            OSError: The directory cannot be made.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpoints = run_directory / CHECKPOINTS
        self._notes = run_directory / REFS / COPIES / _hash_of(directory)
        self._name_of = name_of
        self._temporary, self._trash = (f".{kind}-{_hash_of(run_directory)}-" for kind in ("tmp", "trash"))
        self._filesystem = filesystem or FileSystem()
        self._copies: dict[str, Path] | None = None  # by the name of the checkpoint

    def follow(self, info: CheckpointInfo, deleted: Sequence[str]) -> None:
        """Copy a checkpoint that is durable, and remove the copies of those that are gone.

        Raises:
            OSError: The system would not; nothing half-written is visible then.
        """
        copies = self.take_over()
        copies[info.name] = self._copy(info)
        for name in deleted:
            if (copy := copies.pop(name, None)) is not None:
                self._remove(copy)

    def take_over(self) -> dict[str, Path]:
        """Return the run's copies by the names of their checkpoints; the first call cleans up after a killed run.

        Raises:
            OSError: The system would not.
        """
        if self._copies is not None:
            return self._copies
        for path in self.directory.iterdir():
            if path.name.startswith((self._temporary, self._trash)):
                self._try_remove(path)
        copies: dict[str, Path] = {}
        noted = self._noted()
        for path in sorted(self.directory.iterdir()):
            checkpoint = self._checkpoint_of(path)
            if checkpoint is not None and self._is_copy(path, self._checkpoints / checkpoint):
                copies[checkpoint] = path
            elif checkpoint is not None and noted.get(path.name) == checkpoint:
                self._remove(path)
        for name in sorted(noted.keys() - {path.name for path in copies.values()}):
            self._forget(name)
        self._copies = copies
        return copies

    def _noted(self) -> dict[str, str]:
        """Return which checkpoint each copy is of, by the notes; one that is half there names none."""
        return {
            path.name: path.read_text(encoding="ascii", errors="replace").strip()
            for path in (self._notes.iterdir() if self._notes.is_dir() else ())
            if path.is_file() and not path.is_symlink()
        }

    def _checkpoint_of(self, path: Path) -> str | None:
        """Return the name of the checkpoint that a directory is a copy of, None if it is no such copy."""
        if path.name.startswith(".") or path.is_symlink():
            return None
        try:
            return CheckpointReader(self.directory).find(path).name
        except CheckpointError:
            return None

    @staticmethod
    def _is_copy(path: Path, checkpoint: Path) -> bool:
        with suppress(OSError):  # the checkpoint is gone
            return (path / MANIFEST).read_bytes() == (checkpoint / MANIFEST).read_bytes()
        return False

    def _copy(self, info: CheckpointInfo) -> Path:
        base = name = self._name_of(info)
        number = 1
        while os.path.lexists(self.directory / name):
            number += 1
            name = f"{base}-{number}"
        temporary = self.directory / f"{self._temporary}{name}"
        self._try_remove(temporary)
        try:
            self._filesystem.make_directory(temporary)
            for source in sorted(info.path.iterdir()):
                try:
                    self._filesystem.link(source, temporary / source.name)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, temporary / source.name)
                    self._filesystem.sync_file(temporary / source.name)
            self._filesystem.sync_directory(temporary)
            self._note(name, info.name)
            self._filesystem.rename(temporary, self.directory / name)
            self._filesystem.sync_directory(self.directory)
        except BaseException:
            self._try_remove(temporary)
            raise
        return self.directory / name

    def _note(self, name: str, checkpoint: str) -> None:
        make_directories(self._filesystem, self._notes.absolute())
        self._forget(name)
        write_file(self._filesystem, self._notes / name, f"{checkpoint}\n".encode())
        self._filesystem.sync_directory(self._notes)

    def _remove(self, copy: Path) -> None:
        trash = self.directory / f"{self._trash}{copy.name}"
        self._try_remove(trash)
        with suppress(FileNotFoundError):  # a person was faster
            self._filesystem.rename(copy, trash)
            self._filesystem.sync_directory(self.directory)
            remove_tree(self._filesystem, trash)
        self._forget(copy.name)

    def _forget(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.remove_file(self._notes / name)

    def _try_remove(self, path: Path) -> None:
        """Remove what is left of something; what resists stays for next time."""
        with suppress(OSError):
            remove_tree(self._filesystem, path)


def _hash_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]
