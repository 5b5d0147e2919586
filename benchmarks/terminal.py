"""How much of a core does `offloop watch` take beside a run of 100 steps a second?

The run is in a process of its own, `offloop watch` in another one on a pseudo-terminal whose output is read and thrown
away, or without a terminal. In turns, at the address of the page, at the run directory, and without a terminal: the CPU
time of that process over some seconds, once its first screen is there.

    python benchmarks/terminal.py [--quick] [--json FILE]
"""

import contextlib
import fcntl
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import Report, parse

from offloop.dashboard import Dashboard
from offloop.engine import Trainer
from offloop.engine.testing import EndlessLoader

STEP = 0.01
GOAL = 0.03
WARM_UP = 3.0


class Paced(Trainer):
    """Does a hundred steps a second."""

    def training_step(self, batch: Any) -> torch.Tensor:
        time.sleep(max(0.0, STEP - time.time() % STEP))
        loss: torch.Tensor = self.model(torch.zeros(1, 1)).square().mean()
        return loss


def train(runs_dir: str) -> None:
    """Train until the input ends."""
    model = torch.nn.Linear(1, 1)
    dashboard = Dashboard(port=0, quiet=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = Paced(model, optimizer, run_dir=runs_dir, run_name="run", callbacks=[dashboard])

    def stop_at_end() -> None:
        print(dashboard.url, flush=True)
        sys.stdin.read()
        assert trainer.last_run is not None
        trainer.last_run.stop_nowait("measured")

    with dashboard:
        threading.Thread(target=stop_at_end).start()
        trainer.train(EndlessLoader(), max_steps=10**9)


@contextlib.contextmanager
def watching(arguments: Sequence[str], *, terminal: bool) -> Iterator[tuple[psutil.Process, list[bytes]]]:
    """Run `offloop watch`, whose output is read into the list."""
    command = [sys.executable, "-m", "offloop", "watch", *arguments]
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen = threading.Event()
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65_536):
                written.append(data)
                seen.set()

    reader = threading.Thread(target=read)
    stdin = theirs if terminal else subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=stdin, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        reader.start()
        try:
            seen.wait()
            yield psutil.Process(process.pid), written
        finally:
            process.terminate()
    reader.join()
    os.close(ours)


def share(process: psutil.Process, seconds: float) -> float:
    """Return the share of a core that a process takes."""
    time.sleep(WARM_UP)
    before, since = process.cpu_times(), time.perf_counter()
    time.sleep(seconds)
    after, until = process.cpu_times(), time.perf_counter()
    return (after.user + after.system - before.user - before.system) / (until - since)


def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return shares of a core by case."""
    found: dict[str, list[float]] = {
        "page, 80 x 24": [],
        "run directory, 80 x 24": [],
        "page, no terminal": [],
    }
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, __file__, "--train", runs_dir]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            url = process.stdout.readline().strip()
            run = str(Path(runs_dir) / "run")
            for _ in range(rounds):
                for case, where in zip(found, (url, run, url), strict=True):
                    with watching([where], terminal="24" in case) as (watcher, written):
                        found[case].append(share(watcher, seconds))
                        assert len(written) > seconds or "24" not in case, "the screen does not move"
            process.stdin.close()
    return found


def main() -> None:
    """Measure and report."""
    if "--train" in sys.argv:
        train(sys.argv[-1])
        return
    arguments = parse(__doc__)
    report = Report(
        "offloop watch beside 100 steps/s",
        ["case", "CPU, median", "least", "most", "goal"],
        packages=["rich", "websockets", "psutil"],
    )
    with report.measuring():
        found = measure(2 if arguments.quick else 5, 5.0 if arguments.quick else 20.0)
    for case, values in found.items():
        cells = [f"{each:.1%}" for each in (statistics.median(values), min(values), max(values))]
        report.row(case, *cells, f"<= {GOAL:.0%}" if case.startswith("page, 80") else "")
        report.figure(case, values)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
