"""`offloop checkpoints` and `offloop models`: what they print, for people and for programs, and how they end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import offloop
from safetensors.torch import load_file

from offloop.callbacks import ModelCheckpoint
from offloop.cli.output import age, share, size
from offloop.engine import ModelRegistry
from offloop.engine.checkpoint import CheckpointReader, CheckpointStore
from offloop.engine.testing import tiny_loader, tiny_trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    for name, seed in (("first", 1), ("second", 2)):
        trainer = tiny_trainer(run_dir=str(directory / "runs"), run_name=name, seed=seed, seed_model=seed)
        trainer.train(tiny_loader(3), tiny_loader(2), epochs=2, callbacks=[ModelCheckpoint(keep_last=None)])
    return directory


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_list_shows_the_metric_by_which_the_run_is_judged(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="judged")
    monitor = ModelCheckpoint("val_accuracy")
    trainer.train(tiny_loader(2), tiny_loader(2), epochs=1, metrics=["accuracy"], callbacks=[monitor])
    header = offloop("checkpoints", "list", str(tmp_path)).stdout.splitlines()[1].split()
    assert header[3] == "val_accuracy"
    chosen = (
        offloop("checkpoints", "list", str(tmp_path), "--metric", "val_loss").stdout.splitlines()[1].split()
    )
    assert chosen[3] == "val_loss"


# offloop checkpoints list --------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_list_shows_runs_with_their_checkpoints_within_the_width(here: Path, columns: int) -> None:
    with CheckpointStore("runs/first") as store:
        store.tag("v1", 3)
    result = offloop("checkpoints", "list", columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "runs/first" and "runs/second" in lines
    assert lines[1].split() == ["CHECKPOINT", "STEP", "EPOCH", "val_loss", "SIZE", "SAVED", "NAMES"]
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    (tagged,) = [line for line in lines if line.endswith("v1")]
    assert tagged.split()[:2] == [CheckpointReader("runs/first").find("v1").name, "3"]


def test_list_for_programs_is_one_json_document(here: Path) -> None:
    listed = json.loads(offloop("checkpoints", "list", "runs/first", "--json").stdout)
    reader = CheckpointReader("runs/first")
    assert [each["name"] for each in listed["checkpoints"]] == [info.name for info in reader.checkpoints()]
    last = listed["checkpoints"][-1]
    assert (last["run_id"], last["step"], last["is_last"], last["tags"]) == ("first", 6, True, [])
    assert last["metrics"] == reader.find("last").metrics
    assert listed["damaged"] == []


def test_list_of_nothing_says_so(here: Path) -> None:
    (here / "empty").mkdir()
    result = offloop("checkpoints", "list", "empty")
    assert (result.exit_code, result.stdout) == (0, "no checkpoints in empty\n")
    result = offloop("checkpoints", "list", "missing")
    assert (result.exit_code, result.stderr) == (2, "offloop: there is no directory missing\n")


def test_list_tells_of_damaged_ones(here: Path) -> None:
    path = CheckpointReader("runs/first").find("last").path
    (path / "MANIFEST.json").write_text("{}")
    result = offloop("checkpoints", "list", "runs/first")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"damaged: {path}: MANIFEST.json")
    listed = json.loads(offloop("checkpoints", "list", "runs/first", "--json").stdout)
    assert [each["path"] for each in listed["damaged"]] == [str(path)]


# verify --------------------------------------------------------------------------------------------


def test_verify_ends_with_1_and_names_the_file_when_a_byte_is_wrong(here: Path) -> None:
    whole = offloop("checkpoints", "verify")
    assert whole.exit_code == 0 and whole.stdout.endswith("none damaged\n")
    path = CheckpointReader("runs/second").find("last").path
    flip_a_bit(path / "model.safetensors")
    for where in ("runs", "runs/second", str(path)):
        result = offloop("checkpoints", "verify", where)
        assert result.exit_code == 1
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("damaged")]
        assert str(path) in line and "model.safetensors" in line
        assert result.stdout.endswith(", 1 damaged\n")
    assert offloop("checkpoints", "verify", "runs/first").exit_code == 0


def test_verify_finds_a_manifest_that_cannot_be_read(here: Path) -> None:
    path = CheckpointReader("runs/first").find("last").path
    (path / "MANIFEST.json").write_text("garbage")
    for where in ("runs/first", str(path)):
        assert offloop("checkpoints", "verify", where).exit_code == 1
    (path / "MANIFEST.json").unlink()
    assert offloop("checkpoints", "verify", "runs/first").exit_code == 1


def test_verify_of_nothing_ends_with_2(here: Path) -> None:
    (here / "empty").mkdir()
    assert offloop("checkpoints", "verify", "empty").exit_code == 2
    assert offloop("checkpoints", "verify", "missing").exit_code == 2


# tag -----------------------------------------------------------------------------------------------


def test_tag_is_set_moved_and_removed(here: Path) -> None:
    first, last = (CheckpointReader("runs/first").find(which).name for which in (3, "last"))
    result = offloop("checkpoints", "tag", "runs/first:3", "v1")
    assert (result.exit_code, result.stdout) == (0, f"runs/first: v1 is {first}\n")
    refused = offloop("checkpoints", "tag", "runs/first", "v1")
    assert (refused.exit_code, refused.stderr) == (2, f"offloop: tag 'v1' is on {first}; --move moves it\n")
    assert offloop("checkpoints", "tag", "runs/first", "v1", "--move").exit_code == 0
    assert CheckpointReader("runs/first").tags() == {"v1": last}
    assert offloop("checkpoints", "tag", "runs/first", "v1", "--remove").exit_code == 0
    assert CheckpointReader("runs/first").tags() == {}
    assert offloop("checkpoints", "tag", "runs/first", "v1", "--remove").exit_code == 2
    assert offloop("checkpoints", "tag", "runs/first", "best").exit_code == 2


def test_tag_of_a_run_that_is_going_on_is_refused(here: Path) -> None:
    with CheckpointStore("runs/first"):
        result = offloop("checkpoints", "tag", "runs/first", "v1")
    assert result.exit_code == 2 and "is being written by process" in result.stderr


# export and diff -----------------------------------------------------------------------------------


def test_export_writes_a_file_that_others_read(here: Path) -> None:
    result = offloop("checkpoints", "export", "runs/first@best", "out.safetensors")
    assert result.exit_code == 0 and result.stdout.startswith("out.safetensors: ")
    best: Any = CheckpointReader("runs/first").load("best").state
    read = load_file("out.safetensors")
    assert all(torch.equal(read[name], each) for name, each in best["model"].items())
    again = offloop("checkpoints", "export", "runs/first@best", "out.safetensors")
    assert (again.exit_code, again.stderr) == (2, "offloop: out.safetensors exists; --force replaces it\n")
    assert offloop("checkpoints", "export", "runs/second", "out.safetensors", "--force").exit_code == 0
    assert offloop("checkpoints", "export", "runs/second", "out.onnx").exit_code == 2


@pytest.mark.parametrize("columns", [80, 120])
def test_diff_shows_tensors_metrics_and_settings(here: Path, columns: int) -> None:
    result = offloop("checkpoints", "diff", "runs/first", "runs/second", columns=columns)
    assert result.exit_code == 1
    assert max(map(len, result.stdout.splitlines())) <= columns
    names = list(tiny_trainer().model.state_dict())
    assert f"{len(names)} tensors differ, 0 are equal." in result.stdout
    assert all(name in result.stdout for name in names)
    assert ["config.seed", "1", "2"] in [line.split() for line in result.stdout.splitlines()]
    assert "val_loss" in result.stdout
    one = offloop("checkpoints", "diff", "runs/first", "runs/second", "--limit", "1")
    assert f"... and {len(names) - 1} more: --limit {len(names)}" in one.stdout


def test_diff_of_equal_ones_ends_with_0(here: Path) -> None:
    offloop("checkpoints", "export", "runs/first", "out.pt")
    result = offloop("checkpoints", "diff", "runs/first", "out.pt")
    assert result.exit_code == 0 and "tensors are equal." in result.stdout


def test_diff_for_programs_is_one_json_document(here: Path) -> None:
    result = offloop("checkpoints", "diff", "runs/first", "runs/second", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["equal"] is False
    assert found["settings"] == {"config.seed": [1, 2]}
    assert {"name", "kind", "max_abs", "relative", "changed", "elements"} <= set(found["tensors"][0])


def test_diff_of_what_is_not_there_ends_with_2(here: Path) -> None:
    result = offloop("checkpoints", "diff", "runs/first", "nobody@champion")
    assert (result.exit_code, result.stderr) == (
        2,
        f"offloop: no model 'nobody' in {here / 'models'}; there is: nothing\n",
    )
    assert offloop("checkpoints", "diff", "runs/first", "runs/frist", "--json").exit_code == 2


def test_checkpoint_that_is_gone_is_told_with_those_that_are_there(here: Path) -> None:
    reader = CheckpointReader("runs/first")
    gone, *there = [info.name for info in reader.checkpoints()]
    shutil.rmtree(f"runs/first/checkpoints/{gone}")
    result = offloop("checkpoints", "diff", f"runs/first/checkpoints/{gone}", "runs/second")
    assert result.exit_code == 2
    assert result.stderr.endswith(f"there is: {', '.join(sorted(there))}\n")


# offloop models ------------------------------------------------------------------------------------


def test_models_are_registered_listed_and_named(here: Path) -> None:
    result = offloop(
        "models", "register", "runs/first@best", "tiny", "--alias", "champion", "--notes", "good"
    )
    assert result.exit_code == 0 and result.stdout.startswith("tiny:1, champion  sha256:")
    assert offloop("models", "register", "runs/second", "tiny").stdout.startswith("tiny:2  sha256:")
    assert offloop("models", "alias", "tiny", "champion", "2").stdout == "tiny@champion is tiny:2\n"
    assert offloop("models", "alias", "tiny", "old", "champion").exit_code == 0
    assert ModelRegistry().aliases("tiny") == {"champion": 2, "old": 2}
    assert offloop("models", "alias", "tiny", "old", "--remove").exit_code == 0
    for columns in (80, 120):
        lines = offloop("models", "list", "tiny", columns=columns).stdout.splitlines()
        assert lines[0].split()[:3] == ["VERSION", "RUN", "STEP"] and max(map(len, lines)) <= columns
        assert lines[1].split()[:2] == ["1", "first"] and lines[1].endswith("good")
        assert lines[2].split()[:3] == ["2", "second", "6"] and "champion" in lines[2]
    assert offloop("models", "list").stdout.splitlines()[1].split()[:2] == ["tiny", "2"]
    listed = json.loads(offloop("models", "list", "--json").stdout)
    assert [(each["version"], each["run_id"], each["aliases"]) for each in listed] == [
        (1, "first", []),
        (2, "second", ["champion"]),
    ]
    assert listed[0]["run"]["config"]["seed"] == 1


def test_models_verify_ends_with_1_when_a_byte_is_wrong(here: Path) -> None:
    offloop("models", "register", "runs/first", "tiny")
    assert offloop("models", "verify").exit_code == 0
    flip_a_bit(ModelRegistry().find("tiny:1").path / "model.safetensors")
    result = offloop("models", "verify", "tiny")
    assert result.exit_code == 1 and result.stdout.startswith(f"damaged  {here}/models/tiny/v000001")


def test_wrong_use_of_models_ends_with_2_and_one_line(here: Path) -> None:
    offloop("models", "register", "runs/first", "tiny")
    for arguments in (
        ("models", "alias", "tiny", "champion"),
        ("models", "alias", "tiny", "champion", "9"),
        ("models", "alias", "tiny", "9", "1"),
        ("models", "alias", "tiny", "champion", "--remove"),
        ("models", "register", "runs/first", "no/name"),
        ("models", "register", "missing.pt", "tiny"),
        ("models", "list", "other"),
        ("models", "verify", "other"),
    ):
        result = offloop(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("offloop: ") and result.stderr.count("\n") == 1
    assert offloop("models", "list", "--registry", "none").stdout == "no models in none\n"


# As the command that it is -------------------------------------------------------------------------


@pytest.mark.slow
def test_command_in_a_pipe_is_not_folded_and_passes_its_exit_code_on(here: Path) -> None:
    environment = {name: each for name, each in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    long_name = "run-" + "x" * 120
    (here / "runs" / "first").rename(here / "runs" / long_name)
    flip_a_bit(CheckpointReader(f"runs/{long_name}").find("last").path / "model.safetensors")
    command = [sys.executable, "-m", "offloop.cli.main"]
    offloop("models", "register", f"runs/{long_name}:3", "tiny", "--notes", "y" * 200)
    listed = subprocess.run(
        [*command, "models", "list", "tiny"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert len(listed.stdout.splitlines()) == 2 and "y" * 200 in listed.stdout and "\x1b" not in listed.stdout
    verified = subprocess.run(
        [*command, "checkpoints", "verify", f"runs/{long_name}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert verified.returncode == 1 and "damaged  runs/" in verified.stdout


@pytest.mark.slow
def test_looking_at_what_there_is_does_without_torch(here: Path) -> None:
    script = (
        "import sys\n"
        "from offloop.cli.main import app\n"
        "for command in (['checkpoints', 'list'], ['checkpoints', 'verify'], ['models', 'list']):\n"
        "    app(command, standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_figures_for_people() -> None:
    assert [size(count) for count in (0, 999, 1500, 999_960, 12_345_678, 5 * 10**15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "1.0 MB",
        "12.3 MB",
        "5000.0 TB",
    ]
    assert [age(seconds) for seconds in (-3, 59, 60, 7200, 200_000)] == [
        "0 s ago",
        "59 s ago",
        "1 min ago",
        "2 h ago",
        "2 d ago",
    ]
    assert [share(part, 1000) for part in (0, 1, 500, 999, 1000)] == ["0%", "<1%", "50%", ">99%", "100%"]
