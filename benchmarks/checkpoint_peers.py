"""How long does a save hold training up: torch.save, DCP's async_save, Lightning, Ignite, offloop?

Each contender trains the tiny MLP, whose model also holds 96 MB of buffers, in a process of its own, and saves
every 400 steps. The loader notes when each batch is asked for. The stall of a save is the longest gap of its 400
steps less the median gap; the cost of a save is all the time that its 400 steps took longer than 400 by hand
without saving, in the same process. Writing is beside training for some, so the cost is more than the stall.
offloop leaves a save out while both of its buffers are still being written, and says so; these are counted.

    .venv-peers/bin/python benchmarks/checkpoint_peers.py [--quick] [--rounds 3] [--json FILE] [--directory DIR]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_contenders import WithBuffers, train_with_ignite, train_with_lightning
from measure import TINY, Batch, Report, clock, loss_of, median_of, optimizer_of, parse, shuffled
from peers import version_of

EVERY = 400
BUFFERS, BUFFER_SIZE = 24, 1_000_000  # float32: 96 MB in 24 tensors
TIMEOUT = 300


def make_model() -> WithBuffers:
    """Return a model whose steps are short and whose checkpoints are large."""
    return WithBuffers(BUFFERS, BUFFER_SIZE)


class GapLoader:
    """Gives batches and notes when each is asked for."""

    batch_size = TINY.batch_size

    def __init__(self, saves: int) -> None:
        self.steps = EVERY * (saves + 1)
        self.batches = TINY.batches()
        self.asked: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            self.asked.append(clock())
            yield self.batches[step % len(self.batches)]

    def gaps(self) -> list[list[float]]:
        """Return the gaps of each 400 steps; the first 400 are warm-up, and end with the first save."""
        gaps = [after - before for before, after in itertools.pairwise(self.asked)]
        shift = EVERY // 2  # a save is in the middle of its 400, wherever exactly it is made
        return [gaps[start : start + EVERY] for start in range(shift, len(gaps) - EVERY, EVERY)]


def by_hand(loader: GapLoader, directory: Path, save: Callable[[int, Any], None] | None = None) -> None:
    """Train by hand, calling `save` every 400 steps."""
    model = make_model()
    optimizer = optimizer_of(model)
    for step, (inputs, targets) in enumerate(loader, 1):
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()
        if save is not None and step % EVERY == 0:
            save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def by_torch_save(loader: GapLoader, directory: Path) -> None:
    """Save with torch.save over the same file, as tutorials do."""
    by_hand(loader, directory, lambda step, state: torch.save(state, directory / "last.pt"))


def by_dcp(loader: GapLoader, directory: Path) -> None:
    """Save with torch.distributed.checkpoint.async_save; the next one waits for the one before, as is advised."""
    from torch.distributed.checkpoint import state_dict_saver

    running: list[Any] = []

    def save(step: int, state: Any) -> None:
        if running:
            running.pop().result()
        place = directory / str(step)
        running.append(state_dict_saver.async_save(state, checkpoint_id=place, no_dist=True))

    by_hand(loader, directory, save)
    for future in running:
        future.result()


def by_offloop(loader: GapLoader, directory: Path) -> int:
    """Save with offloop's ModelCheckpoint; returns how many saves were left out because the disk was behind."""
    from offloop.callbacks import ModelCheckpoint
    from offloop.engine import CheckpointFailed, Trainer
    from offloop.engine.testing import Recorder

    model, recorder = make_model(), Recorder()
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=str(directory))
    saving = ModelCheckpoint(every_n_steps=EVERY, save_last=False)
    trainer.train(loader, epochs=1, callbacks=[saving, recorder])
    return len(recorder.of(CheckpointFailed))


def by_lightning(loader: GapLoader, directory: Path) -> None:
    """Save with Lightning's ModelCheckpoint."""
    train_with_lightning(make_model(), loader, directory, every=EVERY)


def by_async_lightning(loader: GapLoader, directory: Path) -> None:
    """Save with Lightning and its AsyncCheckpointIO."""
    plugins: Any = __import__("lightning.pytorch.plugins.io", fromlist=["io"])
    train_with_lightning(make_model(), loader, directory, every=EVERY, plugins=[plugins.AsyncCheckpointIO()])


def by_ignite(loader: GapLoader, directory: Path) -> None:
    """Save with Ignite's Checkpoint and DiskSaver."""
    train_with_ignite(make_model(), loader, directory, every=EVERY)


CONTENDERS: dict[str, tuple[Callable[[GapLoader, Path], int | None], str]] = {
    "no saves (A/A)": (by_hand, "torch"),
    "torch.save": (by_torch_save, "torch"),
    "dcp.async_save": (by_dcp, "torch"),
    "Lightning": (by_lightning, "lightning"),
    "Lightning, async": (by_async_lightning, "lightning"),
    "Ignite": (by_ignite, "pytorch-ignite"),
    "offloop": (by_offloop, "torch"),
}


def be_contender(name: str, saves: int, result: Path, place: Path | None) -> None:
    """Train by hand without saving, then with the contender; write the stalls and costs to `result`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gaps: list[list[list[float]]] = []
    left_out: int | None = None
    for contender in (by_hand, CONTENDERS[name][0]):
        loader = GapLoader(saves)
        with tempfile.TemporaryDirectory(dir=place) as directory:
            left_out = contender(loader, Path(directory))
        torch.set_num_threads(1)
        gaps.append(loader.gaps())
    without = statistics.median(gap for cycle in gaps[0] for gap in cycle)
    stalls = [max(cycle) - statistics.median(cycle) for cycle in gaps[1]]
    costs = [sum(cycle) - EVERY * without for cycle in gaps[1]]
    result.write_text(
        json.dumps({"stalls": stalls, "costs": costs, "step": without, "left out": left_out or 0})
    )


def measure(name: str, saves: int, place: Path | None) -> dict[str, Any] | str:
    """Run a contender in a process of its own; returns its figures, or why there are none."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [
            sys.executable,
            __file__,
            "--contender",
            name,
            "--saves",
            str(saves),
            "--result",
            str(result),
        ]
        if place is not None:
            command += ["--directory", str(place)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return f"it took longer than {TIMEOUT} s"
        if result.exists():
            figures: dict[str, Any] = json.loads(result.read_text())
            return figures
    return f"failed ({done.returncode}): {done.stderr.strip()[-120:]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--saves", type=int, default=10, help="measured saves of each process")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    """Measure and print; or be a contender."""
    arguments = parse(__doc__, add_arguments)
    if arguments.contender is not None:
        be_contender(arguments.contender, arguments.saves, arguments.result, arguments.directory)
        return
    rounds, saves = (1, 3) if arguments.quick else (arguments.rounds, arguments.saves)
    report = Report(
        f"A save of {BUFFERS * BUFFER_SIZE * 4 / 1e6:.0f} MB every {EVERY} steps: {rounds} x {saves} saves of each",
        [
            "trainer",
            "version",
            "stall of a save, ms (95 %)",
            "longest",
            "cost of a save, ms (95 %)",
            "left out",
            "step, ms",
        ],
        ["lightning", "pytorch-ignite"],
    )
    there = [name for name, (_, package) in CONTENDERS.items() if version_of(package) is not None]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    failed = {name: "not installed here" for name in CONTENDERS if name not in there}
    with report.measuring():
        for order in shuffled(there, rounds):
            for name in order:
                figures = measure(name, saves, arguments.directory)
                if isinstance(figures, str):
                    failed[name] = figures
                else:
                    found[name].append(figures)
                print(f"{name}: {figures}"[:200], file=sys.stderr)
    for name, (_, package) in CONTENDERS.items():
        if name in failed:
            report.row(name, version_of(package) or "-", failed[name], "-", "-", "-", "-")
            continue
        stalls, costs = (
            [value for each in found[name] for value in each[key]] for key in ("stalls", "costs")
        )
        step = statistics.median(each["step"] for each in found[name])
        version = version_of(package) or "-"
        report.row(
            name,
            "-" if name == "offloop" else version,
            median_of(stalls).scaled(1e3, 1),
            f"{max(stalls) * 1e3:.1f}",
            median_of(costs).scaled(1e3, 1),
            sum(each["left out"] for each in found[name]),
            f"{step * 1e3:.2f}",
        )
        report.figure(name, found[name])
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
