"""How long from a milestone to the first line of its handler, and from a command to `CommandApplied`?

The training thread publishes a milestone of its own ten times a second, beside 10 ms steps and beside the tiny MLP,
and an `async def` handler reads the clock. The A/A row is the same again. Then an async task gives commands at
random times and notes how many step boundaries later each was applied, and after how many milliseconds: 1 means the
very next one, the end of the step in progress.

    python benchmarks/latency.py [--quick] [--seconds 20] [--json FILE]
"""

import argparse
import random
import time
from collections.abc import Iterator

import anyio
import torch
from measure import TEN_MS, TINY, Batch, Report, Task, clock, loss_of, optimizer_of, parse, quantile

from offloop.engine import Callback, CommandApplied, Event, Run, Trainer

INTERVAL = 0.1  # seconds between two milestones: below the twenty a second that wake the event loop at once


class Ping(Event, frozen=True, kw_only=True):
    """A milestone that knows when it was made."""

    sent: float
    """On the clock of `time.perf_counter`."""


class Pong(Callback):
    """Notes how long each milestone took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def on_ping(self, event: Ping, run: Run) -> None:
        self.seconds.append(clock() - event.sent)


class Pinging(Trainer):
    """Publishes a milestone in the middle of a step, ten times a second."""

    next_at = 0.0

    def training_step(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        loss: torch.Tensor = loss_of(self.model(inputs), targets)
        if clock() >= self.next_at:
            self.next_at = clock() + INTERVAL
            self.publish(Ping(sent=clock()))
        return loss


class Endless:
    """Gives batches for ever."""

    def __init__(self, task: Task) -> None:
        self.batches = task.batches()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.batches


def trainer_of(task: Task, trainer_class: type[Trainer], *callbacks: Callback) -> Trainer:
    """Return a trainer of the task."""
    model = task.model()
    return trainer_class(model, optimizer_of(model), loss=loss_of, device="cpu", callbacks=callbacks)


def milestones(task: Task, seconds: float) -> list[float]:
    """Return the seconds from milestone to handler."""
    pong = Pong()
    trainer_of(task, Pinging, pong).train(Endless(task), max_time=seconds)
    return pong.seconds[2:]


async def commands(task: Task, seconds: float) -> tuple[list[int], list[float], list[float]]:
    """Return for each command: boundaries until applied, seconds until applied, seconds until awaited."""
    boundaries: list[int] = []
    applied_after: list[float] = []
    awaited_after: list[float] = []
    waits = random.Random(0)
    async with trainer_of(task, Trainer).start(Endless(task), max_time=seconds + 30) as run:
        events = run.events(CommandApplied)
        await run.set_lr(1e-3)
        await anext(events)
        end = clock() + seconds
        while clock() < end:
            await anyio.sleep(waits.uniform(0.02, 0.06))
            step, given, given_at = run.step, clock(), time.time()
            await run.set_lr(1e-3)
            awaited_after.append(clock() - given)
            event = await anext(events)
            boundaries.append(event.step - step)
            applied_after.append(event.time - given_at)
        await run.stop()
    return boundaries, applied_after, awaited_after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    seconds = 2.0 if arguments.quick else arguments.seconds
    torch.set_num_threads(1)
    report = Report(
        f"Latency in ms, {seconds:g} s each",
        ["from ... to", "beside", "n", "p50", "p90", "p99", "longest", "goal"],
    )
    for task, again in ((TEN_MS, ""), (TEN_MS, " again (A/A)"), (TINY, ""), (TINY, " again (A/A)")):
        with report.measuring():
            found = milestones(task, seconds)
        p50, p90, p99 = (quantile(found, share) * 1e3 for share in (0.5, 0.9, 0.99))
        goal = "reported"
        if task is TEN_MS:
            goal = f"p50 <= 0.3: {'met' if p50 <= 0.3 else 'missed'}; p99 <= 2: {'met' if p99 <= 2 else 'missed'}"
        figures = (f"{each:.2f}" for each in (p50, p90, p99, max(found) * 1e3))
        report.row("milestone to handler", task.name + again, len(found), *figures, goal)
        report.figure(f"milestone, {task.name}{again}", {"p50": p50, "p99": p99})
    for task in (TEN_MS, TINY):
        with report.measuring():
            boundaries, applied, awaited = anyio.run(commands, task, seconds)
        worst = max(boundaries)
        goal = f"1 boundary: {sum(each <= 1 for each in boundaries)} of {len(boundaries)}, at most {worst}"
        rows = (("command to applied", applied, goal), ("command to awaited", awaited, "reported"))
        for what, values, said in rows:
            figures = (f"{quantile(values, share) * 1e3:.2f}" for share in (0.5, 0.9, 0.99, 1.0))
            report.row(what, task.name, len(values), *figures, said)
        report.figure(f"command, {task.name}", {"boundaries": boundaries, "p50": quantile(applied, 0.5)})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
