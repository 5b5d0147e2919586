"""Snapshots: copies of a training state at a step boundary, in reused memory, which the writer saves later.

    training thread                             writer thread
    ───────────────                             ─────────────
    take_nowait(state)
      walk the state, numbers and text copied
      free slot?  ── no ──> SnapshotBusyError
      one copy into the slot
      Snapshot ───────── queue ───────────────> wait_ready()   (CUDA: the copies are done)
    next step                                   write parts()
                                                release()      the slot is free again

A slot is a block of memory as large as the state's tensors. It is reused, because fresh memory would cost more than
the copy: the system clears every page on first touch. Tensors are laid out as in their files, so that the writer
writes plain bytes.

On CUDA the copies run on a separate stream into page-locked memory while the host continues. Before the optimizer
changes what is being copied, the compute stream waits for the copies, on the device (`cuda_copy.py`).
"""

import ctypes
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

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
"""One is filled while the other is written. One slot would halve the memory and skip more saves."""

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class _Slot:
    """A reused block of memory. Only the thread that holds the slot uses it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pin: cuda_copy.PinnedMemory | None = None
        self._layout: Layout | None = None
        self.targets: list[torch.Tensor] = []

    def fit(self, layout: Layout, *, pinned: bool) -> None:
        """Allocate memory for a layout, with all pages present, and the targets of its copies."""
        if layout.size > self._memory.numel() or (pinned and self._pin is None):
            self.free()
            # The device is explicit, because the caller's default may be another one.
            # torch.zeros would leave the pages to be allocated by the first copy.
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
        # Not through numpy, which torch does not require.
        block = (ctypes.c_ubyte * size).from_address(self._memory.data_ptr() + start)
        return memoryview(block).cast("B")

    def free(self) -> None:
        """Free the memory."""
        if self._pin is not None:
            self._pin.release()
            self._pin = None
        self.targets, self._layout = [], None
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state at one moment, valid until `release`. `SnapshotArena` makes it."""

    tree: object
    """The state as JSON, with nodes for its tensors."""
    layout: Layout
    seconds: float
    """Time that the snapshot took in the training thread."""
    _arena: "SnapshotArena"
    _slot: _Slot
    _running: cuda_copy.RunningCopy | None

    @property
    def views(self) -> Mapping[str, TensorView]:
        """Tensors that share the bytes of others."""
        return self.layout.views

    def wait_ready(self) -> None:
        """Wait until all bytes are copied. Blocks on CUDA only."""
        if self._running is not None:
            self._running.wait()

    def parts(self) -> list[TensorFile]:
        """Return the files to write. Their bytes are valid until `release`."""
        return [
            TensorFile(plan.name, plan.tensors, self._slot.bytes(plan.start, plan.size))
            for plan in self.layout.files
        ]

    def release(self) -> None:
        """Release the slot. Any thread; calling twice is fine."""
        self._arena._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class SnapshotArena:
    """The slots and the layout of the state.

    Thread: `take`, `take_nowait` and `prepare` run in the training thread; `release` in any.

    Args:
        slots: Snapshots that may exist at a time; the memory is so many times the state.
        files: The files by top-level key of the state.
        optimizers: On CUDA, tensors that these own change only in their `step`; all other tensors are cloned on the
            device at once. Irrelevant on the CPU.
        volatile: Parameters among them that change elsewhere too, as in a forward pass.
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
        # Guarded by _changed: the training thread takes slots, the writer returns them.
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
        """Allocate all free slots for states like this one. Blocks.

        Optional: without it the first snapshots include the allocation.
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
        """Copy the state if a slot is free. Does not wait for the disk.

        Raises:
            SnapshotBusyError: All slots are being written.
            UnserializableStateError: A value of the state cannot be saved.
        """
        return self.take(state, timeout=0.0)

    def take(self, state: object, *, timeout: float | None = None) -> Snapshot:
        """Copy the state once a slot is free. Blocks for up to `timeout` seconds; None sets no limit.

        Raises:
            SnapshotBusyError: No slot was free in time, or the arena was closed.
            SnapshotMemoryError: There is no memory for the copy; a later one may succeed.
            UnserializableStateError: A value of the state cannot be saved.
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
        """Make the device finish copying before later work changes the state. Does not block the host.

        Call it before anything but an optimizer's `step` changes tensors of the optimizers, as `load_state_dict`
        does. Does nothing on the CPU. Training thread only.
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
        """Copy plain values, list the tensors, and plan a new layout if they have changed."""
        tree, paths, tensors = self._list(state)
        try:
            kinds = _kinds(paths, tensors)
        # Sparse, nested and uninitialized tensors raise different errors.
        except Exception:
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
        """Return the tree with the plan's nodes, the paths of the tensors, and the tensors."""
        paths: list[str] = []
        tensors: list[torch.Tensor] = []
        # Reused, because a thousand new nodes would keep the garbage collector busy.
        nodes = iter(self._nodes)
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
    """Return everything that a layout depends on. Every snapshot makes and compares it, so it must be cheap."""
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
        # The keys "a.b" and "a" -> "b" have the same path.
        while name in seen:
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
