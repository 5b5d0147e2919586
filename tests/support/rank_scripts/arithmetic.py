"""Scenarios: bits and numbers of a run on several ranks."""

from collections.abc import Callable
from typing import Any

import torch
from rank_scripts.by_hand import train_by_hand
from rank_scripts.parts import adam, classifier, crc, loader, net, samples, train, weights
from rank_scripts.talk import RANK
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

EPOCHS = 3


def _against_by_hand(
    count: int = 104, *, model: dict[str, Any] | None = None, **knobs: Any
) -> dict[str, Any]:
    """Train with offloop, then by hand from the same start. By default 13 batches of 8."""
    data, theirs = samples(count), {}
    if "accumulate_grad_batches" in knobs:
        theirs["accumulate"] = knobs["accumulate_grad_batches"]
    if "gradient_clip_val" in knobs:
        theirs["clip"] = knobs["gradient_clip_val"]
    if "precision" in knobs:
        theirs["bf16"] = True

    trainer = classifier(net(**model or {}), **knobs)
    order = torch.Generator().manual_seed(3)
    sampler = BatchSampler(RandomSampler(data, generator=order), 8, drop_last=False)
    torch.manual_seed(7 + RANK)
    found = train(trainer, DataLoader(data, batch_sampler=sampler), epochs=EPOCHS)
    random_state = crc([torch.get_rng_state()])

    expected = net(**model or {})
    torch.manual_seed(7 + RANK)
    losses = train_by_hand(
        expected, adam(expected), data, order=torch.Generator().manual_seed(3), epochs=EPOCHS, **theirs
    )
    by_hand = {
        "weights": weights(expected),
        "buffers": crc(expected.buffers()),
        "losses": losses,
        "random_state": crc([torch.get_rng_state()]),
    }
    return {**found, "random_state": random_state, "by_hand": by_hand}


def plain() -> Any:
    return _against_by_hand()


def dropout() -> Any:
    return _against_by_hand(model={"dropout": 0.3})


def batch_norm() -> Any:
    return _against_by_hand(model={"batch_norm": True})


def accumulation() -> Any:
    return _against_by_hand(accumulate_grad_batches=3)


def clipping() -> Any:
    return _against_by_hand(gradient_clip_val=0.05)


def bf16() -> Any:
    return _against_by_hand(precision="bf16-mixed")


def uneven() -> Any:
    return _against_by_hand(101)


def single_sample_at_the_end() -> Any:
    return _against_by_hand(97)


def everything() -> Any:
    return _against_by_hand(
        101,
        model={"dropout": 0.3, "batch_norm": True},
        accumulate_grad_batches=3,
        gradient_clip_val=0.05,
        precision="bf16-mixed",
    )


# Manual optimization ---------------------------------------------------------------------------------


class Gan(torch.nn.Module):
    """A generator and a discriminator of numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5 + RANK)
        self.generator = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 6))
        self.discriminator = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        )


def _manual(step: Callable[[Any, Any], Any], **knobs: Any) -> dict[str, Any]:
    from offloop.engine import BaseTrainer

    class Manual(BaseTrainer):
        automatic_optimization = False

        def training_step(self, batch: Any) -> Any:
            return step(self, batch)

    model = Gan()
    optimizers = {
        "generator": torch.optim.Adam(model.generator.parameters(), lr=0.01),
        "discriminator": torch.optim.SGD(model.discriminator.parameters(), lr=0.05, momentum=0.9),
    }
    trainer = Manual(model, optimizers, device="cpu", **knobs)
    return train(trainer, loader(samples(101)), epochs=2)  # type: ignore[arg-type]


def gan() -> Any:
    """Two optimizers in turn; the noise is the batch itself, so that it is the same on any number of ranks."""

    def step(self: Any, batch: Any) -> Any:
        real, model = batch[0], self.model
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        fake = model.generator(real.flip(1))
        said = model.discriminator(fake.detach())
        loss = entropy(model.discriminator(real), torch.ones(len(real), 1)) + entropy(
            said, torch.zeros_like(said)
        )
        self.backward(loss)
        self.optimizer_step("discriminator")
        said = model.discriminator(fake)
        self.backward(entropy(said, torch.ones_like(said)))
        self.optimizers["discriminator"].zero_grad()
        self.optimizer_step("generator")
        return loss.detach()

    return _manual(step, gradient_clip_val=0.5)


def two_backward_passes() -> Any:
    """Two backward passes after one forward pass."""

    def step(self: Any, batch: Any) -> Any:
        real, model = batch[0], self.model
        hidden = model.generator(real.flip(1))
        near = torch.nn.functional.mse_loss(hidden, real)
        said = model.discriminator(hidden).square().mean()
        near.backward(retain_graph=True)
        self.backward(said)
        self.optimizer_step("generator")
        self.optimizer_step("discriminator")
        return (near + said).detach()

    return _manual(step)
