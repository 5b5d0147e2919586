"""engine/training/learning_rate.py: rates set by hand, and schedules that go on from there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from offloop.callbacks import LearningRateScheduler
from offloop.engine import StepEnd, Trainer
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer
from offloop.engine.training.learning_rate import largest_lr, rates_by_group, scale_lr

STEPS = 20
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: StepLR(o, step_size=4, gamma=0.5),
    "multistep": lambda o: MultiStepLR(o, milestones=[3, 12], gamma=0.1),
    "linear": lambda o: LinearLR(o, start_factor=0.1, total_iters=15),
    "exponential": lambda o: ExponentialLR(o, gamma=0.9),
    "polynomial": lambda o: PolynomialLR(o, total_iters=15, power=2.0),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=STEPS),
    "cosine to a floor": lambda o: CosineAnnealingLR(o, T_max=STEPS, eta_min=0.01),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=5, eta_min=0.01),
    "cyclic": lambda o: CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=STEPS + 1, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, start_factor=0.1, total_iters=4), CosineAnnealingLR(o, T_max=16)], milestones=[4]
    ),
    "chained": lambda o: ChainedScheduler([ExponentialLR(o, gamma=0.9), StepLR(o, step_size=6)]),
}


def two_groups(*lrs: float) -> Optimizer:
    return SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def rates(make: Callable[[Optimizer], LRScheduler], factor: float | None, group: int | None) -> Any:
    """Return the rates of both groups at each step; in the middle they are multiplied by `factor`."""
    optimizer = two_groups(0.1, 0.05)
    scheduler = make(optimizer)
    seen = []
    for step in range(STEPS):
        if step == STEPS // 2 and factor is not None:
            current = largest_lr(optimizer) if group is None else optimizer.param_groups[group]["lr"]
            scale_lr(optimizer, current * factor, group=group, schedulers=[scheduler])
        optimizer.step()
        scheduler.step()
        seen.append([each["lr"] for each in optimizer.param_groups])
    return torch.tensor(seen, dtype=torch.float64)  # (STEPS, 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_multiplied(name: str) -> None:
    plain, scaled = (rates(SCHEDULES[name], factor, None) for factor in (None, 0.25))
    half = STEPS // 2
    torch.testing.assert_close(scaled[:half], plain[:half])
    torch.testing.assert_close(scaled[half:], plain[half:] * 0.25)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if "floor" not in name and "warm" not in name])
def test_one_group_goes_on_multiplied_and_the_other_as_it_was(name: str) -> None:
    plain, scaled = (rates(SCHEDULES[name], factor, 1) for factor in (None, 3.0))
    half = STEPS // 2
    torch.testing.assert_close(scaled[:, 0], plain[:, 0])
    torch.testing.assert_close(scaled[half:, 1], plain[half:, 1] * 3.0)


def test_the_largest_group_is_set_and_the_others_are_scaled_alike() -> None:
    optimizer = two_groups(0.1, 0.4, 0.2)
    assert largest_lr(optimizer) == 0.4
    scale_lr(optimizer, 0.2, group=None)
    torch.testing.assert_close([each["lr"] for each in optimizer.param_groups], [0.05, 0.2, 0.1])


def test_a_rate_of_zero_is_replaced() -> None:
    optimizer = two_groups(0.0, 0.0)
    scale_lr(optimizer, 0.3, group=None)
    assert [each["lr"] for each in optimizer.param_groups] == [0.3, 0.3]


def test_a_rate_in_a_tensor_is_set_in_place() -> None:
    """Capturable optimizers read their rate from that very tensor."""
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scale_lr(optimizer, 0.05, group=None)
    assert optimizer.param_groups[0]["lr"] is rate
    assert largest_lr(optimizer) == pytest.approx(0.05)


def test_the_schedule_of_another_optimizer_stays() -> None:
    optimizer, other = two_groups(0.1), two_groups(0.1)
    scheduler = LambdaLR(other, lambda step: 1.0)
    scale_lr(optimizer, 0.05, group=None, schedulers=[scheduler])
    other.step()
    scheduler.step()
    assert other.param_groups[0]["lr"] == 0.1


def parameters(count: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(1)) for _ in range(count)]


def test_rates_have_the_names_of_their_groups() -> None:
    first, second, third = parameters(3)
    groups: list[dict[str, Any]] = [
        {"params": [first], "lr": 0.1},
        {"params": [second], "lr": 0.2, "name": "head"},
    ]
    body = SGD(groups, lr=1.0)
    assert rates_by_group({"optimizer": body}) == {"0": 0.1, "head": 0.2}
    assert rates_by_group({"a": body, "b": SGD([third], lr=0.3)}) == {"a/0": 0.1, "a/head": 0.2, "b": 0.3}


def test_rates_that_are_all_the_same_are_said_once() -> None:
    first, second, third = parameters(3)
    groups: list[dict[str, Any]] = [{"params": [first], "weight_decay": 0.1}, {"params": [second]}]
    decayed = SGD(groups, lr=0.1)
    assert rates_by_group({"optimizer": decayed}) == {}
    assert rates_by_group({"a": decayed, "b": SGD([third], lr=0.1)}) == {}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_says_the_rate_of_each_group(accumulated: int) -> None:
    model = tiny_model()
    *body, head = model.parameters()
    groups: list[dict[str, Any]] = [{"params": body, "lr": 0.1}, {"params": [head], "name": "head"}]
    optimizer = SGD(groups, lr=0.2)
    trainer = tiny_trainer(model=model, optimizer=optimizer, accumulate_grad_batches=accumulated)
    trainer.train(tiny_batches(4), epochs=1, callbacks=[recorder := Recorder()])
    assert {(event.lr, event.lrs["0"], event.lrs["head"]) for event in recorder.of(StepEnd)} == {
        (0.2, 0.1, 0.2)
    }


def test_a_manual_step_says_the_rate_of_each_optimizer() -> None:
    class Two(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.backward(loss)
            self.optimizer_step("body")
            return loss

    model = tiny_model()
    *body, head = model.parameters()
    optimizer = {"body": SGD(body, lr=0.1), "head": SGD([head], lr=0.2)}
    trainer = tiny_trainer(Two, model=model, optimizer=optimizer)
    trainer.train(tiny_batches(2), epochs=1, callbacks=[recorder := Recorder()])
    assert [event.lrs for event in recorder.of(StepEnd)] == [{"body": 0.1, "head": 0.2}] * 2


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("is_attached", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_first_step_that_is_left_out_makes_torch_say_nothing(
    interval: Any, is_attached: bool, precision: str
) -> None:
    """torch warns that a schedule steps before its optimizer; warnings are errors here."""

    class Spoiled(Trainer):
        def training_step(self, batch: Any) -> Any:
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            return loss * float("nan") if self.step < 2 else loss

    model = tiny_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = StepLR(optimizer, 1, gamma=0.5)
    knobs: dict[str, Any] = {"scheduler": schedule, "scheduler_interval": interval}
    if is_attached:
        knobs = {"callbacks": [LearningRateScheduler(schedule, interval=interval)]}
    trainer = tiny_trainer(
        Spoiled, model=model, optimizer=optimizer, on_nonfinite="skip_step", precision=precision, **knobs
    )
    trainer.train(tiny_batches(2), epochs=2)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (4 if interval == "step" else 2)
