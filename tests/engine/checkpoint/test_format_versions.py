"""What earlier versions of the format wrote is read, and what later ones will write is told of."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import in_manifest
from format_fixtures import CUT, REQUEST, RUN, every_kind_of_value, train
from typer.testing import CliRunner, Result

from offloop.cli.main import app
from offloop.engine import Callback, Resumed, StepPoint, in_step
from offloop.engine.checkpoint import CheckpointIncompatibleError, CheckpointReader, CheckpointStore
from offloop.engine.checkpoint.manifest import FORMAT_VERSION, READER_VERSION
from offloop.engine.testing import Recorder

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.resolve_conj().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).tolist())


def assert_same_bits(found: Any, expected: Any) -> None:
    """Compare types, orders, signs of zeros, NaN and every bit of tensors."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits(found) == bits(expected)
    elif isinstance(expected, dict):
        assert [*found] == [*expected]
        assert_same_bits([*found.values()], [*expected.values()])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    else:
        assert repr(found) == repr(expected)


def test_there_is_a_fixture_of_every_version() -> None:
    assert [f"format_{number}" for number in range(1, FORMAT_VERSION + 1)] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoint_of_each_version_is_read_bit_for_bit(version: str) -> None:
    reader = CheckpointReader(FIXTURES / version / "every_kind")
    reader.verify("last")
    loaded = reader.load("good")
    state: Any = loaded.state
    assert_same_bits(state, every_kind_of_value())
    model = state["model"]
    assert model["tied"] is model["weight"]
    for name in ("transposed", "column"):
        assert model[name].untyped_storage().data_ptr() == model["weight"].untyped_storage().data_ptr()
    model["overlapping"][0][10] = -1.0
    assert model["overlapping"][1][0] == -1.0

    head = loaded.info.manifest
    for field in ("step", "epoch", "batch", "attempt", "run_id", "reason", "parent", "complete"):
        assert getattr(head, field) == getattr(REQUEST, field), field
    assert loaded.extra == REQUEST.extra
    metrics = loaded.info.metrics
    assert math.isnan(metrics.pop("nan"))
    assert metrics == {"val_loss": 0.1, "up": math.inf, "down": -math.inf}


@pytest.mark.parametrize("version", VERSIONS)
def test_run_of_each_version_goes_on(version: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / version / RUN, tmp_path / RUN)
    saved: Any = CheckpointReader(tmp_path / RUN).load().state
    found: dict[str, Any] = {}

    class Look(Callback):
        @in_step
        def before_forward(self, point: StepPoint) -> None:
            if not found:  # before anything has drawn or changed
                found["random"] = torch.get_rng_state()
                found["model"] = {name: each.clone() for name, each in point.model.state_dict().items()}
                found["optimizer"] = copy.deepcopy(point.optimizer.state_dict()["state"])

    recorder = Recorder()
    result = train(tmp_path, recorder, Look(), resume="must")
    assert (result.status, result.steps) == ("completed", 9)
    (resumed,) = recorder.of(Resumed)
    assert resumed.step == CUT
    assert_same_bits(found["model"], saved["model"])
    assert_same_bits(found["optimizer"], saved["optimizers"]["optimizer"]["state"])
    assert_same_bits(found["random"], saved["random"]["torch"])


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A run with a checkpoint that only a later offloop can read."""
    run = tmp_path / "runs" / RUN
    shutil.copytree(FIXTURES / VERSIONS[-1] / RUN, run)
    (path,) = (run / "checkpoints").iterdir()
    in_manifest("format_version", value=FORMAT_VERSION + 1)(path)
    in_manifest("min_reader", value=READER_VERSION + 1)(path)
    return run


def test_checkpoint_of_a_later_version_is_told_of_wherever_one_meets_it(newer: Path) -> None:
    """It is not called damaged, and nothing older is taken in its place."""
    text = f"needs format reader {READER_VERSION + 1}, this offloop has {READER_VERSION}. Update offloop"
    with pytest.raises(CheckpointIncompatibleError, match=text):
        CheckpointReader(newer).load("last", on_corrupt="fallback")
    with pytest.raises(CheckpointIncompatibleError, match=text):
        CheckpointStore(newer)
    for resume in ("auto", "must", CUT, str(newer)):
        with pytest.raises(CheckpointIncompatibleError, match=text):
            train(newer.parent, resume=resume)
    for command in ("list", "verify"):
        done = CliRunner().invoke(app, ["checkpoints", command, str(newer.parent)], env={"COLUMNS": "500"})
        assert done.exit_code == 2
        assert text in done.output
    assert [path.name for path in (newer / "checkpoints").iterdir()] == [f"step-{CUT:09}-a0"]


def test_run_of_a_later_version_does_not_hide_the_runs_beside_it(newer: Path) -> None:
    runs = newer.parent
    shutil.copytree(FIXTURES / VERSIONS[-1] / RUN, runs / "a-readable-one")
    text = f"needs format reader {READER_VERSION + 1}"

    def offloop(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["checkpoints", *arguments, str(runs)], env={"COLUMNS": "500"})

    listed = offloop("list")
    assert listed.exit_code == 0
    first, second = listed.stdout.split("\n\n")
    assert first.splitlines()[0] == str(runs / "a-readable-one") and f"step-{CUT:09}-a0" in first
    assert second.startswith(f"{newer}\ncannot be read: {newer}") and text in second
    plain = json.loads(offloop("list", "--json").stdout)
    assert [each["run"] for each in plain["checkpoints"]] == [str(runs / "a-readable-one")]
    assert [each["run"] for each in plain["unreadable"]] == [str(newer)]

    verified = offloop("verify")
    assert verified.exit_code == 2
    assert [line.split()[0] for line in verified.stdout.splitlines()] == ["ok", "unread", "1"]
    flip = next((runs / "a-readable-one" / "checkpoints").iterdir()) / "model.safetensors"
    content = bytearray(flip.read_bytes())
    content[-1] ^= 1
    flip.write_bytes(content)
    assert offloop("verify").exit_code == 1  # damage is what one must hear of


def test_later_version_that_this_reader_understands_is_read(newer: Path) -> None:
    (path,) = (newer / "checkpoints").iterdir()
    in_manifest("min_reader", value=READER_VERSION)(path)
    in_manifest("colour", value={"a": 1})(path)
    assert CheckpointReader(newer).load().info.step == CUT
