"""What do all the callbacks cost together, in wall time, and how much processor do offloop's other threads use?

A real run with a run directory: every step is published to `EventLog`, `MetricLogger`, a `ProgressBar` that draws on
a pseudo-terminal, and 8 async observers of `StepEnd`. The callbacks work beside the training thread and some
time after it, so slices of 10 ms would put their work beside the wrong loop. Instead the loader takes turns like this,
in another order each round:

    offloop             0.15 s to reach the steady state | 0.6 s measured | 0.15 s of rest for callbacks to catch up
    hand-written        0.05 s                           | 0.6 s measured
    hand-written again  0.05 s                           | 0.6 s measured (the A/A row)

The work of the last hand-over falls out of a measured stretch, that of the one before it falls in. The CPU
time of each thread but the training thread is read at both ends of a measured stretch. The hand-written
loop reads the loss of each step. "nobody" is a run without callbacks: what the bus alone costs.

    python benchmarks/callbacks_overhead.py [--quick] [--rounds 24] [--json FILE]
"""

import argparse
import contextlib
import os
import pty
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from measure import (
    TEN_MS,
    TINY,
    Batch,
    HandWritten,
    Report,
    Task,
    clock,
    loss_of,
    optimizer_of,
    parse,
    ratio_of,
    shuffled,
    verdict,
)

from offloop.callbacks.metric_logger import MetricLogger
from offloop.callbacks.progress_bar import ProgressBar
from offloop.engine import Callback, Run, StepEnd, Trainer, TrainerConfig

OBSERVERS = 8
OFFLOOP, HAND, HAND_AGAIN = "offloop", "hand-written", "hand-written again"
SETTLE, MEASURED, REST = 0.15, 0.6, 0.15  # seconds; a hand-over comes every 0.05 s
SETTLE_BY_HAND = 0.05


class Observer(Callback):
    """Does next to nothing, asynchronously."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.events = 0

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        self.loss += event.loss
        self.events += 1


@contextlib.contextmanager
def terminal() -> Iterator[int]:
    """Give the descriptor of a pseudo-terminal that another process reads."""
    master, slave = pty.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(master)
    try:
        yield slave
    finally:
        os.close(slave)
        reader.terminate()
        reader.wait()


def cpu_of_other_threads() -> dict[str, float]:
    """Return the CPU seconds so far of each thread but this one, by name; offloop has the only ones."""
    used: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident is not None:
            with contextlib.suppress(OSError, ProcessLookupError):
                name = "event loop" if thread is threading.main_thread() else thread.name
                used[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return used


class TurnsLoader:
    """A loader that trains by hand in between, and takes times in the steady state."""

    def __init__(self, task: Task, rounds: int) -> None:
        self.task = task
        self.rounds = rounds
        self.by_hand = {name: HandWritten(task) for name in (HAND, HAND_AGAIN)}
        self.per_step: dict[str, list[float]] = {OFFLOOP: [], HAND: [], HAND_AGAIN: []}
        self.cpu: dict[str, list[float]] = defaultdict(list)  # share of a core in each stretch, by thread
        self._batches = task.batches()

    def batches_for(self, seconds: float, record: list[float] | None = None) -> Iterator[Batch]:
        """Give batches for so many seconds, and note the seconds per step."""
        steps = 0
        started = clock()
        while clock() - started < seconds:
            for _ in range(self.task.steps_per_slice):
                yield self._batches[steps % len(self._batches)]
                steps += 1
        if record is not None:
            record.append((clock() - started) / steps)

    def __iter__(self) -> Iterator[Batch]:
        for order in shuffled(list(self.per_step), self.rounds):
            for name in order:
                record = self.per_step[name]
                if name == OFFLOOP:
                    yield from self.batches_for(SETTLE)
                    before, started = cpu_of_other_threads(), clock()
                    yield from self.batches_for(MEASURED, record)
                    after, seconds = cpu_of_other_threads(), clock() - started
                    for thread, used in after.items():
                        self.cpu[thread].append((used - before.get(thread, 0.0)) / seconds)
                    time.sleep(REST)
                else:
                    self.by_hand[name].train(self.batches_for(SETTLE_BY_HAND))
                    self.by_hand[name].train(self.batches_for(MEASURED, record))


def measure(task: Task, rounds: int, callbacks: Sequence[Callback], directory: str | None) -> TurnsLoader:
    """Train with the callbacks; the loader holds the figures."""
    model = task.model()
    config = TrainerConfig(device="cpu", run_dir=directory)
    trainer = Trainer(model, optimizer_of(model), config, loss=loss_of, callbacks=callbacks)
    loader = TurnsLoader(task, rounds)
    trainer.train(loader, epochs=1)
    return loader


def all_callbacks(descriptor: int) -> list[Callback]:
    """Return the whole company; `EventLog` joins by itself where there is a run directory."""
    file = os.fdopen(os.dup(descriptor), "w")
    return [MetricLogger(), ProgressBar(file=file), *(Observer() for _ in range(OBSERVERS))]


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 for none."""
    return sum(values) / len(values) if values else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=24, help="measured stretches of each contender")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 2 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    os.environ["TERM"] = "xterm-256color"
    report = Report(
        f"Wall time with all callbacks against a hand-written loop, {rounds} stretches of {MEASURED} s each",
        [
            "task",
            "callbacks",
            "ratio (95 %)",
            "A/A (95 %)",
            "step by hand, ms",
            "CPU of other threads",
            "goal",
        ],
        packages=("rich",),
    )
    cases: list[tuple[Task, bool, float]] = [
        (TEN_MS, True, 1.02),
        (TINY, True, 1.05),
        (TINY, False, 1.05),
    ]
    for task, with_callbacks, goal in cases:
        with report.measuring(), terminal() as descriptor, tempfile.TemporaryDirectory() as directory:
            if with_callbacks:
                loader = measure(task, rounds, all_callbacks(descriptor), directory)
            else:
                loader = measure(task, rounds, [], None)
        ratio = ratio_of(loader.per_step[OFFLOOP], loader.per_step[HAND])
        a_a = ratio_of(loader.per_step[HAND_AGAIN], loader.per_step[HAND])
        shares = {name: mean(values) for name, values in loader.cpu.items()}
        total = sum(shares.values())
        who = "all" if with_callbacks else "nobody"
        by_hand = f"{mean(loader.per_step[HAND]) * 1e3:.2f}"
        cpu = f"{total:.1%}"
        if with_callbacks:
            cpu += " (<= 3 %: met)" if total <= 0.03 else " (<= 3 %: missed)"
        report.row(task.name, who, ratio, a_a, by_hand, cpu, verdict(ratio, goal, a_a))
        for name, share in sorted(shares.items(), key=lambda item: -item[1]):
            if share >= 0.0005:
                report.note(f"{task.name}, {who}: {name.removeprefix('offloop-')} used {share:.2%} of a core")
        report.figure(f"{task.name}, {who}", {"ratio": ratio.median, "a_a": a_a.median, "cpu": shares})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
