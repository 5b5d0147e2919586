"""A generative adversarial network: the training step steps two optimizers.

The generator learns to draw points on a circle. Run it: python examples/gan.py
"""

import math

import torch
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from offloop import Callback, EpochEnd, Run, Trainer

NOISE = 4


class Gan(Trainer):
    """Trains a model that is a mapping of two networks."""

    automatic_optimization = False

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        generator, judge = self.model.get_submodule("generator"), self.model.get_submodule("judge")
        fake = generator(torch.randn(len(batch), NOISE, device=batch.device))

        judged = softplus(-judge(batch)).mean() + softplus(judge(fake.detach())).mean()
        self.backward(judged)
        self.optimizer_step("judge")

        fooled = softplus(-judge(fake)).mean()
        self.backward(fooled)  # also computes gradients of the judge; discard them
        self.optimizers["judge"].zero_grad()
        self.optimizer_step("generator")

        self.log("judge_loss", judged)
        self.log("radius", fake.detach().norm(dim=1).mean())
        return fooled

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        points: torch.Tensor = self.model.get_submodule("generator")(batch)
        return points


class Say(Callback):
    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        metrics = event.metrics
        print(
            f"epoch {event.epoch}: judge {metrics['train_judge_loss']:.3f}, radius {metrics['train_radius']:.2f}"
        )


def network(inputs: int, outputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(inputs, 64), torch.nn.ReLU(), torch.nn.Linear(64, outputs))


def main() -> None:
    torch.manual_seed(0)
    angles = torch.rand(2048) * 2 * math.pi
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)  # (2048, 2)
    loader = DataLoader(circle, batch_size=128, shuffle=True)  # type: ignore[arg-type]  # a tensor is a data set

    networks = {"generator": network(NOISE, 2), "judge": network(2, 1)}
    optimizers = {
        name: torch.optim.Adam(each.parameters(), lr=2e-3, betas=(0.5, 0.9))
        for name, each in networks.items()
    }
    trainer = Gan(torch.nn.ModuleDict(networks), optimizers, callbacks=[Say()])
    trainer.train(loader, epochs=10)

    points = torch.cat(trainer.predict([torch.randn(256, NOISE)]))
    print(f"mean radius of new points: {points.norm(dim=1).mean():.2f}")


if __name__ == "__main__":
    main()
