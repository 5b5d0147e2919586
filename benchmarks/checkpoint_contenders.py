"""What the benchmarks of checkpoints share: a model that is large on disk and quick to train, and others' trainers."""

from pathlib import Path
from typing import Any

import torch
from measure import TINY, Batch, loss_of, optimizer_of


class WithBuffers(torch.nn.Module):
    """The tiny MLP with buffers that every checkpoint holds, present in memory."""

    def __init__(self, count: int, size: int) -> None:
        """Add `count` buffers, float32 of shape (size,)."""
        super().__init__()
        self.model = TINY.model()
        for number in range(count):
            self.register_buffer(f"buffer{number}", torch.full((size,), float(number)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.model(inputs)
        return outputs


def train_with_lightning(
    model: torch.nn.Module, loader: Any, directory: Path, *, every: int, plugins: Any = None, **saving: Any
) -> None:
    """Train an epoch with Lightning, whose ModelCheckpoint saves every so many steps.

    Args:
        model: What to train.
        loader: Its batches.
        directory: For the checkpoints.
        every: Steps between two of them.
        plugins: Of Lightning's trainer.
        saving: More knobs of its ModelCheckpoint.
    """
    lightning: Any = __import__("lightning")
    callbacks: Any = __import__("lightning.pytorch.callbacks", fromlist=["callbacks"])

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            loss: torch.Tensor = loss_of(self.model(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
        callbacks=[callbacks.ModelCheckpoint(directory, every_n_train_steps=every, **saving)],
    )
    trainer.fit(Module(), loader)


def train_with_ignite(model: torch.nn.Module, loader: Any, directory: Path, *, every: int) -> None:
    """Train an epoch with Ignite, whose Checkpoint and DiskSaver save every so many steps and keep two."""
    engine: Any = __import__("ignite.engine", fromlist=["engine"])
    handlers: Any = __import__("ignite.handlers", fromlist=["handlers"])
    optimizer = optimizer_of(model)
    trainer = engine.create_supervised_trainer(model, optimizer, loss_of, device="cpu")
    saver = handlers.DiskSaver(str(directory), require_empty=False)
    save = handlers.Checkpoint({"model": model, "optimizer": optimizer, "trainer": trainer}, saver, n_saved=2)
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED(every=every), save)
    trainer.run(loader, max_epochs=1)
