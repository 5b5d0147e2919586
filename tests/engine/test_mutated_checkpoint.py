"""A real checkpoint with one thing changed and its checksums right: resuming refuses it in our words, or works."""

import copy
import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop.callbacks import EarlyStopping, LearningRateScheduler, ModelCheckpoint, WeightAverage
from offloop.engine import Callback, ConfigError, Resumed, StepPoint, Trainer, WeightsMismatchError, in_step
from offloop.engine.checkpoint import CheckpointError, CheckpointReader
from offloop.engine.testing import Recorder

SEEDS = range(12)
CHANGES = 5
"""For each seed."""
BIG = 10**12

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1.5, 2**63, 2**70, "", "abc", "NaN", [], [1], ["a"], {}, {"a": 1},
    {"$": ["tensor", "x"]}, {"$": ["tensor", "model.0.weight"]}, {"$": ["tuple", [1]]}, {"$": ["int", "0x" + "f" * 40]},
    {"$": ["float", "NaN"]}, {"$": ["dict", [[1, 2]]]}, {"$": 3},
)  # fmt: skip


class Cut(Callback):
    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 5:
            point.run.stop_nowait("cut")


def train(directory: Path, *callbacks: Callback, resume: str | None = None) -> None:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 3, (12,), generator=generator)
    data = TensorDataset(torch.randn(12, 3, generator=generator), targets)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        loss=torch.nn.functional.cross_entropy,
        callbacks=[ModelCheckpoint("val_loss"), EarlyStopping("val_loss", patience=9), WeightAverage()],
        device="cpu",
        run_dir=directory,
        run_name="run",
    )
    trainer.train(
        loader,
        loader,
        epochs=3,
        metrics=["accuracy"],
        callbacks=[LearningRateScheduler("cosine"), *callbacks],
        resume=resume,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only checkpoint was taken in the middle of an epoch."""
    directory = tmp_path_factory.mktemp("original")
    train(directory, Cut())
    *older, newest = CheckpointReader(directory / "run").checkpoints()
    assert newest.step == 5
    for each in older:
        shutil.rmtree(each.path)
    return directory


def change(tree: Any, choose: random.Random) -> str:
    """Change one thing somewhere in a tree, and return what."""
    parent: Any = None
    key: Any = None
    node, path = tree, []
    while node and isinstance(node, (dict, list)) and (parent is None or choose.random() < 0.75):
        parent, key = node, choose.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
        path.append(key)
    assert parent is not None
    how = choose.random()
    if how < 0.25:
        del parent[key]
        return f"{path} deleted"
    if how < 0.35 and isinstance(node, (int, float)):
        parent[key] = node * choose.choice([-1, 1000, BIG])
    elif how < 0.45 and isinstance(parent, dict):
        parent[key] = parent[choose.choice(list(parent))]
    else:
        parent[key] = copy.deepcopy(choose.choice(VALUES))
    return f"{path} = {str(parent[key])[:60]}"


def put_changed(checkpoint: Path, choose: random.Random) -> str:
    """Change manifest or state, with the checksums that belong to it."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_bytes().partition(b"\n")[0])
    if choose.random() < 0.25:
        what = f"manifest {change(manifest, choose)}"
    else:
        state = json.loads((checkpoint / "state.json").read_bytes())
        what = f"state {change(state, choose)}"
        content = json.dumps(state).encode()
        (checkpoint / "state.json").write_bytes(content)
        manifest["files"]["state.json"].update(bytes=len(content), crc32=zlib.crc32(content))
    line = json.dumps(manifest).encode()
    (checkpoint / "MANIFEST.json").write_bytes(line + b"\ncrc32:%08x\n" % zlib.crc32(line))
    return what


@pytest.mark.parametrize("seed", SEEDS)
def test_changed_checkpoint_is_refused_in_our_words_or_continued(
    tmp_path: Path, original: Path, seed: int
) -> None:
    choose = random.Random(seed)
    for number in range(CHANGES):
        directory = tmp_path / str(number)
        shutil.copytree(original, directory)
        (checkpoint,) = (directory / "run" / "checkpoints").iterdir()
        what = put_changed(checkpoint, choose)
        recorder = Recorder()
        try:
            train(directory, recorder, resume="must")
        except (CheckpointError, ConfigError, WeightsMismatchError):
            pass
        except Exception as error:
            if not recorder.of(Resumed):  # later, other numbers may well be ones that a step cannot use
                raise AssertionError(f"{what} gave {error!r}") from error


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("optimizers", "optimizer", "param_groups", 0, "lr"), "fast"),
        (("optimizers", "optimizer", "param_groups", 0, "params"), 7),
        (("schedulers", 0, "last_epoch"), [1]),
        (("schedulers", 0, "step"), 3),  # in the place of its method
        (("callbacks", "EarlyStopping", "misses"), "many"),
        (("callbacks", "EarlyStopping"), {}),
        (("callbacks", "WeightAverage", "average", "module.0.bias"), "none"),
        (("metrics", "sums"), [None]),
        (("random", "torch"), {"$": ["tensor", "model.0.weight"]}),
        (("history",), ["{}"]),
        (("best", "score"), "good"),
        (("milestones",), ["{"]),
    ],
)
def test_part_that_is_not_what_it_was_is_named(
    tmp_path: Path, original: Path, path: tuple[Any, ...], value: Any
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(original, directory)
    (checkpoint,) = (directory / "run" / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "MANIFEST.json").read_bytes().partition(b"\n")[0])
    state = node = json.loads((checkpoint / "state.json").read_bytes())
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest["files"]["state.json"].update(bytes=len(content), crc32=zlib.crc32(content))
    line = json.dumps(manifest).encode()
    (checkpoint / "MANIFEST.json").write_bytes(line + b"\ncrc32:%08x\n" % zlib.crc32(line))
    with pytest.raises(CheckpointError, match=path[0]):
        train(directory, resume="must")
    assert checkpoint.is_dir()  # it is not set aside: what this version refuses another one may understand
