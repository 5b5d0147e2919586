"""Train by hand: RUN_NAME RUN_DIR [page] [resume]. Each line of the input is a step; `end` ends the run."""

import sys
from collections.abc import Iterator
from typing import Any

from offloop import Callback, Event, Run, StepEnd
from offloop.dashboard import Dashboard
from offloop.engine.testing import tiny_loader, tiny_trainer

TOKEN = "0123456789abcdef"
name, run_dir, *words = sys.argv[1:]


class Told(Event, frozen=True, kw_only=True):
    """A milestone after each step: with it, the log has the step at once."""


class Tell(Callback):
    """Publishes them."""

    def on_step_end(self, event: StepEnd, run: Run) -> None:
        run.publish(Told())


class Lines:
    """A batch for each line of the input."""

    def __iter__(self) -> Iterator[Any]:
        batches = list(tiny_loader())
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "end":
                return
            yield batches[0]


trainer = tiny_trainer(run_name=name, run_dir=run_dir)
trainer.train(
    Lines(),
    epochs=1,
    callbacks=[Tell(), *([Dashboard(port=0, quiet=True, token=TOKEN)] if "page" in words else [])],
    resume="auto" if "resume" in words else None,
)
