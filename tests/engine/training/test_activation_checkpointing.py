"""engine/training/activation_checkpointing.py: less is kept, and nothing else changes, not a bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from offloop.engine import Callback, ConfigError, StepPoint, Trainer, in_step
from offloop.engine.testing import Recorder, reproducible, tiny_batches, tiny_trainer
from offloop.engine.training.activation_checkpointing import checkpointed, select_modules

BATCHES = tiny_batches(5)


class Block(nn.Module):
    """Everything that a second pass could get wrong: dropout, running statistics, a buffer that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(
            nn.Linear(8, 8)
        )  # moves on in each forward pass
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: Tensor, scale: float = 1.0) -> Tensor:
        if self.training:
            self.count = self.count + 1  # a new tensor, not in place
        hidden: Tensor = self.dropout(torch.tanh(self.norm(self.linear(inputs))))
        return inputs + scale * hidden / self.count.clamp(min=1.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs, scale=0.5)
        logits: Tensor = self.head(inputs)
        return logits


def a_run(**knobs: Any) -> tuple[list[Any], dict[str, Tensor], Net]:
    model = Net()
    recorder = Recorder()
    trainer = tiny_trainer(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), callbacks=[recorder], **knobs
    )
    torch.manual_seed(4)
    trainer.train(BATCHES, BATCHES[:1], epochs=2)
    events = reproducible(recorder.events)
    for _, fields in events:
        fields.pop("config", None)
    return events, model.state_dict(), model


@pytest.mark.parametrize(
    "parts", ["auto", "blocks.*", ["blocks.0", "blocks.2"], Block, ["blocks.1.norm", nn.Dropout]]
)
@pytest.mark.parametrize("knobs", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_run_has_the_same_bits_with_and_without(parts: Any, knobs: dict[str, Any]) -> None:
    events, weights, _ = a_run(**knobs)
    again, weights_again, model = a_run(activation_checkpointing=parts, **knobs)
    # The first event tells the knobs, which differ.
    assert again[1:] == events[1:]
    for name, value in weights.items():
        assert torch.equal(value, weights_again[name]), name
    assert {type(block) for block in model.blocks} == {Block}, "classes are given back"


def test_activations_are_not_kept() -> None:
    def kept(**knobs: Any) -> int:
        """Return how many bytes autograd holds when a forward pass is over."""
        seen: list[int] = []

        class Counts(Trainer):
            def training_step(self, batch: Any) -> Any:
                tensors: list[Tensor] = []

                def keep(tensor: Tensor) -> Tensor:
                    tensors.append(tensor)
                    return tensor

                with saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = super().training_step(batch)
                parameters = {each.data_ptr() for each in self.model.parameters()}
                seen.append(sum(each.nbytes for each in tensors if each.data_ptr() not in parameters))
                return output

        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tiny_trainer(Counts, model=model, optimizer=optimizer, **knobs).train(
            tiny_batches(1, batch_size=256), epochs=1
        )
        return seen[0]

    assert kept(activation_checkpointing="auto") < kept() / 2


def test_a_graph_that_is_kept_goes_back_twice() -> None:
    model = Net()
    twin = copy.deepcopy(model)
    gradients = []
    for each, parts in ((model, None), (twin, "auto")):
        torch.manual_seed(0)
        with checkpointed(each, parts):
            loss = each(BATCHES[0][0]).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_a_copy_made_in_mid_run_is_a_model_of_its_own() -> None:
    class Copies(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            twin = copy.deepcopy(point.model)
            with torch.enable_grad():
                for parameter in twin.parameters():
                    parameter.requires_grad_()
                twin(BATCHES[0][0]).sum().backward()
            assert isinstance(twin, Net)
            assert all(parameter.grad is not None for parameter in twin.parameters())
            assert all(parameter.grad is not None for parameter in point.model.parameters())
            assert list(twin.state_dict()) == list(point.model.state_dict())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tiny_trainer(
        model=model, optimizer=optimizer, activation_checkpointing="auto", callbacks=[Copies()]
    )
    assert trainer.train(BATCHES, epochs=1).status == "completed"


def test_auto_means_repeated_blocks_with_parts_of_their_own() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert select_modules(nn.TransformerEncoder(layer, 2), "auto") == ["layers.0", "layers.1"]
    assert select_modules(Net(), "auto") == ["blocks.0", "blocks.1", "blocks.2"]
    nested = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()), nn.Linear(8, 3))
    assert select_modules(nested, "auto") == ["0", "1"]
    with pytest.raises(ConfigError, match="this model has none: name its parts"):
        select_modules(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), "auto")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ("block", r"'block' matches no module; did you mean 'blocks'"),
        ("xyz.*", r"'xyz\.\*' matches no module; at the top there are 'blocks', 'head'"),
        (nn.Conv2d, r"the model has no Conv2d; it has BatchNorm1d, Block, Dropout"),
        (["auto"], r"'auto' matches no module"),
    ],
)
def test_parts_that_are_not_there_are_refused_at_once(parts: Any, text: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=f"activation_checkpointing: {text}"):
        tiny_trainer(
            model=model, optimizer=torch.optim.SGD(model.parameters()), activation_checkpointing=parts
        )


def test_a_module_whose_forward_was_replaced_is_refused() -> None:
    model = Net()
    model.blocks[0].forward = lambda inputs, scale: inputs  # as some tools do
    with pytest.raises(ConfigError, match=r"forward\(\) of 'blocks\.0' was replaced on the instance"):
        select_modules(model, "auto")


def test_a_shared_module_is_meant_by_each_of_its_names() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 4)
            self.decoder = self.encoder

    for name in ("encoder", "decoder", "*coder"):
        assert select_modules(Shares(), name) == ["encoder"]
