"""The parameters that train and the modules in eval mode; a run may change both, for example by thawing layers."""

from typing import TypedDict

import torch

from offloop.engine.position.exactness import ResumeReport
from offloop.engine.training.wrappers import names_in

SHOWN = 5
"""Names that a text lists at most."""


class ModelModes(TypedDict):
    """The names that differ from a new model."""

    untrained: list[str]
    """Parameters with `requires_grad=False`."""
    in_eval: list[str]
    """Modules."""


def capture_modes(model: torch.nn.Module) -> ModelModes:
    """Return the modes of a model."""
    return {
        "untrained": [name for name, each in model.named_parameters() if not each.requires_grad],
        "in_eval": [name for name, each in model.named_modules() if not each.training],
    }


def restore_modes(model: torch.nn.Module, saved: ModelModes, report: ResumeReport) -> None:
    """Give a model the modes of the checkpoint, and report where the script's differ."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    untrained = set(names_in(parameters, saved["untrained"]).values())
    changed: dict[bool, list[str]] = {True: [], False: []}
    for name, parameter in parameters.items():
        if parameter.requires_grad is (name in untrained):
            parameter.requires_grad_(name not in untrained)
            changed[name not in untrained].append(name)
    in_eval = set(names_in(modules, saved["in_eval"]).values())
    switched: dict[bool, list[str]] = {True: [], False: []}
    for name, module in modules.items():
        if module.training is (name in in_eval):
            module.training = name not in in_eval
            switched[name not in in_eval].append(name or "the model")
    for trains, names in changed.items():
        if names:
            report.keep(f"requires_grad={trains} of {_listed(names)}, in the script it is {not trains}")
    for trains, names in switched.items():
        if names:
            report.keep(f"{'train' if trains else 'eval'} mode of {_listed(names)}")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
