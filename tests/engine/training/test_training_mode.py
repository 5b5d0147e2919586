"""engine/training/training_mode.py: modules keep their own flags, and a `train()` of their own is called as by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offloop.engine import Trainer
from offloop.engine.testing import tiny_batches, tiny_trainer
from offloop.engine.training.training_mode import enter_training, eval_mode

BATCHES = tiny_batches(4)


class Block(nn.Module):
    """A part with a batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, inputs: Tensor) -> Tensor:
        normalized: Tensor = self.norm(self.inner(inputs))
        return normalized


class KeepsNormFrozen(Block):
    """Freezes its statistics the way that examples of detection do."""

    def train(self, mode: bool = True) -> "KeepsNormFrozen":
        super().train(mode)
        self.norm.eval()
        return self


class Merging(Block):
    """Merges its weights for eval mode, as low-rank adapters do, and says in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bool] = []
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        self.calls.append(mode)
        self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.merged is not self.training
        return super().forward(inputs)


def model_of(block: nn.Module, other: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(block, other or nn.ReLU(), nn.Linear(8, 3))


def by_hand(model: nn.Module, epochs: int, *, validates: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        model.train()
        for inputs, targets in BATCHES:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if validates:
            model.eval()
            with torch.no_grad():
                model(BATCHES[0][0])


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("kind", [Block, KeepsNormFrozen, Merging])
def test_a_model_is_trained_as_in_a_loop_that_calls_train(kind: type[Block], validates: bool) -> None:
    expected, model = model_of(kind()), model_of(kind())
    by_hand(expected, 3, validates=validates)
    trainer = tiny_trainer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    trainer.train(BATCHES, BATCHES[:1] if validates else None, epochs=3)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_validation_in_an_epoch_ends_with_the_modules_own_train() -> None:
    block = Merging()
    model = model_of(block)
    trainer = tiny_trainer(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), val_every_n_steps=2
    )
    trainer.train(BATCHES, BATCHES[:1], epochs=1)
    assert block.calls == [True, False, True, False, True]
    assert not block.merged


@pytest.mark.parametrize("frozen", [Block, Merging])
def test_a_part_in_eval_mode_stays_there_beside_one_with_a_train_of_its_own(frozen: type[Block]) -> None:
    part = frozen()
    model = model_of(Merging(), part)
    model.train()
    part.eval()
    trainer = tiny_trainer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    trainer.train(BATCHES, BATCHES[:1], epochs=2)
    assert int(part.norm.num_batches_tracked) == 0  # type: ignore[arg-type]  # a tensor
    assert not any(module.training for module in part.modules())
    assert getattr(part, "merged", True)
    assert model.training and model[0].training


def test_without_a_train_of_its_own_nothing_is_called_and_each_flag_comes_back() -> None:
    model = model_of(Block())
    model[0].norm.eval()  # type: ignore[union-attr]  # a Block
    before = [module.training for module in model.modules()]
    enter_training(model)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_a_train_that_was_replaced_on_the_instance_is_respected() -> None:
    """`encoder.train = disabled`, as multimodal models freeze an encoder for good."""
    encoder = Block()
    encoder.eval()

    def disabled(mode: bool = True) -> Any:
        return encoder

    encoder.train = disabled  # type: ignore[method-assign]
    model = model_of(encoder)
    model.train()
    trainer = tiny_trainer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    trainer.train(BATCHES, BATCHES[:1], epochs=2)
    assert int(encoder.norm.num_batches_tracked) == 0  # type: ignore[arg-type]  # a tensor


def test_prediction_and_evaluation_leave_through_the_modules_own_train() -> None:
    block = Merging()
    model = model_of(block)
    trainer = Trainer(model, torch.optim.SGD(model.parameters()), loss=nn.functional.cross_entropy)
    trainer.predict(BATCHES)
    trainer.evaluate(BATCHES)
    assert block.calls == [False, True, False, True]
