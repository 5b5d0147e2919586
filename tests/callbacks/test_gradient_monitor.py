"""GradientMonitor: its numbers are those of plain torch, on sampled steps only, and the run stays the same."""

import math
from typing import Any

import pytest
import torch

from offloop.callbacks.gradient_monitor import (
    CHUNK,
    GradientMonitor,
    GradientStatistics,
    chunks,
    count_special,
    norms_of,
)
from offloop.engine import Callback, ConfigError, StepPoint, Trainer, decode, encode, in_step
from offloop.engine.testing import Recorder, reproducible, tiny_loader, tiny_model, tiny_trainer


class Witness(Callback):
    """Keeps gradients and weights of every step, as a test would look at them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        named = list(point.model.named_parameters())
        self.gradients.append({name: each.grad.clone() for name, each in named if each.grad is not None})
        self.weights.append({name: each.detach().clone() for name, each in named})

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.after = {name: each.detach().clone() for name, each in point.model.named_parameters()}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def measured(recorder: Recorder) -> list[GradientStatistics]:
    return recorder.of(GradientStatistics)


@pytest.mark.parametrize("knobs", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.01}])
def test_numbers_are_those_of_plain_torch(knobs: dict[str, Any]) -> None:
    recorder, witness = Recorder(), Witness()
    monitor = GradientMonitor(every_n_steps=1)
    tiny_trainer(**knobs).train(tiny_loader(9), epochs=1, callbacks=[recorder, witness, monitor])
    events = measured(recorder)
    assert len(events) == len(witness.gradients)
    weights = [*witness.weights, witness.after]
    for event, gradients, before, after in zip(
        events, witness.gradients, weights[:-1], weights[1:], strict=True
    ):
        assert event.norm == pytest.approx(flat(gradients).norm().item(), rel=1e-5)
        assert list(event.norms) == ["0.weight", "0.bias", "3.weight", "3.bias"]
        for name, gradient in gradients.items():
            assert event.norms[name] == pytest.approx(gradient.norm().item(), rel=1e-5)
            ratio = (after[name] - before[name]).norm() / before[name].norm()
            assert event.update_ratios[name] == pytest.approx(ratio.item(), rel=1e-4)
        assert event.zero_share == pytest.approx((flat(gradients) == 0).double().mean().item())
        ratio = (flat(after) - flat(before)).norm() / flat(before).norm()
        assert event.update_ratio == pytest.approx(ratio.item(), rel=1e-4)
        assert event.infinite_share == event.nan_share == 0.0


def test_only_every_nth_step_is_measured_and_before_its_step_end() -> None:
    recorder = Recorder()
    tiny_trainer().train(tiny_loader(8), epochs=1, callbacks=[recorder, GradientMonitor(every_n_steps=3)])
    assert [event.step for event in measured(recorder)] == [3, 6]
    names = recorder.names()
    for event in measured(recorder):
        following = recorder.events[recorder.events.index(event) + 1]
        assert (type(following).__name__, following.step) == ("StepEnd", event.step)
    assert names.count("StepEnd") == 8


def test_two_monitors_have_cadences_of_their_own() -> None:
    recorder = Recorder()
    often = GradientMonitor(every_n_steps=2, per_layer=False)
    seldom = GradientMonitor(every_n_steps=5)
    tiny_trainer().train(tiny_loader(8), epochs=1, callbacks=[recorder, often, seldom])
    assert [(event.step, bool(event.norms)) for event in measured(recorder)] == [
        (2, False),
        (4, False),
        (5, True),
        (6, False),
        (8, False),
    ]


def test_run_is_the_same_bit_for_bit_with_and_without() -> None:
    def weights(*callbacks: Callback) -> tuple[list[Any], torch.Tensor]:
        recorder = Recorder()
        trainer = tiny_trainer(gradient_clip_val=0.1)
        trainer.train(tiny_loader(8), epochs=2, callbacks=[recorder, *callbacks])
        events = [each for each in reproducible(recorder.events) if each[0] != "GradientStatistics"]
        return events, flat(trainer.model.state_dict())

    events, plain = weights()
    events_monitored, monitored = weights(GradientMonitor(every_n_steps=2))
    assert events == events_monitored
    assert torch.equal(plain, monitored)


def test_parts_can_be_left_out() -> None:
    recorder = Recorder()
    monitor = GradientMonitor(every_n_steps=4, per_layer=False, update_ratio=False)
    tiny_trainer().train(tiny_loader(4), epochs=1, callbacks=[recorder, monitor])
    (event,) = measured(recorder)
    assert event.norm > 0
    assert (event.norms, event.update_ratios, event.update_ratio) == ({}, {}, None)


def test_infinite_and_nan_gradients_are_counted() -> None:
    class Poison(Callback):
        @in_step
        def before_optimizer_step(self, point: StepPoint) -> None:
            gradient = point.model.get_parameter("3.bias").grad
            assert gradient is not None
            gradient[:] = torch.tensor([math.inf, math.nan, 0.0])

    recorder = Recorder()
    trainer = tiny_trainer(on_nonfinite="warn")
    trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder, Poison(), GradientMonitor(every_n_steps=1)])
    (event,) = measured(recorder)
    elements = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert event.infinite_share == event.nan_share == pytest.approx(1 / elements)
    assert event.zero_share >= 1 / elements * 0.999
    assert math.isnan(event.norm) and math.isnan(event.norms["3.bias"])
    assert math.isfinite(event.norms["0.weight"])


def test_frozen_parameters_are_left_out_and_still_weights_have_no_ratio() -> None:
    model = tiny_model()
    model.get_parameter("0.weight").requires_grad = False
    with torch.no_grad():
        model.get_parameter("3.bias").zero_()
    recorder = Recorder()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    trainer = tiny_trainer(model=model, optimizer=optimizer)
    trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder, GradientMonitor(every_n_steps=1)])
    (event,) = measured(recorder)
    assert list(event.norms) == ["0.bias", "3.weight", "3.bias"]
    assert event.update_ratios["3.bias"] == 0.0  # not NaN: nothing moved, not even from zero
    assert event.update_ratio == 0.0


def test_several_optimizers_in_a_step_are_one_event() -> None:
    class Alternating(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> torch.Tensor:
            inputs, targets = batch
            for name in ("first", "second"):
                loss = torch.nn.functional.cross_entropy(self.model(inputs), targets)
                self.backward(loss)
                self.optimizer_step(name)
            return loss

    model = tiny_model()
    optimizers = {
        "first": torch.optim.SGD(model.get_submodule("0").parameters(), lr=0.1),
        "second": torch.optim.SGD(model.get_submodule("3").parameters(), lr=0.1),
    }
    recorder = Recorder()
    trainer = Alternating(model, optimizers, device="cpu")
    trainer.train(tiny_loader(2), epochs=1, callbacks=[recorder, GradientMonitor(every_n_steps=1)])
    assert [event.step for event in measured(recorder)] == [1, 2]
    assert set(measured(recorder)[0].norms) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_event_goes_over_a_wire() -> None:
    recorder = Recorder()
    tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[recorder, GradientMonitor(every_n_steps=1)])
    (event,) = measured(recorder)
    assert decode(encode(event)) == event
    assert type(event).__struct_config__.tag == "GradientStatistics"


def test_embedding_with_sparse_gradients_is_measured() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.ones(2, 2), (5, 2), check_invariants=True
    )
    table.weight.grad = gradient

    class Fixed(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> torch.Tensor:
            self.model.get_parameter("weight").grad = gradient
            self.optimizer_step("optimizer")
            return torch.zeros(())

    recorder = Recorder()
    trainer = Fixed(table, torch.optim.SGD(table.parameters(), lr=0.1), device="cpu")
    trainer.train(tiny_loader(1), epochs=1, callbacks=[recorder, GradientMonitor(every_n_steps=1)])
    assert measured(recorder)[0].norm == pytest.approx(math.sqrt(8))  # two entries at one place add up


def test_norm_of_half_precision_does_not_overflow() -> None:
    (norm,) = norms_of([torch.full((4,), 6e4, dtype=torch.float16)])
    assert norm.item() == pytest.approx(1.2e5, rel=1e-3)  # beyond what float16 can hold


def test_chunks_gather_small_tensors_and_leave_large_ones_uncopied() -> None:
    large = torch.zeros(CHUNK)
    found = list(chunks([torch.ones(2), large, torch.ones(3), torch.ones(1, dtype=torch.float64)]))
    assert [chunk.numel() for chunk in found] == [CHUNK, 5, 1]
    assert found[0].data_ptr() == large.data_ptr()
    half = torch.ones(CHUNK // 2 + 1)
    assert [chunk.numel() for chunk in chunks([half, half])] == [CHUNK // 2 + 1] * 2
    assert count_special([large, torch.tensor([math.inf, math.nan])]).tolist() == [CHUNK, 1, 1]


@pytest.mark.parametrize("cadence", [0, -1, 1.5, True])
def test_cadence_is_checked(cadence: Any) -> None:
    with pytest.raises(ConfigError, match="every_n_steps"):
        GradientMonitor(every_n_steps=cadence)


def test_steps_between_call_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monitor = GradientMonitor(every_n_steps=4)
    measure = monitor._measure

    def counted(step: int, found: Any) -> Any:
        calls.append(step)
        return measure(step, found)

    monkeypatch.setattr(monitor, "_measure", counted)
    tiny_trainer().train(tiny_loader(10), epochs=1, callbacks=[monitor])
    assert calls == [3, 7]


@pytest.mark.gpu
def test_device_is_never_waited_for() -> None:
    recorder = Recorder()

    class Strict(Callback):
        @in_step
        def before_batch(self, point: StepPoint) -> None:
            torch.cuda.set_sync_debug_mode("error" if 2 <= point.step < 7 else "default")

    try:
        trainer = tiny_trainer(device="cuda")
        trainer.train(
            tiny_loader(8), epochs=1, callbacks=[recorder, Strict(), GradientMonitor(every_n_steps=2)]
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [event.step for event in measured(recorder)] == [2, 4, 6, 8]
    assert not [event for event in recorder.events if type(event).__name__ == "CallbackFailed"]
