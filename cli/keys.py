"""Keys of a terminal, one by one, for commands that go on meanwhile."""

import contextlib
import os
import re
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from typing import Final

import anyio

_KEY: Final = re.compile(rb"\x1b[\[O][A-D]|.", re.DOTALL)
"""An arrow, or a character."""


def has_keys() -> bool:
    """Return whether somebody sits at a terminal that can be drawn on."""
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def keys_at_once() -> Iterator[None]:
    """Read keys without Enter and without showing them; afterwards the terminal is as it was."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


async def read_keys() -> AsyncIterator[list[bytes]]:
    """Yield the keys that were pressed, until the terminal is gone. Cancellation: none is lost."""
    descriptor = sys.stdin.fileno()
    while True:
        await anyio.wait_readable(descriptor)
        keys = os.read(descriptor, 64)
        if not keys:
            return
        yield _KEY.findall(keys)
