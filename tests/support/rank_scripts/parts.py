"""Models, data, trainers and digests that scenarios share."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rank_scripts.talk import RANK
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from offloop.engine import RunResult, StepEnd, Trainer
from offloop.engine.testing import Recorder

FEATURES, CLASSES = 6, 3


def samples(count: int, *, seed: int = 0) -> "TensorDataset":
    """Return a data set of inputs, targets and numbers of samples."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1), torch.arange(count))


def net(*, dropout: float = 0.0, batch_norm: bool = False, seed: int | None = None) -> nn.Sequential:
    """Return a small classifier; without a seed each rank has other weights, and those of rank 0 count."""
    torch.manual_seed(100 + RANK if seed is None else seed)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 16)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(16))
    layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of most scenarios."""
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def crc(tensors: Iterable[Tensor]) -> int:
    """Return the bits of tensors as one number."""
    found = 0
    for each in tensors:
        found = zlib.crc32(each.detach().cpu().contiguous().numpy().tobytes(), found)
    return found


def weights(model: nn.Module) -> int:
    """Return the bits of the parameters as one number."""
    return crc(model.parameters())


def numbers(model: nn.Module) -> list[float]:
    """Return all parameters as numbers."""
    return torch.cat([each.detach().flatten() for each in model.parameters()]).tolist()


def loader(data: "Dataset[Any]", size: int = 8, **options: Any) -> "DataLoader[Any]":
    """Return a loader."""
    return DataLoader(data, batch_size=size, **options)


class Classifier(Trainer):
    """Trains on inputs and targets, and remembers which samples its steps saw."""

    def training_step(self, batch: Any) -> Any:
        inputs, targets, which = batch
        vars(self).setdefault("seen", []).append(which.tolist())
        outputs = self.model(inputs)
        return {"loss": cross_entropy(outputs, targets), "outputs": outputs, "targets": targets}

    def validation_step(self, batch: Any) -> Any:
        inputs, targets, which = batch
        vars(self).setdefault("validated", []).append(which.tolist())
        outputs = self.model(inputs)
        return {"loss": cross_entropy(outputs, targets), "outputs": outputs, "targets": targets}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: what the steps saw is for the test alone."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Restore nothing."""


def classifier(
    model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **knobs: Any
) -> Classifier:
    """Return a trainer on the CPU."""
    model = net() if model is None else model
    knobs = {"device": "cpu", **knobs}
    return Classifier(model, adam(model) if optimizer is None else optimizer, **knobs)


def outcome(result: RunResult) -> dict[str, Any]:
    """Return the part of a result that is the same on all ranks."""
    return {
        "run_id": result.run_id,
        "status": result.status,
        "reason": result.reason,
        "epochs": result.epochs,
        "steps": result.steps,
        "metrics": dict(result.metrics),
        "history": [
            {"epoch": end.epoch, "step": end.step, "samples": end.samples, "metrics": dict(end.metrics)}
            for end in result.history
        ],
        "best": None if result.best is None else [result.best.score, result.best.epoch, result.best.step],
    }


def train(trainer: Trainer, *given: Any, callbacks: Sequence[Any] = (), **named: Any) -> dict[str, Any]:
    """Train and return what the test compares.

    `outcome` and `weights` must be the same on all ranks, `losses` and `events` are those of rank 0.
    """
    recorder = Recorder()
    result = trainer.train(*given, callbacks=[recorder, *callbacks], **named)
    return {
        "outcome": outcome(result),
        "weights": weights(trainer.model),
        "buffers": crc(trainer.model.buffers()),
        "numbers": numbers(trainer.model),
        "losses": [each.loss for each in recorder.of(StepEnd)],
        "lrs": [each.lr for each in recorder.of(StepEnd)],
        "norms": [each.grad_norm for each in recorder.of(StepEnd)],
        "steps": [each.step for each in recorder.of(StepEnd)],
        "samples": [each.samples for each in recorder.of(StepEnd)],
        "events": recorder.names(),
        "seen": getattr(trainer, "seen", []),
        "validated": getattr(trainer, "validated", []),
    }
