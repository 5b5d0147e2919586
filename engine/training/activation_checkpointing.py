"""Activation checkpointing: trades time for memory, with the same bits.

The activations of a checkpointed module are freed after its forward pass and computed again in the backward pass
(`torch.utils.checkpoint`, not reentrant; Chen et al. 2016, https://arxiv.org/abs/1604.06174). The second forward pass
starts with the random states and the buffers of the first: dropout drops the same elements, batch normalization does
not count a batch twice, and a spectral norm does not advance twice.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from offloop.engine.errors import ConfigError
from offloop.engine.training.selection import matches, nothing_matches

Parts = str | type | Sequence[str | type] | None
KNOB: Final = "activation_checkpointing"


def select_modules(model: torch.nn.Module, parts: Parts) -> list[str]:
    """Return the names of the modules to checkpoint, none of them inside another.

    Raises:
        ConfigError: A name or a class matches no module, a module cannot be checkpointed, or `"auto"` finds no
            repeated blocks.
    """
    if parts is None:
        return []
    if parts == "auto":
        chosen = _repeated_blocks(model)
        if not chosen:
            raise ConfigError(
                f'{KNOB}="auto" looks for blocks of one class in a row, and this model has none: name its parts'
            )
        return _checked(model, chosen)
    given = [parts] if isinstance(parts, str | type) else list(parts)
    # A shared module has several names. Any of them selects it; the first one is returned.
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    first_names: dict[torch.nn.Module, str] = {}
    for name, module in modules.items():
        first_names.setdefault(module, name)
    found: set[str] = set()
    for part in given:
        if isinstance(part, str):
            # A name selects the module itself, not the modules inside it
            meant = [name for name in modules if matches(name, part) and not name.startswith(f"{part}.")]
            if not meant:
                raise nothing_matches(KNOB, part, "module", modules)
        else:
            meant = [name for name, module in modules.items() if isinstance(module, part)]
            if not meant:
                classes = sorted({type(module).__name__ for module in modules.values()})
                raise ConfigError(f"{KNOB}: the model has no {part.__name__}; it has {', '.join(classes)}")
        found.update(first_names[modules[name]] for name in meant)
    return _checked(model, _outermost([name for name in modules if name in found]))


@contextlib.contextmanager
def checkpointed(model: torch.nn.Module, parts: Parts) -> Iterator[None]:
    """Checkpoint parts of a model for the length of the block.

    Meanwhile the class of each module is a subclass of its own. Unlike a replaced method, this survives a deep copy,
    and it changes neither parameter names nor `isinstance`.
    """
    changed: list[tuple[torch.nn.Module, type]] = []
    try:
        for name in select_modules(model, parts):
            module = model.get_submodule(name)
            own_class: Any = type(module)
            changed.append((module, own_class))
            module.__class__ = _checkpointed_class(own_class)
        yield
    finally:
        for module, own_class in changed:
            module.__class__ = own_class


# Cached, so that the next run gets the same class and a compiled model stays valid
@functools.cache
def _checkpointed_class(own_class: type[Any]) -> type[torch.nn.Module]:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own_class.forward(self, *args, **kwargs)
        own_forward = functools.partial(own_class.forward, self)
        if next(self.buffers(), None) is None:
            return checkpoint(own_forward, *args, use_reentrant=False, **kwargs)
        context = functools.partial(_contexts, self)
        return checkpoint(own_forward, *args, use_reentrant=False, context_fn=context, **kwargs)

    return type(own_class.__name__, (own_class,), {"forward": forward, "__module__": own_class.__module__})


def _contexts(module: torch.nn.Module) -> tuple["_FirstPass", "_SecondPass"]:
    """Return the contexts of the first and the second forward pass."""
    first = _FirstPass(module)
    return first, _SecondPass(first)


class _FirstPass(contextlib.AbstractContextManager[None]):
    """Keeps the values that buffers had before the first pass changed them in place."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.places = [
            (owner._buffers, name, buffer)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.before: list[torch.Tensor] = []
        self._copies: list[tuple[torch.Tensor, int]] = []

    def __enter__(self) -> None:
        self._copies = [(buffer.clone(), buffer._version) for _, _, buffer in self.places]

    def __exit__(self, *error: object) -> None:
        # Copies of unchanged buffers are dropped. The running statistics of batch normalization change without a new
        # version, which does no harm: training computes nothing from them.
        self.before = [
            buffer if buffer._version == version else copy
            for (_, _, buffer), (copy, version) in zip(self.places, self._copies, strict=True)
        ]
        self._copies.clear()


class _SecondPass(contextlib.AbstractContextManager[None]):
    """Gives the second pass copies of the first pass's buffers, and restores the current ones after it. Reusable."""

    def __init__(self, first: _FirstPass) -> None:
        self._first = first
        self._now: list[torch.Tensor | None] = []

    def __enter__(self) -> None:
        places = self._first.places
        self._now = [buffers[name] for buffers, name, _ in places]
        for (buffers, name, _), before in zip(places, self._first.before, strict=True):
            buffers[name] = before.clone()

    def __exit__(self, *error: object) -> None:
        for (buffers, name, _), now in zip(self._first.places, self._now, strict=True):
            buffers[name] = now
        self._now = []


def _repeated_blocks(model: torch.nn.Module) -> list[str]:
    """Return the names of repeated blocks: modules of one class in a list or a sequence, with children."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential):
            members = [(key, each) for key, each in module.named_children() if next(each.children(), None)]
            often = Counter(type(each) for _, each in members)
            found += [
                f"{name}.{key}" if name else key
                for key, each in members
                if often[type(each)] > 1 and next(each.parameters(), None) is not None
            ]
    return _outermost(found)


def _checked(model: torch.nn.Module, names: list[str]) -> list[str]:
    for name in names:
        if "forward" in vars(model.get_submodule(name)):
            raise ConfigError(
                f"{KNOB}: forward() of {name!r} was replaced on the instance; name another part"
            )
    return names


def _outermost(names: Sequence[str]) -> list[str]:
    """Return the names that are not inside another one."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
