"""How fast does a program get the events of a run that it watches, and what does a lost connection cost?

A run in another process is paused, and a thread there publishes events on demand: they take the usual way over bus,
hub, server and the loopback interface to this process, which iterates over them on asyncio. In turns:

    samples      40,000 `StepEnd`s at once: from the order to publish them until the last one is here
    milestones   2,000 events at once, as many as a server keeps, likewise
    coming back  the connection is cut and 1,000 milestones are published: from the moment that a connection is possible
                 again until the last of them is here, all in order and once

    python benchmarks/watching.py [--quick] [--json FILE]
"""

import asyncio
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measure import Report, clock, parse

from offloop.dashboard import Dashboard, Watch, connect
from offloop.engine import Event, StepEnd, Subscription
from offloop.engine.testing import EndlessLoader, tiny_trainer

SAMPLES, MILESTONES, MISSED = 40_000, 2_000, 1_000
GOAL = 50_000
PROXY = Path(__file__).parents[1] / "tests" / "dashboard" / "viewers"


class Mark(Event, frozen=True):
    """A milestone."""

    number: int = 0


# The run: another process -------------------------------------------------------------------------


async def train() -> None:
    """Publish what the input asks for: a kind and a number, line by line."""
    async with (
        Dashboard(port=0, quiet=True) as dashboard,
        tiny_trainer(callbacks=[dashboard]).start(EndlessLoader(), max_steps=10**9) as run,
    ):
        await run.pause()

        def publish() -> None:
            print(dashboard.url, flush=True)
            for line in sys.stdin:
                kind, count = line.split()
                for number in range(int(count)):
                    run.publish(
                        Mark(number=number) if kind == "marks" else StepEnd(loss=0.5, lr=0.1, samples=8)
                    )

        await asyncio.to_thread(publish)
        await run.stop()


@contextlib.contextmanager
def training() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address of its page."""
    command = [sys.executable, __file__, "--train"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield process, process.stdout.readline().strip()
        process.stdin.close()


def order(process: "subprocess.Popen[str]", kind: str, count: int) -> None:
    """Have the process publish."""
    assert process.stdin is not None
    process.stdin.write(f"{kind} {count}\n")
    process.stdin.flush()


# The program --------------------------------------------------------------------------------------


async def take(events: Subscription[Event], count: int) -> list[Event]:
    """Return the next events."""
    return [await anext(events) for _ in range(count)]


async def measure(rounds: int) -> tuple[dict[str, list[float]], int]:
    """Return events a second of each kind and seconds of coming back, and how many samples were dropped."""
    sys.path.insert(0, str(PROXY))
    from cut_proxy import CutProxy

    found: dict[str, list[float]] = {"samples": [], "milestones": [], "coming back": []}
    with training() as (process, url), CutProxy(int(url.split(":")[2].split("/")[0])) as proxy:
        async with connect(url) as direct, connect(proxy.url(url)) as cut:
            steps, marks, others = (
                direct.events(StepEnd, buffer=1_000_000),
                direct.events(Mark),
                cut.events(Mark),
            )
            for subscription in (steps, marks, others):
                assert subscription.statistics.waiting == 0
            # The server learns that samples are wanted.
            await direct.resume()
            await take(steps, 1)
            await direct.pause()
            while steps.statistics.waiting:
                await take(steps, steps.statistics.waiting)
                await asyncio.sleep(0.5)
            for _ in range(rounds):
                started = clock()
                order(process, "steps", SAMPLES)
                await take(steps, SAMPLES)
                found["samples"].append(SAMPLES / (clock() - started))

                started = clock()
                order(process, "marks", MILESTONES)
                numbers = [event.number for event in await take(marks, MILESTONES) if isinstance(event, Mark)]
                found["milestones"].append(MILESTONES / (clock() - started))
                assert numbers == list(range(MILESTONES))
                await take(others, MILESTONES)

                proxy.cut()
                await gone(cut)
                order(process, "marks", MISSED)
                await take(marks, MISSED)
                started = clock()
                proxy.restore()
                numbers = [event.number for event in await take(others, MISSED) if isinstance(event, Mark)]
                found["coming back"].append(clock() - started)
                assert numbers == list(range(MISSED))
            return found, steps.statistics.dropped


async def gone(watch: Watch) -> None:
    """Wait until a connection is lost."""
    while watch.is_connected:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.001)


def main() -> None:
    """Measure and report."""
    if "--train" in sys.argv:
        asyncio.run(train())
        return
    arguments = parse(__doc__)
    report = Report(
        "events of a watched run",
        ["case", "median", "least", "most", "goal"],
        packages=["websockets", "msgspec"],
    )
    with report.measuring():
        found, dropped = asyncio.run(measure(3 if arguments.quick else 10))
    for case, values in found.items():
        unit, scale = ("ms", 1_000) if case == "coming back" else ("/s", 1)
        goal = f">= {GOAL:,}/s" if case == "samples" else ""
        cells = [
            f"{scale * each:,.0f} {unit}" for each in (statistics.median(values), min(values), max(values))
        ]
        report.row(case, *cells, goal)
        report.figure(case, values)
    report.note(
        f"{dropped:,} samples were dropped on the way; coming back includes the pause before an attempt"
    )
    report.figure("dropped", dropped)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
