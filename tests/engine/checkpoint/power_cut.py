"""A model of what a power cut may leave on a disk, from a record of what was done.

It is weaker than any file system in use. Until a file is fsynced, each of its writes may be lost
by itself or be there in part. Until a directory is fsynced, each name made, moved or removed in
it may or may not have reached the disk, in any combination. Only one rename is all or nothing.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_support import InterceptedFileSystem, step_of

from offloop.engine.checkpoint import CheckpointStore, LoadedCheckpoint

Files = dict[str, bytes]
"""A tree: content by relative path; a directory's path ends in a slash."""


@dataclass(frozen=True)
class Done:
    """One operation of a record. `number` tells files apart that had the same name."""

    operation: str
    path: Path = Path()
    target: Path = Path()
    number: int = -1
    data: bytes = b""


class RecordingFileSystem(InterceptedFileSystem):
    """Do what is asked for and write it down."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Done] = []
        self._next_number = itertools.count()
        self._numbers: dict[int, int] = {}

    def open_new(self, path: Path) -> int:
        file = super().open_new(path)
        self._numbers[file] = next(self._next_number)
        self.log.append(Done("create", path, number=self._numbers[file]))
        return file

    def write(self, file: int, data: memoryview) -> int:
        count = super().write(file, data)
        self.log.append(Done("write", number=self._numbers[file], data=bytes(data[:count])))
        return count

    def sync(self, file: int) -> None:
        super().sync(file)
        self.log.append(Done("sync", number=self._numbers[file]))

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.log.append(Done("mkdir", path))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.log.append(Done("syncdir", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(Done("rename", source, target))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.log.append(Done("rename", source, target))

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self.log.append(Done("remove", path))

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self.log.append(Done("remove", path))


@dataclass(eq=False)
class Inode:
    """A file or a directory; what it holds is what is certain to survive."""

    is_directory: bool
    content: bytes = b""
    entries: dict[str, "Inode"] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PendingWrite:
    """Bytes that a cut may take."""

    inode: Inode
    data: bytes


@dataclass(frozen=True, eq=False)
class PendingName:
    """A name that a cut may bring back or take."""

    directory: Inode
    removed: str | None
    added: str | None
    inode: Inode | None

    def apply(self, entries: dict[str, Inode]) -> None:
        if self.removed is not None:
            entries.pop(self.removed, None)
        if self.added is not None and self.inode is not None:
            entries[self.added] = self.inode


class PowerCut:
    """The disks that a cut can leave: built from the tree before, then operation by operation."""

    def __init__(self, base: Path, before: Files) -> None:
        self._base = base
        self._root = _build(before)
        self.pending: list[PendingWrite | PendingName] = []
        self._files: dict[int, Inode] = {}
        # The names as the program sees them, which is what is on the disk plus all pending.
        self._seen: dict[int, dict[str, Inode]] = {}

    def run(self, done: Done) -> None:
        """Go on by one operation."""
        match done.operation:
            case "write":
                self.pending.append(PendingWrite(self._files[done.number], done.data))
            case "sync":
                inode = self._files[done.number]
                for change in self._take(lambda c: isinstance(c, PendingWrite) and c.inode is inode):
                    assert isinstance(change, PendingWrite)
                    inode.content += change.data
            case "syncdir":
                directory = self._find(done.path)
                for change in self._take(lambda c: isinstance(c, PendingName) and c.directory is directory):
                    assert isinstance(change, PendingName)
                    change.apply(directory.entries)
            case _:
                self._change_name(done)

    def _take(
        self, belongs: Callable[[PendingWrite | PendingName], bool]
    ) -> list[PendingWrite | PendingName]:
        taken = [change for change in self.pending if belongs(change)]
        self.pending = [change for change in self.pending if not belongs(change)]
        return taken

    def _change_name(self, done: Done) -> None:
        directory, name = self._find(done.path.parent), done.path.name
        names = self._names(directory)
        if done.operation in ("create", "mkdir"):
            inode = Inode(done.operation == "mkdir")
            self._files[done.number] = inode
            change = PendingName(directory, None, name, inode)
        elif done.operation == "remove":
            change = PendingName(directory, name, None, None)
        else:
            assert done.target.parent == done.path.parent
            change = PendingName(directory, name, done.target.name, names[name])
        change.apply(names)
        self.pending.append(change)

    def _names(self, directory: Inode) -> dict[str, Inode]:
        return self._seen.setdefault(id(directory), dict(directory.entries))

    def _find(self, path: Path) -> Inode:
        inode = self._root
        for part in path.relative_to(self._base).parts:
            inode = self._names(inode)[part]
        return inode

    def tree(self, survives: Callable[[int], float]) -> Files:
        """Return what is left if of the n-th pending change this part survives.

        A name survives whole for any part above 0.
        """
        entries: dict[int, dict[str, Inode]] = {}
        content: dict[int, bytes] = {}
        for index, change in enumerate(self.pending):
            part = survives(index)
            if isinstance(change, PendingWrite):
                kept = change.data[: int(len(change.data) * part)]
                before = content.get(id(change.inode), change.inode.content)
                content[id(change.inode)] = before + kept + bytes(len(change.data) - len(kept))
            elif part:
                directory = change.directory
                change.apply(entries.setdefault(id(directory), dict(directory.entries)))
        files: Files = {}

        def collect(inode: Inode, path: str) -> None:
            for name, child in entries.get(id(inode), inode.entries).items():
                if child.is_directory:
                    files[f"{path}{name}/"] = b""
                    collect(child, f"{path}{name}/")
                else:
                    files[path + name] = content.get(id(child), child.content)

        collect(self._root, "")
        return files

    def all_trees(self) -> Iterator[Files]:
        """Yield what every combination leaves."""
        for kept in itertools.product((0.0, 1.0), repeat=len(self.pending)):
            yield self.tree(kept.__getitem__)

    def random_tree(self, source: random.Random) -> Files:
        """Return what one combination leaves, with writes torn in the middle."""
        parts = [source.choice((0.0, 0.0, 1.0, source.random())) for _ in self.pending]
        return self.tree(parts.__getitem__)


def _build(files: Files) -> Inode:
    root = Inode(True)
    for path, content in files.items():
        inode = root
        parts = path.rstrip("/").split("/")
        for part in parts[:-1]:
            inode = inode.entries.setdefault(part, Inode(True))
        inode.entries.setdefault(parts[-1], Inode(path.endswith("/"), content))
    return root


def read_tree(directory: Path) -> Files:
    """Return what is on a real disk."""
    files: Files = {}
    for folder, names, file_names in os.walk(directory):
        prefix = "" if folder == str(directory) else f"{Path(folder).relative_to(directory)}/"
        files |= {f"{prefix}{name}/": b"" for name in names}
        files |= {f"{prefix}{name}": (Path(folder) / name).read_bytes() for name in file_names}
    return files


def write_tree(files: Files, directory: Path) -> None:
    """Put a tree on a real disk."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        path = directory / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def seen_by_readers(files: Files) -> tuple[tuple[str, bytes], ...]:
    """Return the part of a tree that a reader looks at: nothing temporary, no trash."""
    hidden = ("/.tmp-", "/.trash-")
    return tuple(sorted((n, c) for n, c in files.items() if not any(h in f"/{n}" for h in hidden)))


def step_of_loaded(loaded: LoadedCheckpoint) -> int:
    """Return the step of a checkpoint, after checking all of it."""
    return step_of(loaded.state)


def verdict(
    files: Files, directory: Path, step_in: Callable[[LoadedCheckpoint], int] = step_of_loaded
) -> int:
    """Return the newest loadable step, read like a resumed run does; -1 for none."""
    write_tree(files, directory)
    try:
        with CheckpointStore(directory) as store:
            return step_in(store.load("last", on_corrupt="raise"))
    except Exception:
        return -1
    finally:
        shutil.rmtree(directory)


def assert_old_or_new(base: Path, log: Sequence[Done], possible: Sequence[set[int]]) -> None:
    """Assert that a power cut in the save of step 3 leaves step 2 or 3, and step 3 once the save has said so.

    Args:
        base: The directory of the run.
        log: The operations of the save.
        possible: See `possible_steps`.
    """
    assert set().union(*possible) == {2, 3}
    settled = max(
        index
        for index, done in enumerate(log)
        if done.operation == "rename" and done.path.name.startswith(".tmp-step")
    )
    assert log[settled + 1] == Done("syncdir", base / "checkpoints")
    assert all(steps == {3} for steps in possible[settled + 2 :]), "durable when it says so"
    assert all(2 in steps for steps in possible[: settled + 2])


def possible_steps(
    base: Path,
    before: Files,
    log: Sequence[Done],
    scratch: Path,
    *,
    rolls: int = 0,
    step_in: Callable[[LoadedCheckpoint], int] = step_of_loaded,
) -> list[set[int]]:
    """Return, for a cut after each operation, the steps that may be found.

    All combinations of lost changes while there are few; `rolls` random ones at each cut too.
    """
    source = random.Random(0)
    cut = PowerCut(base, before)
    known: dict[object, int] = {}
    possible: list[set[int]] = []
    for index in range(len(log) + 1):
        trees = list(cut.all_trees()) if len(cut.pending) <= 10 else []
        trees += [cut.random_tree(source) for _ in range(rolls)]
        found: set[int] = set()
        for files in trees:
            seen = seen_by_readers(files)
            if seen not in known:  # what is hidden from readers decides nothing
                known[seen] = verdict(files, scratch, step_in)
            found.add(known[seen])
        possible.append(found)
        if index < len(log):
            cut.run(log[index])
    return possible
