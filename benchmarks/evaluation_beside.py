"""What evaluating checkpoints costs a run: beside training (`CheckpointEvaluator`), or in it, as a validation.

Runs of the same steps, with a checkpoint after each epoch: without any evaluation (twice, for A/A), with a
`CheckpointEvaluator`, and with a validation of the same batches. They take turns.

    python benchmarks/evaluation_beside.py [--quick] [--json FILE]
"""

import tempfile
from collections.abc import Callable
from typing import Final

import torch
from measure import TEN_MS, Report, loss_of, optimizer_of, parse, ratio_of, take_turns

from offloop.callbacks import CheckpointEvaluator, ModelCheckpoint
from offloop.engine import Callback, Trainer

EPOCH: Final = 150
"""Steps of an epoch, 1.5 seconds."""
EVALUATION: Final = 100
"""Batches of an evaluation, 0.3 seconds."""


def evaluate(model: torch.nn.Module) -> dict[str, float]:
    """The same work as a validation."""
    batches = TEN_MS.batches()
    losses = [
        float(loss_of(model(batches[number % len(batches)][0]), batches[number % len(batches)][1]))
        for number in range(EVALUATION)
    ]
    return {"loss": sum(losses) / len(losses)}


def contender(
    epochs: int, steps: list[float], *, beside: bool = False, inside: bool = False
) -> Callable[[], object]:
    """Return a run, which adds the seconds of its steps to `steps`."""

    def run() -> object:
        model = TEN_MS.model()
        batches = TEN_MS.batches()
        callbacks: list[Callback] = [ModelCheckpoint()]
        if beside:
            callbacks.append(CheckpointEvaluator(evaluate))
        with tempfile.TemporaryDirectory() as run_dir:
            trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=run_dir)
            result = trainer.train(
                [batches[number % len(batches)] for number in range(EPOCH)],
                [batches[number % len(batches)] for number in range(EVALUATION)] if inside else None,
                epochs=epochs,
                callbacks=callbacks,
            )
        first, *_, last = result.history
        steps.append(last.time - first.time + first.seconds)
        return result

    return run


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    report = Report(
        "What evaluating each checkpoint costs a run", ["what", "all steps", "the whole run", "goal"]
    )
    rounds, epochs = (2, 2) if arguments.quick else (5, 8)
    names = ("without", "without again", "beside", "inside")
    steps: dict[str, list[float]] = {name: [] for name in names}
    with report.measuring():
        runs = take_turns(
            {
                name: contender(epochs, steps[name], beside=name == "beside", inside=name == "inside")
                for name in names
            },
            rounds,
        )
    for name, what, goal in (
        ("without again", "without evaluation again / without (A/A)", "-"),
        ("beside", "evaluated beside training / without", "<= 1.02"),
        ("inside", "validated in training / without", "-"),
    ):
        ratios = [ratio_of(times[name], times["without"]) for times in (steps, runs)]
        report.row(what, *ratios, goal)
        report.figure(what, ratios)
    report.note(
        f"{rounds} runs of each, {epochs} epochs of {EPOCH} steps; the whole run includes the last evaluation, which "
        "its end waits for."
    )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
