"""Train without end and show it: PORT RUN_NAME RUN_DIR [resume]. Prints the page's address."""

import sys

from offloop import Callback, Event, Run, TrainStart
from offloop.dashboard import Dashboard
from offloop.engine.testing import EndlessLoader, tiny_trainer

port, run_name, run_dir, *words = sys.argv[1:]


class Told(Event, frozen=True):
    """A milestone of a class that no other process defines."""


class Tell(Callback):
    """Publishes one."""

    async def on_train_start(self, event: TrainStart, run: Run) -> None:
        run.publish(Told())


trainer = tiny_trainer(run_name=run_name, run_dir=run_dir, callbacks=[Tell()])
dashboard = Dashboard(port=int(port), token="0123456789abcdef", quiet=True)
with dashboard:
    print(dashboard.url, flush=True)
    trainer.train(
        EndlessLoader(),
        max_steps=10**9,
        callbacks=[dashboard],
        resume="auto" if "resume" in words else None,
    )
