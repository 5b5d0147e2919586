"""engine/training/precision.py: autocast, loss scaling, clipping and rescaling."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offloop.engine.testing import tiny_loader, tiny_model, tiny_trainer
from offloop.engine.training.precision import (
    MixedPrecision,
    clip,
    free_gradients,
    gradients_are_finite,
    rescale,
)

CPU = torch.device("cpu")


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return made


def gradients(made: list[nn.Parameter]) -> list[Any]:
    return [None if each.grad is None else each.grad.tolist() for each in made]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_a_forward_pass_computes_in_the_precision(precision: Any, dtype: torch.dtype) -> None:
    with MixedPrecision(precision, CPU).autocast():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype
    assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


def test_only_fp16_is_scaled() -> None:
    for precision, scale in (("32-true", None), ("bf16-mixed", None), ("16-mixed", 2.0**16)):
        mixed = MixedPrecision(precision, CPU)  # type: ignore[arg-type]  # of the three
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        mixed.backward((parameter * 2).sum())
        assert parameter.grad is not None and parameter.grad.item() == 2.0 * (scale or 1.0)
        mixed.unscale(optimizer)
        assert parameter.grad.item() == 2.0
        mixed.step(optimizer)
        assert parameter.item() == -1.0
        after = mixed.update()
        assert (None if after is None else after.item()) == scale


def test_the_scale_that_is_returned_stays_as_it_was() -> None:
    mixed = MixedPrecision("16-mixed", CPU)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scales: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        mixed.backward((parameter * math.inf).sum())
        mixed.unscale(optimizer)
        mixed.step(optimizer)
        scale = mixed.update()
        assert scale is not None
        scales.append(scale)
    assert [scale.item() for scale in scales] == [2.0**15, 2.0**14]
    assert mixed.initial_scale == 2.0**16
    assert parameter.item() == 1.0


def test_clipping_by_norm_returns_the_norm_before() -> None:
    made = parameters([3.0, 0.0], [0.0, 4.0], None)
    norm = clip(made, 1.0, "norm")
    assert norm is not None and norm.item() == 5.0
    torch.testing.assert_close(gradients(made)[:2], [[0.6, 0.0], [0.0, 0.8]])


def test_clipping_by_value_clips_each() -> None:
    made = parameters([3.0, -0.5], None)
    assert clip(made, 1.0, "value") is None
    assert gradients(made) == [[1.0, -0.5], None]


def test_rescaling_multiplies_what_there_is() -> None:
    made = parameters([3.0, -0.5], None, [1.0, 0.0])
    rescale(made, 2.0)
    assert gradients(made) == [[6.0, -1.0], None, [2.0, 0.0]]
    rescale(parameters(None), 2.0)


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([[1.0, 2.0], None], True),
        ([[1.0, math.nan], [1.0, 1.0]], False),
        ([[1.0, 1.0], [-math.inf, 1.0]], False),
        ([None], True),
        ([], True),
    ],
)
def test_gradients_are_finite_if_each_is(values: list[Any], finite: bool) -> None:
    assert gradients_are_finite(parameters(*values)) is finite


def test_sparse_gradients_are_looked_at_whole() -> None:
    """Two entries of one place are one gradient: their sum may be infinite where they are not."""
    parameter = nn.Parameter(torch.zeros(3))
    largest = torch.finfo(torch.float32).max
    for values, finite in (([1.0, 2.0], True), ([1.0, math.nan], False), ([largest, largest], False)):
        parameter.grad = torch.sparse_coo_tensor(
            torch.tensor([[1, 1]]), torch.tensor(values), (3,), check_invariants=True
        )
        assert gradients_are_finite([parameter]) is finite


def test_gradients_go_along_with_the_scale_where_an_optimizer_steps_again() -> None:
    mixed = MixedPrecision("16-mixed", CPU)
    first, second = parameters([math.inf, 1.0], [2.0**16, -(2.0**17)])
    optimizers = [torch.optim.SGD([each], lr=1.0) for each in (first, second)]
    mixed.backward((first * 0).sum())  # makes the scale; leaves the infinity
    mixed.unscale(optimizers[0])
    mixed.step(optimizers[0])
    assert first.tolist() == [0.0, 0.0]
    mixed.update_between([first, second])  # backs off to half the scale
    mixed.unscale(optimizers[1])
    assert gradients([second]) == [[1.0, -2.0]]


def test_gradients_are_freed_in_all_groups() -> None:
    one, other, frozen = parameters([1.0, 2.0], [3.0, 4.0], None)
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other, frozen]}], lr=0.1)
    free_gradients(optimizer)
    assert gradients([one, other, frozen]) == [None, None, None]


class ZeroesByItself(torch.optim.SGD):
    zeroed = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.zeroed += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("knobs", [{}, {"accumulate_grad_batches": 2}])
def test_an_optimizer_with_a_zero_grad_of_its_own_is_asked(knobs: dict[str, Any]) -> None:
    model = tiny_model()
    optimizer = ZeroesByItself(model.parameters(), lr=0.1)
    result = tiny_trainer(model=model, optimizer=optimizer, **knobs).train(tiny_loader(), epochs=1)
    assert optimizer.zeroed == 1 + result.steps  # before the first one too


def test_an_optimizer_whose_zero_grad_was_replaced_is_asked() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zeroed: list[int] = []
    optimizer.zero_grad = lambda set_to_none=True: zeroed.append(1)  # type: ignore[method-assign]
    result = tiny_trainer(model=model, optimizer=optimizer).train(tiny_loader(), epochs=1)
    assert len(zeroed) == 1 + result.steps


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_sparse_gradients_are_clipped_as_dense_ones(algorithm: str, limit: float) -> None:
    ids = torch.tensor([[0, 1, 1], [3, 0, 1]])  # rows that come several times: their sum is what counts
    norms, updated = [], []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        rows, dense = nn.Embedding(5, 2, sparse=is_sparse), nn.Linear(2, 1)
        dense(rows(ids)).pow(2).sum().backward()
        parameters = [*rows.parameters(), *dense.parameters(), nn.Parameter(torch.zeros(1))]
        norms.append(clip(parameters, limit, algorithm))
        updated.append([each.grad.to_dense() for each in parameters if each.grad is not None])
    for one, other in zip(*updated, strict=True):
        assert torch.allclose(one, other)
    if algorithm == "norm":
        assert norms[0] is not None and norms[1] is not None and torch.allclose(norms[0], norms[1])
    else:
        assert norms == [None, None]


def test_what_torch_cannot_clip_for_another_reason_is_its_error() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 1.0)
    with pytest.raises((TypeError, ValueError)):
        clip([parameter], "much", "norm")  # type: ignore[arg-type]  # the mistake


def test_a_run_clips_sparse_gradients() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(5, 3, sparse=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.rows(ids).mean(dim=1)  # type: ignore[no-any-return]  # a module's call is untyped

    model = Model()
    trainer = tiny_trainer(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), gradient_clip_val=1e-3
    )
    before = model.rows.weight.detach().clone()
    result = trainer.train([(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1]))], epochs=1)
    assert result.status == "completed"
    assert 0 < float((model.rows.weight.detach() - before).norm()) <= 1.01e-4
