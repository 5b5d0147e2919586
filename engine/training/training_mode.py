"""Training and eval mode: each module keeps its own flag, and an overridden `train()` is called.

A loop written by hand calls `model.train()` before each epoch and after each validation. That would also switch modules
that were put into eval mode on purpose. A run therefore leaves the flags alone, and restores each one after a
validation. A module that overrides `train()` relies on the call, however, for example to keep a part frozen or to merge
weights for eval mode. If a model has such a module, the call is made, and modules that were in eval mode return to it.
"""

import contextlib
from collections.abc import Iterator

from torch import nn


def enter_training(model: nn.Module) -> None:
    """Call `model.train()` if one of its modules overrides it; modules in eval mode stay there."""
    if not any(_overrides_train(module) for module in model.modules()):
        return
    in_eval = [module for module in model.modules() if not module.training]
    model.train()
    _put_back(in_eval)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for the block; each module gets its own flag back."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        if was_training[model] and any(_overrides_train(module) for module in was_training):
            model.train()
            _put_back([module for module, training in was_training.items() if not training])
        else:
            for module, training in was_training.items():
                if training:
                    module.training = True


def _put_back(in_eval: list[nn.Module]) -> None:
    """Put modules back into eval mode after the `train()` of a parent."""
    for module in in_eval:
        if module.training and _overrides_train(module):
            module.train(False)
        module.training = False


def _overrides_train(module: nn.Module) -> bool:
    return getattr(module.train, "__func__", None) is not nn.Module.train
