"""Readback: where the loop's numbers come from the device to the host.

On CPU a scalar is read at once. On CUDA, reading it would make the host wait for all work queued so far. The scalars
of a step are therefore packed into one tensor, copied to pinned memory without blocking, and delivered when the copy
has arrived: some steps late, in order. `flush` waits. The loop calls it before each milestone, so that the order of
events does not depend on the device.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Deliver = Callable[[list[float]], None]


class _Copy(NamedTuple):
    """Numbers on their way."""

    host: torch.Tensor  # (n,) float64, pinned
    arrived: Any  # torch.cuda.Event
    deliver: Deliver


class Readback:
    """Reads device scalars, in the order in which they were given. Training thread only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_immediate = device.type != "cuda"
        self._under_way: deque[_Copy] = deque()

    def read(self, tensors: Sequence[torch.Tensor], deliver: Deliver) -> None:
        """Call `deliver` with the numbers: at once on CPU, when they have arrived on CUDA (or at `flush`).

        Args:
            tensors: Of any shape and dtype, most of them of one element.
            deliver: Gets their elements as floats, one tensor after the other.
        """
        if self.is_immediate:
            deliver([number for tensor in tensors for number in _numbers(tensor)])
            return
        # float64 holds what any dtype holds; a scalar that a step made on the CPU travels along, in its turn.
        # Tensors of one dtype are packed first and converted together: one kernel in place of hundreds.
        flat = [tensor.detach().reshape(-1).to(self.device, non_blocking=True) for tensor in tensors]
        if len({tensor.dtype for tensor in flat}) > 1:
            flat = [tensor.to(torch.float64) for tensor in flat]
        packed = torch.cat(flat).to(torch.float64)
        host = _pinned(packed.numel())
        host.copy_(packed, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._under_way.append(_Copy(host, arrived, deliver))
        self.poll()

    def put(self, deliver: Callable[[], None]) -> None:
        """Call `deliver` in its turn: after everything read before it has been delivered."""
        if self._under_way:
            last = self._under_way[-1]
            self._under_way.append(_Copy(torch.empty(0), last.arrived, lambda _: deliver()))
        else:
            deliver()

    def poll(self) -> None:
        """Deliver what has arrived. Does not block."""
        while self._under_way and self._under_way[0].arrived.query():
            copy = self._under_way.popleft()
            copy.deliver(copy.host.tolist())

    def flush(self) -> None:
        """Deliver everything, waiting for the device where needed (host sync on CUDA)."""
        while self._under_way:
            copy = self._under_way.popleft()
            copy.arrived.synchronize()
            copy.deliver(copy.host.tolist())


def _numbers(tensor: torch.Tensor) -> list[float]:
    """Return the elements of a tensor (host sync, free on CPU)."""
    return [tensor.item()] if tensor.numel() == 1 else tensor.reshape(-1).tolist()


def _pinned(count: int) -> torch.Tensor:
    """Return memory into which a device copies without making the host wait."""
    return torch.empty(count, dtype=torch.float64, pin_memory=True)
