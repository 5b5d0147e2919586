"""What does a step cost in the training thread, beside the same loop written by hand?

No callbacks. A real run of offloop trains the tiny MLP; its loader gives 20 batches (about 10 ms), then
holds the training thread and runs 20 steps of a hand-written loop over a twin of the model, and of a second
twin for the A/A row, in another order each round; then 20 batches again. So all three share thread,
process, caches and whatever else the machine does. They see the same batches; their weights must be equal bit for
bit at the end, or the script fails.

offloop reads the loss of each step, because it publishes it. The hand-written loop does so too ("reads the
loss") or does not ("reads nothing"). "loss=" is `Trainer(model, optimizer, loss=...)`, "own step" a subclass whose
`training_step` returns the loss.

The goal is for the first row. What the event loop's thread does is not in these figures (it disturbs all three
alike): callbacks_overhead.py has it.

    python benchmarks/step_overhead.py [--quick] [--rounds 1000] [--json FILE]
"""

import argparse
from collections.abc import Iterator

import torch
from measure import (
    HAND,
    HAND_AGAIN,
    OFFLOOP,
    TINY,
    Batch,
    HandWritten,
    Interval,
    Report,
    clock,
    cycle,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    ratio_of,
    same_weights,
    shuffled,
    verdict,
)

from offloop.engine import Trainer

STEPS = TINY.steps_per_slice
WARM_UP = 10  # rounds that are not counted


class OwnStep(Trainer):
    """A trainer with a step of its own."""

    def training_step(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        loss: torch.Tensor = loss_of(self.model(inputs), targets)
        return loss


def handed_on(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Give batches as the loader below gives them to offloop: through one more generator."""
    yield from batches


class TurnsLoader:
    """A loader that trains by hand in between, and takes the time of each slice."""

    def __init__(self, rounds: int, *, reads_loss: bool) -> None:
        self.rounds = rounds
        self.by_hand = {name: HandWritten(TINY, reads_loss=reads_loss) for name in (HAND, HAND_AGAIN)}
        self.times: dict[str, list[float]] = {OFFLOOP: [], HAND: [], HAND_AGAIN: []}

    def __len__(self) -> int:
        return self.rounds * STEPS

    def __iter__(self) -> Iterator[Batch]:
        batches = TINY.batches()
        for number, order in enumerate(shuffled(list(self.times), self.rounds)):
            for name in order:
                turn = cycle(batches, number * STEPS, STEPS)
                started = clock()
                if name == OFFLOOP:
                    yield from turn
                else:
                    self.by_hand[name].train(handed_on(turn))
                self.times[name].append(clock() - started)


def measure(trainer_class: type[Trainer], rounds: int, *, reads_loss: bool) -> dict[str, list[float]]:
    """Return the seconds of each slice, by contender."""
    model = TINY.model()
    trainer = trainer_class(model, optimizer_of(model), loss=loss_of, device="cpu")
    loader = TurnsLoader(rounds + WARM_UP, reads_loss=reads_loss)
    trainer.train(loader, epochs=1)
    for hand in loader.by_hand.values():
        assert same_weights(model, hand.model), "offloop's weights differ from those of the hand-written loop"
    return {name: times[WARM_UP:] for name, times in loader.times.items()}


def per_step(times: list[float]) -> Interval:
    """Return the median seconds of a step."""
    return median_of([each / STEPS for each in times])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=1000, help="slices of each contender")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 60 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    report = Report(
        f"Training thread, tiny MLP: offloop against a hand-written loop, slices of {STEPS} steps x {rounds}",
        [
            "offloop",
            "hand-written",
            "ratio (95 %)",
            "A/A (95 %)",
            "added us a step",
            "step by hand, us",
            "goal",
        ],
    )
    cases: list[tuple[str, type[Trainer], bool]] = [
        ("own step", OwnStep, True),
        ("loss=", Trainer, True),
        ("own step", OwnStep, False),
    ]
    for name, trainer_class, reads_loss in cases:
        with report.measuring():
            times = measure(trainer_class, rounds, reads_loss=reads_loss)
        ratio = ratio_of(times[OFFLOOP], times[HAND])
        a_a = ratio_of(times[HAND_AGAIN], times[HAND])
        added = median_of(
            [(one - other) / STEPS for one, other in zip(times[OFFLOOP], times[HAND], strict=True)]
        )
        hand = "reads the loss" if reads_loss else "reads nothing"
        goal = verdict(ratio, 1.01, a_a) if reads_loss else "-"
        report.row(
            name, hand, ratio, a_a, added.scaled(1e6, 1), f"{per_step(times[HAND]).median * 1e6:.0f}", goal
        )
        report.figure(
            f"{name}, {hand}", {"ratio": str(ratio), "a_a": str(a_a), "added": added.scaled(1e6, 1)}
        )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
