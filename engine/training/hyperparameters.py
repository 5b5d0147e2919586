"""What a run is made with, by flat name: model, loss, optimizers, data, limits, knobs, and the user's own."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch.nn.parameter import is_lazy

from offloop.engine.config import TrainerConfig
from offloop.engine.errors import ConfigError
from offloop.engine.training.freezing import select_parameters
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.setup import Limits, Program

_HOW_NOT_WHAT: Final = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""Options of optimizers that choose an implementation and not a result; told only where they are on."""


def hyperparameters_of(
    program: Program,
    config: TrainerConfig,
    limits: Limits,
    *,
    optimizers: Mapping[str, torch.optim.Optimizer],
    schedules: Iterable[Schedule],
    train_loader: object,
) -> dict[str, Any]:
    """Return what a run is made with, as plain values by flat name.

    Knobs that are at their default are left out, except precision. The user's own come last and replace others of the
    same name; a mapping among them gives `group.name`.

    Args:
        program: The trainer.
        config: Its knobs.
        limits: Given to `train()`.
        optimizers: By name.
        schedules: Those of the trainer.
        train_loader: Training batches.
    """
    model = getattr(program.model, "_orig_mod", program.model)
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": _trainable(program.model, config),
        "loss": _name_of(program.loss),
    }
    for name, optimizer in optimizers.items():
        found[name] = type(optimizer).__name__
        found |= {f"{name}.{key}": value for key, value in _options_of(optimizer).items()}
    found["scheduler"] = ", ".join(type(each.scheduler).__name__ for each in schedules) or None
    batches = getattr(train_loader, "batch_sampler", None)
    sizes = (getattr(each, "batch_size", None) for each in (train_loader, batches))
    found["batch_size"] = next((size for size in sizes if isinstance(size, int)), None)
    found |= config.chosen()
    for name in ("epochs", "max_steps", "max_time"):
        found[name] = getattr(limits, name)
    found = {name: value for name, value in found.items() if value is not None}
    return found | flat(config.hyperparameters or {})


def flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _trainable(model: torch.nn.Module, config: TrainerConfig) -> int | None:
    """Return the number of parameters that train; None where it is known only later."""
    try:
        frozen = set(select_parameters(model, config.freeze))
    except ConfigError:
        # The run is about to fail with it
        return None
    parameters = dict(model.named_parameters())
    if any(is_lazy(each) for each in parameters.values()):
        return None
    return sum(each.numel() for name, each in parameters.items() if each.requires_grad and name not in frozen)


def _name_of(loss: object) -> str | None:
    if loss is None or isinstance(loss, str):
        return loss
    if isinstance(loss, functools.partial):
        return _name_of(loss.func)
    if isinstance(loss, torch.nn.Module) or not isinstance(loss, Callable):  # type: ignore[arg-type]
        return type(loss).__name__
    return str(getattr(loss, "__name__", type(loss).__name__))


def _options_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the options of an optimizer, of its groups where they agree; a list where they differ."""
    found: dict[str, Any] = {}
    for name, default in optimizer.defaults.items():
        # A schedule may have changed the rate already
        of_groups = [
            _plain(group.get(f"initial_{name}", group.get(name, default))) for group in optimizer.param_groups
        ]
        value = of_groups[0] if all(each == of_groups[0] for each in of_groups) else of_groups
        if value is not None and (value is not False or name not in _HOW_NOT_WHAT):
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # Of a learning rate on a device, before the run
        return value.item() if value.numel() == 1 else None
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str) else None
