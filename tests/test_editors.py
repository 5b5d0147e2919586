"""What editors and `help()` show of public names. Jedi reads the sources as an editor does, without running them."""

import importlib
import inspect
import re
import tempfile
from typing import Any, Final

import jedi
import msgspec
import pytest
import torch

from offloop.engine import Command, Event, Trainer, TrainerConfig
from offloop.engine.config import TorchDevice
from offloop.engine.training.trainer_arguments import trainer_arguments

# Several processes that test at once would read what another one is about to write
jedi.settings.cache_directory = tempfile.mkdtemp()

PACKAGES: Final = ("offloop", "offloop.engine", "offloop.callbacks", "offloop.dashboard")


def takes_arguments(value: Any) -> bool:
    """Return whether this is a function, or a class whose constructor is not the one of a built-in class."""
    if not inspect.isclass(value):
        return inspect.isfunction(value)
    if getattr(value, "_is_protocol", False):
        return False
    if issubclass(value, Command):
        return False  # Jedi, unlike Pyright, finds no fields behind a generic base such as `Command[None]`
    return issubclass(value, msgspec.Struct) or inspect.isfunction(value.__init__)


NAMES: Final = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if takes_arguments(getattr(importlib.import_module(package), name))
]


def parameters_seen(code: str) -> list[str]:
    """Return the parameters that an editor shows behind the last bracket of some code; all those of overloads."""
    lines = code.split("\n")
    signatures = jedi.Script(code).get_signatures(len(lines), len(lines[-1]))
    return list(dict.fromkeys(each.name for signature in signatures for each in signature.params))


def parameters_of(value: Any) -> list[str]:
    return list(inspect.signature(value).parameters)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_an_editor_shows_the_arguments(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    for code in (f"from {package} import {name}\n{name}(", f"import {package}\n{package}.{name}("):
        seen = parameters_seen(code)
        if parameters_of(value)[:1] == ["key"] and issubclass(value, Event):
            # Jedi, unlike Pyright, does not know that the fields of a base with keywords only come last.
            seen.sort(key=lambda name: name in Event.__struct_fields__)
        assert seen == parameters_of(value), code


def test_an_editor_completes_every_knob_of_a_trainer() -> None:
    code = "from offloop import Trainer\nTrainer(model, optimizer, "
    line = code.split("\n")[1]
    completed = {each.name.removesuffix("=") for each in jedi.Script(code).complete(2, len(line))}
    assert {*TrainerConfig.__struct_fields__, "loss", "scheduler", "callbacks"} <= completed


def test_the_knobs_of_a_trainer_are_those_of_its_configuration() -> None:
    knobs = list(TrainerConfig.__struct_fields__)
    parameters = inspect.signature(trainer_arguments).parameters
    assert list(parameters)[-len(knobs) :] == knobs
    assert {name: parameters[name].default for name in knobs} == {
        name: getattr(TrainerConfig(), name) for name in knobs
    }
    types = {name: trainer_arguments.__annotations__[name] for name in knobs}
    assert types["device"] == str | torch.device  # which the configuration knows without loading torch
    types["device"] = str | TorchDevice
    assert types == {name: TrainerConfig.__annotations__[name] for name in knobs}


def test_a_trainer_takes_what_is_declared_and_has_the_declared_defaults() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    declared = inspect.signature(trainer_arguments).parameters
    defaults = {name: each.default for name, each in declared.items() if each.default is not each.empty}
    for given in ({}, defaults):
        trainer = Trainer(model, optimizer, **given)
        assert trainer.config == TrainerConfig()
        for name in ("loss", "scheduler", "batch_size", "callbacks"):
            assert getattr(trainer, name) == defaults[name]
    assert Trainer(model, optimizer, TrainerConfig(epochs=3), epochs=None).config.epochs is None


def test_help_describes_every_argument_of_a_trainer() -> None:
    arguments = (Trainer.__init__.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    assert re.findall(r"^        (\w+): ", arguments, re.MULTILINE) == parameters_of(Trainer)
