"""What does a tracking server that nobody can reach cost a run, and are the run's own files complete?

Whole runs take turns, in another order each round: without the logger, with it and a server that refuses, with it and
a server that takes the connection and says nothing, and without it again (the A/A row). Every run has a run
directory and a `MetricLogger` that writes each step, and the tracking logger logs each step. The time is that of
training, from the 20th batch to the last one. After each run the steps in `metrics.jsonl` are counted.

    python benchmarks/tracking_server.py [--quick] [--rounds 12] [--json FILE]
"""

import argparse
import contextlib
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch
from measure import (
    TEN_MS,
    TINY,
    Report,
    Task,
    TimedLoader,
    loss_of,
    optimizer_of,
    parse,
    ratio_of,
    take_turns,
    verdict,
)

from offloop.callbacks import MetricLogger, MLflowLogger
from offloop.engine import Callback, Trainer

WARM_UP = 20
STEPS = {TEN_MS: 100, TINY: 2000}  # about a second each
GOAL = 1.01
WITHOUT, AGAIN = "no tracking", "no tracking, again"
REFUSES, SILENT = "refuses", "silent"


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Give the addresses of a port where nobody listens, and of a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refuses = f"http://127.0.0.1:{taken.getsockname()[1]}"
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    connections: list[socket.socket] = []

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listening.accept()[0])

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield {REFUSES: refuses, SILENT: f"http://127.0.0.1:{listening.getsockname()[1]}"}
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
        for each in connections:
            each.close()


class Runs:
    """The runs of one task, with their seconds per step and what their files lack."""

    def __init__(self, task: Task, addresses: dict[str, str]) -> None:
        self.task = task
        self.addresses = addresses
        self.per_step: dict[str, list[float]] = {name: [] for name in (WITHOUT, REFUSES, SILENT, AGAIN)}
        self.missing = 0
        self.unhandled = 0

    def contender(self, name: str) -> Callable[[], None]:
        """Return a function that makes one run."""

        def train() -> None:
            loader = TimedLoader(self.task, STEPS[self.task], WARM_UP)
            model = self.task.model()
            callbacks: list[Callback] = [MetricLogger(every_n_steps=1)]
            address = self.addresses.get(name)
            if address is not None:
                callbacks.append(MLflowLogger(tracking_uri=address, every_n_steps=1, timeout=0.05))
            with tempfile.TemporaryDirectory() as directory:
                trainer = Trainer(
                    model,
                    optimizer_of(model),
                    loss=loss_of,
                    callbacks=callbacks,
                    device="cpu",
                    run_dir=directory,
                )
                result = trainer.train(loader, epochs=1)
                assert result.dir is not None
                self.missing += loader.steps - steps_in(result.dir / "metrics.jsonl")
            if address is not None:
                costs = result.callback_costs["MLflowLogger"]
                self.unhandled += loader.steps + 3 - costs.events + costs.dropped  # start, epoch, end
            self.per_step[name].append(loader.per_step)

        return train


class Line(msgspec.Struct):
    """A row of a step has a loss."""

    step: int
    loss: float | str | None = None


def steps_in(path: Path) -> int:
    """Count the steps that a file of metrics has."""
    decode = msgspec.json.Decoder(Line).decode
    return len({line.step for line in map(decode, path.read_bytes().splitlines()) if line.loss is not None})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=12, help="runs of each contender")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 2 if arguments.quick else arguments.rounds
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    torch.set_num_threads(1)
    logging.getLogger("offloop").setLevel(logging.CRITICAL)  # that nobody answers is the point
    report = Report(
        f"A run with an MLflow server that nobody can reach against one without the logger, {rounds} runs each",
        [
            "task",
            "server",
            "ratio (95 %)",
            "A/A (95 %)",
            "step without, ms",
            "steps missing in the file",
            "goal",
        ],
        packages=("mlflow-skinny",),
    )
    for task in (TEN_MS, TINY):
        with servers() as addresses, report.measuring():
            runs = Runs(task, addresses)
            runs.contender(REFUSES)()  # imports what it needs
            for times in runs.per_step.values():
                times.clear()
            take_turns({name: runs.contender(name) for name in runs.per_step}, rounds)
        a_a = ratio_of(runs.per_step[AGAIN], runs.per_step[WITHOUT])
        without = f"{1e3 * sum(runs.per_step[WITHOUT]) / rounds:.3f}"
        for name in (REFUSES, SILENT):
            ratio = ratio_of(runs.per_step[name], runs.per_step[WITHOUT])
            report.row(task.name, name, ratio, a_a, without, runs.missing, verdict(ratio, GOAL, a_a))
            report.figure(f"{task.name}, {name}", {"ratio": ratio.median, "a_a": a_a.median})
        if runs.unhandled:
            report.note(f"{task.name}: the logger missed {runs.unhandled} events")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
