"""LayerStatistics: numbers as NumPy's, hooks only where they are due, and a run that stays the same."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from offloop.callbacks.layer_statistics import LayersMeasured, LayerStatistics, _histogram, _statistics
from offloop.engine import Callback, ConfigError, StepPoint, decode, encode, in_step
from offloop.engine.testing import Recorder, reproducible, tiny_loader, tiny_model, tiny_trainer


def measured(recorder: Recorder, kind: str) -> list[LayersMeasured]:
    return [event for event in recorder.of(LayersMeasured) if event.kind == kind]


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class Witness(Callback):
    """Keeps the first step's tensors, and how many forward hooks there were at each point."""

    def __init__(self) -> None:
        self.hooks: list[tuple[int, str, int]] = []

    def _count(self, point: StepPoint) -> None:
        self.hooks.append((point.step, point.name, hooks_on(point.model)))

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        self._count(point)
        inputs, _ = point.batch
        self.hidden = torch.nn.Sequential(*list(point.model.children())[:2])(inputs)

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        self._count(point)

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        weight = point.model.get_parameter("3.weight")
        assert weight.grad is not None
        self.weight, self.gradient = weight.detach().clone(), weight.grad.clone()


def assert_describes(event: LayersMeasured, name: str, tensor: torch.Tensor) -> None:
    numbers = tensor.numpy().astype(np.float64)
    assert event.mean[name] == pytest.approx(numbers.mean(), abs=1e-6)
    assert event.std[name] == pytest.approx(numbers.std(), rel=1e-5)
    assert event.norm[name] == pytest.approx(np.linalg.norm(numbers), rel=1e-5)
    assert (event.minimum[name], event.maximum[name]) == (numbers.min(), numbers.max())
    assert list(event.histogram[name]) == np.histogram(numbers, bins=len(event.histogram[name]))[0].tolist()


def test_numbers_are_numpys() -> None:
    recorder, witness = Recorder(), Witness()
    statistics = LayerStatistics(every_n_steps=1, bins=8)
    tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[recorder, statistics, witness])
    (weights,), (gradients,) = measured(recorder, "weights"), measured(recorder, "gradients")
    (activations,) = measured(recorder, "activations")
    assert list(weights.mean) == list(gradients.mean) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert list(activations.mean) == ["0", "1", "2", "3"]
    assert_describes(weights, "3.weight", witness.weight)
    assert_describes(gradients, "3.weight", witness.gradient)
    assert_describes(activations, "1", witness.hidden)
    assert activations.dead == {"1": (witness.hidden == 0).all(dim=0).float().mean().item()}
    assert weights.dead == gradients.dead == {}


def test_kinds_steps_and_place_in_the_order() -> None:
    recorder = Recorder()
    statistics = LayerStatistics(every_n_steps=3, weights=False, bins=0)
    tiny_trainer().train(tiny_loader(7), epochs=1, callbacks=[recorder, statistics])
    events = recorder.of(LayersMeasured)
    assert [(event.kind, event.step) for event in events] == [
        ("activations", 3),
        ("gradients", 3),
        ("activations", 6),
        ("gradients", 6),
    ]
    assert all(event.histogram == {} for event in events)
    following = recorder.events[recorder.events.index(events[1]) + 1]
    assert (type(following).__name__, following.step) == ("StepEnd", 3)


def test_forward_hooks_are_there_for_the_first_batch_of_a_sampled_step_only() -> None:
    witness = Witness()
    trainer = tiny_trainer(accumulate_grad_batches=2)
    statistics = LayerStatistics(every_n_steps=2)
    trainer.train(tiny_loader(8), epochs=1, callbacks=[statistics, witness])
    assert [count for step, name, count in witness.hooks if (step, name) == (1, "before_forward")] == [4, 0]
    assert sum(count for step, name, count in witness.hooks if name == "after_backward") == 0
    assert sum(count for step, _, count in witness.hooks if step in (0, 2)) == 0
    assert sum(count for step, _, count in witness.hooks if step == 3) == 4
    assert hooks_on(trainer.model) == 0


def test_forward_hooks_go_when_the_forward_fails() -> None:
    class Broken(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    model = torch.nn.Sequential(tiny_model(), Broken())
    trainer = tiny_trainer(model=model)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train(tiny_loader(2), epochs=1, callbacks=[LayerStatistics(every_n_steps=1)])
    assert hooks_on(model) == 0


def test_run_is_the_same_bit_for_bit_with_and_without() -> None:
    def outcome(*callbacks: Callback) -> tuple[list[Any], list[torch.Tensor]]:
        recorder = Recorder()
        trainer = tiny_trainer(model=tiny_model(dropout=0.3), seed=1)
        trainer.train(tiny_loader(8), tiny_loader(2), epochs=2, callbacks=[recorder, *callbacks])
        events = [each for each in reproducible(recorder.events) if each[0] != "LayersMeasured"]
        return events, list(trainer.model.state_dict().values())

    events, weights = outcome()
    events_measured, weights_measured = outcome(LayerStatistics(every_n_steps=2))
    assert events == events_measured
    assert all(map(torch.equal, weights, weights_measured))


def test_dead_units_are_found_by_feature_and_by_channel() -> None:
    features = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])  # (B, T, 2)
    assert _statistics(features, 0, can_die=True)["dead"].item() == 0.5
    image = torch.zeros(2, 4, 3, 3)  # (B, C, H, W)
    image[1, 2, 0, 0] = 1.0
    assert _statistics(image, 0, can_die=True)["dead"].item() == 0.75


def test_inplace_activation_does_not_change_what_is_told_of_the_layer_before() -> None:
    layer = torch.nn.Linear(8, 3)
    with torch.no_grad():
        layer.bias.fill_(-100.0)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 3))
    recorder = Recorder()
    trainer = tiny_trainer(model=model)
    trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder, LayerStatistics(every_n_steps=1)])
    (activations,) = measured(recorder, "activations")
    assert activations.maximum["0"] < -50.0
    assert activations.dead == {"1": 1.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.24, 0.26, 0.5, 1.0], [2, 1, 1, 1]),
        ([3.0, 3.0, 3.0], [3, 0, 0, 0]),
        ([-1e-30, 1e-30], [1, 0, 0, 1]),
        ([1.0, math.nan], [0, 0, 0, 0]),
        ([1.0, 2.0, math.inf], [0, 0, 0, 0]),
        ([1.0, -math.inf], [0, 0, 0, 0]),
        ([math.inf, math.inf], [0, 0, 0, 0]),
    ],
)
def test_histograms_of_odd_tensors(values: list[float], expected: list[int]) -> None:
    tensor = torch.tensor(values)
    assert _histogram(tensor, *torch.aminmax(tensor), 4).tolist() == expected


def test_no_element_is_lost_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-20, 1e-3, 1.0, 7e5):
        tensor = torch.randn(5000, generator=generator) * scale
        assert _histogram(tensor, *torch.aminmax(tensor), 32).sum().item() == 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_measured(dtype: torch.dtype) -> None:
    layer = _statistics(torch.tensor([0.0, 1.0, 3.0], dtype=dtype), 3, can_die=False)
    assert layer["histogram"].tolist() == [1, 1, 1]
    assert layer["mean"].item() == pytest.approx(4 / 3, rel=1e-6)


def test_compiled_model_has_no_activations() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(compile={"backend": "eager"})
    trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder, LayerStatistics(every_n_steps=1)])
    assert [event.kind for event in recorder.of(LayersMeasured)] == ["weights", "gradients"]


def test_event_goes_over_a_wire() -> None:
    recorder = Recorder()
    statistics = LayerStatistics(every_n_steps=1, bins=4)
    tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[recorder, statistics])
    for event in recorder.of(LayersMeasured):
        again = decode(encode(event))
        assert isinstance(again, LayersMeasured)
        assert (again.kind, again.mean, again.step) == (event.kind, event.mean, event.step)
        assert {name: list(bins) for name, bins in event.histogram.items()} == again.histogram


def test_nothing_is_measured_between(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    statistics = LayerStatistics(every_n_steps=4)
    add_hooks = statistics._add_hooks

    def counted(model: torch.nn.Module) -> None:
        steps.append(statistics._step)
        add_hooks(model)

    monkeypatch.setattr(statistics, "_add_hooks", counted)
    tiny_trainer().train(tiny_loader(10), epochs=1, callbacks=[statistics])
    assert steps == [3, 7]


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"bins": -1}, {"bins": True}, {"bins": 2.0}])
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LayerStatistics(**wrong)


@pytest.mark.gpu
def test_device_is_never_waited_for() -> None:
    class Strict(Callback):
        @in_step
        def before_batch(self, point: StepPoint) -> None:
            torch.cuda.set_sync_debug_mode("error" if 2 <= point.step < 7 else "default")

    recorder = Recorder()
    try:
        trainer = tiny_trainer(device="cuda")
        trainer.train(
            tiny_loader(8), epochs=1, callbacks=[recorder, Strict(), LayerStatistics(every_n_steps=2)]
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [event.step for event in measured(recorder, "weights")] == [2, 4, 6, 8]


@pytest.mark.gpu
def test_histogram_under_deterministic_algorithms_is_the_same() -> None:
    tensor = torch.randn(10_000, device="cuda")
    expected = _histogram(tensor, *torch.aminmax(tensor), 32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(_histogram(tensor, *torch.aminmax(tensor), 32), expected)
    finally:
        torch.use_deterministic_algorithms(False)
