"""Files of run directories, read with suspicion: a directory may hold links, pipes and files of any size."""

import errno
import os
import stat
from pathlib import Path
from typing import Final

MAX_SMALL_FILE: Final = 16 * 1024 * 1024
"""Bytes of the largest `run.json` or `labels.json` that is read."""


def open_regular(path: Path | str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading, and return its descriptor and state. Never follows a link. Blocks.

    Raises:
        OSError: It is missing, no regular file, or cannot be read.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for a writer
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(errno.ELOOP, "it is a link, and links are not followed", str(path)) from None
        raise
    try:
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return file, state
    except BaseException:
        os.close(file)
        raise


def read_small_file(path: Path | str) -> bytes:
    """Return the content of a file of at most 16 MiB. Blocks.

    Raises:
        OSError: It is missing, larger, no regular file, or cannot be read.
    """
    file, state = open_regular(path)
    try:
        if state.st_size > MAX_SMALL_FILE:
            raise OSError(errno.EFBIG, f"it has {state.st_size:,} bytes", str(path))
        return read_range(file, 0, state.st_size)
    finally:
        os.close(file)


def read_range(file: int, start: int, size: int) -> bytes:
    """Return bytes of an open file; fewer where it ends. Blocks."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(file, size, start)):
        parts.append(part)
        start += len(part)
        size -= len(part)
    return b"".join(parts)
