"""What is left after kill -9, on a full disk, and after a save that failed? Really killed, filled and failed.

Each contender trains in a process of its own that saves after every step: torch.save over one file, as tutorials
do, Lightning's ModelCheckpoint(save_last=True), Ignite's Checkpoint with n_saved=2, offloop's ModelCheckpoint. The
contender's process has imported everything and forks a training for each trial.

    killed        SIGKILL at a random moment; then its newest checkpoint is read back. Counted: trials in which that
                  is damaged, and trials in which none can be read.
    disk full     a file system of so many megabytes that fills up after some checkpoints (needs the right to mount)
    failed save   files may not grow beyond half a checkpoint (RLIMIT_FSIZE) from the fifth step on

For the last two: does training go on to its end, can a checkpoint be read afterwards, and are there damaged files
under the names of good ones?

    .venv-peers/bin/python benchmarks/checkpoint_damage.py [--quick] [--kills 60] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_contenders import WithBuffers, train_with_ignite, train_with_lightning
from measure import TINY, Batch, Report, cycle, loss_of, optimizer_of, parse
from peers import version_of

TIMEOUT = 500
PADDING = 250_000  # float32: a checkpoint of one megabyte
DISK = 12  # megabytes
FAIL_FROM = 5


def make_model() -> WithBuffers:
    """Return the tiny MLP with a buffer that makes a checkpoint about a megabyte large."""
    return WithBuffers(1, PADDING)


class Loader:
    """Gives batches; before one of them it may do something."""

    batch_size = TINY.batch_size

    def __init__(self, steps: int, at: int = -1, action: Callable[[], None] | None = None) -> None:
        self.steps, self.at, self.action = steps, at, action
        self.batches = TINY.batches()

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(cycle(self.batches, 0, self.steps)):
            if step == self.at and self.action is not None:
                self.action()
            yield batch


def by_torch_save(loader: Loader, directory: Path) -> None:
    """Train by hand, with torch.save over the same file."""
    model = make_model()
    optimizer = optimizer_of(model)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / "last.pt")


def by_lightning(loader: Loader, directory: Path) -> None:
    """Train with Lightning."""
    train_with_lightning(make_model(), loader, directory, every=1, save_last=True)


def by_ignite(loader: Loader, directory: Path) -> None:
    """Train with Ignite."""
    train_with_ignite(make_model(), loader, directory, every=1)


def by_offloop(loader: Loader, directory: Path) -> None:
    """Train with offloop."""
    from offloop.callbacks import ModelCheckpoint
    from offloop.engine import Trainer

    model = make_model()
    trainer = Trainer(
        model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=str(directory), run_name="run"
    )
    trainer.train(loader, epochs=1, callbacks=[ModelCheckpoint(every_n_steps=1)], resume="auto")


def read_files(directory: Path) -> tuple[int, int, bool]:
    """Return how many checkpoint files can be read, how many cannot, and whether the newest can."""
    files = [path for path in directory.rglob("*") if path.suffix in (".pt", ".ckpt")]
    good = [path for path in files if _loads(path)]
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return len(good), len(files) - len(good), newest in good


def _loads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=False)
    except Exception:
        return False
    return True


def read_offloop(directory: Path) -> tuple[int, int, bool]:
    """Likewise for the checkpoints of a run."""
    from offloop.engine.checkpoint import CheckpointError, CheckpointReader

    reader = CheckpointReader(directory / "run")
    there = reader.checkpoints()
    good = 0
    newest = False
    for info in there:
        newest = False
        with contextlib.suppress(CheckpointError):
            reader.load(info.path)
            good, newest = good + 1, True
    return good, len(there) - good + len(reader.damaged()), newest


CONTENDERS: dict[str, tuple[Callable[[Loader, Path], None], str]] = {
    "torch.save": (by_torch_save, "torch"),
    "Lightning": (by_lightning, "lightning"),
    "Ignite": (by_ignite, "pytorch-ignite"),
    "offloop": (by_offloop, "torch"),
}


# One process: one contender


def fork(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a forked process that says nothing; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails instead of killing
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:60] if lines else ""


def killed(name: str, kills: int) -> dict[str, Any]:
    """Kill trainings at random moments, and read what they leave."""
    train, read = CONTENDERS[name][0], read_offloop if name == "offloop" else read_files
    source = random.Random(0)
    damaged = nothing = 0
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "saved"
            directory.mkdir()
            child = fork(lambda: train(Loader(100_000), directory), Path(place) / "log")  # noqa: B023
            while not any(
                path.suffix in (".pt", ".ckpt") or path.name == "last" for path in directory.rglob("*")
            ):
                time.sleep(0.01)  # until there is a first one
            time.sleep(source.uniform(0.05, 0.4))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            good, bad, newest = read(directory)
            damaged += not newest or bool(bad)
            nothing += not good
    return {"kills": kills, "damaged": damaged, "nothing": nothing}


def trial(
    name: str, directory: Path, log: Path, action: Callable[[], None] | None, steps: int
) -> dict[str, Any]:
    """Train under a fault, and say what came of it."""
    train, read = CONTENDERS[name][0], read_offloop if name == "offloop" else read_files
    child = fork(lambda: train(Loader(steps, FAIL_FROM, action), directory), log)
    _, status = os.waitpid(child, 0)
    good, bad, newest = read(directory)
    return {
        "goes on": os.waitstatus_to_exitcode(status) == 0,
        "error": last_line(log),
        "good": good,
        "bad": bad,
        "newest": newest,
    }


def limit_files() -> None:
    """Let files grow to half a megabyte only, from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (PADDING * 2, PADDING * 2))


def be_contender(name: str, kills: int, result: Path) -> None:
    """Do all three and write what came of it to `result`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:  # imports what the trainings need, once
        CONTENDERS[name][0](Loader(2), Path(place))
    found: dict[str, Any] = {"killed": killed(name, kills)}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "disk"
        directory.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(directory)]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                ballast = directory / "ballast"

                def fill() -> None:
                    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                        while True:
                            file.write(bytes(4096))
                    os.truncate(ballast, ballast.stat().st_size - PADDING * 2)  # room for half of one

                found["disk full"] = trial(name, directory, Path(place) / "log", fill, 40)
            finally:
                subprocess.run(["umount", str(directory)], check=True)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "saved"
        directory.mkdir()
        found["failed save"] = trial(name, directory, Path(place) / "log", limit_files, 40)
    result.write_text(json.dumps(found))


def describe(found: dict[str, Any] | None) -> str:
    """Return a cell of the table."""
    if found is None:
        return "not tried: no right to mount"
    goes_on = "training goes on" if found["goes on"] else f"training ends ({found['error']})"
    left = f"{found['good']} readable" if found["good"] else "nothing readable"
    return f"{goes_on}; {left}" + (f", {found['bad']} damaged" if found["bad"] else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--kills", type=int, default=60, help="of each contender")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    """Try all and print; or be a contender."""
    arguments = parse(__doc__, add_arguments)
    if arguments.contender is not None:
        be_contender(arguments.contender, arguments.kills, arguments.result)
        return
    kills = 5 if arguments.quick else arguments.kills
    report = Report(
        f"What is left, saving a megabyte after each step: {kills} kills of each",
        [
            "trainer",
            "version",
            "kills: newest damaged",
            "kills: nothing readable",
            "disk full",
            "failed save",
        ],
        ["lightning", "pytorch-ignite"],
    )
    for name, (_, package) in CONTENDERS.items():
        version = version_of(package) or "-"
        if version == "-":
            report.row(name, version, "not installed here", "-", "-", "-")
            continue
        with tempfile.TemporaryDirectory() as directory, report.measuring():
            result = Path(directory) / "result.json"
            command = [
                sys.executable,
                __file__,
                "--contender",
                name,
                "--kills",
                str(kills),
                "--result",
                str(result),
            ]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
            if not result.exists():
                report.row(name, version, f"failed: {done.stderr.strip()[-120:]}", "-", "-", "-")
                continue
            found = json.loads(result.read_text())
        of_kills = found["killed"]
        report.row(
            name,
            "-" if name == "offloop" else version,
            f"{of_kills['damaged']} of {kills}",
            f"{of_kills['nothing']} of {kills}",
            describe(found.get("disk full")),
            describe(found["failed save"]),
        )
        report.figure(name, found)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
