"""What a script under torchrun says to its test, and how it waits for it."""

import faulthandler
import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

# The test asks so where a rank stands
faulthandler.register(signal.SIGUSR1, all_threads=True)

_lock = threading.Lock()
_connections: dict[tuple[int, int], Any] = {}


def _streams() -> Any:
    """Return this thread's connection to the test."""
    here = (os.getpid(), threading.get_native_id())
    if here not in _connections:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.environ["OFFLOOP_TEST_SOCKET"])
        _connections[here] = (connection.makefile("r"), connection.makefile("w"))
    return _connections[here]


def say(what: str) -> None:
    """Say something to the test. Any thread."""
    with _lock:
        _, stream = _streams()
        thread = threading.get_native_id()
        stream.write(json.dumps({"rank": RANK, "pid": os.getpid(), "thread": thread, "what": what}) + "\n")
        stream.flush()


def hold(what: str) -> None:
    """Say where this rank stands, and wait there until the test lets it go on."""
    say(what)
    _streams()[0].readline()


def write_result(folder: Path, name: str, result: Any) -> None:
    """Leave the result of a scenario for the test."""
    path = folder / f"{name}-{ATTEMPT}-{RANK}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(path)
