"""`offloop export --html`: what it writes and prints, and what it refuses. CSV is tested in test_runs.py."""

import functools
import os
import random
from pathlib import Path
from typing import Final

import command_line
import pytest

from offloop.dashboard.serving.page import Page
from offloop.engine import Metrics, StepEnd, TrainStart, encode
from offloop.engine.testing import tiny_loader, tiny_trainer

pytestmark = pytest.mark.skipif(Page.load() is None, reason="the page is not built")
offloop: Final = functools.partial(command_line.offloop, columns=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs."""
    directory = tmp_path_factory.mktemp("made")
    for name in ("first", "second"):
        trainer = tiny_trainer(run_dir=str(directory / "runs"), run_name=name)
        trainer.train(tiny_loader(3), epochs=1)
    return directory


def test_runs_are_written_into_one_file(here: Path) -> None:
    result = offloop("export", "--html", "runs/first", "runs/second", "-o", "shared.html")
    size = Path("shared.html").stat().st_size / 1e6
    assert (result.exit_code, result.stdout) == (0, f"shared.html: 2 runs, {size:.1f} MB, exact values\n")
    assert sorted(os.listdir()) == ["runs", "shared.html"]
    refused = offloop("export", "--html", "runs/first", "-o", "shared.html")
    assert (refused.exit_code, refused.stderr) == (2, "offloop: shared.html exists; --force replaces it\n")
    assert offloop("export", "--html", "runs/first", "-o", "shared.html", "--force").exit_code == 0
    assert Path("shared.html").stat().st_size / 1e6 < size


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["runs/first"], "first.html"), (["runs"], "runs.html"), (["runs/first", "runs/second/"], "runs.html")],
)
def test_without_output_the_file_is_named_after_the_runs(here: Path, arguments: list[str], name: str) -> None:
    result = offloop("export", "--html", *arguments)
    assert result.exit_code == 0 and result.stdout.startswith(f"{name}: ")
    assert Path(name).is_file()


def test_skipped_lines_are_told(here: Path) -> None:
    with open("runs/first/events.jsonl", "ab") as log:
        log.write(b"{broken\n{}\n")
    result = offloop("export", "--html", "runs/first")
    assert result.exit_code == 0 and "lines of the log hold no event and were skipped" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html", "runs/frist"], "runs/frist does not exist; did you mean runs/first?"),
        (["--html", "runs/first/run.json"], "runs/first/run.json is a file, and not the directory of a run"),
        (
            ["--html", "empty"],
            "empty is neither a run, which has run.json or events.jsonl, nor a directory of runs",
        ),
        (["--html", "runs", "-o", "empty"], "empty is a directory: --output names a file"),
        (["--html", "runs", "-o", "gone/a.html"], "there is no directory gone"),
        (
            ["--html", "runs", "-o", "/proc/a.html"],
            "/proc/a.html cannot be written: no such file or directory",
        ),
        (["--html", "runs", "--event", "StepEnd"], "--event is for CSV: a page has all events"),
        (["--html", "runs", "--max-size", "0.5"], "--max-size must be from 1 to 1,000,000 (MB), got 0.5"),
        (["--html", "runs", "--max-size", "nan"], "--max-size must be from 1 to 1,000,000 (MB), got nan"),
        (["runs/first", "--max-size", "5"], "--max-size is for --html"),
        (["runs/first", "runs/second"], "CSV is written of one run, got 2; --html takes several"),
    ],
)
def test_what_is_refused(here: Path, arguments: list[str], words: str) -> None:
    Path("empty").mkdir()
    result = offloop("export", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"offloop: {words}\n"
    assert sorted(os.listdir()) == ["empty", "runs"]


def test_a_file_that_cannot_be_small_enough_is_not_written(here: Path) -> None:
    """The page alone has about 0.25 MB, so this needs a run with a million numbers."""
    big, numbers = Path("runs/big"), random.Random(0)
    big.mkdir()
    with open(big / "events.jsonl", "wb") as log:
        log.write(encode(TrainStart(time=0.0)) + b"\n")
        for step in range(1, 4_000):
            metrics = Metrics({f"m{k}": numbers.random() for k in range(120)})
            event = StepEnd(time=float(step), step=step, seq=step, lr=0.1, loss=1.0, metrics=metrics)
            log.write(encode(event) + b"\n")
    result = offloop("export", "--html", "runs/big", "--max-size", "1")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "offloop: --max-size 1 is not enough for 1 run: with 4 digits and 1,250 points"
    )
    assert not Path("big.html").exists()
