"""Copies of a run's checkpoints under chosen names in a directory that the user names.

    write   <directory>/.tmp-<run>-<name>/    each file a hard link where the disk allows it, else a copy, fsynced
    note    <run>/refs/copies/<directory>/<name>            the name of the checkpoint
    replace rename <name> -> .tmp-<run>-<new name> or .trash-<run>-<name>, if another copy takes its name
    publish rename .tmp-<run>-<name> -> <name>
    delete  rename <name> -> .trash-<run>-<name>, then its files, then the note

A copy appears whole or not at all, and is deleted with its checkpoint. A resumed run deletes what a killed one left:
the notes show copies whose checkpoint was deleted in between, hidden names show half-written and half-deleted copies.
Other content of the directory is never touched: a copy whose name is taken gets a number. <run> and <directory> are
hashes of paths, because runs may share a directory and even their ids.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from offloop.engine.checkpoint.errors import CheckpointError
from offloop.engine.checkpoint.filesystem import FileSystem, make_directories, remove_tree, write_file
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.checkpoint.reader import CHECKPOINTS, REFS, CheckpointInfo, CheckpointReader

COPIES = "copies"


class NamedCopies:
    """The copies of one run. All methods block; use it from one thread at a time."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        name_of: Callable[[CheckpointInfo], str],
        filesystem: FileSystem | None = None,
    ) -> None:
        """Create the directory if it is missing. Copies that the run has there already are kept.

        Args:
            directory: Holds the copies.
            run_directory: The run's directory.
            name_of: Returns the name of a checkpoint's copy.
            filesystem: Changes the disk; tests give others.

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
        # By the name of the checkpoint; None until `take_over` has looked.
        self._copies: dict[str, Path] | None = None
        # Checkpoints whose copy the user has removed.
        self._dismissed: set[str] = set()

    def collides_with(self, other: Self) -> bool:
        """Return whether both give the same names in the same directory."""
        return self.directory.resolve() == other.directory.resolve() and self._name_of == other._name_of

    def mirror(self, wanted: Sequence[CheckpointInfo]) -> None:
        """Copy these checkpoints, and delete the copies of others that this object has made.

        Checkpoints with the same name get numbers, except for the first. A copy that the user has removed is not made
        again.

        Raises:
            OSError: The system refused; nothing half-written is visible.
        """
        copies = self.take_over()
        self._dismissed |= {name for name, path in copies.items() if not os.path.lexists(path)}
        copies = {name: path for name, path in copies.items() if name not in self._dismissed}
        targets = self._names_for([info for info in wanted if info.name not in self._dismissed], copies)
        # Hidden paths of new and renamed copies, by the name of the checkpoint.
        made: dict[str, Path] = {}
        try:
            for info in wanted:
                if info.name in targets and info.name not in copies:
                    made[info.name] = self._make(info, targets[info.name])
        except BaseException:
            for path in made.values():
                self._try_remove(path)
            raise
        # If the rest fails, the next call looks at the disk.
        self._copies = None
        changed = {
            name: path
            for name, path in copies.items()
            if targets.get(name) != path.name
            # Skip a directory that has been replaced by something else.
            and self._checkpoint_of(path) == name
        }
        trash = [self._hide(path) for name, path in changed.items() if name not in targets]
        for name, path in changed.items():
            if name in targets:
                hidden = self.directory / f"{self._temporary}{targets[name]}"
                self._filesystem.rename(path, hidden)
                self._forget(path.name)
                made[name] = hidden
        for name, hidden in made.items():
            self._note(targets[name], name)
            self._filesystem.rename(hidden, self.directory / targets[name])
        if made or trash:
            self._filesystem.sync_directory(self.directory)
        for path, name in trash:
            remove_tree(self._filesystem, path)
            self._forget(name)
        self._copies = {name: self.directory / target for name, target in targets.items()}

    def _names_for(self, wanted: Sequence[CheckpointInfo], copies: Mapping[str, Path]) -> dict[str, str]:
        """Return the names of the copies by those of their checkpoints; names in use by others are avoided."""
        own = {path.name for path in copies.values()}
        names: dict[str, str] = {}
        for info in wanted:
            base = name = self._name_of(info)
            number = 1
            while name in names.values() or (os.path.lexists(self.directory / name) and name not in own):
                number += 1
                name = f"{base}-{number}"
            names[info.name] = name
        return names

    def take_over(self) -> dict[str, Path]:
        """Return the run's copies by the names of their checkpoints. The first call cleans up after a killed run.

        Raises:
            OSError: The system refused.
        """
        if self._copies is not None:
            return self._copies
        for path in self.directory.iterdir():
            if path.name.startswith((self._temporary, self._trash)):
                self._try_remove(path)
        copies: dict[str, Path] = {}
        # Names of copies, including those of other owners.
        whole: set[str] = set()
        noted = self._noted()
        for path in sorted(self.directory.iterdir()):
            checkpoint = self._checkpoint_of(path)
            if checkpoint is not None and self._is_copy(path, self._checkpoints / checkpoint):
                whole.add(path.name)
                if self._is_own_name(path):
                    copies[checkpoint] = path
            elif checkpoint is not None and noted.get(path.name) == checkpoint:
                self._remove(path)
        for name in sorted(noted.keys() - whole):
            self._forget(name)
        self._copies = copies
        return copies

    def _is_own_name(self, path: Path) -> bool:
        """Return whether this object gave the copy its name; another owner may use the same directory."""
        base = self._name_of(CheckpointReader(self.directory).find(path))
        return re.fullmatch(rf"{re.escape(base)}(-\d+)?", path.name) is not None

    def _noted(self) -> dict[str, str]:
        """Return the checkpoints of the copies by the notes. A half-written note names none."""
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
        # An OSError means that the checkpoint is gone.
        with suppress(OSError):
            return (path / MANIFEST).read_bytes() == (checkpoint / MANIFEST).read_bytes()
        return False

    def _make(self, info: CheckpointInfo, name: str) -> Path:
        """Copy a checkpoint durably to a hidden path and return that path."""
        temporary = self.directory / f"{self._temporary}{name}"
        self._try_remove(temporary)
        try:
            self._filesystem.make_directory(temporary)
            for source in sorted(info.path.iterdir()):
                try:
                    self._filesystem.link(source, temporary / source.name)
                # Another disk, or one without links.
                except OSError:
                    shutil.copyfile(source, temporary / source.name)
                    self._filesystem.sync_file(temporary / source.name)
            self._filesystem.sync_directory(temporary)
        except BaseException:
            self._try_remove(temporary)
            raise
        return temporary

    def _note(self, name: str, checkpoint: str) -> None:
        make_directories(self._filesystem, self._notes.absolute())
        self._forget(name)
        write_file(self._filesystem, self._notes / name, f"{checkpoint}\n".encode())
        self._filesystem.sync_directory(self._notes)

    def _remove(self, copy: Path) -> None:
        trash, name = self._hide(copy)
        self._filesystem.sync_directory(self.directory)
        remove_tree(self._filesystem, trash)
        self._forget(name)

    def _hide(self, copy: Path) -> tuple[Path, str]:
        """Rename a copy to a hidden path; return that path and the former name."""
        trash = self.directory / f"{self._trash}{copy.name}"
        self._try_remove(trash)
        # The user may have removed it.
        with suppress(FileNotFoundError):
            self._filesystem.rename(copy, trash)
        return trash, copy.name

    def _forget(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.remove_file(self._notes / name)

    def _try_remove(self, path: Path) -> None:
        """Remove a directory; on failure it stays for the next time."""
        with suppress(OSError):
            remove_tree(self._filesystem, path)


def _hash_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]
