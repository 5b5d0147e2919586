"""Content of a sample that is in a file of its run's directory: what it is called, and reading it.

Whoever can write the directory can write these files, and the log that tells of them. So a file is only read if it is
what was published, and no name but those made here is ever opened.
"""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from offloop.engine.errors import SampleFileError

MediaType = Literal["image/png", "image/jpeg", "image/webp"]

SAMPLE_BYTES: Final = 10_000_000
"""Most bytes of a text, and of the pictures of one table."""
FOLDER: Final = "samples"
"""Folder in the directory of a run."""
SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")
FILE_NAME: Final = re.compile(r"[0-9a-f]{64}\.(txt|png|jpg|webp)\Z")
"""Name of a file in it."""
_ENDINGS: Final = {"text/plain": "txt", "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def media_type_of(data: bytes) -> MediaType | None:
    """Return the media type of an encoded picture by its first bytes; None if it is none that is taken."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def file_name(sha256: str, media_type: str) -> str:
    """Return the name of a content's file."""
    return f"{sha256}.{_ENDINGS[media_type]}"


def read_file(directory: Path, sha256: str, media_type: str, size: int) -> bytes:
    """Return a content from the directory of a run. Blocks. Reads nothing through links, and no more than `size`.

    Args:
        directory: Of the run.
        sha256: Of the content.
        media_type: Of the content.
        size: Bytes that it has.

    Raises:
        SampleFileError: The file is missing, cannot be read, or is not what was published.
    """
    if not SHA256.match(sha256) or media_type not in _ENDINGS:
        raise SampleFileError(f"{sha256[:80]!r} with {media_type!r} names no file of a sample")
    if not 0 < size <= SAMPLE_BYTES:
        raise SampleFileError(
            f"its event speaks of {size:,} bytes, and a sample has at most {SAMPLE_BYTES:,}"
        )
    name = file_name(sha256, media_type)
    where = f"{FOLDER}/{name[:12]}…"
    try:
        with open_folder(directory, create=False) as folder:
            data = _read(folder, name, size)
    except FileNotFoundError as error:
        raise SampleFileError(f"its file {where} is missing") from error
    except OSError as error:
        raise SampleFileError(f"its file {where} cannot be read: {error.strerror or error}") from error
    is_whole = len(data) == size and hashlib.sha256(data).hexdigest() == sha256
    if not is_whole or (media_type != "text/plain" and media_type_of(data) != media_type):
        raise SampleFileError(f"its file {where} has changed on disk since it was published")
    return data


@contextlib.contextmanager
def open_folder(directory: Path, *, create: bool) -> Iterator[int]:
    """Open the folder of a run's samples."""
    path = directory / FOLDER
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
    folder = os.open(path, _FOLDER_FLAGS)
    try:
        yield folder
    finally:
        os.close(folder)


def _read(folder: int, name: str, size: int) -> bytes:
    """Return the content of a regular file, at most a byte more than it should have."""
    file = os.open(name, READ_FLAGS, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return b""
        parts = []
        missing = size + 1
        while missing and (part := os.read(file, min(missing, 1 << 20))):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
    finally:
        os.close(file)
