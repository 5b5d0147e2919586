"""How many events a second reach one async subscriber, and how does that compare with other bridges to asyncio?

Two ways to measure: "from a thread" is end to end, from the first publish in a thread to the last event in the
subscriber's hands; "pre-filled" begins with a full queue, so it is the cost of handing over and taking alone.
The contenders take turns, round by round; each gets as many events as it carries in about 0.1 s.

    offloop, iterated           async for event in bus.subscribe((StepEnd,))
    offloop, through a handler  a callback's `async def on_step_end`, with the accounting of costs
    janus, culsans              queue.sync_q.put / await queue.async_q.get, unbounded; janus also with room
                                for 10,000, as many samples as offloop's buffers hold by default
    call_soon_threadsafe        loop.call_soon_threadsafe(handle, event): one wake for each event

All carry `StepEnd` events made beforehand; publishing in offloop includes nothing else. Nothing is dropped: buffers
are large, and the publishing thread waits while nearly as much is waiting as the bus takes.

    python benchmarks/delivery.py [--quick] [--rounds 25] [--json FILE]
"""

import argparse
import asyncio
import importlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from measure import Interval, Report, clock, median_of, parse, ratio_of, shuffled

from offloop.engine import Callback, StepEnd
from offloop.engine.bus.event_bus import MAX_WAITING_SAMPLES, Bus
from offloop.engine.bus.subscription import BUFFER
from offloop.engine.callback import Handlers
from offloop.engine.observers.observer import Observer

FAST, SLOW = 80_000, 20_000  # events of one measurement; FAST must fit into the bus without a drainer
Contender = Callable[[], Awaitable[float]]  # returns events per second


class Counting(Callback):
    """Counts the events that reach its handler."""

    buffer = 10 * FAST

    def __init__(self, expected: int) -> None:
        self.left = expected
        self.done = asyncio.Event()

    async def on_step_end(self, event: StepEnd, run: Any) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()


def events(count: int) -> list[StepEnd]:
    """Return new events: one can be published only once."""
    return [StepEnd(loss=1.0, lr=0.1, epoch=0, step=n, batch=n, time=1.0, run_id="r") for n in range(count)]


def publish_all(bus: Bus, made: list[StepEnd]) -> None:
    """Publish from this thread, not faster than the event loop takes."""
    emit, queue = bus.emit, bus._queue
    for start in range(0, len(made), 1000):
        while len(queue) > MAX_WAITING_SAMPLES - 2000:
            time.sleep(0.0005)
        for event in made[start : start + 1000]:
            emit(event)


async def offloop(*, by_handler: bool, filled: bool) -> float:
    """Carry events over offloop's bus."""
    made = events(FAST)
    bus = Bus()
    subscription: Any = bus.subscribe((StepEnd,), buffer=10 * FAST)
    counting = Counting(FAST)
    tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=publish_all, args=(bus, made))
    if by_handler:
        observer = Observer(
            Handlers(counting, "Counting"), subscription, None, bus.publish, lambda error: None
        )
        tasks.append(asyncio.create_task(observer.serve()))
    if filled:
        publish_all(bus, made)
    started = clock()
    tasks.append(asyncio.create_task(bus.drain()))
    if not filled:
        thread.start()
    if by_handler:
        await counting.done.wait()
    else:
        left = FAST
        async for _ in subscription:
            left -= 1
            if not left:
                break
    rate = FAST / (clock() - started)
    bus.close()
    await asyncio.gather(*tasks)
    if not filled:
        thread.join()
    return rate


async def queue_of(package: str, *, filled: bool, maxsize: int = 0) -> float:
    """Carry events over a queue that has a sync and an async side."""
    made = events(SLOW)
    queue = importlib.import_module(package).Queue(maxsize)
    put, get = queue.sync_q.put, queue.async_q.get

    def put_all() -> None:
        for event in made:
            put(event)

    thread = threading.Thread(target=put_all)
    if filled:
        thread.start()
        await asyncio.to_thread(thread.join)  # the event loop has to run: some bridges tell it about each put
    started = clock()
    if not filled:
        thread.start()
    for _ in range(SLOW):
        await get()
    rate = SLOW / (clock() - started)
    await asyncio.to_thread(thread.join)
    await queue.aclose()
    return rate


async def call_soon_threadsafe() -> float:
    """Carry each event by a wake of its own."""
    made = events(SLOW)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    left = SLOW

    def handle(event: StepEnd) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    def call_all() -> None:
        for event in made:
            loop.call_soon_threadsafe(handle, event)

    thread = threading.Thread(target=call_all)
    started = clock()
    thread.start()
    await done.wait()
    rate = SLOW / (clock() - started)
    await asyncio.to_thread(thread.join)
    return rate


def is_there(package: str) -> bool:
    """True if a package can be imported."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


async def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Return the rates of each contender."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for order in shuffled(list(contenders), rounds + 1):
        for name in order:
            rates[name].append(await contenders[name]())
            await asyncio.sleep(0.02)
    return {name: values[1:] for name, values in rates.items()}  # the first round is a warm-up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each contender")


def at_least(figure: Interval, goal: float, unit: str) -> str:
    """Say whether a figure reaches `>= goal`."""
    result = (
        "met" if figure.low >= goal else "missed" if figure.high < goal else "open, the interval spans it"
    )
    return f">= {goal:g} {unit}: {result}"


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 3 if arguments.quick else arguments.rounds
    report = Report(
        f"Events a second to one async subscriber, {rounds} rounds",
        ["way", "from", "events/s (95 %)", "x janus from the same", "goal"],
        packages=("janus", "culsans"),
    )
    contenders: dict[str, Contender] = {
        "offloop, iterated|a thread": lambda: offloop(by_handler=False, filled=False),
        "offloop, iterated, again (A/A)|a thread": lambda: offloop(by_handler=False, filled=False),
        "offloop, through a handler|a thread": lambda: offloop(by_handler=True, filled=False),
        "offloop, iterated|pre-filled": lambda: offloop(by_handler=False, filled=True),
        "offloop, through a handler|pre-filled": lambda: offloop(by_handler=True, filled=True),
    }
    if is_there("janus"):
        contenders["janus|a thread"] = lambda: queue_of("janus", filled=False)
        contenders["janus of 10,000|a thread"] = lambda: queue_of("janus", filled=False, maxsize=BUFFER)
        contenders["janus|pre-filled"] = lambda: queue_of("janus", filled=True)
    if is_there("culsans"):
        contenders["culsans|a thread"] = lambda: queue_of("culsans", filled=False)
        contenders["culsans|pre-filled"] = lambda: queue_of("culsans", filled=True)
    contenders["call_soon_threadsafe|a thread"] = call_soon_threadsafe
    with report.measuring():
        rates = asyncio.run(measure(contenders, rounds))
    for name, values in rates.items():
        way, _, source = name.partition("|")
        rate = median_of(values)
        against = ratio_of(values, rates[f"janus|{source}"]) if f"janus|{source}" in rates else None
        factor = "-" if against is None else f"{against.median:.1f} ({against.low:.1f}-{against.high:.1f})"
        goal = "-"
        if way.startswith("offloop"):
            goal = at_least(rate, 0.5e6 if "handler" in way else 1e6, "/s")
            if against is not None:
                goal += f"; {at_least(against, 5, 'x')}"
        cells = f"{rate.median:,.0f} ({rate.low:,.0f}-{rate.high:,.0f})"
        report.row(way, source, cells, factor, goal)
        report.figure(name, rate)
    for package in ("janus", "culsans"):
        if not is_there(package):
            report.row(package, "-", "not installed here", "-", "-")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
