"""What do callbacks cost together, in wall time, and how much processor do offloop's other threads use?

A real run takes turns with the hand-written loop, which reads the loss of each step, in another order each round:

    offloop             0.15 s to reach the steady state | 0.6 s measured | 0.15 s of rest for callbacks to catch up
    by hand             0.05 s                           | 0.6 s measured
    by hand again       0.05 s                           | 0.6 s measured (the A/A row)

The CPU time of each thread but the training thread is read at both ends of a measured stretch. Whose callbacks:

    nobody      none, and no run directory: what the bus alone costs
    observers   `EventLog`, `MetricLogger`, a `ProgressBar` on a pseudo-terminal, and 8 async observers of each step
    every       every callback there is, at its default cadence; but for `MLflowLogger` and `WandbLogger`, which
                tracking_server.py is about, and `WeightAverage`
    averaging   the same with `WeightAverage`, against a loop that averages by hand after each step, with torch's
                `AveragedModel`

    python benchmarks/callbacks_overhead.py [--quick] [--rounds 20] [--only NAME] [--json FILE]
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from measure import (
    HAND,
    TEN_MS,
    TINY,
    Batch,
    HandWritten,
    Report,
    StretchLoader,
    Task,
    median_of,
    parse,
    terminal,
    verdict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from offloop.callbacks import (
    Alerts,
    EarlyStopping,
    GradientMonitor,
    LayerStatistics,
    LearningCurves,
    LearningRateScheduler,
    MetricLogger,
    ModelCheckpoint,
    NonFinite,
    Profiler,
    ProgressBar,
    ResourceMonitor,
    Spike,
    Stalled,
    TensorBoardLogger,
    WeightAverage,
)
from offloop.engine import Callback, Run, StepEnd, Trainer, TrainerConfig

SECONDS, SETTLE = 0.6, 0.15  # a hand-over comes every 0.05 s
OBSERVERS = 8
CPU_GOAL = 0.03  # of a core, for the observers
EMA_DECAY = 0.999


class Observer(Callback):
    """Does next to nothing, asynchronously."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.events = 0

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        self.loss += event.loss
        self.events += 1


class Averaging(HandWritten):
    """The loop of a user who wants an average of the weights."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def train(self, batches: Iterator[Batch]) -> None:
        """Train on all of `batches`, and average after each step."""
        model, optimizer, loss_of, average = self.model, self.optimizer, self.loss_of, self.average
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            self.loss = loss.item()


def observers(descriptor: int) -> list[Callback]:
    """Return observers of every step; `EventLog` joins by itself where there is a run directory."""
    bar = ProgressBar(file=os.fdopen(os.dup(descriptor), "w"))
    return [MetricLogger(), bar, *(Observer() for _ in range(OBSERVERS))]


def every_callback(descriptor: int) -> list[Callback]:
    """Return every callback but the average."""
    return [
        EarlyStopping("train_loss"),
        LearningRateScheduler("reduce_on_plateau", monitor="train_loss"),
        ModelCheckpoint("train_loss"),
        MetricLogger(),
        TensorBoardLogger(),
        ProgressBar(file=os.fdopen(os.dup(descriptor), "w")),
        ResourceMonitor(),
        GradientMonitor(),
        LayerStatistics(),
        Profiler(),
        LearningCurves(),
        Alerts(None, NonFinite(), Spike(), Stalled(60.0)),
    ]


class Case(NamedTuple):
    """One row."""

    task: Task
    who: str
    callbacks: Callable[[int], list[Callback]] | None
    goal: float
    by_hand: Callable[[Task], HandWritten] = HandWritten


CASES = [
    Case(TEN_MS, "observers", observers, 1.02),
    Case(TINY, "observers", observers, 1.05),
    Case(TINY, "nobody", None, 1.05),
    Case(TEN_MS, "every", every_callback, 1.01),
    Case(TINY, "every", every_callback, 1.06),
    Case(
        TINY,
        "averaging",
        lambda file: [*every_callback(file), WeightAverage(decay=EMA_DECAY)],
        1.06,
        Averaging,
    ),
]


def measure(case: Case, rounds: int) -> StretchLoader:
    """Train with the callbacks; the loader holds the figures."""
    by_hand = case.by_hand(case.task)
    loader = StretchLoader(by_hand, rounds, seconds=SECONDS, settle=SETTLE)
    with terminal() as descriptor, tempfile.TemporaryDirectory() as directory:
        callbacks = case.callbacks(descriptor) if case.callbacks is not None else []
        config = TrainerConfig(device="cpu", run_dir=directory if callbacks else None)
        trainer = Trainer(by_hand.model, by_hand.optimizer, config, loss=case.task.loss, callbacks=callbacks)
        trainer.train(loader, epochs=1)
    return loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=20, help="measured stretches of each contender")
    parser.add_argument("--only", choices=sorted({case.who for case in CASES}), help="the rows of these")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 2 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    os.environ["TERM"] = "xterm-256color"
    logging.getLogger("offloop").setLevel(logging.ERROR)  # that the loader takes its time is the point
    report = Report(
        f"Wall time with callbacks against a hand-written loop, {rounds} stretches of {SECONDS} s each",
        [
            "task",
            "callbacks",
            "ratio (95 %)",
            "A/A (95 %)",
            "step by hand, ms",
            "CPU of other threads",
            "goal",
        ],
        packages=("rich", "tensorboard", "psutil"),
    )
    for case in CASES:
        if arguments.only not in (None, case.who):
            continue
        with report.measuring():
            loader = measure(case, rounds)
        ratio, a_a = loader.ratio()
        shares = loader.shares()
        total = sum(shares.values())
        cpu = f"{total:.1%}"
        if case.who == "observers":
            cpu += f" (<= {CPU_GOAL:.0%}: {'met' if total <= CPU_GOAL else 'missed'})"
        by_hand = median_of(loader.per_step[HAND]).scaled(1e3)
        report.row(case.task.name, case.who, ratio, a_a, by_hand, cpu, verdict(ratio, case.goal, a_a))
        for name, share in sorted(shares.items(), key=lambda item: -item[1]):
            if share >= 0.0005:
                thread = name.removeprefix("offloop-")
                report.note(f"{case.task.name}, {case.who}: {thread} used {share:.2%} of a core")
        figure = {"ratio": ratio.median, "a_a": a_a.median, "cpu": shares}
        report.figure(f"{case.task.name}, {case.who}", figure)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
