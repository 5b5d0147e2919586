"""What the benchmarks share: the tiny MLP, interleaved slices, ratios with their confidence, and the report.

Two loops are never timed one after the other: a shared machine changes its speed from second to second.
They take turns in slices of about 10 ms, each slice is compared with its neighbour only, and the median of
these ratios is given with a 95 % interval. Every table of ratios has an A/A row, the same loop against itself
by the same scheme; where its interval leaves +-1 %, the machine was too restless for a verdict on what is close.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import platform
import pty
import random
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

clock: Final = time.perf_counter
Batch = tuple[torch.Tensor, torch.Tensor]

RESAMPLES: Final = 1000
"""Bootstrap samples: enough for a 95 % interval to two digits."""
BLOCK: Final = 8
"""Neighbouring pairs that are drawn together, because a disturbance lasts longer than one slice."""
A_A_BOUND: Final = 0.01
"""How far the A/A interval may leave 1."""
SECONDS_PER_STALL_MICROSECOND: Final = 1e-6
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt(3)."""


# The work ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A model to train, the same for every contender, and its batches."""

    name: str
    features: int
    width: int
    layers: int
    batch_size: int
    steps_per_slice: int
    """So many make about 10 ms."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, ()."""
        return loss_of(outputs, targets)

    def model(self) -> torch.nn.Module:
        """Return the MLP, with the same weights at each call; draws from no global generator."""
        sizes = [self.features, *[self.width] * self.layers, 10]
        parts: list[torch.nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            parts += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
        model = torch.nn.Sequential(*parts[:-1])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)
        return model

    def batches(self, count: int = 64) -> list[Batch]:
        """Return batches in memory, so that loading costs nothing: inputs (B, features), targets (B,)."""
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(count * self.batch_size, self.features, generator=generator)
        targets = inputs[:, :10].argmax(dim=1)
        return list(zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True))


TINY: Final = Task("tiny MLP", features=64, width=64, layers=2, batch_size=32, steps_per_slice=20)
"""A step of 0.4-0.6 ms on one core: nearly all of it is Python and dispatch, the hardest case for a trainer."""
TEN_MS: Final = Task("10 ms step", features=256, width=1024, layers=2, batch_size=64, steps_per_slice=1)
"""A step of about 10 ms on one core: a small real model."""


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every contender."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


loss_of: Final = torch.nn.functional.cross_entropy


class HandWritten:
    """The loop that a user would write: the measure of everything else."""

    def __init__(self, task: Task, *, reads_loss: bool = True) -> None:
        """Make a model of its own.

        Args:
            task: What to train.
            reads_loss: Whether it reads `loss.item()` in each step, as whoever logs the loss does.
        """
        self.task = task
        self.model = task.model()
        self.optimizer = optimizer_of(self.model)
        self.loss_of = task.loss
        self.reads_loss = reads_loss
        self.loss = math.nan

    def train(self, batches: Iterator[Batch]) -> None:
        """Train on all of `batches`."""
        model, optimizer, loss_of = self.model, self.optimizer, self.loss_of
        if self.reads_loss:
            for inputs, targets in batches:
                optimizer.zero_grad()
                loss = loss_of(model(inputs), targets)
                loss.backward()
                optimizer.step()
                self.loss = loss.item()
        else:
            for inputs, targets in batches:
                optimizer.zero_grad()
                loss_of(model(inputs), targets).backward()
                optimizer.step()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """True if two models are equal bit for bit."""
    return all(
        torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), other.parameters(), strict=True)
    )


def cycle(batches: Sequence[Batch], start: int, count: int) -> Iterator[Batch]:
    """Give `count` batches, from number `start` on, over and over."""
    length = len(batches)
    for number in range(start, start + count):
        yield batches[number % length]


# The figures ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A median with its 95 % confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.low:.4f}-{self.high:.4f})"

    def scaled(self, factor: float, digits: int = 2) -> str:
        """Return it as text in another unit."""
        median, low, high = (each * factor for each in (self.median, self.low, self.high))
        return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def median_of(values: Sequence[float]) -> Interval:
    """Return the median and its interval, by a bootstrap of blocks of neighbours."""
    data = torch.tensor(values, dtype=torch.float64)
    count = len(data)
    block = max(1, min(BLOCK, count // 4))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(count, (RESAMPLES, math.ceil(count / block)), generator=generator)
    index = (starts.unsqueeze(2) + torch.arange(block)).flatten(1)[:, :count] % count
    medians = data[index].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(data.quantile(0.5)), low, high)


def ratio_of(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Return the median of the pair ratios `values[i] / base[i]`, and its interval."""
    return median_of([one / other for one, other in zip(values, base, strict=True)])


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of the values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def verdict(figure: Interval, goal: float, a_a: Interval | None = None) -> str:
    """Say whether a figure reaches `<= goal`.

    Where the A/A interval leaves +-1 %, only a figure that is farther from the goal than A/A from 1 gets a verdict.
    """
    off = 0.0 if a_a is None else max(1 - a_a.low, a_a.high - 1)
    doubt = off if off > A_A_BOUND else 0.0
    if figure.high + doubt <= goal:
        return f"<= {goal}: met"
    if figure.low - doubt > goal:
        return f"<= {goal}: missed"
    if doubt:
        return f"<= {goal}: no verdict, A/A leaves +-1 %"
    return f"<= {goal}: open, the interval spans it"


# Taking turns --------------------------------------------------------------------------------------


def shuffled(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Give the order of each round: all names, in another order each time."""
    order = random.Random(0)
    for _ in range(rounds):
        names = order.sample(names, len(names))
        yield list(names)


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run each contender once a round, and return their seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for order in shuffled(list(contenders), rounds):
        for name in order:
            started = clock()
            contenders[name]()
            times[name].append(clock() - started)
    return times


class TimedLoader:
    """Gives the batches of one pass, and takes the time per step once the warm-up is over."""

    def __init__(self, task: Task, steps: int, warm_up: int) -> None:
        """Give `warm_up` batches, then `steps`, at least 2, that are measured."""
        self.batch_size = task.batch_size  # some trainers ask
        self.warm_up = warm_up
        self.steps = warm_up + steps
        self.batches = task.batches()
        self.per_step = math.nan
        """Seconds, of the latest pass."""

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        started = clock()
        for step in range(self.steps):
            if step == self.warm_up:
                started = clock()
            elif step == self.steps - 1:  # whoever counts the batches does not ask for one more
                self.per_step = (clock() - started) / (step - self.warm_up)
            yield self.batches[step % len(self.batches)]


OFFLOOP, HAND, HAND_AGAIN = "offloop", "by hand", "by hand again"


class StretchLoader:
    """A loader that trains by hand in between, in stretches that are long beside the pace of hand-overs.

    Callbacks work beside the training thread and some time after it, so slices of 10 ms would put their work beside
    the wrong loop. Here the run gets some time to reach its steady state, is measured, and its callbacks get some
    rest to catch up, before it is somebody else's turn. The work of the last hand-over falls out of a stretch, that
    of the one before it falls in.

    All train the same model, with the same optimizer: twins lie elsewhere in memory, and one of two equal steps of
    10 ms was up to a tenth slower for that alone.
    """

    def __init__(
        self,
        by_hand: HandWritten,
        rounds: int,
        *,
        seconds: float,
        settle: float,
    ) -> None:
        """Measure `rounds` stretches of so many `seconds` of each; `settle` seconds go by before and after.

        The run that gets this loader trains `by_hand.model` with `by_hand.optimizer`.
        """
        self.by_hand, self.rounds = by_hand, rounds
        self.seconds, self.settle = seconds, settle
        self.per_step: dict[str, list[float]] = {OFFLOOP: [], HAND: [], HAND_AGAIN: []}
        self.cpu: dict[str, list[float]] = defaultdict(list)
        """By other thread of the process: the share of a core that it used in each of offloop's stretches."""
        self._batches = by_hand.task.batches()

    def ratio(self) -> tuple[Interval, Interval]:
        """Return offloop's time over that by hand, and the A/A ratio."""
        base = self.per_step[HAND]
        return ratio_of(self.per_step[OFFLOOP], base), ratio_of(self.per_step[HAND_AGAIN], base)

    def shares(self) -> dict[str, float]:
        """Return the mean of `cpu`."""
        return {name: sum(values) / self.rounds for name, values in self.cpu.items()}

    def batches_for(self, seconds: float, record: list[float] | None = None) -> Iterator[Batch]:
        """Give batches for so many seconds, and note the seconds per step."""
        steps, started = 0, clock()
        while clock() - started < seconds:
            for _ in range(self.by_hand.task.steps_per_slice):
                yield self._batches[steps % len(self._batches)]
                steps += 1
        if record is not None:
            record.append((clock() - started) / steps)

    def __iter__(self) -> Iterator[Batch]:
        for order in shuffled(list(self.per_step), self.rounds):
            for name in order:
                record = self.per_step[name]
                if name == OFFLOOP:
                    yield from self.batches_for(self.settle)
                    before, started = cpu_of_other_threads(), clock()
                    yield from self.batches_for(self.seconds, record)
                    after, seconds = cpu_of_other_threads(), clock() - started
                    for thread, used in after.items():
                        self.cpu[thread].append((used - before.get(thread, 0.0)) / seconds)
                    time.sleep(self.settle)
                else:
                    self.by_hand.train(self.batches_for(self.settle / 3))
                    self.by_hand.train(self.batches_for(self.seconds, record))
                    self.by_hand.optimizer.zero_grad()  # a run expects it so


def cpu_of_other_threads() -> dict[str, float]:
    """Return the CPU seconds so far of each thread but this one, by name; offloop has the only ones."""
    used: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident is not None:
            with contextlib.suppress(OSError, ProcessLookupError):
                name = "event loop" if thread is threading.main_thread() else thread.name
                used[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return used


@contextlib.contextmanager
def terminal() -> Iterator[int]:
    """Give the descriptor of a pseudo-terminal that another process reads."""
    master, slave = pty.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(master)
    try:
        yield slave
    finally:
        os.close(slave)
        reader.terminate()
        reader.wait()


# The report ----------------------------------------------------------------------------------------


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed, where that can be asked of it.

    Whether freed gradients lie at the top of the heap, and so go back to the kernel, is luck of its layout. A loop
    that has no luck gets its pages anew in each step: 1,600 page faults and 3 ms for a step of 10 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest that it accepts
        mallopt(M_ARENA_MAX, 1)  # the heaps of further arenas go back whole, whatever the threshold


def parse(description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """Read the command line that all benchmarks share, and steady the heap before anything is measured."""
    _keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes: does it run at all?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE too")
    if add is not None:
        add(parser)
    return parser.parse_args()


class Report:
    """One table, with what one has to know to believe it."""

    def __init__(self, question: str, columns: Sequence[str], packages: Sequence[str] = ()) -> None:
        """Begin a report.

        Args:
            question: What the table answers.
            columns: Their heads; the first column names the row.
            packages: Whose versions matter, beside Python and torch.
        """
        self.question = question
        self.columns = list(columns)
        self.packages = ("torch", "anyio", "msgspec", *packages)
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.figures: dict[str, Any] = {}
        self._stalled = 0.0
        self._seconds = 0.0

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Note how much other work wanted the processor during the measurement."""
        stalled, started = _stalled_seconds(), clock()
        try:
            yield
        finally:
            self._seconds += clock() - started
            self._stalled += _stalled_seconds() - stalled

    def row(self, *cells: object) -> None:
        """Add a row."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append([str(cell) for cell in cells])

    def note(self, text: str) -> None:
        """Add a line under the table."""
        self.notes.append(text)

    def figure(self, name: str, value: Any) -> None:
        """Keep a figure for the JSON file."""
        self.figures[name] = dataclasses.asdict(value) if isinstance(value, Interval) else value

    def finish(self, json_file: Path | None = None) -> None:
        """Print the table, as Markdown, and write the JSON file if one is wanted."""
        machine = self.machine()
        print(f"\n{self.question}\n")
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        for cells in [self.columns, ["-" * width for width in widths], *self.rows]:
            print("| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |")
        print()
        for line in [*self.notes, *(f"{name}: {value}" for name, value in machine.items())]:
            print(line)
        if json_file is not None:
            table = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
            content = {"question": self.question, "machine": machine, "table": table, "notes": self.notes}
            json_file.write_text(json.dumps(content | {"figures": self.figures}, indent=1) + "\n")

    def machine(self) -> dict[str, str]:
        """Return what was measured where, when and with what."""
        versions = [f"Python {platform.python_version()}"]
        for package in dict.fromkeys(self.packages):
            try:
                versions.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                versions.append(f"{package} not installed")
        load = ", ".join(f"{each:.2f}" for each in os.getloadavg())
        share = self._stalled / self._seconds if self._seconds else 0.0
        pressure = f"CPU pressure: {share:.0%}" if _PRESSURE.exists() else "not known"
        return {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
            "versions": ", ".join(versions),
            "pressure": f"{pressure} (/proc/pressure/cpu, over {self._seconds:.0f} s); load {load}",
        }


_PRESSURE: Final = Path("/proc/pressure/cpu")


def _stalled_seconds() -> float:
    """Return for how long in total some task has waited for a core since the machine started."""
    try:
        some = _PRESSURE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return 0.0
    return int(some.rpartition("total=")[2]) * SECONDS_PER_STALL_MICROSECOND


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
