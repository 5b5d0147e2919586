"""Do 32 runs at once in one process all finish, each bit-identical to the same run alone?

Each run trains a small classifier with a seed of its own on a shuffling DataLoader that has its own generator
(nothing in the step draws from torch's global ones), validates each epoch and has two callbacks. First each run
alone, one after the other; then all at once on one event loop. Compared are the weights, bit for bit, and the
sequence of training events without its times.

    python benchmarks/many_runs.py [--quick] [--runs 32] [--json FILE]
"""

import argparse
import resource
import sys
import threading
import time

import anyio
import torch
from measure import Report, clock, parse

from offloop.engine import Trainer
from offloop.engine.testing import Recorder, reproducible

EPOCHS = 3
SAMPLES, BATCH_SIZE, FEATURES, CLASSES = 2048, 32, 32, 8


class OneRun:
    """A run with its own model, data and generators."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        data = torch.utils.data.TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))
        self.loader = torch.utils.data.DataLoader(
            data, BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )
        # A plain loader draws its base seed from torch's global generator, which another run may use meanwhile
        self.val_loader = [(inputs[:256], inputs[:256, :CLASSES].argmax(dim=1))]
        self.model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES)
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.uniform_(-0.2, 0.2, generator=generator)
        self.recorders = (Recorder(), Recorder())

    async def train(self) -> None:
        """Train on this event loop."""
        trainer = Trainer(
            self.model,
            torch.optim.AdamW(self.model.parameters(), lr=1e-3),
            loss=torch.nn.functional.cross_entropy,
            device="cpu",
        )
        await trainer.train_async(self.loader, self.val_loader, epochs=EPOCHS, callbacks=self.recorders)

    def equals(self, other: "OneRun") -> bool:
        """True if weights and training events are the same, bit for bit."""
        weights = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in weights) and all(
            reproducible(mine.events) == reproducible(theirs.events)
            for mine, theirs in zip(self.recorders, other.recorders, strict=True)
        )


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


async def alone(runs: list[OneRun]) -> None:
    """Train one after the other."""
    for run in runs:
        await run.train()


async def at_once(runs: list[OneRun]) -> None:
    """Train all together."""
    async with anyio.create_task_group() as tasks:
        for run in runs:
            tasks.start_soon(run.train)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--runs", type=int, default=32, help="how many")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    count = 8 if arguments.quick else arguments.runs
    torch.set_num_threads(1)
    report = Report(
        f"{count} runs of {EPOCHS} epochs in one process, alone and at once",
        ["how", "seconds", "CPU seconds", "peak memory, MB", "finished", "bit-identical to alone"],
    )
    finished: dict[str, list[OneRun]] = {}
    with report.measuring():
        for name, train in (("alone", alone), ("alone again (A/A)", alone), ("at once", at_once)):
            runs = finished[name] = [OneRun(seed) for seed in range(count)]
            started, cpu = clock(), time.process_time()
            anyio.run(train, runs)
            seconds, cpu = clock() - started, time.process_time() - cpu
            ended = sum(bool(r.recorders[0].events) and r.recorders[0].is_closed for r in runs)
            same = sum(run.equals(other) for run, other in zip(runs, finished["alone"], strict=True))
            report.row(name, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak():.0f}", ended, f"{same} of {count}")
            report.figure(name, {"seconds": seconds, "cpu": cpu, "peak": peak(), "same": same})
    report.note(f"threads left at the end: {threading.active_count() - 1}")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
