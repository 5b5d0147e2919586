"""LineFile: a log file that grows by whole lines, and is never written through a link.

A disk may be full in the middle of a line. The part that was written is then removed, so that the next line does not
continue it.
"""

import errno
import os
import stat
from pathlib import Path

from offloop.engine.checkpoint.filesystem import FileSystem, open_own


class LineFile:
    """An open file of lines. One thread at a time; everything blocks on the file system."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending, or create it. An incomplete last line is cut off.

        Raises:
            OSError: It cannot be opened, or it is a link or no regular file.
        """
        self.path = path
        self._file = open_own(path, os.O_RDWR | os.O_APPEND)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise OSError(errno.EINVAL, "is no regular file", str(path))
            self._size = self._end_of_lines()
            os.ftruncate(self._file, self._size)
        except BaseException:
            os.close(self._file)
            raise
        self._is_torn = False  # True while the file ends with a part of a line that could not be removed
        self._is_closed = False

    def append(self, lines: bytes) -> None:
        """Append lines that end with a newline: all of them or nothing.

        Raises:
            OSError: The file cannot be written; it is unchanged.
        """
        if self._is_torn:
            lines = b"\n" + lines
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            try:
                os.ftruncate(self._file, self._size)
            except OSError:
                self._is_torn = len(rest) < len(lines)
            raise
        self._is_torn = False
        self._size += len(lines)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes, which must end with a line."""
        os.ftruncate(self._file, size)
        self._size = size

    def sync(self) -> None:
        """Block until everything appended, and the file's name, survive a power cut."""
        os.fsync(self._file)
        FileSystem().sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the file. Twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._file)

    def _end_of_lines(self) -> int:
        """Return the number of bytes up to the end of the last whole line."""
        position = os.fstat(self._file).st_size
        while position:
            start = max(0, position - 65536)
            newline = os.pread(self._file, position - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
        return 0
