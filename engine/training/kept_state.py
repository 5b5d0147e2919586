"""Copies of state that a validation may change, to restore it where a resumed run must not see that validation."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def cloned(value: Any) -> Any:
    """Return a deep copy of containers and tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: cloned(each) for key, each in value.items()}
    return type(value)(map(cloned, value)) if type(value) in (list, tuple) else value


class KeptBuffers:
    """Keeps a copy of each buffer. Training thread only."""

    def __init__(self, roots: Iterable[object]) -> None:
        """Copy the buffers of the roots that are modules, and of the modules inside them."""
        modules = {
            id(module): module
            for root in roots
            if isinstance(root, torch.nn.Module)
            for module in root.modules()
        }
        self._kept = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in modules.values()
            for name, buffer in module._buffers.items()
            if buffer is None or (buffer.layout is torch.strided and not buffer.is_meta)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore each buffer: its tensor and its values."""
        for module, name, buffer, copy in self._kept:
            module._buffers[name] = buffer
            if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                buffer.copy_(copy)
