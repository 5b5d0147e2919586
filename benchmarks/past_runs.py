"""How soon does `offloop serve` show past runs, and how large does it grow?

Directories of 1,000 and 5,000 small runs are listed, by the page and by `offloop runs`. A run of a million steps and
50 curves is opened for the first time, and again by another server, for which its columns were kept. Noted are the
times to the first curves and to all of them, and the largest size of the server.

    python benchmarks/past_runs.py [--quick] [--json FILE]
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from measure import Report, clock, parse
from page_link import link_to

from offloop.engine import EpochEnd, StepEnd, TrainEnd, TrainStart, encode
from offloop.engine.events import Metrics

CURVES = 50
SETTLED = 5.0
"""Seconds without the run being sent again after which nothing more of the log is to be read."""


# The runs -----------------------------------------------------------------------------------------


def write_small_runs(directory: Path, count: int) -> None:
    """Write finished runs of ten epochs."""
    for number in range(count):
        run = directory / f"run-{number:04d}"
        run.mkdir(parents=True)
        started = 1.7e9 + 60 * number
        described = {
            "schema": 1,
            "run_id": run.name,
            "attempt": 0,
            "created": started,
            "started": started,
            "ended": started + 50,
            "status": "completed",
            "monitor": "val_loss",
            "mode": "min",
            "metrics": {"val_loss": 1 / (1 + number), "val_accuracy": 0.9, "train_loss": 0.1},
            "summary": {"val_loss": {"best": 1 / (1 + number), "best_step": 90, "mode": "min"}},
            "sparkline": [1 / (1 + place) for place in range(32)],
            "hyperparameters": {"optimizer.lr": 0.1 / (1 + number % 7), "seed": number, "batch_size": 32},
            "steps": 100,
            "epochs": 10,
            "seconds": 50.0,
        }
        (run / "run.json").write_bytes(msgspec.json.encode(described))
        lines = [
            encode(EpochEnd(run_id=run.name, seq=epoch, step=10 * epoch, epoch=epoch, time=started + epoch))
            for epoch in range(10)
        ]
        (run / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def write_large_run(run: Path, steps: int) -> float:
    """Write the log of a finished run, and return its size in MB."""
    run.mkdir(parents=True)
    names = [f"layer{number}/norm" for number in range(CURVES - 3)]
    metrics = Metrics(dict.fromkeys(names, 0.0))
    with open(run / "events.jsonl", "wb") as file:
        start = TrainStart(run_id=run.name, seq=0, time=1e9, step=0, epoch=0, max_steps=steps)
        file.write(encode(start) + b"\n")
        for step in range(1, steps + 1):
            if step % 97 == 1:
                # A sine for each step and curve would take minutes.
                metrics = Metrics({name: math.sin(step / 1e3 + place) for place, name in enumerate(names)})
            event = StepEnd(
                run_id=run.name,
                seq=step,
                time=1e9 + step / 100,
                epoch=0,
                step=step,
                batch=step,
                loss=3 / (1 + step / 1e3),
                lr=0.001,
                grad_norm=0.5 + step % 7,
                metrics=metrics,
                samples=32,
                data_time=0.001,
                step_time=0.009,
            )
            file.write(encode(event) + b"\n")
        end = TrainEnd(
            run_id=run.name, seq=steps + 1, time=1e9 + steps / 100, step=steps, epoch=1, status="completed"
        )
        file.write(encode(end) + b"\n")
    return (run / "events.jsonl").stat().st_size / 1e6


# The server ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(directory: Path, home: Path) -> Iterator[tuple[str, float, int]]:
    """Serve a directory; give the address, the seconds until it was printed, and the process id."""
    command = [sys.executable, "-m", "offloop", "serve", str(directory), "--port", "0"]
    places = {name: str(home / name) for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}
    started = clock()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | places) as child:
        assert child.stderr is not None
        address = next(line for line in child.stderr if line.startswith("Live page: ")).split()[2]
        try:
            yield address, clock() - started, child.pid
        finally:
            child.terminate()
            child.stderr.read()


def list_runs(address: str, count: int) -> float:
    """Return the seconds until all rows have come."""
    started, rows = clock(), 0
    with link_to(address) as link:
        link.send('{"type":"hi","protocol":1}')
        link.send('{"type":"list"}')
        while rows < count:
            data = link.recv()
            if isinstance(data, str) and data.startswith('{"type":"rows"'):
                rows += len(json.loads(data)["rows"])
    return clock() - started


def open_run(address: str, key: str) -> tuple[float, float]:
    """Return the seconds to the first chart frame, and to the first one of the whole log.

    A server that shows coarse curves first sends the run again when it has read all.
    """
    started, first, whole, sent = clock(), 0.0, 0.0, 0.0
    with link_to(address) as link:
        link.send(json.dumps({"type": "hi", "protocol": 1, "run": key}))
        while True:
            data = link.recv()
            if isinstance(data, bytes):
                first = first or clock() - started
                whole = whole or clock() - started
                link.send('{"type":"drawn"}')
                continue
            message: dict[str, Any] = json.loads(data)
            if message["type"] == "run":
                whole, sent = 0.0, clock()
            if message["type"] == "series":
                ids = [each["id"] for each in message["series"]][:8]
                link.send(json.dumps({"type": "show", "run": key, "series": ids}))
            is_reading = message["type"] != "status" or message["reason"].startswith("reading")
            if whole and not is_reading and clock() - sent > SETTLED:
                return first, whole


def largest_size(pid: int) -> float:
    """Return the largest size of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(pid)


def measure_lists(report: Report, place: Path, counts: dict[int, float]) -> None:
    for count, goal in counts.items():
        directory = place / f"{count}"
        write_small_runs(directory, count)
        with serving(directory, place) as (address, seconds, _):
            rows = list_runs(address, count)
        if count == min(counts):
            report.row("server: to its address", f"{seconds:.2f} s", "<= 1.5 s")
        report.row(f"{count:,} runs: all rows in the page", f"{rows:.2f} s", f"<= {goal:g} s")
        started = clock()
        command = [sys.executable, "-m", "offloop", "runs", str(directory)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report.row(f"{count:,} runs: `offloop runs`", f"{clock() - started:.2f} s", f"<= {goal:g} s")


def measure_large_run(report: Report, place: Path, steps: int) -> None:
    directory = place / "large"
    size = write_large_run(directory / "run", steps)
    report.note(f"The log of the large run has {size:,.0f} MB: {steps:,} steps, {CURVES} curves.")
    for turn, goals in (("first time", ("<= 10 s", "")), ("again", ("<= 2 s", "<= 2 s"))):
        with serving(directory, place) as (address, _, pid):
            first, whole = open_run(address, "run")
            report.row(f"large run, {turn}: curves", f"{first:.2f} s", goals[0])
            report.row(f"large run, {turn}: all points", f"{whole:.1f} s", goals[1])
            report.row(
                f"large run, {turn}: server, at its largest", f"{largest_size(pid):.0f} MB", "<= 300 MB"
            )


def main() -> None:
    arguments = parse(__doc__)
    report = Report("Past runs, shown by `offloop serve`", ["what", "measured", "goal"], ["websockets"])
    with tempfile.TemporaryDirectory() as name, report.measuring():
        place = Path(name)
        measure_lists(report, place, {100: 1.0} if arguments.quick else {1_000: 1.0, 5_000: 4.0})
        measure_large_run(report, place, 30_000 if arguments.quick else 1_000_000)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
