"""Records the order of collectives: what torch.distributed is asked for, by which thread. Import it before offloop."""

import functools
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from rank_scripts.talk import ATTEMPT, RANK
from torch.nn.parallel import DistributedDataParallel

NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "init_process_group",
    "monitored_barrier",
    "new_group",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "_broadcast_coalesced",
    "_verify_params_across_processes",
)


class Recorder:
    """Writes one line for each collective of this process, at once: it may be killed."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"collectives-{ATTEMPT}-{RANK}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._inside = threading.local()
        for name in NAMES:
            for module in (dist, c10d):
                if hasattr(module, name):
                    setattr(module, name, self._recorded(name, getattr(module, name)))
        forward: Any = DistributedDataParallel.forward

        @functools.wraps(forward)
        def recorded_forward(module: Any, *arguments: Any, **named: Any) -> Any:
            self.note("ddp", [int(module.require_backward_grad_sync), int(torch.is_grad_enabled())])
            return forward(module, *arguments, **named)

        setattr(DistributedDataParallel, "forward", recorded_forward)  # noqa: B010 - mypy

    def note(self, kind: str, details: Any) -> None:
        """Write a line."""
        line = {"call": [kind, details], "thread": threading.current_thread().name}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def _recorded(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def recorded(*arguments: Any, **named: Any) -> Any:
            # What one calls to do its work is no call of ours
            if getattr(self._inside, "depth", 0) == 0:
                details = [_describe(each) for each in arguments]
                details += [f"{key}={_describe(value)}" for key, value in sorted(named.items())]
                if name.startswith(("gather", "scatter")):
                    # One rank has the list of what all give or get
                    details = [each for each in details if each != "object" and not isinstance(each, list)]
                self.note(name, details)
            self._inside.depth = getattr(self._inside, "depth", 0) + 1
            try:
                return function(*arguments, **named)
            finally:
                self._inside.depth -= 1

        return recorded


def _describe(value: Any) -> Any:
    """Return what has to be the same on all ranks of an argument."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, dist.ProcessGroup):
        return f"group {value.group_name}"
    if isinstance(value, list | tuple) and all(isinstance(each, torch.Tensor) for each in value):
        return [_describe(each) for each in value]
    if isinstance(value, list | tuple):
        return f"{len(value)} objects"
    # A rank may have nothing to add to what the others tell
    return "object"
