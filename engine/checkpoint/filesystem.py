"""The file operations of checkpoints.

All changes of the disk go through an object of this class. Tests replace it by one that fails the n-th operation,
stops there, or records operations to build every state that a power cut could leave.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from offloop.engine.checkpoint.errors import CheckpointWriteError, DiskFullError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class FileSystem:
    """Calls the operating system. All methods block; all failures are `OSError`s."""

    def make_directory(self, path: Path) -> None:
        """Create a directory that does not exist yet."""
        os.mkdir(path)

    def open_new(self, path: Path) -> int:
        """Create a file that does not exist yet, and open it for writing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o666)

    def write(self, file: int, data: memoryview) -> int:
        """Write some of `data`; return the number of bytes written."""
        return os.write(file, data)

    def sync(self, file: int) -> None:
        """Make an open file's content durable."""
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_file(self, path: Path) -> None:
        """Make the content of a file durable."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def link(self, source: Path, target: Path) -> None:
        """Create a hard link."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory or file to an unused name (atomic, not yet durable)."""
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Replace a file by another (atomic, not yet durable)."""
        os.replace(source, target)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def remove_file(self, path: Path) -> None:
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)

    def list_directory(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted; empty if it does not exist."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def free_bytes(self, path: Path) -> int:
        """Return the bytes that an unprivileged user may still write."""
        numbers = os.statvfs(path)
        return numbers.f_bavail * numbers.f_frsize


def write_all(filesystem: FileSystem, file: int, data: memoryview) -> None:
    """Write all of `data`. Blocks."""
    while len(data):
        try:
            count = filesystem.write(file, data)
        except InterruptedError:
            continue
        if count <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        data = data[count:]


def write_file(filesystem: FileSystem, path: Path, content: bytes) -> None:
    """Create a small file and make its content durable. Blocks."""
    file = filesystem.open_new(path)
    try:
        write_all(filesystem, file, memoryview(content))
        filesystem.sync(file)
    finally:
        filesystem.close(file)


def open_own(path: Path, flags: int) -> int:
    """Open a file for writing, create it if it is missing. Never follows a link. Blocks.

    Raises:
        OSError: It cannot be opened, or is a link, whose target does not belong to the run.
    """
    flags |= os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            text = "it is a link, and nothing is written through links: remove it"
            raise OSError(errno.ELOOP, text, str(path)) from error
        raise


def replace_file(path: Path, content: bytes, filesystem: FileSystem | None = None) -> None:
    """Replace a file atomically and durably. Blocks.

    Links are never followed: one under this name is replaced, one under the temporary name `.<name>.new` removed.
    """
    filesystem = filesystem or FileSystem()
    temporary = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        filesystem.remove_file(temporary)
    try:
        write_file(filesystem, temporary, content)
        filesystem.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            filesystem.remove_file(temporary)
        raise
    filesystem.sync_directory(path.parent)


def make_directories(filesystem: FileSystem, path: Path) -> None:
    """Create a directory and its missing parents, durably. Blocks."""
    if path.is_dir():
        return
    make_directories(filesystem, path.parent)
    try:
        filesystem.make_directory(path)
    except FileExistsError:
        return
    filesystem.sync_directory(path.parent)


def remove_tree(filesystem: FileSystem, path: Path) -> None:
    """Delete a directory and its content; of a link, only the link. Blocks."""
    if path.is_symlink():
        filesystem.remove_file(path)
        return
    for name in filesystem.list_directory(path):
        inside = path / name
        if stat.S_ISDIR(os.lstat(inside).st_mode):
            remove_tree(filesystem, inside)
        else:
            filesystem.remove_file(inside)
    filesystem.remove_directory(path)


def write_error(error: OSError, path: Path, *, needed: int, filesystem: FileSystem) -> CheckpointWriteError:
    """Return our exception for the system's."""
    if error.errno not in NO_ROOM:
        return CheckpointWriteError(path, error.errno, error.strerror or str(error))
    try:
        free = filesystem.free_bytes(path.parent)
    except OSError:
        free = 0
    return DiskFullError(path, error.errno, needed=needed, free=free)
