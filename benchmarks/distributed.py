"""What do several ranks cost, beside a loop on DistributedDataParallel written by hand?

Two ranks on this machine, started by `torchrun` (this script starts it). A run of offloop with everything on (a run
directory with its event log, checkpoints, metrics to files) trains an MLP; its loader gives batches for a quarter of a
second, then holds the training thread and trains a twin by hand in the same process group, and a second twin for the
A/A row, in another order each round. All ranks take the same turns. Figures are those of rank 0.

- "ratio": time per step, offloop's over that by hand. Two ranks on two cores leave some percent to chance: see A/A.
- "agreement": share of offloop's time that its exchanges with the other ranks take, each waited for to its end. It is
  paced to 1 % of the time; what a rank is late for the exchange counts too.
- "command": from `run.call_nowait(...)` in another thread to the call in the training thread, at random moments.

    python benchmarks/distributed.py [--quick] [--rounds 60] [--commands 300] [--json FILE]
"""

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from measure import (
    HAND,
    HAND_AGAIN,
    OFFLOOP,
    Batch,
    Report,
    Task,
    clock,
    cycle,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    quantile,
    ratio_of,
    shuffled,
    verdict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from offloop.callbacks import MetricLogger, ModelCheckpoint
from offloop.engine import Callback, Trainer, TrainStart
from offloop.engine.distributed.agreement import Agreement

RANKS: Final = 2
SECONDS: Final = 0.25
"""Of a slice: some exchanges fall into each."""
WARM_UP: Final = 2
TASKS: Final = (
    Task("2 ms", features=64, width=64, layers=2, batch_size=32, steps_per_slice=0),
    Task("10 ms", features=256, width=768, layers=2, batch_size=64, steps_per_slice=0),
    Task("100 ms", features=512, width=1536, layers=3, batch_size=128, steps_per_slice=0),
)


class ByHand:
    """The loop that a user would write for several ranks."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = task.model()
        self.optimizer = optimizer_of(self.model)
        self._wrapped: Any = None

    def train(self, batches: Iterator[Batch]) -> None:
        """Train; the process group is there by now."""
        if self._wrapped is None:
            self._wrapped = DistributedDataParallel(self.model)
        for inputs, targets in batches:
            self.optimizer.zero_grad()
            loss = loss_of(self._wrapped(inputs), targets)
            loss.backward()
            self.optimizer.step()
            self.loss = loss.item()


class Samples:
    """The samples of a task in one tensor; a batch is one lookup."""

    def __init__(self, task: Task) -> None:
        batches = task.batches(8)
        self.inputs = torch.cat([inputs for inputs, _ in batches])
        self.targets = torch.cat([targets for _, targets in batches])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, which: list[int]) -> Batch:
        return self.inputs[which], self.targets[which]


class Numbers:
    """A batch sampler: the numbers of samples in each batch of all ranks, `count` of them."""

    def __init__(self, task: Task, count: int) -> None:
        self.batch_size, self._count = RANKS * task.batch_size, count
        numbers = range(8 * task.batch_size)
        self._batches = [
            list(numbers[i : i + self.batch_size]) for i in range(0, len(numbers), self.batch_size)
        ]

    def __len__(self) -> int:
        return self._count

    def some(self, start: int, count: int) -> Iterator[list[int]]:
        """Give some batches."""
        for number in range(start, start + count):
            yield self._batches[number % len(self._batches)]

    def __iter__(self) -> Iterator[list[int]]:
        return self.some(0, len(self))


class Turns(Numbers):
    """A batch sampler that trains by hand in between and takes the time of each slice."""

    def __init__(self, task: Task, rounds: int, steps: int) -> None:
        self.rounds, self.steps = rounds + WARM_UP, steps
        super().__init__(task, self.rounds * steps)
        self.by_hand = {name: ByHand(task) for name in (HAND, HAND_AGAIN)}
        self.times: dict[str, list[float]] = {OFFLOOP: [], HAND: [], HAND_AGAIN: []}
        self.exchanges: list[float] = []
        """Seconds of exchanges in each of offloop's slices."""
        self._samples = Samples(task)

    def own(self, turn: Iterator[list[int]]) -> Iterator[Batch]:
        """Give this rank's samples of each batch."""
        rank = dist.get_rank()
        for which in turn:
            yield self._samples.__getitems__(which[rank::RANKS])

    def __iter__(self) -> Iterator[list[int]]:
        for number, order in enumerate(shuffled(list(self.times), self.rounds)):
            for name in order:
                turn = self.some(number * self.steps, self.steps)
                before, started = Timed.seconds, clock()
                if name == OFFLOOP:
                    yield from turn
                    self.exchanges.append(Timed.seconds - before)
                else:
                    self.by_hand[name].train(self.own(turn))
                self.times[name].append(clock() - started)


def loader_of(task: Task, numbers: Numbers) -> Any:
    """Return the loader of a run, whose batches are split among the ranks."""
    return DataLoader(Samples(task), batch_sampler=numbers, collate_fn=lambda batch: batch)  # type: ignore


class Timed:
    """Counts the seconds of all exchanges."""

    seconds = 0.0
    count = 0

    @classmethod
    def install(cls) -> None:
        """Count from now on."""
        exchange = Agreement.exchange

        def timed(self: Agreement, *arguments: Any, **named: Any) -> Any:
            started = clock()
            try:
                return exchange(self, *arguments, **named)
            finally:
                cls.seconds += clock() - started
                cls.count += 1

        Agreement.exchange = timed  # type: ignore[method-assign]


class Commands(Callback):
    """Gives commands at random moments, from a thread of its own, and stops the run after the last one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.latencies: list[float] = []

    async def on_train_start(self, event: TrainStart, run: Any) -> None:
        threading.Thread(target=self._give, args=(run,), daemon=True).start()

    def _give(self, run: Any) -> None:
        moments = random.Random(0)
        time.sleep(1.0)
        for _ in range(self.count):
            time.sleep(moments.uniform(0.0, 0.1))
            given = clock()
            self.latencies.append(run.call_nowait(lambda trainer: clock()).result() - given)
        run.stop_nowait("all given")


def endless(task: Task) -> Any:
    """Return a loader of very many batches."""
    return loader_of(task, Numbers(task, 10**9))


def trainer_of(task: Task, folder: str, name: str) -> Trainer:
    """Return a trainer with everything on."""
    model = task.model()
    return Trainer(
        model,
        optimizer_of(model),
        loss=loss_of,
        device="cpu",
        run_dir=folder,
        run_name=name,
        callbacks=[ModelCheckpoint(every_n_steps=1000), MetricLogger()],
    )


def rank_main(arguments: argparse.Namespace) -> None:
    """Measure on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    logging.getLogger("offloop").setLevel(
        logging.ERROR
    )  # that the run waits for its data, while others train
    Timed.install()
    folder, is_first = os.environ["OFFLOOP_BENCHMARK_FOLDER"], os.environ["RANK"] == "0"
    rounds, commands = (4, 10) if arguments.quick else (arguments.rounds, arguments.commands)
    report = Report(
        f"{RANKS} ranks against a hand-written loop on DistributedDataParallel: slices of {SECONDS:g} s x {rounds}",
        [
            "step",
            "by hand, ms",
            "ratio (95 %)",
            "A/A (95 %)",
            "goal",
            "agreement",
            "command p50, ms",
            "p99, ms",
        ],
    )
    for task in TASKS:
        trainer_of(task, folder, f"first {task.name}").train(endless(task), max_steps=20)
        by_hand = ByHand(task)
        by_hand.train(cycle(task.batches(8), 0, 10))
        started = clock()
        by_hand.train(cycle(task.batches(8), 0, 20))
        said = torch.tensor([(clock() - started) / 20])
        dist.broadcast(said, 0)
        loader = Turns(task, rounds, max(2, round(SECONDS / said.item())))
        with report.measuring():
            trainer_of(task, folder, f"turns {task.name}").train(loader_of(task, loader), epochs=1)
            giving = Commands(commands)
            trainer_of(task, folder, f"commands {task.name}").train(
                endless(task), max_steps=10**9, callbacks=[giving]
            )
        times = {name: each[WARM_UP:] for name, each in loader.times.items()}
        ratio, a_a = ratio_of(times[OFFLOOP], times[HAND]), ratio_of(times[HAND_AGAIN], times[HAND])
        share = sum(loader.exchanges[WARM_UP:]) / sum(times[OFFLOOP])
        if is_first:
            p50, p99 = quantile(giving.latencies, 0.5), quantile(giving.latencies, 0.99)
            step = median_of([each / loader.steps for each in times[HAND]])
            report.row(
                task.name,
                f"{step.median * 1e3:.2f}",
                ratio,
                a_a,
                verdict(ratio, 1.02, a_a),
                f"{share:.2%}",
                f"{p50 * 1e3:.0f}",
                f"{p99 * 1e3:.0f}",
            )
            report.figure(
                task.name,
                {
                    "ratio": str(ratio),
                    "a_a": str(a_a),
                    "agreement": share,
                    "command_p50": p50,
                    "command_p99": p99,
                },
            )
    if is_first:
        report.finish(arguments.json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=60, help="slices of each contender")
    parser.add_argument("--commands", type=int, default=300, help="commands for the latency, per row")


def main() -> int:
    """Start the ranks, or be one."""
    arguments = parse(__doc__, add_arguments)
    if "RANK" in os.environ:
        rank_main(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        environment = {"OMP_NUM_THREADS": "1", "OFFLOOP_BENCHMARK_FOLDER": folder}
        given = [str(Path(__file__)), *sys.argv[1:]]
        return subprocess.run([*command, *given], env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
