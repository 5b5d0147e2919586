"""Loader workers and signals: a Ctrl-C or a scheduler's SIGTERM reaches every process, not only ours.

A worker that dies of it takes the next batch with it, and with that the step after which the run would have
stopped in order. So while a run handles signals itself, its workers leave them to it.
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

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

PATIENCE = 5.0
"""Seconds that workers have to leave at the end of the process; as many as a loader gives them."""

_spared: set[int | None] = set()  # ids of processes, of dead ones too; added to by training threads


@contextlib.contextmanager
def spared_workers(loader: Iterable[Any]) -> Iterator[None]:
    """Have the workers that a loader starts in this block outlive SIGTERM and SIGINT, until this process leaves.

    One whose parent has died ends by itself, within seconds, as all workers do.
    Where workers are forked, signals wait from the fork until the worker has its handlers.
    """
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
    """Return the user's `worker_init_fn`, also while `spared_workers` has put its own before it."""
    init = loader.worker_init_fn
    return init.then if isinstance(init, _Init) else init


class _Init:
    """The user's `worker_init_fn`, after the handlers; a class, since spawned workers get it pickled."""

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
        """End only if the parent is at its end and waits for us; else a batch that it still wants would be lost."""
        if self._is_leaving.value:
            os._exit(0)


def _shared_mark() -> Any:
    """Return a number that this process shares with its workers, and that is 1 once it leaves."""
    return _mark_of(os.getpid())  # one that was forked leaves at a time of its own


@functools.cache
def _mark_of(process: int) -> Any:
    mark = multiprocessing.RawValue("b", 0)
    # Not atexit, which the processes that multiprocessing starts never come to.
    multiprocessing.util.Finalize(None, _end_workers, args=(mark,), exitpriority=0)
    return mark


def _end_workers(is_leaving: Any) -> None:
    """End spared workers that are still there, before multiprocessing sends one SIGTERM and waits for ever.

    Those that are deep in native code, where no handler of Python's runs, are killed.
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
