"""Copy tensors off a CUDA device while the host continues and the optimizer waits on the device.

    compute stream  ... step n ──┬── clone the volatile ──┬── forward, backward ──┬── step n+1
                                 │                        │                       │ wait_event
    copy stream                  └────────────────────────┴── copies to host ──── event

There are two kinds of tensors. Those that an optimizer owns change only in its `step`; a hook before every step
makes the compute stream wait for the copies. The others (batch norm's statistics, averaged weights, random states,
parameters that a module changes in its forward pass) may change in the next forward pass. They are cloned on the
device first, in the order of the compute stream. The host waits for nothing; the writer thread waits for the event.
Other code that may change the first kind (a step hook, a decider, `run.call`) runs after `guard`.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

logger = logging.getLogger("offloop")

_cuda: Any = torch.cuda
"""torch has no types for what is called here."""


def any_on_cuda(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether any tensor is on a CUDA device."""
    return any(tensor.is_cuda for tensor in tensors)


class PinnedMemory:
    """Existing memory, page-locked so that the device can write it directly.

    `pin_memory=True` would not do: torch's host allocator rounds up to a power of two and keeps the block for good,
    and a slot may have many gigabytes.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        code = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        self._is_pinned = code == 0
        if code:
            # Still correct: the copies then block the host.
            logger.warning("cannot page-lock %d bytes (CUDA error %d)", memory.numel(), code)

    def release(self) -> None:
        """Unlock the memory; must be called before it is freed. Calling twice is fine."""
        if self._is_pinned:
            self._is_pinned = False
            _cuda.cudart().cudaHostUnregister(self._memory.data_ptr())


class RunningCopy:
    """Copies on their way to the host."""

    def __init__(self, events: Sequence[torch.cuda.Event], keep: Sequence[torch.Tensor]) -> None:
        self._events = events
        # The allocator relates these tensors to the compute stream only. If one were freed before the copy stream
        # has read it, its memory could be reused.
        self._keep: Sequence[torch.Tensor] = keep

    def wait(self) -> None:
        """Return when all copies are on the host. Blocks, with the interpreter released."""
        for event in self._events:
            event.synchronize()
        self._keep = ()


class CudaCopier:
    """Starts copies, and makes optimizers wait for them on the device. Training thread only."""

    def __init__(
        self, optimizers: Iterable[torch.optim.Optimizer], volatile: Iterable[torch.Tensor] = ()
    ) -> None:
        self._optimizers = list(optimizers)
        self._volatile = list(volatile)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pending: dict[torch.device, torch.cuda.Event] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.guard()) for optimizer in self._optimizers
        ]

    def guard(self) -> None:
        """Make later work on the current streams wait, on the device, for running copies.

        Call it before anything but an optimizer's `step` changes the optimizer's tensors.
        """
        for device, event in self._pending.items():
            torch.cuda.current_stream(device).wait_event(event)
        self._pending.clear()

    def start(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> RunningCopy:
        """Start the copies and return at once. Sources on the host are copied before it returns."""
        owned = self._owned()
        by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for target, source in zip(targets, sources, strict=True):
            if not source.is_cuda:
                target.copy_(source)
                continue
            if source.untyped_storage().data_ptr() not in owned:
                source = source.clone()
            to, of = by_device.setdefault(source.device, ([], []))
            to.append(target)
            of.append(source)
        events: list[torch.cuda.Event] = []
        keep: list[torch.Tensor] = []
        for device, (to, of) in by_device.items():
            if device not in self._streams:
                self._streams[device] = _cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                torch._foreach_copy_(to, of, non_blocking=True)
                event = _cuda.Event()
                event.record(stream)
            self._pending[device] = event
            events.append(event)
            keep += of
        return RunningCopy(events, keep)

    def _owned(self) -> set[int]:
        """Return the storages that only an optimizer changes: its state and its parameters, except volatile ones."""
        owned: set[int] = set()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                owned.update(p.untyped_storage().data_ptr() for p in group["params"])
            for state in optimizer.state.values():
                owned.update(
                    value.untyped_storage().data_ptr()
                    for value in state.values()
                    if isinstance(value, torch.Tensor) and value.is_cuda
                )
        return owned - {each.untyped_storage().data_ptr() for each in self._volatile}

    def close(self) -> None:
        """Wait once more, remove the hooks and drop the tensors. Calling twice is fine."""
        self.guard()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers, self._volatile = [], [], []
