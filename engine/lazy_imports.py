"""Imports that wait for their first use, made safe for threads.

Several runs may need the same package for the first time at once, each in a thread of its own. Python locks each
module, not each package, and resolves a circle of locks by handing out a module that is only half initialized
("partially initialized module 'torchmetrics' has no attribute 'Metric'"). Packages whose modules import each other
in circles therefore break when two threads import different parts of them. `first_use` lets one thread import at
a time, and from the package's root, so that no thread ever waits with a module locked.

Importing a large package also keeps the interpreter from all other threads for tens of milliseconds at a time.
`was_importing` lets the measurement of callbacks tell that from a handler that blocks.
"""

import contextlib
import importlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

# Held by the thread that imports. Reentrant: importing a package may lead to another `first_use`.
_lock = threading.RLock()
# Both written under the lock, read by any thread.
_depth = 0
_ended_at = -math.inf


@contextlib.contextmanager
def first_use(package: str) -> Iterator[None]:
    """Guard an import that is left until its first use: `with first_use("torchmetrics"): from torchmetrics import ...`.

    Imports the package's root, then runs the block. One thread at a time; blocks while another one imports, so not
    for the event loop unless the package is loaded already.

    Args:
        package: Name of the package, without submodules.

    Raises:
        ImportError: The package is not installed, or cannot be imported.
    """
    global _depth, _ended_at
    with _lock:
        loaded = len(sys.modules)
        _depth += 1
        try:
            importlib.import_module(package)
            yield
        finally:
            _depth -= 1
            if len(sys.modules) != loaded:
                _ended_at = time.perf_counter()


def was_importing(since: float) -> bool:
    """True if a `first_use` has been importing at some time since `since` (of `time.perf_counter`). Any thread."""
    return _depth > 0 or _ended_at >= since


def _forget_other_threads() -> None:
    """Make a new lock in a forked child: the thread that held the old one does not exist there."""
    global _lock, _depth
    _lock, _depth = threading.RLock(), 0


os.register_at_fork(after_in_child=_forget_other_threads)
