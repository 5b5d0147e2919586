"""The usual epoch in one frame does what the loop does call by call: weights, events, random states, bit for bit."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from offloop.engine import Callback, StepPoint, Trainer, decides, in_step
from offloop.engine.testing import Recorder, reproducible, tiny_batches, tiny_loader, tiny_model, tiny_trainer
from offloop.engine.training import fast_epoch


class LookIn(Callback):
    """Looks into every second step, at each point, and says what it sees there."""

    def look(self, point: StepPoint) -> None:
        gradient = next(point.model.parameters()).grad
        seen = [
            point.step,
            -1 if point.loss is None else point.loss,
            -1 if gradient is None else gradient.sum(),
        ]
        for number, value in enumerate(seen):
            point.log(f"{point.name}_{number}", value)

    @in_step(every_n_steps=2)
    def before_batch(self, point: StepPoint) -> None:
        self.look(point)

    @in_step(every_n_steps=2)
    def before_forward(self, point: StepPoint) -> None:
        self.look(point)

    @in_step(every_n_steps=2)
    def before_backward(self, point: StepPoint) -> None:
        self.look(point)

    @in_step(every_n_steps=2)
    def after_backward(self, point: StepPoint) -> None:
        self.look(point)

    @in_step(every_n_steps=2)
    def before_optimizer_step(self, point: StepPoint) -> None:
        self.look(point)

    @in_step(every_n_steps=2)
    def after_step(self, point: StepPoint) -> None:
        self.look(point)


class Draws(Callback):
    """Looks into every step, and has its own say in it."""

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        for parameter in point.model.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.01 * torch.randn_like(parameter)

    @in_step(every_n_steps=3)
    def after_step(self, point: StepPoint) -> None:
        point.optimizer.param_groups[0]["lr"] *= 0.9
        if point.step == 6:
            point.run.set_lr_nowait(0.02)


class Logs(Trainer):
    def training_step(self, batch: Any) -> Any:
        output = super().training_step(batch)
        if self.step % 3 == 1:
            self.log("third", 1.5)
            self.log("size", batch[0].abs().sum())
        return output


class Weighs(Trainer):
    def training_step(self, batch: Any) -> Any:
        output = super().training_step(batch)
        assert isinstance(output, dict)
        return {**output, "weight": 1 + self.step % 4}


class Orders(Trainer):
    """Returns another kind of mapping."""

    def training_step(self, batch: Any) -> Any:
        return OrderedDict(super().training_step(batch))  # type: ignore[arg-type]  # a dict, in this test


class SometimesOutputs(Trainer):
    def training_step(self, batch: Any) -> Any:
        output = super().training_step(batch)
        assert isinstance(output, dict)
        return {"loss": output["loss"], "targets": output["targets"]} if self.step % 2 else output


class Loads(Callback):
    """Gives the optimizer a state with other rates, and with that other groups."""

    @in_step(every_n_steps=3)
    def after_step(self, point: StepPoint) -> None:
        state = point.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = 0.5 * group["lr"]
        point.optimizer.load_state_dict(state)


class Bare(Trainer):
    def training_step(self, batch: Any) -> Any:
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.model(inputs), targets)


class StopAt(Callback):
    @decides
    def on_validation_end(self, event: Any, run: Any) -> None:
        if event.step >= 9:
            run.stop_nowait("enough")


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)


CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "own step": {"trainer_class": Bare},
    "logs": {"trainer_class": Logs},
    "weights": {"trainer_class": Weighs},
    "clipped by norm": {"knobs": {"gradient_clip_val": 0.05}},
    "clipped by value": {"knobs": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "metrics": {"run": {"metrics": ["accuracy", "f1_score"]}},
    "metrics of another mapping": {"trainer_class": Orders, "run": {"metrics": ["accuracy"]}},
    "metrics of some batches": {"trainer_class": SometimesOutputs, "run": {"metrics": ["accuracy"]}},
    "validation by steps": {"knobs": {"val_every_n_steps": 3}},
    "stopped in between": {"knobs": {"val_every_n_steps": 3}, "callbacks": [StopAt]},
    "max_steps in mid-epoch": {"run": {"max_steps": 11, "epochs": 5}},
    "limited": {"knobs": {"limit_train_batches": 5, "limit_val_batches": 1}},
    "a share": {"knobs": {"limit_train_batches": 0.5}},
    "schedule by steps": {"schedule": "step"},
    "schedule by epochs": {"schedule": "epoch"},
    "nan": {"knobs": {"on_nonfinite": "warn"}, "lr": 1e30},
    "a list": {"loader": tiny_batches(7)},
    "hooks": {"callbacks": [LookIn, Draws], "knobs": {"gradient_clip_val": 0.05}},
    "hooks, logs and a schedule": {"callbacks": [LookIn], "schedule": "step", "trainer_class": Logs},
    "hooks and weights": {"callbacks": [LookIn], "trainer_class": Weighs},
    "groups that are replaced": {"callbacks": [Loads]},
    "groups of their own rates": {"groups": True, "schedule": "step"},
    "groups, hooks and logs": {"groups": True, "callbacks": [LookIn], "trainer_class": Logs},
    "uneven batches": {"loader": [*tiny_batches(5, batch_size=4), *tiny_batches(2, batch_size=3)]},
}


def a_run(case: dict[str, Any]) -> tuple[Any, list[Any], Any, torch.Tensor]:
    torch.manual_seed(5)
    model = tiny_model(dropout=0.2)
    parameters: Any = model.parameters()
    if case.get("groups"):
        *body, head = model.parameters()
        parameters = [{"params": body, "lr": 0.001}, {"params": [head], "name": "head"}]
    optimizer = torch.optim.AdamW(parameters, lr=case.get("lr", 0.01))
    knobs = dict(case.get("knobs", {}))
    if "schedule" in case:
        knobs |= {"scheduler": schedule(optimizer), "scheduler_interval": case["schedule"]}
    trainer = tiny_trainer(case.get("trainer_class", Trainer), model=model, optimizer=optimizer, **knobs)
    recorder = Recorder()
    loader: Iterable[Any] = case.get("loader") or tiny_loader(8, shuffle=True)
    more = [make() for make in case.get("callbacks", [])]
    run = {"epochs": 2, **case.get("run", {})}
    result = trainer.train(loader, tiny_loader(2, seed=3), callbacks=[recorder, *more], **run)
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    return result, reproducible(recorder.events), weights, torch.get_rng_state()


@pytest.mark.parametrize("name", CASES)
def test_one_frame_does_what_the_calls_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    original = fast_epoch.can_run_fast

    def watched(loop: Any) -> bool:
        taken.append(original(loop))
        return taken[-1]

    monkeypatch.setattr("offloop.engine.training.program.can_run_fast", watched)
    result, events, weights, random_state = a_run(CASES[name])
    assert set(taken) == {True}, "this case is meant to be fast"
    monkeypatch.setattr("offloop.engine.training.program.can_run_fast", lambda loop: False)
    expected, expected_events, expected_weights, expected_random_state = a_run(CASES[name])
    assert repr(events) == repr(expected_events)  # repr, because NaN is not equal to itself
    assert repr(result.metrics) == repr(expected.metrics)
    assert (result.status, result.reason, result.steps) == (expected.status, expected.reason, expected.steps)
    for each, weight in expected_weights.items():
        assert torch.equal(weights[each].nan_to_num(), weight.nan_to_num()), each
    assert torch.equal(random_state, expected_random_state)


@pytest.mark.parametrize(
    "knobs",
    [{"accumulate_grad_batches": 2}, {"on_nonfinite": "skip_step"}, {"precision": "bf16-mixed"}],
    ids=lambda knobs: next(iter(knobs)),
)
def test_what_is_not_usual_goes_call_by_call(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(loop: Any, loader: Any) -> None:
        raise AssertionError("the fast epoch does not know this knob")

    monkeypatch.setattr("offloop.engine.training.program.train_fast_epoch", never)
    assert tiny_trainer(**knobs).train(tiny_loader(), epochs=1).status == "completed"
    with pytest.raises(AssertionError, match="does not know"):
        tiny_trainer().train(tiny_loader(), epochs=1)


def test_own_train_batch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Trainer):
        calls = 0

        def train_batch(self, batch: Any) -> None:
            self.calls += 1
            super().train_batch(batch)

    trainer = tiny_trainer(Own)
    trainer.train(tiny_loader(6), epochs=1)
    assert isinstance(trainer, Own)
    assert trainer.calls == 6
