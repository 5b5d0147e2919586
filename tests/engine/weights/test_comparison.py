"""What differs between two models, and by how much."""

import math
from pathlib import Path

import pytest
import torch

from offloop.callbacks import ModelCheckpoint
from offloop.engine import WeightsError, compare_models
from offloop.engine.testing import tiny_loader, tiny_model, tiny_trainer


def test_equal_models_have_no_difference() -> None:
    state = {"a": torch.tensor([1.0, math.nan, -0.0]), "b": torch.tensor(3), "x._extra_state": {"n": 1}}
    found = compare_models(state, {name: state[name] for name in reversed(state)})
    assert found.is_equal and found.same == 3
    assert (found.tensors, found.metrics, found.settings) == ([], {}, {})


def test_each_kind_of_difference_is_told_with_its_figures() -> None:
    a = {
        "values": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "shape": torch.zeros(2, 3),
        "dtype": torch.ones(2),
        "gone": torch.zeros(1),
        "nan": torch.tensor([1.0, math.nan]),
        "zero": torch.zeros(2),
        "whole": torch.tensor([2**53, 5]),
        "extra": torch.zeros(1, dtype=torch.complex64),
    }
    b = {
        "values": torch.tensor([[3.0, 4.0], [0.0, 2.5]]),
        "shape": torch.zeros(3, 2),
        "dtype": torch.ones(2, dtype=torch.bfloat16),
        "nan": torch.tensor([1.0, 2.0]),
        "zero": torch.ones(2),
        "whole": torch.tensor([2**53, 9]),
        "extra": torch.full((1,), 3 + 4j, dtype=torch.complex64),
        "new": torch.zeros(1, dtype=torch.int64),
    }
    found = compare_models(a, b)
    by_name = {each.name: each for each in found.tensors}
    assert list(by_name) == ["values", "shape", "dtype", "gone", "nan", "zero", "whole", "extra", "new"]
    assert found.same == 0 and not found.is_equal
    values = by_name["values"]
    assert (values.kind, values.elements, values.changed) == ("values", 4, 1)
    assert (values.max_abs, values.relative) == (2.5, 0.5)
    shape = by_name["shape"]
    assert (shape.kind, shape.a, shape.b, shape.elements) == ("shape", "float32[2, 3]", "float32[3, 2]", 0)
    assert (by_name["dtype"].kind, by_name["dtype"].changed) == ("dtype", 0)
    assert (by_name["gone"].kind, by_name["gone"].b) == ("only_in_a", None)
    assert (by_name["new"].kind, by_name["new"].a) == ("only_in_b", None)
    assert by_name["nan"].changed == 1 and math.isnan(by_name["nan"].max_abs)
    assert by_name["zero"].relative == math.inf
    assert (by_name["whole"].changed, by_name["whole"].max_abs) == (1, 4.0)
    assert by_name["extra"].max_abs == 5.0


def test_one_changed_element_is_found_wherever_it_is() -> None:
    base = tiny_model().state_dict()
    for name, each in base.items():
        for index in range(0, each.numel(), 7):
            other = {key: value.clone() for key, value in base.items()}
            other[name].view(-1)[index] += 1e-3
            (found,) = compare_models(base, other).tensors
            assert (found.name, found.changed) == (name, 1)
            assert found.max_abs == pytest.approx(1e-3, rel=1e-2)


def test_settings_and_metrics_of_runs_that_differ_are_told(tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 2)):
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name=name, seed=seed)
        trainer.train(tiny_loader(2), epochs=seed, callbacks=[ModelCheckpoint()])
    found = compare_models(tmp_path / "first", str(tmp_path / "second@last"))
    assert found.settings == {"config.seed": (1, 2)}
    assert set(found.metrics) == {"train_loss"}
    assert found.a.startswith(str(tmp_path / "first" / "checkpoints"))


def test_source_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no file"):
        compare_models({"a": torch.zeros(1)}, tmp_path / "missing.pt")
