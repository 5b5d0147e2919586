"""Who started this process, and as which rank: torchrun's variables, or the process group of a host application."""

import dataclasses
import os
import socket
from typing import Any, Final

import torch
import torch.distributed as dist

from offloop.engine.errors import ConfigError

HOW_TO_START: Final = "start it with `torchrun --nproc-per-node 2 script.py`"

# The process group that offloop made, which is no host's. Written by the training thread when it makes the group,
# read by the threads that start later runs of this process.
_own_group: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """What a process knows of itself before it has spoken to another."""

    rank: int
    world_size: int
    local_rank: int
    """Number of the process on its machine, from 0."""
    local_world_size: int
    """Processes on this machine."""
    host: str
    """Name of this machine."""
    has_host_group: bool
    """True if the host application has made torch's default process group."""


def find_launch(strategy: str) -> Launch | None:
    """Return as which rank this process was started, None if it trains alone. Any thread; does not block.

    A process group of the host application counts first, then the variables that torchrun sets.

    Args:
        strategy: The knob: "auto", "none" or "ddp".

    Raises:
        ConfigError: The variables are incomplete or make no sense, or `strategy="ddp"` in a process that was
            started alone.
    """
    if strategy == "none":
        return None
    if dist.is_available() and dist.is_initialized() and dist.group.WORLD is not _own_group:
        return _in_group_of_host()
    launch = _as_started()
    if launch is None or launch.world_size > 1:
        if launch is None and strategy == "ddp":
            raise ConfigError(_alone())
        if launch is not None and not dist.is_available():
            raise ConfigError(
                f"{launch.world_size} processes were started, but this torch has no torch.distributed: install one "
                'that has, or use strategy="none"'
            )
        return launch
    # A group that has shrunk to one process trains as one
    return None


def note_own_group(group: object) -> None:
    """Remember the process group that offloop has made, so that it is not taken for a host's."""
    global _own_group
    _own_group = group


def _in_group_of_host() -> Launch | None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return None
    return _launch(rank, world_size, has_host_group=True)


def _as_started() -> Launch | None:
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    world_size = _number("WORLD_SIZE", at_least=1)
    rank = _number("RANK", at_least=0, below=world_size)
    if world_size > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise ConfigError(_unset("MASTER_ADDR"))
        _number("MASTER_PORT", at_least=1, below=2**16)
    return _launch(rank, world_size, has_host_group=False)


def _launch(rank: int, world_size: int, *, has_host_group: bool) -> Launch:
    # Kubernetes and others that start one process on each machine set no local numbers
    devices = torch.cuda.device_count() or world_size
    size = min(devices, world_size)
    if "LOCAL_WORLD_SIZE" in os.environ:
        size = _number("LOCAL_WORLD_SIZE", at_least=1, below=world_size + 1)
    local_rank = rank % devices
    if "LOCAL_RANK" in os.environ:
        local_rank = _number("LOCAL_RANK", at_least=0)
        if local_rank >= size and "LOCAL_WORLD_SIZE" in os.environ:
            raise ConfigError(
                f"LOCAL_RANK={local_rank} must be below LOCAL_WORLD_SIZE={size}: torchrun sets both"
            )
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=size,
        host=socket.gethostname(),
        has_host_group=has_host_group,
    )


def _number(name: str, *, at_least: int, below: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text:
        raise ConfigError(_unset(name))
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least or (below is not None and value >= below):
        legal = f"of at least {at_least}" if below is None else f"from {at_least} to {below - 1}"
        raise ConfigError(
            f"the environment variable {name} must be a whole number {legal}, got {text!r}: torchrun sets it; "
            'use strategy="none" if this process trains alone'
        )
    return value


def _unset(name: str) -> str:
    others = [each for each in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if os.environ.get(each)]
    return (
        f"the environment variable {name} is not set, but {' and '.join(others)} {_are(others)}: {HOW_TO_START}, "
        'which sets all of them, or use strategy="none" if this process trains alone'
    )


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _alone() -> str:
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks != "1":
        return (
            f'strategy="ddp" got {tasks} tasks of Slurm, but no process group: have srun start torchrun once on each '
            "machine, `srun --ntasks-per-node 1 torchrun --nproc-per-node ... script.py`"
        )
    return f'strategy="ddp" needs several processes, and this one was started alone: {HOW_TO_START}'
