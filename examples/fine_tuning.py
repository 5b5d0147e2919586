"""Fine-tune a pretrained network: first a new head on a frozen body, then the last block of the body, too.

Run it: python examples/fine_tuning.py
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop import Callback, EpochStart, Run, Trainer, decides


class Classifier(torch.nn.Module):
    """A body of two blocks, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(*(self._block() for _ in range(2)))
        self.head = torch.nn.Linear(32, classes)

    @staticmethod
    def _block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # (B, 32) -> (B, classes)
        logits: torch.Tensor = self.head(self.body(inputs))
        return logits


class UnfreezeLastBlock(Callback):
    """Unfreeze the body's last block once the head is no longer random, with a smaller learning rate."""

    def __init__(self, epoch: int, lr: float) -> None:
        self.epoch, self.lr = epoch, lr

    @decides  # training waits for it, so every run unfreezes at the same step
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == self.epoch:
            run.trainer.unfreeze("body.1")
            run.set_lr_nowait(self.lr)


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1024, 32)
    old_task, new_task = inputs[:, :4].argmax(dim=1), (inputs[:, 2] > inputs[:, 5]).long()

    def loader(targets: torch.Tensor) -> "DataLoader[tuple[torch.Tensor, ...]]":
        return DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)

    pretrained = Classifier(classes=4)
    optimizer = torch.optim.AdamW(pretrained.parameters(), lr=1e-2)
    Trainer(pretrained, optimizer, loss=torch.nn.functional.cross_entropy).train(loader(old_task), epochs=5)

    model = Classifier(classes=2)
    model.body.load_state_dict(pretrained.body.state_dict())
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        loss=torch.nn.functional.cross_entropy,
        freeze="body",  # weight decay and running statistics do not change frozen parts
        callbacks=[UnfreezeLastBlock(epoch=3, lr=1e-3)],
    )
    result = trainer.train(loader(new_task), epochs=6, metrics=["accuracy"])
    for epoch in result.history:
        print(f"epoch {epoch.epoch}: loss {epoch.metrics['train_loss']:.3f}, lr {epoch.metrics['lr']:g}")
    for name, value in model.body.state_dict().items():
        if name.endswith("0.weight"):
            is_same = torch.equal(value, pretrained.body.state_dict()[name])
            print(f"{name}: {'unchanged' if is_same else 'changed'}")


if __name__ == "__main__":
    main()
