"""Loader workers and signals: Ctrl-C and a scheduler's SIGTERM reach all processes, not only the main one.

If a worker died of it, its next batch would be lost, and with it the step after which the run would stop in order. So
while a run handles signals, its workers ignore them.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Final

from torch.utils.data import DataLoader

from offloop.engine.data.twin import unwrapped

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

PATIENCE = 5.0
"""Seconds for workers to exit at the end of the process; DataLoader's limit is the same."""

# Ids of processes, including dead ones. Training threads add to it, `_end_workers` reads it at exit. That is safe
# without a lock: ids are only added, each atomically.
_spared: set[int | None] = set()


@contextlib.contextmanager
def spared_workers(loader: Iterable[Any]) -> Iterator[None]:
    """Let workers that a loader starts in this block survive SIGTERM and SIGINT until this process exits.

    A worker whose parent has died exits within seconds, as all workers do.
    In forked workers, signals are blocked from the fork until the worker has its handlers.
    """
    loader = unwrapped(loader)
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        yield
        return
    context = loader.multiprocessing_context or multiprocessing
    is_forked = context.get_start_method() == "fork"
    init = loader.worker_init_fn
    loader.worker_init_fn = _Init(init)
    there = {each.pid for each in multiprocessing.active_children()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if is_forked else None
    try:
        yield
    finally:
        _spared.update(each.pid for each in multiprocessing.active_children() if each.pid not in there)
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        loader.worker_init_fn = init


def users_init_fn(loader: "DataLoader[Any]") -> Callable[[int], None] | None:
    """Return the user's `worker_init_fn`, also while `spared_workers` has replaced it."""
    init = loader.worker_init_fn
    return init.then if isinstance(init, _Init) else init


class _Init:
    """Sets the handlers, then calls the user's `worker_init_fn`. A class, because spawned workers unpickle it."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then
        self._is_leaving = _shared_mark()

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave_with_parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if self.then is not None:
            self.then(worker_id)

    def _leave_with_parent(self, number: int, frame: FrameType | None) -> None:
        """Exit only if the parent is exiting and waits; otherwise a batch that it needs would be lost."""
        if self._is_leaving.value:
            os._exit(0)


def _shared_mark() -> Any:
    """Return a number that this process shares with its workers, and that is 1 once it exits."""
    # A number per process, because a forked process exits at its own time.
    return _mark_of(os.getpid())


@functools.cache
def _mark_of(process: int) -> Any:
    mark = multiprocessing.RawValue("b", 0)
    # Processes that multiprocessing starts never call atexit's functions.
    multiprocessing.util.Finalize(None, _end_workers, args=(mark,), exitpriority=0)
    return mark


def _end_workers(is_leaving: Any) -> None:
    """End remaining spared workers, before multiprocessing sends one SIGTERM and waits forever.

    Workers in native code, where Python's handlers do not run, are killed.
    """
    is_leaving.value = 1
    left = [each for each in multiprocessing.active_children() if each.pid in _spared]
    for each in left:
        each.terminate()
    deadline = time.monotonic() + PATIENCE
    for each in left:
        each.join(max(0.0, deadline - time.monotonic()))
        if each.is_alive():
            each.kill()
