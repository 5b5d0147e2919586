"""The process group: collectives, for the training thread alone.

Two threads that use one group abort the process. Beside the group of the device there is always one of gloo, the
control group, for what is offloop's own. Their time-outs are very long, because a rank may wait while rank 0 stands in
a pause; who is dead is found by signs of life. The groups live as long as the process: making a second one fails
often, and a process may end without destroying them.
"""

import atexit
import datetime
import io
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from offloop.engine.distributed.launch import Launch, note_own_group
from offloop.engine.distributed.rendezvous import PrefixStore, Store
from offloop.engine.distributed.sockets import closed_in_children
from offloop.engine.errors import ConfigError

FOREVER: Final = datetime.timedelta(days=20)
"""Time-out of a collective. 24.8 days are 2**31 milliseconds, which not every part of torch can count."""
SETTLING: Final = 0.1
"""Seconds that the end of the process leaves to gloo's threads. One that still drops its last collective, which holds
Python objects, while the interpreter ends aborts the process (torch 2.13)."""
FIRST_BYTES: Final = 4096
"""Size of the first message of `gather`, with the 8 bytes of its length. Larger messages need a second one."""
_LENGTH_BYTES: Final = 8


class Group:
    """The collectives of this process. Training thread only; all ranks call the same methods in the same order.

    Each blocks until all ranks have called it, and raises `RuntimeError` when the connection to one breaks.
    """

    def __init__(self, control: Any, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._control = control
        self._device = device
        # One buffer for each direction: a message costs no allocation
        self._own = bytearray(FIRST_BYTES)
        self._all = bytearray(FIRST_BYTES * self.world_size)
        self._own_tensor = torch.frombuffer(self._own, dtype=torch.uint8)
        self._all_tensors = list(torch.frombuffer(self._all, dtype=torch.uint8).split(FIRST_BYTES))

    def gather(self, own: bytes) -> list[bytes]:
        """Return one message of each rank, by rank."""
        room = FIRST_BYTES - _LENGTH_BYTES
        first = own[:room]
        self._own[:_LENGTH_BYTES] = len(own).to_bytes(_LENGTH_BYTES, "little")
        self._own[_LENGTH_BYTES : _LENGTH_BYTES + len(first)] = first
        dist.all_gather(self._all_tensors, self._own_tensor, group=self._control)
        lengths, messages = [], []
        for start in range(0, len(self._all), FIRST_BYTES):
            length = int.from_bytes(self._all[start : start + _LENGTH_BYTES], "little")
            begin = start + _LENGTH_BYTES
            lengths.append(length)
            messages.append(bytes(self._all[begin : begin + min(length, room)]))
        longest = max(lengths) - room
        if longest > 0:
            rests = bytearray(longest * self.world_size)
            parts = list(torch.frombuffer(rests, dtype=torch.uint8).split(longest))
            dist.all_gather(parts, _padded(own[room:], longest), group=self._control)
            for rank, length in enumerate(lengths):
                start = rank * longest
                messages[rank] += rests[start : start + max(0, length - room)]
        return messages

    def gather_objects(self, own: Any) -> list[Any]:
        """Return one value of each rank, by rank: plain values and tensors of the CPU."""
        # torch's all_gather_object cannot read back every tensor that it has written
        return [_loaded(each) for each in self.gather(_dumped(own))]

    def gather_on_first(self, own: Any) -> list[Any] | None:
        """Return one value of each rank, by rank, on rank 0; None elsewhere. Any that can be pickled."""
        message = _dumped(own)
        lengths = [
            int.from_bytes(each, "little")
            for each in self.gather(len(message).to_bytes(_LENGTH_BYTES, "little"))
        ]
        longest = max(lengths)
        sent = _padded(message, longest)
        if self.rank:
            dist.gather(sent, dst=0, group=self._control)
            return None
        room = bytearray(longest * self.world_size)
        parts = list(torch.frombuffer(room, dtype=torch.uint8).split(longest))
        dist.gather(sent, parts, dst=0, group=self._control)
        return [
            _loaded(room[rank * longest : rank * longest + length]) for rank, length in enumerate(lengths)
        ]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite tensors, in place, with those of rank 0. Shapes and dtypes are the same on all ranks."""
        for tensor in tensors:
            # Bytes: gloo does not know every dtype
            whole = tensor.detach().contiguous()
            raw = whole.view(-1).view(torch.uint8)
            if raw.numel():
                dist.broadcast(raw, src=0, group=self._group_of(tensor))
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)

    def add(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over the ranks, in place."""
        dist.all_reduce(tensor, group=self._group_of(tensor))

    def _group_of(self, tensor: torch.Tensor) -> Any:
        """Return the group of a tensor's device: the default one (None), or the control group."""
        return None if tensor.device.type == self._device.type else self._control


def _dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loaded(message: bytes | bytearray) -> Any:
    # Of another rank of this very run, which may send whatever it likes
    return torch.load(io.BytesIO(message), weights_only=False)


def _padded(message: bytes, length: int) -> torch.Tensor:
    """Return a message as a tensor of so many bytes, at least one."""
    return torch.frombuffer(bytearray(message.ljust(length, b"\0")), dtype=torch.uint8)


# Written and read by the training thread, which is one at a time where there are several ranks.
_joined: tuple[object, Group] | None = None
# How many default groups offloop has made in this process: one, unless the application destroys them.
_made = 0


def join(launch: Launch, store: Store, device: torch.device) -> Group:
    """Make the process group with the other ranks, or use the host's. Blocks until all have come. Training thread only.

    The second call returns the same group.

    Args:
        launch: What `find_launch` has returned.
        store: What `connect` has returned.
        device: Where this rank trains.

    Raises:
        ConfigError: The host's group cannot reduce tensors of the device, or has another device.
    """
    global _joined
    if _joined is None or _joined[0] is not dist.group.WORLD or _joined[1]._device != device:
        with closed_in_children():
            if not dist.is_initialized():
                _make_default_group(launch, store, device)
            _check_backend(device)
            control = dist.new_group(backend="gloo", timeout=FOREVER)
            group = Group(control, device)
            # Connects the device's backend, which else waits for its first collective
            group.broadcast([torch.zeros(1, device=device)])
        if _joined is None:
            atexit.register(time.sleep, SETTLING)
        _joined = dist.group.WORLD, group
    return _joined[1]


def _make_default_group(launch: Launch, store: Store, device: torch.device) -> None:
    global _made
    _made += 1
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=PrefixStore(f"group/{_made}", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=FOREVER,
        device_id=device if is_cuda else None,
    )
    note_own_group(dist.group.WORLD)


def _check_backend(device: torch.device) -> None:
    backends = dist.get_backend_config()
    if device.type not in {each.partition(":")[0] for each in str(backends).split(",")}:
        raise ConfigError(
            f"device={str(device)!r} does not fit the process group of the host application ({backends}): make it with "
            f"a backend for {device.type}, or give the trainer another device"
        )
