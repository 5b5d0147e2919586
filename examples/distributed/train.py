"""A script for one process and for many: `python train.py`, or as the other files here start it.

It continues where the last start of it has ended, on as many processes or others.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop import ModelCheckpoint, Trainer

torch.manual_seed(0)  # only for the data, which all processes make alike
inputs = torch.randn(4096, 20)
targets = (inputs.sum(dim=1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))

trainer = Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-3),
    loss=torch.nn.functional.cross_entropy,
    seed=0,
    run_dir="runs",
    run_name="several",
)
result = trainer.train(
    DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True),  # 64 of all processes together
    epochs=3,
    callbacks=[ModelCheckpoint(every_n_steps=50)],
    resume="auto",
)
if trainer.rank == 0:
    print(
        f"{result.status}: {result.steps} steps, {trainer.world_size} ranks, loss {result.metrics['train_loss']:.3f}"
    )
