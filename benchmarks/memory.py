"""Does memory stay flat over ten million published steps, with a subscriber that is far too slow?

First the bus alone: a thread publishes as fast as it can, an event loop hands over, one subscriber takes an
event every 50 ms (it drops, by its policy), one keeps up. Then a real run of the tiny MLP with the same
slow observer. The resident memory of the process is noted on the way; "flat" means that it is at the end within
5 MB of where it was after the first fifth, when buffers had filled.

    python benchmarks/memory.py [--quick] [--events 10000000] [--seconds 40] [--json FILE]
"""

import argparse
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import torch
from measure import TINY, Batch, Report, clock, loss_of, optimizer_of, parse

from offloop.engine import Callback, Run, StepEnd, Subscription, Trainer
from offloop.engine.bus.event_bus import Bus

NOTES = 10  # lines of the table for each part
FLAT = 5.0  # MB
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Return the resident memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


async def take_slowly(subscription: Subscription[StepEnd]) -> None:
    """Take one event every 50 ms until the end."""
    while subscription.take(1) or not subscription.statistics.closed:
        await anyio.sleep(0.05)
        if subscription.statistics.closed:
            subscription.take()


async def take_all(subscription: Subscription[StepEnd]) -> None:
    """Keep up."""
    while await subscription.take_batch():
        pass


async def bus_alone(report: Report, count: int) -> list[float]:
    """Publish `count` steps at full speed; returns the memory on the way."""
    bus = Bus()
    slow = bus.subscribe((StepEnd,), name="slow")
    quick = bus.subscribe((StepEnd,), name="quick")
    found: list[float] = []

    def publish() -> None:
        started = clock()
        for number in range(count):
            stamp = bus.clock.offset + clock()
            bus.emit(StepEnd(loss=1.0, lr=0.1, run_id="r", time=stamp, epoch=0, step=number, batch=number))
            if (number + 1) % (count // NOTES) == 0:
                found.append(resident())
                waiting = len(bus._queue)
                dropped = slow.statistics.dropped + bus._refused.total
                cells = (f"{number + 1:,}", f"{clock() - started:.1f}", f"{found[-1]:.1f}")
                report.row("bus alone", *cells, f"{waiting:,}", f"{dropped:,}")
        bus.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.drain)
        tasks.start_soon(take_slowly, slow)
        tasks.start_soon(take_all, quick)
        thread = threading.Thread(target=publish)
        thread.start()
    thread.join()
    return found


class Slow(Callback):
    """Awaits 50 ms on each step's event."""

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        await anyio.sleep(0.05)


class NotingLoader:
    """Gives batches for a number of seconds and notes memory on the way."""

    def __init__(self, report: Report, seconds: float) -> None:
        self.report, self.seconds = report, seconds
        self.found: list[float] = []
        self.trainer: Trainer | None = None

    def __iter__(self) -> Iterator[Batch]:
        batches = TINY.batches()
        started, steps = clock(), 0
        for note in range(1, NOTES + 1):
            while clock() - started < self.seconds * note / NOTES:
                yield batches[steps % len(batches)]
                steps += 1
            self.found.append(resident())
            assert self.trainer is not None and self.trainer.last_run is not None
            (slow,) = self.trainer.last_run.subscriptions
            cells = (f"{steps:,}", f"{clock() - started:.1f}", f"{self.found[-1]:.1f}")
            self.report.row("run", *cells, f"{slow.waiting:,}", f"{slow.dropped:,}")


def real_run(report: Report, seconds: float) -> list[float]:
    """Train with a slow observer of few events' buffer; returns the memory on the way."""
    model = TINY.model()
    loader = NotingLoader(report, seconds)
    callback = Slow()
    trainer = Trainer(
        model, optimizer_of(model), loss=loss_of, device="cpu", callbacks=[callback], drain_timeout=0.1
    )
    loader.trainer = trainer
    trainer.train(loader, epochs=1)
    return loader.found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--events", type=int, default=10_000_000, help="events on the bus alone")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the run")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    count = 500_000 if arguments.quick else arguments.events
    seconds = 5.0 if arguments.quick else arguments.seconds
    torch.set_num_threads(1)
    report = Report(
        f"Resident memory over {count:,} published steps and a run of {seconds:g} s, with a slow subscriber",
        ["part", "steps", "seconds", "memory, MB", "waiting", "dropped"],
    )
    with report.measuring():
        parts = {
            "bus alone": anyio.run(bus_alone, report, count),
            "run": real_run(report, seconds),
        }
    for name, found in parts.items():
        grown = found[-1] - found[NOTES // 5 - 1]
        says = "flat" if grown <= FLAT else "NOT flat"
        report.note(f"{name}: {says}: {grown:+.1f} MB from the first fifth to the end (bound {FLAT:g} MB)")
        report.figure(name, found)
    report.note("waiting: in the bus's queue (bus alone), in the slow subscriber's buffer (run).")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
