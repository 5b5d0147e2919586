"""Directories: several directories of runs, listed as one. A process may give each of its runs another one."""

import threading
from pathlib import Path

import msgspec

from offloop.engine import RunCatalog, RunRecord


class Directories:
    """The runs of all directories. `add` is for any thread; everything else for one at a time, and blocks.

    A run of the first directory has its path there as its key; one of another directory its whole path, which no
    other run can have.
    """

    def __init__(self, runs_dir: Path) -> None:
        """Begin with one directory. It need not exist."""
        self.first = runs_dir
        self.rest = 0.0
        """Seconds that reading rests for each second that it works."""
        self.problem = ""
        """Why directories cannot be read, in words; empty if they can."""
        # Guards the catalogs, of which `add` may add one while `refresh` reads.
        self._lock = threading.Lock()
        self._catalogs = {runs_dir: RunCatalog(runs_dir)}
        self._listed: dict[str, RunRecord] = {}

    def add(self, runs_dir: Path) -> bool:
        """List the runs of one more directory; return False if it is listed already."""
        with self._lock:
            if runs_dir in self._catalogs:
                return False
            self._catalogs[runs_dir] = RunCatalog(runs_dir)
            return True

    def refresh(self) -> tuple[list[RunRecord], list[str]]:
        """Look at all directories again.

        Returns:
            The runs that are new or have changed, and the keys of those that are gone.
        """
        with self._lock:
            catalogs = list(self._catalogs.items())
        found: dict[str, RunRecord] = {}
        directories: set[str] = set()
        for runs_dir, catalog in catalogs:
            catalog.rest = self.rest
            catalog.refresh()
            for key, record in catalog.records.items():
                # One directory may be inside another one
                if record.directory in directories:
                    continue
                directories.add(record.directory)
                if runs_dir != self.first:
                    key, record = (
                        record.directory,
                        msgspec.structs.replace(record, key=record.directory),
                    )
                found[key] = record
        self.problem = "; ".join(catalog.problem for _, catalog in catalogs if catalog.problem)
        before, self._listed = self._listed, found
        # Most are the same objects as before
        changed = [
            record
            for key, record in found.items()
            if (old := before.get(key)) is not record and old != record
        ]
        return changed, [key for key in before if key not in found]
