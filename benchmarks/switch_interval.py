"""What Python's switch interval does to a run: beside a thread that computes in Python, alone, and to other threads.

Each operator of torch lets go of the interpreter and gets it back when the thread that has it gives it up: after a
switch interval, where that thread computes in Python. Three tables:

1. Steps beside one second of pure Python: in a plain `def` observer, in an `async def` observer, in a thread of the
   host application. Times of a step in that second, over those just before it.
2. A run in which nothing computes, against the same run at Python's own 5 ms, in alternating slices, with A/A.
3. How much of its work a computing thread of the host gets done beside training, and how much two such threads
   get done together without any.

    python benchmarks/switch_interval.py [--quick] [--json FILE]
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch
from measure import (
    TINY,
    Batch,
    Interval,
    Report,
    Task,
    clock,
    loss_of,
    optimizer_of,
    parse,
    ratio_of,
    shuffled,
)

from offloop.engine import Callback, Event, Run, StepEnd, Trainer

PYTHONS: Final = 5e-3
INTERVALS: Final = (PYTHONS, 1e-3, 200e-6, 100e-6, 50e-6, 20e-6)
LARGE: Final = Task("large MLP", features=512, width=1536, layers=3, batch_size=64, steps_per_slice=1)
"""A step of about 25 ms on one core."""
SECOND: Final = 1.0


class Begin(Event, frozen=True):
    """Published where the computing is to begin."""


def compute(until: Callable[[], bool]) -> int:
    """Compute in pure Python; return how much was done, in rounds of about 0.2 ms."""
    rounds = 0
    while not until():
        sum(number * number for number in range(3000))
        rounds += 1
    return rounds


def compute_for(seconds: float) -> None:
    """Compute in pure Python for so many seconds of this thread's CPU time."""
    started = time.thread_time()
    compute(lambda: time.thread_time() - started >= seconds)


class Span:
    """When a computation began and ended; written by its thread, read by the training thread."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begun, self.ended = float("inf"), float("inf")

    def work(self) -> None:
        """Compute, and note when."""
        self.begun = clock()
        compute_for(self.seconds)
        self.ended = clock()


class PlainObserver(Callback):
    """Computes in its worker thread."""

    def __init__(self, span: Span) -> None:
        self.span = span

    def on_begin(self, event: Begin, run: Run) -> None:
        self.span.work()


class AsyncObserver(Callback):
    """Computes on the event loop, which it should not."""

    def __init__(self, span: Span) -> None:
        self.span = span

    async def on_begin(self, event: Begin, run: Run) -> None:
        self.span.work()


class HostThread(Callback):
    """Starts a thread of the application's that computes."""

    def __init__(self, span: Span) -> None:
        self.span = span

    def on_begin(self, event: Begin, run: Run) -> None:
        threading.Thread(target=self.span.work, daemon=True).start()


WHO: Final[dict[str, Callable[[Span], Callback]]] = {
    "def observer": PlainObserver,
    "async def observer": AsyncObserver,
    "host thread": HostThread,
}


class ContendedLoader:
    """Gives batches, alone at first, then until the computation has ended; notes when each was asked for."""

    def __init__(self, task: Task, trainer_of: Callable[[], Trainer], span: Span, alone: float) -> None:
        self.batches, self.trainer_of, self.span, self.alone = task.batches(), trainer_of, span, alone
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        steps = 0
        begun = clock()
        while clock() - begun < self.alone or steps < 5:
            self.asked.append(clock())
            yield self.batches[steps % len(self.batches)]
            steps += 1
        self.trainer_of().publish(Begin())
        while self.span.ended > clock():
            self.asked.append(clock())
            yield self.batches[steps % len(self.batches)]
            steps += 1
        self.asked.append(clock())

    def ratio(self) -> tuple[float, float]:
        """Return how long a step took beside the computation over alone, and its seconds alone."""
        pairs = list(zip(self.asked, self.asked[1:], strict=False))
        before = sorted(after - asked for asked, after in pairs if after <= self.span.begun)
        alone = before[len(before) // 2]
        # A step that reaches into the span counts with that share of it.
        steps = 0.0
        for asked, after in pairs:
            inside = min(after, self.span.ended) - max(asked, self.span.begun)
            steps += max(0.0, inside) / (after - asked)
        return (self.span.ended - self.span.begun) / steps / alone, alone


def contended(task: Task, who: str, interval: float, seconds: float) -> tuple[float, float]:
    """Train beside a computation of so many seconds."""
    span = Span(seconds)
    model = task.model()
    trainer: Trainer
    loader = ContendedLoader(task, lambda: trainer, span, alone=min(0.25, seconds))
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", switch_interval=interval)
    trainer.train(loader, epochs=1, callbacks=[WHO[who](span)])
    return loader.ratio()


class Watches(Callback):
    """What most runs have: an observer that looks at each step, and computes next to nothing."""

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        self.loss = event.loss


class SlicedLoader:
    """Sets another switch interval for each slice of the run, and notes its seconds."""

    def __init__(self, task: Task, set_interval: Callable[[float], None], rounds: int) -> None:
        self.task, self.set_interval, self.rounds = task, set_interval, rounds
        self.times: dict[str, list[float]] = {"A": [], "A again": []} | {
            f"{each * 1e6:g} us": [] for each in INTERVALS[2:]
        }

    def __iter__(self) -> Iterator[Batch]:
        batches, steps = self.task.batches(), 0
        for order in shuffled(list(self.times), self.rounds):
            for name in order:
                self.set_interval(PYTHONS if name.startswith("A") else float(name.split()[0]) * 1e-6)
                started = clock()
                for _ in range(self.task.steps_per_slice):
                    yield batches[steps % len(batches)]
                    steps += 1
                self.times[name].append(clock() - started)


def uncontended(rounds: int) -> dict[str, Interval]:
    """Return the ratio of each interval to Python's own, in a run where nothing computes."""
    model = TINY.model()
    loader = SlicedLoader(TINY, sys.setswitchinterval, rounds)
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", switch_interval=None)
    trainer.train(loader, epochs=1, callbacks=[Watches()])
    sys.setswitchinterval(PYTHONS)
    base = loader.times.pop("A")
    return {name: ratio_of(times, base) for name, times in loader.times.items()}


class Crowd:
    """Threads of the host that compute until they are told to end."""

    def __init__(self, threads: int) -> None:
        self._is_over = threading.Event()
        self._done: list[int] = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]

    def _work(self) -> None:
        self._done.append(compute(self._is_over.is_set))

    def start(self) -> None:
        """Begin."""
        self._started = clock()
        for each in self._threads:
            each.start()

    def rate(self) -> float:
        """End, and return the rounds a second that all of them got done together."""
        self._is_over.set()
        seconds = clock() - self._started
        for each in self._threads:
            each.join()
        return sum(self._done) / seconds


def rate_alone(threads: int, seconds: float) -> float:
    """Return what computing threads get done without training."""
    crowd = Crowd(threads)
    crowd.start()
    time.sleep(seconds)
    return crowd.rate()


def rate_beside_training(task: Task, seconds: float) -> float:
    """Return what one computing thread gets done while a model trains, at the interval that is set."""
    model, batches = task.model(), task.batches()
    rates: list[float] = []

    def loader() -> Iterator[Batch]:
        yield from batches[:5]
        crowd = Crowd(1)
        crowd.start()
        started = clock()
        while clock() - started < seconds:
            yield from batches[:1]
        rates.append(crowd.rate())

    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", switch_interval=None)
    trainer.train(loader(), epochs=1)
    return rates[0]


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    seconds = 0.1 if arguments.quick else SECOND
    torch.set_num_threads(1)
    logging.getLogger("offloop").setLevel(
        logging.CRITICAL
    )  # that an observer held the event loop is the point

    names = [f"{each * 1e3:g} ms" for each in INTERVALS]
    report = Report(
        "Steps beside one second of pure Python, as times of a step alone", ["step", "beside", *names]
    )
    with report.measuring():
        for task in (TINY, LARGE):
            for who in WHO:
                found = [contended(task, who, interval, seconds) for interval in INTERVALS]
                alone = sorted(each for _, each in found)[len(found) // 2]
                report.row(f"{task.name}, {1e3 * alone:.1f} ms", who, *(f"{ratio:.1f}" for ratio, _ in found))
                report.figure(f"{task.name} {who}", [ratio for ratio, _ in found])
    report.finish()

    alone = Report("A run in which nothing computes, over the same at 5 ms", ["interval", "ratio (95 %)"])
    with alone.measuring():
        ratios = uncontended(10 if arguments.quick else 300)
    for name, ratio in ratios.items():
        alone.row("A/A" if name.startswith("A") else name, ratio)
        alone.figure(name, ratio)
    alone.finish()

    host = Report(
        "Rounds a second of computing threads of the host, as shares of those of one thread alone",
        ["threads", *names],
    )
    with host.measuring():
        rate_alone(1, seconds / 2)  # warm
        base = rate_alone(1, seconds)
        kinds: dict[str, Callable[[], float]] = {
            "two, no training": lambda: rate_alone(2, seconds),
            "one beside the tiny MLP": lambda: rate_beside_training(TINY, seconds),
            "one beside the large MLP": lambda: rate_beside_training(LARGE, seconds),
        }
        for label, measure in kinds.items():
            shares = []
            for interval in INTERVALS:
                sys.setswitchinterval(interval)
                shares.append(measure() / base)
            sys.setswitchinterval(PYTHONS)
            host.row(label, *(f"{share:.2f}" for share in shares))
            host.figure(label, shares)
    host.figures = {"contended": report.figures, "alone": alone.figures, "host": host.figures}
    host.finish(arguments.json)


if __name__ == "__main__":
    main()
