"""What callbacks cost that compute in a process of their own (`runs_in = "process"`).

1. Steps beside a process callback that computes all the time, beside a process that computes and has nothing to do
   with the run, and alone, in alternating slices of one run, with A/A.
2. From an event to its handler in the child, beside 10 ms steps.
3. Events a second through one child, in a burst.
4. What a child without torch needs: seconds from the start of the run to its first handler, and memory.

    python benchmarks/computing_callbacks.py [--quick] [--json FILE]
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from measure import (
    TEN_MS,
    TINY,
    Batch,
    Interval,
    Report,
    clock,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    quantile,
    ratio_of,
    shuffled,
)

from offloop.engine import Callback, EpochEnd, Event, RunHandle, Sample, StepEnd, StepPoint, Trainer, in_step

SLICE: Final = 0.05
"""Seconds of a slice: long beside the milliseconds that stopping and continuing a process takes."""
BURST: Final = 90_000
"""Events of a burst, fewer than the bus holds before it drops."""
FOREIGN: Final = "while True: sum(number * number for number in range(3000))"


class Computing(Event, frozen=True):
    """A child is about to compute."""

    pid: int


class Figures(Event, frozen=True):
    """What a child has measured."""

    values: list[float]


class Computes(Callback):
    """Computes in pure Python from the start of the run until a file appears."""

    runs_in = "process"

    def __init__(self, end: Path) -> None:
        self.end = end

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        run.publish(Computing(pid=os.getpid()))
        while not self.end.exists():
            for _ in range(50):
                sum(number * number for number in range(3000))


class Receives(Callback):
    """Keeps what children publish."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.values: list[float] = []
        self.arrived = threading.Event()

    def on_computing(self, event: Computing, run: RunHandle) -> None:
        self.pid = event.pid
        self.arrived.set()

    def on_figures(self, event: Figures, run: RunHandle) -> None:
        self.values = event.values
        self.arrived.set()


class SlicedLoader:
    """Lets one of two processes run in each slice, or none, and notes the seconds of a step."""

    def __init__(self, receives: Receives, end: Path, rounds: int) -> None:
        self.receives, self.end, self.rounds = receives, end, rounds
        self.times: dict[str, list[float]] = {"alone": [], "alone again": [], "foreign": [], "callback": []}

    def __iter__(self) -> Iterator[Batch]:
        batches, steps = TINY.batches(), 0
        while not self.receives.arrived.is_set():
            yield batches[0]
        foreign = subprocess.Popen([sys.executable, "-c", FOREIGN])
        assert self.receives.pid is not None
        pids = {"foreign": foreign.pid, "callback": self.receives.pid}
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        try:
            for order in shuffled(list(self.times), self.rounds):
                for name in order:
                    if name in pids:
                        os.kill(pids[name], signal.SIGCONT)
                        # Until it runs.
                        yield batches[0]
                    done, started = 0, clock()
                    while clock() - started < SLICE:
                        yield batches[steps % len(batches)]
                        steps, done = steps + 1, done + 1
                    self.times[name].append((clock() - started) / done)
                    if name in pids:
                        os.kill(pids[name], signal.SIGSTOP)
        finally:
            self.end.touch()
            os.kill(self.receives.pid, signal.SIGCONT)
            foreign.kill()
            foreign.wait()


def beside(rounds: int) -> dict[str, list[float]]:
    """Train the tiny MLP beside the processes."""
    model, receives = TINY.model(), Receives()
    with tempfile.TemporaryDirectory() as directory:
        end = Path(directory) / "end"
        loader = SlicedLoader(receives, end, rounds)
        trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu")
        trainer.train(loader, epochs=1, callbacks=[Computes(end), receives])
    return loader.times


class Milestone(Event, frozen=True):
    """Published every 20 steps."""


class Latencies(Callback):
    """Measures how old events are when their handler begins."""

    runs_in = "process"

    def __init__(self) -> None:
        self.milestones: list[float] = []
        self.samples: list[float] = []

    def on_milestone(self, event: Milestone, run: RunHandle) -> None:
        self.milestones.append(time.time() - event.time)

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.samples.append(time.time() - event.time)

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(Figures(values=[*self.milestones, -1.0, *self.samples]))


class Publishes(Callback):
    """Publishes a milestone every 20 steps."""

    @in_step(every_n_steps=20)
    def after_step(self, point: StepPoint) -> None:
        point.run.publish(Milestone())


def latencies(steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds from an event to its handler: of milestones, and of samples."""
    model, receives = TEN_MS.model(), Receives()
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu")
    batches = TEN_MS.batches()

    def loader() -> Iterator[Batch]:
        for step in range(steps):
            yield batches[step % len(batches)]

    trainer.train(loader(), epochs=1, callbacks=[Latencies(), receives, Publishes()])
    cut = receives.values.index(-1.0)
    # The first second is the start of the child.
    return receives.values[:cut][5:], receives.values[cut + 1 :][100:]


class Tick(Sample, frozen=True):
    """One of many."""

    number: int


class Counts(Callback):
    """Counts a burst of events."""

    runs_in = "process"
    buffer = 1_000_000

    def __init__(self, count: int) -> None:
        self.count, self.seen, self.begun, self.pid = count, 0, 0.0, os.getpid()

    def on_train_start(self, event: Event, run: RunHandle) -> None:
        status = Path("/proc/self/status")
        memory = status.read_text().split("VmRSS:")[1].split()[0] if status.exists() else "nan"
        age = time.time() - event.time
        run.publish(Figures(values=[age, float(memory) * 1024, float("torch" in sys.modules)]))

    def on_tick(self, event: Tick, run: RunHandle) -> None:
        self.seen += 1
        if self.seen == 1:
            self.begun = clock()
        if self.seen == self.count:
            run.publish(Figures(values=[(self.count - 1) / (clock() - self.begun)]))


def burst(count: int) -> tuple[float, float, float]:
    """Return events a second, and the seconds and bytes that the child needed."""
    model, receives = TINY.model(), Receives()
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu")
    found: list[list[float]] = []

    def loader() -> Iterator[Batch]:
        receives.arrived.wait()
        found.append(receives.values)
        receives.arrived.clear()
        for number in range(count):
            trainer.publish(Tick(number=number))
        receives.arrived.wait()
        found.append(receives.values)
        yield TINY.batches()[0]

    trainer.train(loader(), epochs=1, callbacks=[Counts(count), receives])
    (started, memory, has_torch), (rate,) = found
    assert not has_torch
    return rate, started, memory


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    report = Report("What a callback costs that computes in a process of its own", ["what", "figure", "goal"])
    rounds, steps, repeats = (8, 300, 2) if arguments.quick else (400, 3000, 7)
    with report.measuring():
        times = beside(rounds)
        milestones, samples = latencies(steps)
        bursts = [burst(BURST if not arguments.quick else 5_000) for _ in range(repeats)]
    alone = times["alone"]
    rows: dict[str, tuple[Interval, str]] = {
        "a step beside the callback / beside a foreign process": (
            ratio_of(times["callback"], times["foreign"]),
            "<= 1.03",
        ),
        "a step beside the callback / alone": (ratio_of(times["callback"], alone), "-"),
        "a step beside a foreign process / alone": (ratio_of(times["foreign"], alone), "-"),
        "alone again / alone (A/A)": (ratio_of(times["alone again"], alone), "-"),
    }
    for name, (interval, goal) in rows.items():
        report.row(name, interval, goal)
        report.figure(name, interval)
    for name, values, goal in (
        ("event to handler, milestones, p50 / p95, ms", milestones, "p50 <= 5"),
        ("event to handler, samples, p50 / p95, ms", samples, "p50 <= 50, one flush interval"),
    ):
        p50, p95 = (quantile(values, share) * 1e3 for share in (0.5, 0.95))
        report.row(name, f"{p50:.1f} / {p95:.1f}", goal)
        report.figure(name, [p50, p95])
    rates, starts, memories = (median_of(values) for values in zip(*bursts, strict=True))
    report.row("events through one child, million/s", rates.scaled(1e-6), ">= 0.3")
    report.row("start of a child without torch, s", starts.scaled(1), "<= 0.5")
    report.row("its memory (RSS), MB", memories.scaled(1e-6, 1), "<= 45")
    report.note(f"A step alone takes {median_of(alone).scaled(1e6, 0)} us.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
