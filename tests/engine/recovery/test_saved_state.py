"""engine/recovery/saved_state.py: wrong content with the right checksum is an error that names file and field."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.engine.checkpoint import CheckpointCorruptError, CheckpointIncompatibleError, CheckpointReader
from offloop.engine.recovery.saved_state import check_kinds, check_state, restoring

FIXTURE = Path(__file__).parent.parent / "checkpoint" / "fixtures" / "format_1" / "a_run"
PLACE = Path("run/checkpoints/step-000000005-a0")


@pytest.fixture(scope="module")
def saved() -> Any:
    return CheckpointReader(FIXTURE).load().state


def put(*keys: Any, value: object) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def test_state_of_an_earlier_version_is_what_it_was(saved: Any) -> None:
    assert check_state(saved, PLACE) is saved


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (put("position", "step", value="5"), "state.json:position.step"),
        (put("position", "epoch", value=-1), "state.json:position.epoch"),
        (put("position", "batch", value=2**64), "state.json:position.batch"),
        (drop("position", "last_lr"), "state.json:position"),
        (put("phase", value="asleep"), "state.json:phase"),
        (put("random", "torch", value=[1, 2]), "state.json:random.torch"),
        (put("random", "python", value=[3, ["a"], None]), "state.json:random.python[1][0]"),
        (put("optimizers", value=[]), "state.json:optimizers"),
        (
            put("optimizers", "optimizer", "param_groups", value=None),
            "state.json:optimizers[...].param_groups",
        ),
        (put("loader", "before", "has_workers", value="no"), "state.json:loader.before.has_workers"),
        (put("history", value=[7]), "state.json:history[0]"),
        (put("means", "sums", "loss", value="high"), "state.json:means.sums[...]"),
        (put("callbacks", value={"EarlyStopping": 3}), "state.json:callbacks[...]"),
    ],
)
def test_wrong_field_is_named(saved: Any, change: Callable[[Any], None], field: str) -> None:
    state = copy.deepcopy(saved)
    change(state)
    with pytest.raises(CheckpointCorruptError) as caught:
        check_state(state, PLACE)
    assert (caught.value.item, caught.value.path) == (field, PLACE)


@pytest.mark.parametrize("name", sorted(CheckpointReader(FIXTURE).load().state))  # type: ignore[call-overload]
def test_missing_field_is_named(saved: Any, name: str) -> None:
    if name == "metrics":  # only a run with metrics has it
        return
    with pytest.raises(CheckpointCorruptError, match=f"missing required field `{name}`"):
        check_state({key: value for key, value in saved.items() if key != name}, PLACE)


@pytest.mark.parametrize("state", [None, [], "state", 7])
def test_what_is_no_state_at_all_is_refused(state: object) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"state\.json"):
        check_state(state, PLACE)


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("b"), IndexError("c"), MemoryError("d")])
def test_part_that_cannot_be_put_back_is_named(error: Exception) -> None:
    with pytest.raises(CheckpointCorruptError, match=type(error).__name__) as caught:
        with restoring(PLACE, "schedulers.0"):
            raise error
    assert caught.value.item == "state.json:schedulers.0"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("part", ["model", "optimizers.optimizer"])
def test_part_of_another_model_or_optimizer_says_what_to_do(part: str) -> None:
    with pytest.raises(CheckpointIncompatibleError, match="init_from=") as caught, restoring(PLACE, part):
        raise RuntimeError("size mismatch for 0.weight")
    assert "size mismatch for 0.weight" in str(caught.value)


def test_kinds_of_values_are_compared_as_deep_as_both_go() -> None:
    live = {"last_epoch": 0, "base_lrs": [0.1], "inner": {"best": None, "mode": "min"}, "own": torch.zeros(1)}
    fine = {"last_epoch": 2.0, "base_lrs": (1, 2), "inner": {"best": 0.5, "mode": "max", "new": []}, "own": 1}
    check_kinds(fine, live)
    for wrong, where in [
        ({"last_epoch": "2"}, "last_epoch is a str, not a int"),
        ({"base_lrs": 0.1}, "base_lrs is a float, not a list"),
        ({"base_lrs": [0.1, []]}, r"base_lrs\.1 is a list, not a float"),
        ({"inner": {"mode": 3}}, r"inner\.mode is a int, not a str"),
    ]:
        with pytest.raises(TypeError, match=where):
            check_kinds(wrong, live)
