"""Copies of a run's checkpoints under names that people chose, in a directory of theirs.

    write   <directory>/.tmp-<run>-<name>/    each file a hard link where the disk allows it, else a copy, fsynced
    note    <run>/refs/copies/<directory>/<name>            the name of the checkpoint
    replace rename <name> -> .tmp-<run>-<new name> or .trash-<run>-<name>, where another is to have its name
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
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
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
        self._dismissed: set[str] = set()  # checkpoints whose copy a person has removed

    def collides_with(self, other: NamedCopies) -> bool:
        """True if the other one has copies under the same names in the same directory."""
        return self.directory.resolve() == other.directory.resolve() and self._name_of == other._name_of

    def mirror(self, wanted: Sequence[CheckpointInfo]) -> None:
        """Make the directory hold copies of these checkpoints, and of no others of this run that this object has made.

        Where several have one name, the first has it, and the others get numbers. A copy that a person has removed
        is not made again.

        Raises:
            OSError: The system would not; nothing half-written is visible then.
        """
        copies = self.take_over()
        self._dismissed |= {name for name, path in copies.items() if not os.path.lexists(path)}
        copies = {name: path for name, path in copies.items() if name not in self._dismissed}
        targets = self._names_for([info for info in wanted if info.name not in self._dismissed], copies)
        made: dict[str, Path] = {}  # by the name of the checkpoint, under a hidden name
        try:
            for info in wanted:
                if info.name in targets and info.name not in copies:
                    made[info.name] = self._make(info, targets[info.name])
        except BaseException:
            for path in made.values():
                self._try_remove(path)
            raise
        self._copies = None  # where the rest fails, the next call looks what there is
        changed = {
            name: path
            for name, path in copies.items()
            if targets.get(name) != path.name
            and self._checkpoint_of(path) == name  # else a stranger's by now
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
        """Return the name of each copy by that of its checkpoint; what others have is left to them."""
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
        whole: set[str] = set()  # names of copies, of other owners too
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
        """True if the copy has a name that this object gives; another owner may have its own in this directory."""
        base = self._name_of(CheckpointReader(self.directory).find(path))
        return re.fullmatch(rf"{re.escape(base)}(-\d+)?", path.name) is not None

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

    def _make(self, info: CheckpointInfo, name: str) -> Path:
        """Copy a checkpoint to a hidden place, down to the disk; return where."""
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
        """Move a copy out of sight; return where to, and the name that it had."""
        trash = self.directory / f"{self._trash}{copy.name}"
        self._try_remove(trash)
        with suppress(FileNotFoundError):  # a person was faster
            self._filesystem.rename(copy, trash)
        return trash, copy.name

    def _forget(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.remove_file(self._notes / name)

    def _try_remove(self, path: Path) -> None:
        """Remove what is left of something; what resists stays for next time."""
        with suppress(OSError):
            remove_tree(self._filesystem, path)


def _hash_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]
