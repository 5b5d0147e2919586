"""One writer per run: a lock that the kernel releases when its holder dies.

The lock is `flock` on `LOCK`. The text in the file names the holder for error messages, and decides only where the
file system has no `flock`.
"""

import errno
import fcntl
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from offloop.engine.checkpoint.errors import RunLockedError
from offloop.engine.checkpoint.filesystem import open_own

LOCK = "LOCK"
PAUSES: Final = (0.001, 0.01, 0.1)
"""Seconds before a lock that is taken is tried again: `has_writer` holds it for some microseconds."""
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


class Owner(msgspec.Struct, frozen=True):
    """Who holds a lock."""

    pid: int
    host: str
    boot_id: str
    """Changes when the machine restarts; a process of an earlier boot is gone."""
    since: float
    """Unix seconds."""

    def is_gone(self) -> bool:
        """Return whether this process has certainly ended."""
        if self.host != socket.gethostname():
            return False
        if self.boot_id != _boot_id():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class _HeldFile:
    """An open file whose lock is ours, until `release`."""

    _file: int

    def release(self) -> None:
        """Release the lock. Any thread; calling twice is fine."""
        # Only one thread gets past this: a descriptor that is closed twice may belong to another file by then.
        try:
            _held.remove(self)
        except KeyError:
            return
        with suppress(OSError):
            self._forget_owner()
        # Closing is not enough: a forked child may hold a copy of the descriptor.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)

    def _forget_owner(self) -> None:
        """Clear the owner in the file, while the lock is held."""


class RunLock(_HeldFile):
    """The right to write to a run, held from `__init__` until `release`.

    If the holder is killed, the lock is free at once. Forked children (loader workers) do not keep the lock when
    their parent dies.

    Raises:
        RunLockedError: Another process, or another store in this one, holds it.
        OSError: The file cannot be opened, or is a link.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._file = open_own(self._path, os.O_RDWR)
        try:
            self._lock()
            self._write_owner()
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self)

    def _lock(self) -> None:
        try:
            _lock(self._file)
        except BlockingIOError as error:
            raise RunLockedError(self._path, str(_owner_in(self._file) or "another process")) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            owner = _owner_in(self._file)
            if owner is not None and not owner.is_gone():
                raise RunLockedError(self._path, str(owner)) from error

    def _write_owner(self) -> None:
        owner = Owner(os.getpid(), socket.gethostname(), _boot_id(), time.time())
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, msgspec.json.encode(owner), 0)

    def _forget_owner(self) -> None:
        os.ftruncate(self._file, 0)


class DirectoryLock(_HeldFile):
    """A lock on a run's directory, held from `__init__` until `release`. Leaves no file.

    A run takes it at its start, so that no second run of the same name starts before the first checkpoint opens a
    store. Where the file system cannot lock directories, it locks nothing.

    Raises:
        RunLockedError: Another process, or another run in this one, holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(self._file)
        except BlockingIOError as error:
            os.close(self._file)
            raise RunLockedError(directory / LOCK, "another run") from error
        except OSError as error:
            # EBADF: NFS wants it open for writing.
            if error.errno not in _UNSUPPORTED | {errno.EBADF}:
                os.close(self._file)
                raise
        _held.add(self)


def has_writer(directory: Path) -> bool | None:
    """Return whether a process writes to a run, by its locks; None if the file system has none. Any thread; blocks.

    A lock that is free is taken, shared, for some microseconds. A run that starts in that moment tries again.

    Raises:
        OSError: The directory is gone, or cannot be read.
    """
    held = _is_locked(directory, os.O_DIRECTORY)
    if not held:
        with suppress(FileNotFoundError):
            of_store = _is_locked(directory / LOCK, os.O_NOFOLLOW | os.O_NONBLOCK)
            # Some file systems lock files, but not directories
            held = of_store if held is None else bool(of_store)
            if held is None:
                owner = _read_owner(directory / LOCK)
                held = False if owner is not None and owner.is_gone() else None
    return held


def _is_locked(path: Path, flags: int) -> bool | None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        # Releases the lock
        os.close(file)
    return False


def _read_owner(path: Path) -> Owner | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _owner_in(file)
    finally:
        os.close(file)


def _owner_in(file: int) -> Owner | None:
    try:
        return msgspec.json.decode(os.pread(file, 4096, 0), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _lock(file: int) -> None:
    for pause in PAUSES:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(pause)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_held: weakref.WeakSet[_HeldFile] = weakref.WeakSet()


def _forget_in_child() -> None:
    # fork shares the open file, which owns the lock: an orphaned loader worker would keep a dead run locked.
    # Closing the child's copy does not release the parent's lock.
    for lock in list(_held):
        os.close(lock._file)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
