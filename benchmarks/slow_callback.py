"""How much longer does a run take if a callback awaits 50 ms on each step's event?

Whole runs take turns: without the callback, with it, and without it again (the A/A row), in another order each
round. The time is that of training, from the 20th batch to the last one: the callback then has hundreds of
events left, and a run gives it `drain_timeout` (30 s by default, 0.1 s here) to handle them before it is
cancelled, which is the deal for a callback that cannot keep up.

    python benchmarks/slow_callback.py [--quick] [--rounds 20] [--json FILE]
"""

import argparse
import logging
from collections.abc import Callable

import anyio
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

from offloop.engine import Callback, Run, StepEnd, Trainer

WARM_UP = 20
STEPS = {TEN_MS: 100, TINY: 2000}  # about a second each
AWAITED = 0.05


class Slow(Callback):
    """Awaits something on each step's event, as a callback that talks to a server does."""

    def __init__(self) -> None:
        self.handled = 0

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        await anyio.sleep(AWAITED)
        self.handled += 1


def run(task: Task, record: list[float], *, slow: bool) -> Callable[[], None]:
    """Return a function that trains once and notes its seconds of training."""

    def train() -> None:
        model = task.model()
        callbacks = [Slow()] if slow else []
        trainer = Trainer(
            model, optimizer_of(model), loss=loss_of, device="cpu", callbacks=callbacks, drain_timeout=0.1
        )
        loader = TimedLoader(task, STEPS[task], WARM_UP)
        trainer.train(loader, epochs=1)
        record.append(loader.per_step * STEPS[task])

    return train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=20, help="runs of each kind")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 3 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    logging.getLogger("offloop").setLevel(logging.CRITICAL)  # that the callback was cancelled is no news here
    report = Report(
        f"Training time with a callback that awaits 50 ms on each step's event, {rounds} runs of each",
        ["task", "steps", "with / without (95 %)", "A/A (95 %)", "without, s", "goal"],
    )
    for task in (TEN_MS, TINY):
        times: dict[str, list[float]] = {"without": [], "with": [], "without again": []}
        with report.measuring():
            take_turns(
                {name: run(task, record, slow=name == "with") for name, record in times.items()}, rounds
            )
        ratio = ratio_of(times["with"], times["without"])
        a_a = ratio_of(times["without again"], times["without"])
        without = f"{sum(times['without']) / rounds:.2f}"
        report.row(task.name, STEPS[task], ratio, a_a, without, verdict(ratio, 1.02, a_a))
        report.figure(task.name, {"ratio": ratio.median, "a_a": a_a.median})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
