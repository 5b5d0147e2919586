"""Copies of a run's checkpoints under names that people chose, in a directory of theirs.

    write   <directory>/.tmp-<name>/    each file a hard link where the disk allows it, else a copy, fsynced
    publish rename .tmp-<name> -> <name>

A copy appears whole or not at all, and goes when retention has deleted its checkpoint. What is in the directory
and is not a copy of this run's is never touched: a name that is taken gets a number.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from offloop.engine.checkpoint.errors import CheckpointError
from offloop.engine.checkpoint.reader import CheckpointInfo, CheckpointReader

_TEMPORARY = ".tmp-"


class NamedCopies:
    """The copies of one run. All methods block; one thread at a time."""

    def __init__(self, directory: Path, run_id: str, name_of: Callable[[CheckpointInfo], str]) -> None:
        """Keep copies in `directory`, which is made, and take over those that the run has there already.

        Raises:
            OSError: The directory cannot be made.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._run_id = run_id
        self._name_of = name_of
        self._copies: dict[str, Path] | None = None  # by the name of the checkpoint

    def follow(self, info: CheckpointInfo, deleted: Sequence[str]) -> None:
        """Copy a checkpoint that is durable, and remove the copies of those that are gone.

        Raises:
            OSError: The system would not; nothing half-written is visible then.
        """
        copies = self._known()
        copies[info.name] = self._copy(info)
        for name in deleted:
            if (copy := copies.pop(name, None)) is not None:
                shutil.rmtree(copy)

    def _known(self) -> dict[str, Path]:
        if self._copies is None:
            self._copies = {}
            reader = CheckpointReader(self.directory)
            for path in sorted(self.directory.iterdir()):
                with suppress(CheckpointError):  # not a checkpoint
                    found = reader.find(path)
                    if found.manifest.run_id == self._run_id and not path.name.startswith("."):
                        self._copies[found.name] = path
        return self._copies

    def _copy(self, info: CheckpointInfo) -> Path:
        base = name = self._name_of(info)
        number = 1
        while os.path.lexists(self.directory / name):
            number += 1
            name = f"{base}-{number}"
        temporary = self.directory / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            for source in info.path.iterdir():
                try:
                    os.link(source, temporary / source.name)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, temporary / source.name)
                    _sync(temporary / source.name)
            _sync(temporary)
            os.rename(temporary, self.directory / name)
            _sync(self.directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return self.directory / name


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
