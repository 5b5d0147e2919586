"""What do the gradient and layer monitors cost on every 50th step of the demo's GPT?

A real run trains the GPT of `offloop demo` on its text, on one thread; its loader gives 10 batches, then holds the
training thread and trains 10 steps by hand with a twin of the model, and with a second one for the A/A row, in
another order each time. Five turns make a window of 50 steps, one of which the monitors look at; a ratio is
that of two windows. The hand-written loop reads the loss of each step.

    python benchmarks/monitors_overhead.py [--quick] [--windows 8] [--json FILE]
"""

import argparse
import dataclasses
import logging
from collections.abc import Iterator

import torch
from measure import (
    HAND,
    HAND_AGAIN,
    OFFLOOP,
    Batch,
    HandWritten,
    Report,
    Task,
    clock,
    cycle,
    median_of,
    optimizer_of,
    parse,
    ratio_of,
    same_weights,
    shuffled,
    verdict,
)

from offloop.callbacks import GradientMonitor, LayerStatistics
from offloop.cli.char_gpt import CharGPT, Windows, char_loss, load_text
from offloop.engine import Callback, Trainer

EVERY = 50
TURN = 10  # steps
GOAL = 1.02


@dataclasses.dataclass(frozen=True, slots=True)
class Gpt(Task):
    """The demo's model on its text, with the demo's batch size."""

    def model(self) -> torch.nn.Module:
        """Return the GPT, with the same weights at each call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return CharGPT()

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, ()."""
        return char_loss(outputs, targets)

    def batches(self, count: int = 64) -> list[Batch]:
        """Return batches in memory: inputs and targets (B, T)."""
        text, _ = load_text()
        windows = Windows(text, length=CharGPT().context, stride=CharGPT().context)
        items = [windows[index] for index in range(count * self.batch_size)]
        stacked = [torch.stack(each).split(self.batch_size) for each in zip(*items, strict=True)]
        return list(zip(*stacked, strict=True))


GPT = Gpt("demo's GPT", features=0, width=128, layers=3, batch_size=32, steps_per_slice=TURN)


class TurnsLoader:
    """A loader that trains by hand in between, and takes the time of each window."""

    def __init__(self, windows: int) -> None:
        self.windows = windows
        self.by_hand = {name: HandWritten(GPT) for name in (HAND, HAND_AGAIN)}
        self.times: dict[str, list[float]] = {OFFLOOP: [], HAND: [], HAND_AGAIN: []}

    def __len__(self) -> int:
        return self.windows * EVERY

    def __iter__(self) -> Iterator[Batch]:
        batches = GPT.batches()
        turns = EVERY // TURN
        for number, order in enumerate(shuffled(list(self.times), self.windows * turns)):
            for name in order:
                turn = cycle(batches, number * TURN, TURN)
                started = clock()
                if name == OFFLOOP:
                    yield from turn
                else:
                    self.by_hand[name].train(turn)
                if number % turns == 0:
                    self.times[name].append(0.0)
                self.times[name][-1] += clock() - started


def measure(windows: int, callbacks: list[Callback], warm_up: int) -> dict[str, list[float]]:
    """Return the seconds of each window behind the warm-up, by contender."""
    model = GPT.model()
    loader = TurnsLoader(warm_up + windows)
    trainer = Trainer(model, optimizer_of(model), loss=GPT.loss, device="cpu", callbacks=callbacks)
    trainer.train(loader, epochs=1)
    for hand in loader.by_hand.values():
        assert same_weights(model, hand.model), "offloop's weights differ from those of the hand-written loop"
    return {name: times[warm_up:] for name, times in loader.times.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--windows", type=int, default=8, help=f"of {EVERY} steps, for each contender")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    windows = 1 if arguments.quick else arguments.windows
    torch.set_num_threads(1)
    logging.getLogger("offloop").setLevel(logging.ERROR)  # that the loader takes its time is the point
    report = Report(
        f"Monitors on every {EVERY}th step of the demo's GPT, {windows} windows of {EVERY} steps each",
        ["callbacks", "ratio (95 %)", "A/A (95 %)", "step by hand, ms", "goal"],
    )
    callbacks = [GradientMonitor(every_n_steps=EVERY), LayerStatistics(every_n_steps=EVERY)]
    with report.measuring():
        times = measure(windows, callbacks, warm_up=0 if arguments.quick else 1)
    ratio, a_a = ratio_of(times[OFFLOOP], times[HAND]), ratio_of(times[HAND_AGAIN], times[HAND])
    by_hand = median_of(times[HAND]).scaled(1e3 / EVERY)
    report.row("GradientMonitor, LayerStatistics", ratio, a_a, by_hand, verdict(ratio, GOAL, a_a))
    report.figure("monitors", {"ratio": ratio.median, "a_a": a_a.median})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
