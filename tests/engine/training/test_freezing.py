"""engine/training/freezing.py: what is frozen stays bit for bit, the rest trains as it would, and all is given back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, ConfigError, EpochStart, Run, TrainStart, decides
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer
from offloop.engine.training.freezing import select_parameters

BATCHES = tiny_batches(6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))

    @property
    def last(self) -> nn.Linear:
        module = self.head[1]
        assert isinstance(module, nn.Linear)
        return module

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Return the top-level parts in which something has changed."""
    after = model.state_dict()
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("pattern", ["backbone", "backbone.*", "back*", ["backbone.0", "backbone.[13].*"]])
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_frozen_parameters_and_their_statistics_stay_bit_for_bit(make_optimizer: Any, pattern: Any) -> None:
    model = Net()
    optimizer = make_optimizer(model)
    tiny_trainer(model=model, optimizer=optimizer).train(BATCHES, epochs=1)  # momentum has gathered by now
    before = state_of(model)
    momentum = {id(each): copy.deepcopy(optimizer.state[each]) for each in model.backbone.parameters()}
    trainer = tiny_trainer(model=model, optimizer=optimizer, freeze=pattern, gradient_clip_val=1.0)
    trainer.train(BATCHES, BATCHES[:1], epochs=2)
    assert changed(before, model) == {"head"}
    for parameter in model.backbone.parameters():
        for name, value in momentum[id(parameter)].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[parameter][name])), (
                name
            )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    tiny_trainer(model=model, optimizer=optimizer).train(BATCHES, epochs=1)
    assert changed(before, model) == {"backbone", "head"}


def test_a_run_with_frozen_parts_equals_the_loop_written_by_hand() -> None:
    model, expected = Net(), Net()
    recorder = Recorder()
    trainer = tiny_trainer(model=model, optimizer=adamw(model), freeze="backbone", callbacks=[recorder])
    trainer.train(BATCHES, epochs=2)

    expected.backbone.requires_grad_(False)
    expected.backbone[1].eval()  # the batch normalization in it
    optimizer = torch.optim.AdamW(expected.head.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(2):
        for inputs, targets in BATCHES:
            cross_entropy(expected(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    (start,) = recorder.of(TrainStart)
    assert start.parameters == sum(parameter.numel() for parameter in model.head.parameters())


def test_what_the_user_froze_stays_the_users() -> None:
    model = Net()
    model.last.bias.requires_grad_(False)
    before = state_of(model)
    tiny_trainer(model=model, optimizer=adamw(model), freeze=["backbone", "head.1.bias"]).train(
        BATCHES, epochs=1
    )
    assert not model.last.bias.requires_grad
    assert torch.equal(model.last.bias, before["head.1.bias"])
    assert model.last.weight.requires_grad


def test_everything_is_given_back_when_the_run_fails() -> None:
    class Fails(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = Net()
    model.head[0] = Fails()
    with pytest.raises(ZeroDivisionError):
        tiny_trainer(model=model, optimizer=adamw(model), freeze="backbone").train(BATCHES, epochs=1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


class UnfreezeAt(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == self.epoch:
            run.trainer.unfreeze("backbone.3")
            run.trainer.freeze("head.0")


def test_parts_can_be_frozen_and_unfrozen_in_mid_run_and_a_resumed_run_knows(tmp_path: Path) -> None:
    def a_run(name: str, epochs: int, **more: Any) -> nn.Module:
        model = Net()
        trainer = tiny_trainer(
            model=model, optimizer=adamw(model), freeze="backbone", run_dir=str(tmp_path), run_name=name
        )
        trainer.train(BATCHES, epochs=epochs, callbacks=[ModelCheckpoint(), UnfreezeAt(1)], **more)
        return model

    model, before = a_run("whole", 3), state_of(Net())
    after = model.state_dict()
    assert torch.equal(after["backbone.0.weight"], before["backbone.0.weight"])
    assert not torch.equal(after["backbone.3.weight"], before["backbone.3.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())

    a_run("parts", 2)
    resumed = a_run("parts", 3, resume="must")
    for name, value in after.items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("backbon", r"freeze: 'backbon' matches no parameter; did you mean 'backbone'"),
        ("backbone.7.*", r"matches no parameter; did you mean 'backbone"),
        ("zzz", r"matches no parameter; at the top there are 'backbone', 'head'"),
        (["head", "nothing"], r"'nothing' matches no parameter"),
        ("*", r"freeze='\*' leaves no parameter to train"),
        (["backbone", "head"], r"leaves no parameter to train"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_at_once(pattern: Any, text: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=text):
        tiny_trainer(model=model, optimizer=adamw(model), freeze=pattern)


def test_unfreezing_what_is_not_there_is_an_error() -> None:
    class Wrong(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            run.trainer.unfreeze("backbond")

    model = Net()
    with pytest.raises(
        ConfigError, match=r"unfreeze: 'backbond' matches no parameter; did you mean 'backbone'"
    ):
        tiny_trainer(model=model, optimizer=adamw(model), callbacks=[Wrong()]).train(BATCHES, epochs=1)
    with pytest.raises(RuntimeError, match="freeze works during a run"):
        tiny_trainer(model=model, optimizer=adamw(model)).freeze("backbone")


class Tied(nn.Module):
    """Its head has the weight of its embedding, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(ids)))  # type: ignore[no-any-return]  # a module's call is untyped


@pytest.mark.parametrize("pattern", ["head", "head.*", "head.weight", "embedding"])
def test_a_tied_parameter_is_frozen_by_each_of_its_names(pattern: str) -> None:
    model, ids = Tied(), torch.arange(8)
    before = model.head.weight.detach().clone()
    assert select_parameters(model, pattern) == ["embedding.weight"]
    tiny_trainer(model=model, optimizer=adamw(model), freeze=pattern).train([(ids, ids)], epochs=1)
    assert torch.equal(before, model.head.weight)
    assert model.head.weight.requires_grad
