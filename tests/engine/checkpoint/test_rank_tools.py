"""What works on checkpoints of one process works on those of several: weights, registry, copies, stores elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from format_fixtures import RUN
from typer.testing import CliRunner

from offloop.cli.main import app
from offloop.engine import ModelRegistry, export_model, load_model
from offloop.engine.checkpoint import CheckpointReader, CheckpointStore, NamedCopies, RemoteRun, Retention

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks."""
    shutil.copytree(FIXTURES / "format_2" / RUN, tmp_path / RUN)
    return tmp_path / RUN


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_weights_are_loaded_registered_and_exported(run: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(run)
    state: Any = reader.load().state
    expected = state[state["measured"]]
    weights = load_model(run)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    version = ModelRegistry(tmp_path / "models").register(run, "small")
    registered = load_model("small", registry=tmp_path / "models")
    assert all(torch.equal(registered[name], expected[name]) for name in expected)
    assert not [name for name in files(version.path) if name.startswith("rank")]
    export_model(run, tmp_path / "weights.safetensors")
    exported = load_model(tmp_path / "weights.safetensors")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_commands_take_them(run: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["checkpoints", "list", str(run)], env={"COLUMNS": "500"})
    assert listed.exit_code == 0 and "step-000000005-a0" in listed.output
    assert runner.invoke(app, ["checkpoints", "verify", str(run)]).exit_code == 0
    assert runner.invoke(app, ["checkpoints", "diff", str(run), str(run)]).exit_code == 0
    part = next((run / "checkpoints").iterdir()) / "rank-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    verified = runner.invoke(app, ["checkpoints", "verify", str(run)], env={"COLUMNS": "500"})
    assert verified.exit_code == 1 and "rank-00001-of-00002.safetensors" in verified.output


def test_named_copy_has_all_parts(run: Path, tmp_path: Path) -> None:
    with CheckpointStore(run, retention=Retention(keep_last=2)) as store:
        (info,) = store.checkpoints()
        NamedCopies(tmp_path / "copies", run, lambda info: "latest").mirror([info])
    reader = CheckpointReader(run)
    assert files(tmp_path / "copies" / "latest") == files(info.path)
    reader.verify(tmp_path / "copies" / "latest")
    assert [*reader.load(tmp_path / "copies" / "latest").parts] == [1]


def test_upload_and_download_have_all_parts(run: Path, tmp_path: Path) -> None:
    remote = RemoteRun(f"file://{tmp_path / 'elsewhere'}", RUN)
    (info,) = CheckpointReader(run).checkpoints()
    remote.upload_checkpoint(info, set())
    head = remote.head(info.name)
    assert head is not None and head.ranks == 2
    with CheckpointStore(tmp_path / "back") as store, store.receiving(info.name) as directory:
        remote.download_checkpoint(info.name, directory)
    back = CheckpointReader(tmp_path / "back").load()
    assert files(back.info.path) == files(info.path)
    assert [*back.parts] == [1]
