"""Manual optimization: steps that step by themselves, against loops written by hand."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from offloop.callbacks import LearningRateScheduler, ModelCheckpoint
from offloop.engine import Callback, ConfigError, EpochEnd, StepEnd, StepPoint, Trainer, in_step
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(8)


# Two optimizers -----------------------------------------------------------------------------------------


class GanModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = tiny_model(seed=1, features=8, classes=8)
        self.discriminator = tiny_model(seed=2, features=8, classes=1)


def losses_of(model: GanModel, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the discriminator's and the generator's loss for real inputs, (B, 8)."""
    fake = model.generator(torch.randn_like(real))
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    on_real = binary_cross_entropy_with_logits(model.discriminator(real), ones)
    on_fake = binary_cross_entropy_with_logits(model.discriminator(fake.detach()), zeros)
    return on_real + on_fake, binary_cross_entropy_with_logits(model.discriminator(fake), ones)


def optimizers_of(model: GanModel) -> dict[str, torch.optim.Optimizer]:
    return {
        "discriminator": torch.optim.Adam(model.discriminator.parameters(), lr=0.01),
        "generator": torch.optim.SGD(model.generator.parameters(), lr=0.02),
    }


class Gan(Trainer):
    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        discriminator_loss, generator_loss = losses_of(self.model, batch[0])  # type: ignore[arg-type]  # GanModel
        self.backward(discriminator_loss)
        self.optimizer_step("discriminator")
        # The generator's loss was computed before that step; its graph holds the old weights, so again:
        generator_loss = losses_of(self.model, batch[0])[1]  # type: ignore[arg-type]  # GanModel
        self.optimizers["generator"].zero_grad()
        self.backward(generator_loss)
        self.optimizer_step("generator")
        self.log("generator_loss", generator_loss)
        return {"loss": discriminator_loss}


def gan_by_hand(clip: float | None) -> tuple[GanModel, list[float], list[float]]:
    model = GanModel()
    optimizers = optimizers_of(model)
    torch.manual_seed(5)
    discriminator_losses, generator_losses = [], []
    for _ in range(2):
        for real, _ in BATCHES:
            loss = losses_of(model, real)[0]
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.discriminator.parameters(), clip)
            optimizers["discriminator"].step()
            optimizers["discriminator"].zero_grad()
            discriminator_losses.append(loss.item())
            loss = losses_of(model, real)[1]
            optimizers["generator"].zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.generator.parameters(), clip)
            optimizers["generator"].step()
            optimizers["generator"].zero_grad()
            generator_losses.append(loss.item())
    return model, discriminator_losses, generator_losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_two_optimizers_equal_the_hand_written_loop_and_count_one_step(clip: float | None) -> None:
    """The discriminator also gets gradients of the generator's loss, in both loops alike."""
    expected, discriminator_losses, generator_losses = gan_by_hand(clip)

    recorder = Recorder()
    model = GanModel()
    trainer = Gan(model, optimizers_of(model), device="cpu", gradient_clip_val=clip, callbacks=[recorder])
    torch.manual_seed(5)
    result = trainer.train(BATCHES, epochs=2)

    ends = recorder.of(StepEnd)
    assert [end.loss for end in ends] == discriminator_losses
    assert [end.metrics["generator_loss"] for end in ends] == generator_losses
    assert [end.step for end in ends] == list(range(1, 17))
    assert result.steps == 16
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


# One optimizer --------------------------------------------------------------------------------------------


class EverySecond(Trainer):
    """Accumulates by itself, over two batches."""

    automatic_optimization = False
    seen = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        self.backward(loss / 2)
        self.log("loss_again", loss)
        self.seen += 1
        if self.seen % 2 == 0:
            self.optimizer_step()
        return loss


def test_a_step_is_counted_where_something_was_stepped() -> None:
    recorder = Recorder()
    result = tiny_trainer(EverySecond, callbacks=[recorder]).train(BATCHES[:7], epochs=1)
    assert [(end.step, end.batch, end.samples) for end in recorder.of(StepEnd)] == [
        (1, 2, 8),
        (2, 4, 8),
        (3, 6, 8),
    ]
    assert result.steps == 3


def test_batches_that_led_to_no_step_count_in_the_means_of_the_epoch() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(EverySecond, lr=1e-30, callbacks=[recorder])
    trainer.train(BATCHES[:7], epochs=1)
    (end,) = recorder.of(EpochEnd)
    model = tiny_model()
    mean = sum(cross_entropy(model(x), y).item() for x, y in BATCHES[:7]) / 7
    assert end.metrics["train_loss"] == pytest.approx(mean)
    assert end.metrics["train_loss_again"] == pytest.approx(mean)
    assert end.samples == 28


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_closure_is_for_optimizers_that_evaluate_the_loss_themselves(precision: str) -> None:
    class Closure(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            losses: list[Tensor] = []

            def closure() -> Tensor:
                self.optimizer.zero_grad()
                loss = cross_entropy(self.model(batch[0]), batch[1])
                self.backward(loss)
                losses.append(loss.detach())
                return loss

            self.optimizer_step(closure=closure)
            return losses[0]

    def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)

    for clip in (None, 0.1):
        expected = tiny_model()
        optimizer = lbfgs(expected)
        losses: list[float] = []
        for x, y in BATCHES[:3]:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()  # noqa: B023 - called in this round of the loop
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = cross_entropy(expected(x), y)  # noqa: B023 - likewise
                loss.backward()
                if clip is not None:  # noqa: B023 - likewise
                    nn.utils.clip_grad_norm_(expected.parameters(), clip)  # noqa: B023 - likewise
                return loss

            first: Tensor = optimizer.step(closure)  # type: ignore[assignment,arg-type]  # typed for floats
            losses.append(first.item())

        recorder = Recorder()
        model = tiny_model()
        trainer = tiny_trainer(
            Closure,
            model=model,
            optimizer=lbfgs(model),
            gradient_clip_val=clip,
            precision=precision,
            callbacks=[recorder],
        )
        result = trainer.train(BATCHES[:3], epochs=1)
        assert [end.loss for end in recorder.of(StepEnd)] == losses
        assert all((end.grad_norm is None) == (clip is None) for end in recorder.of(StepEnd))
        assert result.steps == 3
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name]), name


def test_a_closure_under_loss_scaling_is_an_error() -> None:
    class Scaled(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.backward(loss)
            self.optimizer_step(closure=lambda: loss)
            return loss

    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        tiny_trainer(Scaled, precision="16-mixed").train(BATCHES, epochs=1)


def test_an_unknown_optimizer_is_an_error_that_names_those_there_are() -> None:
    class Wrong(Gan):
        def training_step(self, batch: Any) -> Any:
            self.optimizer_step("generater")

    class Nameless(Gan):
        def training_step(self, batch: Any) -> Any:
            self.optimizer_step()

    for trainer_class, text in (
        (Wrong, "no optimizer 'generater'; there are discriminator, generator"),
        (Nameless, "which optimizer.*one of discriminator, generator"),
    ):
        model = GanModel()
        trainer = trainer_class(model, optimizers_of(model), device="cpu")
        with pytest.raises(ConfigError, match=text):
            trainer.train(BATCHES, epochs=1)


def test_manual_methods_are_refused_in_automatic_steps() -> None:
    class Wrong(Trainer):
        def training_step(self, batch: Any) -> Any:
            self.optimizer_step()

    with pytest.raises(RuntimeError, match=r"optimizer_step\(\) is for manual steps"):
        tiny_trainer(Wrong).train(BATCHES, epochs=1)


def test_a_manual_trainer_must_say_how_it_validates() -> None:
    steps: list[int] = []

    class Counting(EverySecond):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            steps.append(self.step)
            return super().training_step(batch)

    text = "Counting steps manually.*define validation_step"
    with pytest.raises(ConfigError, match=text):
        tiny_trainer(Counting).train(BATCHES, BATCHES, epochs=1)
    with pytest.raises(ConfigError, match=text):
        tiny_trainer(Counting).evaluate(BATCHES)
    assert steps == []


def test_a_manual_trainer_with_a_validation_of_its_own_needs_no_step_for_it() -> None:
    class Own(EverySecond):
        def validate_epoch(self, loader: Any) -> None:
            for batch in self.batches(loader):
                self.log("size", len(batch[0]))

    assert tiny_trainer(Own).train(BATCHES, BATCHES, epochs=1).metrics["val_size"] == 4


def test_an_update_that_is_not_finite_is_left_out_and_said() -> None:
    class Spoiled(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1]) * (float("nan") if self.step == 1 else 1.0)
            self.backward(loss)
            self.optimizer_step()
            return loss

    recorder = Recorder()
    trainer = tiny_trainer(Spoiled, on_nonfinite="skip_step", callbacks=[recorder])
    trainer.train(BATCHES[:3], epochs=1)
    assert [end.skipped for end in recorder.of(StepEnd)] == [False, True, False]
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


class Manual(Trainer):
    """Steps once a batch, by hand."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        self.backward(loss)
        self.optimizer_step()
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_an_optimizer_may_step_several_times_in_a_batch(precision: str) -> None:
    class Twice(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            for _ in range(2):
                loss = cross_entropy(self.model(batch[0]), batch[1])
                self.backward(loss)
                self.optimizer_step()
            return loss

    trainer, other = (tiny_trainer(each, precision=precision, lr=0.01) for each in (Twice, Manual))
    assert trainer.train(BATCHES, epochs=1).steps == len(BATCHES)
    other.train([batch for batch in BATCHES for _ in range(2)], epochs=1)
    for value, expected in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(value, expected)


class EveryThird(Trainer):
    """Steps one of its optimizers at each batch, the other one at each third."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        discriminator_loss, generator_loss = losses_of(self.model, batch[0])  # type: ignore[arg-type]  # GanModel
        if (self.step + 1) % 3 == 0:
            self.backward(generator_loss)
            self.optimizers["discriminator"].zero_grad()
            self.optimizer_step("generator")
            discriminator_loss, _ = losses_of(self.model, batch[0])  # type: ignore[arg-type]  # GanModel
        self.backward(discriminator_loss)
        self.optimizer_step("discriminator")
        return discriminator_loss


def rates_of(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, float]:
    return {name: each.param_groups[0]["lr"] for name, each in optimizers.items()}


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_schedule_by_steps_goes_with_the_steps_of_its_optimizer(warmup: int) -> None:
    def schedule(name: str) -> LearningRateScheduler:
        kind = torch.optim.lr_scheduler.ExponentialLR
        return LearningRateScheduler(kind, gamma=0.5, interval="step", optimizer=name, warmup=warmup)

    model = GanModel()
    optimizers = optimizers_of(model)
    callbacks = [schedule("generator"), schedule("discriminator")]
    EveryThird(model, optimizers, device="cpu", callbacks=callbacks).train(BATCHES[:6], epochs=1)
    assert rates_of(optimizers) == pytest.approx(
        {"discriminator": 0.01 * 0.5 ** (6 - warmup), "generator": 0.02 * 0.5 ** (2 - warmup)}
    )


def test_a_schedule_of_one_optimizer_goes_on_with_it_in_a_resumed_run(tmp_path: Path) -> None:
    def a_run(batches: int, resume: str | None) -> dict[str, float]:
        model = GanModel()
        optimizers = optimizers_of(model)
        schedule = LearningRateScheduler(
            torch.optim.lr_scheduler.ExponentialLR,
            gamma=0.5,
            interval="step",
            optimizer="generator",
            warmup=2,
        )
        trainer = EveryThird(
            model,
            optimizers,
            device="cpu",
            run_dir=tmp_path,
            run_name="one",
            callbacks=[schedule, ModelCheckpoint()],
        )
        trainer.train(BATCHES, max_steps=batches, resume=resume)
        return rates_of(optimizers)

    assert a_run(4, None)["generator"] < 0.02  # warming up still
    assert a_run(8, "must")["generator"] == pytest.approx(0.02)
    assert a_run(12, "must")["generator"] == pytest.approx(0.01 * 0.5)


def test_a_step_with_a_closure_gives_the_loss() -> None:
    class Fit(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            def closure() -> Tensor:
                self.optimizer.zero_grad()
                loss = cross_entropy(self.model(batch[0]), batch[1])
                self.backward(loss)
                return loss

            loss: Tensor = self.optimizer_step(closure=closure)
            return loss

    recorder = Recorder()
    model = tiny_model()
    expected = cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).item()
    trainer = tiny_trainer(
        Fit, model=model, optimizer=torch.optim.LBFGS(model.parameters()), callbacks=[recorder]
    )
    trainer.train(BATCHES[:1], max_steps=1)
    assert recorder.of(StepEnd)[0].loss == expected


class PartlyWhole(nn.Module):
    """A part of it computes in float32, whatever the precision is."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.rest = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            hidden = self.whole(inputs.float())
        outputs: Tensor = self.rest(hidden)
        return outputs


def test_only_the_forward_pass_is_under_autocast() -> None:
    torch.manual_seed(0)
    model = PartlyWhole()
    other = copy.deepcopy(model)
    tiny_trainer(Manual, model=model, precision="bf16-mixed").train(BATCHES, epochs=1)
    tiny_trainer(model=other, precision="bf16-mixed").train(BATCHES, epochs=1)
    for value, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_step_hooks_see_manual_steps() -> None:
    points: list[tuple[str, int]] = []

    class Look(Callback):
        @in_step
        def after_backward(self, point: StepPoint) -> None:
            points.append((point.name, point.step))

        @in_step
        def before_optimizer_step(self, point: StepPoint) -> None:
            points.append((point.name, point.step))

        @in_step
        def after_step(self, point: StepPoint) -> None:
            points.append((point.name, point.step))

    model = GanModel()
    Gan(model, optimizers_of(model), device="cpu", callbacks=[Look()]).train(BATCHES[:1], epochs=1)
    one = [("after_backward", 0), ("before_optimizer_step", 0)]
    assert points == [*one, *one, ("after_step", 1)]


def test_steps_that_the_run_does_not_see_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class ByHand(Trainer):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            loss.backward()
            self.optimizer.step()
            return loss

    model = tiny_model()
    ByHand(model, torch.optim.SGD(model.parameters(), lr=0.1)).train(BATCHES, epochs=2)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "no optimizer has stepped in the first epoch: a manual step calls self.backward(loss)"
    )
