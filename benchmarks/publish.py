"""What does it cost to publish one event, building it included, with 0, 1 and 100 subscribers?

The way of the training loop: a `StepEnd` with all its fields is built and appended, from a thread beside an
event loop that hands over every 50 ms to subscribers that only take. 1,000 publishes are timed together, then the
thread rests for as long as a training loop would compute between them, so that the drainer works as in a run
and the queue stays short. The bus with no subscriber is measured twice: the A/A row.

The CPU time of the publishing thread is given beside wall time: what the drainer takes from the interpreter
meanwhile is in the latter.

    python benchmarks/publish.py [--quick] [--batches 400] [--json FILE]
"""

import argparse
import threading
import time
from collections.abc import Callable

import anyio
from measure import Report, clock, median_of, parse, quantile, ratio_of, shuffled

from offloop.engine import StepEnd, Subscription
from offloop.engine.bus.event_bus import Bus

PUBLISHES = 1000
REST = 0.02  # seconds between two batches of publishes


def publisher(bus: Bus, cpu: list[float], wall: list[float]) -> Callable[[], None]:
    """Return a function that publishes a batch as the training loop does, and takes its times."""

    def publish() -> None:
        emit, offset = bus.emit, bus.clock.offset
        cpu_started, started = time.thread_time(), clock()
        for step in range(PUBLISHES):
            emit(
                StepEnd(
                    run_id="benchmark",
                    time=offset + started,
                    epoch=0,
                    step=step,
                    batch=step,
                    loss=1.0,
                    lr=0.1,
                    samples=32,
                    data_time=0.001,
                    step_time=0.01,
                )
            )
        wall.append((clock() - started) / PUBLISHES)
        cpu.append((time.thread_time() - cpu_started) / PUBLISHES)

    return publish


async def consume(subscription: Subscription[StepEnd]) -> None:
    """Take everything, as a subscriber does."""
    while await subscription.take_batch():
        pass


async def measure(counts: dict[str, int], batches: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return CPU and wall seconds of a publish in each batch, by contender."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in counts}
    async with anyio.create_task_group() as tasks:
        buses = {name: Bus() for name in counts}
        for name, bus in buses.items():
            tasks.start_soon(bus.drain)
            for number in range(counts[name]):
                tasks.start_soon(consume, bus.subscribe((StepEnd,), name=f"subscriber {number}"))
        publishers = {name: publisher(bus, *times[name]) for name, bus in buses.items()}

        def work() -> None:
            for order in shuffled(list(publishers), batches):
                for name in order:
                    publishers[name]()
                    time.sleep(REST)
            for bus in buses.values():
                bus.close()

        thread = threading.Thread(target=work)
        thread.start()
    thread.join()
    return times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--batches", type=int, default=400, help=f"batches of {PUBLISHES} publishes each")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    batches = 20 if arguments.quick else arguments.batches
    report = Report(
        f"Publishing one StepEnd, building included: us, {batches} batches of {PUBLISHES} publishes",
        ["subscribers", "CPU min", "CPU median (95 %)", "wall min", "wall median (95 %)", "CPU / 0", "goal"],
    )
    counts = {"0": 0, "0 again (A/A)": 0, "1": 1, "100": 100}
    with report.measuring():
        times = anyio.run(measure, counts, batches)
    for name, (cpu, wall) in times.items():
        middle, ratio = median_of(cpu), ratio_of(cpu, times["0"][0])
        goal = "<= 1 us: " + ("met" if middle.high <= 1e-6 else "missed" if middle.low > 1e-6 else "open")
        cells = (f"{min(cpu) * 1e6:.2f}", middle.scaled(1e6), f"{min(wall) * 1e6:.2f}")
        report.row(name, *cells, median_of(wall).scaled(1e6), ratio, goal)
        report.figure(name, {"cpu": middle.median, "wall": median_of(wall).median, "p90": quantile(cpu, 0.9)})
    report.note('"The same for all three" holds where the interval of CPU / 0 overlaps that of the A/A row.')
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
