"""A callback that computes for long, in a process of its own: training does not slow down.

    python examples/computing_callback.py

After each epoch it looks for prime numbers in pure Python, in the place of whatever a callback computes: drawing,
compressing, scoring generated text. Here it would hold the interpreter that training needs.
"""

import os

import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop import Callback, EpochEnd, Event, Run, RunHandle, TrainEnd, Trainer


class PrimesFound(Event, frozen=True):
    """What the process sends back."""

    of_epoch: int
    primes: int
    pid: int


class CountPrimes(Callback):
    """Runs in its own process: this class goes there by value, the script is not run again."""

    runs_in = "process"

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        primes = sum(all(number % each for each in range(2, number)) for number in range(2, self.limit))
        # Attributes that change here stay here. Results go back as events.
        run.publish(PrimesFound(of_epoch=event.epoch, primes=primes, pid=os.getpid()))

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        print(f"training took {event.seconds:.2f} s")  # printed by the parent


class Show(Callback):
    """Runs here, and gets the events that the other one publishes."""

    async def on_primes_found(self, event: PrimesFound, run: Run) -> None:
        assert event.pid != os.getpid()
        print(f"epoch {event.of_epoch}: {event.primes} primes")


torch.manual_seed(0)
torch.set_num_threads(1)  # more threads do not help with such small tensors
inputs = torch.randn(512, 8)
targets = (inputs.sum(dim=1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=torch.nn.functional.cross_entropy)
result = trainer.train(
    DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True),
    epochs=5,
    callbacks=[CountPrimes(2_000), Show()],
)
cost = result.callback_costs["CountPrimes"]
print(f"its process used {cost.cpu:.1f} s of CPU time")
