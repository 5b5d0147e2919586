"""engine/trainer.py: arguments are checked before anything runs; batches, losses, devices, evaluation."""

import collections
import copy
import dataclasses
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from offloop.engine import (
    BaseTrainer,
    BatchError,
    Callback,
    ConfigError,
    EmptyLoaderError,
    EpochStart,
    Event,
    EventError,
    LossError,
    MetricNotFoundError,
    OffloopError,
    Run,
    RunResult,
    StepEnd,
    Trainer,
    TrainerConfig,
    TrainStart,
    ValidationEnd,
)
from offloop.engine.callback import TrainerParts
from offloop.engine.testing import (
    Recorder,
    reproducible,
    tiny_batches,
    tiny_loader,
    tiny_model,
    tiny_trainer,
)
from offloop.engine.training.placement import prepare_model

# Bad input ------------------------------------------------------------------------------------------


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


def refused(make: Callable[[], object]) -> str:
    """Return the text with which `make` is refused; it must not have drawn from torch's generator."""
    state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError, OffloopError)) as caught:
        make()
    assert torch.equal(torch.get_rng_state(), state)
    return str(caught.value)


MODEL, OTHER_MODEL = tiny_model(), tiny_model()

BAD_TRAINERS: dict[str, tuple[Callable[[], object], str]] = {
    "unknown knob": (
        lambda: Trainer(MODEL, sgd(MODEL), acumulate_grad_batches=2),  # type: ignore[call-arg]  # that is the test
        "there is no knob 'acumulate_grad_batches': did you mean accumulate_grad_batches?",
    ),
    "a peer's knob": (
        lambda: Trainer(MODEL, sgd(MODEL), max_grad_norm=1.0),  # type: ignore[call-arg]  # that is the test
        "there is no knob 'max_grad_norm': use gradient_clip_val",
    ),
    "value out of range": (
        lambda: Trainer(MODEL, sgd(MODEL), gradient_clip_val=-1.0),
        "gradient_clip_val must be a finite number above 0, got -1.0",
    ),
    "an argument of train": (
        lambda: Trainer(MODEL, sgd(MODEL), metrics=["accuracy"]),  # type: ignore[call-arg]  # that is the test
        "metrics belongs to train(): Trainer says how to train, train() what and how long",
    ),
    "config of another kind": (
        lambda: Trainer(MODEL, sgd(MODEL), {"seed": 1}),  # type: ignore[arg-type]  # that is the test
        "config must be a TrainerConfig, got dict",
    ),
    "model class": (
        lambda: Trainer(nn.Identity, sgd(MODEL)),  # type: ignore[arg-type]  # that is the test
        "model must be an instance: write Identity(...) instead of Identity",
    ),
    "model of another kind": (
        lambda: Trainer(len, sgd(MODEL)),  # type: ignore[arg-type]  # that is the test
        "model must be a torch.nn.Module, got builtin_function_or_method",
    ),
    "optimizer class": (
        lambda: Trainer(MODEL, SGD),  # type: ignore[arg-type]  # that is the test
        "optimizer must be an instance: write SGD(model.parameters(), lr=...) instead of SGD",
    ),
    "optimizer of another kind": (
        lambda: Trainer(MODEL, MODEL.parameters()),  # type: ignore[arg-type]  # that is the test
        "optimizer must be a torch.optim.Optimizer, like torch.optim.AdamW(model.parameters(), lr=1e-3), or a mapping "
        "of names to several; got generator",
    ),
    "no optimizer": (lambda: Trainer(MODEL, {}), "optimizer is an empty mapping: give at least one"),
    "optimizer of another model": (
        lambda: Trainer(MODEL, sgd(OTHER_MODEL)),
        "the optimizer holds 4 parameters that are not the model's: was the model copied or moved",
    ),
    "named optimizer of another model": (
        lambda: Trainer(MODEL, {"one": sgd(MODEL), "two": sgd(OTHER_MODEL)}),
        "optimizer 'two' holds 4 parameters that are not the model's",
    ),
    "scheduler of another optimizer": (
        lambda: Trainer(MODEL, sgd(MODEL), scheduler=StepLR(sgd(MODEL), 1)),
        "the scheduler belongs to another optimizer than the one given",
    ),
    "scheduler class": (
        lambda: Trainer(MODEL, sgd(MODEL), scheduler=StepLR),  # type: ignore[arg-type]  # that is the test
        "scheduler must be an instance: write StepLR(optimizer, ...) instead of StepLR",
    ),
    "scheduler of another kind": (
        lambda: Trainer(MODEL, sgd(MODEL), scheduler=0.1),  # type: ignore[arg-type]  # that is the test
        "scheduler must be one of torch.optim.lr_scheduler, got float; by name, with a warm-up, or several: "
        'LearningRateScheduler("cosine") among the callbacks',
    ),
    "loss class": (
        lambda: Trainer(MODEL, sgd(MODEL), loss=nn.CrossEntropyLoss),  # type: ignore[arg-type]  # that is the test
        "loss must be an instance: write CrossEntropyLoss(...) instead of CrossEntropyLoss",
    ),
    "loss of another kind": (
        lambda: Trainer(MODEL, sgd(MODEL), loss="cross_entropy"),  # type: ignore[arg-type]  # that is the test
        "loss must be a function of outputs and targets, like torch.nn.functional.cross_entropy, got str",
    ),
    "callback class": (
        lambda: Trainer(MODEL, sgd(MODEL), callbacks=[Recorder]),  # type: ignore[list-item]  # that is the test
        "callbacks must be instances: write Recorder() instead of Recorder",
    ),
    "unknown device": (
        lambda: Trainer(MODEL, sgd(MODEL), device="gpu"),
        "device='gpu' is none that torch knows",
    ),
}


@pytest.mark.parametrize("name", BAD_TRAINERS)
def test_a_trainer_that_cannot_work_is_refused(name: str) -> None:
    make, text = BAD_TRAINERS[name]
    assert refused(make).startswith(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert (
        refused(lambda: Trainer(MODEL, sgd(MODEL), device="cuda:1"))
        == "device='cuda:1', but torch sees no CUDA device here"
    )


def test_a_plateau_cannot_be_stepped_with_the_optimizer() -> None:
    optimizer = sgd(MODEL)
    plateau = ReduceLROnPlateau(optimizer)
    text = refused(lambda: Trainer(MODEL, optimizer, scheduler=plateau, scheduler_interval="step"))
    assert "ReduceLROnPlateau" in text and "scheduler_interval" in text


TWO = {"a": sgd(MODEL), "b": sgd(MODEL)}


class Manual(Trainer):
    automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        raise AssertionError("not reached")


class ManualWithoutStep(Trainer):
    automatic_optimization = False


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from tiny_batches()


LOADER = tiny_batches()
DATASET = TensorDataset(torch.zeros(4, 8), torch.zeros(4))

BAD_RUNS: dict[str, tuple[Callable[[Callable[..., Trainer]], RunResult], str]] = {
    "no limit": (
        lambda make: make().train(LOADER),
        "nothing says when to stop: give epochs, max_steps or max_time",
    ),
    "bad limit": (
        lambda make: make().train(LOADER, epochs=0),
        "epochs must be a whole number of at least 1, got 0",
    ),
    "misplaced knob": (
        lambda make: make().train(LOADER, epochs=1, precision="bf16-mixed"),  # type: ignore[call-arg]  # that is the test
        "precision says how to train: give it to Trainer(precision=...), not to train()",
    ),
    "misspelt argument": (
        lambda make: make().train(LOADER, num_epochs=1),  # type: ignore[call-arg]  # that is the test
        "train() takes no 'num_epochs': use epochs",
    ),
    "dataset for a loader": (
        lambda make: make().train(DATASET, epochs=1),  # type: ignore[arg-type]  # that is the test
        "train_loader must be iterable over batches, got TensorDataset (a Dataset? wrap it in a DataLoader)",
    ),
    "dataset for a val_loader": (
        lambda make: make().train(LOADER, DATASET, epochs=1),  # type: ignore[arg-type]  # see above
        "val_loader must be iterable over batches, got TensorDataset (a Dataset? wrap it in a DataLoader)",
    ),
    "loader class": (
        lambda make: make().train(DataLoader, epochs=1),  # type: ignore[arg-type]  # see above
        "train_loader must be an instance: write DataLoader(...) instead of DataLoader",
    ),
    "a path": (
        lambda make: make().train("train.csv", epochs=1),
        "train_loader must be iterable over batches, got str",
    ),
    "empty loader": (
        lambda make: make().train([], epochs=1),
        "train_loader is empty: it has no batch",
    ),
    "empty val_loader": (
        lambda make: make().train(LOADER, [], epochs=1),
        "val_loader is empty: it has no batch",
    ),
    "share of an unknown length": (
        lambda make: make(limit_train_batches=0.5).train(endless(), epochs=1),
        "limit_train_batches=0.5 is a share of the loader's length, but this loader has none",
    ),
    "share of an unknown length, validating": (
        lambda make: make(limit_val_batches=0.5).train(LOADER, endless(), epochs=1),
        "limit_val_batches=0.5 is a share of the loader's length, but this loader has none",
    ),
    "unknown metric": (
        lambda make: make().train(LOADER, epochs=1, metrics=["acuracy"]),
        "",
    ),
    "monitor without a validation": (
        lambda make: make(monitor="val_loss").train(LOADER, epochs=1),
        "monitor='val_loss' needs a validation: give train() a val_loader",
    ),
    "monitor without a prefix": (
        lambda make: make(monitor="accuracy").train(LOADER, LOADER, epochs=1),
        "monitor must begin with train_ or val_, like \"val_loss\"; got 'accuracy'",
    ),
    "monitor that nobody knows": (
        lambda make: make(monitor="val_quality").train(LOADER, LOADER, epochs=1, metrics=["f1"]),
        "monitor='val_quality' will not be computed, but "
        "train_loss, train_f1_score, val_loss, val_f1_score will be computed: ",
    ),
    "several optimizers, automatic": (
        lambda make: make(optimizer=TWO).train(LOADER, epochs=1),
        "there are 2 optimizers (a, b): say when each steps with automatic_optimization = False",
    ),
    "LBFGS, automatic": (
        lambda make: make(optimizer=torch.optim.LBFGS(MODEL.parameters())).train(LOADER, epochs=1),
        "LBFGS evaluates the loss several times in a step: use automatic_optimization = False",
    ),
    "accumulation, manual": (
        lambda make: make(Manual, accumulate_grad_batches=2).train(LOADER, epochs=1),
        "accumulate_grad_batches=2 needs automatic_optimization",
    ),
    "manual without a step": (
        lambda make: make(ManualWithoutStep).train(LOADER, epochs=1),
        "automatic_optimization = False leaves the steps to you: define training_step(self, batch)",
    ),
    "callback given twice": (
        lambda make: make().train(LOADER, epochs=1, callbacks=make().callbacks),
        "the same Recorder was given twice",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_run_that_cannot_work_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    start, text = BAD_RUNS[name]
    recorder = Recorder()
    run_dir = tmp_path / "runs"

    def make(trainer_class: type[Trainer] = Trainer, **knobs: Any) -> Trainer:
        return tiny_trainer(trainer_class, model=MODEL, run_dir=str(run_dir), callbacks=[recorder], **knobs)

    found = refused(lambda: start(make))
    assert found.startswith(text)
    assert recorder.events == []
    assert not run_dir.exists()


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    trainer = tiny_trainer()
    text = refused(lambda: trainer.train(LOADER, epochs=1, metrics=["acuracy"]))
    assert "'acuracy'" in text and "accuracy" in text.replace("'acuracy'", "")


def test_a_refused_run_leaves_the_trainer_free() -> None:
    trainer = tiny_trainer()
    refused(lambda: trainer.train(LOADER, epochs=0))
    assert trainer.train(LOADER, epochs=1).status == "completed"


def test_a_callback_whose_reset_fails_leaves_the_trainer_and_the_others_free() -> None:
    class Stubborn(Callback):
        def reset(self) -> None:
            raise RuntimeError("no reset")

    trainer, recorder = tiny_trainer(), Recorder()
    with pytest.raises(RuntimeError, match="no reset"):
        trainer.train(LOADER, epochs=1, callbacks=[recorder, Stubborn()])
    assert trainer.train(LOADER, epochs=1, callbacks=[recorder]).status == "completed"


def test_a_refused_run_closes_what_it_has_reset_and_nothing_else() -> None:
    said: list[str] = []

    class Opens(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def reset(self) -> None:
            said.append(f"reset {self.name}")
            if self.name == "refuses":
                raise RuntimeError("no reset")

        def close(self) -> None:
            said.append(f"close {self.name}")

    callbacks = [Recorder(), Opens("first"), Opens("second"), Opens("refuses"), Opens("never")]
    with pytest.raises(RuntimeError, match="no reset"):
        tiny_trainer().train(LOADER, epochs=1, callbacks=callbacks)
    assert said == ["reset first", "reset second", "reset refuses", "close first", "close second"]


def test_callbacks_are_prepared_with_the_trainer_once_all_are_reset() -> None:
    said: list[str] = []

    class Prepares(Callback):
        def reset(self) -> None:
            said.append("reset")

        def prepare(self, trainer: TrainerParts) -> None:
            said.append(f"prepare {type(trainer.model).__name__}")
            if len(said) > 4:
                raise ConfigError("no such model")

        def on_train_start(self, event: TrainStart, run: Run) -> None:
            said.append("start")

        def close(self) -> None:
            said.append("close")

    trainer, callback = tiny_trainer(), Prepares()
    model = type(trainer.model).__name__
    trainer.train(LOADER, epochs=1, callbacks=[callback])
    assert said == ["reset", f"prepare {model}", "start", "close"]
    with pytest.raises(ConfigError, match="no such model"):
        trainer.train(LOADER, epochs=1, callbacks=[callback])
    assert said[4:] == ["reset", f"prepare {model}", "close"]
    assert trainer.train(LOADER, epochs=1).status == "completed"


def test_knobs_may_come_in_a_configuration_and_keywords_win() -> None:
    trainer = tiny_trainer(config=TrainerConfig(epochs=2, gradient_clip_val=1.0), gradient_clip_val=2.0)
    assert trainer.config.gradient_clip_val == 2.0
    assert trainer.train(LOADER).epochs == 2


def test_a_base_trainer_says_which_steps_are_missing() -> None:
    model = tiny_model()
    optimizer = sgd(model)
    with pytest.raises(NotImplementedError, match=r"BaseTrainer must define training_step\(self, batch\)"):
        BaseTrainer(model, optimizer, device="cpu").train(LOADER, epochs=1)


@pytest.mark.parametrize("name", ["train_batch", "validate_batch", "batches"])
def test_methods_of_a_run_are_refused_outside_of_one(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name} works during a run"):
        getattr(tiny_trainer(), name)(LOADER)


# Batches and losses ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


Convert = Callable[[Tensor, Tensor], Any]
WITH_LOSS: dict[str, Convert] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "mapping": lambda x, y: {"targets": y, "name": "batch", "inputs": x},
    "user dict": lambda x, y: collections.UserDict(inputs=x, targets=y),
}


def losses(trainer: Trainer, batches: list[Any], **arguments: Any) -> list[float]:
    recorder = Recorder()
    trainer.train(batches, epochs=1, callbacks=[recorder], **arguments)
    return [event.loss for event in recorder.of(StepEnd) if event.loss is not None]


@pytest.mark.parametrize("name", WITH_LOSS)
def test_with_a_loss_function_inputs_and_targets_are_found(name: str) -> None:
    expected = losses(tiny_trainer(), LOADER)
    assert losses(tiny_trainer(), [WITH_LOSS[name](x, y) for x, y in LOADER]) == expected


@dataclasses.dataclass
class Output:
    loss: Tensor
    logits: Tensor


class OwnLoss(nn.Module):
    """Returns its loss, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = tiny_model()
        self.way = way

    def forward(self, inputs: Tensor, labels: Tensor | None = None, targets: Tensor | None = None) -> Any:
        logits = self.net(inputs)
        loss = cross_entropy(logits, labels if labels is not None else targets)  # type: ignore[arg-type]  # one is
        ways = {
            "scalar": loss,
            "one element": loss.reshape(1),
            "attribute": Output(loss, logits),
            "item": {"loss": loss, "logits": logits},
            "item alone": {"loss": loss},
        }
        return ways[self.way]


OWN_LOSS_BATCHES: dict[str, Convert] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "mapping with targets": lambda x, y: {"inputs": x, "targets": y},
    "mapping with labels": lambda x, y: {"inputs": x, "labels": y},
    "user dict": lambda x, y: collections.UserDict(inputs=x, labels=y),
}


def own_loss_trainer(model: nn.Module, **knobs: Any) -> Trainer:
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.05), device="cpu", **knobs)


@pytest.mark.parametrize("name", OWN_LOSS_BATCHES)
@pytest.mark.parametrize("way", ["scalar", "one element", "attribute", "item", "item alone"])
def test_a_model_may_return_its_own_loss(name: str, way: str) -> None:
    batches = [OWN_LOSS_BATCHES[name](x, y) for x, y in LOADER]
    assert losses(own_loss_trainer(OwnLoss(way)), batches) == losses(tiny_trainer(), LOADER)


def test_a_model_may_take_one_tensor_and_return_its_loss() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            return mse_loss(self.net(inputs), inputs)

    made = losses(own_loss_trainer(Autoencoder()), [x for x, _ in LOADER] * 5)
    assert made[-1] < made[0]


@pytest.mark.parametrize("way", ["attribute", "item"])
def test_logits_and_labels_of_a_model_feed_the_metrics(way: str) -> None:
    batches = [{"inputs": x, "labels": y} for x, y in LOADER]
    result = own_loss_trainer(OwnLoss(way)).train(batches, batches, epochs=3, metrics=["accuracy"])
    expected = tiny_trainer().train(LOADER, LOADER, epochs=3, metrics=["accuracy"])
    assert result.metrics == expected.metrics
    assert "val_accuracy" in result.metrics


class Returns(Trainer):
    value: Any

    def training_step(self, batch: Any) -> Any:
        return type(self).value(self.model(batch[0]))


BAD_STEPS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "not a scalar": (lambda out: out, r"the loss must be a scalar, got shape \(4, 3\): take its mean\(\)"),
    "detached": (lambda out: out.mean().detach(), "the loss has no gradient: was it detached"),
    "a float": (
        lambda out: {"loss": out.mean().item()},
        "must give a loss, a tensor of one element; got float: return the tensor itself, without .item()",
    ),
    "a number": (lambda out: out.mean().item(), "got float: return the tensor itself, without .item()"),
    "nothing": (
        lambda out: None,
        "must give a loss, a tensor of one element; got NoneType: write return loss, or return",
    ),
    "no loss": (lambda out: {"outputs": out}, "must give a loss, a tensor of one element; got NoneType"),
    "a tuple": (
        lambda out: (out.mean(), out),
        "training_step must return the loss or a mapping .* got tuple",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_that_returns_no_loss_is_an_error_that_says_what_came(name: str) -> None:
    value, text = BAD_STEPS[name]
    trainer = tiny_trainer(type("Wrong", (Returns,), {"value": value}))
    with pytest.raises(LossError, match=text):
        trainer.train(LOADER, epochs=1)
    assert trainer.last_run is not None
    assert trainer.last_run.result.status == "failed"


def test_a_step_that_returns_no_loss_in_a_later_batch_is_an_error_too() -> None:
    class Sometimes(Trainer):
        def training_step(self, batch: Any) -> Any:
            return self.model(batch[0]).mean() if self.step < 2 else None

    with pytest.raises(LossError, match="must give a loss, a tensor of one element; got NoneType"):
        tiny_trainer(Sometimes).train(LOADER, epochs=1)


x, y = LOADER[0]
BAD_BATCHES: dict[str, tuple[Callable[[], Trainer], Any, str]] = {
    "three for a loss": (
        tiny_trainer,
        (x, y, y),
        r"a batch must be \(inputs, targets\) .*got a tuple of 3: override training_step",
    ),
    "other keys for a loss": (tiny_trainer, {"a": x, "b": y}, "got a dict with keys a, b: override"),
    "a tensor for a loss": (tiny_trainer, x, r"got a tensor of shape \(4, 8\), float32: override"),
    "neither": (
        lambda: own_loss_trainer(OwnLoss("scalar")),
        object(),
        "a batch must be a tensor, .*got a object",
    ),
    "no loss": (
        lambda: own_loss_trainer(tiny_model()),
        x,
        r"the model returned a tensor of shape \(4, 3\), float32 for a batch of a tensor .*, which is no loss: give "
        r"Trainer\(loss=\.\.\.\), let the model return its loss, or override training_step",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_batch_that_fits_no_convention_is_an_error_that_describes_it(name: str) -> None:
    make, batch, text = BAD_BATCHES[name]
    with pytest.raises(BatchError, match=text):
        make().train([batch], epochs=1)


# Devices, seeds, compilation --------------------------------------------------------------------------


def test_optimizer_state_goes_to_the_device_with_the_model_except_counters() -> None:
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(x), y).backward()
    optimizer.step()
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    prepare_model(Trainer(model, optimizer, loss=loss, device="meta"))
    for state in optimizer.state.values():
        assert (state["exp_avg"].device.type, state["exp_avg_sq"].device.type) == ("meta", "meta")
        assert state["step"].device.type == "cpu"
    assert loss.weight is not None and loss.weight.device.type == "meta"


def test_lists_in_an_optimizer_state_go_along() -> None:
    model = tiny_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    prepare_model(Trainer(model, optimizer, device="meta"))
    (state,) = optimizer.state.values()
    assert state["old_dirs"] and {each.device.type for each in state["old_dirs"]} == {"meta"}


def test_a_seed_makes_runs_equal_and_another_one_makes_them_different() -> None:
    def story(seed: int) -> Any:
        recorder = Recorder()
        trainer = tiny_trainer(model=tiny_model(dropout=0.5), seed=seed, callbacks=[recorder])
        trainer.train(tiny_loader(), epochs=2)
        return reproducible(recorder.events)[1:]  # TrainStart holds the seed itself

    first = story(3)
    torch.rand(5)
    assert story(3) == first
    assert story(4) != first


def test_deterministic_holds_for_the_length_of_the_run() -> None:
    class Look(Trainer):
        seen = False

        def training_step(self, batch: Any) -> Any:
            Look.seen = torch.are_deterministic_algorithms_enabled()
            return super().training_step(batch)

    tiny_trainer(Look, deterministic=True).train(LOADER, epochs=1)
    assert Look.seen
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_alike_and_keeps_its_keys(backend: str) -> None:
    trainer = tiny_trainer(compile={"backend": backend})
    keys = list(trainer.model.state_dict())
    made = losses(trainer, LOADER)
    torch.testing.assert_close(made, losses(tiny_trainer(), LOADER))
    assert list(trainer.model.state_dict()) == keys
    assert trainer.model._compiled_call_impl is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when the compiler is imported
def test_compile_true_uses_torchs_default() -> None:
    trainer = tiny_trainer(compile=True)
    torch.testing.assert_close(losses(trainer, LOADER), losses(tiny_trainer(), LOADER))


# Evaluation -------------------------------------------------------------------------------------------


def test_evaluate_gives_what_a_validation_would_and_changes_nothing() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(model=tiny_model(dropout=0.5), callbacks=[recorder])
    trainer.train(LOADER, LOADER, epochs=1, metrics=["accuracy"])
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    before = torch.get_rng_state()

    made = trainer.evaluate(LOADER, metrics=["accuracy"])

    (validation,) = recorder.of(ValidationEnd)
    assert made == validation.metrics
    assert set(made) == {"val_loss", "val_accuracy"}
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_evaluate_names_its_metrics_as_it_is_asked_to() -> None:
    trainer = tiny_trainer()
    made = trainer.evaluate(LOADER, metrics=["accuracy"], prefix="test_")
    usual = trainer.evaluate(LOADER, metrics=["accuracy"])
    assert made == {"test_loss": usual["val_loss"], "test_accuracy": usual["val_accuracy"]}
    with pytest.raises(TypeError, match='prefix must be a string like "test_", got None'):
        trainer.evaluate(LOADER, prefix=None)  # type: ignore[arg-type]


def test_metrics_may_differ_between_training_and_validation() -> None:
    trainer = tiny_trainer()
    result = trainer.train(LOADER, LOADER, epochs=1, metrics={"train": ["accuracy"], "val": ["f1_score"]})
    assert set(result.metrics) == {"train_loss", "train_accuracy", "lr", "val_loss", "val_f1_score"}
    with pytest.raises(
        ConfigError, match="train_loss, train_accuracy, val_loss, val_f1_score will be computed"
    ):
        trainer = tiny_trainer(monitor="val_blub")
        trainer.train(LOADER, LOADER, epochs=1, metrics={"train": ["accuracy"], "val": ["f1_score"]})


@pytest.mark.anyio
async def test_evaluate_async_gives_the_same_beside_the_event_loop() -> None:
    began, seen = threading.Event(), threading.Event()

    class Waits(Trainer):
        def validation_step(self, batch: Any) -> Any:
            began.set()
            assert seen.wait(30), "the event loop stood still"
            return super().validation_step(batch)

    async def look() -> None:
        while not began.is_set():
            await anyio.lowlevel.checkpoint()
        seen.set()

    trainer = tiny_trainer(Waits)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            made = await trainer.evaluate_async(LOADER)
    assert made == trainer.evaluate(LOADER)


@pytest.mark.anyio
async def test_evaluate_async_carries_the_callers_default_device() -> None:
    class Makes(Trainer):
        def validation_step(self, batch: Any) -> Any:
            devices.append(torch.zeros(()).device.type)
            return super().validation_step(batch)

    devices: list[str] = []
    trainer = tiny_trainer(Makes)
    with torch.device("meta"):
        await trainer.evaluate_async(LOADER)
    assert set(devices) == {"meta"}


def test_a_trainer_does_one_thing_at_a_time() -> None:
    texts: dict[str, str] = {}

    class Meddler(Trainer):
        def validation_step(self, batch: Any) -> Any:
            if not texts:
                texts["train"] = refused(lambda: self.train(LOADER, epochs=1))
                texts["evaluate"] = refused(lambda: self.evaluate(LOADER))
            return super().validation_step(batch)

    trainer = tiny_trainer(Meddler)
    trainer.evaluate(LOADER)
    assert all(text.startswith("this trainer is evaluating") for text in texts.values())

    texts.clear()
    trainer.train(LOADER, LOADER, epochs=1, callbacks=[])
    assert texts["train"].startswith("this trainer has run") and "run.validate()" in texts["evaluate"]


def test_evaluate_checks_its_arguments() -> None:
    with pytest.raises(EmptyLoaderError, match="loader is empty"):
        tiny_trainer().evaluate([])
    with pytest.raises(EmptyLoaderError, match="gave no batch"):
        tiny_trainer().evaluate(iter([]))
    with pytest.raises(ValueError, match="acuracy"):
        tiny_trainer().evaluate(LOADER, metrics=["acuracy"])


# Best ---------------------------------------------------------------------------------------------------


class Scripted(Trainer):
    """Validates to a script of scores, one for each epoch."""

    scores: tuple[float, ...] = ()

    def validation_step(self, batch: Any) -> Any:
        self.log("score", self.scores[self.epoch])


def scripted(*scores: float, **knobs: Any) -> RunResult:
    made = type("Scored", (Scripted,), {"scores": scores})
    return tiny_trainer(made, monitor="val_score", **knobs).train(LOADER, LOADER[:1], epochs=len(scores))


def test_best_is_the_best_epoch_and_a_tie_keeps_the_older() -> None:
    best = scripted(1.0, 3.0, 2.0, 3.0, mode="max").best
    assert best is not None
    assert (best.monitor, best.score, best.epoch, best.step, best.path) == ("val_score", 3.0, 1, 16, None)
    best = scripted(2.0, 1.0, 1.0, mode="min").best
    assert best is not None and (best.score, best.epoch) == (1.0, 1)


def test_nan_is_never_best() -> None:
    nan = float("nan")
    best = scripted(nan, 2.0, nan, 1.0, mode="max").best
    assert best is not None and (best.score, best.epoch) == (2.0, 1)
    assert scripted(nan, nan, mode="min").best is None


def test_the_default_monitor_is_the_validation_loss_else_the_training_loss() -> None:
    for val_loader, monitor in ((LOADER, "val_loss"), (None, "train_loss")):
        result = tiny_trainer().train(LOADER, val_loader, epochs=2)
        assert result.best is not None
        assert (result.best.monitor, result.best.epoch) == (monitor, 1)
        assert result.best.score == result.metrics[monitor]


class LogsOther(Trainer):
    def training_step(self, batch: Any) -> Any:
        self.log("other", 1.0)
        return super().training_step(batch)


def test_a_monitor_that_no_step_logs_is_an_error_that_lists_what_is_there() -> None:
    trainer = tiny_trainer(LogsOther, monitor="val_quality", mode="max")
    with pytest.raises(MetricNotFoundError) as caught:
        trainer.train(LOADER, LOADER, epochs=1, metrics=["accuracy"])
    assert set(caught.value.known) == {"val_other", "val_loss", "val_accuracy"}


def test_the_direction_is_known_from_the_metric() -> None:
    result = tiny_trainer(monitor="val_accuracy", lr=0.3).train(
        LOADER, LOADER, epochs=4, metrics=["accuracy"]
    )
    assert result.best is not None
    assert result.best.score == max(end.metrics["val_accuracy"] for end in result.history)


# Results ------------------------------------------------------------------------------------------------


def test_a_result_says_what_the_run_has_come_to() -> None:
    result = tiny_trainer().train(LOADER, LOADER, epochs=2)
    assert (result.status, result.reason, result.epochs, result.steps) == ("completed", "epochs=2", 2, 16)
    assert [end.epoch for end in result.history] == [0, 1]
    assert result.metrics == {**result.history[-1].metrics}
    assert (result.dir, result.callback_errors) == (None, {})
    with pytest.raises(
        MetricNotFoundError, match="no metric 'val_f1' here; there are: val_loss, train_loss, lr"
    ):
        result.metrics["val_f1"]


def test_each_run_begins_at_epoch_zero_with_the_model_as_it_is() -> None:
    trainer = tiny_trainer()
    first, second = (trainer.train(LOADER, epochs=1) for _ in range(2))
    assert (second.epochs, second.steps) == (1, 8)
    assert first.run_id != second.run_id
    assert second.metrics["train_loss"] < first.metrics["train_loss"]


def test_metrics_of_a_run_equal_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score  # type: ignore[import-untyped]  # it has no types

    train, val = tiny_loader(9, batch_size=7), tiny_batches(5, batch_size=7, seed=1)
    trainer = tiny_trainer(lr=0.2)
    result = trainer.train(train, val, epochs=3, metrics=["accuracy", "f1_score"])
    with torch.no_grad():
        predicted = torch.cat([trainer.model(inputs) for inputs, _ in val]).argmax(dim=1)
    targets = torch.cat([each for _, each in val])
    assert result.metrics["val_accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    assert result.metrics["val_f1_score"] == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert 0 < result.metrics["val_accuracy"] < 1


# A subclass's methods -------------------------------------------------------------------------------------


def subclass_with(**methods: Any) -> Trainer:
    made: type[Trainer] = type("Mine", (Trainer,), methods)
    model = tiny_model()
    return made(model, sgd(model), loss=nn.functional.cross_entropy)


async def async_step(self: Trainer, batch: object) -> None: ...


@pytest.mark.parametrize(
    ("methods", "error", "text"),
    [
        (
            {"training_step": lambda self, batch, batch_idx: None},
            ConfigError,
            "Mine.training_step must take (self, batch) and nothing else; self.step and self.epoch count; its "
            "signature is training_step(batch, batch_idx)",
        ),
        (
            {"validate_epoch": lambda self: None},
            ConfigError,
            "Mine.validate_epoch must take (self, loader) and nothing else; self.step and self.epoch count; its "
            "signature is validate_epoch()",
        ),
        (
            {"training_step": async_step},
            TypeError,
            "Mine.training_step is an async def; it runs in the training thread, where nothing can be awaited: make it "
            "a plain def",
        ),
        (
            {"on_train_epoch_end": lambda self: None},
            ConfigError,
            "Mine.on_train_epoch_end is never called: a trainer handles no events; subclass Callback and define "
            "on_epoch_end",
        ),
        (
            {"on_validation_end": lambda self: None},
            ConfigError,
            "Mine.on_validation_end is never called: a trainer handles no events; subclass Callback and define "
            "on_validation_end",
        ),
        (
            {"compute_loss": lambda self, model, inputs: None},
            ConfigError,
            "Mine.compute_loss is never called: use training_step(self, batch), which returns the loss",
        ),
    ],
)
def test_a_method_that_cannot_be_called_is_refused_at_once(
    methods: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        subclass_with(**methods)
    assert str(caught.value) == text


def test_methods_with_further_defaults_and_names_of_a_users_own_are_left_alone() -> None:
    def training_step(
        self: Trainer, batch: tuple[torch.Tensor, torch.Tensor], scale: float = 1.0
    ) -> torch.Tensor:
        return scale * nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    trainer = subclass_with(
        training_step=training_step, configure_optimizers=lambda self: None, test=1, fit=2
    )
    assert trainer.train(LOADER, epochs=1).status == "completed"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val_acc", "log('val_acc'): log adds train_ or val_ itself, so log 'acc'"),
        ("train/acc", "log('train/acc'): log adds train_ or val_ itself, so log 'acc'"),
        (
            "train_loss",
            "log('train_loss'): remove this call, the mean of the step's loss is logged automatically",
        ),
        (3, "log takes a name and a value; the name must be a string, got 3"),
    ],
)
def test_a_value_is_logged_under_its_bare_name(name: Any, text: str) -> None:
    def training_step(self: Trainer, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log(name, loss)
        return loss

    with pytest.raises((ValueError, TypeError)) as caught:
        subclass_with(training_step=training_step).train(LOADER, epochs=1)
    assert str(caught.value) == text


def test_callbacks_are_a_list() -> None:
    recorder: Any = Recorder()
    with pytest.raises(TypeError, match="callbacks must be a list of Callbacks, got Recorder"):
        Trainer(MODEL, sgd(MODEL), callbacks=recorder)
    with pytest.raises(TypeError, match="callbacks must be a list of Callbacks, got NoneType"):
        tiny_trainer().train(LOADER, epochs=1, callbacks=None)  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_trainer_is_not_copied(copied: Callable[[Any], object]) -> None:
    with pytest.raises(
        TypeError, match=r"cannot be copied or pickled: make another one, or save trainer\.state_dict"
    ):
        copied(tiny_trainer())


def test_an_attribute_that_a_run_does_not_have_cannot_be_set() -> None:
    trainer = tiny_trainer()
    trainer.train(LOADER, epochs=1)
    with pytest.raises(AttributeError, match="not stopped by an attribute"):
        trainer.last_run.should_stop = True  # type: ignore[union-attr]  # that is the test


def test_another_thread_may_publish_while_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run may be gone as soon as it was looked at."""

    class Ending:
        published: ClassVar[list[Event]] = []

        @property
        def run(self) -> "Ending | None":
            return None if next(looks) else self

        def publish(self, event: Event) -> None:
            self.published.append(event)

    looks = itertools.count()
    trainer = tiny_trainer()
    monkeypatch.setattr(trainer, "_occupancy", ending := Ending())
    trainer.publish(event := EpochStart())
    assert ending.published == [event]


@pytest.mark.parametrize("wrong", [{"a": 1}, Event, "epoch_end"])
def test_what_is_published_is_an_event(wrong: Any) -> None:
    def training_step(self: Trainer, batch: object) -> None:
        self.publish(wrong)

    with pytest.raises(EventError, match=r"publish takes an event, got (a|the class)"):
        subclass_with(training_step=training_step).train(LOADER, epochs=1)


def test_trainer_and_run_say_in_a_line_what_they_are_and_where_they_stand() -> None:
    shown: list[str] = []

    def training_step(self: Trainer, batch: Any) -> Any:
        shown.append(repr(self.last_run))
        return Trainer.training_step(self, batch)

    mine: type[Trainer] = type("Mine", (Trainer,), {"training_step": training_step})
    trainer = tiny_trainer(mine, run_name="first")
    assert repr(trainer) == "<Mine of Sequential with 195 parameters, SGD, on cpu>"
    trainer.train(LOADER[:2], epochs=1)
    assert shown == ["<Run first: running, epoch 0, step 0>", "<Run first: running, epoch 0, step 1>"]
    assert repr(trainer.last_run) == "<Run first: completed, epoch 1, step 2>"
    assert repr(trainer).endswith("SGD, on cpu; last run first: completed>")


def test_a_trainer_whose_own_init_has_failed_can_be_shown() -> None:
    assert repr(Trainer.__new__(Trainer)).startswith("<offloop.engine.trainer.Trainer object")
