"""Copy a training state at a step boundary into warm memory, so that others may write it slowly.

    training thread                             writer thread
    ───────────────                             ─────────────
    take_nowait(state)
      walk the state, numbers and text copied
      free slot?  ── no ──> SnapshotBusyError
      one copy into the slot
      Snapshot ───────── queue ───────────────> wait_ready()   (CUDA: the copies are done)
    next step                                   write parts()
                                                release()      the slot is free again

A slot is one block of memory as large as the state's tensors, reused by each second snapshot:
fresh memory would cost more than the copy (the system clears each page on first touch).  Inside
it the tensors lie as they will lie in their files, so that the writer hands plain bytes on.

On CUDA the copies run on a stream of their own into page-locked memory while the host goes on.
Before the optimizer changes what is being copied, the compute stream waits for them, on the
device (`cuda_copy.py`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from offloop.engine.checkpoint import cuda_copy
from offloop.engine.checkpoint.errors import SnapshotBusyError, SnapshotMemoryError
from offloop.engine.checkpoint.format import TensorFile
from offloop.engine.checkpoint.host_copy import HostCopier
from offloop.engine.checkpoint.layout import (
    DEFAULT_FILES,
    Copy,
    Layout,
    check_tensor,
    plan_layout,
)
from offloop.engine.checkpoint.manifest import TensorView
from offloop.engine.checkpoint.memory import is_out_of_memory
from offloop.engine.checkpoint.tree import TensorNode, encode, tensor_node

DEFAULT_SLOTS = 2
"""One being filled while one is being written. One halves the memory and skips more often."""

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class _Slot:
    """A reused block of memory. Touched by one thread at a time: whoever holds the slot."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pin: cuda_copy.PinnedMemory | None = None
        self._layout: Layout | None = None
        self.targets: list[torch.Tensor] = []

    def fit(self, layout: Layout, *, pinned: bool) -> None:
        """Have room for the layout, all pages present, and a target for each copy."""
        if layout.size > self._memory.numel() or (pinned and self._pin is None):
            self.free()
            # The device is named: a caller may have made another one the default.
            # Not torch.zeros, which would leave the pages to be made at the first copy.
            self._memory = torch.empty(layout.size, dtype=torch.uint8, device="cpu").zero_()
            if pinned and layout.size:
                self._pin = cuda_copy.PinnedMemory(self._memory)
        if self._layout is not layout:
            self._layout = layout
            self.targets = [self._target(copy) for copy in layout.copies]

    def _target(self, copy: Copy) -> torch.Tensor:
        stored = copy.stored
        place = self._memory[copy.start : copy.start + stored.bytes]
        return place.view(_DTYPES[stored.dtype]).view(stored.shape)

    def bytes(self, start: int, size: int) -> memoryview:
        """Return part of the memory; valid while the slot is held."""
        if not size:
            return memoryview(b"")
        # Not through numpy, which torch does not need and we need not either.
        block = (ctypes.c_ubyte * size).from_address(self._memory.data_ptr() + start)
        return memoryview(block).cast("B")

    def free(self) -> None:
        """Give the memory back."""
        if self._pin is not None:
            self._pin.release()
            self._pin = None
        self.targets, self._layout = [], None
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state as of one moment, until `release`. Made by `SnapshotArena`."""

    tree: object
    """The state as JSON, with the names of tensors in their places."""
    layout: Layout
    seconds: float
    """How long the training thread was held up."""
    _arena: SnapshotArena
    _slot: _Slot
    _running: cuda_copy.RunningCopy | None

    @property
    def views(self) -> Mapping[str, TensorView]:
        """Tensors that share the bytes of others."""
        return self.layout.views

    def wait_ready(self) -> None:
        """Return when all bytes are there. Blocks, on CUDA until the copies are done."""
        if self._running is not None:
            self._running.wait()

    def parts(self) -> list[TensorFile]:
        """Return the files to write; their bytes are valid until `release`."""
        return [
            TensorFile(plan.name, plan.tensors, self._slot.bytes(plan.start, plan.size))
            for plan in self.layout.files
        ]

    def release(self) -> None:
        """Give the slot back. Any thread; calling twice is fine."""
        self._arena._release(self)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class SnapshotArena:
    """The slots, and the plan of what goes where.

    Thread: `take`, `take_nowait` and `prepare` from one thread at a time, the training thread;
    `release` from any.

    Args:
        slots: How many snapshots may exist at a time; memory is that many times the state.
        files: The file for each top-level key of the state.
        optimizers: On CUDA, tensors that these own change only in their `step`; every other
            tensor is cloned on the device at once. Irrelevant on the CPU.
        volatile: Parameters among them that change elsewhere too, such as in a forward pass.
    """

    def __init__(
        self,
        *,
        slots: int = DEFAULT_SLOTS,
        files: Mapping[str, str] = DEFAULT_FILES,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        volatile: Iterable[torch.Tensor] = (),
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if bad := [name for name in files.values() if not name.endswith(".safetensors")]:
            raise ValueError(f"files must end in .safetensors, got {bad[0]!r}")
        self._files = dict(files)
        self._cuda = cuda_copy.CudaCopier(optimizers, volatile)
        self._slots = [_Slot() for _ in range(slots)]
        # Guarded by _changed: taken by the training thread, given back by the writer.
        self._free = list(self._slots)
        self._held: dict[_Slot, Snapshot] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._host = HostCopier()
        # The plan of the last snapshot; training thread only.
        self._kinds: object = None
        self._names: list[str] = []
        self._nodes: list[TensorNode] = []
        self._layout = plan_layout([])

    def prepare(self, state: object) -> None:
        """Make all free slots ready for states like this one. Blocks.

        Optional: without it the first snapshots are as slow as a fresh allocation is.
        """
        _, tensors, layout = self._walk(state)
        with self._changed:
            slots, self._free = self._free, []
        for slot in slots:
            slot.fit(layout, pinned=cuda_copy.any_on_cuda(tensors))
        with self._changed:
            self._free += slots
            self._changed.notify_all()

    def take_nowait(self, state: object) -> Snapshot:
        """Copy the state, or say at once that there is no room. Does not wait for the disk.

        Raises:
            SnapshotBusyError: If all slots are being written.
            UnserializableStateError: If the state holds what cannot be saved.
        """
        return self.take(state, timeout=0.0)

    def take(self, state: object, *, timeout: float | None = None) -> Snapshot:
        """Copy the state once a slot is free. Blocks for up to `timeout` seconds, None for ever.

        Raises:
            SnapshotBusyError: If none was free in time, or the arena was closed.
            SnapshotMemoryError: If there is no memory for the copy; a later one may succeed.
            UnserializableStateError: If the state holds what cannot be saved.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: bool(self._free) or self._closed, timeout)
            if not ready or self._closed:
                raise SnapshotBusyError(len(self._slots))
            slot = self._free.pop()
        try:
            return self._fill(slot, state)
        except BaseException as error:
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()
            if is_out_of_memory(error):
                raise SnapshotMemoryError(str(error)) from error
            raise

    def guard(self) -> None:
        """Let the device finish reading before what follows changes the state; the host goes on.

        Needed before anything but an optimizer's `step` changes what the optimizers own, such as
        `load_state_dict`. Does nothing on the CPU. Training thread only.
        """
        self._cuda.guard()

    def close(self) -> None:
        """Free the memory of unused slots and refuse further snapshots. Calling twice is fine."""
        with self._changed:
            self._closed = True
            slots, self._free = self._free, []
            self._changed.notify_all()
        for slot in slots:
            slot.free()
        self._host.close()
        self._cuda.close()

    def _fill(self, slot: _Slot, state: object) -> Snapshot:
        started = time.perf_counter()
        tree, tensors, layout = self._walk(state)
        on_cuda = cuda_copy.any_on_cuda(tensors)
        slot.fit(layout, pinned=on_cuda)
        running = None
        with torch.no_grad():
            sources = [_source(copy, tensors) for copy in layout.copies]
            if on_cuda:
                running = self._cuda.start(slot.targets, sources)
            else:
                self._host.copy(slot.targets, sources)
        snapshot = Snapshot(tree, layout, time.perf_counter() - started, self, slot, running)
        with self._changed:
            self._held[slot] = snapshot
        return snapshot

    def _walk(self, state: object) -> tuple[object, list[torch.Tensor], Layout]:
        """Copy all but the tensors, list these, and plan anew if they are not the same."""
        tree, paths, tensors = self._list(state)
        try:
            kinds = _kinds(paths, tensors)
        except Exception:  # sparse, nested, uninitialized: each fails in its own way
            for path, tensor in zip(paths, tensors, strict=True):
                check_tensor(path, tensor)
            raise
        if kinds != self._kinds:
            for path, tensor in zip(paths, tensors, strict=True):
                check_tensor(path, tensor)
            names = _unique_names(paths)
            self._layout = plan_layout(list(zip(names, tensors, strict=True)), self._files)
            self._names, self._nodes, self._kinds = names, [tensor_node(name) for name in names], kinds
            tree, _, _ = self._list(state)
        return tree, tensors, self._layout

    def _list(self, state: object) -> tuple[object, list[str], list[torch.Tensor]]:
        """Return the tree, with the nodes of the plan, and the tensors with their paths, in the order of the walk."""
        paths: list[str] = []
        tensors: list[torch.Tensor] = []
        nodes = iter(self._nodes)  # not made anew: a thousand of them keep the garbage collector busy
        unknown = tensor_node("")

        def node_of(path: str, value: object) -> TensorNode | None:
            if not isinstance(value, torch.Tensor):
                return None
            paths.append(path)
            tensors.append(value)
            return next(nodes, unknown)

        return encode(state, node_of), paths, tensors

    def _release(self, snapshot: Snapshot) -> None:
        slot = snapshot._slot
        with self._changed:
            if self._held.get(slot) is not snapshot:
                return
            del self._held[slot]
            if not self._closed:
                self._free.append(slot)
            self._changed.notify_all()
        if self._closed:
            slot.free()


def _kinds(paths: list[str], tensors: Sequence[torch.Tensor]) -> object:
    """Return all that a layout depends on; cheap to make and to compare, since each snapshot does both."""
    return (
        paths,
        [tensor.data_ptr() for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        [tensor.device for tensor in tensors],
    )


def _unique_names(paths: Iterable[str]) -> list[str]:
    seen: dict[str, None] = {}
    for path in paths:
        name = path[1:] or "tensor"
        while name in seen:  # keys "a.b" and "a" -> "b" meet here
            name += "~"
        seen[name] = None
    return list(seen)


def _source(copy: Copy, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    tensor = tensors[copy.source]
    if copy.span is None:
        return tensor
    first, size = copy.span
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage(), first, (size,), (1,))
