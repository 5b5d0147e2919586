"""Watch and steer a run of another process: `python watching.py ADDRESS`, with the address that it printed.

Without an address this script starts such a process itself, so that there is something to watch.
"""

import subprocess
import sys

import anyio

from offloop import CommandApplied, TrainEnd, ValidationEnd, connect

TRAINING = """
import torch
from offloop import Dashboard, Trainer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = inputs @ torch.randn(8, 1)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
batches = list(zip(inputs.split(32), targets.split(32)))
trainer = Trainer(model, optimizer, loss=torch.nn.functional.mse_loss, callbacks=[Dashboard(port=0)])
trainer.train(batches, batches[:4], epochs=1_000_000)
"""


async def watch(address: str) -> None:
    """Pause once to look at the curve, halve the learning rate, and stop when the loss is small."""
    async with connect(address) as run:
        print(f"watching {run.id}, {run.state}")
        has_looked = has_stopped = False
        async for event in run.events(ValidationEnd, CommandApplied, TrainEnd):
            match event:
                case ValidationEnd() if not has_looked:
                    has_looked = True
                    await run.pause("a look")
                    loss = await run.history("loss")
                    print(
                        f"{run.state} at step {run.step}: {len(loss)} losses, the last {loss.value[-1]:.3g}"
                    )
                    await run.set_lr(0.005)
                    await run.resume()
                # Validations from before the stop may still be on their way.
                case ValidationEnd() if not has_stopped and not event.metrics["val_loss"] >= 1e-3:
                    has_stopped = True
                    await run.stop("good enough")
                case CommandApplied():
                    print(f"step {event.step}: {event.command} by {event.by}")
                case TrainEnd():
                    print(f"{event.status} after {event.step} steps: {event.reason}")


def main() -> None:
    if len(sys.argv) > 1:
        anyio.run(watch, sys.argv[1])
        return
    with subprocess.Popen([sys.executable, "-c", TRAINING], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        announced = next(line for line in process.stderr if line.startswith("Live page: "))
        anyio.run(watch, announced.removeprefix("Live page: ").strip())


if __name__ == "__main__":
    main()
