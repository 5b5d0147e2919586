"""Copy many tensors in host memory, with threads that meet once and not for each of them.

torch splits each copy of more than 32,768 elements over its OpenMP threads, which meet at a
barrier at the end.  Where other processes (loader workers) want the same cores, one of the
threads is waited for during whole time slices, for each tensor again.  One thread alone leaves
half of what the memory can take unused.  So the tensors are dealt out in groups: the caller and a
helper for each further core that torch may use take one after the other, and the caller waits for
whatever group is left in the end.

Ratio of a snapshot (1,200 tensors, 236 MB; walking through the state is in it) to one memcpy of the
same bytes by torch's threads, medians of 40, 2 cores shared with other jobs, 2026-11-22:

                                     torch has 1 thread        2 threads      2, two busy processes
    one thread, as was before        1.03-1.10                 1.90, 1.91     1.90, 2.10
    the caller and a helper          (the same)                1.22, 1.27     1.29, 1.40

torch's own splitting took 6 times a memcpy where the machine was busy.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import torch

GROUP_BYTES = 16 << 20
"""The least that a group has, but for the last: takes one thread about 2 ms, within a scheduler's time slice."""

GROUPS_PER_THREAD = 4
"""In a large state groups are larger than that: after each, a thread asks for the interpreter again."""

MOST_THREADS = 4
"""A few cores take all that the memory gives; arbitrary."""

Job = tuple[list[torch.Tensor], list[torch.Tensor]]


class HostCopier:
    """Copies tensors that are on the host. `copy` by one thread at a time."""

    def __init__(self) -> None:
        self._helpers: ThreadPoolExecutor | None = None

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy each source into its target, which is contiguous. Blocks; leaves the interpreter to others."""
        threads = min(torch.get_num_threads(), MOST_THREADS) if _openmp is not None else 1
        jobs = deque(_deal(targets, sources, threads))
        running = self._start(jobs, min(threads, len(jobs)) - 1)
        try:
            _work(jobs)
        finally:
            jobs.clear()
            running = [each for each in running if not each.cancel()]  # one that has not begun is not needed
            wait(running)
        for each in running:
            each.result()

    def _start(self, jobs: deque[Job], count: int) -> list[Future[None]]:
        if count < 1:
            return []
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="offloop-copy")
        with suppress(RuntimeError):  # the interpreter is about to end, and starts no threads
            return [self._helpers.submit(_work, jobs) for _ in range(count)]
        return []

    def close(self) -> None:
        """End the helpers. Twice is fine; a copy after it starts new ones."""
        if self._helpers is not None:
            self._helpers.shutdown()
            self._helpers = None


def _deal(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], threads: int) -> Iterator[Job]:
    """Yield groups of about the same size; a tensor that is larger comes in parts."""
    total = sum(target.nbytes for target in targets)
    limit = max(GROUP_BYTES, total // (threads * GROUPS_PER_THREAD))
    first = size = 0
    for index, target in enumerate(targets):
        if target.nbytes > limit and sources[index].is_contiguous():
            yield list(targets[first:index]), list(sources[first:index])
            first, size = index + 1, 0
            count = limit // target.element_size()
            for to, of in zip(
                target.view(-1).split(count), sources[index].view(-1).split(count), strict=True
            ):
                yield [to], [of]
            continue
        size += target.nbytes
        if size >= limit:
            yield list(targets[first : index + 1]), list(sources[first : index + 1])
            first, size = index + 1, 0
    yield list(targets[first:]), list(sources[first:])


def _work(jobs: deque[Job]) -> None:
    # Not no_grad: a buffer that was made in inference mode may be written in that mode only.
    with torch.inference_mode(), _one_thread():
        while True:
            try:
                targets, sources = jobs.popleft()
            except IndexError:  # the last one is taken
                return
            if targets:
                torch._foreach_copy_(targets, sources)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Not torch.set_num_threads, which is for the whole process: this is the calling thread's own
    # setting, which torch consults before each split.
    if _openmp is None:
        yield
        return
    torch.get_num_threads()  # in a new thread, its first call sets what torch.set_num_threads was told
    before = _openmp.omp_get_max_threads()
    _openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        _openmp.omp_set_num_threads(before)


def _find_openmp() -> ctypes.CDLL | None:
    """Return the OpenMP that torch uses, if it can be reached; without it all is just slower."""
    try:
        openmp = ctypes.CDLL(None)
        before = openmp.omp_get_max_threads()
        openmp.omp_set_num_threads(1)
        is_torchs = torch.get_num_threads() == 1
        openmp.omp_set_num_threads(before)
    except (OSError, AttributeError, TypeError):
        return None
    return openmp if is_torchs else None


_openmp = _find_openmp()
