"""The user's state in a checkpoint: of the trainer, of the loss, and buffers that no `state_dict` returns.

trainer     the keys that a subclass adds in `state_dict`
loss        parameters and buffers of a `loss=` that is a module
buffers     non-persistent buffers of model and loss that have changed since the run's start
unsaved     sentences about other changes, see `carried_state.py`
"""

import functools
import logging
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offloop.engine.callback import Handlers
from offloop.engine.position.carried_state import (
    CarriedState,
    Owner,
    TensorMark,
    is_of_user,
    owner_of_optimizer,
    owners_in_module,
)
from offloop.engine.position.exactness import ResumeReport
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.trainer_state import BASE_STATE
from offloop.engine.training.wrappers import renamed

logger = logging.getLogger("offloop")

Buffers = dict[str, torch.Tensor | None]


class UserState:
    """Saves and restores the user's state of one run. Training thread only."""

    def __init__(self, trainer: TrainingProgram, handlers: Sequence[Handlers]) -> None:
        """Serve a run of `trainer` with these callbacks."""
        self._trainer = trainer
        self._handlers = handlers
        loss = _bare(trainer.loss)
        is_known = loss is trainer or any(loss is each for each in trainer.model.modules())
        self._loss = None if is_known else loss
        self._at_start: dict[str, TensorMark | None] = {}
        self._carried: CarriedState | None = None
        self._told: set[str] = set()

    def begin(self) -> None:
        """Record the tensors as the script made them, on their device, before a checkpoint is restored."""
        self._at_start = {
            name: None if tensor is None else TensorMark(tensor) for name, tensor in self._tracked().items()
        }

    def watch(self, known: Sequence[Any]) -> None:
        """Record what objects carry, after the deciders of `TrainStart`.

        Args:
            known: The run's schedules and loaders.
        """
        trainer = self._trainer
        owners = [
            Owner(
                type(trainer).__name__,
                trainer,
                hint="return it from the trainer's state_dict()",
                skipped=trainer._base_attributes,
                counts_plain=is_of_user(type(trainer)) and not has_own_state(trainer),
                saved=("trainer",),
            )
        ]
        for each in self._handlers:
            kind = type(each.callback)
            if (each.hooks or each.deciders) and kind.__module__.partition(".")[0] != "offloop":
                owners.append(
                    Owner(
                        each.name,
                        each.callback,
                        hint="return it from the callback's state_dict()",
                        counts_plain=is_of_user(kind) and not each.has_state,
                        saved=("callbacks", each.name),
                    )
                )
        owners += [owner_of_optimizer(name, each) for name, each in trainer.optimizers.items()]
        if isinstance(self._loss, torch.nn.Module):
            owners += owners_in_module(type(self._loss).__name__, self._loss, "loss")
        elif self._loss is not None:
            kind = type(self._loss)
            hint = (
                "make the loss a torch.nn.Module with buffers, or return it from the trainer's state_dict()"
            )
            owners.append(Owner(kind.__name__, self._loss, hint=hint, counts_plain=is_of_user(kind)))
        if isinstance(trainer.loss, types.FunctionType | types.MethodType | functools.partial):
            hint = "make the loss a torch.nn.Module with buffers"
            owners.append(Owner("loss", trainer.loss, hint=hint, counts_plain=False))
        owners += owners_in_module("model", trainer.model, "model")
        own = [trainer.model, self._loss, *trainer.optimizers.values(), trainer.scheduler]
        self._carried = CarriedState(owners, [*own, *known])

    def capture(self, state: dict[str, Any]) -> None:
        """Add the user's state to that of a checkpoint."""
        # Otherwise it is there, as of the last step.
        if "trainer" not in state:
            state["trainer"] = own_state(self._trainer)
        if isinstance(self._loss, torch.nn.Module) and (of_loss := self._loss.state_dict()):
            state["loss"] = dict(of_loss)
        state["buffers"] = {
            name: tensor
            for name, tensor in self._tracked().items()
            if tensor is not None and TensorMark(tensor) != self._at_start.get(name)
        }
        state["unsaved"] = [] if self._carried is None else self._carried.unsaved(state)
        new = [each for each in state["unsaved"] if each not in self._told]
        if new:
            self._told.update(new)
            logger.warning(
                "checkpoints of this run miss state that it carries from step to step: %s. "
                "See 'State of your own' in docs/checkpoints.md",
                "; ".join(new),
            )

    def restore(self, state: Mapping[str, Any], report: ResumeReport) -> None:
        """Restore the user's state, after model and optimizers."""
        self._restore_buffers(state.get("buffers", {}), state.get("loss", {}), report)
        own, name = state.get("trainer", {}), type(self._trainer).__name__
        if own and not has_own_state(self._trainer):
            keys = ", ".join(map(str, own))
            report.lower("approximate", f"{name} no longer has state_dict and load_state_dict: {keys}")
        elif own:
            _restore_own_state(self._trainer, own)
        elif has_own_state(self._trainer) and own_state(self._trainer):
            report.lower("approximate", f"the checkpoint holds no state of {name}")
        for unsaved in state.get("unsaved", ()):
            report.lower("approximate", unsaved)

    def _restore_buffers(
        self, buffers: Mapping[str, torch.Tensor], of_loss: Mapping[str, Any], report: ResumeReport
    ) -> None:
        """Restore the tensors that had changed; the others are as the script made them."""
        own = self._tracked()
        changed = renamed(buffers, own)
        for name, saved in changed.items():
            if name in own:
                self._set(name, own[name], saved)
            else:
                report.lower("approximate", f"the buffer {name} of the checkpoint no longer exists")
        for name, saved in of_loss.items():
            mine = own.get(f"loss.{name}")
            if not isinstance(saved, torch.Tensor):
                assert isinstance(self._loss, torch.nn.Module)
                self._loss.load_state_dict({name: saved}, strict=False)
            elif f"loss.{name}" not in changed and (mine is None or not _is_equal(mine, saved)):
                report.take(f"the loss's {name} differs from the checkpoint's")
                report.lower("approximate", f"the loss's {name} differs from the checkpoint's")

    @torch.no_grad()
    def _set(self, name: str, mine: torch.Tensor | None, saved: torch.Tensor) -> None:
        if mine is not None and (mine.shape, mine.dtype) == (saved.shape, saved.dtype):
            mine.copy_(saved)
            return
        root, _, path = name.partition(".")
        module: Any = self._trainer.model if root == "model" else self._loss
        *parents, last = path.split(".")
        for part in parents:
            module = getattr(module, part)
        setattr(module, last, saved.to(self._trainer.device if mine is None else mine.device))

    def _tracked(self) -> Buffers:
        """Return the non-persistent buffers of the model and all tensors of the loss, by name."""
        found = _transient_buffers("model", self._trainer.model)
        if isinstance(self._loss, torch.nn.Module):
            found |= _transient_buffers("loss", self._loss)
            found |= {f"loss.{name}": each for name, each in self._loss.named_buffers()}
            found |= {f"loss.{name}": each for name, each in self._loss.named_parameters()}
        return found


def has_own_state(trainer: TrainingProgram) -> bool:
    """Return whether a trainer's class overrides `state_dict`."""
    return type(trainer).state_dict is not TrainingProgram.state_dict


def own_state(trainer: TrainingProgram) -> dict[str, Any]:
    """Return what a trainer's class adds to a checkpoint. Training thread.

    Raises:
        TypeError: Its `state_dict` returns no mapping.
    """
    if not has_own_state(trainer):
        return {}
    state = trainer.state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{type(trainer).__name__}.state_dict() must return a mapping, got {type(state).__name__}"
        )
    return {name: value for name, value in state.items() if name not in BASE_STATE}


def _restore_own_state(trainer: TrainingProgram, own: Mapping[str, Any]) -> None:
    """Restore the state that a trainer's class added. Training thread, after everything else is restored."""
    state = TrainingProgram.state_dict(trainer) | dict(own)
    trainer._is_restoring = True
    try:
        trainer.load_state_dict(state)
    finally:
        trainer._is_restoring = False


def _bare(loss: Any) -> Any:
    """Return the object behind a loss, also of a method or a partial; None for a function."""
    while isinstance(loss, functools.partial | types.MethodType):
        loss = loss.func if isinstance(loss, functools.partial) else loss.__self__
    return None if isinstance(loss, types.FunctionType | types.BuiltinFunctionType) else loss


def _transient_buffers(root: str, model: torch.nn.Module) -> Buffers:
    return {
        f"{root}.{path}.{name}" if path else f"{root}.{name}": module._buffers.get(name)
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    }


def _is_equal(mine: torch.Tensor, saved: torch.Tensor) -> bool:
    return mine.shape == saved.shape and torch.equal(mine.detach().cpu(), saved.to(mine.dtype).cpu())
