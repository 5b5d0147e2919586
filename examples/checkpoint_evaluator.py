"""Evaluation beside training: each checkpoint is judged in a process of its own, and the best is chosen by that.

    python examples/checkpoint_evaluator.py

Here the figure is the share of points for which the model is right in all of ten noisy copies: too slow to compute
while training waits.
"""

import tempfile

import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop import Callback, CheckpointEvaluator, Evaluated, ModelCheckpoint, Run, Trainer, load_model


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))


def make_points(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(512, 8, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs.sum(dim=1) > 0).long()


def evaluate(model: torch.nn.Module) -> dict[str, float]:
    """Runs in the process. Loads its own data, instead of having it sent there."""
    inputs, targets = make_points(seed=1)
    is_right = torch.ones(len(inputs), dtype=torch.bool)
    for _ in range(10):
        noisy = inputs + 0.1 * torch.randn_like(inputs)  # the same noise for the same step in every run
        is_right &= model(noisy).argmax(dim=1) == targets
    return {"robust_accuracy": float(is_right.float().mean())}


class Show(Callback):
    async def on_evaluated(self, event: Evaluated, run: Run) -> None:
        print(f"step {event.of_step}: robust accuracy {event.metrics['eval_robust_accuracy']:.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    model = make_model()
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            loss=torch.nn.functional.cross_entropy,
            run_dir=run_dir,
        )
        result = trainer.train(
            DataLoader(TensorDataset(*make_points(seed=0)), batch_size=32, shuffle=True),
            epochs=5,
            callbacks=[
                ModelCheckpoint(monitor="eval_robust_accuracy", mode="max"),
                CheckpointEvaluator(evaluate),
                Show(),
            ],
        )
        assert result.best is not None
        print(f"the best is that of step {result.best.step}: {result.best.score:.3f}")
        load_model(result.best.path, into=model)
