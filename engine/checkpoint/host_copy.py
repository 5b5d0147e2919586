"""Copy many tensors in host memory with several threads that synchronize once.

torch splits every copy of more than 32,768 elements over its OpenMP threads, with a barrier at the end. Where other
processes (loader workers) want the same cores, every tensor then waits whole time slices for one of the threads. A
single thread uses only half of the memory's bandwidth. So the tensors are divided into groups: the caller, and one
helper per further core that torch may use, take groups from a queue, and the caller waits for the last one.

Time of a snapshot (1,200 tensors, 236 MB, including the walk through the state) relative to one memcpy of the same
bytes by torch's threads, medians of 40, 2 cores shared with other jobs, 2026-11-22:

                                     torch has 1 thread        2 threads      2, two busy processes
    one thread                       1.03-1.10                 1.90, 1.91     1.90, 2.10
    the caller and a helper          (the same)                1.22, 1.27     1.29, 1.40

torch's own splitting took 6 times a memcpy on the busy machine.
"""

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import torch

GROUP_BYTES = 16 << 20
"""Least size of a group, except for the last. One thread copies it in about 2 ms, within a scheduler's time slice."""

GROUPS_PER_THREAD = 4
"""Large states have larger groups, because a thread must reacquire the interpreter after every group."""

MOST_THREADS = 4
"""A few cores use all of the memory's bandwidth; arbitrary."""

Job = tuple[list[torch.Tensor], list[torch.Tensor]]


class HostCopier:
    """Copies tensors on the host. Call `copy` from one thread at a time."""

    def __init__(self) -> None:
        self._helpers: ThreadPoolExecutor | None = None

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy the sources into their targets, which are contiguous. Blocks with the interpreter released."""
        threads = min(torch.get_num_threads(), MOST_THREADS) if _openmp is not None else 1
        jobs = deque(_deal(targets, sources, threads))
        running = self._start(jobs, min(threads, len(jobs)) - 1)
        try:
            _work(jobs)
        finally:
            jobs.clear()
            # A helper that has not started is not needed.
            running = [each for each in running if not each.cancel()]
            wait(running)
        for each in running:
            each.result()

    def _start(self, jobs: deque[Job], count: int) -> list[Future[None]]:
        if count < 1:
            return []
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="offloop-copy")
        # At its end the interpreter starts no threads.
        with suppress(RuntimeError):
            return [self._helpers.submit(_work, jobs) for _ in range(count)]
        return []

    def close(self) -> None:
        """End the helpers. Calling twice is fine; a later copy starts new ones."""
        if self._helpers is not None:
            self._helpers.shutdown()
            self._helpers = None


def _deal(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], threads: int) -> Iterator[Job]:
    """Yield groups of about the same size; a larger tensor is split."""
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
    # no_grad would not do: a buffer made in inference mode can be written in that mode only.
    with torch.inference_mode(), _one_thread():
        while True:
            try:
                targets, sources = jobs.popleft()
            # No group is left.
            except IndexError:
                return
            if targets:
                torch._foreach_copy_(targets, sources)


@contextmanager
def _one_thread() -> Iterator[None]:
    # torch.set_num_threads would change the whole process. This changes the calling thread's own setting, which
    # torch reads before every split.
    if _openmp is None:
        yield
        return
    # In a new thread, the first call applies the number given to torch.set_num_threads.
    torch.get_num_threads()
    before = _openmp.omp_get_max_threads()
    _openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        _openmp.omp_set_num_threads(before)


def _find_openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch uses, None if it cannot be found; then copies are slower."""
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
