"""A model without its weights, as bytes: another process rebuilds it, and loads the weights of a checkpoint into it.

Classes and functions of a script go by value, see `engine/processes/by_value.py`. Parameters and persistent buffers,
which every checkpoint holds, go as shapes and dtypes. Whatever else the model holds goes as it is.
"""

import functools
import io
import pickle
from typing import IO, Any

import torch

from offloop.engine.errors import ConfigError
from offloop.engine.processes.by_value import ByValuePickler, modules_by_value
from offloop.engine.processes.unsendable import Parts

__all__ = ["pack_structure", "unpack_structure"]


def pack_structure(model: torch.nn.Module) -> bytes:
    """Return a model without its weights. Wrappers of torch.compile and DistributedDataParallel are left out.

    Any thread, while nothing changes the model; reads no weights, and does not wait for a device.

    Raises:
        ConfigError: It cannot be pickled; the text names the part.
    """
    while isinstance(inner := _inside(model), torch.nn.Module):
        model = inner
    weights = frozenset(map(id, _weights_of(model)))
    make_pickler = functools.partial(_StructurePickler, weights=weights)
    file = io.BytesIO()
    with modules_by_value():
        try:
            make_pickler(file).dump(model)
        except Exception as error:
            hint = "give a function that makes the model, CheckpointEvaluator(model=make_model)"
            text = Parts(make_pickler, model, "the model").explain(
                error, destination="another process", hint=hint, hint_for_used=hint
            )
            raise ConfigError(text) from error
    return file.getvalue()


def unpack_structure(data: bytes) -> torch.nn.Module:
    """Rebuild a model from `pack_structure`, on the CPU. Its weights are not set, and none of them is trained.

    Raises:
        Exception: Whatever an import or a `__setstate__` raises.
    """
    model: torch.nn.Module = pickle.loads(data)
    return model


def _inside(model: torch.nn.Module) -> object:
    """Return what a wrapper wraps, or None."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
        return model.module
    return model._modules.get("_orig_mod")


def _weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a model that its state dict holds."""
    found: list[torch.Tensor | None] = []
    for module in model.modules():
        found += module._parameters.values()
        found += [
            each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set
        ]
    return [each for each in found if each is not None]


class _StructurePickler(ByValuePickler):
    """Writes shapes and dtypes in the place of weights."""

    def __init__(self, file: IO[bytes], *, weights: frozenset[int]) -> None:
        """Write to `file`. `weights`: the ids of the tensors that go without their values."""
        super().__init__(file)
        self._weights = weights

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and not torch.nn.parameter.is_lazy(obj):
            if id(obj) in self._weights and type(obj) in (torch.Tensor, torch.nn.Parameter):
                return _empty, (isinstance(obj, torch.nn.Parameter), tuple(obj.shape), obj.dtype)
            if obj.device.type not in ("cpu", "meta"):
                return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def _empty(is_parameter: bool, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
