"""`offloop verify-resume` on real scripts, really killed."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from offloop.engine.tools import verify_resume
from offloop.engine.tools.verify_resume import (
    Kill,
    Nursery,
    Record,
    UnusableError,
    Verdict,
    choose_kills,
    verify,
)

pytestmark = pytest.mark.slow

TEMPLATE = """
import random, sys
import numpy
import torch
from torch.utils.data import DataLoader, Dataset
from offloop.callbacks import ModelCheckpoint
from offloop.engine import Trainer

{seeding}

own = numpy.random.default_rng(1)

class Samples(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.inputs = torch.randn(48, 8, generator=generator)
        self.targets = self.inputs[:, :3].argmax(dim=1)

    def __len__(self):
        return 48

    def __getitem__(self, index):
        return {item}, self.targets[index]

class Own(Trainer):
    seen = 0

    def training_step(self, batch):
        inputs, targets = batch
        {count}
        return torch.nn.functional.cross_entropy(self.model({inputs}), targets)

model = torch.nn.Sequential(
    torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3)
)
trainer = Own(model, torch.optim.AdamW(model.parameters()), device="cpu", run_dir="nowhere", {knobs})
trainer.train(DataLoader(Samples(), batch_size=8, shuffle=True, {loader}), epochs=2, callbacks=[ModelCheckpoint()])
print("arguments", sys.argv[1:])
"""
SEEDED = "torch.manual_seed(0); random.seed(0); numpy.random.seed(0)"
AUGMENTED = "self.inputs[index] + torch.randn(8) + random.random() + numpy.random.rand()"


def write_script(
    path: Path,
    *,
    seeding: str = SEEDED,
    item: str = "self.inputs[index]",
    inputs: str = "inputs",
    count: str = "pass",
    knobs: str = "",
    loader: str = "",
) -> Path:
    path.write_text(
        TEMPLATE.format(seeding=seeding, item=item, inputs=inputs, count=count, knobs=knobs, loader=loader)
    )
    return path


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """One import of torch for all scripts."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def verified(script: Path, nursery: Nursery, *, kills: int = 1, seed: int = 0) -> Verdict:
    directory = script.parent / "verified"
    directory.mkdir()
    arguments = ["--lr", "0.1"]
    return verify(script, arguments, kills=kills, seed=seed, directory=directory, nursery=nursery)


def late(reference: Record, kills: int, seed: int) -> list[Kill]:
    """Kills that come when the run would be over, as they may where the machine is busy."""
    return [msgspec.structs.replace(each, delay=60.0) for each in choose_kills(reference, kills, seed)]


def test_script_that_draws_from_every_global_generator_is_exact(script: Path, nursery: Nursery) -> None:
    write_script(script, item=AUGMENTED, inputs="inputs * random.random()")
    verdict = verified(script, nursery, kills=2)
    assert (verdict.differences, verdict.causes, verdict.is_equal) == ([], [], True)
    assert len(verdict.attempts) == 3
    assert [attempt.was_killed for attempt in verdict.attempts] == [True, True, False]
    assert [entry["exactness"] for entry in verdict.attempts[1].resumed.values()] == ["bitwise"]
    assert "arguments ['--lr', '0.1']" in verdict.reference.output
    assert not (script.parent / "nowhere").exists(), "its own run_dir is left alone"


def test_data_set_with_a_generator_of_its_own_is_found_out(
    script: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_resume, "choose_kills", late)
    write_script(script, item="self.inputs[index] + torch.tensor(own.random(8)).float()")
    verdict = verified(script, nursery)
    assert not verdict.is_equal
    first = verdict.differences[0]
    assert first.kind == "data"
    assert first.step == verdict.attempts[1].resumed[0]["step"] + 1, "the first step after the resume"
    assert first.parts == ("0",), "the inputs and not the targets"
    (cause,) = verdict.causes
    assert "Samples has a generator (own)" in cause


def test_augmentation_in_workers_is_found_out_and_seeded_sampling_mends_it(
    script: Path, nursery: Nursery
) -> None:
    write_script(script, item=AUGMENTED, loader="num_workers=2")
    verdict = verified(script, nursery)
    assert not verdict.is_equal
    assert verdict.differences[0].kind == "data"
    (cause,) = verdict.causes
    assert 'sampling="seeded"' in cause
    mended = script.parent / "mended" / "script.py"
    mended.parent.mkdir()
    write_script(mended, item=AUGMENTED, loader="num_workers=2", knobs='sampling="seeded", seed=1')
    assert verified(mended, nursery).is_equal


@pytest.mark.parametrize(
    ("seeding", "item", "kind", "advice"),
    [
        ("torch.seed()", "self.inputs[index]", "first weights", "torch.manual_seed"),
        ("", "self.inputs[index] * numpy.random.rand()", "data", "numpy.random.seed"),
    ],
)
def test_script_without_a_seed_is_told_so(
    seeding: str, item: str, kind: str, advice: str, script: Path, nursery: Nursery
) -> None:
    write_script(script, seeding=seeding, item=item)
    verdict = verified(script, nursery)
    assert not verdict.is_equal
    assert verdict.differences[0].kind == kind
    (cause,) = verdict.causes
    assert "there is no seed" in cause
    assert advice in cause


@pytest.mark.parametrize(
    ("inputs", "count", "text"),
    [
        (
            "inputs / (1 + self.seen)",
            "self.seen += 1",
            "Own.seen is not saved: return it from the trainer's state_dict",
        ),
        ("inputs / (1 + len(seen))", "seen.append(1)", "no state_dict holds"),  # a global variable
    ],
)
def test_state_that_no_state_dict_holds_is_found_out(
    inputs: str, count: str, text: str, script: Path, nursery: Nursery
) -> None:
    write_script(script, seeding=f"{SEEDED}; seen = []", inputs=inputs, count=count)
    verdict = verified(script, nursery)
    assert not verdict.is_equal
    assert verdict.differences[0].kind == "losses"
    (cause,) = verdict.causes
    assert text in cause


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("print('no training here')", "starts no training with offloop"),
        ("import sys\nsys.exit('out of luck')", "fails without a kill, with exit code 1:\nout of luck"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_script_that_cannot_be_used_says_why(content: str, text: str, script: Path, nursery: Nursery) -> None:
    script.write_text(content)
    with pytest.raises(UnusableError, match=text):
        verified(script, nursery)


def test_async_script_is_driven_too(script: Path, nursery: Nursery) -> None:
    script.write_text(
        textwrap.dedent("""
        import anyio
        import torch
        from offloop.engine import StepEnd
        from offloop.engine.testing import tiny_loader, tiny_trainer

        async def main():
            await tiny_trainer(seed=1).train_async(tiny_loader(), epochs=2)
            async with tiny_trainer(seed=1).start(tiny_loader(), epochs=2) as run:
                async for event in run.events(StepEnd):
                    pass

        anyio.run(main)
        """)
    )
    verdict = verified(script, nursery)
    assert (verdict.differences, verdict.is_equal) == ([], True)
    assert len(verdict.reference.ends) == 2


def test_command_prints_the_verdict_and_leaves_with_its_code(script: Path) -> None:
    write_script(script, seeding="torch.seed()")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "offloop.cli.main",
            "verify-resume",
            "--kills",
            "1",
            str(script),
            "--kills",
            "x",
        ],
        env={**os.environ, "TERM": "dumb", "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert "Uninterrupted: 12 steps" in done.stdout
    assert "first weights    different" in done.stdout
    assert "Likely cause: the script differs from run to run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kills", "0", "x.py"], "--kills must be at least 1"),
        (["nowhere.py"], "there is no script nowhere.py"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], text: str) -> None:
    from typer.testing import CliRunner

    from offloop.cli.main import app

    result = CliRunner().invoke(app, ["verify-resume", *arguments])
    assert result.exit_code == 2
    assert text in result.output


def test_one_of_several_ranks_is_refused(script: Path) -> None:
    from typer.testing import CliRunner

    from offloop.cli.main import app

    result = CliRunner().invoke(app, ["verify-resume", str(script)], env={"WORLD_SIZE": "2", "RANK": "0"})
    assert result.exit_code == 2
    assert "verify-resume wants one process" in result.output
