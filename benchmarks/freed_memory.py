"""What does it cost that the C library gives freed gradients back to the kernel, and asks for them anew in each step?

Processes of their own train the 10 ms step on the CPU, by hand and with offloop, with glibc's usual settings and with
the environment variables of docs/optimization.md, in another order each round. Each counts the page faults and the
time of a step in its training thread. This is no comparison of offloop with anybody: whether a loop meets
this is luck of the heap's layout, and it is shown so that users know what to try.

    python benchmarks/freed_memory.py [--quick] [--rounds 5] [--json FILE]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch
from measure import (
    TEN_MS,
    Batch,
    HandWritten,
    Report,
    clock,
    cycle,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    shuffled,
)

from offloop.engine import Trainer

KEEP = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "1"}
WARM_UP = 20  # steps


def batches(steps: int) -> Iterator[Batch]:
    """Give the batches, and print what the steps after the warm-up have cost."""
    data = TEN_MS.batches()
    yield from cycle(data, 0, WARM_UP)
    before, started = resource.getrusage(resource.RUSAGE_THREAD), clock()
    yield from cycle(data, 0, steps)
    after, seconds = resource.getrusage(resource.RUSAGE_THREAD), clock() - started
    faults = (after.ru_minflt - before.ru_minflt) / steps
    print(json.dumps({"faults": faults, "ms": seconds / steps * 1e3}))


def train(how: str, steps: int) -> None:
    """Train in this process."""
    torch.set_num_threads(1)
    if how == "by hand":
        HandWritten(TEN_MS).train(batches(steps))
    else:
        model = TEN_MS.model()
        Trainer(model, optimizer_of(model), loss=loss_of, device="cpu").train(batches(steps), epochs=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contender")


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["child"]:  # before parse(), which would steady the heap here too
        train(sys.argv[2], int(sys.argv[3]))
        return
    arguments = parse(__doc__, add_arguments)
    rounds, steps = (1, 20) if arguments.quick else (arguments.rounds, 300)
    contenders = {
        f"{how}, {what}": (how, what) for how in ("by hand", "offloop") for what in ("usual", "kept")
    }
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    report = Report(
        f"Page faults and time of a step of about 10 ms, {rounds} processes of {steps} steps each",
        ["loop", "freed memory", "page faults a step", "ms a step (95 %)"],
    )
    with report.measuring():
        for order in shuffled(list(contenders), rounds):
            for name in order:
                how, what = contenders[name]
                done = subprocess.run(
                    [sys.executable, __file__, "child", how, str(steps)],
                    env=os.environ | (KEEP if what == "kept" else {}),
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found[name].append(json.loads(done.stdout))
    for name, (how, what) in contenders.items():
        faults, times = ([each[key] for each in found[name]] for key in ("faults", "ms"))
        report.row(how, what, f"{median_of(faults).median:.0f}", median_of(times).scaled(1))
        report.figure(name, found[name])
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
