"""Other libraries' spelling of arguments and names is refused, with ours, in one line."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import offloop.callbacks
from offloop.dashboard import Dashboard
from offloop.engine import Callback, ConfigError, Trainer, TrainerConfig
from offloop.engine.argument_hints import (
    ADVICE,
    ATTRIBUTES,
    HANDLERS,
    PEER_SPELLINGS,
    UNCALLED,
    explains_arguments,
)
from offloop.engine.events import known_events
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_model, tiny_trainer

CALLBACKS: list[Any] = [
    *(
        each
        for each in (getattr(offloop.callbacks, name) for name in offloop.callbacks.__all__)
        if issubclass(each, Callback)
    ),
    Dashboard,
]


def arguments_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def line_of(raised: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(raised.value)
    assert text and "\n" not in text
    return text


# The tables ------------------------------------------------------------------------------------


def test_every_spelling_of_a_peer_leads_to_an_argument_that_exists() -> None:
    rules = (offloop.callbacks.Above, offloop.callbacks.Spike)
    there = set(TrainerConfig.__struct_fields__)
    for each in (Trainer, Trainer.train, *rules, *CALLBACKS):
        there |= arguments_of(each)
    for spelled, meant in PEER_SPELLINGS.items():
        assert set(meant.split()) <= there, spelled
        assert spelled not in meant.split()


def test_no_knob_of_ours_is_taken_for_a_peers() -> None:
    assert not {*PEER_SPELLINGS, *ADVICE} & set(TrainerConfig.__struct_fields__) - {
        "run_name",  # of loggers
        "hyperparameters",
    }


def test_every_handler_and_method_of_a_peer_is_none_of_ours() -> None:
    events = {event.handler_name for event in known_events()}
    assert not set(HANDLERS) & events
    assert {meant for meant in HANDLERS.values() if "@in_step" not in meant} <= events
    for name in UNCALLED:
        assert not hasattr(Trainer, name)


# Arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "given", "text"),
    [
        ("EarlyStopping", {"restore_best_weights": True}, "use restore_best"),
        ("EarlyStopping", {"patiense": 3}, "did you mean patience?"),
        ("EarlyStopping", {"verbose": True}, "add ProgressBar() to callbacks to show progress"),
        ("ModelCheckpoint", {"dirpath": "models"}, "use save_dir"),
        ("ModelCheckpoint", {"every_n_train_steps": 100}, "use every_n_steps"),
        ("ModelCheckpoint", {"save_total_limit": 3}, "use keep_last"),
        ("MetricLogger", {"save_dir": "logs"}, "files are in the run's directory: Trainer(run_dir=...)"),
        ("TensorBoardLogger", {"save_dir": "logs"}, "use log_dir"),
        ("MLflowLogger", {"tracking_url": "x"}, "use tracking_uri"),
        ("ProgressBar", {"refresh_rate": 10}, "legal are metrics, file"),
        ("WeightAverage", {"ema_decay": 0.9}, "use decay"),
    ],
)
def test_a_callbacks_unknown_argument_is_answered(make: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        getattr(offloop.callbacks, make)(**given)
    (name,) = given
    assert line_of(raised) == f"{make}() takes no {name!r}: {text}"


def hands_on(make: Any) -> bool:
    """True if it hands further arguments on, and checks them itself."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(make).parameters.values())


@pytest.mark.parametrize(
    "make", [make for make in CALLBACKS if not hands_on(make)], ids=lambda make: make.__name__
)
def test_every_callback_answers(make: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{make.__name__}\(\) takes no 'no_such_argument': "):
        make(no_such_argument=1)


def test_a_constructor_says_what_is_missing_and_what_is_too_much() -> None:
    class Mine:
        @explains_arguments()
        def __init__(self, every: int, *, loud: bool = False) -> None:
            self.every, self.loud = every, loud

    assert Mine(3, loud=True).every == 3
    with pytest.raises(ConfigError, match=r"Mine\(\) takes no 'lud': did you mean loud\?"):
        Mine(3, lud=True)  # type: ignore[call-arg]  # tested
    with pytest.raises(TypeError, match=r"Mine\(\) takes only every by position, got 2; by name: loud="):
        Mine(3, True)  # type: ignore[call-arg]  # tested
    with pytest.raises(TypeError, match=r"Mine\(\) needs every"):
        Mine()  # type: ignore[call-arg]  # tested


def test_a_type_error_from_inside_is_left_alone() -> None:
    class Mine:
        @explains_arguments()
        def __init__(self, path: str) -> None:
            len(5)  # type: ignore[arg-type]  # tested

    with pytest.raises(TypeError, match="has no len"):
        Mine("x")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda trainer: trainer.train(val_loader=[1], epochs=1),
            "train() needs train_loader, like DataLoader(TensorDataset(inputs, targets), batch_size=32)",
        ),
        (
            lambda trainer: trainer.train(tiny_loader(), None, 3),
            "train() takes only train_loader, val_loader by position, got 3; by name: epochs=, max_steps=, max_time=, "
            "metrics=, callbacks=, resume=, resume_lr=, init_from=, init_strict=",
        ),
        (
            lambda trainer: trainer.start(tiny_loader(), max_epochs=1),
            "start() takes no 'max_epochs': use epochs",
        ),
        (
            lambda trainer: type(trainer)(trainer.model),
            "Trainer() needs optimizer, like torch.optim.AdamW(model.parameters(), lr=1e-3)",
        ),
        (
            lambda trainer: type(trainer)(max_epochs=3),
            "Trainer() needs model and optimizer, like torch.optim.AdamW(model.parameters(), lr=1e-3)",
        ),
        (
            lambda trainer: type(trainer)(trainer.model, trainer.optimizer, devices=2),
            "there is no knob 'devices': torchrun --nproc-per-node starts a process for each device; device names one",
        ),
        (
            lambda trainer: type(trainer)(trainer.model, trainer.optimizer, num_nodes=2),
            "there is no knob 'num_nodes': start the script with torchrun --nnodes on each machine",
        ),
    ],
)
def test_a_call_of_the_trainer_that_does_not_fit_is_answered(call: Any, text: str) -> None:
    with pytest.raises((ConfigError, TypeError)) as raised:
        call(tiny_trainer())
    assert line_of(raised) == text


@pytest.mark.anyio
async def test_an_async_call_that_does_not_fit_is_answered() -> None:
    assert inspect.iscoroutinefunction(tiny_trainer().train_async)  # applications ask
    with pytest.raises(ConfigError, match=r"^train_async\(\) takes no 'max_epochs': use epochs$"):
        await tiny_trainer().train_async(tiny_loader(), max_epochs=1)  # type: ignore[call-arg]  # tested
    with pytest.raises(ConfigError, match=r"^precision says how to train: give it to Trainer\(precision="):
        await tiny_trainer().train_async(tiny_loader(), precision="32-true")  # type: ignore[call-arg]  # tested


def test_signatures_are_what_they_were() -> None:
    @explains_arguments()
    def add(self: object, left: int, *rest: int, right: int = 2) -> int:
        """Add."""
        return left + sum(rest) + right

    assert add(None, 1, 5, right=3) == 9
    assert list(inspect.signature(add).parameters) == ["self", "left", "rest", "right"]
    assert add.__doc__ == "Add."
    with pytest.raises(TypeError, match="multiple values for argument 'left'"):  # Python says it best
        add(None, 1, left=1)  # type: ignore[misc]  # tested


# Names -----------------------------------------------------------------------------------------


def test_an_error_of_a_property_keeps_its_words() -> None:
    nets = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    trainer = Trainer(nets, {name: torch.optim.SGD(net.parameters(), lr=1.0) for name, net in nets.items()})
    with pytest.raises(AttributeError, match=r"there are several: self\.optimizers has a, b"):
        trainer.optimizer  # noqa: B018 - tested


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("on_train_begin", "on_train_start"),
        ("on_epoch_begin", "on_epoch_start"),
        ("on_train_epoch_end", "on_epoch_end"),
        ("on_train_batch_end", "on_step_end"),
        ("on_before_optimizer_step", "before_optimizer_step, with @in_step above it"),
    ],
)
def test_a_handler_of_a_peer_is_answered(name: str, meant: str) -> None:
    callback = type("Mine", (Callback,), {name: lambda self, event, run: None})()
    with pytest.raises(ConfigError) as raised:
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[callback])
    assert line_of(raised) == f"Mine.{name} handles no known event: use {meant}"


# Blocks ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_block_that_is_not_entered_by_async_with_says_how() -> None:
    trainer, loader = tiny_trainer(), tiny_loader()
    block: Any = trainer.start(loader, epochs=1)
    usage = r"async with trainer\.start\(\.\.\.\) as run"
    with pytest.raises(TypeError, match=usage):
        await block
    with pytest.raises(TypeError, match=usage), block:
        pass
    with pytest.raises(AttributeError, match=usage):
        block.wait()
    stream: Any = trainer.predict_async(loader)
    with pytest.raises(TypeError, match=r"async with trainer\.predict_async\(loader\) as stream"):
        async for _ in stream:
            pass
    async with trainer.start(loader, epochs=1) as run:
        assert (await run.wait()).status == "completed"


@pytest.mark.anyio
async def test_a_subclass_that_does_not_call_our_init_is_told_so() -> None:
    class Mine(Trainer):
        def __init__(self) -> None:
            self.model = torch.nn.Linear(1, 1)

    wanted = r"Mine\.__init__ must call super\(\)\.__init__\(model, optimizer"
    with pytest.raises(ConfigError, match=wanted):
        Mine().train(tiny_loader(), epochs=1)
    with pytest.raises(ConfigError, match=wanted):
        await Mine().train_async(tiny_loader(), epochs=1)
    with pytest.raises(ConfigError, match=wanted):
        Mine().start(tiny_loader(), epochs=1)


# Data ------------------------------------------------------------------------------------------


def test_tensors_in_the_place_of_a_loader_are_refused() -> None:
    inputs = torch.randn(8, 8)
    trainer = tiny_trainer()
    for wrong in (inputs, inputs.numpy()):
        with pytest.raises(TypeError) as raised:
            trainer.predict(wrong)
        assert "must give batches, got a " in line_of(raised)
        assert "DataLoader(TensorDataset(inputs, targets), batch_size=32)" in line_of(raised)
    assert len(trainer.predict(DataLoader(TensorDataset(inputs), batch_size=4))) == 2  # as it says


# Several processes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("ddp_find_unused_parameters_true", "find_unused_parameters=True"),
        ("fsdp", "no sharded parameters"),
        ("ddp_spawn", "torchrun --nproc-per-node"),
        ("DDP", '"auto" is DDP under torchrun'),
        (3, "got 3"),
    ],
)
def test_other_libraries_strategies_are_explained(strategy: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="strategy must be 'auto', 'none' or 'ddp'") as raised:
        TrainerConfig(strategy=strategy)
    assert text in line_of(raised)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_other_libraries_attributes_of_a_trainer_are_explained(name: str) -> None:
    trainer = tiny_trainer()
    with pytest.raises(AttributeError) as raised:
        getattr(trainer, name)
    advice = ATTRIBUTES[name]
    assert line_of(raised) == f"'Trainer' object has no attribute {name!r}: {advice}"
    assert raised.value.name == name
    meant = re.match(r"use (\w+)", advice)
    assert meant is None or meant[1] in dir(trainer) or meant[1] == "Trainer"
    assert not hasattr(trainer, "anything_else")


def test_a_property_of_a_subclass_fails_with_its_own_error() -> None:
    class Mine(Trainer):
        @property
        def logger(self) -> Any:
            return self._missing  # type: ignore[attr-defined]  # the mistake

    model = torch.nn.Linear(2, 1)
    trainer = Mine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(AttributeError, match="_missing"):
        _ = trainer.logger


@pytest.mark.parametrize("name", ["append", "extend", "insert", "remove"])
def test_callbacks_and_optimizer_are_not_changed_afterwards(name: str) -> None:
    trainer: Any = tiny_trainer()
    wanted = r"give them to Trainer\(callbacks=\[\.\.\.\]\), or those of one run to train\("
    with pytest.raises(AttributeError, match=wanted):
        getattr(trainer.callbacks, name)
    with pytest.raises(AttributeError, match=f"callbacks of a trainer cannot be set: {wanted}"):
        trainer.callbacks = []
    with pytest.raises(AttributeError, match=r"optimizer of a trainer cannot be set: give it to Trainer\("):
        trainer.optimizer = None
    with pytest.raises(AttributeError, match=r"no attribute 'anything_else'$"):
        _ = trainer.callbacks.anything_else


def test_a_model_that_was_replaced_is_found_before_the_run() -> None:
    trainer = tiny_trainer()
    trainer.model = tiny_model()
    with pytest.raises(ConfigError, match="the optimizer holds 4 parameters that are not the model's"):
        trainer.train(tiny_batches(1), epochs=1)


def test_logging_with_an_argument_of_lightning_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"sync_dist.*those of all ranks already"):
        tiny_trainer().log("name", 1.0, sync_dist=True)  # type: ignore[call-arg]  # the mistake
