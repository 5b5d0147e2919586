"""What `Trainer.state_dict` holds: model, loss, optimizers, schedule and loss scale."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.errors import ConfigError
from offloop.engine.training.optimizer_state import load_optimizer

BASE_STATE: Final = frozenset({"model", "optimizers", "loss", "scheduler", "scaler"})
"""The keys that `capture_state` returns."""


def capture_state(
    model: torch.nn.Module,
    loss: object,
    optimizers: Mapping[str, torch.optim.Optimizer],
    scheduler: LRScheduler | None,
    scaler: torch.amp.GradScaler | None,
) -> dict[str, Any]:
    """Return the state of all parts. Tensors are not copied."""
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizers": {name: each.state_dict() for name, each in optimizers.items()},
    }
    if isinstance(loss, torch.nn.Module) and (loss_state := loss.state_dict()):
        state["loss"] = loss_state
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    return state


def restore_state(
    state: Mapping[str, Any],
    model: torch.nn.Module,
    loss: object,
    optimizers: Mapping[str, torch.optim.Optimizer],
    scheduler: LRScheduler | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Load into all parts what `capture_state` returned.

    Raises:
        ConfigError: `state` has other parts.
        RuntimeError, ValueError: A part does not fit; torch's text says what differs.
    """
    if not isinstance(state, Mapping) or not {"model", "optimizers"} <= set(state):
        raise ConfigError("state must be what Trainer.state_dict() returned")
    if set(state["optimizers"]) != set(optimizers):
        raise ConfigError(
            f"the state is of optimizers {', '.join(state['optimizers'])}; there are {', '.join(optimizers)}"
        )
    if ("scheduler" in state) is not (scheduler is not None):
        with_it, without = ("the state", "Trainer") if "scheduler" in state else ("Trainer", "the state")
        raise ConfigError(f"{with_it} has a scheduler, {without} has none")
    model.load_state_dict(state["model"])
    for name, optimizer in optimizers.items():
        load_optimizer(optimizer, state["optimizers"][name])
    if isinstance(loss, torch.nn.Module) and "loss" in state:
        loss.load_state_dict(state["loss"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
