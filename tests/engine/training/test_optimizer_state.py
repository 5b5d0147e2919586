"""An optimizer's state finds its parameters, or the error says what to build."""

from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import Cut

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, ConfigError, EpochStart, Resumed, Run, StepEnd, Trainer, decides
from offloop.engine.testing import Recorder, tiny_batches, tiny_model

BATCHES = tiny_batches(4)


class Unfreeze(Callback):
    """Lets the first layer train when the second epoch begins."""

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == 1:
            model: Any = getattr(run.trainer.model, "_orig_mod", run.trainer.model)
            model[0].requires_grad_(True)
            run.trainer.optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})


def head(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model[3].parameters(), **{"lr": 0.05, **options})


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def run(
    directory: Path,
    *callbacks: Callback,
    make: Any = head,
    wrap: Any = lambda model: model,
    resume: str | None = None,
    epochs: int = 3,
) -> tuple[list[float | None], Resumed | None]:
    """Losses, and what a resumed run says."""
    model: Any = tiny_model()
    model[0].requires_grad_(False)
    recorder = Recorder()
    trainer = Trainer(
        wrap(model),
        make(model),
        loss=torch.nn.functional.cross_entropy,
        run_dir=directory,
        run_name="run",
        device="cpu",
    )
    trainer.train(BATCHES, epochs=epochs, resume=resume, callbacks=[*callbacks, ModelCheckpoint(), recorder])
    said = recorder.of(Resumed)
    return [event.loss for event in recorder.of(StepEnd)], said[0] if said else None


@pytest.mark.parametrize("cut", [3, 4, 6, 8])
@pytest.mark.parametrize("wrap", [lambda model: model, compiled])
def test_group_that_the_run_has_added_comes_back(cut: int, wrap: Any, tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", Unfreeze())
    first, _ = run(tmp_path / "cut", Unfreeze(), Cut(cut))
    rest, said = run(tmp_path / "cut", Unfreeze(), wrap=wrap, resume="must")
    assert first + rest == whole
    assert said is not None
    assert said.exactness == "bitwise"
    expected = (
        "group 1 of the optimizer, which the run had added (2 parameters)",
        "requires_grad=True of 0.weight, 0.bias, in the script it is False",
    )
    assert said.kept == (expected if cut > 4 else ()) or wrap is compiled


def test_group_that_only_the_script_has_begins_anew(tmp_path: Path) -> None:
    def with_two(model: Any) -> torch.optim.Optimizer:
        optimizer = head(model)
        optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})
        return optimizer

    run(tmp_path, Cut(5))
    losses, said = run(tmp_path, make=with_two, resume="must")
    assert len(losses) == 7
    assert said is not None
    assert (said.exactness, said.reasons) == ("approximate", "group 1 of the optimizer is new")
    assert said.from_script == ("group 1 of the optimizer is new",)


def other_order(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(model[3].parameters())[::-1], lr=0.05)


def test_parameters_in_another_order_find_their_state(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    first, _ = run(tmp_path / "cut", Cut(5))
    rest, said = run(tmp_path / "cut", make=other_order, resume="must")
    assert first + rest == whole
    assert said is not None and said.exactness == "bitwise"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda model: torch.optim.AdamW(model[0].parameters(), lr=0.05),
            r"group 0 of the optimizer has other parameters.*only in the checkpoint: 3.bias, 3.weight; only in the "
            r"script: 0.bias, 0.weight.*init_from=",
        ),
        (
            lambda model: torch.optim.AdamW([model[3].weight], lr=0.05),
            r"group 0 of the optimizer has other parameters.*only in the checkpoint: 3.bias\)",
        ),
    ],
)
def test_optimizer_over_other_parameters_is_refused(make: Any, text: str, tmp_path: Path) -> None:
    run(tmp_path, Cut(5))
    with pytest.raises(ConfigError, match=text):
        run(tmp_path, make=make, resume="must")


def test_group_that_cannot_be_added_again_is_refused(tmp_path: Path) -> None:
    def everything(model: Any) -> torch.optim.Optimizer:
        model[0].requires_grad_(True)
        return torch.optim.AdamW(model.parameters(), lr=0.05)

    run(tmp_path, Unfreeze(), Cut(6))
    with pytest.raises(
        ConfigError, match=r"has 1 parameter groups, in the checkpoint it has 2: build it with"
    ):
        run(tmp_path, make=everything, resume="must")


class Two(Trainer):
    automatic_optimization = False

    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)["loss"]  # type: ignore[index]
        self.backward(loss)
        for name in self.optimizers:
            self.optimizer_step(name)
        return loss


def test_optimizers_of_other_names_are_refused(tmp_path: Path) -> None:
    def train(*names: str, resume: str | None = None) -> None:
        model: Any = tiny_model()
        optimizers = {
            name: torch.optim.SGD(model[index].parameters(), lr=0.1)
            for name, index in zip(names, (0, 3), strict=True)
        }
        trainer = Two(
            model, optimizers, loss=torch.nn.functional.cross_entropy, run_dir=tmp_path, run_name="run"
        )
        trainer.train(BATCHES, epochs=2, callbacks=[Cut(3)], resume=resume)

    train("body", "head")
    with pytest.raises(
        ConfigError, match="has the optimizers body, head, the script has body, top: give them"
    ):
        train("body", "top", resume="must")


def test_options_that_the_script_has_changed_are_the_checkpoints_and_said(tmp_path: Path) -> None:
    run(tmp_path, Cut(5), make=lambda model: head(model, weight_decay=0.1))
    _, said = run(tmp_path, make=lambda model: head(model, lr=0.01, weight_decay=0.0), resume="must")
    assert said is not None
    assert sorted(said.kept) == [
        "lr of the optimizer is 0.05, the script has 0.01",
        "weight_decay of the optimizer is 0.1, the script has 0.0",
    ]
    assert said.exactness == "bitwise"


class Temperature(torch.nn.Module):
    """A loss that learns its temperature, as contrastive ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs * self.scale.exp(), targets)


@pytest.mark.parametrize("in_reverse", [False, True])
def test_parameters_of_the_loss_are_trained_and_go_on(in_reverse: bool, tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, Temperature, torch.optim.Optimizer]:
        model, loss = tiny_model(), Temperature()
        trained = [*model.parameters(), *loss.parameters()]
        return model, loss, torch.optim.AdamW(trained[::-1] if in_reverse else trained, lr=0.05)

    def train(name: str, *callbacks: Callback, resume: str | None = None) -> tuple[Temperature, Recorder]:
        model, loss, optimizer = made()
        recorder = Recorder()
        trainer = Trainer(model, optimizer, loss=loss, run_dir=tmp_path, run_name=name, device="cpu")
        trainer.train(BATCHES, epochs=2, resume=resume, callbacks=[*callbacks, ModelCheckpoint(), recorder])
        return loss, recorder

    model, loss, optimizer = made()
    by_hand = []
    model.train()
    for inputs, targets in BATCHES * 2:
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        by_hand.append(value.item())

    whole, recorder = train("whole")
    assert [event.loss for event in recorder.of(StepEnd)] == by_hand
    assert torch.equal(whole.scale, loss.scale)
    train("cut", Cut(5))
    resumed, recorder = train("cut", resume="must")
    assert [event.loss for event in recorder.of(StepEnd)] == by_hand[5:]
    assert torch.equal(resumed.scale, loss.scale)
    assert recorder.of(Resumed)[0].exactness == "bitwise"
