"""How long the first epoch of a run waited for its loader, and advice if that was long."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Final

from torch.utils.data import DataLoader

LEAST_SHARE: Final = 0.2
"""Share of an epoch's time from which waiting for data counts as a bottleneck; arbitrary."""
LEAST_WAIT: Final = 1e-3
"""Seconds per batch below which it does not: transferring a batch from a worker process takes about as long."""
LEAST_SECONDS: Final = 0.1
"""Seconds per epoch below which it does not, because they are not noticeable."""
_MANY_WORKERS: Final = 8
"""Most workers to suggest; more rarely help."""


@dataclasses.dataclass(slots=True)
class DataWait:
    """The time that an epoch waited for its loader. The iteration over the loader writes it."""

    first: float = 0.0
    """Seconds for the first batch, including the start of worker processes."""
    since: float = 0.0
    """Time of the first batch (`time.perf_counter`); 0.0 before."""
    rest: float = 0.0
    """Seconds for all other batches."""
    batches: int = 0
    """Number of other batches."""
    set_aside: float = 0.0
    """Seconds of pauses and validations up to `since`."""

    def begin(self, wait: float, now: float, set_aside: float) -> None:
        """Record the first batch."""
        self.first, self.since, self.set_aside = wait, now, set_aside

    def judge(
        self, loader: Any, *, now: float, set_aside: float, on_cuda: bool, is_last: bool
    ) -> "Bottleneck | None":
        """Return the bottleneck if the epoch that has just ended waited for its data, else None.

        Args:
            loader: The loader.
            now: The time.
            set_aside: Seconds of pauses and validations so far.
            on_cuda: Whether batches go to a CUDA device.
            is_last: Whether no epoch follows.
        """
        training = now - self.since - (set_aside - self.set_aside)
        if not self.batches or training <= 0.0:
            return None
        wait = self.rest / self.batches
        is_slow = self.rest >= max(LEAST_SECONDS, LEAST_SHARE * training) and wait >= LEAST_WAIT
        whole = self.first + training
        restarts_workers = (
            not is_last
            and getattr(loader, "num_workers", 0) > 0
            and not getattr(loader, "persistent_workers", True)
            and self.first >= max(LEAST_SECONDS, LEAST_SHARE * whole)
        )
        if not is_slow and not restarts_workers:
            return None
        advice = advise(loader, on_cuda=on_cuda) if is_slow else []
        if restarts_workers:
            advice.insert(0, f"persistent_workers=True (starting them takes {self.first:.2g} s each epoch)")
        return Bottleneck(min(1.0, (self.first + self.rest) / whole), wait, tuple(advice))


@dataclasses.dataclass(frozen=True, slots=True)
class Bottleneck:
    """The share of time spent waiting for data, and advice."""

    share: float
    """Share of the epoch's time, 0 to 1."""
    wait: float
    """Mean seconds for a batch, without the first."""
    advice: Sequence[str]
    """Changes of the loader, most promising first."""


def advise(loader: Any, *, on_cuda: bool, cores: int | None = None) -> list[str]:
    """Return changes for a loader that is too slow, most promising first.

    Args:
        loader: The loader.
        on_cuda: Whether its batches go to a CUDA device.
        cores: Processors that this process may use; None asks the system.
    """
    if not isinstance(loader, DataLoader):
        return [f"load ahead in the background: {type(loader).__name__} is no DataLoader(num_workers=...)"]
    cores = _usable_cores() if cores is None else cores
    advice = []
    if loader.num_workers == 0:
        if cores > 1:
            advice.append(f"num_workers={min(cores - 1, _MANY_WORKERS)} (is 0), persistent_workers=True")
    elif loader.num_workers < min(cores - 1, _MANY_WORKERS):
        advice.append(f"num_workers={min(cores - 1, _MANY_WORKERS)} (is {loader.num_workers})")
    elif (loader.prefetch_factor or 2) < 4:
        advice.append(
            f"prefetch_factor=4 (is {loader.prefetch_factor}), if some samples take longer than others"
        )
    if on_cuda and not loader.pin_memory:
        advice.append("pin_memory=True")
    advice.append("less work for each sample: smaller files, decoding once, augmentation on the device")
    return advice


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
