"""What do checkpoints cost a run of 10 ms steps, every 50 steps or after each, and how much memory do they take?

1. Whole runs take turns: without checkpoints, with one every 50 steps, with one after each step, and without again
   (A/A). Their time is that of training, from the first batch to the last. The gaps between batches tell how long
   single steps take while a checkpoint is being written; of every 50, the step that takes it is left out. A
   checkpoint that comes due while both buffers still wait for the disk is left out by the run: how many became
   durable stands beside.
2. A run whose state has 200 MB takes five checkpoints, in a process of its own. Its resident memory at the peak,
   less that of the same run without checkpoints, is what they take.
3. A run is interrupted after 100,000 of a million batches. The time from the call that resumes it to the first sample
   that is read, and how many are read for the one step that follows.

    python benchmarks/checkpoint_overhead.py [--quick] [--rounds 8] [--json FILE] [--directory DIR]
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint_contenders import WithBuffers
from measure import (
    TEN_MS,
    TINY,
    Batch,
    Report,
    clock,
    cycle,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    quantile,
    ratio_of,
    take_turns,
    verdict,
)

from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, CheckpointSaved, Run, Trainer, TrainStart, decides, read_events
from offloop.engine.checkpoint.snapshot import DEFAULT_SLOTS

EVERY = 50
GOALS = {EVERY: 1.02, 1: 1.25}
"""By steps between two checkpoints: time over that without."""
BUFFERS, BUFFER_SIZE = 50, 1_000_000  # float32: 200 MB


class TimedLoader:
    """Gives batches and notes when each is asked for."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batches = TEN_MS.batches()
        self.asked: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        self.asked = []
        for batch in cycle(self.batches, 0, self.steps):
            self.asked.append(clock())
            yield batch
        self.asked.append(clock())


class Runs:
    """The same training again and again, with checkpoints or without."""

    def __init__(self, steps: int, every: int | None, directory: Path | None) -> None:
        self.steps, self.every, self.directory = steps, every, directory
        self.seconds: list[float] = []
        self.gaps: list[
            float
        ] = []  # of the ten steps after each 50th, which takes a checkpoint, or would have
        self.saved = self.due = 0

    def run(self) -> None:
        """Train once."""
        model = TEN_MS.model()
        loader = TimedLoader(self.steps)
        with tempfile.TemporaryDirectory(dir=self.directory) as run_dir:
            trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=run_dir)
            callbacks = (
                [] if self.every is None else [ModelCheckpoint(every_n_steps=self.every, save_last=False)]
            )
            result = trainer.train(loader, epochs=1, callbacks=callbacks)
            assert result.dir is not None
            saved = [event for event in read_events(result.dir) if isinstance(event, CheckpointSaved)]
            self.saved += sum(event.reason == "interval" for event in saved)  # not the best
            self.due += 0 if self.every is None else self.steps // self.every
        asked = loader.asked
        gaps = [after - before for before, after in itertools.pairwise(asked)]
        self.seconds.append(asked[-1] - asked[0])
        for saved in range(EVERY, self.steps - 10, EVERY):
            self.gaps += gaps[saved : saved + 10]  # gaps[EVERY - 1] is the step that takes it


def measure_time(report: Report, rounds: int, steps: int, directory: Path | None) -> None:
    """Fill the table of times."""
    contenders = {
        "none": Runs(steps, None, directory),
        "none again (A/A)": Runs(steps, None, directory),
        f"every {EVERY} steps": Runs(steps, EVERY, directory),
        "every step": Runs(steps, 1, directory),
    }
    for runs in contenders.values():  # warm-up
        runs.run()
        runs.seconds, runs.gaps, runs.saved, runs.due = [], [], 0, 0
    with report.measuring():
        take_turns({name: runs.run for name, runs in contenders.items()}, rounds)
    base = contenders["none"]
    a_a = ratio_of(contenders["none again (A/A)"].seconds, base.seconds)
    p99 = quantile(base.gaps, 0.99)
    for name, runs in contenders.items():
        ratio = ratio_of(runs.seconds, base.seconds)
        tail = quantile(runs.gaps, 0.99)
        goal = verdict(ratio, GOALS[runs.every], a_a) if runs.every else "-"
        median = median_of(runs.gaps).median
        saved = f"{runs.saved} of {runs.due}" if runs.every else "-"
        report.row(name, ratio, f"{median * 1e3:.2f}", f"{tail * 1e3:.2f}", f"{tail / p99:.2f}", saved, goal)
        figures = {"seconds": runs.seconds, "gaps": runs.gaps, "saved": runs.saved, "due": runs.due}
        report.figure(name, figures)


class SaveFive(Callback):
    """Takes five checkpoints one after the other, and waits for each copy."""

    needs_run_dir = True

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        for _ in range(5):
            run.checkpoint_nowait("manual")


def train_in_memory(saves: bool, directory: Path | None) -> None:
    """Train with 200 MB of buffers and print the peak of resident memory, in bytes."""
    torch.set_num_threads(1)
    model = WithBuffers(BUFFERS, BUFFER_SIZE)
    with tempfile.TemporaryDirectory(dir=directory) as run_dir:
        trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=run_dir)
        trainer.train(list(cycle(TINY.batches(), 0, 50)), epochs=1, callbacks=[SaveFive()] if saves else [])
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def peak_of(saves: bool, directory: Path | None) -> int:
    """Run that in a process of its own."""
    command = [sys.executable, __file__, "--memory", "with" if saves else "without"]
    if directory is not None:
        command += ["--directory", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


class Million(torch.utils.data.Dataset[Batch]):
    """A million samples; notes when the first one is read, and how many are."""

    def __init__(self) -> None:
        self.read, self.began = 0, 0.0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Batch:
        self.began = self.began or clock()
        self.read += 1
        return torch.full((1,), index / 1e6), torch.zeros(1)


def resume_at(step: int, directory: Path | None) -> tuple[float, int]:
    """Return the seconds that it takes to go on after a step, and the samples read for the one that follows."""
    with tempfile.TemporaryDirectory(dir=directory) as place:

        def train(data: Million, steps: int, resume: str) -> None:
            model = torch.nn.Linear(1, 1)
            trainer = Trainer(
                model,
                torch.optim.SGD(model.parameters(), lr=1e-3),
                loss=torch.nn.functional.mse_loss,
                device="cpu",
                run_dir=place,
                run_name="run",
                callbacks=[ModelCheckpoint()],
            )
            loader = torch.utils.data.DataLoader(data, shuffle=True)  # batches of one
            trainer.train(loader, max_steps=steps, resume=resume)

        train(Million(), step, "never")
        data = Million()
        started = clock()
        train(data, step + 1, "must")
        return data.began - started, data.read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=12, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=210, help="steps of each run")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--memory", choices=("with", "without"), help=argparse.SUPPRESS)


def main() -> None:
    """Measure and print; or be the process whose memory is measured."""
    arguments = parse(__doc__, add_arguments)
    if arguments.memory is not None:
        train_in_memory(arguments.memory == "with", arguments.directory)
        return
    torch.set_num_threads(1)
    rounds, steps = (2, 70) if arguments.quick else (arguments.rounds, arguments.steps)
    report = Report(
        f"A checkpoint every {EVERY} steps of 10 ms, or after each: {rounds} runs of {steps} steps each",
        ["checkpoints", "time / none (95 %)", "step after a save, ms", "p99", "p99 / none", "saved", "goal"],
    )
    measure_time(report, rounds, steps, arguments.directory)
    with report.measuring():
        without, saving = peak_of(False, arguments.directory), peak_of(True, arguments.directory)
    state = BUFFERS * BUFFER_SIZE * 4
    added, bound = saving - without, DEFAULT_SLOTS * state * 1.1
    report.note(
        f"Memory: a state of {state / 1e6:.0f} MB, {DEFAULT_SLOTS} buffers: checkpoints take {added / 1e6:.0f} MB more "
        f"({added / state:.2f} x the state); goal <= {DEFAULT_SLOTS * 1.1:.1f} x: "
        + ("met" if added <= bound else "missed")
    )
    at = 1_000 if arguments.quick else 100_000
    seconds, read = resume_at(at, arguments.directory)
    report.note(
        f"Resume at batch {at:,} of 1,000,000: {seconds:.2f} s to the first sample, {read} read a step; goal < 2 s: "
        + ("met" if seconds < 2 and read == 1 else "missed")
    )
    report.note(f"p99 / none every {EVERY} steps: goal <= 1.15 where a core is spare for the writer.")
    report.figure("resume", {"seconds": seconds, "read": read})
    report.figure("memory", {"state": state, "without": without, "with": saving})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
