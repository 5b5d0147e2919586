"""engine/config.py: every knob is checked once, and what cannot work says why."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offloop.engine import ConfigError, TrainerConfig
from offloop.engine.config import TRAIN_ARGUMENTS, check_limits, misplaced_argument
from offloop.engine.encoding import decode, encode
from offloop.engine.events import Settings, TrainStart

KNOBS = TrainerConfig.__struct_fields__

BAD_VALUES: list[tuple[str, Any, str]] = [
    *(
        (name, value, "must be a whole number of at least 1")
        for name in (
            "epochs",
            "max_steps",
            "accumulate_grad_batches",
            "val_every_n_epochs",
            "val_every_n_steps",
        )
        for value in (0, -1, 1.5, True, "2")
    ),
    ("accumulate_grad_batches", None, "must be a whole number of at least 1"),
    *(
        (name, value, "must be a finite number of seconds above 0")
        for name in ("max_time", "switch_interval", "flush_interval", "drain_timeout")
        for value in (0, -0.1, math.nan, math.inf, True, "1")
    ),
    *(
        ("gradient_clip_val", value, "must be a finite number above 0")
        for value in (0, -0.1, math.nan, math.inf, True, "1")
    ),
    ("flush_interval", None, "must be a finite number of seconds above 0"),
    ("drain_timeout", None, "must be a finite number of seconds above 0"),
    ("deterministic", None, "must be True or False"),
    *(
        (name, value, "must be a number of batches (int of at least 1) or a share of them")
        for name in ("limit_train_batches", "limit_val_batches")
        for value in (0, -1, 0.0, 1.5, math.nan, True, "10%")
    ),
    ("precision", "bf16", "must be '32-true', 'bf16-mixed' or '16-mixed'"),
    ("precision", 16, "must be '32-true', 'bf16-mixed' or '16-mixed'"),
    ("gradient_clip_algorithm", "l2", "must be 'norm' or 'value'"),
    ("on_nonfinite", "ignore", "must be 'raise', 'warn' or 'skip_step'"),
    ("scheduler_interval", "batch", "must be 'epoch' or 'step'"),
    ("mode", "maximum", "must be 'auto', 'min' or 'max'"),
    ("mode", ["min"], "must be 'auto', 'min' or 'max'"),
    ("device", 0, 'must be a torch.device or a string like "auto", "cpu" or "cuda:0"'),
    ("seed", 1.0, "must be an int from -2**63 to 2**64 - 1, or None"),
    ("seed", True, "must be an int from -2**63 to 2**64 - 1, or None"),
    ("seed", 2**64, "must be an int from -2**63 to 2**64 - 1, or None"),
    ("compile", "inductor", "must be a bool or a dict of torch.compile's arguments"),
    ("monitor", "", "must be a string that is not empty"),
    ("run_dir", 3, "must be a path or a string that is not empty"),
    ("run_name", "a/b", "names a directory: no slashes, no leading dot"),
    ("run_name", "..", "names a directory: no slashes, no leading dot"),
    ("run_name", " ", "must not begin or end with a space"),
    ("run_name", "first ", "must not begin or end with a space"),
    ("run_name", "a\nb", "must be one line without invisible characters, got U+000A"),
    ("run_name", "a\u202eb", "must be text without invisible characters, got U+202E"),
    ("run_name", "a\ud800", "must be text without invisible characters, got U+D800"),
    ("run_name", "é" * 101, "names a directory: at most 200 bytes in UTF-8, got 202"),
]


@pytest.mark.parametrize(("name", "value", "legal"), BAD_VALUES)
def test_a_bad_value_is_refused_with_knob_value_and_what_is_legal(name: str, value: Any, legal: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name} {legal}")
    assert repr(value) in text


GOOD_VALUES: list[tuple[str, Any]] = [
    ("epochs", 1),
    ("max_time", 1),
    ("limit_train_batches", 1),
    ("limit_val_batches", 1.0),
    ("seed", -(2**63)),
    ("seed", 2**64 - 1),
    ("compile", {"backend": "eager"}),
    ("run_name", "mine v1.2"),
    ("run_name", "é" * 100),
]


@pytest.mark.parametrize(("name", "value"), GOOD_VALUES)
def test_the_ends_of_a_range_are_legal(name: str, value: Any) -> None:
    assert getattr(TrainerConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("run_dir", Path("runs") / "mine", "runs/mine"), ("device", torch.device("cpu"), "cpu")],
)
def test_paths_and_devices_are_taken_too_and_kept_as_text(name: str, value: Any, text: str) -> None:
    config = TrainerConfig(**{name: value})
    assert getattr(config, name) == text
    assert getattr(config.replace(epochs=3), name) == text


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["bf16-mixed", "norm", "warn", "step", "min", "auto"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(name=st.sampled_from(KNOBS), value=anything)
def test_any_value_is_taken_as_it_is_or_refused_by_the_name_of_its_knob(name: str, value: Any) -> None:
    try:
        config = TrainerConfig(**{name: value})
    except ConfigError as error:
        assert str(error).startswith(name)
    else:
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_grad_norm", "gradient_clip_val"),
        ("max_epochs", "epochs"),
        ("gradient_accumulation_steps", "accumulate_grad_batches"),
        ("lr_scheduler", "scheduler"),
        ("criterion", "loss"),
        ("learning_rate", "optimizer"),
    ],
)
def test_a_peers_knob_is_refused_with_ours(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig().replace(**{name: 1})
    assert str(caught.value) == f"there is no knob {name!r}: use {meant}"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("acumulate_grad_batches", "accumulate_grad_batches"),
        ("gradient_clip_value", "gradient_clip_val"),
        ("devise", "device"),
        ("callback", "callbacks"),
    ],
)
def test_a_misspelt_knob_is_refused_with_the_one_that_was_probably_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig().replace(**{name: 1})
    assert str(caught.value) == f"there is no knob {name!r}: did you mean {meant}?"


def test_a_knob_like_no_other_is_refused_with_all_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig().replace(zzz=1)
    assert all(name in str(caught.value) for name in KNOBS)


@pytest.mark.parametrize("name", ["metrics", "train_loader", "val_loader", "resume"])
def test_what_belongs_to_train_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} belongs to train\(\)"):
        TrainerConfig().replace(**{name: 1})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("precision", "precision says how to train: give it to Trainer(precision=...), not to train()"),
        ("max_grad_norm", "max_grad_norm says how to train: give it to Trainer(gradient_clip_val=...), not"),
        ("notes", "notes is of all runs of a trainer: give it to Trainer(note=...), not to train()"),
        ("tags", "tags is of all runs of a trainer: give it to Trainer(tags=...), not to train()"),
        ("loss_fn", "loss_fn says how to train: give it to Trainer(loss=...), not to train()"),
        ("max_epochs", "train() takes no 'max_epochs': use epochs"),
        ("metric", "train() takes no 'metric': use metrics"),
        ("val_dataloader", "train() takes no 'val_dataloader': use val_loader"),
        ("validation_loader", "train() takes no 'validation_loader': did you mean val_loader?"),
        ("shuffle", "train() takes no 'shuffle': give it to the DataLoader"),
        ("precission", "train() takes no 'precission': did you mean Trainer(precision=...)?"),
        ("zzz", "train() takes no 'zzz': legal are train_loader, val_loader, epochs"),
    ],
)
def test_a_knob_given_to_train_is_sent_where_it_belongs(name: str, text: str) -> None:
    legal = ("train_loader", "val_loader", *TRAIN_ARGUMENTS)
    assert str(misplaced_argument("train", name, legal)).startswith(text)


def test_replace_checks_like_a_new_one_and_leaves_the_first_alone() -> None:
    config = TrainerConfig(seed=1)
    assert config.replace(gradient_clip_val=0.5) == TrainerConfig(seed=1, gradient_clip_val=0.5)
    assert config == TrainerConfig(seed=1)
    with pytest.raises(ConfigError, match="gradient_clip_val must be a finite number above 0, got -1"):
        config.replace(gradient_clip_val=-1)


def test_settings_ride_on_an_event() -> None:
    config = TrainerConfig(compile={"backend": print, "options": {"level": (1, 2)}}, limit_train_batches=0.5)
    settings = Settings(config.as_settings())
    assert set(settings) == set(KNOBS) - {"hyperparameters", "tags", "note"}
    event = decode(encode(TrainStart(config=settings)))
    assert isinstance(event, TrainStart)
    assert event.config["compile"] == {"backend": repr(print), "options": {"level": [1, 2]}}
    assert event.config["limit_train_batches"] == 0.5


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ((None, None, None), "nothing says when to stop: give epochs, max_steps or max_time"),
        ((0, None, None), "epochs must be a whole number of at least 1, got 0"),
        ((None, 1.5, None), "max_steps must be a whole number of at least 1, got 1.5"),
        ((None, None, math.inf), "max_time must be a finite number of seconds above 0, got inf"),
    ],
)
def test_limits_are_checked(limits: tuple[Any, Any, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_limits(*limits)
    assert str(caught.value) == text


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        TrainerConfig().seed = 1  # type: ignore[misc]  # that is the test
    assert msgspec.structs.asdict(TrainerConfig(epochs=2))["epochs"] == 2


def test_hyperparameters_are_copied_as_plain_values() -> None:
    given = {"width": 16, "data": {"path": Path("corpus"), "folds": (1, 2)}, "note": None}
    config = TrainerConfig(hyperparameters=given)
    given["width"] = 17
    plain = {"width": 16, "data": {"path": "corpus", "folds": [1, 2]}, "note": None}
    assert config.hyperparameters == plain
    assert config.replace(epochs=3).hyperparameters == plain


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([1], r"must be a mapping of names to values, like vars\(args\) of argparse .*, got list"),
        ({1: 2}, "hyperparameters has the key 1; names must be strings"),
        ({"data": {"": 2}}, r"hyperparameters\['data'\] has the key ''"),
        ({"sizes": [1, {2}]}, r"hyperparameters\['sizes'\]\[1\] must be a number, .*, got \{2\}; str\("),
    ],
)
def test_hyperparameters_that_cannot_be_written_down_are_refused(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TrainerConfig(hyperparameters=given)
