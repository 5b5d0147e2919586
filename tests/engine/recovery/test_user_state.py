"""State of the user's own goes on with a resumed run, or the run says what is missing."""

import functools
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from interruptions import Cut

from offloop.engine import Callback, Resumed, StepEnd, StepPoint, Trainer, in_step
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)
END = 10


class Carries(Trainer):
    """Adds a running mean of its inputs and noise to the loss, so that either is seen in it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mean = torch.zeros(())
        self.generator = torch.Generator().manual_seed(5)
        self.python = random.Random(5)
        self.calls = 0

    def training_step(self, batch: Any) -> Any:
        self.calls += 1
        self.mean = 0.5 * self.mean + batch[0].mean()
        noise = torch.rand((), generator=self.generator) + self.python.random() + self.calls
        return super().training_step(batch)["loss"] + (self.mean + noise) * self.model(batch[0]).mean()  # type: ignore[index]


class Saves(Carries):
    """Returns its keys beside those of the trainer."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.own_state()

    def own_state(self) -> dict[str, Any]:
        version, internal, gauss = self.python.getstate()
        return {
            "mean": self.mean,
            "generator": self.generator.get_state(),
            "python": [version, list(internal), gauss],
            "calls": self.calls,
        }

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)  # does nothing here: the run has put these back
        version, internal, gauss = state["python"]
        self.mean, self.calls = state["mean"], state["calls"]
        self.generator.set_state(state["generator"])
        self.python.setstate((version, tuple(internal), gauss))


class SavesAlone(Saves):
    """Returns its own keys alone."""

    def state_dict(self) -> dict[str, Any]:
        return self.own_state()


class SavesSome(Saves):
    """Forgets its torch generator."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["generator"]
        return state

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state | {"generator": self.generator.get_state()})


def run(
    directory: Path,
    *callbacks: Callback,
    kind: type[Trainer] = Trainer,
    resume: str | None = None,
    model: torch.nn.Module | None = None,
    loss: Any = torch.nn.functional.cross_entropy,
) -> tuple[list[float | None], list[Resumed]]:
    """Losses and what is said about the resume."""
    torch.manual_seed(0)
    model = model or tiny_model()
    recorder = Recorder()
    trainer = kind(
        model, torch.optim.SGD(model.parameters(), lr=0.05), loss=loss, run_dir=directory, run_name="run"
    )
    trainer.train(BATCHES, max_steps=END, callbacks=[*callbacks, recorder], resume=resume)
    return [event.loss for event in recorder.of(StepEnd)], recorder.of(Resumed)


def in_two(tmp_path: Path, cut: int = 5, **parts: Any) -> tuple[bool, Resumed]:
    """Whether a run that was cut is the same as a whole one, and what it says; parts are made by functions."""

    def made() -> dict[str, Any]:
        return {name: part() for name, part in parts.items() if name != "kind"} | {
            name: part for name, part in parts.items() if name == "kind"
        }

    whole, _ = run(tmp_path / "whole", **made())
    first, _ = run(tmp_path / "cut", Cut(cut), **made())
    rest, (resumed,) = run(tmp_path / "cut", resume="must", **made())
    return whole == first + rest, resumed


@pytest.mark.parametrize("kind", [Saves, SavesAlone])
@pytest.mark.parametrize("cut", [5, 8])  # in an epoch, between two
def test_state_of_a_trainer_goes_on_by_its_state_dict(kind: Any, cut: int, tmp_path: Path) -> None:
    is_same, resumed = in_two(tmp_path, cut, kind=kind)
    assert is_same
    assert (resumed.exactness, resumed.reasons) == ("bitwise", "")


def test_state_of_a_trainer_that_nothing_saves_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    is_same, resumed = in_two(tmp_path, kind=Carries)
    assert not is_same
    assert resumed.exactness == "approximate"
    names = [each.partition(" is not saved")[0] for each in resumed.reasons.split("; ")]
    assert names == ["Carries.mean", "Carries.generator", "Carries.python", "Carries.calls"]
    assert "return it from the trainer's state_dict()" in resumed.reasons
    assert "checkpoints of this run miss state" in caplog.text  # already in the first attempt


def test_generator_that_a_trainers_state_dict_forgets_is_named(tmp_path: Path) -> None:
    _, resumed = in_two(tmp_path, kind=SavesSome)
    assert resumed.exactness == "approximate"
    assert [each.partition(" is")[0] for each in resumed.reasons.split("; ")] == ["SavesSome.generator"]


def test_trainer_that_has_lost_or_gained_its_state_dict_says_so(tmp_path: Path) -> None:
    run(tmp_path, Cut(3), kind=Saves)
    _, (resumed,) = run(tmp_path, Cut(6), kind=Carries, resume="must")
    assert "Carries no longer has state_dict and load_state_dict: mean" in resumed.reasons
    _, (resumed,) = run(tmp_path, kind=Saves, resume="must")
    assert "the checkpoint holds no state of Saves" in resumed.reasons


def test_state_dict_of_a_trainer_must_be_a_mapping(tmp_path: Path) -> None:
    class Wrong(Trainer):
        def state_dict(self) -> Any:
            return [1]

    losses, _ = run(tmp_path, Cut(3), kind=Wrong)
    assert len(losses) == 3  # only the caller of the save is told


def test_own_keys_go_through_a_file_of_ones_own_too(tmp_path: Path) -> None:
    first, second = tiny_trainer(Saves), tiny_trainer(Saves)
    assert isinstance(first, Saves) and isinstance(second, Saves)
    first.train(BATCHES, epochs=1)
    second.load_state_dict(first.state_dict())
    assert second.calls == first.calls == 4
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


# The loss ------------------------------------------------------------------------------------------


class Centred(torch.nn.Module):
    """Moves a centre, and keeps what it saw in a buffer that is not persistent."""

    centre: torch.Tensor
    weight: torch.Tensor
    seen: torch.Tensor | None

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("weight", torch.full((3,), weight))
        self.register_buffer("seen", None, persistent=False)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(dim=0)
        self.seen = outputs.detach().mean(dim=0) if self.seen is None else self.seen + 0.1
        loss: torch.Tensor = ((outputs - self.centre - self.seen) * self.weight).pow(2).mean()
        return loss


@pytest.mark.parametrize("make", [Centred, lambda: Centred().forward])
def test_buffers_of_a_loss_go_on(make: Any, tmp_path: Path) -> None:
    is_same, resumed = in_two(tmp_path, loss=make)
    assert is_same
    assert (resumed.exactness, resumed.from_script) == ("bitwise", ())


def test_constant_of_a_loss_is_the_scripts_and_said(tmp_path: Path) -> None:
    run(tmp_path, Cut(3), loss=Centred(1.0))
    _, (resumed,) = run(tmp_path, loss=Centred(2.0), resume="must")
    assert resumed.exactness == "approximate"
    assert resumed.from_script == ("the loss's weight differs from the checkpoint's",)
    assert "weight" in resumed.reasons


def test_state_of_a_loss_that_is_no_module_is_named(tmp_path: Path) -> None:
    class Moving:
        def __init__(self) -> None:
            self.centre = torch.zeros(3)

        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(dim=0)
            return (outputs - self.centre).pow(2).mean()

    is_same, resumed = in_two(tmp_path, loss=Moving)
    assert not is_same
    assert resumed.exactness == "approximate"
    assert "Moving.centre is not saved" in resumed.reasons


SCRIPT = numpy.random.default_rng(3)  # as scripts have one, for everything


def from_script() -> float:
    return float(SCRIPT.random())


class DrawsFromScript(Trainer):
    def training_step(self, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(self.model(batch[0]) * (1 + from_script()), batch[1])


def drawing_from_closure() -> Any:
    generator = torch.Generator().manual_seed(2)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(outputs.shape, generator=generator)
        return torch.nn.functional.cross_entropy(outputs + noise, targets)

    return loss


def with_moving_weights() -> Any:
    def loss(outputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight[0] *= 1.1
        return torch.nn.functional.cross_entropy(outputs, targets, weight=weight)

    return functools.partial(loss, weight=torch.ones(3))


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"kind": DrawsFromScript}, "DrawsFromScript.SCRIPT is not saved"),
        ({"loss": drawing_from_closure}, "loss.generator is not saved"),
        ({"loss": with_moving_weights}, "loss.weight is not saved"),
    ],
)
def test_what_a_step_or_a_loss_takes_from_outside_is_named(parts: Any, named: str, tmp_path: Path) -> None:
    is_same, resumed = in_two(tmp_path, **parts)
    assert not is_same
    assert resumed.exactness == "approximate"
    assert named in resumed.reasons


# Buffers of the model ------------------------------------------------------------------------------


class Remembers(torch.nn.Module):
    """A model with buffers that no `state_dict` returns."""

    cache: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()
        self.register_buffer("memory", torch.zeros(3), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.inner(inputs) * self.mask
        if self.cache is None:
            self.cache = outputs.detach().mean(dim=0)
        assert isinstance(self.memory, torch.Tensor)
        self.memory.mul_(0.5).add_(outputs.detach().mean(dim=0))
        return outputs + self.memory + self.cache


def test_buffers_that_are_not_persistent_go_on_if_they_change(tmp_path: Path) -> None:
    is_same, resumed = in_two(tmp_path, model=Remembers)
    assert is_same
    assert (resumed.exactness, resumed.reasons) == ("bitwise", "")
    run(tmp_path / "again", Cut(2), model=Remembers())
    run(tmp_path / "again", Cut(3), model=Remembers(), resume="must")
    rest, _ = run(tmp_path / "again", model=Remembers(), resume="must")
    assert rest == run(tmp_path / "other", model=Remembers())[0][3:]  # what was restored once is saved again


def test_modules_in_eval_mode_and_what_trains_are_as_at_the_checkpoint(tmp_path: Path) -> None:
    def frozen() -> torch.nn.Module:
        model: Any = tiny_model(dropout=0.5)
        model[0].requires_grad_(False)
        return model  # type: ignore[no-any-return]

    class Thaws(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 2:
                point.model.requires_grad_(True)
                point.model.get_submodule("2").eval()

    whole, _ = run(tmp_path / "whole", Thaws(), model=frozen())
    first, _ = run(tmp_path / "cut", Thaws(), Cut(5), model=frozen())
    rest, (resumed,) = run(tmp_path / "cut", Thaws(), model=frozen(), resume="must")
    assert first + rest == whole
    assert resumed.exactness == "bitwise"
    assert resumed.kept == (
        "requires_grad=True of 0.weight, 0.bias, in the script it is False",
        "eval mode of 2",
    )


# Callbacks -----------------------------------------------------------------------------------------


class Noise(Callback):
    """Adds noise to the gradients, from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        for parameter in point.model.parameters():
            assert parameter.grad is not None
            parameter.grad += torch.rand(parameter.shape, generator=self.generator)


class SavedNoise(Noise):
    """Likewise, with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.generator.set_state(state["generator"])


class Watches(Callback):
    """An observer: whatever it keeps changes nothing."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []

    async def on_step_end(self, event: StepEnd, run: Any) -> None:
        self.losses.append(event.loss)


@pytest.mark.parametrize(("kind", "name"), [(Noise, "Noise.generator"), (SavedNoise, None), (Watches, None)])
def test_step_hooks_that_carry_state_are_named_unless_they_save_it(
    kind: Any, name: str | None, tmp_path: Path
) -> None:
    whole, _ = run(tmp_path / "whole", kind())
    first, _ = run(tmp_path / "cut", Cut(5), kind())
    rest, (resumed,) = run(tmp_path / "cut", kind(), resume="must")
    assert (whole == first + rest) is (name is None)
    assert resumed.exactness == ("bitwise" if name is None else "approximate")
    if name is not None:
        assert resumed.reasons == f"{name} is not saved: return it from the callback's state_dict()"


def test_callbacks_with_a_state_that_come_and_go_are_in_the_report(tmp_path: Path) -> None:
    run(tmp_path, Cut(3))
    _, (resumed,) = run(tmp_path, Cut(5), SavedNoise(), resume="must")
    assert resumed.from_script == ("callback SavedNoise is new",)
    _, (resumed,) = run(tmp_path, resume="must")
    assert resumed.from_script == ("callback SavedNoise is missing",)
