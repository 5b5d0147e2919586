"""What a first mistake is answered with: one error, before or at the first step, that says what to write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from offloop.engine import BatchError, ConfigError, EmptyLoaderError, EventError, Trainer
from offloop.engine.testing import tiny_loader, tiny_trainer

INPUTS, CLASSES = torch.randn(8, 4), torch.arange(8) % 3
BATCH = (INPUTS, CLASSES)
cross_entropy = torch.nn.functional.cross_entropy


def trainer_of(model: torch.nn.Module | None = None, **knobs: Any) -> Trainer:
    model = model or torch.nn.Linear(4, 3)
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", **knobs)


# A loss that is missing ----------------------------------------------------------------------------


class Takes(torch.nn.Module):
    """Takes named tensors, returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels)  # type: ignore[no-any-return]  # a module's call is untyped


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (None, BATCH, r"Linear.forward\(input\) cannot take a tuple of 2: .* Give Trainer\(loss=...\)"),
        (
            Takes(),
            {"pixels": INPUTS, "labels": CLASSES},
            r"Takes.forward\(pixels\) cannot take a dict with keys",
        ),
        (None, INPUTS, r"returned a tensor of shape \(8, 3\), float32 .* no loss: give Trainer\(loss=...\)"),
    ],
)
def test_a_loss_that_is_missing(model: Any, batch: Any, words: str) -> None:
    with pytest.raises(BatchError, match=words):
        trainer_of(model).train([batch], epochs=1)
    with pytest.raises(BatchError, match=words):
        trainer_of(model).evaluate([batch])


def test_what_a_model_raises_itself_stays_what_it_is() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            raise TypeError("from inside")

    with pytest.raises(TypeError, match="from inside") as caught:
        trainer_of(Broken()).train([BATCH], epochs=1)
    assert not isinstance(caught.value, BatchError)


# Outputs and targets that do not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "targets", "words"),
    [
        (
            cross_entropy,
            CLASSES.float(),
            "targets: a tensor of shape (8,), float32. Class indices are integers",
        ),
        (cross_entropy, CLASSES.int(), "int32. Class indices are integers of 64 bits: give targets.long()"),
        (cross_entropy, CLASSES[:, None], "(8, 1), int64. Class indices have no dimension of classes"),
        (
            cross_entropy,
            CLASSES + 1,
            "The targets reach from 1 to 3, and 3 outputs stand for the classes 0 to 2",
        ),
        (cross_entropy, CLASSES - 1, "The targets reach from -1 to 1"),
        (
            torch.nn.functional.binary_cross_entropy_with_logits,
            torch.ones(8, 3, dtype=torch.int64),
            "Losses of numbers take floats: give targets.float()",
        ),
        (torch.nn.functional.mse_loss, "eight", "outputs: a tensor of shape (8, 3), float32; targets: a str"),
    ],
)
def test_the_error_of_a_loss_names_shapes_and_dtypes(
    loss: Callable[..., Any], targets: Any, words: str
) -> None:
    with pytest.raises(Exception) as caught:
        trainer_of(loss=loss).train([(INPUTS, targets)], epochs=1)
    (note,) = [each for each in caught.value.__notes__ if "loss(outputs, targets)" in each]
    assert words in note


def test_targets_that_lack_a_dimension() -> None:
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    with pytest.raises(ValueError, match="must be the same") as caught:
        trainer_of(torch.nn.Linear(4, 1), loss=loss).train([(INPUTS, torch.ones(8))], epochs=1)
    assert any("give targets.view(8, 1), or outputs.squeeze(-1)" in each for each in caught.value.__notes__)


def test_outputs_that_are_no_tensor() -> None:
    class Pair(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> Any:
            return {"logits": super().forward(inputs)}

    with pytest.raises(TypeError) as caught:
        trainer_of(Pair(4, 3), loss=cross_entropy).train([BATCH], epochs=1)
    assert any("override training_step" in each for each in caught.value.__notes__)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            INPUTS.numpy(),
            "the model was given inputs: a ndarray. Models take tensors: torch.from_numpy makes them",
        ),
        (("a", "b"), "given inputs: a tuple of 2. Models take tensors: give the DataLoader a collate_fn"),
        (torch.randn(8, 5), "the model was given inputs: a tensor of shape (8, 5), float32"),
        (INPUTS.double(), "(8, 4), float64. Weights are float32 by default: give inputs.float()"),
    ],
)
def test_the_error_of_a_model_names_what_it_was_given(inputs: Any, words: str) -> None:
    with pytest.raises((TypeError, RuntimeError)) as caught:
        trainer_of(loss=cross_entropy).train([(inputs, CLASSES)], epochs=1)
    assert any(words in each for each in caught.value.__notes__)


def test_a_step_that_has_called_backward_itself() -> None:
    class Steps(Trainer):
        def training_step(self, batch: Any) -> Any:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            loss.backward()
            return loss

    model = torch.nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match="a second time") as caught:
        Steps(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu").train([BATCH], epochs=1)
    assert any("set automatic_optimization = False" in each for each in caught.value.__notes__)


def test_a_step_that_takes_the_optimizers_for_a_method() -> None:
    class Calls(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> Any:
            self.optimizers()  # type: ignore[operator]  # the mistake

    model = torch.nn.Linear(4, 3)
    with pytest.raises(TypeError, match="not callable") as caught:
        Calls(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu").train([BATCH], epochs=1)
    assert any("self.optimizers['name']" in each for each in caught.value.__notes__)


def test_a_step_of_several_optimizers_that_names_none() -> None:
    class Nameless(Trainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> Any:
            self.optimizer_step()

    model = torch.nn.Linear(4, 3)
    both = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name in "gd"}
    with pytest.raises(ConfigError, match=r"which optimizer\? Give its name, one of g, d"):
        Nameless(model, both, device="cpu").train([BATCH], epochs=1)


# Arguments -----------------------------------------------------------------------------------------


def test_a_trainer_without_an_optimizer() -> None:
    with pytest.raises(
        TypeError, match=r"needs optimizer, like torch\.optim\.AdamW\(model\.parameters\(\), lr=1e-3\)"
    ):
        Trainer(torch.nn.Linear(4, 3))  # type: ignore[call-arg]  # the mistake


@pytest.mark.parametrize(
    "loader", [BATCH, (INPUTS.numpy(), CLASSES.numpy()), INPUTS, INPUTS.numpy()], ids=type
)
def test_whole_tensors_in_place_of_a_loader(loader: Any) -> None:
    with pytest.raises(
        TypeError, match=r"DataLoader\(TensorDataset\(inputs, targets\), batch_size=32\) makes them"
    ):
        trainer_of(loss=cross_entropy).train(loader, epochs=1)


def test_a_list_of_whole_tensors() -> None:
    with pytest.raises(BatchError, match=r"list of whole tensors or arrays: DataLoader\(TensorDataset"):
        trainer_of(loss=cross_entropy).train([INPUTS, CLASSES], epochs=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda trainer: trainer.train([BATCH], 3), "val_loader must be iterable over batches, got int"),
        (
            lambda trainer: trainer.train([BATCH], epochs=1, metrics="accuracy"),
            r"write metrics=\['accuracy'\]",
        ),
        (
            lambda trainer: trainer.train([BATCH], [tiny_loader(), tiny_loader()], epochs=1),
            r'val_loader must be one loader, or several by name, like \{"first": .* got a list of 2 loaders',
        ),
        (lambda trainer: trainer.evaluate((tiny_loader(),)), "loader must be one loader, or several by name"),
        (
            lambda trainer: trainer.train({"a": tiny_loader(), "b": tiny_loader()}, epochs=1),
            r"train_loader must be one loader, got a dict of 2 loaders: an epoch over several is a train_epoch",
        ),
        (
            lambda trainer: trainer.evaluate([BATCH], prefix="test"),
            """prefix='test' makes keys like "testloss": write prefix="test_\"""",
        ),
        (
            lambda trainer: trainer.train([BATCH], epochs=1, metrics={"val": "accuracy"}),
            r"names go into a list, like \['accuracy'\]",
        ),
        (lambda trainer: trainer_of(batchsize=len), "did you mean batch_size"),
        (lambda trainer: trainer_of(precision="fp16"), "got 'fp16'; '16-mixed' is meant"),
        (lambda trainer: trainer_of(precision=torch.bfloat16), "'bf16-mixed' is meant"),
        (lambda trainer: trainer_of(loss="mse"), r"like torch\.nn\.functional\.cross_entropy, got str"),
    ],
)
def test_what_is_tried_first(call: Callable[[Any], Any], words: str) -> None:
    with pytest.raises((TypeError, AttributeError, ConfigError), match=words):
        call(trainer_of(loss=cross_entropy))


def test_a_data_set_of_single_samples() -> None:
    class Table(list[Any]):
        column_names = ("text", "label")

    with pytest.raises(TypeError, match=r'DataLoader\(dataset.with_format\("torch"\)'):
        trainer_of(loss=cross_entropy).train(Table([{"label": 1}]), epochs=1)


def test_an_event_that_is_a_mapping() -> None:
    class Publishes(Trainer):
        def training_step(self, batch: Any) -> Any:
            self.publish({"loss": 1.0})  # type: ignore[arg-type]  # the mistake

    model = torch.nn.Linear(4, 3)
    with pytest.raises(
        EventError, match=r"got a dict: .*log\(name, value\).*class Mine\(Event, frozen=True\)"
    ):
        Publishes(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu").train([BATCH], epochs=1)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    with pytest.raises(
        ConfigError, match=r"2 parameters of the model, 'weight' first, are on the device meta"
    ):
        trainer_of(model)


# Loaders without a batch ---------------------------------------------------------------------------


class Nothing(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError


def test_a_loader_that_drops_all_it_has() -> None:
    loader = DataLoader(TensorDataset(INPUTS[:5], CLASSES[:5]), batch_size=8, drop_last=True)
    with pytest.raises(
        EmptyLoaderError, match=r"its 5 samples are fewer than batch_size=8; give drop_last=False"
    ):
        trainer_of(loss=cross_entropy).train(loader, epochs=1)
    with pytest.raises(EmptyLoaderError, match=r"^val_loader is empty: its data set has no sample"):
        trainer_of(loss=cross_entropy).train([BATCH], DataLoader(Nothing(), batch_size=8), epochs=1)


def test_a_generator_that_a_validation_has_used_up() -> None:
    with pytest.raises(
        EmptyLoaderError, match="val_loader gave no batch when it was read again: is it a generator"
    ):
        trainer_of(loss=cross_entropy).train([BATCH], (each for each in [BATCH]), epochs=2)


# Stopping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["should_stop", "stop_training"])
def test_an_attribute_stops_no_run(name: str) -> None:
    trainer = tiny_trainer()
    with pytest.raises(AttributeError, match=r'call self\.stop\("why"\) in a step'):
        setattr(trainer, name, True)
    with pytest.raises(AttributeError, match=r'call self\.stop\("why"\) in a step'):
        getattr(trainer, name)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_stops_its_run_after_itself(accumulated: int) -> None:
    class Stops(Trainer):
        def training_step(self, batch: Any) -> Any:
            if self.step == 2:
                self.stop("seen enough")
            return cross_entropy(self.model(batch[0]), batch[1])

    model = torch.nn.Linear(4, 3)
    trainer = Stops(
        model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", accumulate_grad_batches=accumulated
    )
    result = trainer.train([BATCH] * 20, epochs=3)
    assert (result.status, result.reason, result.steps, result.epochs) == ("stopped", "seen enough", 3, 0)


def test_an_epoch_stops_its_run() -> None:
    class Stops(Trainer):
        def train_epoch(self, loader: Any) -> None:
            for batch in self.batches(loader):
                self.train_batch(batch)
                if self.step == 1:
                    self.stop()

    model = torch.nn.Linear(4, 3)
    trainer = Stops(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", loss=cross_entropy)
    result = trainer.train([BATCH] * 5, epochs=3)
    assert (result.status, result.steps) == ("stopped", 1)


def test_a_trainer_without_a_run_cannot_be_stopped() -> None:
    with pytest.raises(RuntimeError, match="stop works during a run"):
        tiny_trainer().stop("too early")
    assert tiny_trainer().train(tiny_loader(1), epochs=1).status == "completed"
