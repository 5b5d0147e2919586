"""Freezing: parameters that do not train for a while.

A frozen parameter has `requires_grad=False` and no gradient. torch's optimizers skip a parameter without a gradient:
neither weight decay nor momentum moves it, and its optimizer state stays as it is. A batch normalization whose
parameters are all frozen is in eval mode meanwhile, because its running statistics are learned too.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn.modules.batchnorm import _NormBase

from offloop.engine.errors import ConfigError
from offloop.engine.training.selection import matches, nothing_matches


def select_parameters(
    model: torch.nn.Module, patterns: str | Sequence[str] | None, knob: str = "freeze"
) -> list[str]:
    """Return the names of the parameters that match, in the model's order. A tied parameter has its first name.

    Raises:
        ConfigError: A pattern matches none; the text suggests similar names.
    """
    given = [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    # A tied parameter has several names. Any of them selects it; the first one is returned.
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
    """The frozen parameters of a run. Training thread only, between two steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Begin with none. Parameters that the user has frozen are never thawed here."""
        self.changes = 0
        """How often parameters were frozen or thawed."""
        self._model = model
        self._parameters: dict[str, torch.nn.Parameter] = {}
        # Normalizations that are in eval mode because of freezing
        self._norms: list[torch.nn.Module] = []

    @property
    def names(self) -> list[str]:
        """Names of the frozen parameters, in the order of freezing."""
        return list(self._parameters)

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze parameters by their full names. Parameters that do not train already are skipped."""
        by_name = dict(self._model.named_parameters())
        for name in names:
            parameter = by_name[name]
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                # With a gradient, the optimizer would continue to move it
                parameter.grad = None
                self._parameters[name] = parameter
        self._set_norms()

    def thaw(self, names: Iterable[str]) -> None:
        """Let parameters train again. Only those that were frozen here change."""
        for name in names:
            parameter = self._parameters.pop(name, None)
            if parameter is not None:
                parameter.requires_grad_(True)
        self._set_norms()

    def thaw_all(self) -> None:
        """Restore the model as it was."""
        self.thaw(self.names)

    def _set_norms(self) -> None:
        """Put exactly those normalizations into eval mode whose parameters are all frozen here."""
        self.changes += 1
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
    """Check the patterns of `freeze`.

    Raises:
        ConfigError: A pattern matches nothing, or no parameter is left to train.
    """
    frozen = set(select_parameters(model, patterns))
    if frozen and not any(
        parameter.requires_grad and name not in frozen for name, parameter in model.named_parameters()
    ):
        raise ConfigError(f"freeze={patterns!r} leaves no parameter to train")
