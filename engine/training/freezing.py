"""Freezing: parameters that do not train for a while, and get everything back that freezing took from them.

A frozen parameter has `requires_grad=False` and no gradient at all, and torch's optimizers leave a parameter
without a gradient alone: neither weight decay nor momentum moves it, and its optimizer state stays as it is.
Batch normalization whose own parameters are all frozen is in eval mode meanwhile: its running statistics
are a part of what it has learned.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn.modules.batchnorm import _NormBase

from offloop.engine.errors import ConfigError
from offloop.engine.training.selection import matches, nothing_matches


def select_parameters(
    model: torch.nn.Module, patterns: str | Sequence[str] | None, knob: str = "freeze"
) -> list[str]:
    """Return the names of the parameters that patterns mean, in the model's order; of a tied one its first name.

    Raises:
        ConfigError: A pattern means none; the text names what was probably meant.
    """
    given = [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    # A tied parameter has several names, and each of them means it; the first one stands for it.
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for pattern in given:
        if not any(matches(name, pattern) for own in names.values() for name in own):
            raise nothing_matches(
                knob, pattern, "parameter", [name for own in names.values() for name in own]
            )
    return [own[0] for own in names.values() if any(matches(name, each) for name in own for each in given)]


class Frozen:
    """What is frozen in a run. In the training thread, between two steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Begin with nothing frozen by us; parameters that the user has frozen stay the user's."""
        self._model = model
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._norms: list[torch.nn.Module] = []  # put into eval mode by us

    @property
    def names(self) -> list[str]:
        """Names of the parameters that are frozen, in the order in which they were."""
        return list(self._parameters)

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze parameters by their full names; those that do not train already are left alone."""
        by_name = dict(self._model.named_parameters())
        for name in names:
            parameter = by_name[name]
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None  # else an optimizer would go on moving it
                self._parameters[name] = parameter
        self._set_norms()

    def thaw(self, names: Iterable[str]) -> None:
        """Let parameters train that were frozen here."""
        for name in names:
            parameter = self._parameters.pop(name, None)
            if parameter is not None:
                parameter.requires_grad_(True)
        self._set_norms()

    def thaw_all(self) -> None:
        """Give everything back as it was found."""
        self.thaw(self.names)

    def _set_norms(self) -> None:
        """Have exactly the normalizations in eval mode whose parameters are all frozen by us."""
        frozen = {id(each) for each in self._parameters.values()}
        for module in self._norms:
            module.training = True
        self._norms = []
        if not frozen:
            return
        for module in self._model.modules():
            if isinstance(module, _NormBase) and module.training:
                own = list(module.parameters(recurse=False))
                if own and all(id(each) in frozen for each in own):
                    module.training = False
                    self._norms.append(module)


def check_freeze(model: torch.nn.Module, patterns: str | Sequence[str] | None) -> None:
    """Check the knob.

    Raises:
        ConfigError: A pattern means nothing, or nothing is left to train.
    """
    frozen = set(select_parameters(model, patterns))
    if frozen and not any(
        parameter.requires_grad and name not in frozen for name, parameter in model.named_parameters()
    ):
        raise ConfigError(f"freeze={patterns!r} leaves no parameter to train")
