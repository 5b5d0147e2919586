"""The address of a run's page, in a file of its directory while the process that trains serves it.

The file has the address without a token: it tells where to steer the run, and lets no one in.
"""

import contextlib
import os
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from offloop.engine import replace_file

PAGE_JSON: Final = "page.json"
MAX_BYTES: Final = 4096


class _PageFile(msgspec.Struct):
    url: str
    pid: int


def write_page_file(directory: Path, url: str) -> None:
    """Tell readers of a run's directory where its page is. Blocks.

    Args:
        directory: The run's.
        url: Address of the page, without a token.

    Raises:
        OSError: The file cannot be written.
    """
    replace_file(directory / PAGE_JSON, msgspec.json.encode(_PageFile(url=url, pid=os.getpid())))


def remove_page_file(directory: Path) -> None:
    """Remove the file of this process, as its page ends. Blocks."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        if _read(directory).pid == os.getpid():
            os.unlink(directory / PAGE_JSON)


def page_of(directory: Path) -> str | None:
    """Return the address of a run's page; None if it has none. Blocks.

    A process that was killed leaves its file: ask for the pages of runs that go on only.
    """
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
        url = urlsplit(_read(directory).url)
        # Other people may write the directory, and the page makes a link of it.
        if url.scheme in ("http", "https") and url.hostname:
            return f"{url.scheme}://{url.netloc.rpartition('@')[2]}/"
    return None


def _read(directory: Path) -> _PageFile:
    # O_NONBLOCK: opening a pipe would wait for a writer.
    file = os.open(directory / PAGE_JSON, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return msgspec.json.decode(os.read(file, MAX_BYTES), type=_PageFile)
    finally:
        os.close(file)
