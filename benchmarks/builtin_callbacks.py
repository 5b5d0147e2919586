"""Where the built-in callbacks that compute should run: here, or in a process of their own.

1. Steps of an epoch of two seconds beside `LearningCurves`, redrawn each second epoch, against the epoch after it, in
   which nothing is drawn. In the A/A row nothing is ever drawn.
2. Steps beside the loggers, against a loop by hand, in alternating stretches of one run.
3. Steps beside the compression of a profiler's trace, in slices of one run: as torch does it, as `Profiler` does it in
   its thread, and in a process. And for how long torch stops training to format a trace, which cannot move.

On a machine whose cores are busy with other work, a process takes a core away from training like any other program.
That is not what is asked here, so 1 and 3 count a step's time without the time in which its thread waited for a core
(`/proc/thread-self/schedstat`), where the system tells it.

    python benchmarks/builtin_callbacks.py [--quick] [--only curves|loggers|profiler] [--json FILE]
"""

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from measure import (
    TEN_MS,
    TINY,
    Batch,
    HandWritten,
    Interval,
    Report,
    StretchLoader,
    Task,
    clock,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    ratio_of,
    shuffled,
    verdict,
)

from offloop.callbacks import LearningCurves, MLflowLogger, TensorBoardLogger, WandbLogger
from offloop.callbacks.profiler import compress
from offloop.engine import Callback, StepEnd, Trainer

EPOCH: Final = 2.0
"""Seconds of an epoch."""
NEVER: Final = 1_000_000
"""Epochs after which curves are drawn that are not drawn in a run."""
SKIPPED: Final = 2
"""Pairs of epochs in which the process starts and matplotlib is imported."""
DRAWINGS: Final = 9
SLICE: Final = 0.3
"""Seconds of a slice without compression."""
PROFILED: Final = 100
"""Steps of the trace."""
REPEATS: Final = 5
GOAL: Final = 1.01
"""For epochs of two seconds with curves redrawn."""

SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")
"""Of the calling thread, in nanoseconds: on a core, waiting for one."""

COMPRESS: Final = """
import gzip, shutil, sys
with open(sys.argv[1], "rb") as reader, gzip.open(sys.argv[2], "wb", compresslevel=6) as writer:
    shutil.copyfileobj(reader, writer, 1 << 20)
"""


def core_clock() -> float:
    """Return seconds of this thread, without those in which it waited for a core."""
    try:
        waited = int(SCHEDSTAT.read_text().split()[1])
    except OSError:
        waited = 0
    return clock() - 1e-9 * waited


def train(task: Task, loader: Any, *callbacks: Callback, epochs: int, directory: str) -> None:
    """Train a model of its own."""
    model = task.model()
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=directory)
    result = trainer.train(loader, epochs=epochs, callbacks=callbacks)
    assert not result.callback_errors, result.callback_errors


# 1. Curves -----------------------------------------------------------------------------------------


class TimedEpochs:
    """Gives batches for two seconds an epoch, and notes the seconds of a step."""

    def __init__(self, task: Task) -> None:
        self.batches = task.batches()
        self.per_step: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        steps, started, began = 0, clock(), core_clock()
        while clock() - started < EPOCH:
            yield self.batches[steps % len(self.batches)]
            steps += 1
        self.per_step.append((core_clock() - began) / steps)


def curves(task: Task, pairs: int, **options: Any) -> tuple[Interval, float]:
    """Return the time of a step in epochs beside a drawing against that in the epochs after them, and the latter."""
    loader = TimedEpochs(task)
    with tempfile.TemporaryDirectory() as directory:
        epochs = 2 * (pairs + SKIPPED) + 2
        train(task, loader, LearningCurves(**options), epochs=epochs, directory=directory)
    # Curves are drawn when the epochs 1, 3, 5, ... have ended, so beside 2, 4, 6, ...
    times = loader.per_step[2 + 2 * SKIPPED :]
    return ratio_of(times[0::2], times[1::2]), median_of(times[1::2]).median


def drawing() -> Interval:
    """Return the CPU time of a drawing of loss and learning rate, in seconds."""
    drawn, seconds = LearningCurves(), []
    for step in range(1, 1000):
        drawn._note(StepEnd(loss=1 / step, lr=0.1, step=step))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "curves.png"
        drawn.draw(file)
        for _ in range(DRAWINGS):
            began = time.thread_time()
            drawn.draw(file)
            seconds.append(time.thread_time() - began)
    return median_of(seconds)


def measure_curves(report: Report, pairs: int) -> None:
    """Add the rows of the curves."""
    cpu = drawing()
    report.row("LearningCurves, CPU time of a drawing, s", cpu.scaled(1), "-")
    report.figure("CPU time of a drawing", cpu)
    for task in (TINY, TEN_MS):
        _, step = a_a, _ = curves(task, pairs, every_n_epochs=NEVER)
        rows: dict[str, Interval] = {
            "drawn in a process": curves(task, pairs, every_n_epochs=2)[0],
            "drawn here": curves(task, pairs, every_n_epochs=2, runs_in="here")[0],
            "never drawn (A/A)": a_a,
        }
        for name, ratio in rows.items():
            goal = verdict(ratio, GOAL, a_a) if "process" in name else "-"
            report.row(f"LearningCurves, {task.name} ({1e3 * step:.2f} ms), {name}", ratio, goal)
            report.figure(f"{task.name}, {name}", ratio)


# 2. Loggers ----------------------------------------------------------------------------------------


def loggers(directory: str) -> dict[str, Callable[[], list[Callback]]]:
    """Return what makes the loggers of a run, by name."""
    store = f"sqlite:///{directory}/mlflow.db"
    made: dict[str, Callable[[], list[Callback]]] = {"no logger": list}
    for place in ("here", "process"):
        made |= {
            f"TensorBoardLogger, a step a second, {place}": lambda place=place: [
                TensorBoardLogger(runs_in=place)
            ],
            f"TensorBoardLogger, each step, {place}": lambda place=place: [
                TensorBoardLogger(every_n_steps=1, runs_in=place)
            ],
            f"MLflowLogger, a step a second, {place}": lambda place=place: [
                MLflowLogger("benchmark", tracking_uri=store, runs_in=place, timeout=100.0)
            ],
            f"WandbLogger (offline), a step a second, {place}": lambda place=place: [
                WandbLogger("benchmark", mode="offline", runs_in=place, timeout=100.0)
            ],
        }
    return made


def measure_loggers(report: Report, rounds: int) -> None:
    """Add the rows of the loggers."""
    with tempfile.TemporaryDirectory() as directory:
        for name, make in loggers(directory).items():
            by_hand = HandWritten(TINY)
            loader = StretchLoader(by_hand, rounds, seconds=1.0, settle=0.5)
            trainer = Trainer(
                by_hand.model,
                by_hand.optimizer,
                loss=loss_of,
                device="cpu",
                run_dir=directory,
                drain_timeout=100,
            )
            result = trainer.train(loader, epochs=1, callbacks=make())
            assert not result.callback_errors, result.callback_errors
            ratio, a_a = loader.ratio()
            share = sum(loader.shares().values())
            report.row(f"{name}: offloop / by hand", ratio, f"A/A {a_a}, other threads {share:.2%} of a core")
            report.figure(f"{name}, other threads", share)
            report.figure(name, ratio)
            report.figure(f"{name}, A/A", a_a)


# 3. The profiler -----------------------------------------------------------------------------------


def profiled_trace(file: Path) -> list[float]:
    """Write the trace of some steps, and return the seconds that torch needs to format it, several times."""
    by_hand = HandWritten(TINY)
    batches = TINY.batches()
    by_hand.train(iter(batches))
    seconds = []
    for _ in range(REPEATS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            by_hand.train(batches[step % len(batches)] for step in range(PROFILED))
        file.unlink(missing_ok=True)
        started = clock()
        profile.export_chrome_trace(str(file))
        seconds.append(clock() - started)
    return seconds


def as_torch_does(source: Path, target: Path) -> None:
    """Compress as torch's `export_chrome_trace` does: line by line."""
    with open(source, "rb") as reader, gzip.open(target, "wb") as writer:
        writer.writelines(reader)


def in_a_process(source: Path, target: Path) -> None:
    """Compress in a process."""
    subprocess.run([sys.executable, "-P", "-c", COMPRESS, source, target], check=True)


class CompressingLoader:
    """Compresses a trace in a thread during some of its slices, and notes the seconds of a step."""

    def __init__(self, trace: Path, rounds: int) -> None:
        self.trace, self.rounds = trace, rounds
        self.ways: dict[str, Callable[[Path, Path], None] | None] = {
            "alone": None,
            "alone again": None,
            "as torch does it": as_torch_does,
            "in the thread of Profiler": compress,
            "in a process": in_a_process,
        }
        self.per_step: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __iter__(self) -> Iterator[Batch]:
        batches, steps = TINY.batches(), 0
        for order in shuffled(list(self.ways), self.rounds):
            for name in order:
                way = self.ways[name]
                worker = None
                done, started, began = 0, clock(), core_clock()
                if way is not None:
                    worker = threading.Thread(target=way, args=(self.trace, self.trace.with_suffix(".gz")))
                    worker.start()
                while clock() - started < SLICE if worker is None else worker.is_alive():
                    yield batches[steps % len(batches)]
                    steps, done = steps + 1, done + 1
                self.per_step[name].append((core_clock() - began) / max(done, 1))
                self.seconds[name].append(core_clock() - began)


def measure_profiler(report: Report, rounds: int) -> None:
    """Add the rows of the profiler."""
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        formatting = profiled_trace(trace)
        loader = CompressingLoader(trace, rounds)
        train(TINY, loader, epochs=1, directory=directory)
        size = trace.stat().st_size
        for name, times in loader.per_step.items():
            ratio = ratio_of(times, loader.per_step["alone"])
            # How much longer training took because of it.
            lost = median_of(loader.seconds[name]).median * (1 - 1 / ratio.median)
            note = f"takes {median_of(loader.seconds[name]).scaled(1)} s, training loses {1e3 * lost:.0f} ms"
            if loader.ways[name] is None:
                note = "A/A" if "again" in name else "-"
            report.row(f"trace compressed, {name}", ratio, note)
            report.figure(f"trace, {name}", ratio)
        report.row(
            f"trace of {PROFILED} steps formatted by torch, ms", median_of(formatting).scaled(1e3, 0), "-"
        )
        report.note(f"The trace has {size / 1e6:.1f} MB.")


def main() -> None:
    """Measure and print."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", choices=("curves", "loggers", "profiler"))

    arguments = parse(__doc__, add)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    torch.set_num_threads(1)
    report = Report("Where built-in callbacks run", ["what", "a step, ratio", "goal, or more"])
    parts: dict[str, tuple[Callable[[Report, int], None], int]] = {
        "curves": (measure_curves, 2 if arguments.quick else 14),
        "loggers": (measure_loggers, 2 if arguments.quick else 8),
        "profiler": (measure_profiler, 2 if arguments.quick else 12),
    }
    with report.measuring():
        for name, (part, rounds) in parts.items():
            if arguments.only in (None, name):
                part(report, rounds)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
