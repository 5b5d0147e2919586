"""Names of tensors fit each other with and without wrappers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import Cut

from offloop.callbacks import EarlyStopping, WeightAverage
from offloop.engine import Resumed, load_model
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer
from offloop.engine.training.wrappers import bare_name, names_in

BATCHES = tiny_batches(4)


@pytest.mark.parametrize(
    ("own", "names", "expected"),
    [
        (["a.w", "b"], ["a.w", "b"], ["a.w", "b"]),
        (["a.w", "b"], ["_orig_mod.a.w", "_orig_mod.b"], ["a.w", "b"]),
        (["_orig_mod.a.w"], ["a.w"], ["_orig_mod.a.w"]),
        (["module._orig_mod.a.w"], ["_orig_mod.module.a.w"], ["module._orig_mod.a.w"]),
        (["a._orig_mod.w"], ["module.a.w"], ["a._orig_mod.w"]),  # a part of the model is wrapped
        (["module.w", "w"], ["_orig_mod.w"], ["_orig_mod.w"]),  # it could be either
        (["a.w"], ["module.a.w", "a.w"], ["module.a.w", "a.w"]),
        (["a.w"], ["module.c.w"], ["module.c.w"]),
    ],
)
def test_names_are_found_where_wrappers_differ(own: Any, names: Any, expected: Any) -> None:
    assert names_in(own, names) == dict(zip(names, expected, strict=True))
    assert bare_name("module.a._orig_mod.w") == "a.w"


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, torch.nn.Module)
    return wrapped


def part_compiled(model: torch.nn.Module) -> torch.nn.Module:
    assert isinstance(model, torch.nn.Sequential)
    model[3] = compiled(model[3])
    return model


def bare(model: torch.nn.Module) -> torch.nn.Module:
    return model


def run(directory: Path, wrap: Any, cut: int = -1, resume: str | None = None) -> tuple[Any, list[Resumed]]:
    torch.manual_seed(0)
    model, recorder = wrap(tiny_model(dropout=0.2)), Recorder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = tiny_trainer(model=model, optimizer=optimizer, run_dir=directory, run_name="run")
    trainer.config = trainer.config.replace(freeze="*3*.bias")
    callbacks = [Cut(cut), WeightAverage(decay=0.5), EarlyStopping(patience=9, restore_best=True), recorder]
    trainer.train(BATCHES, BATCHES[:1], epochs=3, callbacks=callbacks, resume=resume)
    return [each.detach().clone() for each in model.parameters()], recorder.of(Resumed)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch's own, of a part that is compiled
@pytest.mark.parametrize(
    ("first", "second"), [(compiled, bare), (bare, compiled), (part_compiled, bare), (bare, part_compiled)]
)
def test_run_goes_on_bit_for_bit_with_another_wrapper(first: Any, second: Any, tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", bare)
    run(tmp_path / "cut", first, cut=6)
    rest, (resumed,) = run(tmp_path / "cut", second, resume="must")
    assert all(map(torch.equal, whole, rest))
    assert (resumed.exactness, resumed.reasons) == ("bitwise", "")


def test_weights_of_a_bare_model_are_loaded_into_a_compiled_one() -> None:
    weights = tiny_model(seed=1).state_dict()
    model = load_model(weights, into=compiled(tiny_model()))
    assert all(map(torch.equal, weights.values(), model.state_dict().values()))
