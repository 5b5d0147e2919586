"""Copy many tensors in host memory, without a meeting of threads for each of them.

torch splits each copy of more than 32,768 elements over its OpenMP threads, which meet at a
barrier at the end.  Where other processes (loader workers) want the same cores, one of the
threads is waited for during whole time slices, for each tensor again.  1,200 tensors, 236 MB, 2
cores, 2026-11-22, least and median in ms:

                            idle (other jobs about)    two busy processes beside
    torch's threads              41     239                1793    4469
    one thread                   27      49                  60     240

So small tensors are copied by the calling thread alone, and only those large enough to be worth
the meeting are split.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SPLIT_BYTES = 32 << 20
"""Takes one thread about 3 ms, a usual time slice of a scheduler."""


def copy_tensors(targets: list[torch.Tensor], sources: list[torch.Tensor], small: int) -> None:
    """Copy; the first `small` are those below `SPLIT_BYTES`. Leaves the interpreter to others."""
    with torch.no_grad():
        if small:
            with _one_thread():
                torch._foreach_copy_(targets[:small], sources[:small])
        if small < len(sources):
            torch._foreach_copy_(targets[small:], sources[small:])


@contextmanager
def _one_thread() -> Iterator[None]:
    # Not torch.set_num_threads, which is for the whole process: this is the calling thread's own
    # setting, which torch consults before each split.
    if _openmp is None:
        yield
        return
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
