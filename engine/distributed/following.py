"""Following: what a decider or a `call` changes on rank 0, the other ranks change too.

Weights and buffers, options of parameter groups and frozen parameters follow. The state of optimizers does not, nor
do schedules: a callback that attaches one sets `ranks = "all"`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from offloop.engine.distributed.group import Group
from offloop.engine.errors import ConfigError, OffloopError, as_failure, describe
from offloop.engine.training.loop import TrainingLoop

_Options = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(slots=True)
class _Before:
    """The state of rank 0 before user code that may change it."""

    versions: list[tuple[int, int]]
    options: _Options


class Following:
    """Follows rank 0. Training thread only; all ranks call `follow` at the same moment."""

    def __init__(self, loop: TrainingLoop, group: Group) -> None:
        self._loop = loop
        self._group = group
        self._before: _Before | None = None

    def _tensors(self) -> list[torch.Tensor]:
        model = self._loop.program.model
        return [*model.parameters(), *model.buffers()]

    def _options(self) -> _Options:
        return {
            name: [
                {
                    key: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                    for key, value in group.items()
                    if key != "params"
                }
                for group in optimizer.param_groups
            ]
            for name, optimizer in self._loop.setup.optimizers.items()
        }

    def watch(self) -> None:
        """Note the state of rank 0, before user code that may change it."""
        if self._group.rank == 0:
            # In-place operations raise the version; an assignment to `data` changes the address
            versions = [(each._version, each.data_ptr()) for each in self._tensors()]
            self._before = _Before(versions, self._options())

    def follow(self, error: BaseException | None = None) -> str | None:
        """Make the other ranks follow what has changed on rank 0 since `watch`.

        Args:
            error: What the user code raised on rank 0, if anything.

        Returns:
            The error of rank 0 in words, on all ranks.

        Raises:
            ConfigError: A schedule was attached on rank 0 alone.
        """
        loop, before, self._before = self._loop, self._before, None
        own: dict[str, Any] = {"schedules": len(loop.schedules.all)}
        if before is not None:
            now = self._options()
            own |= {
                "error": None if error is None else describe(as_failure(error)),
                "options": [
                    (name, index, key, value)
                    for name, groups in now.items()
                    for index, group in enumerate(groups)
                    for key, value in group.items()
                    if index >= len(before.options[name])
                    or not _is_same(value, before.options[name][index].get(key))
                ],
                "frozen": loop.frozen.names,
                "changed": [
                    index
                    for index, (each, then) in enumerate(zip(self._tensors(), before.versions, strict=False))
                    if (each._version, each.data_ptr()) != then
                ],
            }
        everyone = self._group.gather_objects(own)
        first = everyone[0]
        if any(each["schedules"] != first["schedules"] for each in everyone):
            raise ConfigError(
                'a callback has attached a schedule on some ranks only: set ranks = "all" on its class, so that it '
                "runs on every rank"
            )
        if "error" not in first:
            return None
        if self._group.rank:
            self._apply(first)
        if first["changed"]:
            tensors = self._tensors()
            with torch.no_grad():
                self._group.broadcast([tensors[index].data for index in first["changed"]])
        message: str | None = first["error"]
        return message

    def _apply(self, first: dict[str, Any]) -> None:
        loop = self._loop
        for name, index, key, value in first["options"]:
            group = loop.setup.optimizers[name].param_groups[index]
            if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                group[key].copy_(value)
            else:
                group[key] = value
        if first["frozen"] != loop.frozen.names:
            loop.frozen.thaw([each for each in loop.frozen.names if each not in first["frozen"]])
            loop.frozen.freeze([each for each in first["frozen"] if each not in loop.frozen.names])

    def followed(self, function: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        """Return a function for all ranks that calls `function` on rank 0; the others wait, and follow."""

        def call(program: Any) -> Any:
            self.watch()
            result, error = None, None
            if function is not None:
                try:
                    result = function(program)
                except BaseException as raised:
                    error = raised
            message = self.follow(error)
            if error is not None:
                raise error
            if message is not None:
                raise OffloopError(f"on rank 0: {message}")
            return result

        return call


def _is_same(value: Any, before: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(before, torch.Tensor) and torch.equal(value, before)
    return type(value) is type(before) and bool(value == before)
